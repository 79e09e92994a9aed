"""The Inception extractor beside clean-fid's, on one file of random weights; both read the same images."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from cleanfid.utils import ResizeDataset
from extractor_tools import run_python
from inception_standin import write_standin
from PIL import Image

from finectl.errors import InputError, UsageError
from finectl.metrics.features import EXTRACTORS, FeatureOptions
from finectl.metrics.features.inception import CPU_BATCH, InceptionExtractor, describe, load
from finectl.metrics.features.inception_network import SHAPES, expected_tensors
from finectl.metrics.features.weights import content_digest

CPU = torch.device("cpu")
SIZES = [(33, 57), (64, 64), (299, 299), (427, 640), (1, 1)]
# Differences are largest absolute ones, relative to the standard deviation of all features of the images.
TOLERANCE = 1e-5


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception")
    write_standin(path / "inception-2015-12-05.pt")
    return path


@pytest.fixture(scope="session")
def options(folder: Path) -> FeatureOptions:
    return FeatureOptions(inception=str(folder / "inception-2015-12-05.pt"))


@pytest.fixture(scope="session")
def clean(options: FeatureOptions) -> InceptionExtractor:
    return load(describe(options), options, CPU)


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> Any:
    """Return an image with coarse and fine structure, uint8 (height, width, channels)."""
    draws = np.random.default_rng(seed)
    coarse = draws.integers(0, 256, (4, 5, channels), dtype=np.uint8)
    smooth = [
        np.asarray(Image.fromarray(coarse[..., c]).resize((width, height), Image.BICUBIC)) for c in range(channels)
    ]
    noise = draws.normal(0, 12, (height, width, channels))
    return (np.stack(smooth, -1) + noise).clip(0, 255).astype(np.uint8)


def ours(extractor: InceptionExtractor, images: list[Any], *wanted: str) -> dict[str, torch.Tensor]:
    return extractor.forward(torch.stack([extractor.prepare(image) for image in images]), wanted or ("features",))


def theirs(folder: Path, batches: list[torch.Tensor], inside: bool) -> torch.Tensor:
    network = InceptionV3W(str(folder), download=False, resize_inside=inside)
    with torch.no_grad():
        return torch.cat([network(batch) for batch in batches])


def difference(mine: torch.Tensor, other: torch.Tensor) -> float:
    assert mine.shape == other.shape and float(other.std()) > 0
    return float((mine - other).abs().max() / other.std())


def test_clean_mode_is_clean_fids(clean: InceptionExtractor, folder: Path) -> None:
    images = [picture(*size, seed=number) for number, size in enumerate(SIZES)]
    resize = build_resizer("clean")
    resized = torch.stack([torch.from_numpy(resize(image).transpose(2, 0, 1)) for image in images])
    for image, wanted in zip(images, resized, strict=True):
        assert torch.equal(clean.prepare(image), wanted)
    expected = theirs(folder, [resized], inside=False)
    found = ours(clean, images)["features"]
    assert found.dtype == torch.float32 and found.shape == (len(SIZES), 2048)
    assert not found.is_inference() and not found.requires_grad
    assert difference(found, expected) < TOLERANCE
    assert difference(expected[:1], expected[1:2]) > 100 * TOLERANCE, "images are told apart"


def test_tensorflow_mode_is_clean_fids(options: FeatureOptions, folder: Path) -> None:
    legacy = FeatureOptions(inception=options.inception, resize_mode="legacy_tensorflow")
    extractor = load(describe(legacy), legacy, CPU)
    assert extractor.info.resize == "tensorflow bilinear 299"
    images = [picture(*size, seed=number) for number, size in enumerate(SIZES)]
    raw = [torch.from_numpy(image.transpose(2, 0, 1).copy()).float()[None] for image in images]
    assert difference(ours(extractor, images)["features"], theirs(folder, raw, inside=True)) < TOLERANCE


@pytest.mark.parametrize("mode", ["clean", "legacy_tensorflow"])
def test_decoded_files_as_clean_fid_reads_them(
    mode: str, options: FeatureOptions, folder: Path, tmp_path: Path
) -> None:
    rgba = np.concatenate([picture(40, 60), picture(40, 60, 1, seed=2)], -1)
    saved = {
        "colour.png": Image.fromarray(picture(50, 41)),
        "colour.jpg": Image.fromarray(picture(77, 90, seed=1)),
        "grey.png": Image.fromarray(picture(32, 32, 1)[..., 0]),
        "alpha.png": Image.fromarray(rgba),
    }
    files = [tmp_path / name for name in saved]
    for file, image in zip(files, saved.values(), strict=True):
        image.save(file)
    chosen = FeatureOptions(inception=options.inception, resize_mode=mode)
    extractor = load(describe(chosen), chosen, CPU)
    pixels = []
    for file in files:
        with Image.open(file) as image:
            grey = np.asarray(image)[..., None] if image.mode == "L" else None
            pixels.append(np.asarray(image.convert("RGB")) if grey is None else grey)
    read = ResizeDataset([str(file) for file in files], mode)
    batches = [torch.as_tensor(read[index])[None].float() for index in range(len(files))]
    expected = theirs(folder, batches, inside=mode != "clean")
    assert difference(ours(extractor, pixels)["features"], expected) < TOLERANCE


def test_spatial_features_and_logits(clean: InceptionExtractor, folder: Path) -> None:
    images = [picture(64, 64)]
    network = torch.jit.load(folder / "inception-2015-12-05.pt").eval()
    # A TorchScript module takes no hooks: its parts are called one after another.
    x = (torch.stack([clean.prepare(image) for image in images]) - 128) / 128
    spatial = None
    with torch.no_grad():
        for name, part in network.layers.named_children():
            if name == "mixed_6":
                spatial = part.conv(x)[:, :7].flatten(1)
            x = part(x)
        logits = x.flatten(1) @ network.output.weight.T
    assert spatial is not None
    found = ours(clean, images, "features", "spatial", "logits")
    assert {name: values.shape[1] for name, values in found.items()} == dict(clean.outputs)
    assert difference(found["features"], x.flatten(1)) < TOLERANCE
    assert difference(found["spatial"], spatial) < TOLERANCE
    assert difference(found["logits"], logits) < TOLERANCE
    for name, values in found.items():
        assert torch.equal(ours(clean, images, name)[name], values), f"{name} alone is the same"
        assert list(ours(clean, images, name)) == [name]


def test_spatial_alone_stops_early(clean: InceptionExtractor, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    linear = clean._network._linear

    def counted(name: str, x: torch.Tensor) -> torch.Tensor:
        called.append(name)
        return linear(name, x)

    monkeypatch.setattr(clean._network, "_linear", counted)
    ours(clean, [picture(8, 8)], "spatial")
    assert called[-1] == "mixed_6" and "mixed_5.tower_1.conv_4" in called


def test_grey_is_grey_in_three_channels(clean: InceptionExtractor) -> None:
    grey = picture(30, 20, 1)
    assert torch.equal(clean.prepare(grey), clean.prepare(grey.repeat(3, axis=2)))


def test_features_do_not_depend_on_the_place_in_the_batch(clean: InceptionExtractor) -> None:
    assert clean.batch_size == CPU_BATCH
    few = [clean.prepare(picture(40, 40, seed=seed)) for seed in range(4)]
    batch = torch.stack(few * (CPU_BATCH // 4))
    features = clean.forward(batch, ["features"])["features"]
    for place in range(4, CPU_BATCH):
        assert torch.equal(features[place], features[place % 4])
    other = clean.forward(torch.stack([few[3]] * (CPU_BATCH - 1) + [few[0]]), ["features"])["features"]
    assert torch.equal(other[-1], features[0]) and torch.equal(other[0], features[3])


def test_bfloat16_only_when_asked(options: FeatureOptions, clean: InceptionExtractor) -> None:
    chosen = FeatureOptions(inception=options.inception, dtype="bfloat16")
    extractor = load(describe(chosen), chosen, CPU)
    assert extractor.info.details["dtype"] == "bfloat16" and clean.info.details["dtype"] == "float32"
    images = [picture(64, 64, seed=seed) for seed in range(2)]
    found, exact = (ours(one, images, "features", "logits") for one in (extractor, clean))
    for name in found:
        assert found[name].dtype == torch.float32
        assert TOLERANCE < difference(found[name], exact[name]) < 0.2


def test_what_it_says_of_itself(options: FeatureOptions, clean: InceptionExtractor) -> None:
    info = clean.info
    assert info.name == "inception" and info.resize == "clean bicubic 299"
    assert info.path == options.inception and info.digest == content_digest(Path(info.path))
    assert info.details == {"mode": "clean", "dtype": "float32"}
    assert EXTRACTORS.load("inception").describe(options) == info
    assert len(SHAPES) == 94 and len(expected_tensors()) == 4 * 94 + 1


def test_planning_needs_no_torch(options: FeatureOptions) -> None:
    code = (
        "import sys; from finectl.metrics.features import FeatureOptions; "
        "from finectl.metrics.features.inception import describe; "
        f"describe(FeatureOptions(inception={options.inception!r})); print('torch' in sys.modules)"
    )
    assert run_python(code).strip() == "False"


@pytest.mark.parametrize("bad", [{"resize_mode": "nearest"}, {"dtype": "float16"}])
def test_options_that_are_none(bad: dict[str, str], options: FeatureOptions) -> None:
    with pytest.raises(UsageError, match=next(iter(bad.values()))):
        describe(FeatureOptions(inception=options.inception, **bad))


@pytest.mark.parametrize("damage", ["cut off", "a page", "empty"])
def test_a_damaged_file_is_found_while_planning(damage: str, folder: Path, tmp_path: Path) -> None:
    content = (folder / "inception-2015-12-05.pt").read_bytes()
    path = tmp_path / "inception-2015-12-05.pt"
    path.write_bytes({"cut off": content[: len(content) // 2], "a page": b"<html>404</html>", "empty": b""}[damage])
    with pytest.raises(InputError, match="does not hold the Inception network") as caught:
        describe(FeatureOptions(inception=str(path)))
    assert "inception-2015-12-05.pt, as published" in caught.value.expected
    assert "https://" in caught.value.fix and "--inception" in caught.value.fix


class Small(torch.nn.Module):
    """Has the network's first layer, of another size."""

    def __init__(self) -> None:
        super().__init__()
        self.output = torch.nn.Linear(2048, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(x)


def test_a_file_of_another_network(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    options = FeatureOptions(inception=str(path))
    torch.jit.save(torch.jit.script(Small()), path)
    with pytest.raises(InputError, match=r"output.weight has the shape \(1000, 2048\), not \(1008, 2048\)"):
        load(describe(options), options, CPU)
    torch.save({"x": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="does not hold the Inception network"):
        load(describe(options), options, CPU)
    network = torch.jit.load(folder / "inception-2015-12-05.pt")
    network.layers.mixed_9.conv.var[3] = float("nan")
    torch.jit.save(network, path)
    with pytest.raises(InputError, match=r"layers.mixed_9.conv.var has values that are no numbers"):
        load(describe(options), options, CPU)


def test_a_flipped_bit_is_found(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "flipped.pt"
    shutil.copy(folder / "inception-2015-12-05.pt", path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    options = FeatureOptions(inception=str(path))
    with pytest.raises(InputError, match="does not hold the Inception network"):
        load(describe(options), options, CPU)
