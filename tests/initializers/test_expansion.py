"""Learning rates of the few updates that some methods make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import run_cli

from finectl.initializers import tuning
from finectl.initializers.tuning import width_factor
from finectl.models.presets import preset
from finectl.training.settings import SMALL

SHAPES: Any = {"image_size": 8, "channels": 1, "num_classes": 10}
NANO, WIDE = preset("dit-nano", **SHAPES), preset("dit-s", **SHAPES)


def test_the_usual_rate_falls_with_the_width_that_is_gained() -> None:
    assert width_factor(NANO, WIDE) == pytest.approx((64 / 384) ** 1.5)
    assert width_factor(WIDE, NANO) == width_factor(NANO, NANO) == width_factor(None, WIDE) == 1.0


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A workspace with what each method starts from."""
    root = tmp_path_factory.mktemp("rates")
    place = ("--workspace", root)
    condensed = run_cli("condense", "--depth", 1, "--steps", 1, "--batch-size", 4, "--eval-every", 0, *place).path
    dense = run_cli("init", "--method", "he", "--model", "dit-nano", "--depth", 1, *place).path
    return root, {
        "fine": run_cli("extract", condensed, *place).path,
        **dict.fromkeys(("pruned-kd", "ligo"), dense),
    }


@pytest.mark.parametrize(("method", "factor"), [("fine", 6**-1.5), ("pruned-kd", 6**-1.5), ("ligo", 1.0)])
def test_models_of_repeated_channels_are_tuned_at_that_rate(
    sources: tuple[Path, dict[str, Path]], method: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, source = sources
    rates: list[float] = []
    fit = tuning.fit

    def watched(job: Any, model: Any, data: Any, settings: Any, **given: Any) -> Any:
        rates.extend(group["lr"] for group in given["groups"] or [{"lr": settings.lr}])
        return fit(job, model, data, settings, **given)

    monkeypatch.setattr(tuning, "fit", watched)
    options = ("--method", method, "--model", "dit-s", "--depth", 1, "--batch-size", 4, "--tune-steps", 1)
    ran = run_cli("init", source[method], *options, "--workspace", root)
    assert ran.code == 0, ran.err
    assert rates[-1] == pytest.approx(factor * SMALL["lr"])
    assert len(rates) == 1 or rates[0] == 0.01, "what stands in for weights keeps --tune-lr"
