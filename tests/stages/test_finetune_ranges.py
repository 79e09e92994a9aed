"""Experts of timestep ranges: one command, array jobs, what comes together, and what it is used for."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support import ROOT, Ran, child_environment, command_line, run_cli, weights, whole

from finectl.artifacts.lineage import trace, whole_cost
from finectl.artifacts.manifest import read_manifest
from finectl.artifacts.store import Workspace, open_artifact
from finectl.artifacts.tensors import load_tensors, read_metadata
from finectl.console import Console
from finectl.errors import EXIT_INPUT, EXIT_SAVED, EXIT_USAGE, FinectlError, InputError
from finectl.models.ensemble import Ensemble
from finectl.models.experts import expert_of, read_experts
from finectl.models.io import load_model, read_config
from finectl.runner import RunOptions, run_stage
from finectl.stages.finetune_ranges import STAGE
from finectl.stages.finetune_ranges.collection import collecting

SHORT = ("--steps", 2, "--batch-size", 8, "--eval-every", 0)
PAPERS = {
    "cifar10": {"p": 0.4, "lr": 2e-4},
    "church": {"p": 0.3, "lr": 5e-5},
    "bedroom": {"p": 0.3, "lr": 5e-5},
    "sd14": {"p": 0.3, "lr": 5e-5, "flip": True},
}


def finetune(*options: object, code: int = 0, **more: Any) -> Ran:
    ran = run_cli("finetune-ranges", *options, **more)
    assert ran.code == code, ran.err
    assert "Traceback" not in ran.err
    return ran


class Made:
    """A workspace with a chain, and four experts of its model."""

    def __init__(self, root: Path, model: Path, experts: Path) -> None:
        self.root, self.model, self.experts = root, model, experts

    @property
    def parts(self) -> list[Path]:
        """The artifacts of the experts, in the order of the ranges."""
        parents = read_manifest(self.experts).parents[1:]
        return [(self.experts / parent.path).resolve() for parent in parents]


@pytest.fixture(scope="session")
def _made(_chain: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    root = tmp_path_factory.mktemp("ranges") / "artifacts"
    shutil.copytree(_chain.root, root, symlinks=True)
    model = root / _chain.model.relative_to(_chain.root)
    yield Made(root, model, finetune(model, *SHORT, "--workspace", root).path)


@pytest.fixture
def made(_made: Made, workspace: Path) -> Made:
    """A workspace of the test's own, to be harmed at will."""
    shutil.copytree(_made.root, workspace, symlinks=True)
    return Made(workspace, *(workspace / path.relative_to(_made.root) for path in (_made.model, _made.experts)))


def test_one_expert_a_range_and_all_together(made: Made) -> None:
    together = whole(made.experts)
    assert together.kind == "experts" and together.manifest.stage == "finetune-ranges"
    base = read_manifest(made.model)
    assert together.manifest.metrics.items() >= {"borders": [0, 250, 500, 750, 1000], "base": base.digest}.items()
    assert [parent.role for parent in together.manifest.parents] == ["base", *["expert"] * 4]
    names = {file.path for file in together.manifest.files}
    assert names == {"config.json"} | {f"experts/{i}/{n}.safetensors" for i in range(4) for n in ("model", "ema")}
    for index, path in enumerate(made.parts):
        expert = whole(path)
        assert expert.kind == "expert" and {parent.role for parent in expert.manifest.parents} == {"base"}
        wanted = {"index": index, "range": [250 * index, 250 * index + 250], "borders": [0, 250, 500, 750, 1000]}
        assert expert.manifest.metrics.items() >= wanted.items()
        assert {file.path for file in expert.manifest.files} == {
            "config.json", "model.safetensors", "ema.safetensors", "log.jsonl",
        }  # fmt: skip
        for name in ("model", "ema"):
            mine, linked = path / f"{name}.safetensors", made.experts / f"experts/{index}/{name}.safetensors"
            assert mine.read_bytes() == linked.read_bytes()
        assert expert.manifest.cost["steps"] == 2 and expert.manifest.cost["flops"] > 0
    assert together.manifest.cost["steps"] == 8
    assert len({weights(path)["model.safetensors"] for path in made.parts}) == 4
    config, start = read_config(together), read_config(open_artifact(made.model))
    assert config.projections == "blocks" and start.projections == "none"
    state = load_tensors(made.experts / "experts/0/model.safetensors")
    projections = [value for name, value in state.items() if name.startswith("projections.")]
    assert len(projections) == config.depth
    for value in projections:  # near the identity, and trained
        assert 0 < float((value - torch.eye(len(value))).abs().max()) < 0.01


def test_links_share_their_bytes(chain: Any) -> None:
    experts = finetune(chain.model, *SHORT, "--ranges", 2).path
    parents = read_manifest(experts).parents[1:]
    for index, parent in enumerate(parents):
        mine, linked = experts / parent.path / "ema.safetensors", experts / f"experts/{index}/ema.safetensors"
        assert mine.stat().st_ino == linked.stat().st_ino


def test_where_links_do_not_reach_files_are_copied(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    before = weights(made.experts)
    monkeypatch.setattr("finectl.stages.finetune_ranges.collection.os.link", refuse)
    assert weights(finetune(made.model, *SHORT, "--collect", "--force").path) == before


def test_run_again_it_is_there_and_without_input_it_takes_the_newest_model(made: Made) -> None:
    again = finetune(*SHORT)
    assert again.path == made.experts and "no INPUT given: taking the newest model" in again.err
    assert "already there" in again.err
    answer = json.loads(finetune(made.model, *SHORT, "--json").out)
    assert answer["path"] == str(made.experts) and answer["kind"] == "experts" and answer["cached"]


def test_a_manifest_is_a_recipe(made: Made) -> None:
    assert finetune("--recipe", made.experts / "manifest.yaml").path.resolve() == made.experts.resolve()
    assert finetune("--recipe", made.parts[1]).path.resolve() == made.experts.resolve()
    two = finetune("--recipe", made.experts, "--ranges", 2, "--dry-run", "--json").out.splitlines()
    assert [json.loads(line)["range"] for line in two] == [[0, 500], [500, 1000]]


def test_an_array_job_makes_what_one_command_makes(made: Made, tmp_path: Path) -> None:
    place = ("--workspace", tmp_path / "other")
    shutil.copytree(made.root / "model", tmp_path / "other" / "model", symlinks=True)
    model = tmp_path / "other" / "model" / made.model.name
    for index in (2, 0, 3):
        ran = finetune(model, *SHORT, "--only", index, *place)
        assert ran.path.parent.name == "expert" and "missing: " in ran.err
    missing = finetune(model, *SHORT, "--collect", *place, code=EXIT_INPUT)
    assert "range 1 is missing" in missing.err and "--only 1" in missing.err and missing.out == ""
    experts = finetune(model, *SHORT, "--only", 1, *place).path
    assert experts.parent.name == "experts" and weights(experts) == weights(made.experts)
    assert experts.name == made.experts.name
    command = read_manifest(tmp_path / "other" / "expert" / made.parts[2].name).command
    assert command.count("--only") == 1 and command[command.index("--only") + 1] == "2"
    assert read_manifest(made.parts[2]).command[-2:] == ["--only", "2"]


def test_the_draws_of_the_ranges_differ_and_each_expert_has_its_own_seed(chain: Any) -> None:
    options = (*SHORT, "--p", 1, "--consistency", 0, "--ranges", 2)
    experts = finetune(chain.model, *options).path
    one, two = (load_tensors(experts / f"experts/{index}/model.safetensors") for index in (0, 1))
    assert any(not torch.equal(one[name], two[name]) for name in one), "with p = 1 the seed alone tells them apart"


def test_without_projections_the_architecture_stays(chain: Any) -> None:
    experts = finetune(chain.model, *SHORT, "--ranges", 1, "--projection", "none", "--consistency", 0).path
    assert (experts / "config.json").read_bytes() == (chain.model / "config.json").read_bytes()
    (expert,) = (experts / parent.path for parent in read_manifest(experts).parents[1:])
    plain = read_manifest(expert).cost["flops"]
    taught = finetune(chain.model, *SHORT, "--ranges", 1, "--projection", "none").path
    assert read_manifest(taught).cost["flops"] == plain * 4 // 3, "the teacher adds one forward pass to three"


def test_a_teacher_refreshed_from_the_expert_and_what_was_made_without_that_option_is_found(made: Made) -> None:
    frozen = read_manifest(made.experts)
    assert frozen.config["teacher"] == "frozen"
    for path in (made.experts, made.parts[0]):  # as a finectl without the option wrote it
        manifest = yaml.safe_load((path / "manifest.yaml").read_text())
        del manifest["config"]["teacher"]
        (path / "manifest.yaml").write_text(yaml.safe_dump(manifest, sort_keys=False))
    assert finetune(made.model, *SHORT, "--teacher", "frozen").path == made.experts
    assert finetune("--recipe", made.experts).path.resolve() == made.experts.resolve()
    short = ("--steps", 5, "--batch-size", 512, "--eval-every", 0, "--ranges", 1)
    ran = [finetune(made.model, *short, "--teacher", teacher).path for teacher in ("frozen", "refreshed")]
    one, two = map(weights, ran)
    assert one != two, "an epoch is 3 batches"
    few = (*short[2:], "--steps", 3)
    one, two = (weights(finetune(made.model, *few, "--teacher", t).path) for t in ("frozen", "refreshed"))
    assert one == two, "the first epoch has the same teacher"


def test_experts_of_another_model_or_of_other_ranges_are_refused(made: Made) -> None:
    config = STAGE.config(**{**read_manifest(made.experts).config})

    def collect(base: Path, *experts: Path) -> None:
        run_stage(collecting(experts), config, [str(base)], RunOptions(workspace=made.root), Console(quiet=True))

    parts = made.parts
    with pytest.raises(InputError, match="from another model"):
        collect(next(path for path in (made.root / "model").glob("dit-*") if path != made.model), *parts)
    with pytest.raises(InputError, match="expert 2 of timesteps 500 to 749 is missing") as missing:
        collect(made.model, parts[0], parts[1], parts[3])
    assert "--only 2" in missing.value.fix
    with pytest.raises(InputError, match=r"of the ranges \[1, 0, 2, 3\]"):
        collect(made.model, parts[1], parts[0], parts[2], parts[3])
    other = finetune(made.model, *SHORT, "--ranges", 2, "--only", 0).path
    with pytest.raises(InputError, match=r"borders \[0, 500, 1000\]"):
        collect(made.model, other, *parts[1:])
    plain = finetune(made.model, *SHORT, "--projection", "none", "--only", 3).path
    with pytest.raises(InputError, match="two architectures: projections blocks and None"):
        collect(made.model, *parts[:3], plain)
    collect(made.model, *parts)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--only", 4), "there is no such range"),
        (("--borders", "0,500"), "rise from 0 to 1000"),
        (("--borders", "0,500,1000", "--ranges", 3), "of 2 ranges"),
        (("--only", 1, "--collect"), "--collect does not go with --only"),
        (("--only", 1, "--out", "somewhere"), "--out does not go with --only"),
        (("--betas", "0.9"), "--betas"),
        (("--teacher", "refreshed", "--consistency", 0), "there is no teacher"),
        (("--p", 1.5), "1.5"),
        (("--ranges", 2000), "2000 ranges"),
        (("--projection", "foldable"), ""),
    ],
)
def test_wrong_options(options: tuple[object, ...], says: str, chain: Any) -> None:
    ran = finetune(chain.model, *SHORT, *options, code=EXIT_USAGE)
    assert says in ran.err and ran.out == "" and not (chain.root / "expert").exists()


def test_unequal_borders(chain: Any) -> None:
    experts = finetune(chain.model, *SHORT, "--borders", "0,100,1000", "--coin", "sample", "--antithetic").path
    assert read_manifest(experts).metrics["borders"] == [0, 100, 1000]


def test_a_dry_run_prints_every_range(chain: Any) -> None:
    ran = finetune(chain.model, *SHORT, "--dry-run", "--json")
    plans = [json.loads(line) for line in ran.out.splitlines()]
    assert [plan["range"] for plan in plans] == [[0, 250], [250, 500], [500, 750], [750, 1000]]
    assert len({plan["path"] for plan in plans}) == 4 and all(plan["step_s"] > 0 for plan in plans)
    assert not (chain.root / "expert").exists()


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_settings(name: str, chain: Any) -> None:
    recipe = ROOT / "recipes" / f"deme-{name}.yaml"
    ran = finetune(chain.model, "--recipe", recipe, "--dry-run", "--json", "--only", 3)
    config = json.loads(ran.out)["config"]
    wanted = {
        "ranges": 4, "borders": "0,250,500,750,1000", "coin": "batch", "consistency": 1.0, "projection": "blocks",
        "steps": 20_000, "batch_size": 64, "betas": "0.95,0.999", "weight_decay": 1e-6, "clip_grad": 1.0,
        "ema": 0.9999, "ema_power": 0.75, "warmup_steps": 0, "lr_schedule": "constant", **PAPERS[name],
    }  # fmt: skip
    assert {key: config[key] for key in wanted} == wanted
    sections = yaml.safe_load(recipe.read_text())
    for stage in set(sections) - {"finetune-ranges", "merge"}:
        source = [chain.model] if stage != "evaluate" else [chain.model, "--metrics", "loss"]
        assert run_cli(stage, *source, "--recipe", recipe, "--dry-run", "--json").code == 0


def test_interrupted_between_its_steps_the_same_command_goes_on(chain: Any) -> None:
    ran = finetune(chain.model, "--steps", 400, "--batch-size", 64, "--ranges", 2, "--max-time", "1s", code=EXIT_SAVED)
    assert ran.out == "" and "run the same command again" in ran.err


def test_killed_at_a_random_step_and_run_again(chain: Any, fast_disk: Path) -> None:
    options = ("--steps", 30, "--batch-size", 8, "--save-every", 2, "--ranges", 2, "--eval-every", 0)
    process = subprocess.Popen(
        command_line("finetune-ranges", chain.model, *options),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=child_environment(),
    )  # fmt: skip
    index, step = random.randrange(2), random.randrange(1, 20)
    deadline_s = time.monotonic() + 180
    while saved_step(chain.root, index) < step:
        assert process.poll() is None and time.monotonic() < deadline_s, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (chain.root / "experts").exists()
    resumed = finetune(chain.model, *options)
    unbroken = finetune(chain.model, *options, "--workspace", fast_disk / "other")
    assert weights(resumed.path) == weights(unbroken.path)
    assert resumed.path.name == unbroken.path.name


def saved_step(root: Path, index: int) -> int:
    for state in root.glob(f"expert/.*-e{index}-*.partial/state/training.safetensors"):
        try:
            return int(read_metadata(state)["step"])
        except FinectlError:  # replaced or published at this very moment
            return 0
    return 0


def test_the_ensemble_asks_the_expert_of_each_timestep(made: Made) -> None:
    artifact = open_artifact(made.experts)
    ensemble: Any = load_model(artifact)
    assert isinstance(ensemble, Ensemble) and ensemble.config == read_config(artifact)
    borders = read_experts(artifact).borders
    at = [0, 249, 250, 499, 500, 749, 750, 999]
    assert [expert_of(t, borders) for t in at] == [0, 0, 1, 1, 2, 2, 3, 3] == [t * 4 // 1000 for t in at]
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(len(at), 1, 8, 8, generator=generator), torch.arange(len(at))
    experts = [load_model(open_artifact(path)).eval() for path in made.parts]
    ensemble.eval()
    with torch.no_grad():
        mixed = ensemble(x, torch.tensor(at), y)
        for row, t in enumerate(at):
            times = torch.full((len(at),), t)
            expected = experts[t // 250](x, times, y)
            assert torch.equal(ensemble(x, times, y), expected)
            assert torch.allclose(mixed[row], expected[row], atol=1e-6)
            others = [experts[i](x, times, y)[row] for i in range(4) if i != t // 250]
            assert all(not torch.allclose(mixed[row], other, atol=1e-7) for other in others)


def test_raw_weights_of_the_ensemble(made: Made) -> None:
    found = read_experts(open_artifact(made.experts), "raw")
    assert [file.name for file in found.files] == ["model.safetensors"] * 4
    ensemble: Any = load_model(open_artifact(made.experts), "raw")
    state = load_tensors(made.parts[2] / "model.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in ensemble.experts[2].state_dict().items())


def test_ensemble_names_experts_by_an_option(made: Made) -> None:
    few = ("--samples", 2, "--sampling-steps", 2)
    samples = run_cli("sample", made.experts, *few).path
    for named in ("latest", made.experts, f"experts/{made.experts.name}"):
        again = run_cli("sample", "--ensemble", named, *few)
        assert again.path.resolve() == samples.resolve() and "already there" in again.err
    assert run_cli("sample", "--ensemble", "-", *few, stdin=f"{made.experts}\n").path.resolve() == samples.resolve()
    measured = ("--metrics", "loss", "--draws", 1)
    table = run_cli("evaluate", made.model, "--ensemble", "latest", *measured).path
    digests = [read_manifest(path).digest for path in (made.model, made.experts)]
    assert [parent.digest for parent in read_manifest(table).parents] == digests
    assert run_cli("evaluate", made.model, made.experts, *measured).path == table
    both = run_cli("sample", made.model, "--ensemble", made.experts)
    assert both.code == EXIT_USAGE and "one of them" in both.err and both.out == ""
    for wrong in (made.model, made.parts[0], "experts/none"):
        ran = run_cli("sample", "--ensemble", wrong)
        assert ran.code == EXIT_INPUT and ran.out == "" and "error: " in ran.err, ran.err


def test_experts_are_sampled_measured_listed_shown_and_verified(made: Made) -> None:
    few = ("--samples", 4, "--sampling-steps", 4, "--scheduler", "ddim")
    together = load_tensors(run_cli("sample", made.experts, *few).path / "samples.safetensors")["images"]
    alone = load_tensors(run_cli("sample", made.parts[0], *few).path / "samples.safetensors")["images"]
    assert together.shape == alone.shape == (4, 1, 8, 8)
    table = run_cli("evaluate", made.experts, made.model, made.parts[3], "--metrics", "loss", "--draws", 4)
    rows = {row["name"]: row for row in json.loads((table.path / "table.json").read_text())["rows"]}
    together_name, alone_name = (path.name.rsplit("-", 1)[0] for path in (made.experts, made.parts[3]))
    base = rows[made.model.name.rsplit("-", 1)[0]]
    assert rows[together_name]["steps"] == base["steps"] + 8 and rows[alone_name]["steps"] == base["steps"] + 2
    assert rows[together_name]["parameters"] > base["parameters"]
    parts = (whole_cost(trace(Workspace(made.root), open_artifact(path))) for path in (made.experts, *made.parts))
    everything, *each = [cost["steps"] for cost in parts if cost is not None]
    assert everything == sum(each) - 3 * (each[0] - 2), "what is told twice is counted once"
    listed = run_cli("ls").out.splitlines()
    assert str(made.experts) in listed and sum("/expert/" in line for line in listed) == 4
    shown = run_cli("show", made.experts).out
    assert shown.count("├── expert/") + shown.count("└── expert/") == 4 and "borders" in shown
    assert run_cli("verify", made.experts, *made.parts).out.count("\n") == 5
    with (made.experts / "experts/1/ema.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert run_cli("verify", made.experts).code == EXIT_INPUT


def test_damaged_experts_are_refused(made: Made) -> None:
    manifest = yaml.safe_load((made.experts / "manifest.yaml").read_text())
    for borders in (None, [0, 1000.0], [0, 500], [0, 250, 500, 750, 900, 1000], "0,1000"):
        manifest["metrics"]["borders"] = borders
        (made.experts / "manifest.yaml").write_text(yaml.safe_dump(manifest))
        ran = run_cli("sample", made.experts, "--samples", 1, "--sampling-steps", 1)
        assert ran.code == EXIT_INPUT and "error: " in ran.err and "Traceback" not in ran.err, ran.err


def test_weighted_training(chain: Any) -> None:
    plain = run_cli("train", chain.init, *SHORT).path
    assert "-t2-" in plain.name
    weighted = run_cli("train", chain.init, *SHORT, "--weighting", "min-snr", "--normalise-weights").path
    assert weights(weighted) != weights(plain) and "min-snr" in weighted.name
    again = run_cli("train", chain.init, *SHORT, "--weighting", "uniform", "--normalise-weights").path
    assert again == plain, "uniform weights are normalised already"
    # These are models of the noise: its error weighs the same everywhere.
    assert weights(run_cli("train", chain.init, *SHORT, "--weighting", "snr").path) == weights(plain)


@pytest.mark.parametrize("projection", ["blocks", "foldable"])
def test_experts_of_a_unet(projection: str, workspace: Path) -> None:
    base = run_cli("init", "--method", "he", "--model", "unet-nano").path
    experts = finetune(base, *SHORT, "--ranges", 2, "--projection", projection).path
    assert read_config(open_artifact(experts)).projections == projection
    start = load_tensors(base / "model.safetensors")
    state = load_tensors(experts / "experts/0/ema.safetensors")
    added = {name: value for name, value in state.items() if name not in start}
    assert set(start) < set(state) and all(name.startswith("projections.") for name in added)
    assert all(value.shape[0] == value.shape[1] and value.shape[2:] == (1, 1) for value in added.values())
    few = ("--samples", 2, "--sampling-steps", 2, "--scheduler", "ddim")
    assert (run_cli("sample", experts, *few).path / "grid.png").is_file()
