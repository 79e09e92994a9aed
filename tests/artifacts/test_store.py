"""The workspace: how artifacts are found, opened and verified, and what they record."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from support import run_count, whole

from finectl.artifacts.files import path_inside, sha256_file, sha256_json, staged, write_atomic
from finectl.artifacts.manifest import FileRecord, digest_of, read_manifest
from finectl.artifacts.store import Artifact, Workspace, open_artifact, verify_artifacts
from finectl.errors import InputError, ResourceError, UsageError


def made(workspace: Path, text: str = "a") -> Artifact:
    artifact = run_count(workspace, text).artifact
    assert artifact is not None
    return artifact


def test_the_manifest_records_what_the_contract_names(tmp_path: Path) -> None:
    artifact = made(tmp_path)
    raw = yaml.safe_load((artifact.path / "manifest.yaml").read_text())
    wanted = (
        "schema kind stage created command config execution recipe parents files digest data metrics cost environment"
    )
    assert list(raw) == wanted.split()
    assert raw["schema"] == "finectl/1" and isinstance(raw["created"], str) and raw["created"].endswith("+00:00")
    assert raw["config"] == {"text": "a", "steps": 3, "log": ""}
    assert {"device", "dtype", "world_size"} <= set(raw["execution"])
    assert {"finectl", "python", "torch", "diffusers"} <= set(raw["environment"])
    assert {"steps", "samples", "wall_s", "peak_memory_bytes"} <= set(raw["cost"])
    files = {file["path"]: file for file in raw["files"]}
    assert list(files) == ["model.safetensors", "samples/text.txt"]
    for name, file in files.items():
        assert file["bytes"] == (artifact.path / name).stat().st_size
        assert file["sha256"] == sha256_file(artifact.path / name)
    assert artifact.name == f"count-a-{raw['recipe'][:8]}"


def test_two_runs_give_the_same_digest_and_recipe(tmp_path: Path) -> None:
    one, two = made(tmp_path / "1"), made(tmp_path / "2")
    assert (one.manifest.digest, one.manifest.recipe) == (two.manifest.digest, two.manifest.recipe)
    other = made(tmp_path / "1", "b")
    assert other.manifest.digest != one.manifest.digest and other.manifest.recipe != one.manifest.recipe


def test_the_digest_does_not_depend_on_order_log_or_plots() -> None:
    files = [FileRecord("b", 1, "2"), FileRecord("a", 1, "1")]
    noise = [FileRecord("log.jsonl", 1, "3"), FileRecord("plots/x.png", 1, "4")]
    assert digest_of(files) == digest_of(list(reversed(files))) == digest_of(files + noise)
    assert digest_of(files) != digest_of([FileRecord("b", 1, "1"), FileRecord("a", 1, "2")])
    assert sha256_json({"a": 1, "b": [2]}) == sha256_json({"b": [2], "a": 1}) != sha256_json({"a": 1, "b": [3]})


def test_a_copy_of_an_artifact_is_an_artifact(tmp_path: Path) -> None:
    artifact = made(tmp_path / "w")
    subprocess.run(["cp", "-r", artifact.path, tmp_path / "copy"], check=True)
    assert whole(tmp_path / "copy").manifest == artifact.manifest


def test_newest_follows_latest_and_does_without(tmp_path: Path) -> None:
    one, two = made(tmp_path, "a"), made(tmp_path, "b")
    store = Workspace(tmp_path)
    assert store.newest(["samples"]).path == two.path
    latest = tmp_path / "samples" / "latest"
    latest.unlink()
    assert store.newest(["samples"]).path == two.path
    latest.symlink_to(one.name)
    assert store.newest(["samples"]).path == one.path
    (two.path / "manifest.yaml").unlink()
    latest.unlink()
    assert store.newest(["samples"]).path == one.path, "a damaged artifact hides no whole one"
    (one.path / "manifest.yaml").unlink()
    with pytest.raises(InputError, match=r"manifest\.yaml"):
        store.newest(["samples"])


def test_a_crash_before_latest_was_moved_is_made_up_for(tmp_path: Path) -> None:
    one, two = made(tmp_path, "a"), made(tmp_path, "b")
    latest = tmp_path / "samples" / "latest"
    latest.unlink()
    latest.symlink_to(one.name)
    assert run_count(tmp_path, "b").cached
    assert os.readlink(latest) == two.name
    assert run_count(tmp_path, "a").cached
    assert os.readlink(latest) == two.name, "an older artifact does not become the newest by being asked for"


def test_a_damaged_newest_does_not_keep_a_finished_artifact_from_being_found(tmp_path: Path) -> None:
    one, two = made(tmp_path, "a"), made(tmp_path, "b")
    (two.path / "manifest.yaml").unlink()
    assert run_count(tmp_path, "a").artifact == one


def test_find_takes_paths_names_and_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = made(tmp_path)
    store = Workspace(tmp_path)
    monkeypatch.chdir(tmp_path)
    texts = [
        str(artifact.path),
        f"samples/{artifact.name}",
        artifact.name,
        "latest",
        "samples/latest",
        f"samples/{artifact.name}/",
    ]
    for text in texts:
        found = store.find(text, ["samples"])
        assert found.name == artifact.name and found.manifest == artifact.manifest
    with pytest.raises(InputError, match=r"of kind .samples."):
        store.find(str(artifact.path), ["model"])
    with pytest.raises(UsageError):
        store.find("", [])


def test_the_workspace_is_named_by_option_then_environment_then_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Workspace().root == Path("artifacts")
    monkeypatch.setenv("FINECTL_WORKSPACE", str(tmp_path))
    assert Workspace().root == tmp_path
    assert Workspace(Path("x")).root == Path("x")
    monkeypatch.setenv("FINECTL_WORKSPACE", "")
    assert Workspace().root == Path("artifacts")


def test_verify_sees_a_change_that_opening_does_not(tmp_path: Path) -> None:
    artifact = made(tmp_path)
    file = artifact.path / "samples" / "text.txt"
    file.write_bytes(b"b" * file.stat().st_size)
    opened = open_artifact(artifact.path)
    with pytest.raises(InputError, match="is corrupt") as caught:
        verify_artifacts([opened])
    assert "--force" in caught.value.fix


def test_verify_sees_a_manifest_whose_digest_was_changed(tmp_path: Path) -> None:
    artifact = made(tmp_path)
    path = artifact.path / "manifest.yaml"
    path.write_text(path.read_text().replace(artifact.manifest.digest, "f" * 64))
    with pytest.raises(InputError, match="is not that of its files"):
        verify_artifacts([open_artifact(artifact.path)])


@pytest.mark.parametrize("path", ["..", "a/../b", "/a", "", "a/../../b", "a\\b", "a\0b", "x" * 256])
def test_paths_that_lead_out(path: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leads out"):
        path_inside(tmp_path, path)


def test_paths_that_stay_inside(tmp_path: Path) -> None:
    assert path_inside(tmp_path, "a/b.txt") == tmp_path / "a" / "b.txt"
    assert path_inside(tmp_path, "a..b") == tmp_path / "a..b"
    (tmp_path / "link").symlink_to("/")
    with pytest.raises(InputError, match="link that leads out"):
        path_inside(tmp_path, "link/etc")


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail() -> None:
        with staged(path) as temporary:
            temporary.write_bytes(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_really_full_disk(small_disk: Path) -> None:
    first = made(small_disk, "a")
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space left"), ballast.open("wb", buffering=0) as stream:
        while True:
            stream.write(b"x" * 4096)
    with pytest.raises(ResourceError, match="no space left on the disk") as caught:
        run_count(small_disk, "b")
    assert "run the same command again" in caught.value.fix
    whole(first.path)
    assert Workspace(small_disk).newest(["samples"]).path == first.path
    ballast.unlink()
    whole(made(small_disk, "b").path)


def test_reading_a_manifest_gives_back_what_was_written(tmp_path: Path) -> None:
    artifact = made(tmp_path)
    artifact.manifest.write(tmp_path / "manifest.yaml")
    assert read_manifest(tmp_path) == artifact.manifest
