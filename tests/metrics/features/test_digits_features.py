"""The bundled digits extractor: its weights, its accuracy, its distances, and the script that makes it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finectl.data.dataset import load
from finectl.errors import InputError, UsageError
from finectl.metrics.accuracy import class_accuracy
from finectl.metrics.features import EXTRACTORS, train_digits
from finectl.metrics.features.digits import WEIGHTS, DigitsFeatures
from finectl.metrics.frechet import frechet_distance, moments


@pytest.fixture(scope="module")
def extractor() -> DigitsFeatures:
    loaded: DigitsFeatures = EXTRACTORS.load("digits").load()
    return loaded


def test_table_lists_extractors_without_importing_torch() -> None:
    code = (
        "import sys; from finectl.metrics.features import EXTRACTORS; print(list(EXTRACTORS), 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "['digits'] False"


def test_heldout_accuracy_is_the_recorded_one(extractor: DigitsFeatures) -> None:
    data = load("digits", "heldout")
    accuracy = class_accuracy(extractor.logits(data.images), data.labels)
    assert accuracy.value > 0.97
    assert accuracy.value == pytest.approx(extractor.metadata["accuracy"], abs=1.5 / accuracy.count)


def test_weights_record_their_training(extractor: DigitsFeatures) -> None:
    info = load("digits").info
    assert extractor.metadata["data_fingerprint"] == info.fingerprint
    assert extractor.metadata["train_count"] == info.train_count
    assert extractor.metadata["command"].startswith("python -m finectl.metrics.features.train_digits")
    assert WEIGHTS.stat().st_size < 300_000
    assert extractor.digest == hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()


def test_features_and_logits_come_from_one_pass(extractor: DigitsFeatures) -> None:
    images = load("digits", "heldout").images[:30]
    features, logits = extractor.extract(images)
    assert tuple(features.shape) == (30, extractor.dim)
    assert tuple(logits.shape) == (30, 10)
    assert features.dtype == logits.dtype == torch.float32
    assert torch.equal(features, extractor.features(images))
    assert torch.equal(logits, extractor.logits(images))
    assert not features.is_inference()
    assert not features.requires_grad


def test_batch_size_changes_rounding_only(extractor: DigitsFeatures) -> None:
    images = load("digits", "heldout").images[:50]
    for one, other in zip(extractor.extract(images), extractor.extract(images, batch_size=7), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_no_images_give_no_features(extractor: DigitsFeatures) -> None:
    features, logits = extractor.extract(torch.empty(0, 1, 8, 8))
    assert (tuple(features.shape), tuple(logits.shape)) == ((0, 64), (0, 10))


def test_distance_grows_with_the_damage(extractor: DigitsFeatures) -> None:
    reference = moments(extractor.features(load("digits").images))
    heldout = load("digits", "heldout")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(heldout.images.shape, generator=generator)

    def distance(images: torch.Tensor) -> float:
        return frechet_distance(*moments(extractor.features(images)), *reference)

    by_noise = [distance((heldout.images + sigma * noise).clamp(-1, 1)) for sigma in (0, 0.1, 0.2, 0.4, 0.8)]
    assert by_noise == sorted(by_noise)
    by_classes = [distance(heldout.images[heldout.labels < classes]) for classes in (10, 8, 6, 4, 2)]
    assert by_classes == sorted(by_classes)
    assert distance(noise.clamp(-1, 1)) > 10 * by_noise[0]


@pytest.mark.parametrize("shape", [(4, 1, 16, 16), (4, 3, 8, 8), (4, 8, 8)])
def test_other_shapes_are_refused(extractor: DigitsFeatures, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError) as caught:
        extractor.extract(torch.zeros(shape))
    assert str(shape) in caught.value.what
    assert "(N, 1, 8, 8)" in caught.value.expected


def test_batch_size_below_one_is_refused(extractor: DigitsFeatures) -> None:
    with pytest.raises(UsageError, match="batch size 0"):
        extractor.extract(torch.zeros(1, 1, 8, 8), batch_size=0)


@pytest.mark.parametrize("damage", ["missing", "truncated", "other"])
def test_damaged_weights_are_reported(damage: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "digits.safetensors"
    if damage == "truncated":
        path.write_bytes(WEIGHTS.read_bytes()[:5000])
    elif damage == "other":
        save_file({"conv1.weight": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="cannot be read") as caught:
        DigitsFeatures.load(path)
    assert "train_digits" in caught.value.fix


def test_training_is_deterministic_and_its_file_loads(tmp_path: Path) -> None:
    files = [tmp_path / "new" / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "c.safetensors"]
    for file, seed in zip(files, ("3", "3", "4"), strict=True):
        assert train_digits.main(["--out", str(file), "--steps", "3", "--seed", seed]) == 0
    first, second, third = (DigitsFeatures.load(file) for file in files)
    assert first.digest == second.digest != third.digest
    assert (first.metadata["steps"], first.metadata["seed"]) == (3, 3)


def test_training_learns(tmp_path: Path) -> None:
    assert train_digits.main(["--out", str(tmp_path / "a"), "--steps", "150"]) == 0
    assert DigitsFeatures.load(tmp_path / "a").metadata["accuracy"] > 0.8


def test_training_refuses_no_steps_and_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_digits.main(["--out", str(tmp_path / "a"), "--steps", "0"]) == 2
    assert train_digits.main(["--out", str(tmp_path), "--steps", "1"]) == 4
    assert "cannot be written" in capsys.readouterr().err


ROOT = Path(__file__).resolve().parents[3]
