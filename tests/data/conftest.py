"""A cache of each test's own."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the cache, empty."""
    root = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FINECTL_CACHE", str(root))
    return root
