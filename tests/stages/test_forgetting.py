"""`analyse forgetting`: each analysis against a direct computation, refusals and interruptions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cli.test_bad_input import refused
from PIL import Image
from support import run_cli, whole

from finectl.artifacts.manifest import read_manifest
from finectl.artifacts.store import open_artifact
from finectl.artifacts.tensors import load_tensors
from finectl.data.captions import ALL, captions_of
from finectl.data.dataset import load
from finectl.data.sources import DataOptions
from finectl.diffusion.losses import denoising_loss
from finectl.diffusion.schedule import NoiseSchedule
from finectl.errors import EXIT_INPUT, EXIT_SAVED, EXIT_USAGE
from finectl.metrics.heldout_loss import heldout_loss
from finectl.models.io import load_model, load_weights
from finectl.models.text import describe_text
from finectl.models.unet import condition
from finectl.stages.forgetting import chain, ewc, losses
from finectl.stages.forgetting.config import parse_fractions
from finectl.training.texts import open_table

SHORT = ("--steps", 3, "--batch-size", 8, "--lr", 0.01, "--eval-every", 0)
CHEAP = (
    *("--samples", 12, "--sampling-steps", 4, "--fractions", "0,0.5,1", "--allow-few", "--pictures", 6),
    *("--fisher-images", 3, "--fisher-draws", 2, "--images", 8, "--draws", 4, "--ranges", 4, "--batch-size", 8),
)


@dataclass(frozen=True)
class Pair:
    """theta_0 of the digits 0 to 2, theta of 5 to 7, and models that do not go with them."""

    root: Path
    start: Path
    base: Path
    tuned: Path

    def run(self, *arguments: object) -> Any:
        return run_cli(*arguments, "--workspace", self.root)

    def analyse(self, *arguments: object) -> Any:
        return self.run("analyse", "forgetting", *arguments)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    root = tmp_path_factory.mktemp("forgetting")
    place = ("--workspace", root)
    start = run_cli("init", "--method", "he", "--model", "dit-nano", "--depth", 1, *place).path
    base = run_cli("train", start, *SHORT, "--data", "digits#0,1,2", *place).path
    tuned = run_cli("train", base, *SHORT, "--data", "digits#5,6,7", *place).path
    yield Pair(root, start, base, tuned)


@pytest.fixture(scope="module")
def made(pair: Pair) -> tuple[Path, dict[str, Any], str]:
    ran = pair.analyse(pair.tuned, "--pretrained", pair.base, *CHEAP)
    return ran.path, json.loads((ran.path / "metrics.json").read_text()), ran.err


def test_all_analyses_are_made_with_numbers_tables_and_pictures(pair: Pair, made: Any) -> None:
    path, found, _said = made
    assert {"chain", "ewc", "loss"} <= set(found)
    pictures = {file.name for file in (path / "plots").iterdir()}
    assert pictures == {"chain.png", "chain-samples.png", "ewc-by-block.png", "loss-by-timestep.png"}
    assert all((path / "plots" / name).stat().st_size > 2000 for name in pictures)
    text = (path / "tables.md").read_text()
    assert all(words in text for words in ("x handed over", "EWC distance", "Held-out loss", "50 %", "blocks.0"))
    manifest = whole(path).manifest
    assert manifest.stage == "analyse-forgetting" and manifest.kind == "analysis"
    assert [parent.role for parent in manifest.parents] == ["model", "pretrained"]
    assert manifest.metrics["ewc"]["total"] == found["ewc"]["total"]
    assert manifest.metrics["chain"]["x"] == [0.0, 0.5, 1.0]
    again = pair.analyse(pair.tuned, *CHEAP)  # the base is found in the manifest of the model
    assert again.path == path and f"what {pair.tuned} was made from, {pair.base}" in again.err


def test_the_ends_of_the_curve_are_the_two_models_alone(pair: Pair, made: Any) -> None:
    path, found, _ = made
    options = ("--samples", 12, "--sampling-steps", 4, "--batch-size", 8)
    measured = ("--metrics", "frechet", "--samples", 12, "--sampling-steps", 4, "--allow-few")
    points = {point["x"]: point for point in found["chain"]["points"]}
    pictures = load_tensors(path / "samples.safetensors")
    for place, share in enumerate((0.0, 0.5, 1.0)):
        handed = pair.run("sample", pair.tuned, *options, "--handover", pair.base, "--fraction", share).path
        levels = load_tensors(handed / "samples.safetensors")["images"]
        assert torch.equal(pictures[f"{place:03d}"], levels[:6]), share
        row = read_manifest(pair.run("evaluate", handed, *measured).path).metrics["models"][0]
        assert points[share]["value"] == pytest.approx(row["frechet"]["value"], rel=1e-9)
    alone = pair.run("sample", pair.tuned, *options).path
    assert torch.equal(pictures["000"], load_tensors(alone / "samples.safetensors")["images"][:6])
    assert [points[share]["steps"] for share in (0.0, 0.5, 1.0)] == [0, 2, 4]
    assert points[0.0]["first"] is None and points[0.5]["first"] < points[1.0]["first"]
    assert points[0.0]["change"]["value"] == 0 and points[0.0]["change"]["interval"] == pytest.approx([0, 0], abs=1e-9)
    assert points[1.0]["change"]["value"] == pytest.approx(points[1.0]["value"] - points[0.0]["value"], rel=1e-6)
    assert found["chain"]["metric"] == "frechet" and "digits#5,6,7" in found["chain"]["reference"]


def test_steps_that_shares_have_in_common_are_computed_once() -> None:
    calls = []

    def model(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls.append(int(t[0]))
        return x + t[:, None]

    model.config = None  # type: ignore[attr-defined]
    replayed = chain.Replayed(model)
    x, y = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
    for length in (4, 2, 0, 4, 5):
        replayed.rewind()
        answers = [replayed(x, torch.full((2,), step), y) for step in range(length)]
        assert all(torch.equal(answer, x + step) for step, answer in enumerate(answers))
    assert calls == [0, 1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_the_fisher_information_is_the_mean_of_squared_single_gradients(pair: Pair) -> None:
    network = load_model(open_artifact(pair.base)).eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():  # three updates leave most weights, and so most gradients, near 0
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    data = load("digits", "train", 8).subset(3, 0)
    device = torch.device("cpu")
    found = ewc.fisher(network, data, draws=2, seed=5, device=device)
    parameters = {name: value.detach() for name, value in network.named_parameters()}
    schedule = NoiseSchedule.of(network.config, device)

    def loss(weights: Any, x0: Any, t: Any, y: Any, noise: Any) -> Any:
        def model(*inputs: Any) -> Any:
            return torch.func.functional_call(network, weights, inputs)

        return denoising_loss(model, schedule, x0[None], y[None], t[None], noise[None]).sum()

    terms = [ewc.draw(data, place, number, 2, 5, 1000) for number in range(2) for place in range(3)]
    assert [t // 500 for t, _, _ in terms] == [0, 0, 0, 1, 1, 1]  # uniform over all timesteps, together
    t = torch.tensor([term[0] for term in terms])
    noise, x0 = (torch.cat([term[index] for term in terms]) for index in (1, 2))
    assert len({tuple(one.flatten().tolist()) for one in noise}) == 6 and torch.equal(x0[:3], data.images)
    single = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0, 0))
    grads = single(parameters, x0, t, data.labels.repeat(2), noise)
    assert sum(float(value.sum()) for value in found.values()) > 0
    for name, value in found.items():
        wanted = grads[name].double().square().mean(0)
        assert torch.allclose(value, wanted, rtol=1e-3, atol=1e-4 * float(wanted.max())), name
        assert float(wanted.max()) > 1e-9 and not torch.allclose(value, grads[name].double().mean(0).square(), rtol=0.1)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_the_distance_is_the_sum_over_parameters_and_blocks(pair: Pair, made: Any) -> None:
    _, found, _ = made
    theta_0, theta = (load_weights(open_artifact(path), "ema") for path in (pair.base, pair.tuned))
    information = {name: torch.rand(value.shape, dtype=torch.float64) for name, value in theta_0.items()}
    table = "y_embedder.embedding_table.weight"
    whole_table = ewc.label_rows(theta_0, theta, same_labels=True)
    assert whole_table == {table: list(range(11))}
    measured = ewc.distance(information, theta_0, theta, whole_table)
    wanted = sum(
        float((information[name] * (theta[name].double() - theta_0[name].double()).square()).sum()) for name in theta_0
    )
    assert measured["total"] == pytest.approx(wanted, rel=1e-9)
    assert measured["parameters"] == sum(value.numel() for value in theta_0.values())
    assert measured["mean"] == pytest.approx(measured["total"] / measured["parameters"])
    assert measured["total"] == pytest.approx(sum(block["total"] for block in measured["blocks"]))
    assert [block["name"] for block in found["ewc"]["blocks"]][:: len(found["ewc"]["blocks"]) - 1] == [
        "x_embedder",
        "final_layer",
    ]
    assert ewc.distance(information, theta_0, theta_0, whole_table)["total"] == 0
    null = ewc.label_rows(theta_0, theta, same_labels=False)
    assert null == {table: [10]}
    without = ewc.distance(information, theta_0, theta, null)
    rows = information[table][:10] * (theta[table].double() - theta_0[table].double()).square()[:10]
    assert measured["total"] - without["total"] == pytest.approx(float(rows.sum()), rel=1e-6)
    assert found["ewc"]["left_out"] == {table: 10} and found["ewc"]["parameters"] == without["parameters"]


def test_of_tables_of_two_sizes_the_null_rows_are_compared() -> None:
    table = "y_embedder.embedding_table.weight"
    before, after = {table: torch.zeros(4, 2)}, {table: torch.arange(6.0).reshape(3, 2)}
    rows = ewc.label_rows(before, after, same_labels=True)
    found = ewc.distance({table: torch.ones(4, 2, dtype=torch.float64)}, before, after, rows)
    assert rows == {table: [3]} and found["total"] == 4**2 + 5**2 and found["parameters"] == 2


def test_the_distance_of_a_model_to_itself_is_zero(pair: Pair) -> None:
    ran = pair.analyse(pair.base, "--pretrained", pair.base, "--only", "ewc,loss", *CHEAP)
    found = json.loads((ran.path / "metrics.json").read_text())
    assert found["ewc"]["total"] == 0 and found["ewc"]["left_out"] == {}
    assert all(part["difference"]["value"] == 0 for part in found["loss"].values())
    assert "chain" not in found and not (ran.path / "samples.safetensors").exists()


def test_losses_are_those_of_both_models_on_both_domains(pair: Pair, made: Any) -> None:
    _, found, _ = made
    for domain, data, own in (("source", "digits#0,1,2", "pre-trained"), ("target", "digits#5,6,7", "fine-tuned")):
        part = found["loss"][domain]
        held = load(data, "heldout", 8).subset(8, 0)
        networks = {
            "pre-trained": load_model(open_artifact(pair.base)),
            "fine-tuned": load_model(open_artifact(pair.tuned)),
        }
        blind = replace(held, rows=torch.full((len(held.store.labels),), 10))
        means = {name: heldout_loss(network.eval(), blind, draws=4).mean for name, network in networks.items()}
        for name, mean in means.items():
            assert part["models"][name]["value"] == pytest.approx(mean, rel=1e-5)
            assert len(part["models"][name]["ranges"]) == 4
        assert part["difference"]["value"] == pytest.approx(means["fine-tuned"] - means["pre-trained"], abs=1e-6)
        assert part["compared"] == "no class" and list(part["labelled"]) == [own]
        labelled = heldout_loss(networks[own], held, draws=4).mean
        assert part["labelled"][own]["value"] == pytest.approx(labelled, rel=1e-5)
        assert part["data"] == data and part["images"] == 8


def test_a_bank_gives_the_images_of_the_fisher_information(pair: Pair) -> None:
    bank = pair.run("bank", pair.base, "--samples", 5, "--sampling-steps", 2).path
    ran = pair.analyse(pair.tuned, "--pretrained", pair.base, "--bank", bank, "--only", "ewc", *CHEAP)
    found = json.loads((ran.path / "metrics.json").read_text())["ewc"]
    assert found["of"] == "bank" and found["images"] == 3 and found["total"] > 0
    assert [parent.role for parent in read_manifest(ran.path).parents] == ["model", "pretrained", "bank"]
    other = pair.run("bank", pair.tuned, "--samples", 5, "--sampling-steps", 2).path
    refused(
        pair.analyse(pair.tuned, "--pretrained", pair.base, "--bank", other),
        EXIT_INPUT,
        "were made by another model",
        f"finectl bank {pair.base}",
    )


def test_a_wrong_pretrained_model_is_refused(pair: Pair) -> None:
    nano = ("init", "--method", "he", "--model", "dit-nano")
    photos = pair.run(*nano, "--depth", 1, "--data", "photos").path
    ran = pair.analyse(pair.tuned, "--pretrained", photos, *CHEAP)
    refused(ran, EXIT_INPUT, "differ in the shape of the images: 1x8x8 and 3x32x32", "--pretrained MODEL")
    deep = pair.run("train", pair.run(*nano, "--depth", 2).path, *SHORT).path
    ran = pair.analyse(pair.tuned, "--pretrained", deep, *CHEAP)
    refused(ran, EXIT_INPUT, "are of two sizes: depth 1 and 2", "--only chain,loss")
    assert pair.analyse(pair.tuned, "--pretrained", deep, "--only", "loss", *CHEAP).code == 0


def test_refused_options(pair: Pair) -> None:
    two = (pair.tuned, "--pretrained", pair.base)
    refused(pair.analyse(*two, "--only", "chian"), EXIT_USAGE, "did you mean 'chain'?", "chain, ewc, loss")
    refused(pair.analyse(*two, "--fractions", "0,1.2"), EXIT_USAGE, "--fractions '0,1.2'", "from 0 to 1")
    refused(pair.analyse(*two, "--metric", "loss"), EXIT_USAGE, "--metric loss", "frechet")
    refused(pair.analyse(*two, "--metric", "lpips"), EXIT_USAGE, "--metric lpips", "frechet")
    few = pair.analyse(*two, "--only", "chain", "--samples", 3, "--sampling-steps", 2)
    refused(few, EXIT_USAGE, "frechet of 3 images of each share", "--allow-few")
    assert parse_fractions("1,0, 0.5,0.5") == (0.0, 0.5, 1.0)


def test_a_dry_run_counts_without_torch(pair: Pair) -> None:
    from cli.test_startup import modules_after

    arguments = [str(part) for part in (pair.tuned, "--pretrained", pair.base, *CHEAP, "--workspace", pair.root)]
    code = f"from finectl.cli.main import main; main(['analyse', 'forgetting', *{arguments}, '--dry-run', '--json'])"
    assert modules_after(code) == []
    plan = json.loads(pair.analyse(*arguments[:-2], "--dry-run", "--json").out)
    assert plan["chain_network_calls"] == 12 * 4 and plan["chain_pretrained_network_calls"] == 12 * (2 + 4)
    assert plan["fisher_gradients"] == 6 and plan["loss_network_calls"] == 2 * 8 * 4 * 2
    assert plan["source"] == "digits#0,1,2"


def test_what_is_not_made_changes_no_artifact(pair: Pair) -> None:
    def recipe(*options: object) -> str:
        two = ("--pretrained", pair.base, "--dry-run", "--json")
        return json.loads(pair.analyse(pair.tuned, *two, *options).out)["recipe"]

    assert recipe("--only", "ewc") == recipe("--only", "ewc", "--samples", 9, "--fractions", "0,1", "--draws", 3)
    assert recipe("--only", "ewc") != recipe("--only", "ewc", "--fisher-draws", 3)
    assert recipe("--only", "chain") != recipe("--only", "chain", "--samples", 9)


def test_images_that_nothing_measures_are_drawn(pair: Pair) -> None:
    start = pair.run("init", "--method", "he", "--model", "dit-nano", "--depth", 1, "--data", "photos").path
    base = pair.run("train", start, "--steps", 1, "--batch-size", 2, "--eval-every", 0).path
    two = ("--steps", 1, "--batch-size", 2, "--eval-every", 0, "--seed", 1)
    tuned = pair.run("train", base, *two).path
    options = ("--sampling-steps", 2, "--fractions", "0,1", "--pictures", 3)
    ran = pair.analyse(tuned, "--pretrained", base, "--only", "chain", *options)
    found = json.loads((ran.path / "metrics.json").read_text())["chain"]
    assert found["metric"] is None and "made for digits" in ran.err
    assert load_tensors(ran.path / "samples.safetensors")["001"].shape == (3, 3, 32, 32)
    assert (ran.path / "plots" / "chain-samples.png").stat().st_size > 2000


def test_a_run_goes_on_where_it_was_interrupted(pair: Pair, made: Any) -> None:
    from finectl.stages.forgetting.chain import _Chain

    whole_run = pair.analyse(pair.tuned, "--pretrained", pair.base, *CHEAP, "--seed", 3).path
    spans: list[range] = []
    rows = _Chain.rows

    def interrupted(self: Any, span: range) -> Any:
        if spans:
            self.setting.job.interrupt.requested = True
            self.setting.job.stop_if_requested(lambda: None)
        spans.append(span)
        return rows(self, span)

    out = pair.root / "interrupted"
    command = (pair.tuned, "--pretrained", pair.base, *CHEAP, "--seed", 3, "--out", out)
    with mock.patch.object(_Chain, "rows", interrupted):
        ran = pair.analyse(*command)
    assert ran.code == EXIT_SAVED and [len(span) for span in spans] == [8]
    with mock.patch.object(_Chain, "rows", lambda self, span: (spans.append(span), rows(self, span))[1]):
        path = pair.analyse(*command).path
    assert [span.start for span in spans] == [0, 8]  # the first batch was kept
    assert (path / "metrics.json").read_bytes() == (whole_run / "metrics.json").read_bytes()


@pytest.fixture(scope="module")
def of_text(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A model of the captions of the digits 0 to 2, and what it became on those of 5 to 7."""
    root = tmp_path_factory.mktemp("forgetting-text")
    place = ("--workspace", root)
    start = run_cli("init", "--method", "he", "--model", "unet-text-nano", "--text-encoder", "hash", *place).path
    base = run_cli("train", start, *SHORT, "--data", "digits#0,1,2", *place).path
    tuned = run_cli("train", base, *SHORT, "--data", "digits#5,6,7", *place).path
    return Pair(root, start, base, tuned)


def test_models_of_text_are_compared_with_the_captions_of_each_domain(of_text: Pair) -> None:
    ran = of_text.analyse(of_text.tuned, "--pretrained", of_text.base, *CHEAP)
    found = json.loads((ran.path / "metrics.json").read_text())
    alone = of_text.run("sample", of_text.tuned, "--samples", 12, "--sampling-steps", 4, "--batch-size", 8).path
    pictures = load_tensors(ran.path / "samples.safetensors")
    assert torch.equal(pictures["000"], load_tensors(alone / "samples.safetensors")["images"][:6])
    assert not torch.equal(pictures["002"], pictures["000"]) and found["chain"]["points"][0]["value"] > 0
    for domain, digits in (("source", "0,1,2"), ("target", "5,6,7")):
        part = found["loss"][domain]
        assert part["compared"] == "captions" and part["labelled"] == {}
        model, options = load_model(open_artifact(of_text.base)), DataOptions(captions=ALL)
        held = load(f"digits#{digits}", "heldout", 8, options)
        texts = captions_of(held.info, options, held.store.labels.tolist())
        table = open_table(texts, describe_text("hash", 64), torch.device("cpu"))
        condition(model, table, 0.0)
        held = replace(held, rows=table.rows_of(texts)).subset(8, 0)
        measured = heldout_loss(
            model.eval(), held, draws=4, seed=0, batch_size=8, device=torch.device("cpu"),
            diffusion=model.config.diffusion,
        )  # fmt: skip
        assert part["models"]["pre-trained"]["value"] == pytest.approx(float(measured.losses.mean()), rel=1e-6)
    assert found["ewc"]["total"] > 0 and found["ewc"]["of"] == "data"
    assert read_manifest(ran.path).config["text_encoder"] == "hash"


def test_each_domain_is_seen_with_its_own_captions(
    of_text: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(10):
        Image.new("L", (8, 8), 20 * index).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(f"a square of grey {index}")
    read: list[set[str]] = []

    def watch(network: Any, images: Any, **how: Any) -> Any:
        read.append({network._texts.texts[row] for row in images.labels.tolist()})
        return heldout_loss(network, images, **how)

    monkeypatch.setattr(losses, "heldout_loss", watch)
    source = ("--source-data", f"folder:{tmp_path}")
    ran = of_text.analyse(of_text.tuned, "--pretrained", of_text.base, *source, "--only", "loss", *CHEAP)
    assert ran.code == 0, ran.err
    for texts, begin in zip(read, ("a square", "a square", "a photo", "a photo"), strict=True):
        assert all(text.startswith(begin) for text in texts), texts


def test_a_bank_of_a_model_of_text_stands_for_no_caption(of_text: Pair) -> None:
    bank = of_text.run("bank", of_text.base, "--samples", 6, "--sampling-steps", 2, "--prompt", "a digit").path
    ran = of_text.analyse(of_text.tuned, "--pretrained", of_text.base, "--bank", bank, "--only", "ewc,loss", *CHEAP)
    found = json.loads((ran.path / "metrics.json").read_text())
    assert found["ewc"]["of"] == "bank" and found["ewc"]["total"] > 0


def test_a_text_encoder_of_models_of_classes_is_refused(pair: Pair) -> None:
    ran = pair.analyse(pair.tuned, "--pretrained", pair.base, "--text-encoder", "hash")
    refused(ran, EXIT_USAGE, "--text-encoder", "not conditioned on text")
