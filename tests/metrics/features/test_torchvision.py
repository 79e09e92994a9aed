"""Classifiers of torchvision as extractors, with small networks and random weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from extractor_tools import Harmful, clean_resized, image, run_python
from safetensors.torch import save_file

from finectl.errors import InputError, UsageError
from finectl.metrics.features import FeatureOptions
from finectl.metrics.features import torchvision as extractor_module
from finectl.metrics.features.networks import uninitialised

NET, CLASSES = "shufflenet_v2_x0_5", 7


def network(seed: int = 0, classes: int = CLASSES) -> Any:
    """Return a network with random weights and the statistics of random images."""
    from torchvision import models

    torch.manual_seed(seed)
    net = models.get_model(NET, weights=None, num_classes=classes)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        net.train()(torch.randn(4, 3, 96, 96))
    return net.eval()


def options(path: Path, name: str = NET, dtype: str = "float32") -> FeatureOptions:
    return FeatureOptions(network=name, features_weights=str(path), dtype=dtype)


def load(path: Path, name: str = NET, dtype: str = "float32") -> extractor_module.TorchvisionFeatures:
    chosen = options(path, name, dtype)
    return extractor_module.load(extractor_module.describe(chosen), chosen, torch.device("cpu"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torchvision") / "net.pth"
    torch.save(network().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def extractor(weights: Path) -> extractor_module.TorchvisionFeatures:
    return load(weights)


def test_features_and_logits_are_those_of_the_network(extractor: extractor_module.TorchvisionFeatures) -> None:
    net = network()
    assert extractor.outputs == {"features": 1024, "logits": CLASSES}
    batch = torch.stack([extractor.prepare(image(seed=i)) for i in range(3)])
    found = extractor.forward(batch, ["features", "logits"])
    with torch.no_grad():
        assert torch.allclose(found["logits"], net(batch), atol=1e-6)
        assert torch.allclose(net.fc(found["features"]), net(batch), atol=1e-5)
    assert {name: value.shape for name, value in found.items()} == {"features": (3, 1024), "logits": (3, CLASSES)}
    assert (found["features"][0] - found["features"][1]).norm() > 0.01 * found["features"][0].norm() > 0
    assert set(extractor.forward(batch, ["logits"])) == {"logits"}


@pytest.mark.parametrize("size", [(40, 56), (301, 250), (224, 224)])
def test_images_are_resized_cleanly(extractor: extractor_module.TorchvisionFeatures, size: tuple[int, int]) -> None:
    pixels = image(*size)
    prepared = extractor.prepare(pixels)
    expected = torch.from_numpy(clean_resized(pixels, 224)).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(prepared, (expected - mean.view(3, 1, 1)) / std.view(3, 1, 1), atol=1e-5)
    assert torch.equal(extractor.prepare(pixels[..., :1]), extractor.prepare(pixels[..., :1].repeat(3, 2)))


def test_files_of_any_kind_give_the_same(
    extractor: extractor_module.TorchvisionFeatures, weights: Path, tmp_path: Path
) -> None:
    state = torch.load(weights, weights_only=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "a.safetensors")
    torch.save(
        {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 3}, tmp_path / "b.pt"
    )
    old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    batch = extractor.prepare(image())[None]
    expected = extractor.forward(batch, ["features"])["features"]
    for file in sorted(tmp_path.iterdir()):
        assert torch.equal(load(file).forward(batch, ["features"])["features"], expected), file.name


def test_bfloat16_is_near_and_not_the_same(extractor: extractor_module.TorchvisionFeatures, weights: Path) -> None:
    batch = extractor.prepare(image())[None]
    rough = load(weights, dtype="bfloat16")
    one, two = (each.forward(batch, ["features"])["features"] for each in (extractor, rough))
    assert two.dtype == torch.float32
    assert 1e-5 < (one - two).norm() / one.norm() < 0.1


def test_what_is_described(weights: Path, tmp_path: Path) -> None:
    info = extractor_module.describe(options(weights))
    assert info.name == f"torchvision:{NET}" and info.resize == "clean bicubic 224" and info.path == str(weights)
    assert extractor_module.describe(options(weights, "inception_v3")).resize == "clean bicubic 299"
    torch.save(network(seed=1).state_dict(), tmp_path / "b.pth")
    assert extractor_module.describe(options(tmp_path / "b.pth")).digest != info.digest


def test_sizes_and_means_are_those_of_torchvisions_own_weights() -> None:
    from torchvision import models

    for name in models.list_models(module=models):
        usual = models.get_model_weights(name).DEFAULT.transforms.keywords
        assert extractor_module.SIZES.get(name, extractor_module.USUAL_SIZE) == usual["crop_size"], name
        assert ("mean" in usual) == (name in extractor_module.OF_HALVES), name


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_from_tensorflow_turn_their_input_to_its_range(name: str) -> None:
    from torchvision import models

    with uninitialised():
        state = models.get_model(name, weights=None, num_classes=11, init_weights=False).state_dict()
    built, last = extractor_module.build(name, state, Path("x"))
    assert built.transform_input is True and last.out_features == 11 and not built.training


def test_the_network_of_larger_images_is_built_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models

    asked: list[Any] = []

    def get_model(name: str, **arguments: Any) -> Any:
        asked.append((name, arguments))
        return torch.nn.Sequential(torch.nn.Linear(3, 11))

    monkeypatch.setattr(models, "get_model", get_model)
    state = {"0.weight": torch.ones(11, 3), "0.bias": torch.ones(11)}
    extractor_module.build("vit_h_14", state, Path("x"))
    assert asked == [("vit_h_14", {"weights": None, "image_size": 518})]


def test_an_unknown_network_is_refused_with_the_nearest_name(weights: Path) -> None:
    with pytest.raises(UsageError, match=r"resnet5o.*did you mean 'resnet50'"):
        load(weights, "resnet5o")
    with pytest.raises(UsageError, match="no classifier 'fcn_resnet50'"):
        load(weights, "fcn_resnet50")


def test_a_network_without_a_linear_layer_is_refused(weights: Path) -> None:
    with pytest.raises(InputError, match="squeezenet1_1 does not end in a linear layer"):
        load(weights, "squeezenet1_1")


def test_weights_of_another_network_are_refused_by_name(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(weights, "shufflenet_v2_x1_0")
    assert "conv5.0.weight" in caught.value.what or "stage2" in caught.value.what
    assert "should be" in caught.value.what and "shufflenet_v2_x1_0" in caught.value.what
    state = network().state_dict()
    removed = state.pop("conv1.0.weight")
    torch.save({**state, "other.weight": removed}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"conv1.0.weight is missing; other.weight has no place"):
        load(tmp_path / "a.pth")


def test_old_names_of_densenets_tensors_are_understood() -> None:
    new = extractor_module.OLD_DENSENET.sub(r"\1\2.", "features.denseblock1.denselayer2.norm.1.running_mean")
    assert new == "features.denseblock1.denselayer2.norm1.running_mean"
    assert extractor_module.OLD_DENSENET.sub(r"\1\2.", "features.conv0.weight") == "features.conv0.weight"


def test_a_file_with_code_is_refused_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"x": Harmful()}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="could run code"):
        load(tmp_path / "a.pth")
    assert capsys.readouterr().out == ""


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names no network"):
        extractor_module.describe(FeatureOptions())
    with pytest.raises(InputError, match="no weights of its own") as caught:
        extractor_module.describe(FeatureOptions(network="resnet18"))
    for part in ("--features-weights FILE", "resnet18", "https://pytorch.org", "loss"):
        assert part in caught.value.fix
    with pytest.raises(InputError, match=r"gone.pth is not there"):
        extractor_module.describe(options(tmp_path / "gone.pth"))
    with pytest.raises(InputError, match="is a folder"):
        extractor_module.describe(options(tmp_path))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(InputError, match="holds no weights"):
        extractor_module.describe(options(tmp_path / "text.pth"))
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(InputError, match=r"cut.safetensors") as caught:
        extractor_module.describe(options(tmp_path / "cut.safetensors"))
    assert "--features-weights" in caught.value.fix


def test_weights_that_are_not_numbers_give_features_that_are_not(tmp_path: Path) -> None:
    state = network().state_dict()
    state["conv5.1.bias"][0] = math.nan
    torch.save(state, tmp_path / "a.pth")
    extractor = load(tmp_path / "a.pth")
    found = extractor.forward(extractor.prepare(image())[None], ["features"])["features"]
    assert not found.isfinite().all()


def test_planning_needs_no_torch(weights: Path) -> None:
    code = (
        "import sys; from finectl.metrics.features import FeatureOptions, torchvision as module\n"
        f"info = module.describe(FeatureOptions(network='resnet18', features_weights={str(weights)!r}))\n"
        "print(info.name, [name for name in ('torch', 'torchvision', 'numpy') if name in sys.modules])"
    )
    assert run_python(code).split() == ["torchvision:resnet18", "[]"]
