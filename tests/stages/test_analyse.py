"""`analyse`: each analysis against a direct computation, refusals, one artifact a seed, interruptions."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import run_cli
from torch import Tensor

from finectl.adapters.projection import identity_state
from finectl.artifacts.manifest import read_manifest
from finectl.artifacts.store import open_artifact
from finectl.artifacts.tensors import load_tensors
from finectl.data.dataset import load
from finectl.diffusion.losses import denoising_loss
from finectl.diffusion.schedule import NoiseSchedule
from finectl.errors import EXIT_INPUT, EXIT_USAGE
from finectl.metrics.heldout_loss import heldout_loss
from finectl.models.experts import read_experts
from finectl.models.io import build_model, load_weights
from finectl.models.parts import Parts, block_of
from finectl.stages.analyse.activations import activation_changes, outputs_of, spread_timesteps, watching
from finectl.stages.analyse.gradients import gradient_similarity
from finectl.stages.analyse.landscape import grid_axes, plane_of
from finectl.stages.analyse.setting import Setting
from finectl.stages.analyse.vectors import Sums, layer_of, read_vectors

SHORT = ("--steps", 3, "--batch-size", 8, "--lr", 0.01, "--eval-every", 0)
CHEAP = ("--images", 6, "--timesteps", 4, "--grid", 3, "--draws", 2)
ALL = ("norms", "cosines", "gradients", "landscape", "activations")


@dataclass(frozen=True)
class Family:
    """theta_0, the experts of two ranges, with projections, a model merged from them, and one fine-tuned plainly."""

    root: Path
    base: Path
    experts: Path
    merged: Path
    model: Path

    def analyse(self, *arguments: object) -> Any:
        return run_cli("analyse", *arguments, "--workspace", self.root)

    def states(self) -> list[dict[str, Tensor]]:
        """theta_0 with identity projections, and both experts."""
        experts = read_experts(open_artifact(self.experts))
        base = {**identity_state(experts.config), **load_weights(open_artifact(self.base), "ema")}
        return [base, *(load_tensors(file) for file in experts.files)]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    root = tmp_path_factory.mktemp("analyse")
    place = ("--workspace", root)
    start = run_cli("init", "--method", "he", "--model", "dit-nano", "--depth", 2, *place).path
    base = run_cli("train", start, *SHORT, *place).path
    experts = run_cli("finetune-ranges", base, "--ranges", 2, *SHORT, *place).path
    merged = run_cli("merge", experts, "--weights", "0.5,0.25", *place).path
    model = run_cli("train", base, *SHORT, "--seed", 1, *place).path
    yield Family(root, base, experts, merged, model)


@pytest.fixture(scope="module")
def made(family: Family) -> tuple[Path, dict[str, Any], str]:
    ran = family.analyse("--merged", family.merged, *CHEAP)  # the newest experts
    return ran.path, json.loads((ran.path / "metrics.json").read_text()), ran.err


def flat(state: dict[str, Tensor], block: str | None = None) -> Tensor:
    return torch.cat([state[name].double().flatten() for name in sorted(state) if block in (None, block_of(name))])


def test_without_arguments_the_newest_experts_are_taken_and_all_is_made(family: Family, made: Any) -> None:
    path, found, said = made
    assert str(family.experts) in said and str(family.base) in said
    assert set(found) == {"models", *ALL} and found["models"] == ["[0, 500)", "[500, 1000)"]
    pictures = {file.name for file in (path / "plots").iterdir()}
    assert {"norms-by-block.png", "cosines.png", "gradients.png", "landscape.png", "activations.png"} <= pictures
    assert all((path / "plots" / name).stat().st_size > 5000 for name in pictures)
    assert all(name in (path / "tables.md").read_text() for name in ("blocks.0", "theta_0", "merged", "[500, 1000)"))
    manifest = read_manifest(path)
    assert [parent.role for parent in manifest.parents] == ["experts", "merged"]
    assert manifest.metrics["task_vector_cosines"] == found["cosines"]["whole"]


def test_norms_and_cosines_are_those_of_whole_vectors(family: Family, made: Any) -> None:
    _, found, _ = made
    base, *others = family.states()
    for block in (None, "blocks.1", "t_embedder", "projections"):
        tau = torch.stack([flat(other, block) - flat(base, block) for other in others])
        part = found["norms"]["whole" if block is None else "blocks"]
        part = part if block is None else part[block]
        assert part["parameters"] == tau.shape[1]
        assert part["norms"] == pytest.approx(tau.norm(dim=1).tolist(), rel=1e-9)
        assert part["relative"] == pytest.approx((tau.norm(dim=1) / flat(base, block).norm()).tolist(), rel=1e-9)
        wanted = torch.quantile(tau.abs(), torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64), dim=1)
        # half a bin, and a place between two entries of the smaller blocks
        assert torch.allclose(torch.tensor(part["quantiles"], dtype=torch.float64), wanted.T, rtol=0.03, atol=1e-9)
        cosines = found["cosines"]["whole"] if block is None else found["cosines"]["blocks"][block]
        unit = tau / tau.norm(dim=1, keepdim=True)
        assert torch.allclose(torch.tensor(cosines, dtype=torch.float64), unit @ unit.T, atol=1e-9)
    layers = found["norms"]["layers"]
    assert sum(part["parameters"] for part in layers.values()) == found["norms"]["whole"]["parameters"]
    assert {"attn.qkv", "mlp.fc1", "projections", "x_embedder.proj"} <= set(layers)


def test_names_of_layers_and_blocks() -> None:
    assert layer_of("unet.down_blocks.0.resnets.1.conv1.weight") == "resnets.conv1"
    assert layer_of("final_layer.adaLN_modulation.1.bias") == "final_layer.adaLN_modulation"
    assert block_of("unet.down_blocks.1.resnets.0.conv1.weight") == "down_blocks.1"
    assert block_of("unet.mid_block.attentions.0.to_q.weight") == "mid_block"


def setting_of(family: Family, **options: Any) -> Any:
    """Return a setting as a run has it, whose job stops nothing."""
    from finectl.console import Console
    from finectl.data.sources import DataOptions

    config = SimpleNamespace(images=6, batch_size=4, seed=3, timesteps=4, **options)
    job = SimpleNamespace(config=config, console=Console(quiet=True), data=None)
    parts = Parts.of([open_artifact(family.experts)], based=False)

    class Plain(Setting):
        device = torch.device("cpu")  # type: ignore[assignment]

        def images(self, split: str) -> Any:
            return load("digits", split, 8, DataOptions()).subset(6, 3)

        def check(self) -> None:
            pass

    return Plain(job, parts)  # type: ignore[arg-type]


def test_gradients_by_blocks_are_those_kept_whole(family: Family) -> None:
    setting = setting_of(family)
    found = gradient_similarity(setting, memory_bytes=300_000)  # several blocks of parameters
    whole = gradient_similarity(setting)
    assert torch.allclose(torch.tensor(found["cosines"]), torch.tensor(whole["cosines"]), atol=1e-5)
    network, schedule, data = build_model(setting.parts.config), NoiseSchedule.linear(), setting.images("train")
    network.load_state_dict(family.states()[0])
    rows = []
    for index, t in enumerate([124, 374, 624, 874]):
        noise = setting.noise("analyse-gradients", index, tuple(data.images.shape))
        times = torch.full((len(data),), t)
        loss = denoising_loss(network.eval(), schedule, data.images, data.labels, times, noise, bound=False).mean()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))]).double())
    gram = torch.stack(rows) @ torch.stack(rows).T
    norms = gram.diagonal().sqrt()
    cosines = torch.tensor(found["cosines"], dtype=torch.float64)
    assert found["timesteps"] == [124, 374, 624, 874]
    assert torch.allclose(torch.tensor(found["norms"], dtype=torch.float64), norms, rtol=1e-4)
    assert torch.allclose(cosines, gram / norms[:, None] / norms, atol=1e-4)
    assert found["within"] == pytest.approx(float((cosines[0, 1] + cosines[2, 3]) / 2))
    assert found["between"] == pytest.approx(float(cosines[:2, 2:].mean()))


def test_the_landscape_at_the_models_is_their_own_loss(family: Family, made: Any) -> None:
    _, found, _ = made
    landscape = found["landscape"]
    points = {point["name"]: point for point in landscape["points"]}
    held = load("digits", "heldout", 8).subset(6, 0)
    network = build_model(read_experts(open_artifact(family.experts)).config).eval()
    for name, state in zip(("theta_0", "[0, 500)", "[500, 1000)"), family.states(), strict=True):
        network.load_state_dict(state)
        wanted = heldout_loss(network, held, draws=2)
        assert points[name]["loss"] == pytest.approx(wanted.mean, rel=1e-4), name
        early = wanted.losses[wanted.timesteps < 500].double().mean()
        assert points[name]["ranges"][0] == pytest.approx(float(early), rel=1e-4)
    merged = points["merged"]  # made of the two task vectors, so it lies in their plane
    assert merged["inside"] == pytest.approx(1.0, abs=1e-6)
    assert merged["loss"] == pytest.approx(merged["own_loss"], rel=1e-4)
    first, second = points["[0, 500)"]["place"], points["[500, 1000)"]["place"]
    wanted_place = [0.5 * one + 0.25 * two for one, two in zip(first, second, strict=True)]
    assert merged["place"] == pytest.approx(wanted_place, rel=1e-5)
    assert first[1] == 0 and points["theta_0"]["place"] == [0, 0]


def test_grid_points_are_where_their_coordinates_say(family: Family, made: Any) -> None:
    _, found, _ = made
    landscape = found["landscape"]
    base, one, two = map(flat, family.states())
    u = (one - base) / (one - base).norm()
    v = (two - base) - ((two - base) @ u) * u
    v = v / v.norm()
    a, b = landscape["a"][2], landscape["b"][0]
    moved, network = base + a * u + b * v, build_model(read_experts(open_artifact(family.experts)).config).eval()
    state, start = {}, 0
    for name in sorted(family.states()[0]):
        shape = family.states()[0][name].shape
        state[name] = moved[start : start + shape.numel()].float().view(shape)
        start += shape.numel()
    network.load_state_dict(state)
    wanted = heldout_loss(network, load("digits", "heldout", 8).subset(6, 0), draws=2).mean
    assert landscape["loss"][0][2] == pytest.approx(wanted, rel=1e-4)


def test_the_grid_is_square_and_holds_all_points() -> None:
    a, b = grid_axes([[0.0, 0.0], [2.0, 0.0], [0.5, 1.0]], 5)
    assert a[-1] - a[0] == pytest.approx(b[-1] - b[0]) == pytest.approx(2 * 1.6)
    assert a[0] < 0 and a[-1] > 2 and b[0] < 0 and b[-1] > 1


def test_task_vectors_of_one_direction_span_no_plane() -> None:
    from finectl.errors import InputError

    sums = Sums.zero(2)
    sums.gram += [[1.0, 2.0], [2.0, 4.0]]
    with pytest.raises(InputError, match="one direction"):
        plane_of(sums, ("one", "two"))
    with pytest.raises(InputError, match="is 0"):
        plane_of(Sums.zero(2), ("one", "two"))


def test_activations_are_differences_of_outputs_behind_projections(family: Family) -> None:
    setting = setting_of(family)
    found = activation_changes(setting)
    data, config = setting.images("heldout"), setting.parts.config
    base, expert, _ = family.states()
    t = spread_timesteps(0, 500, 6)
    assert t.tolist() == [41, 125, 208, 291, 375, 458]
    noise = setting.noise("analyse-activations", 0, tuple(data.images.shape))
    x_t = NoiseSchedule.linear().add_noise(data.images, noise, t)
    outputs = []
    for state in (base, expert):
        network, seen = setting.network(state), {}
        with torch.no_grad(), watching(outputs_of(network, config), seen):
            network(x_t, t, data.labels)
        projected: list[Tensor] = []
        network.projections["blocks"]["1"].register_forward_hook(lambda m, i, o, kept=projected: kept.append(o))
        with torch.no_grad():
            network(x_t, t, data.labels)
        assert torch.equal(seen["blocks.1"], projected[0].transpose(1, 2))
        outputs.append(projected[0].double())
    change = (outputs[1] - outputs[0]).abs()  # (B, T, C)
    block = found["models"][0]["blocks"]["blocks.1"]
    assert block["channels"] == pytest.approx(change.mean((0, 1)).tolist(), rel=1e-4)
    assert block["positions"] == pytest.approx(change.mean((0, 2)).tolist(), rel=1e-4)
    wanted = change.mean((0, 1)).var(correction=0) / change.mean((0, 2)).var(correction=0)
    assert block["ratio"] == pytest.approx(float(wanted), rel=1e-3)
    assert block["before"] == pytest.approx(float(outputs[0].abs().mean()), rel=1e-4)


def test_the_same_seed_makes_the_same_files(family: Family, made: Any, tmp_path: Path) -> None:
    path, _, _ = made
    again = run_cli(
        "analyse", family.experts, "--merged", family.merged, *CHEAP, "--out", tmp_path / "again",
        "--workspace", family.root,
    ).path  # fmt: skip
    assert read_manifest(again).digest == read_manifest(path).digest
    assert "already there" in family.analyse(family.experts, "--merged", family.merged, *CHEAP).err


def test_what_no_analysis_reads_makes_no_other_artifact(family: Family) -> None:
    one = family.analyse(family.experts, "--only", "cosines").path
    assert family.analyse(family.experts, "--only", "cosines", "--seed", 5, "--grid", 4, "--images", 3).path == one


def test_models_around_a_base(family: Family) -> None:
    options = ("--base", family.base, "--only", "norms,landscape", *CHEAP)
    ran = family.analyse(family.model, family.merged, *options)
    assert ran.code == EXIT_INPUT and "two architectures" in ran.err
    alone = family.analyse(family.model, "--base", family.base, *CHEAP)
    assert "no cosines and no landscape" in alone.err
    found = json.loads((alone.path / "metrics.json").read_text())
    assert set(found) == {"models", "norms", "gradients", "activations"}
    assert found["gradients"]["within"] is None and found["activations"]["models"][0]["range"] == [0, 1000]


@pytest.mark.slow
def test_a_unet_is_looked_at_by_its_own_blocks(tmp_path: Path) -> None:
    place = ("--workspace", tmp_path)
    start = run_cli("init", "--method", "he", "--model", "unet-nano", *place).path
    experts = run_cli("finetune-ranges", start, "--ranges", 2, "--steps", 1, "--batch-size", 4, *place).path
    ran = run_cli("analyse", experts, "--only", "norms,activations", "--images", 2, *place)
    found = json.loads((ran.path / "metrics.json").read_text())
    config = read_experts(open_artifact(experts)).config
    blocks = found["activations"]["models"][1]["blocks"]
    assert set(blocks) == {place.where for place in config.all_places} <= set(found["norms"]["blocks"])
    for where in config.all_places:
        assert len(blocks[where.where]["channels"]) == where.channels
        assert len(blocks[where.where]["positions"]) == where.positions


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--only", "norm"), EXIT_USAGE, "did you mean 'norms'"),
        (("--plane", "0,2"), EXIT_USAGE, "0 [0, 500), 1 [500, 1000)"),
        (("--plane", "1,1"), EXIT_USAGE, "--plane"),
        (("--timesteps", 2000), EXIT_USAGE, "at most the model's 1000"),
        (("--only", "norms", "--merged", "MERGED"), EXIT_USAGE, "landscape"),
        (("--merged", "BASE"), EXIT_INPUT, "finectl merge"),
        (("--data", "photos"), EXIT_INPUT, "images"),
        (("--base", "BASE"), EXIT_INPUT, "kind"),
    ],
)
def test_what_is_wrong_is_refused(family: Family, options: tuple[object, ...], code: int, words: str) -> None:
    given = [{"MERGED": family.merged, "BASE": family.base}.get(str(value), value) for value in options]
    ran = family.analyse(family.experts, *given)
    assert ran.code == code and ran.out == "" and words in ran.err, ran.err


def test_one_model_has_no_pairs(family: Family) -> None:
    ran = family.analyse(family.model, "--base", family.base, "--only", "cosines")
    assert ran.code == EXIT_USAGE and "two models" in ran.err


def test_a_weight_that_is_not_finite_is_named(family: Family, tmp_path: Path) -> None:
    from finectl.artifacts.tensors import save_tensors
    from finectl.errors import ComputationError

    state = family.states()[1]
    state["blocks.0.attn.qkv.weight"][0, 0] = float("nan")
    save_tensors(tmp_path / "bad.safetensors", state)
    parts = Parts.of([open_artifact(family.experts)], based=False)
    with pytest.raises(ComputationError, match=r"blocks\.0\.attn\.qkv\.weight of .*bad"):
        read_vectors(parts, further=[tmp_path / "bad.safetensors"], check=lambda: None)


def test_an_interrupted_run_goes_on_with_the_next_analysis(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    from finectl.stages import analyse as stage

    done: list[str] = []
    real = stage.analyse

    def stopping(name: str, setting: Any, merged: Any) -> dict[str, Any]:
        done.append(name)
        if name == "cosines" and done.count("cosines") == 1:
            os.kill(os.getpid(), 2)
        return real(name, setting, merged)

    monkeypatch.setattr(stage, "analyse", stopping)
    options = (family.experts, "--only", "norms,cosines,activations", "--images", 3)
    stopped = family.analyse(*options)
    assert stopped.code == 75 and "again" in stopped.err, stopped.err
    assert family.analyse(*options).code == 0
    assert done == ["norms", "cosines", "cosines", "activations"]


def test_a_dry_run_says_what_would_be_made(family: Family) -> None:
    ran = family.analyse(family.experts, "--dry-run", "--json", "--grid", 5)
    plan = json.loads(ran.out)
    assert plan["analyses"] == list(ALL) and plan["landscape_points"] == 25 and plan["models"] == 2
