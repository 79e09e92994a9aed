"""Experts and their merging when a process is killed, a disk is full, or two machines work at once."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from families import SHORT, Family
from support import child_environment, command_line, published, run_cli, weights, whole

from finectl.artifacts.manifest import read_manifest
from finectl.errors import EXIT_INPUT, EXIT_RESOURCES
from finectl.search.journal import Journal

DEADLINE_S = 180.0
SEARCH = ("--objective", "loss", "--search-samples", 24, "--search", "grid", "--grid-step", 1)
MEASUREMENTS = 4 + 4
"""Corners of the square, each on the common noise and on fresh noise."""
JOURNAL = "model/.*.partial/state/search.jsonl"


@pytest.fixture(scope="module")
def _family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family.made(tmp_path_factory.mktemp("faults"), models=1)


@pytest.fixture
def family(_family: Family, fast_disk: Path) -> Iterator[Family]:
    yield _family.copied(fast_disk / "family")


@pytest.fixture
def unbroken(_family: Family, fast_disk: Path) -> Callable[..., Path]:
    """The result of a command that nothing disturbs, in another copy of the workspace."""

    def made(command: str, path: Path, *options: object) -> Path:
        other = _family.copied(fast_disk / "unbroken")
        place = getattr(other, "experts" if command == "merge" else "base")
        assert place.name == path.name
        return run_cli(command, place, *options, "--workspace", other.root).path

    return made


def in_child(install: Callable[[], None], *command: object) -> int:
    """Run a command in a forked process, with something installed, and return its exit code."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            install()
            code = run_cli(*command).code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def measured(path: Path) -> list[tuple[object, ...]]:
    """Return the measurements in a journal, or in an artifact's copy of one: candidate, samples, noise and value."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    keys = ("samples", "noise", "value")
    return [(*entry["candidate"], *(entry[key] for key in keys)) for entry in entries if "candidate" in entry]


def merged(root: Path) -> list[Path]:
    """Return the merged models that were published."""
    return [path for path in published(root) if "merged" in path.name]


def same_merge(one: Path, two: Path) -> None:
    """Check that two merged models are the same, and were found in the same way."""
    assert weights(one) == weights(two)
    assert measured(one / "search.jsonl") == measured(two / "search.jsonl")
    assert read_manifest(one).metrics == read_manifest(two).metrics
    assert read_manifest(one).digest == read_manifest(two).digest


# --------------------------------------------------------------------------------------------------------- killed


def test_killed_before_and_after_every_candidate(family: Family, unbroken: Callable[..., Path]) -> None:
    wanted = unbroken("merge", family.experts, *SEARCH)
    command = ("merge", family.experts, *SEARCH, "--workspace", family.root)
    kills = 0

    def install() -> None:
        append = Journal.append

        def deadly(journal: Journal, entry: Any) -> None:
            if kills % 2:
                append(journal, entry)
            os.kill(os.getpid(), signal.SIGKILL)

        Journal.append = deadly  # type: ignore[method-assign]

    while (code := in_child(install, *command)) == -signal.SIGKILL:
        kills += 1
        assert kills <= 2 * MEASUREMENTS and not merged(family.root)
    # Of two runs one leaves what it measured: each candidate costs two, and then nothing is left to measure.
    assert code == 0 and kills == 2 * MEASUREMENTS
    made = run_cli(*command)
    assert "already there" in made.err
    same_merge(made.path, wanted)
    assert len(measured(made.path / "search.jsonl")) == MEASUREMENTS


@pytest.mark.slow
def test_killed_at_a_random_candidate(family: Family, unbroken: Callable[..., Path]) -> None:
    options = ("--search-samples", 24, "--sampling-steps", 3, "--grid-step", 0.25, "--search", "surrogate")
    process = subprocess.Popen(
        command_line("merge", family.experts, *options, "--workspace", family.root),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=child_environment(),
    )  # fmt: skip
    wanted, deadline_s = random.randrange(1, 8), time.monotonic() + DEADLINE_S

    def kept() -> int:
        found = list(family.root.glob(JOURNAL))
        return found[0].read_text().count('"candidate"') if found else 0

    while kept() < wanted:
        assert process.poll() is None and time.monotonic() < deadline_s, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (journal,) = family.root.glob(JOURNAL)
    before = measured_whole_lines(journal)
    resumed = run_cli("merge", family.experts, *options, "--workspace", family.root).path
    assert measured(resumed / "search.jsonl")[: len(before)] == before, f"killed at candidate {wanted}"
    same_merge(resumed, unbroken("merge", family.experts, *options))


def measured_whole_lines(path: Path) -> list[tuple[object, ...]]:
    text = path.read_text()
    path.write_text(text[: text.rfind("\n") + 1])
    return measured(path)


# ----------------------------------------------------------------------------------------------------- a full disk


def full_at(place: str, *, after: int = 0) -> Callable[[], None]:
    """Return what makes the disk full once a file or folder whose path holds `place` is to be flushed to it."""

    def install() -> None:
        fsync, seen = os.fsync, 0

        def failing(handle: int) -> None:
            nonlocal seen
            seen += place in os.readlink(f"/proc/self/fd/{handle}")
            if seen > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(handle)

        os.fsync = failing

    return install


@pytest.mark.parametrize(
    ("place", "after", "finished"),
    [
        ("training.safetensors", 0, 0),
        ("training.safetensors", 2, 0),
        (".ema.safetensors", 0, 0),
        (".manifest.yaml", 0, 0),
        (".ema.safetensors", 1, 1),
        ("/experts/", 0, 2),
        ("/experts/.", 3, 2),
    ],
)
def test_a_disk_that_fills_up_while_experts_are_written(
    place: str, after: int, finished: int, family: Family, unbroken: Callable[..., Path]
) -> None:
    options = (*SHORT, "--seed", 5, "--ranges", 2, "--save-every", 1)
    command = ("finetune-ranges", family.base, *options, "--workspace", family.root)
    before = {path: read_manifest(path).digest for path in published(family.root)}
    code = in_child(full_at(place, after=after), *command)
    assert code == EXIT_RESOURCES
    now = published(family.root)
    assert len(now) == len(before) + finished
    for path in now:
        assert whole(path).manifest.digest == before.get(path, read_manifest(path).digest)
    made = run_cli(*command)
    assert made.code == 0, made.err
    whole(made.path)
    assert weights(made.path) == weights(unbroken("finetune-ranges", family.base, *options))
    assert not list(made.path.rglob("*.tmp")) and not list(family.root.glob("*/.*.partial"))


@pytest.mark.parametrize("links", [True, False])
def test_a_disk_that_fills_up_while_experts_are_put_together(
    links: bool, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    command = ("finetune-ranges", family.base, "--ranges", 2, *SHORT, "--workspace", family.root)
    wanted = weights(family.experts)
    shutil.rmtree(family.experts)
    (family.root / "experts" / "latest").unlink(missing_ok=True)
    copy, copies = shutil.copyfile, []

    def filling(source: Path, target: Path, **more: Any) -> Any:
        copies.append(target)
        if len(copies) == 3 or links:
            Path(target).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return copy(source, target, **more)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    with monkeypatch.context() as patched:
        patched.setattr("finectl.stages.finetune_ranges.collection.shutil.copyfile", filling)
        if not links:
            patched.setattr("finectl.stages.finetune_ranges.collection.os.link", refuse)
        ran = run_cli(*command)
    assert ran.code == EXIT_RESOURCES and ran.out == "" and "no space left" in ran.err, ran.err
    assert len(copies) == (1 if links else 3) and not [
        path for path in published(family.root) if "experts" in str(path)
    ]
    again = run_cli(*command).path
    assert again == family.experts and weights(whole(again).path) == wanted
    names = {file.path for file in read_manifest(again).files}
    assert names == {"config.json"} | {f"experts/{i}/{n}.safetensors" for i in range(2) for n in ("model", "ema")}


@pytest.mark.parametrize("at", [2, 2 * MEASUREMENTS])
def test_a_disk_that_fills_up_in_the_middle_of_a_line_of_the_journal(
    at: int, family: Family, unbroken: Callable[..., Path]
) -> None:
    command = ("merge", family.experts, *SEARCH, "--workspace", family.root)

    def install() -> None:
        write, lines = os.write, 0

        def filling(handle: int, content: Any) -> int:
            nonlocal lines
            if "search.jsonl" not in os.readlink(f"/proc/self/fd/{handle}"):
                return write(handle, content)
            lines += 1
            if lines < at:
                return write(handle, content)
            if lines == at and len(content) > 8:
                return write(handle, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        os.write = filling

    assert in_child(install, *command) == EXIT_RESOURCES
    assert not merged(family.root)
    made = run_cli(*command)
    assert made.code == 0, made.err
    same_merge(made.path, unbroken("merge", family.experts, *SEARCH))


@pytest.mark.parametrize("what", ["table", "model"])
def test_a_disk_that_is_full_when_the_search_is_over(
    what: str, family: Family, unbroken: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        if what == "table":
            patched.setattr(Path, "write_text", full)
        else:
            patched.setattr(os, "pwrite", full)
        ran = family.merge(family.experts, *SEARCH)
    assert ran.code == EXIT_RESOURCES and ran.out == "" and not merged(family.root), ran.err
    (journal,) = family.root.glob(JOURNAL)
    assert len(measured(journal)) == MEASUREMENTS
    again = family.merge(family.experts, *SEARCH).path
    same_merge(again, unbroken("merge", family.experts, *SEARCH))


# ---------------------------------------------------------------------------------------------- several at one search

TOGETHER = """
import sys, time
from pathlib import Path
import finectl.stages.merge.searching as searching
from finectl.cli.main import main
from finectl.metrics.measuring import Measuring

mine, other, *command = sys.argv[1:]
work, measure = searching.work, Measuring.__call__

def slow(*arguments, **options):
    time.sleep(0.1)
    return measure(*arguments, **options)

def at_once(*arguments, **options):
    Path(mine).touch()
    while not Path(other).exists():
        time.sleep(0.001)
    return work(*arguments, pause_s=0.05, **options)

searching.work, Measuring.__call__ = at_once, slow
sys.argv = ["finectl", *command]
raise SystemExit(main(command))
"""


def machine(number: int, family: Family, journal: Path, *options: object) -> subprocess.Popen[str]:
    """Start a search in a workspace of its own, on a journal that another such process shares."""
    ready = [str(journal.with_suffix(f".ready-{index}")) for index in (number, 1 - number)]
    command = ("merge", family.experts, *options, "--journal", journal, "--workspace", family.root)
    return subprocess.Popen(
        [sys.executable, "-c", TOGETHER, *ready, *map(str, command)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=child_environment(),
    )  # fmt: skip


def test_two_machines_share_one_search(family: Family, unbroken: Callable[..., Path], fast_disk: Path) -> None:
    options = ("--search-samples", 24, "--sampling-steps", 3, "--grid-step", 0.5, "--search", "grid")
    journal = fast_disk / "shared.jsonl"
    both = (family, family.copied(fast_disk / "second"))
    processes = [machine(number, one, journal, *options) for number, one in enumerate(both)]
    answers = [process.communicate(timeout=DEADLINE_S) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    one, two = (Path(out.strip()) for out, _ in answers)
    same_merge(one, two)
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    done = [(*line["candidate"], line["samples"], line["noise"]) for line in lines if "candidate" in line]
    assert len(done) == len(set(done)), "a candidate was measured twice"
    assert len({line["owner"] for line in lines if "candidate" in line}) == 2, "one did nothing"
    alone = unbroken("merge", family.experts, *options)
    assert weights(one) == weights(alone)
    assert read_manifest(one).metrics["weights"] == read_manifest(alone).metrics["weights"]
    assert sorted(measured(one / "search.jsonl")) == sorted(measured(alone / "search.jsonl"))


def test_one_of_two_machines_dies_and_the_other_makes_what_it_held(family: Family, fast_disk: Path) -> None:
    journal = fast_disk / "shared.jsonl"
    options = ("--search-samples", 24, "--sampling-steps", 3, "--grid-step", 0.5)
    both = (family, family.copied(fast_disk / "second"))
    processes = [machine(number, one, journal, *options) for number, one in enumerate(both)]
    deadline_s = time.monotonic() + DEADLINE_S
    while not journal.exists() or journal.read_text().count('"claim"') < 4:
        assert time.monotonic() < deadline_s, [process.communicate() for process in processes]
        time.sleep(0.002)
    processes[0].send_signal(signal.SIGKILL)
    processes[0].communicate()  # a dead process whose parent has not looked is still there
    out, err = processes[1].communicate(timeout=DEADLINE_S)
    assert processes[1].returncode == 0, err
    done = measured(Path(out.strip()) / "search.jsonl")
    assert len(done) == 9 + 5 and len({entry[:-1] for entry in done}) == len(done)


def test_the_journal_of_another_search_is_refused(family: Family, fast_disk: Path) -> None:
    journal = fast_disk / "journal.jsonl"
    options = (*SEARCH, "--journal", journal)
    first = family.merge(family.experts, *options)
    assert first.code == 0, first.err
    lines = journal.read_text()
    others = [("--seed", 1), ("--objective", "frechet", "--sampling-steps", 2)]
    for other in others:
        ran = family.merge(family.experts, *options, *other)
        assert ran.code == EXIT_INPUT and ran.out == "" and "journal of another search" in ran.err, ran.err
    assert journal.read_text() == lines
    again = family.merge(family.experts, *options, "--output-dtype", "bfloat16")
    assert again.code == 0 and journal.read_text() == lines, "what is written does not change what was measured"


# ------------------------------------------------------------------------------------------------- what does not fit


def test_experts_of_another_theta_0_are_refused(family: Family) -> None:
    import shutil

    shutil.rmtree(family.base)
    shutil.copytree(family.models[0], family.base)  # a model in the place of the one that they started from
    for options in (("--weights", "1,1"), SEARCH):
        ran = family.merge(family.experts, *options)
        assert ran.code == EXIT_INPUT and ran.out == "" and "another now" in ran.err, ran.err
    ran = run_cli("analyse", family.experts, "--workspace", family.root)
    assert ran.code == EXIT_INPUT and ran.out == ""


@pytest.mark.parametrize("missing", ["ema", "both"])
def test_experts_with_a_missing_range_are_refused(missing: str, family: Family) -> None:
    folder = family.experts / "experts" / "1"
    for name in ("ema", "model") if missing == "both" else ("ema",):
        (folder / f"{name}.safetensors").unlink()
    for command in (("merge", "--weights", "1,1"), ("merge", *SEARCH), ("sample", "--samples", 1)):
        ran = run_cli(command[0], family.experts, *command[1:], "--workspace", family.root)
        assert ran.code == EXIT_INPUT and ran.out == "" and "Traceback" not in ran.err, ran.err


def test_the_device_plays_no_part_in_what_is_merged(family: Family, fast_disk: Path) -> None:
    places = ("cpu", "cuda:7")  # which no machine of the tests has: none is looked for
    made = [
        family.merge(family.experts, "--weights", "0.3,0.6", "--device", device, "--out", fast_disk / device[:3])
        for device in places
    ]
    one, two = (weights(ran.path) for ran in made)
    assert one == two
