"""A process that dies, or a disk that is full, at each single operation on the store: nothing half, nothing lost."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import count_stage, published, run_count, weights, whole

from finectl.artifacts.store import Workspace
from finectl.errors import EXIT_RESOURCES, FinectlError

KILLED = 137
WROTE_WRONG = 99
MOST_OPERATIONS = 400
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.truncate", "os.link"}
NEEDS_SPACE = {"open", "os.rename", "os.mkdir", "os.symlink", "fsync"}


class Fault:
    """Counts every operation that changes the store, and acts at the n-th."""

    def __init__(self, root: Path, at: int, act: Callable[[], None], only: set[str] | None, lasting: bool) -> None:
        self.root, self.at, self.act, self.only, self.lasting = str(root), at, act, only, lasting
        self.seen = 0

    def install(self) -> None:
        sys.addaudithook(self.hook)
        fsync, write_bytes = os.fsync, Path.write_bytes

        def counted_fsync(handle: Any) -> None:
            self.tick("fsync")
            fsync(handle)

        def torn_write(path: Path, data: bytes) -> int:
            write_bytes(path, data[: len(data) // 2])
            self.tick("write")
            return write_bytes(path, data)

        os.fsync = counted_fsync
        Path.write_bytes = torn_write  # type: ignore[method-assign, assignment]

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if str(path).startswith(self.root) and (set(mode or "") & set("wax+") or (flags or 0) & WRITING):
                self.tick(event)
        elif event in CHANGES:
            self.tick(event)

    def tick(self, event: str) -> None:
        if self.only is not None and event not in self.only:
            return
        self.seen += 1
        if self.seen == self.at or (self.lasting and self.seen > self.at):
            self.act()


def in_child(fault: Fault, work: Callable[[], object]) -> int:
    """Do the work in a forked process with the fault installed and return its exit code."""
    child = os.fork()
    if child == 0:
        code = WROTE_WRONG
        try:
            fault.install()
            work()
            code = 0
        except FinectlError as error:
            code = error.exit_code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die() -> None:
    os._exit(KILLED)


def disk_is_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def faults(root: Path, kind: str, at: int) -> Fault:
    if kind == "kill":
        return Fault(root, at, die, None, lasting=False)
    return Fault(root, at, disk_is_full, NEEDS_SPACE, lasting=kind == "full")


def check_store(workspace: Path, others: list[Path]) -> None:
    """Everything that looks like an artifact is whole, and what was there before is there still."""
    for path in published(workspace):
        whole(path)
    for path in others:
        whole(path)
    if others:
        whole(Workspace(workspace).newest(["samples"]).path)


@pytest.mark.parametrize("kind", ["kill", "full", "full once"])
def test_a_new_artifact_survives_a_fault_at_every_operation(fast_disk: Path, kind: str) -> None:
    failed = 0
    for at in range(1, MOST_OPERATIONS):
        workspace, log = fast_disk / f"{at}", fast_disk / f"{at}.log"
        other = run_count(workspace, "b").artifact
        assert other is not None
        code = in_child(faults(workspace, kind, at), lambda: run_count(workspace, "a", log=str(log)))  # noqa: B023
        check_store(workspace, [other.path])
        assert code in {0, KILLED if kind == "kill" else EXIT_RESOURCES}
        done = run_count(workspace, "a", log=str(log)).artifact
        assert done is not None and whole(done.path).manifest.metrics == {"step": 3}
        assert done.path.name.startswith("count-a-")
        assert Workspace(workspace).newest(["samples"]).path == done.path
        left = {p.name for p in done.path.parent.iterdir() if not p.name.endswith(".tmp")}
        assert left == {done.path.name, other.path.name, "latest"}
        # Three steps, of which the fault costs the one under way at most: the state after each is not lost.
        assert len(log.read_text().split()) <= 4
        if code == 0:
            break
        failed += 1
    assert failed > 20, "the fault was injected at too few operations to mean anything"
    assert failed < MOST_OPERATIONS - 2


@pytest.mark.parametrize("kind", ["kill", "full", "full once"])
def test_replacing_an_artifact_keeps_the_old_or_the_new_one(fast_disk: Path, kind: str) -> None:
    failed, found = 0, set()
    for at in range(1, MOST_OPERATIONS):
        workspace = fast_disk / f"{at}"
        old = run_count(workspace, "a").artifact
        assert old is not None
        before = old.manifest.created
        code = in_child(faults(workspace, kind, at), lambda: run_count(workspace, "a", force=True))  # noqa: B023
        assert code in {0, KILLED if kind == "kill" else EXIT_RESOURCES}
        now = Workspace(workspace).find(f"samples/{old.name}", ["samples"])
        whole(now.path)
        check_store(workspace, [old.path])
        found.add("old" if now.manifest.created == before else "new")
        again = run_count(workspace, "a").artifact
        assert again is not None and weights(again.path) == weights(now.path)
        forced = run_count(workspace, "a", force=True).artifact
        assert forced is not None and whole(forced.path).manifest.created > before
        left = {p.name for p in forced.path.parent.iterdir() if not p.name.endswith(".tmp")}
        assert left == {forced.path.name, "latest"}
        if code == 0:
            break
        failed += 1
    assert failed > 20 and found == {"old", "new"}


@pytest.mark.slow
def test_a_kill_in_the_second_run_too_is_survived(fast_disk: Path) -> None:
    """Dying while recovering from dying, at every pair of a coarse grid."""
    for first in range(3, 60, 7):
        for second in range(2, 40, 5):
            workspace = fast_disk / f"{first}-{second}"
            in_child(faults(workspace, "kill", first), lambda: run_count(workspace, "a"))  # noqa: B023
            in_child(faults(workspace, "kill", second), lambda: run_count(workspace, "a"))  # noqa: B023
            check_store(workspace, [])
            done = run_count(workspace, "a").artifact
            assert done is not None
            whole(done.path)


def test_files_reach_the_disk_before_the_manifest_and_the_manifest_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut loses what was not synced: the order of fsync and rename is what the promise rests on."""
    events: list[tuple[str, str]] = []
    fsync = os.fsync
    where = {"replace": os.replace, "rename": os.rename}

    def seen_fsync(handle: int) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def seen_move(name: str) -> Callable[..., None]:
        def move(source: Any, target: Any, **options: Any) -> None:
            events.append(("move", str(target)))
            where[name](source, target, **options)

        return move

    monkeypatch.setattr(os, "fsync", seen_fsync)
    for name in where:
        monkeypatch.setattr(os, name, seen_move(name))
    artifact = run_count(tmp_path, "a").artifact
    assert artifact is not None
    staging = str(artifact.path.with_name(f".{artifact.name}.partial"))
    manifest = events.index(("move", f"{staging}/manifest.yaml"))
    named = events.index(("move", str(artifact.path)))
    for file in ("model.safetensors", "samples/text.txt"):
        assert ("sync", f"{staging}/{file}") in events[:manifest]
    assert ("sync", f"{staging}/.manifest.yaml.tmp") in events[:manifest]
    assert {("sync", staging), ("sync", f"{staging}/samples")} <= set(events[manifest:named])
    assert ("sync", str(artifact.path.parent)) in events[named:]


def test_state_of_another_version_of_the_stage_is_not_resumed(tmp_path: Path) -> None:
    first = run_count(tmp_path, "a", count_stage(version=1)).artifact
    second = run_count(tmp_path, "a", count_stage(version=2)).artifact
    assert first is not None and second is not None
    assert first.path != second.path
