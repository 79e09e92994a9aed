"""The journal of a search: what a crash leaves, who may measure what, and several writers at once."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
from objectives import FULL, crossed

from finectl.errors import OutputError
from finectl.search.base import Ask, Measured, Options, Space
from finectl.search.final import rescore, winner
from finectl.search.grid import Grid
from finectl.search.journal import Journal
from finectl.search.surrogate import Surrogate
from finectl.search.work import work

ASK = Ask((0.1, 0.3), FULL)
SPACE = Space(2, 0, 1, 0.25)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_measurements_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    entries = [
        Measured((0.1, 0.3), FULL, 1 / 3, (0.1, 0.7)),
        Measured((0.1, 0.3), FULL, 2.0, None, 1),
        Measured((0.2, 0.3), 250, math.inf),
    ]
    journal = Journal(path)
    assert journal.history() == []
    for entry in entries:
        journal.append(entry)
    read = Journal(path).history()
    assert read[:2] == entries[:2]
    assert (read[2].candidate, read[2].samples) == ((0.2, 0.3), 250)
    assert math.isnan(read[2].value)
    assert journal.history()[:2] == entries[:2]
    assert all("NaN" not in line and "Infinity" not in line for line in path.read_text().splitlines())


@pytest.mark.parametrize("cut", [1, 2, 10, 60])
def test_a_torn_last_line_is_skipped_and_the_next_one_is_whole(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "search.jsonl"
    journal = Journal(path)
    first, second, third = (Measured((k / 10,), FULL, float(k)) for k in range(3))
    journal.append(first)
    journal.append(second)
    path.write_bytes(path.read_bytes()[:-cut])
    assert Journal(path).history() == [first]
    resumed = Journal(path)
    resumed.append(third)
    # Only the newline was missing from a line that is whole: then it counts.
    assert Journal(path).history() == ([first, second, third] if cut == 1 else [first, third])
    assert resumed.history() == Journal(path).history()


def test_lines_that_are_no_entries_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    good = Measured((0.5,), FULL, 1.0)
    Journal(path).append(good)
    line = json.loads(path.read_text())
    wrong = [[], 3, None, {}, {"candidate": 3}, {**line, "candidate": ["x"]}, {**line, "samples": None}]
    with path.open("ab") as stream:
        stream.write(b"\xff\xfe\n\n{\n" + b"".join(json.dumps(entry).encode() + b"\n" for entry in wrong))
    Journal(path).append(good)
    assert Journal(path).history() == [good, good]


def test_a_reader_takes_in_what_others_append_and_survives_a_file_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    reader, writer = Journal(path), Journal(path)
    entries = [Measured((k / 10,), FULL, float(k)) for k in range(3)]
    for number, entry in enumerate(entries):
        writer.append(entry)
        assert reader.history() == entries[: number + 1]
    path.unlink()
    assert reader.history() == []
    Journal(path).append(entries[1])
    assert reader.history() == [entries[1]]


def test_a_claim_is_one_machines_until_it_is_measured_released_or_stale(tmp_path: Path) -> None:
    clock = Clock()
    one, two = (Journal(tmp_path / "s", owner=f"{name}:1:x", timeout_s=60, clock=clock) for name in ("a", "b"))
    assert one.claim(ASK)
    assert not two.claim(ASK)
    assert two.claim(Ask((0.2, 0.3), FULL))
    assert two.claim(Ask(ASK.candidate, FULL, 1))
    clock.now += 50
    assert one.claim(ASK)  # renewed
    clock.now += 50
    assert not two.claim(ASK)
    clock.now += 20
    assert two.claim(ASK)  # stale
    assert not one.claim(ASK)
    two.release(ASK)
    assert one.claim(ASK)
    one.append(Measured(ASK.candidate, ASK.samples, 1.0))
    clock.now += 1000
    assert not two.claim(ASK)
    assert not one.claim(ASK)


def test_only_the_first_of_two_claims_written_at_once_holds(tmp_path: Path) -> None:
    path, clock = tmp_path / "s", Clock()
    one, two = (Journal(path, owner=f"{name}:1:x", clock=clock) for name in ("a", "b"))
    two._read()
    write = two._write

    def late(entry: dict[str, object], **values: str) -> None:
        assert one.claim(ASK)  # comes between the other's look and its line
        write(entry, **values)

    two._write = late  # type: ignore[method-assign]
    assert not two.claim(ASK)
    assert one.claim(ASK)


def test_the_claim_of_a_process_that_is_gone_is_free_at_once(tmp_path: Path) -> None:
    ended = multiprocessing.get_context("spawn").Process(target=int)
    ended.start()
    ended.join()
    path, host = tmp_path / "s", socket.gethostname()
    assert Journal(path, owner=f"{host}:{ended.pid}:x").claim(ASK)
    assert Journal(path, owner=f"{host}:{os.getpid()}:y").claim(ASK)
    assert not Journal(path).claim(ASK)  # that process is alive: this one
    other = Ask((0.9, 0.9), FULL)
    assert Journal(path, owner=f"another-{host}:{ended.pid}:x").claim(other)
    assert not Journal(path).claim(other)  # nobody here knows whether it lives


def test_a_journal_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    path.mkdir()
    with pytest.raises(OutputError, match=r"search\.jsonl"):
        Journal(path).append(Measured((0.5,), FULL, 1.0))


def test_work_goes_on_where_an_interrupted_run_stopped(tmp_path: Path) -> None:
    objective = crossed(2, 1)
    whole = work(Surrogate(SPACE, Options(FULL)), Journal(tmp_path / "whole"), objective)
    made = objective.made
    assert len(made) == len(set(made)) == len(whole)

    for stop in range(len(whole)):
        path, again = tmp_path / f"stopped-{stop}", crossed(2, 1)

        def interrupted(ask: Ask, again=again, stop=stop) -> Measured:  # type: ignore[no-untyped-def]
            if len(again.made) == stop:
                raise KeyboardInterrupt
            return again(ask)

        with pytest.raises(KeyboardInterrupt):
            work(Surrogate(SPACE, Options(FULL)), Journal(path), interrupted)
        assert work(Surrogate(SPACE, Options(FULL)), Journal(path), again) == whole
        assert again.made == made
    assert rescore(whole) == []
    assert winner(whole).noise == 1


def _worker(path: Path, number: int) -> None:
    work(Grid(SPACE, Options(FULL)), Journal(path), crossed(2, 1), rescored=3, pause_s=0.01)
    (path.parent / f"done-{number}").touch()


def test_two_writers_share_a_search_and_measure_nothing_twice(tmp_path: Path) -> None:
    path, context = tmp_path / "search.jsonl", multiprocessing.get_context("spawn")
    workers = [context.Process(target=_worker, args=(path, number)) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert all((tmp_path / f"done-{number}").exists() for number in range(2))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    measured = [(tuple(line["candidate"]), line["samples"], line["noise"]) for line in lines if "candidate" in line]
    assert len(measured) == len(set(measured)) == SPACE.size + 3
    alone = work(Grid(SPACE, Options(FULL)), Journal(tmp_path / "alone"), crossed(2, 1), rescored=3)
    assert winner(Journal(path).history(), 3) == winner(alone, 3)


def _append_many(path: Path, first: int) -> None:
    journal = Journal(path)
    for k in range(first, first + 50):
        journal.append(Measured((float(k),), FULL, float(k)))


def test_lines_of_concurrent_writers_stay_whole(tmp_path: Path) -> None:
    path, context = tmp_path / "search.jsonl", multiprocessing.get_context("spawn")
    workers = [context.Process(target=_append_many, args=(path, 1000 * number)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    found = sorted(int(entry.value) for entry in Journal(path).history())
    assert found == [1000 * number + k for number in range(3) for k in range(50)]
