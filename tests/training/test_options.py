"""Options of a run that change rounding at most: parts, checkpointing, compiling, precision, time, events, pictures."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import CONFIG, images, model, run, same
from support import run_cli
from torch.optim.optimizer import register_optimizer_step_pre_hook

from finectl.artifacts.manifest import read_manifest
from finectl.artifacts.tensors import read_metadata
from finectl.cli.command import minutes
from finectl.errors import Interrupted, UsageError
from finectl.models.dit import DiT
from finectl.training.clock import Clock
from finectl.training.device import Arithmetic
from finectl.training.log import Log, read_log
from finectl.training.state import NAME


def close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], tolerance: float) -> bool:
    return all(torch.allclose(value, two[name], rtol=0, atol=tolerance) for name, value in one.items())


@pytest.mark.parametrize("execution", [{"accumulate": 3}, {"grad_checkpointing": True}, {"workers": 0}])
def test_what_changes_rounding_only(execution: dict[str, Any], tmp_path: Path) -> None:
    plain, other = run(tmp_path / "1"), run(tmp_path / "2", execution=execution)
    assert close(plain.state, other.state, 1e-5) and close(plain.ema, other.ema, 1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_code_gives_the_same_model(tmp_path: Path) -> None:
    config = replace(CONFIG, depth=1, factorized=None)

    def heldout(net: Any) -> float:
        return float(net(torch.ones(1, 1, 8, 8), torch.tensor([5]), torch.tensor([1])).detach().sum())

    plain = run(tmp_path / "1", steps=3, start=model(config), heldout=heldout)
    compiled = run(tmp_path / "2", steps=3, start=model(config), heldout=heldout, execution={"compile": True})
    assert close(plain.state, compiled.state, 1e-4)


def test_clipping_bounds_the_norm_of_all_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []

    def watch(optimizer: Any, *rest: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.stack([grad.norm() for grad in grads]).norm()))

    handle = register_optimizer_step_pre_hook(watch)
    try:
        free = run(tmp_path / "1")
        unbounded, bound = max(norms), min(norms) / 2
        norms.clear()
        clipped = run(tmp_path / "2", clip_grad=bound)
        assert norms == pytest.approx([bound] * len(norms), rel=1e-3) and unbounded > bound
        norms.clear()
        assert same(run(tmp_path / "3", clip_grad=0.0).state, free.state)
    finally:
        handle.remove()
    assert not same(clipped.state, free.state)


def test_what_dtype_means_here() -> None:
    cpu = torch.device("cpu")
    assert Arithmetic.of(cpu, "auto").autocast is None
    assert Arithmetic.of(cpu, "bfloat16").autocast == torch.bfloat16
    Arithmetic.of(cpu, "tf32")
    assert torch.backends.cuda.matmul.allow_tf32
    Arithmetic.of(cpu, "float32")
    assert not torch.backends.cuda.matmul.allow_tf32


def test_time_that_is_over_saves_and_the_rest_follows(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="--max-time is over; the state is saved") as caught:
        run(tmp_path / "broken", execution={"max_minutes": 1e-9})
    assert caught.value.exit_code == 75
    assert read_metadata(tmp_path / "broken" / "state" / NAME)["step"] == 1
    assert same(run(tmp_path / "broken").state, run(tmp_path / "unbroken").state)


def test_saving_by_steps_and_by_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    from finectl.artifacts.job import Execution
    from finectl.training import clock as module

    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    by_steps, by_time = Clock(0.0, Execution(save_every=3)), Clock(0.0, Execution(save_minutes=2, max_minutes=5))
    assert [step for step in range(1, 10) if by_steps.is_time_to_save(step)] == [3, 6, 9]
    now[0] = 119.0
    assert not by_time.is_time_to_save(7)
    now[0] = 120.0
    assert by_time.is_time_to_save(7) and not by_time.is_over() and not by_steps.is_over()
    by_time.saved()
    assert not by_time.is_time_to_save(8)
    now[0] = 300.0
    assert by_time.is_over() and by_time.seconds() == 300.0


@pytest.mark.parametrize(
    ("text", "expected"), [("90s", 1.5), ("55m", 55.0), ("3h30m", 210.0), ("1d", 1440.0), ("1h1m1s", 61 + 1 / 60)]
)
def test_lengths_of_time(text: str, expected: float) -> None:
    assert minutes("--max-time", text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "5", "m", "3x", "-3m", "1.5h", "3m2h"])
def test_what_is_no_length_of_time(text: str) -> None:
    with pytest.raises(UsageError, match="no length of time"):
        minutes("--max-time", text)


def test_saving_is_an_option_of_the_command_line(workspace: Path) -> None:
    arguments = ("condense", "--depth", 1, "--steps", 4, "--batch-size", 8)
    ran = run_cli(*arguments, "--save-every", "soon")
    assert ran.code == 2 and "--save-every 'soon'" in ran.err and ran.out == ""
    made = read_manifest(run_cli(*arguments, "--save-every", "10m", "--max-time", "1h").path)
    assert (made.execution["save_every"], made.execution["save_minutes"], made.execution["max_minutes"]) == (0, 10, 60)
    assert made.execution["tf32"] is False and made.execution["world_size"] == 1


def test_events_and_pictures_are_no_part_of_the_digest(workspace: Path, tmp_path: Path) -> None:
    event_file_loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arguments = ("condense", "--depth", 1, "--steps", 4, "--batch-size", 8)
    plain = read_manifest(run_cli(*arguments, "--workspace", tmp_path / "plain").path)
    path = run_cli(*arguments, "--tensorboard", "--sample-every", 2).path
    assert read_manifest(path).digest == plain.digest
    from PIL import Image

    pictures = sorted((path / "previews").iterdir())
    assert [picture.name for picture in pictures] == ["0000002.png", "0000004.png"]
    for picture in pictures:
        with Image.open(picture) as opened:
            assert opened.width > 300 and opened.getextrema()[0] != opened.getextrema()[1]
    events = event_file_loader.EventAccumulator(str(path / "tensorboard"))
    events.Reload()
    logged = [(entry["step"], entry["loss"]) for entry in read_log(path / "log.jsonl") if "loss" in entry]
    seen = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in seen] == [step for step, _ in logged]
    assert [value for _, value in seen] == pytest.approx([value for _, value in logged], rel=1e-6)


def test_a_process_that_does_not_lead_logs_nothing(tmp_path: Path) -> None:
    with Log(None, 0, tensorboard=True) as log:
        log.write(1, loss=1.0)
        log.sync()
    assert not list(tmp_path.iterdir())


def test_checkpointing_is_refused_for_what_has_no_blocks() -> None:
    from finectl.training.memory import checkpoint_activations

    with pytest.raises(UsageError, match="not known for Linear"):
        checkpoint_activations(torch.nn.Linear(2, 2))
    net = model()
    checkpoint_activations(net)
    assert isinstance(net, DiT) and set(net.state_dict()) == set(model().state_dict())
    assert len(images()) == 40
