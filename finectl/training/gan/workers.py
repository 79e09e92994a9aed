"""Concepts one after another, in this process or shared by several of one thread each.

A process that works alone trains with one thread, too, so that the number of processes changes no bit.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from finectl.adapters.weight_dataset import concept_file, write_concept
from finectl.artifacts.files import remove_tree, write_json
from finectl.artifacts.job import Execution, Job
from finectl.artifacts.tensors import load_tensors, read_metadata
from finectl.console import Console
from finectl.data.concepts import Concept
from finectl.errors import ComputationError, FinectlError, Interrupted
from finectl.training.gan.adapting import Adapted, Adapter, Task
from finectl.training.gan.loop import Place

DIVERGED = "_diverged"  # no piece has an underscore in its name
POLL_S = 0.2


class Workload(Protocol):
    """What processes share: pieces with a `name` each. It is sent to other processes."""

    def opened(self) -> Any:
        """Return what a process opens once, for all that it does."""

    def do(self, opened: Any, item: Any, interrupted: Callable[[], bool]) -> float | None:
        """Do one piece, and return its last loss; None when it diverged."""


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """Where the pieces of a collection go, each a file or a note that it diverged.

    Args:
        directory: Staging directory of the artifact.
        state: That of the resume state; each piece has a folder in it while it is trained.
        execution: How to run.
    """

    directory: Path
    state: Path
    execution: Execution

    def finished(self, name: str) -> bool:
        """Tell whether a piece needs no more work: its values are there, or it diverged."""
        return (self.directory / concept_file(name)).exists() or self.diverged(name).exists()

    def diverged(self, name: str) -> Path:
        """Return the note that says that a piece diverged, and how."""
        return self.state / DIVERGED / f"{name}.json"

    def leave_out(self, name: str, error: ComputationError) -> None:
        """Write that note, and remove the state of the piece."""
        note = self.diverged(name)
        note.parent.mkdir(exist_ok=True)
        write_json(note, {"what": error.what})
        remove_tree(self.state / name)


@dataclass(frozen=True, kw_only=True)
class Work(Pieces):
    """What a process needs; it can be sent to another.

    Args:
        task: What all concepts have in common.
        start: File of the adapters' start.
    """

    task: Task
    start: Path

    def opened(self) -> Any:
        """Return what a process opens once, for all that it does."""
        return Adapter(self.task)

    def do(self, opened: Any, item: Any, interrupted: Callable[[], bool]) -> float | None:
        """Do one piece of the work: train a concept; see `train_concept`."""
        return train_concept(self, opened, item, interrupted)


def train_concept(work: Work, adapter: Adapter, concept: Concept, interrupted: Callable[[], bool]) -> float | None:
    """Train one concept and write its weights in one atomic file, or a note that it diverged.

    With several orders of the data the weights of each are a file of the state until all are there.

    Returns:
        The last L1 on training pairs; None when it diverged.

    Raises:
        Interrupted: somebody asked to stop; the state is saved.
    """
    folder = work.state / concept.name
    kept: list[Mapping[str, Tensor]] = []
    records: list[Any] = []
    try:
        for order in range(work.task.orders):
            done = folder / f"{order}.safetensors"
            if not done.exists():
                adapted = _train_order(work, adapter, concept, order, interrupted)
                write_concept(done, adapted.kept, adapted.record)
                remove_tree(folder / str(order))
            stacked = load_tensors(done)
            kept += [dict(zip(stacked, state, strict=True)) for state in zip(*stacked.values(), strict=True)]
            records.append(read_metadata(done))
    except ComputationError as error:
        work.leave_out(concept.name, error)
        return None
    record = {"role": concept.role, "losses": records[0]}
    if records[1:]:
        record["further_losses"] = records[1:]
    write_concept(work.directory / concept_file(concept.name), kept, record)
    remove_tree(folder)
    return float(records[-1]["l1"][-1][1])


def _train_order(
    work: Work, adapter: Adapter, concept: Concept, order: int, interrupted: Callable[[], bool]
) -> Adapted:
    folder = work.state / concept.name / str(order)
    folder.mkdir(parents=True, exist_ok=True)
    # The time limit is that of all concepts, and the one who hands them out keeps it.
    execution = replace(work.execution, max_minutes=0.0)
    place = Place(folder, folder, Console(quiet=True), execution, interrupted)
    return adapter.train(concept, load_tensors(work.start), place, order)


def train_all(
    job: Job[Any],
    work: Workload,
    items: Sequence[Any],
    processes: int,
    start_s: float,
    loss: str,
    *,
    stage: str = "collecting",
    unit: str = "concept",
) -> None:
    """Train the pieces of a collection, with a progress bar, until all are done or somebody asks to stop.

    Args:
        job: That of the collection; its `--max-time` is for all pieces.
        work: What they need.
        items: The pieces.
        processes: How many at a time.
        start_s: When the work began, as `time.monotonic` says it.
        loss: What the progress bar calls the last loss of a piece.
        stage: What it calls the work.
        unit: What it calls a piece.

    Raises:
        Interrupted: a signal came, or `--max-time` is over; the state is saved.
    """
    limit_s = 60 * job.execution.max_minutes

    def is_over() -> bool:
        return limit_s > 0 and time.monotonic() - start_s >= limit_s

    def asked() -> bool:
        return job.interrupt.requested or is_over()

    with job.console.progress(stage, len(items), unit=unit) as progress:

        def done(name: str, last: float | None) -> None:
            if last is None:
                job.console.note(f"{name} diverged and is left out")
            values: dict[str, Any] = {loss: last if last is not None else float("nan")}
            progress.advance(**values)

        try:
            if processes == 1:
                train_alone(work, items, asked, done)
            else:
                train_shared(work, items, processes, asked, done)
        except Interrupted:
            job.stop(lambda: None, "--max-time is over" if is_over() else "interrupted")


def train_alone(
    work: Workload, concepts: Sequence[Any], interrupted: Callable[[], bool], done: Callable[[str, float | None], None]
) -> None:
    """Train concepts in this process.

    Args:
        work: What they need.
        concepts: Which.
        interrupted: Whether to stop.
        done: Called after each with its name and last L1, None when it diverged.

    Raises:
        Interrupted: `interrupted` said so; the state is saved.
    """
    with _one_thread():
        adapter = work.opened()
        for concept in concepts:
            if interrupted():
                raise Interrupted("interrupted; the state is saved", saved=True)
            done(concept.name, work.do(adapter, concept, interrupted))


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_shared(
    work: Workload,
    concepts: Sequence[Any],
    processes: int,
    interrupted: Callable[[], bool],
    done: Callable[[str, float | None], None],
) -> None:
    """Train concepts in several processes; see `train_alone`.

    Raises:
        Interrupted: `interrupted` said so; all have saved their state.
        ComputationError: a process died.
        FinectlError: one of them met it.
    """
    context = multiprocessing.get_context("spawn")
    waiting, answers, stop = context.Queue(), context.Queue(), context.Event()
    for concept in (*concepts, *[None] * processes):
        waiting.put(concept)
    workers = [
        context.Process(target=_serve, args=(work, waiting, answers, stop, os.getpid())) for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    try:
        left, failure = _hear(workers, answers, stop, len(concepts), interrupted, done)
    finally:
        stop.set()
        for worker in workers:
            worker.join()
        for channel in (waiting, answers):
            channel.cancel_join_thread()
            channel.close()
    if failure is not None:
        raise failure
    if left and interrupted():
        raise Interrupted("interrupted; the state is saved", saved=True)
    if left:
        raise _lost(next((worker.exitcode for worker in workers if worker.exitcode), 0))


def _hear(
    workers: Sequence[Any],
    answers: Any,
    stop: Any,
    left: int,
    interrupted: Callable[[], bool],
    done: Callable[[str, float | None], None],
) -> tuple[int, Exception | None]:
    """Hear what processes finish until all is done, one fails, or all are gone.

    Returns:
        The concepts that are left, and what failed, if anything.
    """
    while left:
        if interrupted():
            stop.set()
        gone = not any(worker.is_alive() for worker in workers)  # asked first: what they said last is still heard
        try:
            answer = answers.get(timeout=POLL_S)
        except queue.Empty:
            died = [worker.exitcode for worker in workers if worker.exitcode]
            if died or gone:
                return left, _lost(died[0]) if died else None
            continue
        if "error" in answer:
            return left, _rebuilt(answer)
        done(answer["name"], answer["l1"])
        left -= 1
    return left, None


def _serve(work: Workload, waiting: Any, answers: Any, stop: Any, parent: int) -> None:
    """Train concepts of the queue until it is empty or somebody asks to stop: the body of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the one who hands out the work decides
    torch.set_num_threads(1)

    def asked() -> bool:
        return bool(stop.is_set()) or os.getppid() != parent

    try:
        adapter = work.opened()
        while (concept := _next(waiting, asked)) is not None:
            l1 = work.do(adapter, concept, asked)
            answers.put({"name": concept.name, "l1": l1})
    except Interrupted:
        return
    except FinectlError as error:
        answers.put({"error": type(error), "what": error.what, "expected": error.expected, "fix": error.fix})
    except Exception:  # noqa: BLE001 - it is raised again in the process that people see
        answers.put({"error": None, "what": traceback.format_exc()})


def _next(waiting: Any, asked: Callable[[], bool]) -> Concept | None:
    """Return the next concept; None when there is none or somebody asks to stop, such as by having died."""
    while not asked():
        try:
            concept: Concept | None = waiting.get(timeout=POLL_S)
            return concept
        except queue.Empty:
            continue
    return None


def _rebuilt(answer: Mapping[str, Any]) -> Exception:
    """Return the error that a process met."""
    if answer["error"] is None:
        return RuntimeError(f"a worker process failed:\n{answer['what']}")
    error: Exception = answer["error"](answer["what"], expected=answer["expected"], fix=answer["fix"])
    return error


def _lost(code: int) -> ComputationError:
    return ComputationError(
        f"a worker process ended with code {code}; what the others finished is kept",
        expected="enough memory for all of them",
        fix="run the same command again, with fewer --workers if memory ran out: it goes on from there",
    )
