"""Two models in one reverse process: where the one takes over from the other, and what guides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusion.test_sampling import SHAPE, by_label, sample
from torch import Tensor

from finectl.diffusion.sampling import Pretrained
from finectl.diffusion.schedulers import SCHEDULERS, steps_handed_over

OWN_NULL, NULL = 10, 3
BORDERS = [
    (0.0, 50, 0),
    (1.0, 50, 50),
    (0.1, 50, 5),
    (0.3, 50, 15),
    (0.7, 50, 35),
    (0.55, 20, 11),
    (0.01, 50, 1),
    (0.5, 7, 4),
    (1 / 3, 9, 3),
    (1e-9, 50, 0),
]


def before(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Another model than `by_label`, whose answer depends on all it is given."""
    return torch.sin(x * 0.7) + 0.2 * torch.cos(2 * t.float() + y)[:, None, None, None]


def never(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    raise AssertionError("this model has no step to make")


@pytest.mark.parametrize(("share", "steps", "wanted"), BORDERS)
def test_steps_of_an_index_below_their_share_are_handed_over(share: float, steps: int, wanted: int) -> None:
    assert steps_handed_over(share, steps) == wanted
    if share > 1e-6:
        assert [index < share * steps - 1e-6 for index in range(steps)] == [index < wanted for index in range(steps)]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_each_step_goes_to_its_model_with_its_label(scheduler: str, share: float) -> None:
    seen: list[tuple[str, int, list[int]]] = []

    def recorded(name: str, model: Any) -> Any:
        def call(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            seen.append((name, int(t[0]), y.tolist()))
            return model(x, t, y)

        return call

    second = Pretrained(recorded("second", before), NULL, share)
    sample(recorded("own", by_label), (0, 1), scheduler=scheduler, sampling_steps=8, pretrained=second)
    handed = steps_handed_over(share, len(seen))
    names = [name for name, _, _ in seen]
    assert names == ["own"] * (len(seen) - handed) + ["second"] * handed
    assert all(labels == ([0, 1] if name == "own" else [NULL, NULL]) for name, _, labels in seen)
    assert [t for _, t, _ in seen] == sorted((t for _, t, _ in seen), reverse=True)  # the last have the least noise


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_none_and_all_of_the_steps_are_the_models_alone_bit_for_bit(scheduler: str, guidance: float) -> None:
    options: dict[str, Any] = {"scheduler": scheduler, "guidance": guidance}
    alone = sample(by_label, **options)
    assert torch.equal(sample(by_label, pretrained=Pretrained(never, NULL, 0.0), **options), alone)
    other = sample(before, (NULL,) * 5, scheduler=scheduler)
    assert torch.equal(sample(never, pretrained=Pretrained(before, NULL, 1.0), **options), other)
    half = sample(by_label, pretrained=Pretrained(before, NULL, 0.5), **options)
    assert not torch.equal(half, alone) and not torch.equal(half, other)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_domain_guidance_moves_away_from_the_other_models_unconditional_output(scheduler: str) -> None:
    scale = 1.5

    def guided(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        unconditional = before(x, t, torch.full_like(y, NULL))
        return unconditional + scale * (by_label(x, t, y) - unconditional)

    found = sample(by_label, scheduler=scheduler, guidance=scale, pretrained=Pretrained(before, NULL, None))
    assert torch.equal(found, sample(guided, scheduler=scheduler))
    assert not torch.equal(found, sample(by_label, scheduler=scheduler, guidance=scale))  # its own null class
    plain = sample(by_label, scheduler=scheduler, pretrained=Pretrained(never, NULL, None))
    assert torch.equal(plain, sample(by_label, scheduler=scheduler))  # a scale of 1 guides nowhere


def test_the_guided_variance_is_that_of_the_fine_tuned_model() -> None:
    def with_variance(model: Any, value: float) -> Any:
        return lambda x, t, y: torch.cat([model(x, t, y), torch.full_like(x, value)], dim=1)

    def of(own: float, others: float) -> Tensor:
        second = Pretrained(with_variance(before, others), NULL, None)
        return sample(
            with_variance(by_label, own), scheduler="ddpm", learned_sigma=True, guidance=2.0, pretrained=second
        )

    assert torch.equal(of(0.5, -1.0), of(0.5, 1.0)) and not torch.equal(of(0.5, 1.0), of(-0.5, 1.0))
    assert of(0.5, 1.0).shape == (5, *SHAPE)
