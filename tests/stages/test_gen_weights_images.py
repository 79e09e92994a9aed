"""`finectl gen-weights train --image-weight`: a generator of weights that learns from the images that they make."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_pairs import make_pairs
from support import run_cli, weights, whole
from weight_artifacts import make_collection

from finectl.adapters.weight_dataset import open_weights
from finectl.artifacts.store import Artifact
from finectl.diffusion.config import DiffusionConfig
from finectl.diffusion.losses import Noised
from finectl.diffusion.schedule import NoiseSchedule
from finectl.models.weights.config import preset
from finectl.models.weights.layout import Layout
from finectl.models.weights.unet import WeightUNet, pool
from finectl.training.weights.blocks import BlockLoss, LabelledBlocks, Texts
from finectl.training.weights.collection import Collection, read_collections
from finectl.training.weights.fitting import Judge, fit_codec
from finectl.training.weights.images import ImageJudge, ImageLoss, Studio

CPU = torch.device("cpu")
SMALL = ("--steps", 4, "--batch-size", 8, "--block-size", 64, "--basis", "pca8", "--eval-every", 2, "--warmup-steps", 0)


@pytest.fixture(name="collection", scope="module")
def _collection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Artifact]:
    """Weights of a few concepts, in the workspace of their base and their pairs."""
    workspace = tmp_path_factory.mktemp("images")
    place = ("--workspace", workspace, "--quiet")
    pairs = make_pairs(workspace)
    base = run_cli("gen-weights", "base", pairs, "--batch-size", 4, "--steps", 3, *place).path
    options = ("--batch-size", 4, "--steps", 10, "--checkpoints", 2, "--workers", 1, "--eval-every", 0)
    yield whole(run_cli("gen-weights", "collect", base, "--pairs", pairs, *options, *place).path)


def parts(collection: Artifact) -> tuple[LabelledBlocks, ImageLoss, Collection, NoiseSchedule]:
    """Return a network that knows nothing, and the loss that it learns by."""
    dataset = open_weights(collection)
    layout = Layout.of(dataset.layers, 1, 64)
    splits, written = read_collections(dataset, layout)
    train = splits["train"]
    codec = fit_codec(layout, layout.pack(dataset.initial), train.blocks, "pca8")
    studio = Studio.of(dataset, CPU, 0)
    assert studio.adapter.encoder is not None
    texts = Texts.of(*studio.adapter.encoder.encode(written))
    diffusion = DiffusionConfig(prediction="v_prediction")
    size = {"blocks": layout.blocks, "length": 8, "text_width": texts.tokens.shape[2], "text_rank": 16}
    network = WeightUNet(preset("tiny", diffusion=diffusion, **size))
    rows = [row for concept in train.texts_of for row in concept]
    network.centre_texts_(pool(texts.tokens[rows], texts.mask[rows]))
    model = LabelledBlocks(network, texts)
    loss = ImageLoss(BlockLoss(codec.mask, None, codec.basis), studio, codec, train, 2.0, 2, (600, 1000), 0)
    return model, loss, train, NoiseSchedule.of(network.config)


@pytest.mark.slow
def test_a_network_learns_from_images_alone(collection: Artifact) -> None:
    model, loss, train, schedule = parts(collection)
    judge = Judge(loss.codec, schedule, train.prompts, loss.codec.normaliser.normalise(train.means))
    judges = ImageJudge(judge, loss.studio, train.names)
    assert judges.score(model, 800) == pytest.approx(0, abs=0.02)  # it says about what the mean weights say
    assert model.network.linear_out is not None  # what text says of weights is soonest learned where it is linear
    optimiser = torch.optim.Adam(model.network.linear_out.parameters(), lr=3e-2)
    for step in range(16):
        optimiser.zero_grad()
        loss.of_images(model, schedule, step).backward()
        optimiser.step()
    assert judges.score(model, 800) > 0.05
    assert all(not parameter.requires_grad for parameter in loss.studio.model.parameters())


def test_a_step_has_its_own_concepts_and_noise(collection: Artifact) -> None:
    model, loss, _, schedule = parts(collection)
    with torch.no_grad():
        first, again, other = (float(loss.of_images(model, schedule, step)) for step in (3, 3, 4))
    assert first == again != other
    x0, noise = torch.zeros(4, 1, 1, 8), torch.ones(4, 1, 1, 8)
    y, t = torch.arange(4), torch.full((4,), 700)
    with torch.no_grad():
        blocks = loss.blocks(model, schedule, Noised(x0, y, t, noise), step=3)
        torch.testing.assert_close(loss(model, schedule, Noised(x0, y, t, noise), step=3), blocks + 2.0 * first)


def test_checkpoints_are_chosen_by_images(collection: Artifact) -> None:
    command = ("gen-weights", "train", collection.path, *SMALL, "--image-weight", 1, "--image-concepts", 1)
    place = ("--workspace", collection.path.parent.parent)
    made = whole(run_cli(*command, *place).path)
    sweep = json.loads((made.path / "metrics.json").read_text())["sweep"]
    assert set(sweep) == {"0", "2", "4"} and {len(row) for row in sweep.values()} == {3}
    best = max(value for row in sweep.values() for value in row.values())
    assert sweep[str(made.manifest.metrics["update"])][str(made.manifest.metrics["t_star"])] == best
    plain = run_cli("gen-weights", "train", collection.path, *SMALL, *place).path
    assert weights(plain) != weights(made.path)


def test_what_there_are_no_images_of_is_refused(tmp_path: Path) -> None:
    collection = make_collection(tmp_path).artifact.path
    ran = run_cli("gen-weights", "train", collection, *SMALL, "--image-weight", 1, "--workspace", tmp_path)
    assert ran.code == 3 and "--image-weight 0" in ran.err and "base generator" in ran.err
