"""How numbers are written for people: digits and units of each metric, counts, bytes and operations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

UNKNOWN = (None, "?")
MISSING = "-"
MORE_DECIMALS = 2  # how many digits a column may get beyond its usual ones, so that no interval reads ±0.00
LARGEST_FIXED = 1e6
SI_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


@dataclass(frozen=True)
class Unit:
    """How the values of a metric are written: multiplied by `factor`, with `decimals` digits, followed by `suffix`."""

    decimals: int = 4
    factor: float = 1.0
    suffix: str = ""


PERCENT = Unit(1, 100.0, " %")
UNITS = {
    "loss": Unit(4),
    "frechet": Unit(3),
    "accuracy": PERCENT,
    "fid": Unit(2),
    "fid-infinity": Unit(2),
    "sfid": Unit(2),
    "is": Unit(2),
    "kid": Unit(5),
    "precision": PERCENT,
    "recall": PERCENT,
    "density": Unit(3),
    "coverage": PERCENT,
    "fdd": Unit(2),
    "fd-clip": Unit(3),
    "clip-score": Unit(2),
    "psnr": Unit(2, suffix=" dB"),
}


def unit_of(metric: str) -> Unit:
    """Return how the values of `metric` are written."""
    return UNITS.get(metric, Unit())


def interval_of(measured: Mapping[str, Any]) -> tuple[float, float]:
    """Return the interval (low, high) of a measured value: without bounds where there is none, a point at infinity."""
    value = measured["value"]
    if math.isinf(value):
        return value, value
    low, high = measured.get("interval") or (-math.inf, math.inf)
    return (
        -math.inf if low is None or math.isnan(low) else low,
        math.inf if high is None or math.isnan(high) else high,
    )


def measured_texts(metric: str, values: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """Return the values of one column, each with ± half of its interval, all with the same digits.

    Args:
        metric: Its name, which decides on digits and unit.
        values: `{"value", "interval", ...}`, in the metric's own units; None where there is none.
    """
    unit = unit_of(metric)
    decimals = _decimals(unit, [value for value in values if value is not None])
    return [MISSING if value is None else _measured_text(unit, decimals, value) for value in values]


def _half(unit: Unit, measured: Mapping[str, Any]) -> float:
    low, high = interval_of(measured)
    return 0.0 if low == high else (high - low) / 2 * unit.factor


def _decimals(unit: Unit, values: Sequence[Mapping[str, Any]]) -> int:
    """Return the digits after the point: the usual ones, or more when the narrowest interval would be written as 0."""
    halves = [half for value in values if 0 < (half := _half(unit, value)) < math.inf]
    if not halves:
        return unit.decimals
    needed = -math.floor(math.log10(min(halves)))
    return min(max(unit.decimals, needed), unit.decimals + MORE_DECIMALS)


def _measured_text(unit: Unit, decimals: int, measured: Mapping[str, Any]) -> str:
    value = measured["value"] * unit.factor
    text = _number(value, decimals)
    if not math.isfinite(value):
        return text
    text += unit.suffix
    return f"{text} ±{_number(_half(unit, measured), decimals)}" if measured.get("interval") else text


def _number(value: float, decimals: int) -> str:
    if math.isfinite(value) and abs(value) >= LARGEST_FIXED:
        return f"{value:.3e}"
    return f"{value:,.{decimals}f}"


def one_line(value: Any) -> str:
    """Return a value as one line without control characters; `-` where it is not known."""
    text = MISSING if value in UNKNOWN else str(value)
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())


def count_text(value: Any) -> str:
    """Return a whole number with separators of thousands; `-` where it is not known."""
    if value in UNKNOWN:
        return MISSING
    return f"{value:,.0f}" if isinstance(value, (int, float)) else str(value)


def seconds_text(value: Any) -> str:
    """Return a time in seconds, with a digit after the point below 10 s."""
    return f"{value:.1f}" if isinstance(value, (int, float)) and 0 < value < 9.95 else count_text(value)


def si_text(value: Any, unit: str) -> str:
    """Return a quantity with an SI prefix and three digits, such as `1.44 MB` or `312 TFLOP`."""
    if value in UNKNOWN:
        return MISSING
    scaled, prefix = float(value), 0
    while abs(scaled) >= 999.5 and prefix < len(SI_PREFIXES) - 1:
        scaled, prefix = scaled / 1000, prefix + 1
    if prefix == 0:
        return f"{scaled:.0f} {unit}"
    decimals = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
    return f"{scaled:.{decimals}f} {SI_PREFIXES[prefix]}{unit}"
