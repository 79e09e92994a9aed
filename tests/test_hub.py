"""Paths, hub ids, the hub's cache, and files of other addresses; the network beyond this machine is never touched."""

from __future__ import annotations

import errno
import hashlib
import http.server
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from finectl import hub
from finectl.errors import InputError, OutputError, ResourceError
from finectl.hub import fetch_file, is_hub_id, local_folder

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


class Handler(http.server.BaseHTTPRequestHandler):
    """Gives CONTENT, half of it, a page elsewhere, or nothing."""

    def do_GET(self) -> None:
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/file")
            self.end_headers()
            return
        if self.path not in ("/file", "/half"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT if self.path == "/file" else CONTENT[: len(CONTENT) // 2])

    def log_message(self, *arguments: object) -> None:
        pass


CONTENT = b"weights" * 400_000
CONTENT_SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hub, "SCHEMES", ("https", "http"))


@pytest.mark.parametrize("sha256", [CONTENT_SHA256, CONTENT_SHA256[:8], None])
@pytest.mark.parametrize("page", ["file", "moved"])
@pytest.mark.usefixtures("online")
def test_a_file_is_fetched(page: str, sha256: str | None, server: str, tmp_path: Path) -> None:
    target = tmp_path / "new" / "weights.pt"
    assert fetch_file(f"{server}/{page}", target, sha256) == target
    assert target.read_bytes() == CONTENT
    assert [path.name for path in target.parent.iterdir()] == ["weights.pt"]


@pytest.mark.parametrize(
    ("page", "sha256", "reason"),
    [
        ("file", "0" * 64, f"sha256 {CONTENT_SHA256[:16]}"),
        ("half", None, "after 1,400,000 of 2,800,000 bytes"),
        ("none", None, "404"),
    ],
)
@pytest.mark.usefixtures("online")
def test_nothing_is_kept_of_what_is_not_the_file(
    page: str, sha256: str | None, reason: str, server: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        fetch_file(f"{server}/{page}", tmp_path / "weights.pt", sha256, by_hand="copy it by hand")
    assert caught.value.fix == "copy it by hand"
    assert f"{server}/{page}" in caught.value.what
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("online")
def test_a_file_that_was_there_stays_when_fetching_fails(server: str, tmp_path: Path) -> None:
    target = tmp_path / "weights.pt"
    target.write_bytes(b"before")
    with pytest.raises(InputError):
        fetch_file(f"{server}/half", target, None)
    assert target.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


def test_only_https_and_only_when_allowed(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "weights.pt"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    secret = tmp_path / "secret"
    secret.write_text("x")
    for url in (f"{server}/file", secret.as_uri(), "nothing"):
        with pytest.raises(InputError, match="not one of https"):
            fetch_file(url, target, None)
    monkeypatch.setattr(hub, "SCHEMES", ("https", "http"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="the network is not to be used"):
        fetch_file(f"{server}/file", target, None)
    assert not target.exists()


@pytest.mark.usefixtures("online")
def test_a_place_that_cannot_be_written(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"):
        fetch_file(f"{server}/file", tmp_path / "file" / "weights.pt", None)

    def no_room(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(ResourceError, match="no space left"):
        fetch_file(f"{server}/file", tmp_path / "weights.pt", None)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.usefixtures("online")
def test_a_server_that_does_not_answer(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(InputError, match="cannot be fetched"):
        fetch_file(f"http://127.0.0.1:{port}/file", tmp_path / "weights.pt", None)
