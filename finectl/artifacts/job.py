"""What a stage declares and what it is handed: the whole contract between a stage's file and the runner."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar

from finectl.artifacts.manifest import Manifest
from finectl.artifacts.store import Artifact, Workspace
from finectl.console import Console
from finectl.errors import FinectlError, Interrupted

C = TypeVar("C")


class DataRecord(Protocol):
    """What the manifest keeps of a data set."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def count(self) -> int: ...
    @property
    def bundled(self) -> bool: ...


@dataclass(frozen=True)
class Reads:
    """The artifacts that a stage takes as INPUT: their role in the manifest, the kinds that will do, one or many."""

    role: str
    kinds: tuple[str, ...]
    many: bool = False


@dataclass(frozen=True)
class Plan(Generic[C]):
    """What a run would do, found out without torch.

    Args:
        config: The configuration with every default filled in; the recipe's hash is made of it.
        slug: The readable part of the artifact's name.
        data: The data set that the work reads, if any.
        summary: What `--dry-run` prints beside the configuration: parameters, memory, disk and the like.
        notes: What finectl decided by itself, one line each, said on stderr.
    """

    config: C
    slug: str
    data: DataRecord | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Execution:
    """How to run: what may change rounding and speed only, so it is no part of the recipe.

    Args:
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: Arithmetic of the matrix products: `float32` or `bfloat16` (autocast).
        save_every: Save the resume state every so many optimiser updates; 0 saves once a minute.
    """

    device: str = "auto"
    dtype: str = "float32"
    save_every: int = 0


@dataclass
class Outcome:
    """What a stage measured and what it cost (steps, samples, wall seconds); both go into the manifest."""

    metrics: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)


class InterruptFlag:
    """Turns the first SIGINT or SIGTERM into a flag that the work looks at; the second one acts at once."""

    def __init__(self, console: Console) -> None:
        self.requested = False
        self._console = console
        self._before: dict[int, Any] = {}

    def __enter__(self) -> InterruptFlag:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.__exit__()
        with contextlib.suppress(RuntimeError):  # the signal came in the middle of another write to the same stream
            self._console.note(
                f"{signal.Signals(number).name}: finishing this step and saving; once more stops at once"
            )


@dataclass(frozen=True)
class Job(Generic[C]):
    """One run of a stage, as its `run` function sees it.

    Args:
        config: The resolved configuration.
        execution: Device, arithmetic and how often to save.
        parents: The input artifacts, opened and verified.
        directory: The staging directory; what is written here is the artifact.
        state: The directory of the resume state, inside the staging directory and never published.
        console: Where to write for people.
        interrupt: Whether a signal asked to stop.
        workspace: Where the lineage of the parents is found.
        data: The data set of the plan, if any.
    """

    config: C
    execution: Execution
    parents: Sequence[Artifact]
    directory: Path
    state: Path
    console: Console
    interrupt: InterruptFlag
    workspace: Workspace
    data: DataRecord | None = None

    def stop_if_requested(self, save: Callable[[], None] | None = None) -> None:
        """Save and leave when a signal asked for it; without `save` there is nothing to go on from.

        Raises:
            Interrupted: a signal came (exit code 75 when state was saved, 130 otherwise).
        """
        if not self.interrupt.requested:
            return
        if save is not None:
            save()
        raise Interrupted(
            "interrupted; the state is saved" if save else "interrupted; nothing was saved",
            saved=save is not None,
            fix="run the same command again: it goes on from there" if save else "",
        )


@dataclass(frozen=True)
class Stage(Generic[C]):
    """A stage as its file declares it.

    Args:
        name: The subcommand.
        version: Raised when the same configuration would give another result; part of the recipe.
        makes: The kind of artifact.
        config: The dataclass of its options.
        reads: What it takes as INPUT under a configuration; None for nothing.
        plan: Resolve the configuration, without torch.
        run: Do the work.
        verdict: Look at the finished artifact, made now or found, and return the error that its user asked to be told
            of (`--fail-if`); the artifact stays.
    """

    name: str
    version: int
    makes: str
    config: type[C]
    reads: Callable[[C], Reads | None]
    plan: Callable[[C, Sequence[Artifact]], Plan[C]]
    run: Callable[[Job[C]], Outcome]
    verdict: Callable[[C, Manifest], FinectlError | None] = lambda config, manifest: None


@dataclass(frozen=True)
class InheritedData:
    """The data set that an input artifact was made on, for a stage that reads none itself."""

    name: str
    fingerprint: str
    count: int
    bundled: bool

    @classmethod
    def of(cls, artifact: Artifact) -> InheritedData | None:
        """Return what the artifact's manifest says; None when it says nothing."""
        data = artifact.manifest.data
        return cls(**{name: data[name] for name in cls.__dataclass_fields__}) if data else None
