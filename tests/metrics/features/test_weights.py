"""Where files of weights are looked for, and how they are hashed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from finectl import hub
from finectl.errors import InputError
from finectl.metrics import METRICS
from finectl.metrics.features.weights import WEIGHTS, content_digest, locate

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "cache"
    monkeypatch.setenv("FINECTL_CACHE", str(root))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return root


def test_without_torch() -> None:
    code = "import sys, finectl.metrics.features.weights; print('torch' in sys.modules, 'numpy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.split() == ["False", "False"]


def test_the_file_that_is_named_comes_before_the_cache(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = cache / "weights" / "inception-2015-12-05.pt"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"kept")
    own = tmp_path / "own.pt"
    own.write_bytes(b"own")
    assert locate("inception", None) == kept
    assert locate("inception", str(own)) == own
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("inception", "~/own.pt") == own


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_missing_file_says_all_that_is_needed(name: str, cache: Path) -> None:
    with pytest.raises(InputError) as caught:
        locate(name, None)
    error = caught.value
    entry = WEIGHTS[name]
    message = " ".join((error.what, error.expected, error.fix))
    for part in (entry.file, entry.url, f"{entry.option} FILE", str(cache / "weights" / entry.file), "--download"):
        assert part in message
    assert "--metrics loss" in message and "frechet and accuracy" in message
    served = {"inception": "fid", "dinov2": "fdd", "lpips": "lpips"}[name]
    assert served in METRICS and served in error.expected.split("for ")[1].split(", ")
    assert error.exit_code == 3


@pytest.mark.parametrize("problem", ["is not there", "is a folder"])
def test_a_named_file_that_is_none(problem: str, tmp_path: Path) -> None:
    path = tmp_path / "named"
    if problem == "is a folder":
        path.mkdir()
    with pytest.raises(InputError, match=f"--dino {path} {problem}") as caught:
        locate("dinov2", str(path))
    assert "dinov2_vitl14_pretrain.pth" in caught.value.expected


def test_it_is_fetched_into_the_cache_when_allowed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def fetch_file(url: str, target: Path, sha256: str | None, *, by_hand: str = "") -> Path:
        asked.append((url, target, sha256))
        assert "--lpips" in by_hand
        return target

    monkeypatch.setattr(hub, "fetch_file", fetch_file)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    target = cache / "weights" / "alexnet-owt-7be5be79.pth"
    assert locate("lpips", None) == target
    assert asked == [(WEIGHTS["lpips"].url, target, "7be5be79")]


def test_an_unreadable_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            content_digest(path)
