"""The runner: recipes, inputs, and failures of the work itself."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import CountConfig, count_stage, published, run_cli, run_count, whole

from finectl.artifacts.job import Job, Plan, Reads
from finectl.artifacts.manifest import read_manifest
from finectl.artifacts.store import open_artifact
from finectl.errors import (
    EXIT_INTERRUPTED,
    EXIT_SAVED,
    ComputationError,
    Interrupted,
    OutputError,
    ResourceError,
)
from finectl.runner import recipe_of


@dataclasses.dataclass(frozen=True)
class Data:
    name: str = "x"
    fingerprint: str = "1"
    count: int = 2
    bundled: bool = False


def recipe(version: int = 1, data: Data | None = None, **config: Any) -> str:
    plan = Plan(CountConfig(**config), slug="s", data=data)
    return recipe_of(count_stage(version=version), plan, (), None)


def test_the_recipe_is_of_what_decides_the_result() -> None:
    assert recipe() == recipe()
    different = [recipe(), recipe(version=2), recipe(text="b"), recipe(steps=4), recipe(data=Data())]
    different.append(recipe(data=Data(fingerprint="2")))
    assert len(set(different)) == len(different)
    assert recipe(data=Data()) == recipe(data=Data(name="elsewhere", count=3))


def test_the_recipe_is_of_the_parents(tmp_path: Path) -> None:
    one, two = run_count(tmp_path, "a").artifact, run_count(tmp_path, "b").artifact
    assert one is not None and two is not None
    plan, stage = Plan(CountConfig(), slug="s"), count_stage()

    def of(*parents: Any, role: str = "model") -> str:
        return recipe_of(stage, plan, parents, Reads(role, ("samples",)))

    different = {of(), of(one), of(two), of(one, two), of(two, one), of(one, role="other")}
    assert len(different) == 6


def test_execution_is_no_part_of_the_recipe(workspace: Path) -> None:
    arguments = ("condense", "--depth", 1, "--steps", 2, "--batch-size", 4)
    first = run_cli(*arguments)
    assert "already there" in run_cli(*arguments, "--device", "cpu", "--save-every", 1).err
    assert run_cli(*arguments, "--seed", 1).path != first.path


def test_the_same_images_under_another_path_are_the_same_recipe(workspace: Path, tmp_path: Path) -> None:
    import shutil

    from PIL import Image

    (tmp_path / "a").mkdir()
    for index in range(8):
        Image.new("L", (8, 8), index * 9).save(tmp_path / "a" / f"{index}.png")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    arguments = ("condense", "--depth", 1, "--steps", 1, "--batch-size", 4, "--eval-every", 0)
    first = run_cli(*arguments, "--data", f"folder:{tmp_path / 'a'}")
    second = run_cli(*arguments, "--data", f"folder:{tmp_path / 'b'}")
    assert "already there" in second.err and second.path == first.path
    Image.new("L", (8, 8), 200).save(tmp_path / "b" / "0.png")
    assert run_cli(*arguments, "--data", f"folder:{tmp_path / 'b'}").path != first.path
    assert read_manifest(first.path).data["bundled"] is False


def fails_with(error: BaseException) -> Callable[[Job[CountConfig], int], None]:
    def during(job: Job[CountConfig], step: int) -> None:
        if step == 2:
            raise error

    return during


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ResourceError),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), ResourceError),
        (RuntimeError("I/O error: No space left on device (os error 28)"), ResourceError),
        (MemoryError(), ResourceError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), ResourceError),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), ResourceError),
        (OSError(errno.EROFS, "Read-only file system"), OutputError),
        (ComputationError("not finite"), ComputationError),
        (RuntimeError("something else"), RuntimeError),
    ],
)
def test_failures_of_the_work_keep_the_saved_state(
    error: BaseException, becomes: type[BaseException], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with pytest.raises(becomes):
        run_count(tmp_path / "w", stage=count_stage(fails_with(error)), log=str(log))
    assert published(tmp_path / "w") == []
    artifact = run_count(tmp_path / "w", log=str(log)).artifact
    assert artifact is not None
    whole(artifact.path)
    assert log.read_text().split() == ["0", "1", "2", "2"], "it went on from the state after two steps"


def test_a_failure_before_any_state_leaves_nothing(tmp_path: Path) -> None:
    def during(job: Job[CountConfig], step: int) -> None:
        raise ComputationError("at once")

    with pytest.raises(ComputationError):
        run_count(tmp_path, stage=count_stage(during))
    assert list((tmp_path / "samples").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_obeyed_after_the_step(number: signal.Signals, tmp_path: Path) -> None:
    before = {signal.SIGINT: signal.getsignal(signal.SIGINT), signal.SIGTERM: signal.getsignal(signal.SIGTERM)}
    log = tmp_path / "log"

    def during(job: Job[CountConfig], step: int) -> None:
        if step == 1:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted) as caught:
        run_count(tmp_path / "w", stage=count_stage(during), log=str(log))
    assert caught.value.exit_code == EXIT_SAVED and "run the same command again" in caught.value.fix
    assert {name: signal.getsignal(name) for name in before} == before, "the handlers are those of before"
    assert run_count(tmp_path / "w", log=str(log)).artifact is not None
    assert log.read_text().split() == ["0", "1", "2"], "no step was lost"


def test_the_second_signal_does_not_wait(tmp_path: Path) -> None:
    def during(job: Job[CountConfig], step: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_count(tmp_path, stage=count_stage(during))


def test_without_state_an_interruption_says_so() -> None:
    class Flag:
        requested = True

    job: Any = Job(CountConfig(), None, (), Path(), Path(), None, Flag(), None)  # type: ignore[arg-type]
    with pytest.raises(Interrupted) as caught:
        job.stop_if_requested()
    assert caught.value.exit_code == EXIT_INTERRUPTED and not caught.value.fix
    saved = []
    with pytest.raises(Interrupted) as caught:
        job.stop_if_requested(lambda: saved.append(1))
    assert saved == [1] and caught.value.exit_code == EXIT_SAVED


def test_a_parent_is_recorded_by_a_relative_path_and_found_after_a_move(chain: Any) -> None:
    record = read_manifest(chain.model).parents[0]
    assert (record.role, record.path) == ("model", f"../{chain.init.name}")
    assert record.digest == open_artifact(chain.init).manifest.digest
    moved = chain.root.with_name("moved")
    chain.root.rename(moved)
    shown = run_cli("show", moved / "model" / chain.model.name, "--workspace", moved).out
    assert chain.condensed.name in shown and "gone" not in shown


def test_a_parent_given_through_latest_or_a_linked_workspace_keeps_the_lineage(chain: Any, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.symlink_to(chain.root)
    made = run_cli("train", linked / "model" / "latest", "--steps", 1, "--batch-size", 4, "--workspace", linked).path
    assert read_manifest(made).parents[0].path == f"../{chain.model.name}"
    assert chain.condensed.name in run_cli("show", made, "--workspace", linked).out


def test_a_parent_that_was_made_anew_is_told_apart(chain: Any) -> None:
    manifest = chain.init / "manifest.yaml"
    digest = read_manifest(chain.init).digest
    manifest.write_text(manifest.read_text().replace(digest, "f" * 64))
    assert "gone or made anew" in run_cli("show", chain.model).out


def test_which_input_was_taken_is_said(chain: Any) -> None:
    ran = run_cli("sample", "--samples", 1, "--sampling-steps", 1)
    assert f"no INPUT given: taking the newest model, {chain.model}" in ran.err
