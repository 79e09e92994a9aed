"""Class accuracy and its Wilson interval."""

from __future__ import annotations

import pytest
import torch

from finectl.errors import ComputationError, InputError, UsageError
from finectl.metrics.accuracy import class_accuracy, wilson_interval


def test_counts_right_answers() -> None:
    logits = torch.tensor([[2.0, 1, 0], [0, 3, 1], [5, 1, 2], [0, 0, 1]])
    accuracy = class_accuracy(logits, torch.tensor([0, 1, 2, 2]))
    assert (accuracy.value, accuracy.details) == (0.75, {"n": 4, "correct": 3})
    assert (accuracy.low, accuracy.high) == wilson_interval(3, 4)
    assert accuracy.low < 0.75 < accuracy.high


def test_interval_has_the_known_values() -> None:
    # Roots of (p - s/n)^2 = z^2 p (1 - p) / n with z = 1.959964, solved by hand for s = 8, n = 10.
    assert wilson_interval(8, 10) == pytest.approx((0.4901624715, 0.9433178485), abs=1e-9)
    assert wilson_interval(0, 10) == pytest.approx((0, 1.959963985**2 / (10 + 1.959963985**2)), abs=1e-9)
    assert wilson_interval(0, 10)[0] == 0
    assert wilson_interval(10, 10)[1] == 1


@pytest.mark.parametrize("successes", [0, 1, 17, 39, 40])
def test_interval_ends_solve_the_score_equation(successes: int) -> None:
    for end in wilson_interval(successes, 40, 0.9):
        if 0 < end < 1:
            assert (end - successes / 40) ** 2 == pytest.approx(1.6448536269514722**2 * end * (1 - end) / 40)


def test_interval_narrows_with_trials_and_widens_with_confidence() -> None:
    def width(*arguments: float) -> float:
        low, high = wilson_interval(*arguments)  # type: ignore[arg-type]
        return high - low

    assert width(50, 100) > width(500, 1000)
    assert width(50, 100, 0.99) > width(50, 100, 0.9)


def test_wrong_inputs_are_refused() -> None:
    logits = torch.zeros(3, 10)
    with pytest.raises(InputError, match="shape"):
        class_accuracy(logits, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(InputError, match="no images"):
        class_accuracy(logits[:0], torch.zeros(0, dtype=torch.int64))
    with pytest.raises(InputError, match="reach from 0 to 10"):
        class_accuracy(logits, torch.tensor([0, 1, 10]))
    with pytest.raises(ComputationError, match="not finite"):
        class_accuracy(logits * torch.nan, torch.zeros(3, dtype=torch.int64))
    for arguments in ((1, 0), (3, 2), (-1, 2), (1, 2, 1.0)):
        with pytest.raises(UsageError):
            wilson_interval(*arguments)
