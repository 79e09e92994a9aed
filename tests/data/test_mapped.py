"""Rows of a mapped file: the right bytes, and memory that does not grow with the file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from finectl.data.mapped import HELD_BYTES, MappedRows


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
def test_rows_are_those_of_the_file(dtype: str, tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((50, 3, 5)).astype(dtype)
    path = tmp_path / "rows"
    path.write_bytes(b"header!" + table.tobytes() + b"more")  # nothing is aligned
    rows = MappedRows(path, 7, 50, (3, 5), dtype)
    wanted = torch.tensor([49, 0, 7, 7])
    assert rows.shape == (50, 3, 5)
    assert torch.equal(rows.take(wanted), torch.from_numpy(table)[wanted])
    assert rows.take(wanted[:0]).shape == (0, 3, 5)


@pytest.mark.parametrize("index", [-1, 4])
def test_a_row_outside_is_an_error(index: int, tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(bytes(8))
    with pytest.raises(IndexError):
        MappedRows(tmp_path / "rows", 0, 4, (2,)).take(torch.tensor([0, index]))


def test_a_file_that_is_too_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(bytes(8))
    with pytest.raises(ValueError):
        MappedRows(tmp_path / "rows", 1, 4, (2,))


def resident(kind: str) -> int:
    """Return this process's resident bytes: all of them (VmRSS), or without those of files (RssAnon)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{kind}:"))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
@pytest.mark.parametrize(("held", "grows"), [(HELD_BYTES, False), (1 << 40, True)])
def test_memory_does_not_grow_with_what_was_read(held: int, grows: bool, tmp_path: Path) -> None:
    """Without giving pages back it would: what the test asks for is not always so."""
    count, row = 1024, (3, 256, 256)
    path = tmp_path / "rows"
    with path.open("wb") as stream:
        stream.truncate(count * 3 * 256 * 256)  # 201 MB
    rows = MappedRows(path, 0, count, row, held_bytes=held)
    rows.take(torch.arange(16))
    all_before, own_before = resident("VmRSS"), resident("RssAnon")
    for batch in torch.randperm(count).split(16):
        rows.take(batch)
    assert (resident("VmRSS") - all_before > 150e6) == grows
    if not grows:
        assert resident("VmRSS") - all_before < 90e6
    assert resident("RssAnon") - own_before < 15e6
