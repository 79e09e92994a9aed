"""What is remembered of files."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from finectl.artifacts import cache
from finectl.artifacts.cache import remembered_sha256


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FINECTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "LEAST_BYTES", 0)
    return tmp_path / "cache"


def old(path: Path, content: bytes) -> Path:
    """Write a file that changed some time ago, as far as it says."""
    path.write_bytes(content)
    os.utime(path, ns=(10**18, 10**18))
    return path


def test_the_digest_is_the_files(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    for content in (b"some", b"more", b""):
        old(path, content)
        assert remembered_sha256(path) == hashlib.sha256(content).hexdigest(), "also when it changed just now"


def test_the_digest_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = old(tmp_path / "weights", b"some")
    read: list[Path] = []

    def counted(file: Path) -> str:
        read.append(file)
        return hashlib.sha256(file.read_bytes()).hexdigest()

    monkeypatch.setattr(cache, "sha256_file", counted)
    monkeypatch.setattr(cache, "SETTLED_NS", 0)
    first = remembered_sha256(path)
    assert remembered_sha256(path) == first and len(read) == 1
    (tmp_path / "link").symlink_to(path)
    assert remembered_sha256(tmp_path / "link") == first and len(read) == 1, "the file is the same"
    time.sleep(0.02)  # the clock of the file system ticks every few milliseconds
    old(path, b"else")  # same size, same time of change as far as the user can set it
    assert remembered_sha256(path) == hashlib.sha256(b"else").hexdigest()


def test_a_file_that_changed_just_now_is_not_remembered(tmp_path: Path, place: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"some")
    remembered_sha256(path)
    assert not place.exists()


def test_small_files_leave_no_trace(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LEAST_BYTES", 5)
    monkeypatch.setattr(cache, "SETTLED_NS", 0)
    assert remembered_sha256(old(tmp_path / "small", b"some")) == hashlib.sha256(b"some").hexdigest()
    assert not place.exists()
    remembered_sha256(old(tmp_path / "large", b"some more"))
    assert len(list(place.rglob("*.json"))) == 1
