"""Staging directories: one owner, state of one recipe, publication."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import count_stage, run_count, whole

from finectl.artifacts.staging import RECIPE, Staging, point_latest
from finectl.artifacts.store import Workspace, is_locked
from finectl.errors import EXIT_OUTPUT, FinectlError, OutputError

STARTED, GO = b"s", b"g"


def finished_staging(final: Path, recipe: str = "r") -> Staging:
    """Return a staging directory whose work is done: it holds a real manifest."""
    artifact = run_count(final.parent / "made").artifact
    assert artifact is not None
    staging = Staging(final, recipe)
    for file in artifact.path.iterdir():
        if file.is_file():
            (staging.path / file.name).write_bytes(file.read_bytes())
    return staging


def in_child(work: object) -> int:
    """Fork, call `work`, and return the child's process id; its exit code is that of the error."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        work()  # type: ignore[operator]
        code = 0
    except FinectlError as error:
        code = error.exit_code
    finally:
        os._exit(code)


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_the_second_process_is_told_who_holds_the_first(tmp_path: Path) -> None:
    from_child, to_parent = os.pipe()
    from_parent, to_child = os.pipe()

    def pause(job: object, step: int) -> None:
        if step == 1:
            os.write(to_parent, STARTED)
            os.read(from_parent, 1)

    child = in_child(lambda: run_count(tmp_path, stage=count_stage(pause)))
    os.read(from_child, 1)
    for options in ({}, {"force": True}, {"resume": False}):
        with pytest.raises(OutputError, match=f"is being made by process {child} on") as caught:
            run_count(tmp_path, **options)
        assert "wait until it is done" in caught.value.fix
    assert run_count(tmp_path, "b").artifact is not None, "another recipe is not held up"
    os.write(to_child, GO)
    assert exit_code(child) == 0
    assert run_count(tmp_path).cached


def test_many_processes_at_once_make_it_once(fast_disk: Path) -> None:
    """All start together; whoever does not get the lock says so or finds the artifact, and nobody harms anybody."""
    for round_number in range(15):
        log = fast_disk / f"{round_number}.log"
        work = lambda: run_count(fast_disk / f"{round_number}", log=str(log))  # noqa: B023, E731
        codes = [exit_code(child) for child in [in_child(work) for _ in range(5)]]
        assert set(codes) <= {0, EXIT_OUTPUT} and 0 in codes, codes
        assert len(log.read_text().split()) == 3, "the work was done more than once"
        artifact = run_count(fast_disk / f"{round_number}").artifact
        assert artifact is not None
        whole(artifact.path)
        assert not list(artifact.path.parent.glob(".*.partial"))


def test_replacing_again_and_again_never_hides_the_artifact_from_readers(fast_disk: Path) -> None:
    first = run_count(fast_disk).artifact
    assert first is not None

    def replace() -> None:
        for _ in range(40):
            run_count(fast_disk, force=True)

    child = in_child(replace)
    looks = 0
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        assert Workspace(fast_disk).paths("samples") == [first.path]
        assert Workspace(fast_disk).find(f"samples/{first.name}", []).manifest.recipe == first.manifest.recipe
        looks += 1
    assert looks > 3


def test_publication_does_not_touch_the_staging_directory_of_the_next_process(tmp_path: Path) -> None:
    staging = finished_staging(tmp_path / "final")
    staging.publish()
    next_owner = tmp_path / ".final.partial"
    next_owner.mkdir()
    staging.discard_if_empty()
    assert next_owner.is_dir()
    staging.close()


def test_work_of_another_recipe_is_not_dropped(tmp_path: Path) -> None:
    staging = Staging(tmp_path / "final", "one")
    (staging.state / "file").write_text("work")
    staging.close()
    with pytest.raises(OutputError, match="unfinished work of another recipe") as caught:
        Staging(tmp_path / "final", "two")
    assert "--no-resume" in caught.value.fix and (staging.path / "state" / "file").is_file()
    Staging(tmp_path / "final", "two", fresh=True).close()
    assert not (staging.path / "state").exists()


def test_a_finished_artifact_of_another_recipe_is_not_dropped_before_it_is_published(tmp_path: Path) -> None:
    """The crash came after the note of the recipe was removed and before the rename."""
    staging = finished_staging(tmp_path / "final")
    (staging.path / RECIPE).unlink()
    staging.close()
    with pytest.raises(OutputError, match="only has to be published"):
        Staging(tmp_path / "final", "another")
    assert (staging.path / "manifest.yaml").is_file()


def test_an_artifact_set_aside_by_a_crash_is_put_back_outside_of_any_workspace_too(tmp_path: Path) -> None:
    made = run_count(tmp_path / "w", out=tmp_path / "out").artifact
    assert made is not None
    (tmp_path / "out").rename(tmp_path / ".out.replaced")
    again = run_count(tmp_path / "w", out=tmp_path / "out")
    assert again.cached and again.artifact is not None
    assert again.artifact.manifest.created == made.manifest.created


def test_nothing_but_an_artifact_is_replaced(tmp_path: Path) -> None:
    final = tmp_path / "final"
    final.mkdir()
    (final / "precious").write_text("x")
    for force in (False, True):
        with pytest.raises(OutputError, match="is no artifact"):
            run_count(tmp_path / "w", out=final, force=force)
        staging = finished_staging(final)
        with pytest.raises(OutputError, match="in the way"):
            staging.publish(replace=force)
        staging.close()
    assert (final / "precious").read_text() == "x"


def test_a_finished_staging_directory_is_published_without_the_work(tmp_path: Path) -> None:
    log = tmp_path / "log"
    artifact = run_count(tmp_path / "w", log=str(log)).artifact
    assert artifact is not None
    artifact.path.rename(artifact.path.with_name(f".{artifact.name}.partial"))
    again = run_count(tmp_path / "w", log=str(log))
    assert again.artifact is not None and whole(again.artifact.path).manifest.created == artifact.manifest.created
    assert len(log.read_text().split()) == 3


def test_a_finished_staging_directory_that_lost_a_file_is_made_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    artifact = run_count(tmp_path / "w", log=str(log)).artifact
    assert artifact is not None
    (artifact.path / "model.safetensors").unlink()
    artifact.path.rename(artifact.path.with_name(f".{artifact.name}.partial"))
    again = run_count(tmp_path / "w", log=str(log)).artifact
    assert again is not None
    whole(again.path)
    assert len(log.read_text().split()) == 6


def test_the_lock_dies_with_its_holder_and_shows_while_it_lives(tmp_path: Path) -> None:
    assert not is_locked(tmp_path / ".final.partial")
    staging = Staging(tmp_path / "final", "r")
    assert is_locked(staging.path)
    staging.close()
    assert not is_locked(staging.path)


def test_latest_is_moved_in_one_step(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    point_latest(one)
    point_latest(two)
    assert os.readlink(tmp_path / "latest") == "two"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "one", "two"]
