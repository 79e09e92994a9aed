"""What a stage declares and what it is handed: the whole contract between a stage's file and the runner."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Generic, NoReturn, Protocol, TypeVar

from finectl.artifacts.manifest import Manifest
from finectl.artifacts.store import Artifact, Workspace
from finectl.console import Console
from finectl.errors import FinectlError, Interrupted
from finectl.world import World

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
    """The artifacts that a stage takes as INPUT.

    Args:
        role: What they are to the result, for the manifest.
        kinds: The kinds that will do.
        many: Whether several may be given.
        named: Inputs that the configuration itself names; INPUT is not read then.
        also: Further inputs, each of one artifact that the configuration names; they come after the others.
        several: What mends it when several are given and one is read.
    """

    role: str
    kinds: tuple[str, ...]
    many: bool = False
    named: tuple[str, ...] = ()
    also: tuple[Reads, ...] = ()
    several: str = ""

    def roles(self, count: int) -> list[str]:
        """Return the role of each of so many input artifacts."""
        return [self.role] * (count - len(self.also)) + [further.role for further in self.also]


@dataclass(frozen=True)
class Plan(Generic[C]):
    """What a run would do, found out without torch.

    Args:
        config: The configuration with every default filled in; the recipe's hash is made of it.
        slug: The readable part of the artifact's name.
        data: The data set that the work reads, if any.
        summary: What `--dry-run` prints beside the configuration: parameters, memory, disk and the like.
        notes: What finectl decided by itself, one line each, said on stderr.
        makes: The kind of artifact, where it depends on the configuration.
    """

    config: C
    slug: str
    data: DataRecord | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    makes: str | None = None


@dataclass(frozen=True)
class Execution:
    """How to run: what may change rounding and speed only, so it is no part of the recipe.

    Args:
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: Arithmetic of the matrix products: `float32`, `tf32`, `bfloat16` (autocast), or `auto`: bfloat16 on CUDA,
            float32 elsewhere.
        save_every: Save the resume state every so many optimiser updates; 0: by time.
        save_minutes: Save it every so many minutes, where `save_every` is 0.
        max_minutes: Save and leave (exit code 75) after so many minutes of work; 0: no limit.
        workers: Threads that read batches ahead.
        accumulate: Parts into which a process cuts its share of a batch, one after another.
        compile: Whether torch.compile makes the model's code.
        grad_checkpointing: Whether activations are computed again in the backward pass instead of kept.
        fsdp: Whether weights, gradients and optimiser state are spread over the processes.
        tensorboard: Whether TensorBoard events are written beside the log.
        sample_every: Draw samples every so many updates; 0 never.
    """

    device: str = "auto"
    dtype: str = "auto"
    save_every: int = 0
    save_minutes: float = 1.0
    max_minutes: float = 0.0
    workers: int = 2
    accumulate: int = 1
    compile: bool = False
    grad_checkpointing: bool = False
    fsdp: bool = False
    tensorboard: bool = False
    sample_every: int = 0


@dataclass
class Outcome:
    """What a stage measured and what it cost (steps, samples, wall seconds); both go into the manifest.

    Args:
        metrics: What was measured.
        cost: What it cost.
        sha256: Digests of files, by their paths in the artifact, that were found while they were written; the others
            are read once more.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)


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
        world: The processes that share the work.
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
    world: World = field(default_factory=World)

    def stop_if_requested(self, save: Callable[[], None] | None = None) -> None:
        """Save and leave when a signal asked for it; without `save` there is nothing to go on from.

        Raises:
            Interrupted: a signal came (exit code 75 when state was saved, 130 otherwise).
        """
        if self.interrupt.requested:
            self.stop(save, "interrupted")

    def stop(self, save: Callable[[], None] | None, reason: str) -> NoReturn:
        """Save and leave.

        Raises:
            Interrupted: always (exit code 75 when state was saved, 130 otherwise).
        """
        if save is not None:
            save()
        raise Interrupted(
            f"{reason}; the state is saved" if save else f"{reason}; nothing was saved",
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
        run: Do the work. Of several processes each calls it, where the stage shares its work; only the one that leads
            may write.
        verdict: Look at the finished artifact, made now or found, and return the error that its user asked to be told
            of (`--fail-if`); the artifact stays.
        locations: Fields of the configuration that say where something lies. They are no part of the recipe: what lies
            there counts, by a fingerprint.
        presentation: Fields of the configuration that say how the result is shown or judged; they are no part of the
            recipe either.
        unchanged_at: Fields that came with a later finectl, and the value of each at which the work is what it was
            before: at it they are no part of the recipe, so that what was made then is found.
        prints: What stdout gets instead of the artifact's path, where the configuration asks for that.
        shares_work: Whether several processes share the work; otherwise the one that leads does it all.
        measure: What `--dry-run` measures beside the plan, such as the seconds of a step.
    """

    name: str
    version: int
    makes: str
    config: type[C]
    reads: Callable[[C], Reads | None]
    plan: Callable[[C, Sequence[Artifact]], Plan[C]]
    run: Callable[[Job[C]], Outcome]
    verdict: Callable[[C, Manifest], FinectlError | None] = lambda config, manifest: None
    locations: tuple[str, ...] = ("data",)
    presentation: tuple[str, ...] = ()
    unchanged_at: Mapping[str, object] = field(default_factory=dict)
    prints: Callable[[C, Artifact], str | None] = lambda config, artifact: None
    shares_work: bool = False
    measure: Callable[[Plan[C], Sequence[Artifact], Execution], dict[str, Any]] | None = None


@dataclass(frozen=True)
class InheritedData:
    """The data set that an input artifact was made on, for a stage that reads none itself."""

    name: str
    fingerprint: str
    count: int
    bundled: bool
    skipped: int = 0
    vae: Mapping[str, Any] | None = None
    captions: str = ""
    text: Mapping[str, Any] | None = None
    whole: str = ""

    @classmethod
    def of(cls, artifact: Artifact) -> InheritedData | None:
        """Return what the artifact's manifest says; None when it says nothing."""
        data = artifact.manifest.data
        return cls(**{name: data[name] for name in cls.__dataclass_fields__ if name in data}) if data else None
