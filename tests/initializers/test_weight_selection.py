"""Weight selection: layers of a larger model, and a regular part of its channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import run_cli
from torch import Tensor

from finectl.artifacts.manifest import read_manifest
from finectl.artifacts.store import open_artifact
from finectl.errors import UsageError
from finectl.initializers.room import require_room
from finectl.initializers.transfer import Ancestor
from finectl.initializers.weight_selection import placement
from finectl.initializers.width import attention_channels, axes, regular, select
from finectl.models.dit import DiT, dense_state_dict, initialize_
from finectl.models.io import load_model, load_weights, read_config
from finectl.models.presets import DiTConfig, count_parameters

CHUNKS = {"attn.qkv": 3, "adaLN_modulation.1": 6, "final_layer.adaLN_modulation.1": 2}
SPREAD = 10_000


def config(width: int, heads: int, depth: int = 2, mlp_ratio: int = 4) -> DiTConfig:
    return DiTConfig(width, depth, heads, patch_size=2, image_size=8, channels=1, num_classes=10, mlp_ratio=mlp_ratio)


def narrowed(state: dict[str, Tensor], source: DiTConfig, target: DiTConfig) -> dict[str, Tensor]:
    """Return the whole state at the width of `target`, layer by layer as the method does it."""
    ancestor, taken = Ancestor(source, state), axes(source, target)
    made = select(ancestor.rest, taken)
    for index, layer in enumerate(ancestor.layers):
        made |= {f"blocks.{index}.{name}": value for name, value in select(layer, taken).items()}
    return made


def moved_from_its_start(model_config: DiTConfig) -> DiT:
    """Return a model none of whose parameters is zero."""
    generator = torch.Generator().manual_seed(1)
    model = initialize_(DiT(model_config), generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def ancestor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A condensed model of three layers, and its dense state."""
    root = tmp_path_factory.mktemp("ancestor")
    options = ("--depth", 3, "--steps", 10, "--batch-size", 16, "--lr", 0.01, "--ema", 0.5)
    path = run_cli("condense", *options, "--workspace", root).path
    artifact = open_artifact(path)
    return root, path, dense_state_dict(load_model(artifact, "ema"), read_config(artifact))


def init(ancestor: Any, *options: object, source: Path | None = None) -> Path:
    root, path, _ = ancestor
    options = ("--method", "weight-selection", *options)
    return run_cli("init", source or path, *options, "--workspace", root).path


def state(path: Path) -> dict[str, Tensor]:
    return load_weights(open_artifact(path), "ema")


def layer(tensors: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    prefix = f"blocks.{index}."
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(value, other[name]) for name, value in one.items())


def test_which_layers_are_taken() -> None:
    assert placement(12, 4, "first") == {0: 0, 1: 1, 2: 2, 3: 3}
    assert placement(3, 5, "first") == {0: 0, 1: 1, 2: 2}
    assert placement(12, 4, "even") == {0: 0, 1: 4, 2: 7, 3: 11}
    assert placement(2, 4, "even") == {0: 0, 1: 0, 2: 1, 3: 1}
    assert placement(5, 5, "even") == placement(5, 5, "first") == {index: index for index in range(5)}


def test_which_channels_are_taken() -> None:
    assert regular(12, 4) == [0, 3, 6, 9]
    assert regular(6, 1) == [0]
    assert regular(7, 7) == list(range(7))
    assert regular(12, 8) == [0, 2, 3, 5, 6, 8, 9, 11]
    for count in range(1, 40):
        for kept in range(1, count + 1):
            chosen = regular(count, kept)
            assert len(chosen) == kept and chosen == sorted(set(chosen)) and 0 <= chosen[0] <= chosen[-1] < count
            if count % kept == 0:
                assert chosen == list(range(0, count, count // kept))
            else:  # within half a channel of the even division
                ends = [2 * abs(place * (kept - 1) - index * (count - 1)) for index, place in enumerate(chosen)]
                assert max(ends) <= kept - 1, (count, kept)


def test_heads_are_kept_whole_or_narrowed_inside() -> None:
    fewer = attention_channels(config(24, 3), config(16, 2))  # heads 0 and 1 of 3, of 8 channels each
    assert fewer.tolist() == [*range(0, 8), *range(8, 16)]
    spread = attention_channels(config(48, 6), config(32, 4))
    assert spread.tolist() == [*range(0, 8), *range(8, 16), *range(24, 32), *range(32, 40)]
    smaller = attention_channels(config(32, 4), config(16, 4))  # heads of 8 channels become heads of 4
    assert smaller.tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30]
    both = attention_channels(config(48, 4), config(16, 2))  # heads 0 and 2, 8 of 12 channels each
    assert both.tolist() == [0, 2, 3, 5, 6, 8, 9, 11, 24, 26, 27, 29, 30, 32, 33, 35]


def encoded(shape: torch.Size) -> Tensor:
    """Return values that tell their row and their column."""
    rows, columns = shape[0], shape[1] if len(shape) > 1 else 1
    value = SPREAD * torch.arange(rows)[:, None] + torch.arange(columns)  # (rows, columns)
    return value.view(rows, columns, *[1] * (len(shape) - 2)).expand(shape) if len(shape) > 1 else value[:, 0]


def decoded(value: Tensor) -> tuple[list[int], list[int]]:
    """Return the rows and the columns that a part of an encoded tensor is from."""
    table = value.view(value.shape[0], -1) if value.dim() < 3 else value[:, :, 0, 0]
    rows, columns = table // SPREAD, table % SPREAD
    assert torch.equal(rows, rows[:, :1].expand_as(rows)) and torch.equal(columns, columns[:1].expand_as(columns))
    return rows[:, 0].tolist(), columns[0].tolist()


@pytest.mark.parametrize(("wide", "narrow"), [((24, 3), (16, 2)), ((48, 6), (16, 4)), ((32, 4), (32, 4))])
def test_tensors_that_share_a_stream_share_their_indices(wide: tuple[int, int], narrow: tuple[int, int]) -> None:
    source, target = config(*wide), config(*narrow)
    made = narrowed({name: encoded(value.shape) for name, value in DiT(source).state_dict().items()}, source, target)
    shapes = {name: value.shape for name, value in DiT(target).state_dict().items()}
    assert {name: value.shape for name, value in made.items()} == shapes
    stream, hidden = regular(wide[0], narrow[0]), regular(4 * wide[0], 4 * narrow[0])
    heads = attention_channels(source, target).tolist()
    everything = {
        "attn.qkv": (heads, stream),
        "attn.proj": (stream, heads),
        "mlp.fc1": (hidden, stream),
        "mlp.fc2": (stream, hidden),
        "adaLN_modulation.1": (stream, stream),
        "x_embedder.proj": (stream, [0]),
        "t_embedder.mlp.0": (stream, list(range(256))),
        "t_embedder.mlp.2": (stream, stream),
        "y_embedder.embedding_table": (list(range(11)), stream),
        "final_layer.linear": (list(range(4)), stream),
        "final_layer.adaLN_modulation.1": (stream, stream),
    }
    for path, (kept_rows, kept_columns) in everything.items():
        stacked = [chunk * wide[0] + row for chunk in range(CHUNKS.get(path, 1)) for row in kept_rows]
        in_blocks = [f"blocks.{index}.{path}" for index in range(source.depth)]
        for name in [path] if f"{path}.weight" in made else in_blocks:
            assert decoded(made.pop(f"{name}.weight")) == (stacked, kept_columns), name
            if path != "y_embedder.embedding_table":
                assert decoded(made.pop(f"{name}.bias")) == (stacked, [0]), name
    assert not made, "every tensor was looked at"


def test_a_hand_made_layer_is_selected_by_hand() -> None:
    source, target = config(8, 2, depth=1, mlp_ratio=1), config(4, 1, depth=1, mlp_ratio=1)
    weight, bias = torch.arange(64.0).view(8, 8), torch.arange(8.0)
    made = select({"attn.proj.weight": weight, "attn.proj.bias": bias}, axes(source, target))
    # Rows 0, 2, 4, 6 of the stream; columns 0 to 3, the first of the two heads.
    assert made["attn.proj.weight"].tolist() == [[r * 8.0 + c for c in range(4)] for r in (0, 2, 4, 6)]
    assert made["attn.proj.bias"].tolist() == [0, 2, 4, 6]


def widen(name: str, value: Tensor, source: DiTConfig, target: DiTConfig) -> Tensor:
    """Undo a selection so that the function stays: rows are repeated, columns that are not kept are zero.

    With every channel of the stream there twice, its mean and its variance are those of the narrow stream. Heads that
    are not kept hold noise, which no column of the next layer reads.
    """
    path = name.rpartition(".")[0]
    path = path.split(".", 2)[2] if path.startswith("blocks.") else path
    rows, columns = axes(source, target)[path][:2]
    wide = value
    if rows is not None and path == "attn.qkv":
        wide = 5 * torch.randn(2 * len(value), *value.shape[1:], generator=torch.Generator().manual_seed(2))
        wide[rows] = value
    elif rows is not None:
        wide = value.repeat_interleave(2, dim=0)
    if columns is None or value.dim() == 1:
        return wide
    if path == "y_embedder.embedding_table":  # its columns are outputs
        return wide.repeat_interleave(2, dim=1)
    full = torch.zeros(wide.shape[0], 2 * wide.shape[1])
    full[:, columns] = wide
    return full


def test_a_larger_model_with_the_same_function_gives_back_the_smaller_one() -> None:
    source, target = config(32, 4), config(16, 2)
    small, large = moved_from_its_start(target), DiT(source)
    large.load_state_dict({name: widen(name, v, source, target) for name, v in small.state_dict().items()})
    assert torch.equal(large.pos_embed[:, ::2], small.pos_embed), "at an integer factor, positions are selected, too"
    large.pos_embed = small.pos_embed.repeat_interleave(2, dim=1)
    made = narrowed(large.state_dict(), source, target)
    assert same(made, small.state_dict())
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([0, 10, 500, 999]), torch.tensor([0, 3, 9, 10])
    with torch.no_grad():
        wanted, found = large(x, t, y), small(x, t, y)
    assert float(wanted.abs().mean()) > 0.01
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_at_equal_width_everything_is_copied() -> None:
    source = config(24, 3)
    whole = dict(moved_from_its_start(source).state_dict())
    assert same(narrowed(whole, source, source), whole)


@pytest.mark.parametrize("variant", ["first", "even"])
def test_the_same_depth_restores_the_ancestor(ancestor: Any, variant: str) -> None:
    assert same(state(init(ancestor, "--variant", variant)), ancestor[2])


def test_depths_below_and_above_the_ancestors(ancestor: Any) -> None:
    root, path, whole = ancestor
    control = state(run_cli("init", path, "--method", "he", "--depth", 5, "--workspace", root).path)
    rest = {name: value for name, value in whole.items() if not name.startswith("blocks.")}
    wanted: dict[tuple[str, int], list[int | None]] = {
        ("first", 2): [0, 1],
        ("first", 5): [0, 1, 2, None, None],
        ("even", 2): [0, 2],
        ("even", 5): [0, 0, 1, 2, 2],
    }
    for (variant, depth), places in wanted.items():
        made = init(ancestor, "--depth", depth, "--variant", variant)
        found = state(made)
        for index, place in enumerate(places):
            expected = layer(control, index) if place is None else layer(whole, place)
            assert same(layer(found, index), expected), (variant, depth, index)
        assert all(torch.equal(found[name], value) for name, value in rest.items())
        metrics = read_manifest(made).metrics
        taken = sum(place is not None for place in places)
        assert metrics["parameters_transferred"] == taken * count_parameters(read_config(open_artifact(made)))["block"]
        extra = sum(value.numel() for value in rest.values())
        assert metrics["parameters_transferred_with_embedders"] == metrics["parameters_transferred"] + extra
    default = state(init(ancestor, "--depth", 2))
    assert same(default, state(init(ancestor, "--depth", 2, "--variant", "first")))


def test_a_narrower_preset(ancestor: Any) -> None:
    root = ancestor[0]
    wide = run_cli("init", "--method", "he", "--model", "dit-s", "--depth", 2, "--workspace", root).path
    made = init(ancestor, "--model", "dit-nano", "--depth", 2, source=wide)
    source, target = read_config(open_artifact(wide)), read_config(open_artifact(made))
    assert isinstance(source, DiTConfig) and isinstance(target, DiTConfig)
    assert (source.width, source.heads, target.width, target.heads) == (384, 6, 64, 4)
    found = state(made)
    assert same(found, narrowed(state(wide), source, target))
    assert all(bool(value.isfinite().all()) for value in found.values())
    assert torch.equal(found["blocks.1.mlp.fc1.weight"], state(wide)["blocks.1.mlp.fc1.weight"][::6, ::6])
    metrics = read_manifest(made).metrics
    assert metrics["parameters_transferred_with_embedders"] == metrics["parameters"], "all of the target is filled"
    load_model(open_artifact(made))


def test_a_wider_target_is_refused(ancestor: Any) -> None:
    root, path, _ = ancestor
    place = ("--method", "weight-selection", "--workspace", root)
    ran = run_cli("init", path, "--model", "dit-s", "--depth", 1, *place)
    assert ran.code == 2 and "384 channels" in ran.err and "64" in ran.err and "cannot widen" in ran.err
    planned = run_cli("init", path, "--model", "dit-s", "--depth", 1, *place, "--dry-run")
    assert planned.code == 2 and planned.err == ran.err, "refused before anything runs"
    require_room(config(32, 4), config(32, 4))
    for target, what in (
        (config(48, 4), "channels"),
        (config(16, 8), "attention heads"),
        (config(16, 1), "channels a head"),
        (config(16, 2, mlp_ratio=9), "hidden units"),
    ):
        with pytest.raises(UsageError, match=what):
            require_room(config(32, 4), target)
