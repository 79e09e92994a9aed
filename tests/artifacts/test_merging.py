"""Merging on disk: exact where it must be, the same in any order and any stretch, bounded in memory, safe."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finectl.artifacts.merging import engine
from finectl.artifacts.merging.engine import merge_files
from finectl.artifacts.merging.methods import Masks
from finectl.artifacts.merging.numbers import count_not_finite, decode, encode
from finectl.artifacts.merging.plan import METHODS, MergePlan
from finectl.artifacts.merging.sources import TensorFile
from finectl.artifacts.merging.trimming import least_kept
from finectl.artifacts.tensors import load_tensors, read_metadata, save_tensors
from finectl.errors import ComputationError, InputError, Interrupted, ResourceError, UsageError

SHORT = 1000  # elements of a stretch in these tests: the largest tensor takes three of them, the last one a part
SHAPES: dict[str, tuple[int, ...]] = {"big": (3, 991), "bias": (5,), "scalar": (), "empty": (0, 4), "odd": (33, 3)}
State = dict[str, torch.Tensor]


def state(seed: int, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> State:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    return {name: (spread * value).to(dtype) for name, value in tensors.items()} | {"steps": torch.arange(4)}


class Family:
    """theta_0 and three models fine-tuned from it, on disk and in memory."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.folder = folder
        base = state(0, torch.float64)
        self.states = [state(0, dtype)]
        for seed in (1, 2, 3):
            moved = state(seed, torch.float64, 0.01)
            floats = {name: (base[name] + moved[name]).to(dtype) for name in SHAPES}
            self.states.append(floats | {"steps": base["steps"]})
        self.paths = [folder / f"{number}.safetensors" for number in range(4)]
        for path, tensors in zip(self.paths, self.states, strict=True):
            save_tensors(path, tensors)

    def merge(self, plan: MergePlan, *, models: Sequence[int] = (1, 2, 3), **options: Any) -> State:
        out = self.folder / "out.safetensors"
        digest = merge_files(self.paths[0], [self.paths[number] for number in models], plan, out, **options)
        assert digest == hashlib.sha256(out.read_bytes()).hexdigest(), "found while the file is written"
        return load_tensors(out)

    def reference(self, name: str, weights: Sequence[float]) -> torch.Tensor:
        """theta_0 + sum_i w_i tau_i in float64."""
        base, *models = [tensors[name].double() for tensors in self.states]
        return base + sum(weight * (model - base) for weight, model in zip(weights, models, strict=True))


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.STRETCH % 2 == 0 == SHORT % 2  # as the masks of DARE need
    monkeypatch.setattr(engine, "STRETCH", SHORT)


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return Family(tmp_path)


def same(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype
        and one[name].shape == two[name].shape
        and one[name].flatten().view(torch.uint8).equal(two[name].flatten().view(torch.uint8))
        for name in one
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_nothing_and_of_one_model_give_it_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    family = Family(tmp_path, dtype)
    family.states[1]["bias"][:2] = torch.tensor([-0.0, 0.0], dtype=dtype)
    save_tensors(family.paths[1], family.states[1])
    for method in METHODS:
        weights = [(0.0, 0.0, 0.0), *np.eye(3).tolist()]
        for number, row in enumerate(weights):
            if method != "linear" or number:
                merged = family.merge(MergePlan(tuple(row), method))
                assert same(merged, family.states[number]), (method, number)


def test_the_merge_of_nothing_is_the_file_of_the_base_byte_for_byte(family: Family) -> None:
    family.merge(MergePlan((0.0, 0.0, 0.0)))
    assert (family.folder / "out.safetensors").read_bytes() == family.paths[0].read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_equal_models_merge_to_themselves_bit_for_bit(family: Family, method: str) -> None:
    density = 1.0 if method in ("task-arithmetic", "linear") else 0.3
    merged = family.merge(MergePlan((0.7, -0.2, 1.9), method, density=density), models=(0, 0, 0))
    assert same(merged, family.states[0])


@pytest.mark.parametrize(
    ("dtype", "ulps"),
    [(torch.float64, 3e-16), (torch.float32, 1.3e-7), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)],
)
def test_task_arithmetic_is_as_exact_as_its_storage(tmp_path: Path, dtype: torch.dtype, ulps: float) -> None:
    family = Family(tmp_path, dtype)
    weights = (0.1, 0.9, -0.4)
    merged = family.merge(MergePlan(weights))
    for name in SHAPES:
        assert merged[name].dtype == dtype
        wanted = family.reference(name, weights)
        error = (merged[name].double() - wanted).abs()
        # Half a unit of the storage, and what float32 adds: nothing that shows in 16 bits.
        assert (error <= 1.01 * ulps * wanted.abs() + 1e-7).all(), name
    if dtype in (torch.bfloat16, torch.float16):
        rounded = family.reference("big", weights).float().to(dtype)
        assert (merged["big"] != rounded).double().mean() < 1e-3
        in_storage = family.states[0]["big"].clone()
        for weight, tensors in zip(weights, family.states[1:], strict=True):
            in_storage += weight * (tensors["big"] - family.states[0]["big"])
        assert (in_storage != rounded).double().mean() > 0.05  # what adding up in the storage's type would give


def test_linear_in_the_weights(family: Family) -> None:
    one, two = (0.3, 0.0, 1.1), (-0.5, 0.8, 0.2)
    both = tuple(a + b for a, b in zip(one, two, strict=True))
    merged = [family.merge(MergePlan(weights))["odd"].double() for weights in (one, two, both)]
    base = family.states[0]["odd"].double()
    assert torch.allclose((merged[0] - base) + (merged[1] - base), merged[2] - base, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["task-arithmetic", "linear", "ties"])
def test_order_changes_the_last_bit_at_most(family: Family, method: str) -> None:
    weights = (0.1, 0.9, 0.4)
    wanted = family.merge(MergePlan(weights, method, density=0.6 if method == "ties" else 1.0))
    for order in ((2, 0, 1), (1, 2, 0), (2, 1, 0)):
        plan = MergePlan(tuple(weights[k] for k in order), method, density=0.6 if method == "ties" else 1.0)
        merged = family.merge(plan, models=[k + 1 for k in order])
        for name in SHAPES:
            a, b = merged[name].numpy(), wanted[name].numpy()
            # One unit in the last place of the larger; near 0 the differences themselves, of 0.05, have bits to lose.
            assert (np.abs(a - b) <= np.maximum(np.spacing(np.maximum(np.abs(a), np.abs(b))), 1e-8)).all(), (
                order,
                name,
            )


def test_linear_is_the_weighted_mean_and_needs_no_base(family: Family) -> None:
    weights, out = (1.0, 3.0, 0.5), family.folder / "out.safetensors"
    merge_files(None, family.paths[1:], MergePlan(weights, "linear"), out)
    merged = load_tensors(out)
    for name in SHAPES:
        wanted = sum(w * t[name].double() for w, t in zip(weights, family.states[1:], strict=True)) / sum(weights)
        assert torch.allclose(merged[name].double(), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "density"), [("task-arithmetic", 1.0), ("linear", 1.0), ("ties", 0.3), ("dare", 0.3)]
)
def test_stretches_and_threads_do_not_change_a_bit(
    family: Family, method: str, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = MergePlan((0.5, 0.7, -0.2), method, density=density)
    wanted = family.merge(plan, threads=1)
    monkeypatch.setattr(engine, "STRETCH", 128)
    assert same(family.merge(plan, threads=3), wanted)
    assert same(family.merge(plan), wanted)


def task_vectors(family: Family, name: str) -> tuple[Any, list[Any]]:
    base, *models = [tensors[name].numpy() for tensors in family.states]
    return base, [model - base for model in models]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 1.5, -0.7), (1.0, 0.0, 0.4)])
def test_ties_against_its_definition(family: Family, weights: tuple[float, ...]) -> None:
    density, scale = 0.2, 1.3
    merged = family.merge(MergePlan(weights, "ties", density=density, scale=scale))
    for name in SHAPES:
        base, taus = task_vectors(family, name)
        if not base.size:
            continue
        trimmed = []
        for tau in taus:
            rank = max(1, round(density * tau.size))
            least = np.sort(np.abs(tau), axis=None)[-rank]
            trimmed.append(np.where(np.abs(tau) >= least, tau, 0).astype(np.float64))
            assert rank <= np.count_nonzero(trimmed[-1]) <= rank + 2
        weighted = np.stack([w * tau for w, tau in zip(weights, trimmed, strict=True)])
        elected = np.sign(weighted.sum(0))
        agree = (np.sign(weighted) == elected) & (elected != 0)
        size = np.abs(np.array(weights)).reshape(-1, *[1] * base.ndim)
        mean = (weighted * agree).sum(0) / np.maximum((size * agree).sum(0), 1e-30)
        assert np.allclose(merged[name].numpy(), base + scale * mean, atol=1e-6, rtol=0), name


def test_ties_drops_a_conflict(tmp_path: Path) -> None:
    values = ([0.0] * 4, [4.0, 1.0, 3.0, 1.0], [-1.0, 1.0, -3.0, 3.0])
    paths = [tmp_path / f"{number}" for number in range(3)]
    for path, row in zip(paths, values, strict=True):
        save_tensors(path, {"x": torch.tensor(row)})
    merge_files(paths[0], paths[1:], MergePlan((1.0, 1.0), "ties"), tmp_path / "out")
    assert load_tensors(tmp_path / "out")["x"].tolist() == [4.0, 1.0, 0.0, 2.0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("density", [1e-9, 0.1, 0.5, 1.0])
def test_the_two_ways_to_the_kth_largest_agree_with_sorting(dtype: Any, density: float) -> None:
    values = (np.random.default_rng(0).standard_normal(3001) * 1e-3).astype(dtype)
    values[:500] = 0.25  # ties, within one digit and across its border
    values[500:700] = -np.nextafter(dtype(0.25), dtype(1))
    wanted = np.sort(np.abs(values))[-max(1, round(density * values.size))]

    def stretches() -> Any:
        return (values[first : first + 700].copy() for first in range(0, values.size, 700))

    for partitioned in (0, values.size):
        found = least_kept(stretches, values.size, density, partitioned=partitioned)
        assert found == wanted and found.dtype == dtype


def test_dare_against_its_definition(family: Family) -> None:
    density, weights = 0.3, (0.5, -1.0, 2.0)
    merged = family.merge(MergePlan(weights, "dare", density=density, seed=7))
    base, taus = task_vectors(family, "odd")
    wanted = base.astype(np.float64)
    for index, (weight, tau) in enumerate(zip(weights, taus, strict=True)):
        dropped = Masks(density, 7, "odd", 0).dropped(index, tau.size).reshape(tau.shape)
        wanted = wanted + weight / density * np.where(dropped, 0, tau)
    assert np.allclose(merged["odd"].numpy(), wanted, atol=1e-6, rtol=0)


def test_masks_keep_their_share_and_depend_on_seed_tensor_and_model_alone() -> None:
    count = 200_000
    mask = Masks(0.3, 1, "w", 0).dropped(0, count)
    assert abs(mask.mean() - 0.7) < 5 * (0.21 / count) ** 0.5
    assert (Masks(0.3, 1, "w", 1000).dropped(0, 777) == mask[1000:1777]).all()
    for other in (Masks(0.3, 2, "w", 0).dropped(0, count), Masks(0.3, 1, "v", 0).dropped(0, count)):
        assert abs((other == mask).mean() - 0.58) < 0.01
    assert abs((Masks(0.3, 1, "w", 0).dropped(1, count) == mask).mean() - 0.58) < 0.01
    assert np.packbits(mask[:64]).tobytes().hex() == "ff9fbb5ef771ffdf"  # on every machine


def test_dare_is_task_arithmetic_in_the_mean(family: Family) -> None:
    weights = (0.4, 0.3, 0.3)
    merges = [family.merge(MergePlan(weights, "dare", density=0.5, seed=seed))["odd"].double() for seed in range(64)]
    stacked, wanted = torch.stack(merges), family.reference("odd", weights)
    one, mean = (stacked - wanted).abs().mean(), (stacked.mean(0) - wanted).abs().mean()
    assert 0.002 < one < 0.01 and mean < 0.2 * one  # the noise of 64 is an eighth of that of one


def test_weights_by_tensor(family: Family) -> None:
    merged = family.merge(MergePlan((0.0, 0.0, 0.0), tensor_weights={"bias": (0.0, 1.0, 0.0)}))
    assert torch.equal(merged["bias"], family.states[2]["bias"])
    assert same({"odd": merged["odd"]}, {"odd": family.states[0]["odd"]})


def test_what_the_base_lacks_is_made_up(family: Family) -> None:
    eye = torch.eye(6)
    for number in (1, 2, 3):
        save_tensors(family.paths[number], family.states[number] | {"projections.0.weight": eye * (1 + number)})
    missing: dict[str, Callable[[tuple[int, ...]], Any]] = {
        "projections.0.weight": lambda shape: np.eye(*shape),
        "nowhere": np.zeros,
    }
    merged = family.merge(MergePlan((0.5, 0.0, 1.0)), missing=missing)
    assert torch.equal(merged["projections.0.weight"], eye * (1 + 0.5 + 3))
    assert set(merged) == {*SHAPES, "steps", "projections.0.weight"}
    assert torch.equal(family.merge(MergePlan((0.0, 0.0, 0.0)), missing=missing)["projections.0.weight"], eye)
    with pytest.raises(InputError, match=r"does not fit.*projections\.0\.weight is only there"):
        family.merge(MergePlan((0.5, 0.0, 1.0)))
    with pytest.raises(InputError, match="stands in for"):
        family.merge(MergePlan((0.5, 0.0, 1.0)), missing={"projections.0.weight": lambda shape: np.eye(5)})


@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("weights", [(0.0, 1.0, 0.0), (0.3, 0.3, 0.3)])
def test_the_stored_type_by_option(family: Family, name: str, weights: tuple[float, ...]) -> None:
    merged = family.merge(MergePlan(weights), dtype=name)
    full = family.merge(MergePlan(weights))
    assert merged["steps"].dtype == torch.int64 and torch.equal(merged["steps"], full["steps"])
    for tensor in SHAPES:
        assert torch.equal(merged[tensor], full[tensor].to(getattr(torch, name)))


def test_files_of_several_stored_types(tmp_path: Path) -> None:
    family = Family(tmp_path)
    for number, dtype in ((1, torch.bfloat16), (2, torch.float64), (3, torch.float16)):
        floats = {name: family.states[number][name].to(dtype) for name in SHAPES}
        family.states[number] = floats | {"steps": torch.arange(4)}
        save_tensors(family.paths[number], family.states[number])
    merged = family.merge(MergePlan((0.2, 0.3, 0.4)))["odd"]
    assert merged.dtype == torch.float32
    assert torch.equal(merged, family.reference("odd", (0.2, 0.3, 0.4)).float())  # in float64, and rounded once


@pytest.mark.parametrize(("code", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_all_values_of_16_bits_come_back_and_rounding_is_torchs(code: str, dtype: torch.dtype) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    for kind in (np.float32, np.float64):
        numbers = np.empty(1 << 16, kind)
        with np.errstate(invalid="ignore"):
            decode(patterns.view(np.uint8), code, numbers)
        values = torch.from_numpy(patterns.view(np.int16)).view(dtype)
        assert torch.equal(
            torch.from_numpy(numbers).nan_to_num(0.5), values.to(torch.from_numpy(numbers).dtype).nan_to_num(0.5)
        )
        back = encode(numbers, code).view(np.uint16)
        finite = ~np.isnan(numbers)
        assert (back[finite] == patterns[finite]).all() and count_not_finite(encode(numbers[~finite], code), code) == (
            ~finite
        ).sum()
    rng = np.random.default_rng(0)
    some = np.concatenate([
        rng.integers(0, 1 << 32, 200_000, dtype=np.uint32),  # NaN with every kind of mantissa among them
        (rng.integers(0, 1 << 16, 50_000, dtype=np.uint32) << 16) | np.uint32(0x8000),  # half-way cases of bfloat16
        np.array([0x7F7FFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32),
    ]).view(np.float32)  # fmt: skip
    mine = torch.from_numpy(encode(some, code).view(np.int16)).view(dtype)
    theirs = torch.from_numpy(some).to(dtype)
    assert torch.equal(mine.isnan(), theirs.isnan())
    keep = ~theirs.isnan()
    assert torch.equal(mine[keep].view(torch.int16), theirs[keep].view(torch.int16))


def test_integers_must_be_equal(family: Family) -> None:
    save_tensors(family.paths[3], family.states[3] | {"steps": torch.tensor([0, 1, 2, 4])})
    with pytest.raises(InputError, match=r"steps \(I64\) differs between .*0\.safetensors and .*3\.safetensors"):
        family.merge(MergePlan((0.5, 0.5, 0.0)))
    assert not (family.folder / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bias": torch.zeros(6)}, r"bias is \[6\], not \[5\]"),
        ({"bias": None}, "bias is missing"),
        ({"extra": torch.zeros(1)}, "extra is only there"),
        ({"bias": torch.zeros(5, dtype=torch.int32)}, "bias is of type I32, not F32"),
        ({"steps": torch.zeros(4)}, "steps is of type F32, not I64"),
        ({f"block.{k}": torch.zeros(1) for k in range(9)}, "block.2 is only there; and 6 more"),
    ],
)
def test_mixed_architectures_are_refused(family: Family, change: dict[str, Any], said: str) -> None:
    tensors = {name: value for name, value in (family.states[2] | change).items() if value is not None}
    save_tensors(family.paths[2], tensors)
    with pytest.raises(InputError, match=said) as caught:
        family.merge(MergePlan((1.0, 1.0, 1.0)))
    assert caught.value.expected and "2.safetensors does not fit" in str(caught.value)
    assert not (family.folder / "out.safetensors").exists()


def hostile(entries: Any, data: int = 8) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


@pytest.mark.parametrize(
    "content",
    [
        hostile({"x": {"dtype": "U8", "shape": [-2, -4], "data_offsets": [0, 8]}}),
        hostile({"x": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}),
        hostile({"x": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}}),
        hostile({"x": {"dtype": "F32", "shape": {"2": 1}, "data_offsets": [0, 8]}}),
        hostile({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8.0]}}),
        hostile({"x": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 1 << 66]}}),
        hostile({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, data=7),
        hostile({"x": 3}),
        b"",
        b"\x80\x02}q\x00.",
    ],
)
def test_headers_that_lie(content: bytes, family: Family) -> None:
    family.paths[1].write_bytes(content)
    with pytest.raises(InputError):
        family.merge(MergePlan((1.0, 1.0, 1.0)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: MergePlan(()),
        lambda: MergePlan((1.0,), "median"),
        lambda: MergePlan((1.0, float("nan"))),
        lambda: MergePlan((float("inf"),)),
        lambda: MergePlan((1.0, -1.0), "linear"),
        lambda: MergePlan((1.0, 1.0), "linear", tensor_weights={"x": (1.0, -1.0)}),
        lambda: MergePlan((1.0, 1.0), tensor_weights={"x": (1.0,)}),
        lambda: MergePlan((1.0,), "ties", density=0.0),
        lambda: MergePlan((1.0,), "dare", density=1.5),
        lambda: MergePlan((1.0,), "dare", density=float("nan")),
        lambda: MergePlan((1.0,), "ties", scale=float("inf")),
    ],
)
def test_plans_that_make_no_sense(make: Callable[[], MergePlan]) -> None:
    with pytest.raises(UsageError):
        make()


def test_calls_that_make_no_sense(family: Family) -> None:
    out = family.folder / "out.safetensors"
    for base, count, plan, options in (
        (None, 1, MergePlan((1.0,)), {}),
        (family.paths[0], 2, MergePlan((1.0,)), {}),
        (family.paths[0], 1, MergePlan((1.0,)), {"dtype": "int8"}),
        (family.paths[0], 1, MergePlan((1.0,), tensor_weights={"nowhere": (1.0,)}), {}),
    ):
        with pytest.raises(UsageError):
            merge_files(base, family.paths[1 : 1 + count], plan, out, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="missing"):
        merge_files(family.folder / "none", family.paths[1:2], MergePlan((1.0,)), out)
    assert not out.exists()


def test_results_that_are_not_finite(family: Family) -> None:
    family.states[1]["odd"][3, 1] = 70_000.0
    save_tensors(family.paths[1], family.states[1])
    plan = MergePlan((1.0, 0.0, 0.0))
    assert family.merge(plan, finite=True)["odd"][3, 1] == 70_000
    assert family.merge(plan, dtype="float16")["odd"][3, 1] == float("inf")
    with pytest.raises(ComputationError, match="merged odd holds 1 values in F16"):
        family.merge(plan, dtype="float16", finite=True)


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".safetensors" or "out" in path.name)


def test_a_full_disk_leaves_no_file(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    written, pwrite = 0, os.pwrite

    def filling(handle: int, data: Any, place: int) -> int:
        nonlocal written
        if written > 6_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = max(1, len(data) // 2)  # and a write may take a part only
        written += taken
        return pwrite(handle, data[:taken], place)

    monkeypatch.setattr(os, "pwrite", filling)
    with pytest.raises(ResourceError, match="no space left"):
        family.merge(MergePlan((0.5, 0.5, 0.5)))
    assert written > 6_000 and left_over(family.folder) == []


def test_a_write_that_takes_a_part_goes_on(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = family.merge(MergePlan((0.5, 0.5, 0.5)))
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda handle, data, place: pwrite(handle, data[: max(1, len(data) // 2)], place))
    monkeypatch.setattr(
        os, "preadv", lambda handle, into, place: preadv(handle, [into[0][: max(1, len(into[0]) // 3)]], place)
    )
    assert same(family.merge(MergePlan((0.5, 0.5, 0.5))), wanted)


def test_an_interruption_leaves_what_was_there(family: Family) -> None:
    calls: list[int] = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Interrupted("a signal", saved=False)

    out = family.folder / "out.safetensors"
    out.write_bytes(b"before")
    with pytest.raises(Interrupted):
        family.merge(MergePlan((0.5, 0.5, 0.5)), check=stop)
    assert len(calls) == 3 and out.read_bytes() == b"before" and left_over(family.folder) == [out.name]


def test_progress_reaches_the_whole_and_metadata_is_kept(family: Family) -> None:
    seen: list[tuple[int, int]] = []
    family.merge(
        MergePlan((0.5, 0.5, 0.5)), progress=lambda done, total: seen.append((done, total)), metadata={"a": [1]}
    )
    whole = sum(value.numel() * value.element_size() for value in family.states[0].values())
    assert seen[-1] == (whole, whole) and sorted(seen) == seen
    assert read_metadata(family.folder / "out.safetensors") == {"a": [1]}


def test_a_file_that_shrinks_while_it_is_read(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    real = TensorFile.read

    def cut(self: TensorFile, *arguments: Any) -> None:
        os.truncate(family.paths[2], 3000)  # once all headers are read, and before any element is
        real(self, *arguments)

    monkeypatch.setattr(TensorFile, "read", cut)
    with pytest.raises(InputError, match="became shorter"):
        family.merge(MergePlan((0.5, 0.5, 0.5)), threads=1)
    assert left_over(family.folder) == []


# Task arithmetic on all of the file; the others, which compute more, on one less than a quarter as large.
MEASURED = """
import sys
from pathlib import Path
from finectl.artifacts.merging.engine import merge_files
from finectl.artifacts.merging.plan import MergePlan
large, medium, out = map(Path, sys.argv[1:])
for method, density, base in (("task-arithmetic", 1.0, large), ("dare", 0.5, medium), ("ties", 0.5, medium)):
    merge_files(base, [base] * 2, MergePlan((0.1, 0.2), method, density=density), out)
    assert out.stat().st_size > base.stat().st_size - 100
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(method, int(peak.split()[1]) // 1024)
assert "torch" not in sys.modules and "safetensors" not in sys.modules
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux' /proc")
def test_memory_does_not_follow_the_size_of_the_model(tmp_path: Path) -> None:
    """One tensor of 300 MB, and one of 68 MB: a copy of the first, or two of the second, would show."""
    paths = [tmp_path / "large", tmp_path / "medium"]
    for path, count in zip(paths, (75_000_000, 17_000_000), strict=True):
        text = json.dumps({"x": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
        with path.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + 4 * count)  # zeros that take no room on the disk
    command = [sys.executable, "-c", MEASURED, *map(str, paths), str(tmp_path / "out")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    peaks = {line.split()[0]: int(line.split()[1]) for line in ran.stdout.splitlines()}
    assert len(peaks) == 3 and max(peaks.values()) < 150, peaks


def test_the_plan_needs_no_numpy() -> None:
    code = "import sys; from finectl.artifacts.merging.plan import MergePlan; assert 'numpy' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
