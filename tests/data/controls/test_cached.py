"""Control maps in the cache: measured once, gone on with after a crash."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finectl.console import Console
from finectl.data.controls.cached import BATCH, MapsFile, open_maps
from finectl.data.mapped import MappedRows
from finectl.data.row_file import PAGE

COUNT = 2 * BATCH + 3


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FINECTL_CACHE", str(tmp_path))
    yield tmp_path


def pixels(positions: Tensor) -> Tensor:
    return positions.to(torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)


class Measuring:
    """Counts what it measures, and stops after so many batches."""

    def __init__(self, stop: int = 10**6) -> None:
        self.seen: list[int] = []
        self.stop = stop

    def __call__(self) -> Measuring | object:
        def measure(images: Tensor) -> Tensor:
            if len(self.seen) >= self.stop:
                raise RuntimeError("power cut")
            self.seen += images[:, 0, 0, 0].tolist()
            return 255 - images[:, :1]

        return measure


def opened(file: MapsFile, measuring: Measuring, *, threads: bool = False) -> MappedRows:
    return open_maps(
        file,
        pixels,
        measuring,
        threads=threads,
        console=Console(quiet=True),
        check=lambda: None,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("threads", [False, True])
def test_maps_are_measured_once_and_read_at_random(cache: Path, threads: bool) -> None:
    file, first, again = MapsFile("d", "images", (COUNT, 1, 2, 2)), Measuring(), Measuring()
    maps = opened(file, first, threads=threads)
    assert sorted(first.seen) == list(range(COUNT)) and file.path.is_relative_to(cache / "controls")
    assert maps.take(torch.tensor([33, 0, 7]))[:, 0, 1, 1].tolist() == [222, 255, 248]
    assert torch.equal(opened(file, again).take(torch.arange(COUNT)), 255 - pixels(torch.arange(COUNT))[:, :1])
    assert again.seen == []
    assert MapsFile("e", "images", (COUNT, 1, 2, 2)).path != file.path != MapsFile("d", "i", (COUNT, 1, 2, 2)).path


def test_what_was_killed_goes_on_with_the_batches_that_are_missing(cache: Path) -> None:
    file, broken = MapsFile("d", "images", (COUNT, 1, 2, 2)), Measuring(stop=2 * BATCH)
    with pytest.raises(RuntimeError, match="power cut"):
        opened(file, broken)
    (part,) = file.path.parent.iterdir()
    assert part.stat().st_size == PAGE + 2 * BATCH * 4 and not file.path.exists()
    with part.open("ab") as stream:
        stream.write(b"half a batch")
    rest = Measuring()
    maps = opened(file, rest)
    assert rest.seen == list(range(2 * BATCH, COUNT))
    assert torch.equal(maps.take(torch.arange(COUNT)), 255 - pixels(torch.arange(COUNT))[:, :1])


def test_a_damaged_file_is_made_again(cache: Path) -> None:
    file = MapsFile("d", "images", (COUNT, 1, 2, 2))
    opened(file, Measuring())
    file.path.write_bytes(file.path.read_bytes()[:-1])
    again = Measuring()
    opened(file, again)
    assert len(again.seen) == COUNT
