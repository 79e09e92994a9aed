"""Paths, hub ids and the hub's cache; the network is never touched here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from finectl.errors import InputError
from finectl.hub import is_hub_id, local_folder

COMMIT = "a" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's."""
    root = tmp_path / "hub"
    root.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return root


def cached(cache: Path, name: str, files: dict[str, str]) -> Path:
    """Put a repository into the cache as the hub's client lays it out."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for file, content in files.items():
        (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / file).write_text(content)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_a_path_that_is_there_is_returned_as_it_is(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert local_folder(str(tmp_path), "a model", ["*"]) == tmp_path
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_folder("owner/name", "a model", ["*"]) == Path("owner/name"), "a folder here is meant before the hub"
    assert not is_hub_id("owner/name") and is_hub_id("owner/other")


@pytest.mark.parametrize(
    "name", ["/no/such", "./no/such", "no-such", "../owner/name", "~/no/such", "a/b/c", "", "o/n:x"]
)
def test_what_is_neither_a_path_nor_a_hub_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if not name:
        assert local_folder(name, "a model", ["*"]) == Path()
        return
    with pytest.raises(InputError, match="which is to be a model") as error:
        local_folder(name, "a model", ["config.json"])
    assert "config.json" in error.value.expected and "--download" in error.value.fix


def test_a_hub_id_in_the_cache_is_found_without_the_network(cache: Path) -> None:
    snapshot = cached(cache, "owner/name", {"config.json": "{}"})
    assert local_folder("owner/name", "a model", ["config.json"]).resolve() == snapshot.resolve()


def test_a_hub_id_that_is_not_in_the_cache_offline(cache: Path) -> None:
    with pytest.raises(InputError, match="the model, owner/name, is not in the hub's cache") as error:
        local_folder("owner/name", "the model", ["config.json", "*.safetensors"])
    message = f"{error.value.expected} {error.value.fix}"
    assert error.value.exit_code == 3
    for part in (str(cache), "--download", "config.json, *.safetensors", "https://huggingface.co/owner/name", "path"):
        assert part in message


@pytest.mark.parametrize("offline", ["1", "0", ""])
def test_only_what_is_wanted_is_fetched_and_only_when_allowed(
    offline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    assert local_folder("owner/name", "a model", ("config.json",)) == tmp_path
    assert asked == {"name": "owner/name", "allow_patterns": ["config.json"], "local_files_only": offline == "1"}


@pytest.mark.parametrize(
    "error", [OSError("no route"), errors.EntryNotFoundError("gone"), errors.HFValidationError("bad")]
)
def test_a_refusal_of_the_hub_is_an_input_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(InputError, match=f"cannot be fetched from the hub: {error}"):
        local_folder("owner/name", "a model", ["*"])
