"""Options that change how a run goes and not what comes of it, and those that stop it and let it go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import model, run, same
from PIL import Image
from support import Ran, run_cli, weights, whole

from finectl.artifacts.job import Execution
from finectl.artifacts.manifest import read_manifest
from finectl.artifacts.provenance import machine
from finectl.artifacts.tensors import read_metadata
from finectl.cli.command import minutes
from finectl.diffusion.losses import Noised
from finectl.errors import EXIT_SAVED, EXIT_USAGE, Interrupted, UsageError
from finectl.models.dit import Block, DiT
from finectl.training import loop
from finectl.training import run as training_run
from finectl.training.clock import Clock
from finectl.training.device import Arithmetic
from finectl.training.log import Log, read_log
from finectl.training.memory import checkpoint_activations
from finectl.training.state import NAME
from finectl.training.step import clip_gradients
from finectl.world import World

CPU = torch.device("cpu")
LR = 1e-3  # of 10 steps; a higher one turns rounding in gradients of nearly 0 into real steps
TINY = ("condense", "--depth", 1, "--steps", 6, "--batch-size", 8, "--eval-every", 0)


def differ(one: Any, two: Any) -> float:
    """Return the largest difference of two runs' averages."""
    assert one.ema.keys() == two.ema.keys()
    return max(float((one.ema[name] - two.ema[name]).abs().max()) for name in one.ema)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run without any option."""
    return run(tmp_path_factory.mktemp("plain"), lr=LR)


@pytest.mark.parametrize(
    "execution",
    [
        {"grad_checkpointing": True},
        {"workers": 0},
        {"accumulate": 2},
        {"accumulate": 3},
        {"accumulate": 8, "grad_checkpointing": True},
    ],
)
def test_what_saves_memory_changes_nothing(execution: dict[str, Any], plain: Any, tmp_path: Path) -> None:
    assert differ(run(tmp_path, lr=LR, execution=execution), plain) <= 1e-6


def test_what_is_compared_would_differ(plain: Any, tmp_path: Path) -> None:
    assert differ(run(tmp_path, lr=LR, seed=1), plain) > 1e-4


def test_checkpointing_computes_the_blocks_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = Block.forward

    def watch(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return real(self, *arguments, **options)

    monkeypatch.setattr("finectl.training.loop.training_flops", lambda *arguments: 0)  # it calls blocks to count
    monkeypatch.setattr(Block, "forward", watch)
    run(tmp_path / "1", steps=3)
    once = len(calls)
    run(tmp_path / "2", steps=3, execution={"grad_checkpointing": True})
    assert once == 2 * 3 and len(calls) - once == 2 * once


def test_accumulation_cuts_the_batch_into_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def watch(model: Any, schedule: Any, batch: Noised, *, step: int) -> torch.Tensor:
        sizes.append(len(batch.x0))
        return loop.plain_loss(model, schedule, batch, step=step)

    run(tmp_path, steps=2, loss=watch, execution={"accumulate": 3})
    assert sorted(sizes[:3]) == [2, 3, 3] and len(sizes) == 6


def test_clipping_bounds_the_norm_of_all_gradients_together() -> None:
    parameters = [
        torch.nn.Parameter(torch.zeros(3)),
        torch.nn.Parameter(torch.zeros(2)),
        torch.nn.Parameter(torch.ones(1)),
    ]
    parameters[0].grad, parameters[1].grad = torch.full((3,), 3.0), torch.full((2,), -4.0)
    before = torch.cat([p.grad for p in parameters[:2]])
    clip_gradients(parameters, 0.5)
    after = torch.cat([p.grad for p in parameters[:2]])
    assert float(after.norm()) == pytest.approx(0.5, rel=1e-4)
    torch.testing.assert_close(after / after.norm(), before / before.norm())
    clip_gradients(parameters, 100.0)
    assert torch.equal(torch.cat([p.grad for p in parameters[:2]]), after), "small ones stay as they are"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_optimiser_sees_clipped_gradients(accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def norms(folder: str, largest: float) -> list[float]:
        seen: list[float] = []
        real = training_run.make_optimizer

        def make(*arguments: Any) -> Any:
            optimizer = real(*arguments)

            def look(*_: Any) -> None:
                gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
                seen.append(float(torch.cat(gradients).norm()))

            optimizer.register_step_pre_hook(look)
            return optimizer

        monkeypatch.setattr(training_run, "make_optimizer", make)
        run(tmp_path / folder, clip_grad=largest, steps=4, execution={"accumulate": accumulate})
        monkeypatch.setattr(training_run, "make_optimizer", real)
        return seen

    free = norms("free", 0.0)
    largest = min(free) / 2
    assert len(free) == 4 and norms("clipped", largest) == pytest.approx([largest] * 4, rel=1e-3)
    assert norms("loose", 10 * max(free)) == pytest.approx(free, rel=1e-6)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_compiled_equals_eager(plain: Any, tmp_path: Path) -> None:
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = run(tmp_path, lr=LR, execution={"compile": True}, heldout=lambda net: 0.0)
    assert sum(counters["stats"].values()) > 0, "nothing was compiled"
    assert differ(compiled, plain) <= 1e-5
    assert all("_orig_mod" not in name for name in compiled.state)


def test_the_arithmetic_that_auto_means() -> None:
    assert Arithmetic.of(CPU, "auto").autocast is None and not torch.backends.cuda.matmul.allow_tf32
    assert Arithmetic.of(torch.device("cuda"), "auto").autocast == torch.bfloat16
    assert torch.backends.cuda.matmul.allow_tf32, "what autocast leaves in float32"
    assert Arithmetic.of(CPU, "bfloat16").autocast == torch.bfloat16
    for dtype, tf32 in (("tf32", True), ("float32", False)):
        assert Arithmetic.of(torch.device("cuda"), dtype).autocast is None
        assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is tf32


def test_auto_is_float32_on_a_cpu(plain: Any, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("auto takes the CUDA device of this machine")
    assert same(run(tmp_path / "1", lr=LR, dtype="auto").state, plain.state)
    assert not same(run(tmp_path / "2", lr=LR, dtype="bfloat16").state, plain.state)


def test_the_manifest_says_how_it_ran(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--accumulate", 2, "--workers", 0, "--grad-checkpointing", "--save-every", 2, "--max-time", "2h")
    execution = read_manifest(run_cli(*TINY, *arguments).path).execution
    expected = {
        "accumulate": 2, "workers": 0, "grad_checkpointing": True, "fsdp": False, "compile": False, "save_every": 2,
        "max_minutes": 120.0, "world_size": 1, "threads": 1, "tf32": False, "device": "auto", "dtype": "auto",
    }  # fmt: skip
    assert execution.items() >= expected.items()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for dtype, tf32 in (("tf32", True), ("float32", False)):
        Arithmetic.of(torch.device("cuda"), dtype)
        assert machine(World())["tf32"] is tf32


def test_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("finectl.training.clock.time.monotonic", lambda: now[0])
    by_time = Clock(50.0, Execution(save_minutes=2.0, max_minutes=3.0))
    assert not by_time.is_time_to_save(1) and by_time.seconds() == 50.0
    now[0] += 119
    assert not by_time.is_time_to_save(7) and not by_time.is_over()
    now[0] += 1
    assert by_time.is_time_to_save(7) and by_time.seconds() == 170.0
    by_time.saved()
    assert not by_time.is_time_to_save(8)
    now[0] += 60
    assert by_time.is_over(), "what earlier runs took does not count"
    by_steps = Clock(0.0, Execution(save_every=3, save_minutes=0.0))
    assert [by_steps.is_time_to_save(step) for step in range(1, 7)] == [False, False, True] * 2
    assert not by_steps.is_over()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90s", 1.5), ("10m", 10), ("3h30m", 210), ("1d", 1440), ("1d2h3m30s", 1563.5), ("1h5s", 60 + 5 / 60)],
)
def test_lengths_of_time(text: str, expected: float) -> None:
    assert minutes("--max-time", text) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text", ["", "10", "m", "1.5h", "-5m", "5 m", "30m1h", "5min", "1h ", "soon", "1e3s", "0s", "0h0m"]
)
def test_what_is_no_length_of_time(text: str) -> None:
    with pytest.raises(UsageError, match="--max-time"):
        minutes("--max-time", text)


@pytest.mark.parametrize(
    "option", [("--save-every", "often"), ("--save-every", "0"), ("--save-every", "-1"), ("--max-time", "9")]
)
def test_times_that_are_none_are_usage_errors(option: tuple[str, str], workspace: Path) -> None:
    ran = run_cli(*TINY, *option)
    assert ran.code == EXIT_USAGE and option[0] in ran.err and ran.out == "", ran.err
    assert not workspace.exists()


def saves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list to which the steps at which the state is saved are added."""
    steps: list[int] = []
    real = loop.save_state

    def watch(directory: Path, position: Any, *rest: Any, **options: Any) -> None:
        steps.append(position.step)
        real(directory, position, *rest, **options)

    monkeypatch.setattr(loop, "save_state", watch)
    return steps


def test_the_state_is_saved_as_often_as_asked(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = saves(monkeypatch)
    every = {}
    for text in ("3", "10s", "1h"):
        steps.clear()
        monkeypatch.setattr("finectl.training.clock.time.monotonic", slow_clock(4.0))
        every[text] = weights(run_cli(*TINY, "--save-every", text, "--force").path)
        assert steps == {"3": [0, 3, 6], "10s": [0, 3, 6], "1h": [0]}[text], text
    assert every["3"] == every["10s"] == every["1h"]


def slow_clock(step_s: float) -> Callable[[], float]:
    """Return a clock on which each step takes so long: it moves when a step has been done."""
    state = {"now": 0.0}
    real = training_run.train_step

    def tick() -> float:
        return state["now"]

    def step(*arguments: Any) -> torch.Tensor:
        state["now"] += step_s
        return real(*arguments)

    loop.train_step = step
    return tick


@pytest.fixture(autouse=True)
def _real_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "train_step", loop.train_step)


def test_max_time_saves_and_the_same_command_goes_on(
    workspace: Path, fast_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (*TINY, "--max-time", "50s")
    runs: list[Ran] = []
    for reached in (2, 4):
        monkeypatch.setattr("finectl.training.clock.time.monotonic", slow_clock(25.0))
        runs.append(run_cli(*arguments))
        loop.train_step = training_run.train_step
        assert runs[-1].code == EXIT_SAVED and runs[-1].out == ""
        assert "--max-time is over; the state is saved" in runs[-1].err and "run the same command again" in runs[-1].err
        (state,) = workspace.glob(f"*/.*.partial/state/{NAME}")
        assert read_metadata(state)["step"] == reached
    monkeypatch.setattr("finectl.training.clock.time.monotonic", slow_clock(25.0))
    done = run_cli(*arguments)
    assert "step=4 steps=6" in done.err, "the last step is the end, and no reason to leave"
    assert read_manifest(done.path).cost["wall_s"] == 150.0, "all runs together"
    monkeypatch.undo()
    assert weights(whole(done.path).path) == weights(run_cli(*TINY, "--workspace", fast_disk / "unbroken").path)
    steps = [entry["step"] for entry in read_log(done.path / "log.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6]


def events_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard reads."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = accumulator.EventAccumulator(str(folder))
    reader.Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def logged(path: Path, name: str) -> list[tuple[int, float]]:
    return [(entry["step"], pytest.approx(entry[name])) for entry in read_log(path) if name in entry]


def test_tensorboard_shows_what_the_log_holds(workspace: Path) -> None:
    pytest.importorskip("tensorboard")
    arguments = (*TINY[:-1], 3)
    plain = read_manifest(run_cli(*arguments).path)
    path = run_cli(*arguments, "--tensorboard", "--force").path
    found = events_of(path / "tensorboard")
    assert found["loss"] == logged(path / "log.jsonl", "loss") and len(found["loss"]) == 6
    assert found["heldout_loss"] == logged(path / "log.jsonl", "heldout_loss")
    assert [step for step, _ in found["heldout_loss"]] == [0, 3, 6]
    manifest = read_manifest(whole(path).path)
    assert manifest.digest == plain.digest, "pictures of the training are not what was trained"
    assert any(file.path.startswith("tensorboard/") for file in manifest.files)


@pytest.mark.parametrize("save_every", [0, 2])
def test_events_of_steps_that_are_done_again_are_there_once(save_every: int, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")

    class Crash(Exception):
        """What a power failure is to a process."""

    def crash(*arguments: Any, step: int) -> torch.Tensor:
        if step == 5:
            raise Crash
        return loop.plain_loss(*arguments, step=step)

    with pytest.raises(Crash):
        run(tmp_path, save_every=save_every, loss=crash, execution={"tensorboard": True}, heldout=lambda net: 0.5)
    run(tmp_path, execution={"tensorboard": True}, heldout=lambda net: 0.5)
    found = events_of(tmp_path / "tensorboard")
    assert found["loss"] == logged(tmp_path / "log.jsonl", "loss") and len(found["loss"]) == 10
    assert [step for step, _ in found["heldout_loss"]] == [0, 4, 8, 10]


def test_tensorboard_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="TensorBoard") as caught:
        run(tmp_path, execution={"tensorboard": True})
    assert "finectl[tensorboard]" in caught.value.fix


def test_a_process_that_does_not_lead_logs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Log(None, 3, tensorboard=True) as log:
        log.write(4, loss=1.0)
        log.sync()
    assert list(tmp_path.iterdir()) == []


def test_previews_are_pictures_and_no_part_of_the_digest(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finectl.training.previews.SAMPLING_STEPS", 2)
    plain = read_manifest(run_cli(*TINY).path)
    path = run_cli(*TINY, "--sample-every", 4, "--force").path
    pictures = sorted((path / "previews").iterdir())
    assert [picture.name for picture in pictures] == ["0000004.png", "0000006.png"]
    for picture in pictures:
        with Image.open(picture) as opened:
            opened.load()
            assert opened.format == "PNG" and opened.width > opened.height >= 16
            low, high = opened.convert("L").getextrema()
            assert low < high, "nothing is on it"
    assert pictures[0].read_bytes() != pictures[1].read_bytes()
    manifest = read_manifest(whole(path).path)
    assert manifest.digest == plain.digest and manifest.recipe == plain.recipe
    assert [file.path for file in manifest.files if file.path.startswith("previews/")]


def test_previews_are_of_the_same_noise_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finectl.training.previews.SAMPLING_STEPS", 2)
    run(tmp_path, steps=3, ema=1.0, execution={"sample_every": 1})
    pictures = [path.read_bytes() for path in sorted((tmp_path / "previews").iterdir())]
    assert len(pictures) == 3 and len(set(pictures)) == 1, "the averages do not move, so neither do the pictures"


def test_an_interrupted_run_logs_each_entry_once(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(tmp_path, stop_after=5, heldout=lambda net: 1.0)
    path = tmp_path / "log.jsonl"
    with path.open("a") as log:  # what was written after the state, before the power failed
        log.write('{"step": 6, "loss": 9.0}\n{"step": 7, "lo')
    run(tmp_path, heldout=lambda net: 1.0)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    keys = [(entry["step"], name) for entry in entries for name in ("loss", "heldout_loss") if name in entry]
    assert len(keys) == len(set(keys)) == 10 + 4
    assert all(entry.get("loss") != 9.0 for entry in entries)


def test_what_a_run_was_asked_for_reaches_the_loop(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Execution] = []
    real = loop.prepare

    def watch(job: Any, *rest: Any, **options: Any) -> Any:
        seen.append(job.execution)
        return real(job, *rest, **options)

    monkeypatch.setattr(loop, "prepare", watch)
    run_cli(*TINY, "--save-every", "90s", "--max-time", "1d", "--workers", 5, "--accumulate", 4)
    (found,) = seen
    assert (found.save_every, found.save_minutes, found.max_minutes) == (0, 1.5, 1440.0)
    assert (found.workers, found.accumulate) == (5, 4)


def test_checkpointing_is_refused_for_what_has_no_blocks() -> None:
    with pytest.raises(UsageError, match="not known for Linear"):
        checkpoint_activations(torch.nn.Linear(2, 2))
    net = model()
    checkpoint_activations(net)
    assert isinstance(net, DiT) and set(net.state_dict()) == set(model().state_dict())
