"""Merge models that lie on disk into one file, stretch by stretch, in memory that does not depend on their size.

Tensors are cut into stretches of half a megabyte, which stay in a core's cache from the reading to the writing. A few
threads each take one, read it from every file that counts (a weight of 0 costs nothing), compute, and write it to its
place in the output. The result depends neither on the stretches nor on the threads. The order of the models, each with
its weight, decides the order of the additions and so at most the last bits of a sum, and under `dare` the masks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finectl.artifacts.files import staged
from finectl.artifacts.merging import methods
from finectl.artifacts.merging.numbers import (
    Array,
    Bytes,
    accumulator,
    byte_count,
    count_not_finite,
    decode,
    encode,
    is_stored_as,
)
from finectl.artifacts.merging.plan import MergePlan, float_code
from finectl.artifacts.merging.sources import Entry, Extended, Missing, Source, TensorFile, check_same
from finectl.artifacts.merging.trimming import least_kept
from finectl.artifacts.tensors import DTYPE_BYTES, METADATA_KEY
from finectl.errors import ComputationError, InputError, UsageError

STRETCH = 1 << 17  # elements, an even number: half a megabyte of float32
MAX_THREADS = 4
AHEAD = 64  # stretches that are asked of the disk, or wait for a thread, at a time
HEADER_ALIGNMENT = 8
MAX_BYTES = max(DTYPE_BYTES.values())


def merge_files(
    base: Path | None,
    models: Sequence[Path],
    plan: MergePlan,
    out: Path,
    *,
    dtype: str | None = None,
    missing: Missing | None = None,
    metadata: Any = None,
    finite: bool = False,
    threads: int | None = None,
    check: Callable[[], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Write the merge of safetensors files into a new one, synced to the disk before it has its name.

    Floating-point tensors are added up in float32, in float64 where a file stores float64. Weights that ask for one
    model alone, or for the base, copy its bytes. Tensors of other types must be equal in all files and are copied.
    Where files hold infinite numbers, the result is infinite or not a number.

    Args:
        base: theta_0; left aside by a method that needs none.
        models: theta_1 ... theta_n, with the tensors of the base in any order.
        plan: The method and the weights.
        out: The file to write; one that is there is replaced when the new one is whole.
        dtype: How floating-point tensors are stored: a name of `plan.FLOATS`. None: each as in the base, or in the
            first model where there is no base.
        missing: Tensors that the models have and the base may lack, by name: a function from the shape to the values.
        metadata: A JSON value for the header, as `save_tensors` writes it.
        finite: Whether a result that is infinite or not a number is an error.
        threads: How many stretches are worked on at a time; None: as many as there are cores, at most 4.
        check: Called between stretches; what it raises ends the merge, and no file is left.
        progress: Called between stretches with the bytes written so far and the bytes of all tensors.

    Returns:
        The SHA-256 of the new file, as 64 hexadecimal digits.

    Raises:
        UsageError: the plan does not fit the models, or a base is needed.
        InputError: a file is missing or broken, or the files are not of one architecture.
        ComputationError: a result is not finite, and `finite` was asked for.
        ResourceError: the disk is full; no file is left.
    """
    if len(models) != len(plan.weights):
        raise UsageError(f"there are {len(models)} models", expected=f"{len(plan.weights)}, one for each weight")
    if plan.needs_base and base is None:
        raise UsageError(f"{plan.method} needs the base from which the models were fine-tuned", fix="name it: --base")
    code = None if dtype is None else float_code(dtype)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(contextlib.closing(TensorFile(path))) for path in models]
        reference: Source = files[0]
        if base is not None and plan.needs_base:
            theta_0 = stack.enter_context(contextlib.closing(TensorFile(base)))
            reference = Extended(theta_0, missing or {}, files[0].entries)
        for file in files:
            check_same(reference, file)
        plan.check_names(reference.entries)
        handle = -1
        with staged(out) as temporary:
            try:
                handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
                layout, header = _layout(reference.entries, code, metadata)
                _write(handle, np.frombuffer(header, np.uint8), 0)
                merge = _Merge(reference, files, plan, layout, handle, finite, hashlib.sha256(header))
                return merge.run(threads, check, progress)
            finally:
                if handle >= 0:
                    os.close(handle)


def _layout(entries: Mapping[str, Entry], code: str | None, metadata: Any) -> tuple[dict[str, Entry], bytes]:
    """Return the tensors of the output with their places, and the file's first bytes.

    The order is that of the reference, wide types first, so that every tensor is aligned; it is what the safetensors
    library writes, too, and so are the bytes of the header.
    """
    codes = {name: code if code and entry.is_float else entry.code for name, entry in entries.items()}
    header: dict[str, Any] = {}
    if metadata is not None:
        header["__metadata__"] = {METADATA_KEY: json.dumps(metadata, sort_keys=True)}
    place = 0
    for name in sorted(entries, key=lambda name: -DTYPE_BYTES[codes[name]]):
        end = place + byte_count(codes[name], entries[name].count)
        header[name] = {"dtype": codes[name], "shape": list(entries[name].shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    start = 8 + len(text)
    header.pop("__metadata__", None)
    layout = {
        name: Entry(info["dtype"], entries[name].shape, start + info["data_offsets"][0])
        for name, info in header.items()
    }
    return layout, len(text).to_bytes(8, "little") + text


def _write(handle: int, data: Bytes, place: int) -> None:
    """Write all of `data` to its place in a file."""
    done = 0
    while done < data.size:
        done += os.pwrite(handle, data.data[done:], place + done)


class _Memory(threading.local):
    """The arrays that a thread reads into, made once and used for every stretch."""

    def __init__(self) -> None:
        self._arrays: dict[str, Bytes] = {}

    def take(self, use: str, dtype: Any, count: int) -> Array:
        if use not in self._arrays:
            self._arrays[use] = np.empty(STRETCH * MAX_BYTES, np.uint8)
        return self._arrays[use][: np.dtype(dtype).itemsize * count].view(dtype)


@dataclass(frozen=True)
class _Stretch:
    """Elements of one tensor, and from which magnitude on each model's task vector is kept there."""

    name: str
    first: int
    count: int
    least: Mapping[int, Future[Any]] = field(default_factory=dict)


class _Merge:
    """One merge under way."""

    def __init__(
        self,
        reference: Source,
        models: Sequence[Source],
        plan: MergePlan,
        layout: Mapping[str, Entry],
        handle: int,
        finite: bool,
        digest: Any,
    ) -> None:
        self._reference, self._models, self._plan, self._digest = reference, models, plan, digest
        self._layout, self._handle, self._finite = layout, handle, finite
        self._memory = _Memory()

    def run(
        self, threads: int | None, check: Callable[[], None] | None, progress: Callable[[int, int], None] | None
    ) -> str:
        """Work on all stretches, and hash them in their order; an error in one, or of a callback, ends it."""
        total = sum(byte_count(entry.code, entry.count) for entry in self._layout.values())
        done = 0
        waiting: deque[tuple[_Stretch, Future[int]]] = deque()

        def finish_one() -> None:
            nonlocal done
            stretch, future = waiting.popleft()
            size = future.result()
            self._digest.update(os.pread(self._handle, size, self._place(stretch)))
            done += size
            if check:
                check()
            if progress:
                progress(done, total)

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        pool = ThreadPoolExecutor(threads or min(MAX_THREADS, cores), thread_name_prefix="merge")
        try:
            for stretch in self._stretches(pool):
                for source in self._sources(stretch.name):
                    source.prefetch(stretch.name, stretch.first, stretch.count)
                waiting.append((stretch, pool.submit(self._work, stretch)))
                if len(waiting) >= AHEAD:
                    finish_one()
            while waiting:
                finish_one()
        finally:
            pool.shutdown(cancel_futures=True)
        return str(self._digest.hexdigest())

    def _place(self, stretch: _Stretch) -> int:
        """Return where in the file a stretch lies."""
        out = self._layout[stretch.name]
        return out.start + byte_count(out.code, stretch.first)

    def _stretches(self, pool: ThreadPoolExecutor) -> Iterator[_Stretch]:
        """Cut the tensors; what TIES keeps of one is sought before its first stretch, which waits for it."""
        for name, entry in self._layout.items():
            least: dict[int, Future[Any]] = {}
            trimmed = self._plan.method == "ties" and self._plan.density < 1
            if trimmed and entry.is_float and entry.count and self._alone(name) is None:
                least = {index: pool.submit(self._least, name, index) for index in self._active(name)}
            for first in range(0, entry.count, STRETCH):
                yield _Stretch(name, first, min(STRETCH, entry.count - first), least)

    def _active(self, name: str) -> list[int]:
        """Return the models that have a say in a tensor."""
        return [index for index, weight in enumerate(self._plan.weights_of(name)) if weight]

    def _sources(self, name: str) -> list[Source]:
        """Return what must be read for a tensor."""
        if not self._layout[name].is_float:
            return [self._reference, *self._models]
        alone = self._alone(name)
        models = [self._models[index] for index in self._active(name)]
        if alone is not None:
            return [alone]
        return [self._reference, *models] if self._plan.needs_base else models

    def _alone(self, name: str) -> Source | None:
        """Return the only file whose tensor the result is, if there is one."""
        plan, active = self._plan, self._active(name)
        if not active:
            return self._reference
        if len(active) > 1:
            return None
        model, weight = self._models[active[0]], plan.weights_of(name)[active[0]]
        if plan.method == "linear":
            return model
        whole = plan.density == 1 and (weight > 0 and plan.scale == 1 if plan.method == "ties" else weight == 1)
        return model if whole or (plan.method == "task-arithmetic" and weight == 1) else None

    def _work(self, stretch: _Stretch) -> int:
        """Compute and write one stretch; return its bytes."""
        name, out = stretch.name, self._layout[stretch.name]
        if not out.is_float:
            raw = self._copied(stretch)
        else:
            with np.errstate(over="ignore", invalid="ignore"):
                raw = self._stored(stretch, out.code)
            if self._finite and (bad := count_not_finite(raw, out.code)):
                raise ComputationError(
                    f"the merged {name} holds {bad:,} values in {out.code} that are infinite or not numbers, counted "
                    f"over {stretch.count:,} of its elements",
                    expected="finite numbers",
                    fix="smaller weights, or --dtype float32",
                )
        _write(self._handle, raw, self._place(stretch))
        return raw.size

    def _stored(self, stretch: _Stretch, code: str) -> Bytes:
        """Return the result of one stretch as it is stored."""
        name, alone = stretch.name, self._alone(stretch.name)
        if alone is not None and alone.entries[name].code == code:
            return self._raw(alone, stretch, "raw")
        kind = self._kind(name)
        return encode(self._numbers(alone, stretch, "base", kind) if alone else self._merged(stretch, kind), code)

    def _kind(self, name: str) -> Any:
        """Return the type in which a tensor is added up."""
        return accumulator([source.entries[name].code for source in self._sources(name)])

    def _merged(self, stretch: _Stretch, kind: Any) -> Array:
        """Return the merge of one stretch, in the type `kind`."""
        plan, name = self._plan, stretch.name
        weights, active = plan.weights_of(name), self._active(name)
        if plan.method == "linear":
            # theta_1 + sum_i w_i / sum(w) (theta_i - theta_1): the same sum, around the first model.
            total = sum(weights)
            base = self._numbers(self._models[active[0]], stretch, "base", kind)
            rest = self._each(active[1:], stretch, kind)
            return methods.add_weighted(base, ((weights[index] / total, values) for index, values in rest))
        base = self._numbers(self._reference, stretch, "base", kind)
        each = self._each(active, stretch, kind)
        if plan.method == "ties":
            kept = ((weights[index], self._least_of(stretch, index), values) for index, values in each)
            return methods.agree_on_sign(base, kept, plan.scale)
        weighted = ((index, weights[index], values) for index, values in each)
        if plan.method == "dare" and plan.density < 1:
            masks = methods.Masks(plan.density, plan.seed, name, stretch.first)
            return methods.add_weighted(base, methods.keep_at_random(weighted, base, masks))
        return methods.add_weighted(base, ((weight, values) for _, weight, values in weighted))

    def _each(self, active: Sequence[int], stretch: _Stretch, kind: Any) -> Iterator[tuple[int, Array]]:
        """Read the models in turn, the first into memory of its own: the sum is made there."""
        for number, index in enumerate(active):
            yield index, self._numbers(self._models[index], stretch, "model" if number else "sum", kind)

    @staticmethod
    def _least_of(stretch: _Stretch, index: int) -> Any:
        return stretch.least[index].result() if index in stretch.least else 0.0

    def _least(self, name: str, index: int) -> Any:
        """Return the smallest magnitude that TIES keeps of one model's task vector in one tensor."""
        count, kind = self._layout[name].count, self._kind(name)

        def differences() -> Iterator[Array]:
            for first in range(0, count, STRETCH):
                stretch = _Stretch(name, first, min(STRETCH, count - first))
                values = self._numbers(self._models[index], stretch, "model", kind)
                yield np.subtract(values, self._numbers(self._reference, stretch, "base", kind), out=values)

        with np.errstate(over="ignore", invalid="ignore"):
            return least_kept(differences, count, self._plan.density)

    def _raw(self, source: Source, stretch: _Stretch, use: str) -> Bytes:
        """Read a stretch as it is stored."""
        raw = self._memory.take(use, np.uint8, byte_count(source.entries[stretch.name].code, stretch.count))
        source.read(stretch.name, stretch.first, raw)
        return raw

    def _numbers(self, source: Source, stretch: _Stretch, use: str, kind: Any) -> Array:
        """Read a stretch as numbers of the type `kind`."""
        values, code = self._memory.take(use, kind, stretch.count), source.entries[stretch.name].code
        if is_stored_as(kind, code):
            source.read(stretch.name, stretch.first, values.view(np.uint8))
        else:
            decode(self._raw(source, stretch, "raw"), code, values)
        return values

    def _copied(self, stretch: _Stretch) -> Bytes:
        """Return the bytes of a stretch that no method can merge, and which must be the same in all files."""
        raw = self._raw(self._reference, stretch, "raw")
        for model in self._models:
            if model is not self._reference and not np.array_equal(raw, self._raw(model, stretch, "other")):
                raise InputError(
                    f"{stretch.name} ({self._layout[stretch.name].code}) differs between {self._reference.path} and "
                    f"{model.path}",
                    expected="equal values, because only floating-point tensors are merged",
                )
        return raw
