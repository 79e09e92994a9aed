"""`finectl finetune --control` and `finectl sample CONTROLNET`: the stages behind them."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from finectl.cli.command import Call
from finectl.errors import InputError, UsageError

if TYPE_CHECKING:
    from finectl.artifacts.store import Artifact

OF_CONTROL = ("control_model", "control_set", "control_images", "bank_control", "validate_every", "vae")
NOT_WITH_CONTROL = {"label_rows": None, "bank_labels": None, "peft": "none", "peft_set": None, "shots": None}
OF_SAMPLING = {"control_image": None, "from_image": None, "control_scale": 1.0}
NOT_WITH_CONTROLNET = {"labels": None, "handover": None, "fraction": None, "domain_guidance": None, "ensemble": None}


def with_control(call: Call) -> Call:
    """Let `--control` choose the stage that trains a ControlNet; without it, return the command as it is.

    The model is looked at before a bank of it is made.

    Raises:
        UsageError: options do not go together, or the model takes no ControlNet.
        InputError: there is no such model.
    """
    if call.values["control"] is None:
        _require_unused(call, dict.fromkeys(OF_CONTROL), "without --control", "--control edge")
        return call
    _require_unused(call, NOT_WITH_CONTROL, "with --control", "training all of a model")
    call = _of(call, "finectl.stages.finetune_control")
    if not call.options.world.leads:
        return call  # the process that leads says what is read
    from finectl.artifacts.job import Reads
    from finectl.artifacts.store import Workspace
    from finectl.models.control_config import require_controllable
    from finectl.models.io import read_config
    from finectl.runner import find_parents

    wanted = Reads("model", ("model",))
    (model,) = find_parents(Workspace(call.options.workspace), wanted, call.inputs, call.console)
    require_controllable(read_config(model), str(model.path))
    return replace(call, inputs=(str(model.path),))


def with_controlnet(call: Call) -> Call:
    """Let `sample` take a ControlNet as its INPUT, with the model that it was trained on; else return it as it is.

    Raises:
        UsageError: options do not go together.
        InputError: the ControlNet's model is not where it was.
    """
    call, found = _controlnet(call)
    if found is None:
        _require_unused(call, OF_SAMPLING, "and INPUT is no ControlNet", "finectl sample CONTROLNET")
        return call
    from finectl.artifacts.ancestors import find_ancestor

    _require_unused(call, NOT_WITH_CONTROLNET, "with a ControlNet", "a model")
    model = find_ancestor(found, "model")
    if model is None:
        recorded = next(parent for parent in found.manifest.parents if parent.role == "model")
        raise InputError(
            f"the model that {found.path} was trained on is not at {found.path / recorded.path}, or was made anew",
            expected=f"the model with the digest {recorded.digest[:12]}: a ControlNet adds to that one only",
            fix="bring it back to where it was",
        )
    return _of(call, "finectl.stages.sample_control", base=str(model.path))


def _controlnet(call: Call) -> tuple[Call, Artifact | None]:
    """Return the command with what came on stdin read, and its INPUT when it is a ControlNet."""
    from finectl.artifacts.store import LATEST, Workspace
    from finectl.models.control_config import KIND
    from finectl.runner import STDIN, read_stdin

    if not call.inputs or call.values["ensemble"] is not None or not call.options.world.leads:
        return call, None
    inputs = tuple(name for text in call.inputs for name in (read_stdin() if text == STDIN else [text]))
    call = replace(call, inputs=inputs)
    if len(inputs) != 1 or inputs[0] == LATEST:
        return call, None
    artifact = Workspace(call.options.workspace).find(inputs[0], ())
    return call, artifact if artifact.kind == KIND else None


def _of(call: Call, module: str, **more: Any) -> Call:
    """Return the command with another stage, and the same options as far as that has them."""
    stage = importlib.import_module(module).STAGE
    values = {**call.values, **more}
    config = {name: values[name] for name in stage.config.__dataclass_fields__ if name in values}
    return replace(call, stage=stage, config=config, values=values)


def _require_unused(call: Call, usual: dict[str, Any], when: str, expected: str) -> None:
    """Check that options have their usual values.

    Raises:
        UsageError: one was given.
    """
    for name, value in usual.items():
        given = call.values.get(name, value)
        if given != value:
            option = f"--{name.replace('_', '-')}"
            shown = " ".join(map(str, given)) if isinstance(given, list | tuple) else given
            raise UsageError(f"{option} {shown} {when}", expected=expected, fix=f"leave {option} out")
