"""Statistics of reference images: moments of their features, and the rows that kernels and neighbours need.

One file holds them for one network: `OUTPUT.mean`, `OUTPUT.cov` and `OUTPUT.rows` for each of its outputs, float64 and
float32, and in its header what they are of.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finectl.artifacts.chunks import Chunks
from finectl.artifacts.tensors import load_tensors, save_tensors
from finectl.errors import InputError
from finectl.metrics.extraction import IDENTITY, canonical_order
from finectl.metrics.frechet import Gaussian, Moments

# Rows kept of a larger reference: precision and recall are customarily measured with as many.
KEPT_ROWS = 10_000
NPZ_NAMES = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclass(frozen=True, eq=False)
class Statistics:
    """One output of a network over the reference images.

    Args:
        gaussian: Their moments.
        rows: float32 (M, d), the features of all or of 10,000 of them; None where only moments are known.
    """

    gaussian: Gaussian
    rows: Tensor | None

    def require_rows(self, metric: str, where: str) -> Tensor:
        """Return the rows.

        Raises:
            InputError: only moments are known.
        """
        if self.rows is None:
            raise InputError(
                f"{metric} needs the features of the reference images, and {where} holds their moments only",
                fix="give the images themselves: --reference folder:PATH",
            )
        return self.rows


def fit(chunks: Chunks, extractor: str, outputs: Sequence[str]) -> dict[str, Statistics]:
    """Compute statistics out of the features of the reference images.

    Args:
        chunks: Their rows on disk.
        extractor: The network's key.
        outputs: Which of its outputs.

    Raises:
        InputError: there are fewer than 2 images.
    """
    order = canonical_order(chunks.load(lambda name: name == IDENTITY)[IDENTITY])
    fitted = {}
    for output in outputs:
        key = f"{extractor}/{output}"
        if chunks.count <= KEPT_ROWS:
            rows = chunks.load(lambda name, key=key: name == key)[key][order]  # type: ignore[misc]
            fitted[output] = Statistics(Gaussian.of(rows), rows)
        else:
            fitted[output] = _streamed(chunks, key, order)
    return fitted


def _streamed(chunks: Chunks, key: str, order: Tensor) -> Statistics:
    """Fit to more rows than are to be in memory, and keep 10,000 of them, evenly spread over their order."""
    places = torch.linspace(0, len(order) - 1, KEPT_ROWS, dtype=torch.float64).round().long()
    kept = order[places]  # (KEPT_ROWS,), image numbers
    moments: Moments | None = None
    rows: Tensor | None = None
    for first in chunks.firsts:
        some = load_tensors(chunks.file(first))[key]
        moments = moments or Moments(some.shape[1])
        moments.update(some)
        rows = torch.empty(len(kept), some.shape[1]) if rows is None else rows
        here = (kept >= first) & (kept < first + len(some))
        rows[here] = some[kept[here] - first]
    if moments is None:
        raise InputError("no images to take statistics of", expected="at least 2 images")
    return Statistics(Gaussian.from_moments(moments.mean, moments.cov, moments.count), rows)


def save(path: Path, statistics: Mapping[str, Statistics], recorded: Mapping[str, Any]) -> None:
    """Write statistics, and what they are of, to a safetensors file."""
    tensors = {}
    for output, one in statistics.items():
        tensors[f"{output}.mean"] = one.gaussian.mean
        tensors[f"{output}.cov"] = one.gaussian.covariance
        if one.rows is not None:
            tensors[f"{output}.rows"] = one.rows
    save_tensors(path, tensors, dict(recorded))


def load(path: Path, count: int, outputs: Sequence[str]) -> dict[str, Statistics]:
    """Read statistics that `save` wrote.

    Args:
        path: The file.
        count: Images that they are of.
        outputs: Which outputs are wanted.

    Raises:
        InputError: the file is damaged, or lacks an output.
    """
    tensors = load_tensors(path)
    found = {}
    for output in outputs:
        if f"{output}.mean" not in tensors or f"{output}.cov" not in tensors:
            raise InputError(
                f"{path} has no statistics of {output!r}", expected=f"{output}.mean and {output}.cov", fix=_FIX
            )
        rows = tensors.get(f"{output}.rows")
        if rows is not None and len(rows) == count:
            gaussian = Gaussian.of(rows)  # what `fit` made: fewer rows than features keep their exact form
        else:
            gaussian = Gaussian.from_moments(tensors[f"{output}.mean"], tensors[f"{output}.cov"], count)
        found[output] = Statistics(gaussian, rows)
    return found


def load_npz(path: Path, outputs: Sequence[str], width: Mapping[str, int]) -> dict[str, Statistics]:
    """Read the moments that clean-fid, pytorch-fid or ADM's evaluator wrote: mu and sigma, mu_s and sigma_s.

    Args:
        path: The file; nothing in it is run.
        outputs: Which outputs are wanted, "features" or "spatial".
        width: Their widths.

    Raises:
        InputError: the file lacks an array, or one has another size.
    """
    return {output: Statistics(_npz_gaussian(path, output, width[output]), None) for output in outputs}


def _npz_gaussian(path: Path, output: str, size: int) -> Gaussian:
    names = NPZ_NAMES.get(output, ())
    try:
        with np.load(path, allow_pickle=False) as content:
            there = list(content.files)
            arrays = [np.asarray(content[name], dtype=np.float64) for name in names if name in there]
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read as .npz: {error}", expected="arrays of numbers", fix=_FIX) from error
    if not names or len(arrays) != len(names):
        raise InputError(
            f"{path} holds {', '.join(there)}, which are no statistics of {output!r}",
            expected=" and ".join(names) or "another reference",
            fix=_FIX,
        )
    mean, cov = (torch.from_numpy(array) for array in arrays)
    if tuple(mean.shape) != (size,) or tuple(cov.shape) != (size, size):
        raise InputError(
            f"{path} has statistics of {mean.numel()} features",
            expected=f"{size}, as the samples are measured in",
            fix=_FIX,
        )
    return Gaussian.from_moments(mean, cov, 0)


_FIX = "give the images themselves: --reference folder:PATH"
