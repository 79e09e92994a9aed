"""The controls of data sets, and pairs of a text and a control as rows of one table, in the place of classes.

Row k is the k-th image of the data set, with its caption and its control; row N + k the same control with the empty
text; then come the retained images, if any, and last the empty text with the empty control, which is black all over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from finectl.artifacts.files import sha256_json
from finectl.artifacts.job import Job
from finectl.data.controls import CONTROLS, FOLDER, ControlInfo
from finectl.data.controls.cached import MapsFile, open_maps
from finectl.data.dataset import ImageSet
from finectl.data.images import to_uint8
from finectl.data.sources import DataOptions
from finectl.diffusion.losses import Denoiser, Noised
from finectl.diffusion.random import generator_for
from finectl.diffusion.schedule import NoiseSchedule
from finectl.models.control_config import CHANNELS
from finectl.models.vae import Vae
from finectl.training.run import Loss
from finectl.training.texts import TextTable

EMPTY = -1
"""In the place of a control: none."""
WHOLE_BYTES = 512 << 20
"""Controls up to this size are held on the device as a whole."""


class Maps(Protocol):
    """Control maps of a data set."""

    def __len__(self) -> int: ...
    def take(self, indices: Tensor) -> Tensor:
        """Return maps uint8 (B, c, H, W) on the CPU, of places int64 (B,) on the CPU."""


@dataclass(frozen=True, eq=False)
class GivenMaps:
    """The user's control images.

    Args:
        images: All of them.
        places: int64 (N,), the place of each image's control among them.
    """

    images: ImageSet
    places: Tensor

    def __len__(self) -> int:
        return len(self.places)

    def take(self, indices: Tensor) -> Tensor:
        """See `Maps.take`."""
        return pixels_of(self.images, self.places[indices])


@dataclass(frozen=True, eq=False)
class InMemory:
    """Control maps at hand.

    Args:
        levels: uint8 (N, c, H, W).
    """

    levels: Tensor

    def __len__(self) -> int:
        return len(self.levels)

    def take(self, indices: Tensor) -> Tensor:
        """See `Maps.take`."""
        return self.levels[indices]


def pixels_of(images: ImageSet, positions: Tensor, vae: Vae | None = None) -> Tensor:
    """Return images of a set as levels, uint8 (B, C, H, W) on the CPU; latents are decoded.

    Args:
        images: The set.
        positions: int64 (B,).
        vae: What decodes latents.
    """
    values = images.transform(images.read(positions))
    return to_uint8(values if vae is None else vae.decode(values)).cpu()


def open_controls(
    job: Job[Any], images: ImageSet, info: ControlInfo, options: DataOptions, device: torch.device, vae: Vae | None
) -> Maps:
    """Return the controls of a whole data set; those that the cache does not hold are measured.

    Args:
        job: Where progress is shown.
        images: Any part of the set.
        info: The control.
        options: How the data is read.
        device: Where a network measures.
        vae: What decodes the images, where they are latents: controls are those of the decoded images.

    Raises:
        InputError: what measures the controls is not there.
        ResourceError: the disk is full.
    """
    if info.name == FOLDER:
        from finectl.data.controls.folder import open_folder

        given, places = open_folder(images.info, info, options)
        return GivenMaps(given, torch.tensor(places, dtype=torch.int64))
    count = len(images.store.labels)
    every = replace(images, indices=torch.arange(count), rows=None)
    data = images.info
    side = data.image_size * (int(vae.record["downscale"]) if vae else 1)
    decoder = vae.record["digest"] if vae else ""
    # Neither captions nor a choice of classes make other maps.
    source = sha256_json([data.split_by or data.fingerprint, data.image_size, data.resize_filter, decoder])
    file = MapsFile(info.digest, source, (count, info.channels, side, side))
    network = CONTROLS[info.name].network
    return open_maps(
        file,
        lambda positions: pixels_of(every, positions, vae),
        lambda: info.extractor(device),
        threads=not network and vae is None,
        console=job.console,
        check=job.stop_if_requested,
    )


class ConditionTable:
    """Pairs of a text and a control; see `finectl.models.control.Conditions`.

    Args:
        texts: The table of encoded texts.
        maps: The controls, several sets of one shape.
        side: Side of a control, pixels.
        text_rows: int64 (R,), the row of each pair's text.
        places: int64 (R,), the place of its control in the sets, counted through; `EMPTY` for none.
    """

    def __init__(self, texts: TextTable, maps: Sequence[Maps], side: int, text_rows: Tensor, places: Tensor) -> None:
        self._table = texts
        self._maps = [one for one in maps if len(one)]
        self._side = side
        self._text_rows, self._places = text_rows, places
        held = sum(len(one) for one in self._maps) * side * side * CHANNELS
        self._small = held <= WHOLE_BYTES
        self._whole: Tensor | None = None

    def __len__(self) -> int:
        return len(self._text_rows)

    @property
    def length(self) -> int:
        """Vectors a text."""
        return self._table.length

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def texts(self, rows: Tensor) -> Tensor:
        """See `finectl.models.control.Conditions`."""
        self._to(rows.device)
        return self._table.gather(self._text_rows[rows])

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def controls(self, rows: Tensor) -> Tensor:
        """See `finectl.models.control.Conditions`."""
        self._to(rows.device)
        places = self._places[rows]
        if self._small:
            if self._whole is None or self._whole.device != rows.device:
                self._whole = self._read(torch.arange(EMPTY, sum(len(one) for one in self._maps))).to(rows.device)
            levels = self._whole[places - EMPTY]  # the first one is the empty one
        else:
            levels = self._read(places.cpu()).to(rows.device, non_blocking=True)
        return levels.float() / 255

    def _to(self, device: torch.device) -> None:
        if self._places.device != device:
            self._text_rows, self._places = self._text_rows.to(device), self._places.to(device)

    def _read(self, places: Tensor) -> Tensor:
        """Return controls uint8 (B, 3, H, W) of places on the CPU."""
        levels = torch.zeros(len(places), CHANNELS, self._side, self._side, dtype=torch.uint8)
        first = 0
        for one in self._maps:
            mine = ((places >= first) & (places < first + len(one))).nonzero().flatten()
            if len(mine):
                levels[mine] = one.take(places[mine] - first)  # grey ones are repeated
            first += len(one)
        return levels


@dataclass(frozen=True, eq=False)
class Pairs:
    """A data set's pairs, and those of retained images.

    Args:
        table: All of them.
        count: N, images of the data set.
        retained: Rows of the retained images, int64.
    """

    table: ConditionTable
    count: int
    retained: Tensor

    @property
    def null(self) -> int:
        """The row of the empty text with the empty control."""
        return len(self.table) - 1

    def of(self, images: ImageSet) -> ImageSet:
        """Return images of the data set whose labels are the rows of their pairs."""
        return replace(images, rows=torch.arange(self.count))


def pair_up(
    texts: TextTable,
    captions: Tensor,
    maps: Maps,
    side: int,
    retained_captions: Tensor | None = None,
    retained_maps: Maps | None = None,
) -> Pairs:
    """Make the table of pairs.

    Args:
        texts: The encoded texts; the last one is empty.
        captions: int64 (N,), the row of each image's caption.
        maps: The controls of the N images.
        side: Side of a control, pixels.
        retained_captions: int64 (M,), the same of retained images; None without any.
        retained_maps: Their controls; None for the empty one.
    """
    none, count = len(texts) - 1, len(captions)
    again = torch.zeros(0, dtype=torch.int64) if retained_captions is None else retained_captions
    places = torch.full_like(again, EMPTY) if retained_maps is None else count + torch.arange(len(again))
    own = torch.arange(count)
    text_rows = torch.cat([captions, torch.full_like(captions, none), again, torch.tensor([none])])
    control_places = torch.cat([own, own, places, torch.tensor([EMPTY])])
    sets = [maps] if retained_maps is None else [maps, retained_maps]
    table = ConditionTable(texts, sets, side, text_rows, control_places)
    return Pairs(table, count, 2 * count + torch.arange(len(again)))


@dataclass(frozen=True, eq=False)
class WithoutTexts:
    """A loss that sees some of the images without their texts; their controls stay.

    Which ones depends on the seed and on the step alone, whatever the number of processes.

    Args:
        loss: What it is made of.
        count: N of `Pairs`.
        batch: Images of a batch over all processes.
        probability: Of an image's being without its text, in [0, 1].
        seed: Of the draws.
    """

    loss: Loss
    count: int
    batch: int
    probability: float
    seed: int

    def __call__(self, model: Denoiser, schedule: NoiseSchedule, batch: Noised, *, step: int) -> Tensor:
        """Return each image's loss, (b,), as `finectl.training.run.Loss` says."""
        y = batch.y
        draws = torch.rand(self.batch, generator=generator_for("captions", self.seed, step))
        dropped = (draws[batch.slots or slice(len(y))] < self.probability).to(y.device)
        rows = torch.where(dropped & (y < self.count), y + self.count, y)
        return self.loss(model, schedule, replace(batch, y=rows), step=step)
