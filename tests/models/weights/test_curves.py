"""Blocks of any depth: packing, knots, and what is interpolated between them."""

from __future__ import annotations

import math

import pytest
import torch

from finectl.models.weights.config import preset
from finectl.models.weights.curve_unet import CurveUNet
from finectl.models.weights.curves import Grid, by_layer, layer_layout, model_layout
from finectl.models.weights.unet import initialise_
from finectl.training.weights.sigma import CurveCodec, at_knots

SHAPES = {"sigma.qkv": (5,), "bias.qkv": (9,), "sigma.o": (4,), "bias.o": (3,)}
SIZE = 8


def curves(depth: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(depth, *shape, generator=generator) for name, shape in SHAPES.items()}


def test_packing_is_undone_bit_for_bit_and_no_block_holds_two_layers() -> None:
    kinds = layer_layout(SHAPES, SIZE)
    assert [(group.name, group.blocks, group.pad) for group in kinds.groups] == [("qkv", 2, 2), ("o", 1, 1)]
    layout = model_layout(kinds, [2, 3])
    assert layout.blocks == 5 * kinds.blocks
    layers = {**by_layer(curves(2), 2), **by_layer(curves(3, 1), 3)}
    found = layout.unpack(layout.pack(layers))
    assert list(found) == list(layout.shapes)
    assert all(torch.equal(found[name], layers[name]) for name in layers)
    # A layer's blocks are the same wherever it is.
    alone = kinds.pack({name: value[1] for name, value in curves(3, 1).items()})
    assert torch.equal(layout.pack(layers)[3 * kinds.blocks : 4 * kinds.blocks], alone)


def test_what_is_linear_in_the_logarithm_of_the_depth_is_found_at_a_depth_that_was_not_seen() -> None:
    grid = Grid.of([2, 4, 8])

    def values(depth: int) -> torch.Tensor:
        place = torch.linspace(0, 1, depth)
        return torch.stack([1 + 2 * place, (place - 0.3) * math.log(depth)], dim=1)  # (L, 2)

    seen = torch.cat([values(depth) for depth in (2, 4, 8)])
    found = at_knots(grid.mix_all([2, 4, 8]), seen)
    assert torch.allclose(grid.mix(6) @ found, values(6), atol=0.02)
    assert not torch.allclose(grid.mix(6)[:4] @ found, values(4), atol=0.02)


def test_a_single_collected_depth_has_no_slope() -> None:
    grid = Grid.of([3])
    assert grid.knots == 3
    assert torch.equal(grid.mix(3), torch.cat([torch.eye(3), torch.zeros(3, 3)], dim=1))
    assert torch.allclose(grid.mix(1).sum(1), torch.ones(1))


def test_a_codec_is_undone_and_its_numbers_have_unit_size() -> None:
    depths, kinds = [2, 4], layer_layout(SHAPES, SIZE)
    layout, grid = model_layout(kinds, depths), Grid.of(depths)
    initial = layout.pack({**by_layer(curves(2), 2), **by_layer(curves(4, 1), 4)})
    noise = torch.randn(40, layout.blocks, SIZE, generator=torch.Generator().manual_seed(2))
    train = initial + layout.mask * (0.5 + 0.01 * noise)
    fitted = CurveCodec.fit(grid, kinds, depths, (train - initial).unflatten(1, (-1, kinds.blocks)), "none")
    codec = fitted.at(depths, initial)
    z = codec.encode(train)
    assert torch.allclose(codec.decode(z), train * layout.mask, atol=1e-6)
    assert float(z[:, layout.mask].square().mean().sqrt()) == pytest.approx(1, abs=0.02)
    again = CurveCodec.from_state(grid, kinds, fitted.state_dict()).at([3], torch.zeros(3 * kinds.blocks, SIZE))
    mask = model_layout(kinds, [3]).mask
    assert torch.allclose(again.decode(torch.zeros(3 * kinds.blocks, SIZE))[mask], torch.tensor(0.5), atol=0.02)


def test_the_network_works_at_any_depth_and_is_the_same_function_at_a_knot() -> None:
    kinds, grid = 3, Grid.of([2, 4])
    config = preset("tiny", blocks=grid.rows * kinds, length=8, text_width=6, text_rank=2, text_input="tokens+pooled")
    network = CurveUNet(config, grid.mix_all([2, 4]))
    initialise_(network, 0)
    with torch.no_grad():
        for table in (network.linear_out, network.conv_out):
            table.weight.normal_(generator=torch.Generator().manual_seed(3))  # type: ignore[union-attr]
    assert network.places == 6 * kinds
    tokens, mask = torch.randn(1, 3, 6), torch.ones(1, 3, dtype=torch.bool)
    x = torch.randn(kinds, 1, 8)

    def last_layer(count: int) -> torch.Tensor:
        n = torch.arange((count - 1) * kinds, count * kinds)
        with torch.no_grad():
            return network(x, torch.full((kinds,), 500), n, tokens, mask)

    of_four, of_two = last_layer(6), last_layer(2)
    assert not torch.allclose(of_four, of_two)  # the depth counts
    network.at(grid.mix(4))
    assert torch.allclose(last_layer(4), of_four, atol=1e-6)
    network.at(grid.mix(5))
    assert last_layer(5).shape == (kinds, 1, 8) and network.places == 5 * kinds
