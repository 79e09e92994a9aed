"""Encoded texts as a table in the place of a table of classes: made once, kept in the cache, read through a memory map.

Row k is the k-th of the distinct texts in sorted order, the last row is the empty text. What a table holds depends on
the encoder and on the texts alone, so that every stage that reads the same data finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from finectl.artifacts.cache import cache_root
from finectl.artifacts.files import sha256_json
from finectl.artifacts.job import Job
from finectl.console import Console
from finectl.data.captions import captions_of
from finectl.data.dataset import ImageSet
from finectl.data.mapped import MappedRows
from finectl.data.row_file import RowFile
from finectl.data.sources import DataInfo, DataOptions
from finectl.errors import ComputationError
from finectl.models.text import load_text
from finectl.models.unet import condition
from finectl.training.device import resolve_device
from finectl.training.settings import data_options

VERSION = 1
NAME = "texts.safetensors"
TENSOR = "tokens"
BATCH = 64
WHOLE_BYTES = 512 << 20
"""A table up to this size is held on the device as a whole."""


class TextTable:
    """Encoded texts; see `finectl.models.unet.Texts`.

    Args:
        texts: Those of the rows; the last one is empty.
        rows: The vectors, (len(texts), S, E).
    """

    def __init__(self, texts: tuple[str, ...], rows: MappedRows) -> None:
        self.texts = texts
        self.length, self.width = rows.shape[1:]
        self._places = {text: place for place, text in enumerate(texts)}
        self._rows = rows
        self._small = 2 * rows.shape[0] * self.length * self.width <= WHOLE_BYTES
        self._whole: Tensor | None = None
        self._last: tuple[Tensor, int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def rows_of(self, texts: Iterable[str]) -> Tensor:
        """Return the rows of texts, int64 (N,)."""
        return torch.tensor([self._places[text] for text in texts], dtype=torch.int64)

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def gather(self, rows: Tensor) -> Tensor:
        """See `finectl.models.unet.Texts.gather`; teacher and student of one step ask for the same rows."""
        if self._last is not None and self._last[0] is rows and self._last[1] == rows._version:
            return self._last[2]
        if self._small and (self._whole is None or self._whole.device != rows.device):
            self._whole = self._rows.take(torch.arange(len(self))).to(rows.device)
        table = self._whole if self._small else None
        if table is not None:
            taken = table.index_select(0, rows)
        else:
            taken = self._rows.take(rows.cpu()).to(rows.device, non_blocking=True)
        self._last = (rows, rows._version, taken)
        return taken


class TrialTexts:
    """Random vectors for texts that nobody wrote, to time a step with.

    Args:
        count: Rows.
        length: Vectors a text.
        width: Numbers a vector.
    """

    def __init__(self, count: int, length: int, width: int) -> None:
        self.length = length
        self._rows = torch.randn(count, length, width, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self._rows)

    def gather(self, rows: Tensor) -> Tensor:
        """See `finectl.models.unet.Texts.gather`."""
        self._rows = self._rows.to(rows.device)
        return self._rows[rows]


def open_table(
    texts: Iterable[str],
    record: Mapping[str, Any],
    device: torch.device,
    console: Console | None = None,
    check: Callable[[], None] | None = None,
) -> TextTable:
    """Return the table of texts; what the cache does not hold is encoded, and goes on where it was left.

    Args:
        texts: In any order, each as often as it likes.
        record: The encoder, as `describe_text` describes it.
        device: Where to encode.
        console: Where progress is shown.
        check: Called between batches; it ends the work by raising.

    Raises:
        InputError: the encoder is gone, or another one is in its place.
        ComputationError: a vector is not finite in float16.
        ResourceError: the disk is full.
    """
    named = (*sorted({*texts} - {""}), "")
    key = sha256_json([VERSION, record["digest"], list(named)])[:32]
    shape = len(named), int(record["length"]), int(record["width"])
    file = RowFile(cache_root() / "texts" / key / NAME, TENSOR, "float16", shape, ("encoder", record["digest"]))
    console = console or Console()
    check = check or _never
    rows = file.made(
        lambda done: _encoded(named, done, record, device, console, check), BATCH, "encodes these texts", console, check
    )
    return TextTable(named, rows)


def _never() -> None:
    """Go on, whatever comes."""


def _encoded(
    texts: tuple[str, ...],
    done: int,
    record: Mapping[str, Any],
    device: torch.device,
    console: Console,
    check: Callable[[], None],
) -> Iterator[Tensor]:
    """Give the vectors of texts from `done` on, batch by batch, float16 (n, S, E) on the CPU."""
    with console.progress("encoding texts", len(texts), unit="text", done=done) as progress:
        encoder = load_text(record, device)
        for first in range(done, len(texts), BATCH):
            check()
            some = texts[first : first + BATCH]
            tokens = encoder.encode(some)[0].to("cpu", torch.float16)
            if not bool(torch.isfinite(tokens).all()):
                raise ComputationError(f"a text's vectors are not finite in float16, such as that of {some[0][:80]!r}")
            yield tokens
            progress.advance(len(some), samples=len(some))


@dataclass(frozen=True, eq=False)
class Prompts:
    """What images are generated of, in turn.

    Args:
        table: Their vectors.
        texts: The prompts.
        rows: int64 (N,), the row of each.
        classes: int64 (N,), the class of the image that each describes; 0 where there is none.
    """

    table: TextTable
    texts: tuple[str, ...]
    rows: Tensor
    classes: Tensor

    @classmethod
    def of(cls, texts: Sequence[str], table: TextTable) -> Prompts:
        """Return prompts that describe no image at hand."""
        return cls(table, tuple(texts), table.rows_of(texts), torch.zeros(len(texts), dtype=torch.int64))

    @classmethod
    def of_captions(cls, captions: Captions, images: ImageSet) -> Prompts:
        """Return the captions of some of the images of a data set, in their order."""
        texts = tuple(captions.texts[index] for index in images.indices.tolist())
        classes = replace(images, rows=None).labels
        return cls(captions.table, texts, captions.rows[images.indices], classes)

    def texts_of(self, span: range) -> list[str]:
        """Return the prompts of images first..last-1."""
        return [self.texts[index % len(self.texts)] for index in span]

    def rows_of(self, span: range) -> list[int]:
        """Return the rows of images first..last-1."""
        return [int(self.rows[index % len(self.texts)]) for index in span]

    def classes_of(self, span: range) -> Tensor:
        """Return the classes of images first..last-1, int64."""
        return self.classes[torch.tensor([index % len(self.texts) for index in span], dtype=torch.int64)]


@dataclass(frozen=True, eq=False)
class Captions:
    """The captions of a data set.

    Args:
        table: Their vectors.
        texts: That of every image.
        rows: int64 (count,), the row of every image's.
    """

    table: TextTable
    texts: tuple[str, ...]
    rows: Tensor

    @classmethod
    def opened(
        cls, job: Job[Any], images: ImageSet, info: DataInfo, device: torch.device, options: DataOptions | None = None
    ) -> Captions:
        """Read the captions of the data set that images belong to, and encode what the cache does not hold.

        Args:
            job: Where progress is shown; its configuration says how data is read.
            images: Any part of the set.
            info: What a plan says of it, with the encoder.
            device: Where to encode.
            options: How the data is read, where the configuration does not say it.

        Raises:
            InputError: the data or the encoder are not what they were.
        """
        reads = options or data_options(job.config, job)
        texts = captions_of(images.info, reads, images.store.labels.tolist())
        table = open_table(texts, info.text or {}, device, job.console, job.stop_if_requested)
        return cls(table, texts, table.rows_of(texts))

    def of(self, images: ImageSet) -> ImageSet:
        """Return images whose labels are the rows of their captions."""
        return replace(images, rows=self.rows)


def conditioned(
    job: Job[Any], models: Sequence[nn.Module], *sets: ImageSet, dropout: float | None = None
) -> tuple[ImageSet, ...]:
    """Let the labels of models and data stand for captions, where the job's model is conditioned on text.

    Args:
        job: Of a plan that `resolve_captioned` resolved the data of.
        models: They share one table.
        sets: Parts of one data set.
        dropout: With which training replaces a caption by the empty text.

    Returns:
        The sets, with rows of captions for labels; as they are where the models have classes.
    """
    info = job.data
    if not isinstance(info, DataInfo) or info.text is None:
        return sets
    captions = Captions.opened(job, sets[0], info, resolve_device(job.execution.device, job.world.local_rank))
    for model in models:
        condition(model, captions.table, dropout or 0.0)
    return tuple(captions.of(images) for images in sets)
