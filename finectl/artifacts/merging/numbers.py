"""Numbers as safetensors files store them, and the float32 or float64 in which they are added up."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from finectl.artifacts.tensors import DTYPE_BYTES

Array = NDArray[Any]
Bytes = NDArray[np.uint8]
FLOAT_CODES = ("F64", "F32", "BF16", "F16")
STORED: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
# Integers of a type's width, and the bits of its exponent: all of them set means infinite or not a number.
EXPONENTS: dict[str, tuple[Any, int]] = {
    "F64": (np.uint64, 0x7FF0000000000000),
    "F32": (np.uint32, 0x7F800000),
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
}
QUIET = 0x40  # the highest bit of a bfloat16's mantissa: whatever else is cut off, a NaN stays one


def accumulator(codes: list[str]) -> Any:
    """Return the type in which numbers of these stored types are added up: float64 if one of them is, else float32."""
    return np.float64 if "F64" in codes else np.float32


def is_stored_as(dtype: Any, code: str) -> bool:
    """Tell whether an array of this type holds the very bytes of that stored type."""
    return STORED.get(code) is np.dtype(dtype).type


def decode(raw: Bytes, code: str, out: Array) -> None:
    """Turn stored numbers into `out`, float32 or float64, exactly; `raw` holds just as many.

    A bfloat16 is the upper half of the float32 of the same value.
    """
    if code != "BF16":
        out[...] = raw.view(STORED[code])
    elif out.dtype == np.float32:
        np.left_shift(raw.view(np.uint16), np.uint32(16), out=out.view(np.uint32))
    else:
        out[...] = (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def encode(values: Array, code: str) -> Bytes:
    """Return float32 or float64 numbers as they are stored, rounded to the nearest, ties to even.

    What is too large becomes infinite. float64 becomes bfloat16 by way of float32.
    """
    with np.errstate(over="ignore"):
        if code != "BF16":
            return values.astype(STORED[code], copy=False).view(np.uint8)
        bits = values.astype(np.float32, copy=False).view(np.uint32)
    upper = bits >> np.uint32(16)
    rounded = bits + (upper & np.uint32(1)) + np.uint32(0x7FFF)
    rounded >>= np.uint32(16)
    # The addition would carry a NaN whose mantissa is all ones over into the sign.
    not_a_number = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    np.copyto(rounded, upper | np.uint32(QUIET), where=not_a_number)
    return rounded.astype(np.uint16).view(np.uint8)


def count_not_finite(raw: Bytes, code: str) -> int:
    """Return how many stored numbers are infinite or not numbers."""
    integer, exponent = EXPONENTS[code]
    mask = integer(exponent)
    return int(np.count_nonzero((raw.view(integer) & mask) == mask))


def byte_count(code: str, count: int) -> int:
    """Return the bytes that so many stored numbers take."""
    return DTYPE_BYTES[code] * count
