"""`finectl init` for a whole family: several methods, variants and depths, one ordinary artifact each."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any

from finectl.cli.command import Call, print_result, run_one
from finectl.cli.method_help import ALL, making
from finectl.errors import FinectlError, InputError, Interrupted, UsageError
from finectl.initializers import METHODS
from finectl.registry import nearest

if TYPE_CHECKING:
    from finectl.artifacts.job import Stage
    from finectl.artifacts.store import Artifact, Workspace
    from finectl.console import Console
    from finectl.runner import Result, RunOptions

GO_ON = "run the same command again: it goes on from there"


@dataclass(frozen=True)
class Member:
    """One model of a family.

    Args:
        name: `METHOD[-VARIANT][-lDEPTH]`.
        selectors: The names in `--only` that mean it.
        config: Its options, as `--method METHOD --depth DEPTH` would have them.
        inputs: The path of what it starts from; empty for a method that needs nothing.
    """

    name: str
    selectors: frozenset[str]
    config: dict[str, Any]
    inputs: tuple[str, ...] = ()


def run(call: Call) -> Result | None:
    """Make one model, or the family that `--method`, `--variant` and `--depths` span, printing each when it is there.

    Raises:
        UsageError: options contradict one another, or `--only` names what the family does not have.
        InputError: a method has nothing to start from.
        Interrupted: a signal came, or `--max-time` is over; the same command goes on with what is missing.
    """
    call = _with_one_depth(call)
    if not is_family(call):
        return run_one(call)
    if call.options.world.leads:
        _lead(call)
    else:
        _follow(call)
    return None


def is_family(call: Call) -> bool:
    """Tell whether the options ask for several models, even if it comes to one."""
    values = call.values
    several = ALL in (values["method"], values["variant"]) or "," in values["method"]
    return several or values["depths"] is not None or values["only"] is not None


def _with_one_depth(call: Call) -> Call:
    """Drop `--depth` or `--depths` where the other one is typed and this one comes from a recipe.

    Raises:
        UsageError: both are typed, or both stand in the recipe.
    """
    given = [name for name in ("depth", "depths") if call.values[name] is not None]
    if len(given) < 2:
        return call
    typed = [name for name in given if name in call.typed]
    if len(typed) != 1:
        raise UsageError("--depth and --depths are both given", expected="one of them")
    dropped = {name: None for name in given if name not in typed}
    config = {**call.config, **({"depth": None} if "depth" in dropped else {})}
    return replace(call, config=config, values={**call.values, **dropped})


def _lead(call: Call) -> None:
    """Plan the family, then make its members one after another."""
    world, said = call.options.world, count()
    try:
        members = plan_family(call)
        if call.options.out is not None and len(members) > 1:
            raise UsageError(
                f"--out {call.options.out} is one place, and these are {len(members)} models",
                expected="--workspace DIR, or --only with one model",
            )
        if call.options.dry_run:
            _print_plans(call, members)
            return
        start_s = time.monotonic()
        for place, member in enumerate(members, start=1):
            done = f"{place - 1} of {len(members)} models are made"
            options = _options_of(call, member, start_s, done)
            options = replace(options, world=world.part(f"member/{next(said)}"))
            options.world.tell("config", member.config)
            call.console.note(f"{place} of {len(members)}: {member.name}")
            result = _run_member(call, member, options)
            print_result(result, call.values["json_output"], call.console)
            sys.stdout.flush()
            if result.interrupted and place < len(members):
                raise Interrupted(f"interrupted; {place} of {len(members)} models are made", saved=True, fix=GO_ON)
    finally:
        world.part(f"member/{next(said)}").tell("config", None)


def _follow(call: Call) -> None:
    """Share the work on each member that the process that leads names."""
    for place in count():
        part = call.options.world.part(f"member/{place}")
        config = part.hear("config")
        if config is None:
            return
        _run_member(call, Member("", frozenset(), config), replace(call.options, world=part))


def _run_member(call: Call, member: Member, options: RunOptions) -> Result:
    from finectl.runner import run_stage

    return run_stage(call.stage, call.stage.config(**member.config), member.inputs, options, call.console)


def _options_of(call: Call, member: Member, start_s: float, done: str) -> RunOptions:
    """Return the options of one member: `--max-time` is for all of them, the recorded command makes this one.

    Raises:
        Interrupted: `--max-time` is over.
    """
    execution = call.options.execution
    if execution.max_minutes:
        left = execution.max_minutes - (time.monotonic() - start_s) / 60
        if left <= 0:
            raise Interrupted(f"--max-time is over; {done}", saved=True, fix=GO_ON)
        execution = replace(execution, max_minutes=left)
    return replace(call.options, execution=execution, command=(*call.options.command, "--only", member.name))


def plan_family(call: Call) -> list[Member]:
    """Return the members to make, in the order of the table of methods, each with what it starts from.

    Every member is planned once, so that what is wrong with any of them is said before work starts.

    Raises:
        UsageError: a name or a depth is wrong.
        InputError: a named method has nothing to start from; with `--method all`, none of them has.
    """
    wanted = select(call, span(call))
    sources = Sources.of(call)
    members: list[Member] = []
    missing: dict[str, FinectlError] = {}
    for method in dict.fromkeys(member.config["method"] for member in wanted):
        mine = [member for member in wanted if member.config["method"] == method]
        try:
            parents = sources.choose(call.stage.config(**mine[0].config))
        except NoSourceError as none:
            if call.values["method"] != ALL:
                raise none.error from None
            missing[method] = none.error
            continue
        for member in mine:
            call.stage.plan(call.stage.config(**member.config), parents)
            members.append(replace(member, inputs=tuple(str(parent.path) for parent in parents)))
    if not members:
        raise _none_left(missing)
    _say_sources(call, members, sources, missing)
    return members


def _say_sources(call: Call, members: Sequence[Member], sources: Sources, missing: Mapping[str, FinectlError]) -> None:
    """Say what was taken without being named, what was named and is not taken, and which methods are left out."""
    takers: dict[str, dict[str, None]] = {}
    for member in members:
        for path in member.inputs:
            takers.setdefault(path, {})[member.config["method"]] = None
    given = [str(artifact.path) for artifact in sources.given]
    for path, methods in takers.items():
        if path not in given:
            call.console.note(f"no INPUT given: the newest is taken, {path}, by {', '.join(methods)}")
    for path in given:
        if path not in takers:
            call.console.note(f"no method takes {path}: each takes the first INPUT that it can start from")
    for method, error in missing.items():
        mending = error.fix if isinstance(error, UsageError) else making(METHODS[method])
        call.console.note(f"left out: {method}; {error.what}; try: {mending}")


def _none_left(missing: Mapping[str, FinectlError]) -> FinectlError:
    """Return the error of a family of which every method was left out."""
    errors = list(missing.values())
    if len({error.what for error in errors}) == 1:  # nothing about the methods: the data, say
        return errors[0]
    return InputError(
        f"there is nothing to start from for {', '.join(missing)}",
        expected="a learngene, a dense model, or --model for the methods that need none",
        fix=errors[0].fix,
    )


def span(call: Call) -> list[Member]:
    """Return every member that the options name: methods in the order of the table, then variants, then depths.

    Raises:
        UsageError: there is no such method, or a depth is none or named twice.
    """
    from finectl.stages.extract import parse_depths

    values = call.values
    named = list(METHODS) if values["method"] == ALL else [part.strip() for part in values["method"].split(",")]
    table = {name: METHODS[name] for name in named}  # an unknown name is an error here
    depths: list[int | None] = [values["depth"]]
    if values["depths"] is not None:
        depths = [*parse_depths(values["depths"])]
    for option, names in (("--method", named), ("--depths", depths)):
        if len(set(names)) < len(names):
            raise UsageError(f"{option} names something twice", expected="each once")
    constants = {name for method in table.values() for name in method.constants}
    members = []
    for method in sorted(table, key=list(METHODS).index):
        known = table[method].variants
        every = values["variant"] == ALL
        for variant in (known if every else ()) or (None if every else values["variant"],):
            shown = variant or (known[0] if known else None)
            for depth in depths:
                config = {**call.config, "method": method, "variant": variant, "depth": depth}
                config["set"] = _own_constants(values["set"], table[method].constants, constants)
                members.append(_named(method, shown, depth, config, with_variant=every))
    return members


def _named(method: str, variant: str | None, depth: int | None, config: dict[str, Any], with_variant: bool) -> Member:
    """Return a member under its name, with all names that `--only` knows it by."""
    names = [method, *([f"{method}-{variant}"] if variant else [])]
    place = [f"l{depth}"] if depth is not None else []
    selectors = frozenset([*names, *place, *(f"{name}-{end}" for name in names for end in place)])
    return Member("-".join([names[-1] if with_variant else method, *place]), selectors, config)


def _own_constants(text: str | None, own: Collection[str], of_others: Collection[str]) -> str | None:
    """Return the part of `--set` that a method has; what no method has stays, and is an error where it is read."""
    parts = [part for part in (text or "").split(",") if part.strip()]
    names = {part: part.partition("=")[0].strip() for part in parts}
    return ",".join(part for part in parts if names[part] in own or names[part] not in of_others) or None


def select(call: Call, members: Sequence[Member]) -> list[Member]:
    """Return the members that `--only` names; all without it.

    Raises:
        UsageError: it names none of them.
    """
    if call.values["only"] is None:
        return list(members)
    known = list(dict.fromkeys(name for member in members for name in sorted(member.selectors)))
    wanted = [part.strip() for part in call.values["only"].split(",")]
    for name in wanted:
        if name not in known:
            raise UsageError(
                f"--only {name!r} is none of these models{nearest(name, known)}",
                expected=f"some of: {', '.join(member.name for member in members)}",
            )
    return [member for member in members if member.selectors.intersection(wanted)]


class NoSourceError(Exception):
    """A method has nothing to start from; `error` is what the method alone would say."""

    def __init__(self, error: FinectlError) -> None:
        super().__init__(error.what)
        self.error = error


@dataclass(frozen=True)
class Sources:
    """What the methods of a family may start from.

    Args:
        stage: The stage's declaration.
        workspace: Where the newest artifacts are found.
        given: The INPUT artifacts, in order.
        newest: Whether artifacts that are not named will do, the newest first.
        console: Where it is said which artifacts are damaged.
        found: The workspace's artifacts by kind, as far as they were looked at.
    """

    stage: Stage[Any]
    workspace: Workspace
    given: tuple[Artifact, ...]
    newest: bool
    console: Console
    found: dict[str, list[Artifact]] = field(default_factory=dict)

    @classmethod
    def of(cls, call: Call) -> Sources:
        """Open the INPUT artifacts; `latest` stands for the newest of the kinds that a method can start from.

        Raises:
            InputError: one is missing or damaged, or stdin is empty.
        """
        from finectl.artifacts.store import LATEST, Workspace
        from finectl.runner import STDIN, read_stdin

        workspace = Workspace(call.options.workspace)
        texts = [text for given in call.inputs for text in (read_stdin() if given == STDIN else [given])]
        named = [text for text in texts if text != LATEST]
        given = tuple(workspace.find(text, ()) for text in named)
        return cls(call.stage, workspace, given, len(named) < len(texts) or not texts, call.console)

    def choose(self, config: Any) -> tuple[Artifact, ...]:
        """Return what a member starts from: the first artifact of a kind that will do of which it can be planned.

        Raises:
            NoSourceError: there is none, or `--model` does not go with the method.
            UsageError: the options are wrong with any source.
        """
        try:
            reads = self.stage.reads(config)
        except UsageError as error:
            raise NoSourceError(error) from error
        if reads is None:
            return ()
        refusal: InputError | None = None
        for artifact in self._candidates(reads.kinds):
            try:
                self.stage.plan(config, (artifact,))
            except InputError as error:
                refusal = refusal or error
            except UsageError as error:
                if config.model is None:
                    raise
                raise NoSourceError(error) from error  # a target that it cannot make
            else:
                return (artifact,)
        raise NoSourceError(refusal or self._nothing(config.method, reads.kinds))

    def _candidates(self, kinds: Sequence[str]) -> Iterator[Artifact]:
        yield from (artifact for artifact in self.given if artifact.kind in kinds)
        if not self.newest:
            return
        for kind in kinds:
            yield from self._own(kind)

    def _own(self, kind: str) -> list[Artifact]:
        """Return the whole artifacts of a kind, the newest first, but those that init made.

        They are no ancestors unless they are named, or the family would start from its own members.
        """
        from finectl.artifacts.store import open_artifact

        if kind not in self.found:
            self.found[kind] = []
            for path in self.workspace.paths(kind):
                try:
                    self.found[kind].append(open_artifact(path))
                except FinectlError as error:
                    self.console.note(f"passed over: {path} is damaged: {error.what}")
        own = [artifact for artifact in self.found[kind] if artifact.manifest.stage != self.stage.name]
        return sorted(own, key=lambda artifact: (artifact.manifest.created, artifact.name), reverse=True)

    def _nothing(self, method: str, kinds: Sequence[str]) -> InputError:
        if self.given:
            what = f"no INPUT is a {' or '.join(kinds)}"
        else:
            what = f"there is no {' or '.join(kinds)} in the workspace {self.workspace.root}"
            what += " that init did not make itself" if "model" in kinds else ""
        return InputError(what, expected=f"kind {' or '.join(map(repr, kinds))}", fix=making(METHODS[method]))


def _print_plans(call: Call, members: Sequence[Member]) -> None:
    """Print every member's plan and their sums, which with `--json` are the last line, `{"members": ...}`."""
    total = {"members": len(members), "parameters": 0, "disk_bytes": 0}
    for member in members:
        result = _run_member(call, member, call.options)
        for name in ("parameters", "disk_bytes"):
            total[name] += result.plan.get(name, 0)
        if not call.values["json_output"]:
            call.console.note(member.name)
        print_result(result, call.values["json_output"], call.console)
    if call.values["json_output"]:
        sys.stdout.write(json.dumps(total) + "\n")
    else:
        call.console.note(
            f"{total['members']} models, {total['parameters']:,} parameters, {total['disk_bytes'] / 1e6:,.1f} MB"
        )
