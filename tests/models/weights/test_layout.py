"""Packing LoRAs into blocks: bit-exact, no block with numbers of two groups, the sizes of the method's paper."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch import Tensor
from weight_layers import SMALL, Layer, e2gan

from finectl.errors import InputError, UsageError
from finectl.models.weights.layout import Layout


def drawn(layout: Layout) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in layout.shapes.items()}


@pytest.mark.parametrize(("rule", "size"), list(itertools.product((1, 2, 3), (128, 256, 512))))
def test_packing_is_undone_bit_for_bit(rule: int, size: int) -> None:
    layout = Layout.of(e2gan(2, 1), rule, size)
    lora = drawn(layout)
    blocks = layout.pack(lora)
    assert blocks.shape == (layout.blocks, size)
    found = layout.unpack(blocks)
    assert list(found) == list(lora)
    assert all(torch.equal(found[name], lora[name]) for name in lora)
    again = Layout.from_dict(json.loads(json.dumps(layout.to_dict())))
    assert all(torch.equal(value, lora[name]) for name, value in again.unpack(blocks).items())


@pytest.mark.parametrize(("rule", "size"), list(itertools.product((1, 2, 3), (16, 128))))
def test_filling_lies_at_the_end_of_groups_and_no_block_holds_two(rule: int, size: int) -> None:
    layout = Layout.of(SMALL, rule, size)
    owner = {part.tensor: index for index, group in enumerate(layout.groups) for part in group.parts}
    names = list(layout.shapes)
    for block in layout.tensor_ids:
        assert len({owner[names[index]] for index in block.tolist() if index >= 0}) == 1
    for group in layout.groups:
        filled = layout.mask[group.first_block : group.first_block + group.blocks].flatten()
        assert filled.tolist() == [True] * group.length + [False] * group.pad
        assert group.pad < size
    assert int(layout.mask.sum()) == layout.length == sum(value.numel() for value in drawn(layout).values())
    ones = {name: torch.ones(shape) for name, shape in layout.shapes.items()}
    assert torch.equal(layout.pack(ones), layout.mask.float())


def test_rules_lay_a_layer_out_as_they_say() -> None:
    layer = Layer("fc", (2, 3), (2, 2), "norm", 1)
    lora = {
        "fc.lora_A.weight": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
        "fc.lora_B.weight": torch.tensor([[10.0, 20.0], [30.0, 40.0]]),
        "norm.weight": torch.tensor([7.0]),
        "norm.bias": torch.tensor([8.0]),
    }
    in_turn = Layout.of([layer], 1, 12).pack(lora)
    assert in_turn.tolist() == [[1, 2, 3, 4, 5, 6, 10, 20, 30, 40, 7, 8]]
    by_rank = Layout.of([layer], 2, 12).pack(lora)
    assert by_rank.tolist() == [[1, 2, 3, 10, 30, 4, 5, 6, 20, 40, 7, 8]]
    apart = Layout.of([layer], 3, 6).pack(lora)
    assert apart.tolist() == [[1, 2, 3, 4, 5, 6], [10, 20, 30, 40, 0, 0], [7, 8, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("rank", "ends", "weights", "blocks"), [(4, 4, 158_552, 621), (5, 5, 196_846, 772), (6, 6, 235_140, 920)]
)
def test_equal_ranks_give_the_sizes_that_follow_from_the_architecture(
    rank: int, ends: int, weights: int, blocks: int
) -> None:
    layout = Layout.of(e2gan(rank, ends))
    assert (layout.length, layout.blocks) == (weights, blocks)


def test_the_preset_of_854_blocks() -> None:
    layout = Layout.of(e2gan(6, 4), 1, 256)
    assert (layout.blocks, layout.length, layout.padding) == (854, 218_200, 424)
    assert len(layout.groups) == 24


def test_a_lora_of_other_layers_is_refused() -> None:
    layout = Layout.of(SMALL)
    lora = drawn(layout)
    wrong = {**lora, "stem.lora_A.weight": torch.zeros(4, 3, 3, 3)}
    with pytest.raises(InputError, match=r"stem\.lora_A\.weight"):
        layout.pack(wrong)
    del lora["query.lora_B.weight"]
    with pytest.raises(InputError, match="missing"):
        layout.pack(lora)
    with pytest.raises(InputError, match="do not fit"):
        layout.unpack(torch.zeros(3, 256))


def test_a_damaged_table_is_refused() -> None:
    table = Layout.of(SMALL, 1, 64).to_dict()
    table["groups"][1]["first_block"] += 1
    with pytest.raises(InputError, match="damaged"):
        Layout.from_dict(table)
    with pytest.raises(InputError, match="damaged"):
        Layout.from_dict({"rule": 1})
    with pytest.raises(UsageError, match="rule"):
        Layout.of(SMALL, 4)
    with pytest.raises(InputError, match="two layers"):
        Layout.of([SMALL[0], SMALL[0]])
