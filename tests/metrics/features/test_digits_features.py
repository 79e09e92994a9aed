"""The bundled digits extractor: its weights, its accuracy, its distances, and the script that makes it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from finectl.data.dataset import load
from finectl.data.images import to_uint8
from finectl.errors import InputError
from finectl.metrics.accuracy import class_accuracy
from finectl.metrics.features import FeatureOptions, train_digits
from finectl.metrics.features.digits import WEIGHTS, DigitsFeatures, describe
from finectl.metrics.features.digits import load as load_extractor
from finectl.metrics.frechet import Gaussian, frechet_distance


def loaded(path: Path = WEIGHTS) -> DigitsFeatures:
    """Return the extractor of a file."""
    options = FeatureOptions()
    return load_extractor(describe(options, path), options, torch.device("cpu"))


def computed(extractor: DigitsFeatures, images: torch.Tensor, output: str = "features") -> torch.Tensor:
    """Return one output for images (N, 1, 8, 8) in [-1, 1]."""
    return extractor.forward(images, [output])[output]


@pytest.fixture(scope="module")
def extractor() -> DigitsFeatures:
    return loaded()


def test_extractors_are_listed_and_described_without_torch() -> None:
    code = (
        "import sys; from finectl.metrics.features import EXTRACTORS, FeatureOptions; "
        "info = EXTRACTORS.load('digits').describe(FeatureOptions()); "
        "print(*EXTRACTORS, info.digest, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    digest = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    assert out.stdout.split() == ["digits", "inception", "clip", "dinov2", "torchvision", digest, "False"]


def test_what_it_says_of_itself(extractor: DigitsFeatures) -> None:
    info = extractor.info
    assert (info.name, info.resize, info.path) == ("digits", "none", str(WEIGHTS))
    assert extractor.outputs == {"features": 64, "logits": 10}
    assert extractor.batch_size == 512


def test_heldout_accuracy_is_the_recorded_one(extractor: DigitsFeatures) -> None:
    data = load("digits", "heldout")
    accuracy = class_accuracy(computed(extractor, data.images, "logits"), data.labels)
    assert accuracy.value > 0.97
    assert accuracy.value == pytest.approx(extractor.metadata["accuracy"], abs=1.5 / accuracy.details["n"])


def test_weights_record_their_training(extractor: DigitsFeatures) -> None:
    info = load("digits").info
    assert extractor.metadata["data_fingerprint"] == info.fingerprint
    assert extractor.metadata["train_count"] == info.train_count
    assert extractor.metadata["command"].startswith("python -m finectl.metrics.features.train_digits")
    assert WEIGHTS.stat().st_size < 300_000
    assert extractor.info.digest == hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()


def test_features_and_logits_come_from_one_pass(extractor: DigitsFeatures) -> None:
    images = load("digits", "heldout").images[:30]
    both = extractor.forward(images, ["logits", "features"])
    assert {name: tuple(values.shape) for name, values in both.items()} == {"features": (30, 64), "logits": (30, 10)}
    for name, values in both.items():
        assert values.dtype == torch.float32 and not values.is_inference() and not values.requires_grad
        alone = extractor.forward(images, {name})
        assert list(alone) == [name] and torch.equal(alone[name], values)


def test_the_place_in_the_batch_changes_nothing(extractor: DigitsFeatures) -> None:
    images = load("digits", "train").images[: extractor.batch_size]
    backwards = computed(extractor, images.flip(0)).flip(0)
    torch.testing.assert_close(computed(extractor, images), backwards, rtol=0, atol=1e-9)


def test_levels_become_the_range_it_was_trained_on(extractor: DigitsFeatures) -> None:
    images = load("digits", "heldout").images[:20]
    levels = to_uint8(images).permute(0, 2, 3, 1).numpy()
    prepared = torch.stack([extractor.prepare(image) for image in levels])
    torch.testing.assert_close(prepared, images, rtol=0, atol=0.5 / 127.5 + 1e-6)
    assert extractor.prepare(levels[0]).shape == (1, 8, 8)


def test_distance_grows_with_the_damage(extractor: DigitsFeatures) -> None:
    reference = Gaussian.of(computed(extractor, load("digits").images))
    heldout = load("digits", "heldout")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(heldout.images.shape, generator=generator)

    def distance(images: torch.Tensor) -> float:
        return frechet_distance(Gaussian.of(computed(extractor, images)), reference)

    by_noise = [distance((heldout.images + sigma * noise).clamp(-1, 1)) for sigma in (0, 0.1, 0.2, 0.4, 0.8)]
    assert by_noise == sorted(by_noise)
    by_classes = [distance(heldout.images[heldout.labels < classes]) for classes in (10, 8, 6, 4, 2)]
    assert by_classes == sorted(by_classes)
    assert distance(noise.clamp(-1, 1)) > 10 * by_noise[0]


@pytest.mark.parametrize("shape", [(16, 16, 1), (8, 8, 3), (8, 8)])
def test_other_shapes_are_refused(extractor: DigitsFeatures, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError) as caught:
        extractor.prepare(np.zeros(shape, np.uint8))
    assert str(shape) in caught.value.what
    assert "(8, 8, 1)" in caught.value.expected


@pytest.mark.parametrize("damage", ["missing", "truncated", "other"])
def test_damaged_weights_are_reported(damage: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "digits.safetensors"
    if damage == "truncated":
        path.write_bytes(WEIGHTS.read_bytes()[:5000])
    elif damage == "other":
        save_file({"conv1.weight": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="cannot be read") as caught:
        loaded(path)
    assert "train_digits" in caught.value.fix


def test_training_is_deterministic_and_its_file_loads(tmp_path: Path) -> None:
    files = [tmp_path / "new" / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "c.safetensors"]
    for file, seed in zip(files, ("3", "3", "4"), strict=True):
        assert train_digits.main(["--out", str(file), "--steps", "3", "--seed", seed]) == 0
    first, second, third = (loaded(file) for file in files)
    assert first.info.digest == second.info.digest != third.info.digest
    assert (first.metadata["steps"], first.metadata["seed"]) == (3, 3)


def test_training_learns(tmp_path: Path) -> None:
    assert train_digits.main(["--out", str(tmp_path / "a"), "--steps", "150"]) == 0
    assert loaded(tmp_path / "a").metadata["accuracy"] > 0.8


def test_training_refuses_no_steps_and_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_digits.main(["--out", str(tmp_path / "a"), "--steps", "0"]) == 2
    assert train_digits.main(["--out", str(tmp_path), "--steps", "1"]) == 4
    assert "cannot be written" in capsys.readouterr().err


ROOT = Path(__file__).resolve().parents[3]
