"""Another width: the function that repeated channels compute, and matrices in place of choices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from finectl.initializers.transfer import BLOCKS, Ancestor
from finectl.initializers.width import (
    SIDES,
    Axes,
    attention_channels,
    axes,
    regular,
    same_width,
    select,
    spread,
    transform,
)
from finectl.models.dit import DiT, initialize_
from finectl.models.presets import DiTConfig

Change = Callable[[dict[str, Tensor], dict[str, Axes]], dict[str, Tensor]]


def config(width: int, heads: int, mlp_ratio: int = 4) -> DiTConfig:
    return DiTConfig(width, 2, heads, patch_size=2, image_size=8, channels=1, num_classes=10, mlp_ratio=mlp_ratio)


def full_model(model_config: DiTConfig) -> DiT:
    """Return a model none of whose parameters is zero."""
    generator = torch.Generator().manual_seed(1)
    model = initialize_(DiT(model_config), generator).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def at_width(model: DiT, target: DiTConfig, change: Change = lambda tensors, taken: tensors) -> DiT:
    """Return the model at another width, with the positions that its channels had."""
    state, taken = model.state_dict(), axes(model.config, target)
    ancestor, made = Ancestor(model.config, state), DiT(target).double()
    parts = [("", ancestor.rest), *((f"{BLOCKS}{i}.", layer) for i, layer in enumerate(ancestor.layers))]
    made.load_state_dict({f"{p}{n}": v for p, part in parts for n, v in change(select(part, taken), taken).items()})
    made.pos_embed = model.pos_embed[:, regular(model.config.width, target.width)]
    return made


def difference(one: DiT, other: DiT) -> float:
    """Return the largest difference of two models' predictions relative to their size."""
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    t, y = torch.tensor([0, 10, 500, 999]), torch.tensor([0, 3, 9, 10])
    with torch.no_grad():
        first, second = one(x, t, y), other(x, t, y)
    return float((first - second).abs().max() / first.abs().mean())


GROWN = [
    ((16, 4), (32, 8)),  # twice the heads
    ((16, 4), (32, 4)),  # heads twice as large
    ((16, 4), (48, 4)),
    ((16, 2), (64, 4)),  # both
    ((16, 4), (96, 6)),  # heads 1.5 times: some of them twice
]


@pytest.mark.parametrize(("small", "large"), GROWN[:4])
def test_a_wider_model_computes_the_same(small: tuple[int, int], large: tuple[int, int]) -> None:
    model = full_model(config(*small))
    assert difference(model, at_width(model, config(*large))) < 1e-10
    assert difference(model, at_width(model, config(*large, mlp_ratio=5))) < 1e-10, "hidden units at any factor"


def test_heads_repeated_at_another_factor_compute_the_same() -> None:
    model = full_model(config(*GROWN[4][0]))
    wide = at_width(model, config(*GROWN[4][1]))
    assert attention_channels(model.config, wide.config)[::16].tolist() == [0, 0, 4, 8, 8, 12]
    assert difference(model, wide) < 1e-10


def test_at_other_factors_the_norm_weighs_channels_unequally() -> None:
    model = full_model(config(16, 4))
    assert difference(model, at_width(model, config(24, 6))) > 1e-3


def test_scores_stay_where_heads_grow_by_any_factor() -> None:
    source, target = config(16, 2), config(24, 2)  # heads of 8 channels become heads of 12
    weight, bias = torch.randn(48, 16).double(), torch.randn(48).double()
    made = select({"attn.qkv.bias": bias, "attn.qkv.weight": weight}, axes(source, target))["attn.qkv.bias"]
    for old, new in zip(range(0, 16, 8), range(0, 24, 12), strict=True):
        before = bias[old : old + 8] @ bias[16 + old : 24 + old] / 8**0.5
        after = made[new : new + 12] @ made[24 + new : 36 + new] / 12**0.5
        torch.testing.assert_close(after, before)
    assert torch.equal(made[48:], bias[32:][attention_channels(source, target)]), "values are as they were"


def test_spread_columns_give_the_same_and_differ() -> None:
    model, target = full_model(config(16, 4)), config(32, 8)
    generator = torch.Generator().manual_seed(3)
    wide = at_width(model, target, lambda tensors, taken: spread(tensors, taken, generator))
    assert difference(model, wide) < 1e-10
    plain = at_width(model, target)
    for found, alike in ((wide, False), (plain, True)):
        x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
        found(x, torch.tensor([0, 10, 500, 999]), torch.arange(4)).square().mean().backward()
        gradient = found.get_parameter("blocks.0.mlp.fc1.weight").grad
        assert gradient is not None
        size = float(gradient.norm())
        assert (float((gradient[0::2] - gradient[1::2]).norm()) < 1e-6 * size) == alike, "copies of hidden units"


def test_copies_lie_side_by_side_and_the_first_keeps_its_position() -> None:
    assert regular(3, 6) == [0, 0, 1, 1, 2, 2] and regular(4, 6) == [0, 0, 1, 2, 2, 3]
    small, large = DiT(config(16, 4)), DiT(config(48, 4))
    assert torch.equal(large.pos_embed[:, ::3], small.pos_embed)


def test_every_layer_has_its_sides() -> None:
    paths = {name.rpartition(".")[0] for name in DiT(config(16, 4)).state_dict()}
    assert {path.split(".", 2)[2] if path.startswith(BLOCKS) else path for path in paths} == set(SIDES)
    assert same_width(config(16, 4), config(16, 4)) and not same_width(config(16, 4), config(16, 2))


def one_hot(indices: Tensor, size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)[indices]


@pytest.mark.parametrize(("before", "after"), [((32, 4), (16, 2)), ((16, 4), (32, 8)), ((16, 2), (24, 3))])
def test_matrices_of_choices_choose(before: tuple[int, int], after: tuple[int, int]) -> None:
    source, target = config(*before), config(*after)
    heads = one_hot(attention_channels(source, target), source.width)
    given = {
        "stream": one_hot(torch.tensor(regular(source.width, target.width)), source.width),
        "hidden": one_hot(torch.tensor(regular(4 * source.width, 4 * target.width)), 4 * source.width),
        **dict.fromkeys("qkv", heads),
    }
    divided = {space: matrix / matrix.sum(0)[matrix.argmax(1)][:, None] for space, matrix in given.items()}
    ancestor = Ancestor(source, full_model(source).state_dict())
    for part in (ancestor.rest, ancestor.layers[1]):
        wanted = select(part, axes(source, target))
        for name, value in transform(part, given, divided).items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-12, atol=0)
    nothing: dict[str, Tensor | None] = dict.fromkeys((*"qkv", "stream", "hidden"))
    assert all(
        torch.equal(value, ancestor.rest[name]) for name, value in transform(ancestor.rest, nothing, nothing).items()
    )
