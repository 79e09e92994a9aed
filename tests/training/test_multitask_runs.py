"""Training on timestep clusters: single steps against their definitions, resuming, several processes, `train --mtl`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import CONFIG, images, job, model, same, settings
from ranks import Pair, assert_agree
from support import run_cli, whole

from finectl.artifacts.manifest import read_manifest
from finectl.artifacts.tensors import load_tensors
from finectl.data.order import batch_indices
from finectl.diffusion.config import PREDICTIONS, DiffusionConfig
from finectl.diffusion.losses import denoising_loss
from finectl.diffusion.random import generator_for
from finectl.diffusion.schedule import NoiseSchedule
from finectl.errors import EXIT_USAGE, InputError, Interrupted
from finectl.models.dit import DiT, drop_labels
from finectl.models.presets import DiTConfig, FactorConfig
from finectl.training.batches import Batches
from finectl.training.flops import count_forward, training_flops
from finectl.training.loop import Trained, fit, plain_loss
from finectl.training.multitask import METHODS, make_tasks
from finectl.training.multitask.clusters import Stratified
from finectl.training.multitask.nash import bargaining_solution
from finectl.training.multitask.pcgrad import projected_sum
from finectl.training.multitask.tasks import Tasks
from finectl.training.run import train_step
from finectl.training.state import NAME
from finectl.world import World

DENSE = replace(CONFIG, factorized=None)
SHARED = replace(CONFIG, factorized=FactorConfig(("qkv", "o", "in", "out", "adaln"), 12))
PLAIN = {"lr": 1e-3, "lr_schedule": "constant", "warmup_steps": 0}
TRAIN = ("--steps", 30, "--batch-size", 16, "--warmup-steps", 0, "--lr", 1e-3, "--eval-every", 0)


def train(
    directory: Path,
    method: str,
    stop_after: int = 0,
    clusters: int = 4,
    config: DiTConfig = CONFIG,
    execution: dict[str, Any] | None = None,
    loss: Any = plain_loss,
    **changed: Any,
) -> tuple[Trained, Tasks]:
    tasks = make_tasks(method, clusters, 0)
    trained = fit(
        job(directory, stop_after, **(execution or {})), model(config), images(), settings(**changed),
        timesteps=Stratified(clusters), tasks=tasks, loss=loss,
    )  # fmt: skip
    return trained, tasks


def cluster_losses(net: DiT, step: int, batch_size: int = 8, clusters: int = 4) -> torch.Tensor:
    """Return L_1..L_k of a step's batch."""
    data, schedule = images(), NoiseSchedule.of(net.config)
    random = generator_for("train", 0, 0, step)
    t = Stratified(clusters)(batch_size, schedule, step=step, generator=random)
    noise = torch.randn(batch_size, 1, 8, 8, generator=random)
    indices = batch_indices(len(data), batch_size, step, 0)
    y = drop_labels(data.labels[indices], 10, 0.1, random)
    losses = denoising_loss(net, schedule, data.images[indices], y, t, noise)
    return torch.stack([losses[t * clusters // len(schedule) == cluster].mean() for cluster in range(clusters)])


def direct(net: DiT, method: str, steps: int, clip: float = 0.0) -> torch.Tensor:
    """Train by whole gradient vectors, and return the last s or alpha."""
    parameters = list(net.parameters())
    s, alpha = torch.nn.Parameter(torch.zeros(4)), torch.ones(4, dtype=torch.float64)
    groups = [{"params": parameters, "weight_decay": 0.1}, {"params": [s], "lr": 0.025, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    for step in range(steps):
        losses = cluster_losses(net, step)
        optimizer.zero_grad()
        if method == "ant-uw":
            (0.5 * (torch.exp(-s) * losses / 4 + s)).sum().backward()
        else:
            each = [torch.autograd.grad(loss / 4, parameters, retain_graph=True) for loss in losses]
            vectors = torch.stack([torch.cat([part.flatten() for part in one]) for one in each]).double()
            gram = vectors @ vectors.T
            if method == "ant-nash":
                alpha = bargaining_solution(gram / gram.norm()) if step % 25 == 0 else alpha
                weights = alpha
            else:
                random = generator_for("pcgrad", 0, step)
                weights = projected_sum(gram, [torch.randperm(4, generator=random).tolist() for _ in range(4)])
            sizes = [parameter.numel() for parameter in parameters]
            for parameter, gradient in zip(parameters, (weights @ vectors).float().split(sizes), strict=True):
                parameter.grad = gradient.view_as(parameter)
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
    return s.detach() if method == "ant-uw" else alpha


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_steps_are_those_of_the_definition(method: str, prediction: str, tmp_path: Path) -> None:
    config = replace(DENSE, diffusion=DiffusionConfig(prediction=prediction))
    clip = METHODS[method].clip_grad
    trained, tasks = train(tmp_path, method, config=config, steps=3, clip_grad=clip, **PLAIN)
    net = model(config)
    last = direct(net, method, 3, clip)
    expected = dict(net.named_parameters())
    for name, value in trained.model.named_parameters():
        torch.testing.assert_close(value, expected[name], atol=2e-5, rtol=1e-3)
    for name, value in tasks.state_dict().items():
        torch.testing.assert_close(value.detach(), last.to(value.dtype), atol=1e-5, rtol=1e-4, msg=name)


def test_the_methods_differ_from_plain_training_and_each_other(tmp_path: Path) -> None:
    """Also where the timesteps are the same."""
    plain = fit(job(tmp_path / "none"), model(), images(), settings(), timesteps=Stratified(4)).state
    found = [plain, *(train(tmp_path / method, method)[0].state for method in METHODS)]
    for index, one in enumerate(found):
        assert not any(same(one, other) for other in found[:index])


@pytest.mark.parametrize(("method", "at"), [("ant-uw", 4), ("ant-nash", 7), ("ant-nash", 24), ("pcgrad", 5)])
def test_an_interrupted_run_goes_on_bit_for_bit(method: str, at: int, tmp_path: Path) -> None:
    unbroken, whole_tasks = train(tmp_path / "unbroken", method, steps=29)
    for stop in (at, 2):
        with pytest.raises(Interrupted):
            train(tmp_path / "broken", method, stop_after=stop, steps=29)
    resumed, tasks = train(tmp_path / "broken", method, steps=29)
    assert same(resumed.state, unbroken.state) and same(resumed.ema, unbroken.ema)
    assert same(tasks.state_dict(), whole_tasks.state_dict()) and tasks.metrics() == whole_tasks.metrics()
    assert set(resumed.state) == set(model().state_dict()), "the tasks' own are no weights of the model"


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_not_finite_once_leaves_no_trace(method: str, tmp_path: Path) -> None:
    poisoned = [25]

    def poison(*arguments: Any, step: int) -> torch.Tensor:
        losses = plain_loss(*arguments, step=step)
        return losses * float("nan") if step in poisoned and not poisoned.clear() else losses

    found, tasks = train(tmp_path / "1", method, steps=27, loss=poison)
    expected, others = train(tmp_path / "2", method, steps=27)
    assert not poisoned and same(found.state, expected.state) and same(tasks.state_dict(), others.state_dict())


def test_what_is_saved_of_the_tasks(tmp_path: Path) -> None:
    _, uw = train(tmp_path / "uw", "ant-uw", steps=5)
    with pytest.raises(Interrupted):
        train(tmp_path / "broken", "ant-uw", stop_after=3)
    saved = load_tensors(tmp_path / "broken" / "state" / NAME)
    beside = {name for name in saved if "tasks" in name}
    moments = {f"optimizer/{slot}/tasks/s" for slot in ("exp_avg", "exp_avg_sq", "step")}
    assert beside == {"tasks/s", *moments} and bool(saved["tasks/s"].any())
    assert not any(name.startswith(("model/s", "ema/s")) for name in saved)
    with pytest.raises(InputError, match="timestep clusters"):
        train(tmp_path / "broken", "ant-nash")
    assert len(uw.metrics()["s"]) == 4


def test_alpha_does_not_move_for_25_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []

    def watch(run: Any, step: int) -> torch.Tensor:
        loss = train_step(run, step)
        seen.append(run.tasks.alpha.tolist())
        return loss

    monkeypatch.setattr("finectl.training.loop.train_step", watch)
    train(tmp_path, "ant-nash", steps=52)
    assert seen[0] != [1.0] * 4
    assert seen[:25] == [seen[0]] * 25 and seen[25:50] == [seen[25]] * 25 and seen[50:] == [seen[50]] * 2
    assert len({tuple(seen[step]) for step in (0, 25, 50)}) == 3


@pytest.mark.parametrize("method", METHODS)
def test_parts_change_rounding_only(method: str, tmp_path: Path) -> None:
    whole_batch, tasks = train(tmp_path / "1", method, batch_size=20, **PLAIN)
    for parts in (2, 3):
        found, others = train(tmp_path / str(parts), method, batch_size=20, execution={"accumulate": parts}, **PLAIN)
        worst = max(float((found.ema[name] - value).abs().max()) for name, value in whole_batch.ema.items())
        assert worst <= 2e-5, f"{parts} parts: {worst}"
        for name, value in tasks.state_dict().items():
            torch.testing.assert_close(others.state_dict()[name], value, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("config", [DENSE, SHARED])
def test_counted_operations(config: DiTConfig) -> None:
    """Gradients one by one take no more passes, but products; a model that builds its weights builds them for each."""
    net = model(config)
    batches = Batches(images(), 64, 0, torch.device("cpu"), World(), parts=2)
    weights = sum(parameter.numel() for parameter in net.parameters())
    together, one_cluster = count_forward(config, 32), count_forward(config, 8)
    assert together is not None and one_cluster is not None
    assert (4 * one_cluster == together) is (config is DENSE)
    plain, apart = 3 * 2 * together, 3 * 2 * 4 * one_cluster + 2 * 4 * (4 + 1) * weights

    def counted(steps: int, method: str) -> int | None:
        return training_flops(net, plain_loss, batches, steps, make_tasks(method, 4, 0))

    assert counted(100, "ant-uw") == 100 * plain == training_flops(net, plain_loss, batches, 100)
    assert counted(10, "pcgrad") == 10 * apart
    assert counted(60, "ant-nash") == 57 * plain + 3 * apart


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """Two processes that run one command after another."""
    both = Pair()
    yield both
    both.close()


@pytest.mark.parametrize("execution", [(), ("--fsdp",), ("--accumulate", 2)])
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_and_one_are_the_same_run(
    method: str, execution: tuple[object, ...], pair: Pair, chain: Any, workspace: Path, tmp_path: Path
) -> None:
    arguments = ("train", chain.init, "--mtl", method, *TRAIN[:1], 8, *TRAIN[2:])
    lead, follow = pair(*arguments, *execution, workspace=workspace)
    assert (follow.code, follow.out) == (0, ""), follow.err
    alone = run_cli(*arguments, "--workspace", tmp_path / "one").path
    assert_agree(whole(lead.path).path, alone)
    two, one = read_manifest(lead.path).metrics, read_manifest(alone).metrics
    assert two.keys() == one.keys()
    for name, values in one.items():
        assert two[name] == pytest.approx(values, rel=1e-3), name


def test_parts_that_are_too_small_are_refused(pair: Pair, chain: Any, workspace: Path) -> None:
    arguments = ("train", chain.init, "--mtl", "pcgrad", "--steps", 2, "--batch-size", 8, "--accumulate", 2)
    lead, follow = pair(*arguments, workspace=workspace)
    assert lead.code == follow.code == EXIT_USAGE and "at least 16 images" in lead.err
    fine = pair("train", chain.init, "--mtl", "ant-uw", *arguments[4:], workspace=workspace)
    assert fine[0].code == 0, "a weighted sum needs no part to hold all clusters"


def test_train_says_what_the_weights_became(chain: Any, workspace: Path) -> None:
    found = {}
    for method in METHODS:
        ran = run_cli("train", chain.init, "--mtl", method, *TRAIN)
        manifest = read_manifest(whole(ran.path).path)
        assert f"-t30-{method}-" in ran.path.name
        assert manifest.config["mtl"] == method and manifest.config["clusters"] == 4
        assert manifest.cost["flops"] > 0
        found[method] = manifest
    assert {name: list(manifest.metrics) for name, manifest in found.items()} == {
        "ant-uw": ["s"], "ant-nash": ["alpha"], "pcgrad": []
    }  # fmt: skip
    assert all(len(values) == 4 for manifest in found.values() for values in manifest.metrics.values())
    assert [found[name].config["clip_grad"] for name in METHODS] == [0.0, 1.0, 0.0]
    chosen = run_cli("train", chain.init, "--mtl", "ant-nash", "--clip-grad", 0.5, *TRAIN, "--dry-run", "--json")
    assert json.loads(chosen.out)["config"]["clip_grad"] == 0.5


def test_no_clusters_by_default(chain: Any, workspace: Path) -> None:
    plan = json.loads(run_cli("train", chain.init, *TRAIN, "--dry-run", "--json").out)
    assert plan["config"].items() >= {"mtl": "none", "clusters": None, "clip_grad": 0.0}.items()
    gathering = json.loads(run_cli("train", chain.init, *TRAIN, "--mtl", "pcgrad", "--dry-run", "--json").out)
    assert gathering["memory_bytes"] == plan["memory_bytes"] + 3 * 4 * plan["parameters"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--mtl", "ant-uw", "--batch-size", 130), "128 or 132"),
        (("--mtl", "pcgrad", "--clusters", 5, "--batch-size", 128), "125 or 130"),
        (("--mtl", "ant-nash", "--clusters", 1001, "--batch-size", 1001), "2 to 1,000"),
        (("--clusters", 4), "--mtl only"),
        (("--mtl", "ant-nas"), "ant-nash"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    arguments: tuple[object, ...], said: str, chain: Any, workspace: Path
) -> None:
    for dry in ((), ("--dry-run",)):
        ran = run_cli("train", chain.init, "--steps", 2, *arguments, *dry)
        assert ran.code == EXIT_USAGE and said in ran.err and ran.out == ""
