"""The distillation loss: which layers run, what they are compared with, and when it ends."""

from __future__ import annotations

import pytest
import torch

from finectl.diffusion.losses import Noised, denoising_loss
from finectl.diffusion.schedule import NoiseSchedule
from finectl.models.dit import DiT, initialize_
from finectl.models.learngene import evenly_spaced
from finectl.models.presets import DiTConfig
from finectl.training.distill import Distillation

CONFIG = DiTConfig(width=16, depth=4, heads=2, patch_size=2, image_size=4, channels=1, num_classes=3)


def random_model(seed: int) -> DiT:
    model = initialize_(DiT(CONFIG), torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + 9)))
    return model


def batch() -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(3)
    x0, noise = (torch.randn(5, 1, 4, 4, generator=random) for _ in range(2))
    return x0, torch.tensor([0, 1, 2, 3, 3]), torch.tensor([0, 10, 500, 900, 999]), noise


def test_evenly_spaced_layers() -> None:
    assert evenly_spaced(6, 3) == [0, 2, 5] and evenly_spaced(6, 6) == list(range(6))
    assert evenly_spaced(6, 2) == [0, 5] and evenly_spaced(6, 1) == [2] and evenly_spaced(1, 3) == [0, 0, 0]
    assert evenly_spaced(3, 5) == [0, 0, 1, 2, 2] and evenly_spaced(12, 12) == list(range(12))


def test_the_ancestor_itself_has_no_loss_at_full_depth() -> None:
    model = random_model(0)
    loss = Distillation(model, random_model(0), steps=50, seed=0)
    schedule = NoiseSchedule.of(CONFIG)
    x0, y, t, noise = batch()
    seen = set()
    for step in range(50):
        layers = loss.layers(step)
        value = loss(loss.student, schedule, Noised(x0, y, t, noise), step=step)
        assert value.shape == (5,)
        assert bool((value == 0).all()) == (layers == [0, 1, 2, 3])
        assert layers == evenly_spaced(4, len(layers))
        seen.add(len(layers))
    assert seen == {1, 2, 3, 4}
    assert 15 <= sum(len(loss.layers(step)) == 4 for step in range(50)) <= 35


def test_every_parameter_has_a_gradient_and_the_ancestor_none() -> None:
    student = random_model(1)
    loss = Distillation(random_model(0), student, steps=50, seed=0)
    step = next(step for step in range(50) if len(loss.layers(step)) == 2)
    x0, y, t, noise = batch()
    loss(student, NoiseSchedule.of(CONFIG), Noised(x0, y, t, noise), step=step).mean().backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad == 0).all()) == name.startswith(("blocks.1.", "blocks.2.")), name
    assert all(parameter.grad is None for parameter in loss.teacher.parameters())


def test_after_the_distillation_it_is_the_denoising_loss() -> None:
    student = random_model(1)
    loss = Distillation(random_model(0), student, steps=7, seed=0)
    schedule = NoiseSchedule.of(CONFIG)
    x0, y, t, noise = batch()
    expected = denoising_loss(student, schedule, x0, y, t, noise)
    assert torch.equal(loss(student, schedule, Noised(x0, y, t, noise), step=7), expected)
    assert not torch.equal(loss(student, schedule, Noised(x0, y, t, noise), step=6), expected)


def test_layers_run_alone_inside_the_block_only() -> None:
    model = random_model(0).eval()
    x0, y, t, _ = batch()
    with torch.no_grad():
        whole = model(x0, t, y)
        with model.running([0, 3]):
            part = model(x0, t, y)
        with pytest.raises(KeyError), model.running([1]):
            raise KeyError
        assert torch.equal(model(x0, t, y), whole) and not torch.equal(part, whole)
        del model.blocks[1:3]
        assert torch.equal(model(x0, t, y), part)
