"""Every control: shape, range and settings; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from finectl.data.controls import CONTROLS, FOLDER, ControlInfo, describe_control, parse_settings
from finectl.data.controls.normal import normals_of
from finectl.data.controls.segmentation import colours
from finectl.data.dataset import load
from finectl.data.images import to_uint8
from finectl.errors import InputError, UsageError

MEASURED = [name for name in CONTROLS if name != FOLDER]


def photos(count: int = 4, size: int = 16) -> torch.Tensor:
    return to_uint8(load("photos", "heldout", size).subset(count, 0).images)


@pytest.fixture(scope="module")
def depth_network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DPT with random weights."""
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    folder = tmp_path_factory.mktemp("depth")
    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[4, 4, 8, 8], fusion_hidden_size=8, is_hybrid=False,
        use_auxiliary_head=False, reassemble_factors=[4, 2, 1, 0.5],
    )  # fmt: skip
    DPTForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessor(size={"height": 32, "width": 32}, keep_aspect_ratio=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classes_network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SegFormer of 7 classes with random weights."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

    folder = tmp_path_factory.mktemp("classes")
    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],
        strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=7,
    )  # fmt: skip
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    SegformerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def networks(depth_network: Path, classes_network: Path) -> dict[str, Path]:
    return {"depth": depth_network, "normal": depth_network, "segmentation": classes_network}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", MEASURED)
def test_a_map_is_bytes_of_the_images_side_and_depends_on_its_image_alone(
    name: str, channels: int, networks: dict[str, Path]
) -> None:
    info = describe_control(name, None, str(networks[name]) if name in networks else None)
    extractor = info.extractor()
    images = photos()[:, :channels]
    maps = extractor(images)
    assert maps.dtype == torch.uint8 and maps.shape == (4, info.channels, 16, 16)
    assert len(maps.unique()) > 1, "the map is the same everywhere"
    assert torch.equal(maps, extractor(images))
    alone = torch.cat([extractor(image[None]) for image in images])
    assert (maps.int() - alone.int()).abs().max() <= 1  # a network rounds by the size of its batch
    assert ControlInfo.from_dict(json.loads(json.dumps(info.to_dict()))) == info


def test_edges_lie_on_the_border_of_a_square_and_settings_move_them() -> None:
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    image[..., 8:24, 8:24] = 200
    edges = describe_control("edge").extractor()(image)
    assert set(edges.unique().tolist()) == {0, 255}
    assert not edges[..., 12:20, 12:20].any() and not edges[..., :5, :].any(), "edges away from the border"
    assert edges[0, 0, 10:22, 6:10].bool().any(1).all()
    faint = torch.zeros_like(image)
    faint[..., 8:24, 8:24] = 5
    assert not describe_control("edge").extractor()(faint).any()
    assert describe_control("edge", "low=0.01,high=0.02").extractor()(faint).any()


def test_a_sketch_draws_dark_lines_white_and_nothing_on_a_flat_image() -> None:
    image = torch.full((1, 1, 32, 32), 220, dtype=torch.uint8)
    extractor = describe_control("sketch").extractor()
    assert not extractor(image).any()
    image[..., 16] = 20
    lines = extractor(image)[0, 0]
    assert lines[:, 16].float().mean() > 150 and lines[:, :10].float().mean() < 10
    image[..., 16] = 190
    faint = extractor(image)[0, 0]
    assert 0 < faint[:, 16].float().mean() < lines[:, 16].float().mean(), "a fainter line is not drawn fainter"


def test_depth_spans_the_range_and_normals_are_those_of_a_slope(depth_network: Path) -> None:
    depth = describe_control("depth", None, str(depth_network)).extractor()(photos())
    assert depth.flatten(1).amin(1).tolist() == [0] * 4 and depth.flatten(1).amax(1).tolist() == [255] * 4
    slope = torch.linspace(0, 1, 16).expand(1, 16, 16)  # nearer to the right: the normal leans to the left
    right = normals_of(slope, relief=15 / 16)[0, :, 8, 8]
    assert right.tolist() == [round((1 - 0.5**0.5) * 127.5), 128, round((1 + 0.5**0.5) * 127.5)]
    assert normals_of(torch.zeros(1, 8, 8), 0.25)[0, :, 3, 3].tolist() == [128, 128, 255]
    down = normals_of(slope.transpose(1, 2), relief=15 / 16)[0, :, 8, 8]
    assert down[0] == 128 and down[1] > 200, "nearer at the bottom: the normal leans up"


def test_the_colours_of_classes_are_distinct_and_the_networks_own(classes_network: Path) -> None:
    assert len(colours(300).unique(dim=0)) == 300
    assert colours(8).tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128], [0, 128, 128], [128, 128, 128]
    ]  # fmt: skip
    found = describe_control("segmentation", None, str(classes_network)).extractor()(photos())
    seen = {tuple(colour) for colour in found.permute(0, 2, 3, 1).reshape(-1, 3).tolist()}
    assert seen <= {tuple(colour) for colour in colours(8)[1:].tolist()} and len(seen) > 1


def test_settings_are_checked_and_part_of_the_digest() -> None:
    plain, other = describe_control("edge"), describe_control("edge", " sigma=2 , low=0.05")
    assert plain.settings == {"sigma": 1.0, "low": 0.1, "high": 0.2}
    assert other.settings == {"sigma": 2.0, "low": 0.05, "high": 0.2} and other.digest != plain.digest
    assert describe_control("edge", "high=0.2").digest == plain.digest
    assert describe_control("sketch").digest != plain.digest
    with pytest.raises(UsageError, match=r"no setting 'sigmas'.*did you mean 'sigma'"):
        describe_control("edge", "sigmas=1")
    for wrong in ("sigma=-1", "sigma=x", "sigma", "sigma=nan"):
        with pytest.raises(UsageError) as refused:
            describe_control("edge", wrong)
        assert "between 0 and 100" in refused.value.expected
    with pytest.raises(UsageError) as refused:
        describe_control("edge", "low=0.5").extractor()
    assert "low at most high" in refused.value.expected
    assert parse_settings("depth", {}, None) == {}


def test_networks_are_asked_for_and_checked(tmp_path: Path, depth_network: Path, classes_network: Path) -> None:
    with pytest.raises(UsageError) as asked:
        describe_control("depth")
    assert "--control-model Intel/dpt-large --download" in asked.value.fix and "huggingface.co" in asked.value.fix
    with pytest.raises(UsageError, match="needs none"):
        describe_control("edge", None, str(depth_network))
    with pytest.raises(InputError, match="there is no network"):
        describe_control("depth", None, str(tmp_path / "nothing"))
    with pytest.raises(InputError, match=r"holds no config\.json"):
        describe_control("depth", None, str(tmp_path))
    with pytest.raises(InputError, match="network is not to be used"):
        describe_control("depth", None, "Intel/dpt-large")
    info = describe_control("depth", None, str(classes_network))
    with pytest.raises(InputError, match="measures something else") as other:
        info.extractor()
    assert "AutoModelForDepthEstimation" in other.value.expected


def test_weights_that_changed_or_are_a_pickle_are_refused(tmp_path: Path, depth_network: Path) -> None:
    for file in depth_network.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    info = describe_control("depth", None, str(tmp_path))
    assert info.digest == describe_control("depth", None, str(depth_network)).digest, "the place counts"
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(InputError, match="not the one that measured"):
        info.extractor()
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="a pickle"):
        describe_control("depth", None, str(tmp_path))
