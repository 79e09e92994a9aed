"""From images to rows of features: threads read and resize, the networks compute, chunks are kept on disk.

A chunk that is on disk is not computed again, so interrupted work goes on with the next one, and several processes
share the chunks. Values depend on the set of images alone: every network sees batches of one size, its own, whatever
`--batch-size` is, and rows are put into one order, that of the hashes of their pixels, before anything is drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from finectl.errors import ComputationError
from finectl.metrics.features import Extractor

# Images whose prepared forms are in memory at once, twice: 1 MB each at Inception's size.
GROUP = 128
IDENTITY = "identity"
Pixels: TypeAlias = npt.NDArray[np.uint8]  # (H, W, C), C 1 or 3


class FeatureExtraction:
    """The networks of a run, fed by threads.

    Args:
        extractors: By their keys in `EXTRACTORS`.
        outputs: The outputs that are wanted of each.
        workers: Threads that read and resize; 0 does it when asked.
    """

    def __init__(
        self, extractors: Mapping[str, Extractor], outputs: Mapping[str, Sequence[str]], workers: int = 2
    ) -> None:
        self.extractors = dict(extractors)
        self.outputs = {name: tuple(outputs[name]) for name in self.extractors}
        self._pool = ThreadPoolExecutor(max(workers, 1), "finectl-resize")

    def __enter__(self) -> FeatureExtraction:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def extract(
        self, read: Callable[[int], Pixels], count: int, check: Callable[[], None] = lambda: None
    ) -> dict[str, Tensor]:
        """Compute the features of images.

        Args:
            read: Returns the pixels of image 0..count-1; several threads call it.
            count: Number of images.
            check: Called between batches; it ends the work by raising.

        Returns:
            `EXTRACTOR/OUTPUT` to float32 (count, width), and `identity`, int64 (count, 2), of the pixels' hashes.

        Raises:
            ComputationError: a feature is not finite.
        """
        groups = [range(first, min(first + GROUP, count)) for first in range(0, count, GROUP)]
        parts: dict[str, list[Tensor]] = {}
        ahead = self._submit(read, groups[0]) if groups else []
        for number, _ in enumerate(groups):
            current = ahead
            ahead = self._submit(read, groups[number + 1]) if number + 1 < len(groups) else []
            identities, prepared = zip(*(future.result() for future in current), strict=True)
            parts.setdefault(IDENTITY, []).append(torch.tensor(identities, dtype=torch.int64))
            for name, extractor in self.extractors.items():
                for output, rows in self._forward(name, extractor, [one[name] for one in prepared], check):
                    parts.setdefault(f"{name}/{output}", []).append(rows)
        return {key: torch.cat(rows) for key, rows in parts.items()}

    def _submit(
        self, read: Callable[[int], Pixels], group: range
    ) -> list[Future[tuple[tuple[int, int], dict[str, Tensor]]]]:
        return [self._pool.submit(self._prepare, read, index) for index in group]

    def _prepare(self, read: Callable[[int], Pixels], index: int) -> tuple[tuple[int, int], dict[str, Tensor]]:
        pixels = read(index)
        return identity(pixels), {name: extractor.prepare(pixels) for name, extractor in self.extractors.items()}

    def _forward(
        self, name: str, extractor: Extractor, prepared: Sequence[Tensor], check: Callable[[], None]
    ) -> Iterator[tuple[str, Tensor]]:
        """Give outputs of consecutive batches, the last of which is padded and cut again."""
        size = extractor.batch_size
        for first in range(0, len(prepared), size):
            check()
            some = list(prepared[first : first + size])
            padded = torch.stack(some + [some[-1]] * (size - len(some)))
            for output, rows in extractor.forward(padded, self.outputs[name]).items():
                kept = rows[: len(some)]
                if not bool(kept.isfinite().all()):
                    raise ComputationError(
                        f"the features of {name} are not finite",
                        expected="weights and images of finite numbers",
                        fix=f"look at the images (finectl sample), and at the weights {extractor.info.path}",
                    )
                yield output, kept


def identity(pixels: Pixels) -> tuple[int, int]:
    """Return 128 bits that say which image this is, as two signed numbers: a hash of its shape and pixels."""
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    raw = digest.digest()
    return int.from_bytes(raw[:8], "little", signed=True), int.from_bytes(raw[8:16], "little", signed=True)


def canonical_order(identities: Tensor) -> Tensor:
    """Return the permutation (N,) that puts rows into the order of their images' hashes, int64 (N, 2)."""
    high, low = identities[:, 0].numpy(), identities[:, 1].numpy()
    return torch.from_numpy(np.lexsort((low, high)))
