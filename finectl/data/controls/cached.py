"""Control maps in the cache: measured once, uint8 (count, c, H, W) in one file, read through a memory map.

What a file holds depends on the images and on the control alone. It is written batch by batch, so that a run that was
killed goes on with the images that are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finectl.artifacts.cache import cache_root
from finectl.artifacts.files import sha256_json
from finectl.console import Console
from finectl.data.controls import Extractor
from finectl.data.mapped import MappedRows
from finectl.data.row_file import RowFile
from finectl.data.sources import DataOptions
from finectl.data.workers import in_order

VERSION = 1
NAME = "controls.safetensors"
TENSOR = "controls"
BATCH = 16
"""Images measured at a time: what is lost at most when a run is killed."""


@dataclass(frozen=True)
class MapsFile:
    """Which maps: their place in the cache follows from it.

    Args:
        digest: Of the control (`ControlInfo.digest`).
        images: Fingerprint of the images, and how they were brought to their size.
        shape: (count, c, H, W).
    """

    digest: str
    images: str
    shape: tuple[int, int, int, int]

    @property
    def key(self) -> str:
        """What names the entry."""
        return sha256_json([VERSION, self.digest, self.images, list(self.shape)])[:32]

    @property
    def path(self) -> Path:
        """The file."""
        return cache_root() / "controls" / self.key / NAME

    @property
    def rows(self) -> RowFile:
        """The file of the maps, uint8."""
        return RowFile(self.path, TENSOR, "uint8", self.shape, ("control", self.digest))


def open_maps(
    file: MapsFile,
    pixels: Callable[[Tensor], Tensor],
    extractor: Callable[[], Extractor],
    *,
    threads: bool,
    console: Console,
    check: Callable[[], None],
) -> MappedRows:
    """Return the maps of images; what the cache does not hold is measured, and goes on where it was left.

    Args:
        file: Which maps.
        pixels: Positions int64 (B,) to their images, uint8 (B, C, H, W) on the CPU.
        extractor: Gives what measures them; it is called when some are missing.
        threads: Whether several threads may measure at once.
        console: Where progress is shown.
        check: Called between batches; it ends the work by raising.

    Raises:
        InputError: the file was removed while it was read.
        ResourceError: the disk is full.
    """
    options = DataOptions(console=console, check=check)
    return file.rows.made(
        lambda done: _measured(file, pixels, extractor(), threads, options, done),
        BATCH,
        "measures these controls",
        console,
        check,
    )


def _measured(
    file: MapsFile,
    pixels: Callable[[Tensor], Tensor],
    extractor: Extractor,
    threads: bool,
    options: DataOptions,
    done: int,
) -> Iterator[Tensor]:
    """Give the maps of the images from `done` on, batch by batch in their order."""

    def measure(positions: Tensor) -> Tensor:
        found = extractor(pixels(positions))
        if found.dtype != torch.uint8 or tuple(found.shape) != (len(positions), *file.shape[1:]):
            raise ValueError(f"maps {tuple(found.shape)} of {found.dtype}, not {file.shape[1:]} of bytes")
        return found

    if threads:
        images = range(done, file.shape[0])
        yield from in_order(images, lambda image: measure(torch.tensor([image])), options, "measuring controls")
        return
    with (options.console or Console()).progress("measuring controls", file.shape[0], unit="image", done=done) as bar:
        for positions in torch.arange(done, file.shape[0]).split(BATCH):
            if options.check is not None:
                options.check()
            yield measure(positions)
            bar.advance(len(positions), samples=len(positions))
