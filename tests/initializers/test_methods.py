"""What every initialisation method keeps to: one contract over the whole table, each method with each variant."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT, Ran, run_cli, run_count, weights

from finectl.artifacts.files import write_json
from finectl.artifacts.job import Job, Outcome, Plan, Stage
from finectl.artifacts.kinds import KINDS
from finectl.artifacts.manifest import read_manifest
from finectl.artifacts.store import open_artifact
from finectl.console import Console
from finectl.errors import EXIT_INPUT, EXIT_USAGE
from finectl.initializers import METHODS, Method
from finectl.models.dit import DiT
from finectl.models.io import CONFIG, load_model, load_weights, read_dit_config
from finectl.models.presets import DiTConfig, count_parameters, preset
from finectl.models.unet_config import UNET, UNetConfig
from finectl.runner import RunOptions, run_stage

ANCESTOR_DEPTH = 3
DEPTHS = (2, ANCESTOR_DEPTH, 5)
TUNING = ("--tune-steps", 2, "--batch-size", 8, "--tune-samples", 16)
SHORT = ("--steps", 3, "--batch-size", 8, "--lr", 0.01)


@dataclass(frozen=True)
class Case:
    """A method with one of its variants; None for a method that has none."""

    name: str
    variant: str | None

    @property
    def method(self) -> Method:
        return METHODS[self.name]

    @property
    def options(self) -> tuple[object, ...]:
        variant = () if self.variant is None else ("--variant", self.variant)
        return ("--method", self.name, *variant, *(TUNING if self.tunes else ()))

    @property
    def tunes(self) -> bool:
        return self.method.tunes(self.variant)

    def __str__(self) -> str:
        return self.name if self.variant is None else f"{self.name}:{self.variant}"


CASES = [Case(name, variant) for name, method in METHODS.items() for variant in method.variants or (None,)]
USUAL = [Case(name, method.variants[0] if method.variants else None) for name, method in METHODS.items()]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_method = pytest.mark.parametrize("case", USUAL, ids=str)


@dataclass(frozen=True)
class Family:
    """A workspace with an artifact of every kind that a method may start from, all of one depth."""

    root: Path
    sources: dict[str, Path]
    learngenes: dict[str, Path]  # by `condense --method`; "fitted" is that of a dense model
    unet: Path
    stranger: Path  # of a kind that no method starts from

    def source(self, method: Method) -> Path:
        """What the method starts from: where several kinds will do, a dense model."""
        kinds = sorted(method.sources, key=lambda kind: kind != "model")
        return self.of_kind(method, kinds[0])

    def of_kind(self, method: Method, kind: str) -> Path:
        if kind != "learngene":
            return self.sources[kind]
        return self.learngenes["fitted" if method.fitted else method.condensed or "fine"]

    def unsuited(self, method: Method) -> list[Path]:
        """Learngenes of which the method says that they were condensed in another way than it needs."""
        if "learngene" not in method.sources:
            return list(self.learngenes.values())
        wanted = (
            {"fitted"} if method.fitted else {method.condensed, *(["fitted"] if method.condensed == "fine" else [])}
        )
        return [path for name, path in self.learngenes.items() if method.condensed and name not in wanted]

    def init(self, case: Case, *options: object, source: Path | None = None, root: Path | None = None) -> Ran:
        start = source or self.source(case.method)
        return run_cli("init", start, *case.options, *options, "--workspace", root or self.root)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    root = tmp_path_factory.mktemp("family")
    place = ("--workspace", root)
    condensed = run_cli("condense", "--model", "dit-nano", "--depth", ANCESTOR_DEPTH, *SHORT, *place).path
    learngene = run_cli("extract", condensed, *place).path
    started = run_cli("init", learngene, "--method", "fine", "--depth", ANCESTOR_DEPTH, *TUNING, *place).path
    dense = run_cli("train", started, *SHORT, "--keep-every", 1, *place).path
    fitted = run_cli("condense", "--from", dense, "--cp-iterations", 2, *place).path
    learngenes = {"fine": learngene, "fitted": run_cli("extract", fitted, *place).path}
    for how in sorted({method.condensed for method in METHODS.values()} - {"", *learngenes}):
        other = run_cli("condense", "--method", how, "--model", "dit-nano", "--depth", ANCESTOR_DEPTH, *SHORT, *place)
        learngenes[how] = run_cli("extract", other.path, *place).path
    stranger = run_count(root).artifact
    assert stranger is not None
    yield Family(root, {"model": dense, "condensed": condensed}, learngenes, make_unet(root), stranger.path)


def make_unet(root: Path) -> Path:
    """Publish a model whose config.json says that it is a U-Net."""
    shape = UNetConfig(UNET, {"block_out_channels": [8]}, image_size=8, channels=1, parameters=1)

    def plan(config: Family | None, parents: object) -> Plan[Any]:
        return Plan(config, slug="unet")

    def run(job: Job[Any]) -> Outcome:
        write_json(job.directory / CONFIG, shape.to_dict())
        return Outcome()

    stage: Stage[Any] = Stage("unet", 1, "model", UNetConfig, lambda config: None, plan, run)
    made = run_stage(stage, shape, [], RunOptions(workspace=root), Console(quiet=True)).artifact
    assert made is not None
    return made.path


def nano(depth: int, **other: int) -> DiTConfig:
    shape = {"image_size": 8, "channels": 1, "num_classes": 10, **other}
    return preset("dit-nano", depth=depth, **shape)  # type: ignore[arg-type]


def refused(ran: Ran, *codes: int, words: tuple[str, ...] = ()) -> None:
    """One block on stderr, nothing on stdout and no traceback."""
    assert ran.code in codes, ran.err
    assert ran.out == "" and "Traceback" not in ran.err
    assert len([line for line in ran.err.splitlines() if line.startswith("error: ")]) == 1, ran.err
    for word in words:
        assert word in ran.err, ran.err


def is_model_of(path: Path, config: DiTConfig) -> None:
    """The artifact holds a dense DiT of that architecture: names, shapes, types, finite values, a forward pass."""
    artifact = open_artifact(path)
    assert read_dit_config(artifact) == config
    wanted, found = DiT(config).state_dict(), load_weights(artifact, "raw")
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in wanted.items()}
    for name, value in found.items():
        assert value.dtype == torch.float32 and bool(value.isfinite().all()), name
    for index in range(config.depth):
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            assert bool(found[f"blocks.{index}.{layer}.weight"].any()), f"{layer} of block {index} is zero"
    images = torch.randn(2, config.channels, config.image_size, config.image_size)
    with torch.no_grad():
        output = load_model(artifact).eval()(images, torch.tensor([0, 999]), torch.tensor([0, config.num_classes]))
    assert output.shape == (2, config.out_channels, config.image_size, config.image_size)
    assert bool(output.isfinite().all())


@every_method
def test_a_line_of_the_table_is_complete(case: Case) -> None:
    method = case.method
    module = importlib.import_module(method.target.partition(":")[0])
    assert "arXiv" in (module.__doc__ or "") or "Reference:" in (module.__doc__ or "")
    assert method.reference.strip() and method.help.strip() and "\n" not in method.help
    assert method.sources and set(method.sources) <= set(KINDS)
    assert len(set(method.variants)) == len(method.variants)
    assert callable(METHODS.load(case.name))
    assert f'"{module.__name__}"' in (ROOT / "pyproject.toml").read_text(), "its import contract"


@pytest.mark.parametrize("depth", DEPTHS)
@every_case
def test_it_makes_a_dense_model_of_any_depth(case: Case, depth: int, family: Family) -> None:
    made = family.init(case, "--depth", depth).path
    config = nano(depth)
    is_model_of(made, config)
    manifest = read_manifest(made)
    assert manifest.config["variant"] == case.variant
    metrics = manifest.metrics
    assert metrics["method"] == case.name and metrics["depth"] == depth
    assert metrics["parameters"] == count_parameters(config)["total"]
    blocks, everything = metrics["parameters_transferred"], metrics["parameters_transferred_with_embedders"]
    assert 0 <= blocks <= everything <= metrics["parameters"]
    assert (everything == 0) == case.method.anew, "a method that takes something from its source says how much"
    cost = manifest.cost
    if case.tunes:
        assert cost["steps"] == 2 and cost["samples"] == 16 and cost["wall_s"] > 0
    else:
        assert cost["steps"] == 0


@every_case
def test_the_same_command_gives_the_same_bytes(case: Case, family: Family, tmp_path: Path) -> None:
    made = []
    for place in ("one", "two"):
        torch.manual_seed(len(made))  # the global generator is nobody's source
        made.append(family.init(case, "--depth", DEPTHS[-1], root=tmp_path / place).path)
    assert made[0].name == made[1].name
    assert weights(made[0]) == weights(made[1])


@every_method
def test_the_usual_variant_is_the_first(case: Case, family: Family) -> None:
    unnamed = family.init(Case(case.name, None), "--depth", DEPTHS[0]).path
    assert unnamed == family.init(case, "--depth", DEPTHS[0]).path


@every_method
def test_an_option_that_it_does_not_read_makes_no_other_artifact(case: Case, family: Family) -> None:
    other = family.init(case, "--depth", 2, "--tune-lr", 0.123).path
    assert (other == family.init(case, "--depth", 2).path) == ("tune_lr" not in case.method.options_of(case.variant))


@every_method
def test_variants_differ(case: Case, family: Family) -> None:
    made = [family.init(Case(case.name, variant), "--depth", 2).path for variant in case.method.variants]
    assert len({path.name for path in made}) == len(made)
    assert len({weights(path)["model.safetensors"] for path in made}) == len(made)


@every_method
def test_it_starts_from_every_kind_that_it_says(case: Case, family: Family) -> None:
    for kind in case.method.sources:
        made = family.init(case, "--depth", 2, source=family.of_kind(case.method, kind)).path
        is_model_of(made, nano(2))


@every_method
def test_what_it_cannot_start_from_is_refused(case: Case, family: Family) -> None:
    wrong = [path for kind, path in family.sources.items() if kind not in case.method.sources]
    for source in (*wrong, *family.unsuited(case.method), family.stranger):
        refused(family.init(case, "--depth", 2, source=source), EXIT_INPUT, words=("expected:", "try: ", "finectl "))


@every_method
def test_a_unet_is_refused(case: Case, family: Family) -> None:
    refused(family.init(case, "--depth", 2, source=family.unet), EXIT_INPUT, words=("expected:",))


@every_method
def test_an_unknown_variant_is_refused_with_the_known_ones(case: Case, family: Family) -> None:
    known = ", ".join(case.method.variants) or "no --variant"
    ran = family.init(Case(case.name, "no-such-variant"), "--depth", 2)
    refused(ran, EXIT_USAGE, words=("no-such-variant", f"--method {case.name}", known))


@every_method
def test_another_width_works_or_is_refused(case: Case, family: Family) -> None:
    wider = ("--model", "dit-s", "--depth", 1)
    if case.method.anew:
        ran = run_cli("init", *case.options, *wider, "--workspace", family.root)
        assert ran.code == 0, ran.err
    else:
        ran = family.init(case, *wider)
    if ran.code:  # there may be widths that the method cannot make, and methods that keep their source's
        refused(ran, EXIT_USAGE, words=("dit-s", case.name, "try: "))
        assert case.method.widths == ("--model dit-s does not go with" not in ran.err)
        return
    assert case.method.widths
    is_model_of(ran.path, preset("dit-s", depth=1, image_size=8, channels=1, num_classes=10))


@every_method
def test_a_method_that_takes_nothing_needs_no_source(case: Case, family: Family, tmp_path: Path) -> None:
    options = ("--model", "dit-nano", "--depth", ANCESTOR_DEPTH)
    alone = run_cli("init", *case.options, *options, "--workspace", tmp_path / "empty")
    if not case.method.anew:
        refused(alone, EXIT_USAGE, EXIT_INPUT, words=("try: ",))
        return
    assert weights(alone.path) == weights(family.init(case, "--depth", ANCESTOR_DEPTH).path)


@every_case
def test_images_and_labels_of_other_data(case: Case, family: Family) -> None:
    ran = family.init(case, "--depth", 2, "--data", "photos", "--image-size", 16)
    if ran.code:
        refused(ran, EXIT_USAGE, EXIT_INPUT, words=("expected:",))
        return
    classes = read_dit_config(open_artifact(ran.path)).num_classes
    assert classes != nano(2).num_classes
    is_model_of(ran.path, nano(2, channels=3, image_size=16, num_classes=classes))
