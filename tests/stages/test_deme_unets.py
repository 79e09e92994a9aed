"""DeMe on the UNets of the papers, from a model to diffusers: one step of each expert, merge, fold, export, reload.

Networks are the papers', weights random. Outputs are compared in two ways. finectl's model and the one that diffusers
loads run the same layers on the same weights: they are equal bit for bit. A folded model and the same one with its
projections as layers are equal up to rounding: to 1e-10 in float64, where the folded weights are kept in float64; as
written, in float32, to 1e-4 of the outputs' size, as each of a hundred layers rounds at 6e-8 and folded weights once
more.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT, run_cli, whole
from torch import Tensor, nn

from finectl.adapters.fold import fold, fold_difference
from finectl.adapters.projection import add_projections, identity_state
from finectl.artifacts.files import write_json
from finectl.artifacts.tensors import load_tensors, save_tensors
from finectl.models.experts import read_experts
from finectl.models.io import build_model, load_any_model, load_weights, read_config, total_parameters
from finectl.models.unet_config import UNetConfig
from finectl.models.unet_presets import unet_preset
from finectl.training.flops import count_forward

EXACT, ROUNDED = 1e-10, 1e-4
WEIGHTS = "0.3,0.8"
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY: dict[str, Any] = {
    "sample_size": 8, "in_channels": 2, "out_channels": 2, "block_out_channels": [8, 16], "layers_per_block": 1,
    "norm_num_groups": 4, "attention_head_dim": 4,
}  # fmt: skip
LABELLED: dict[str, Any] = {
    **TINY, "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "num_class_embeds": 4,
}  # fmt: skip
TEXT: dict[str, Any] = {
    **TINY, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "cross_attention_dim": 12,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip


def loader() -> Any:
    """Return `load_projected` of the README, run exactly as printed there."""
    (code,) = re.findall(r"```python\n(import json\n.*?)```", README, re.S)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    return names["load_projected"]


@pytest.fixture
def roomy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A workspace on the disk, for artifacts that are large and gone after the test."""
    root = tmp_path / "artifacts"
    monkeypatch.setenv("FINECTL_WORKSPACE", str(root))
    yield root
    shutil.rmtree(root)


def experts_of(model: str, projection: str, size: int, batch: int, data: object = "photos") -> tuple[Path, Path]:
    """Return a new model, and experts of two ranges after one update each, which moves every projection visibly."""
    base = run_cli("init", "--method", "he", "--model", model, "--data", data, "--image-size", size).path
    return base, trained(base, projection, batch)


def trained(base: Path, projection: str, batch: int, *data: object) -> Path:
    """Return experts of two ranges after one update each."""
    one = ("--steps", 1, "--batch-size", batch, "--lr", 2e-3, "--eval-every", 0)
    return run_cli("finetune-ranges", base, "--ranges", 2, "--projection", projection, *one, *data).path


@torch.no_grad()
def outputs(network: nn.Module, config: UNetConfig, **more: Any) -> Tensor:
    """Return what a network of diffusers makes of noise."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(1, config.channels, config.image_size, config.image_size, generator=random)
    return network.eval()(x, torch.tensor([600]), **more).sample


def require_trained(base: Path, experts: Path, parameters: int) -> None:
    """Check that the experts have so many parameters, moved from the base and from one another."""
    assert whole(experts).manifest.metrics["parameters"] == parameters
    found = read_experts(whole(experts))
    start = load_tensors(base / "model.safetensors")
    one, two = map(load_tensors, found.files)
    for name, value in {**start, **identity_state(found.config)}.items():
        assert not torch.equal(one[name], value), name
        # The first update of Adam is the gradient's sign, which few entries may share.
        assert value.numel() < 1000 or not torch.equal(one[name], two[name]), name
    assert sum(value.numel() for value in one.values()) == parameters


def require_merged(base: Path, experts: Path, merged: Path) -> None:
    """Check a merged model that is not folded against the formula."""
    state, found = load_weights(whole(merged), "ema"), read_experts(whole(experts))
    start = {**load_tensors(base / "model.safetensors"), **identity_state(found.config)}
    one, two = map(load_tensors, found.files)
    for name in ("unet.conv_in.weight", "unet.mid_block.resnets.1.conv2.weight", found.config.places[-1].parameter):
        zero = start[name].double()
        wanted = zero + 0.3 * (one[name] - zero) + 0.8 * (two[name] - zero)
        torch.testing.assert_close(state[name].double(), wanted, rtol=0, atol=1e-6)


def fold_and_reload(base: Path, experts: Path, base_parameters: int) -> Path:
    """Merge and fold experts whose projections all fold, export and reload the model, and return it unfolded."""
    from diffusers import UNet2DModel

    merged = run_cli("merge", experts, "--weights", WEIGHTS).path
    require_merged(base, experts, merged)
    folded = run_cli("merge", experts, "--weights", WEIGHTS, "--fold").path
    config, plain = read_config(whole(merged)), read_config(whole(folded))
    assert isinstance(config, UNetConfig) and isinstance(plain, UNetConfig)
    assert plain == read_config(whole(base)) and plain.parameters == base_parameters
    exported = run_cli("convert", folded, "--to", "diffusers").path
    require_plain(exported / "unet", plain)
    network = UNet2DModel.from_pretrained(exported / "unet")
    assert not any(module._forward_hooks for module in network.modules())
    made, ours = outputs(network, plain), load_any_model(whole(folded))
    assert torch.equal(made, outputs(ours.unet, plain))  # type: ignore[arg-type]
    layered = load_any_model(whole(merged))
    wanted = outputs(layered.unet, plain)  # type: ignore[arg-type]
    assert (made - wanted).abs().max() < ROUNDED * wanted.abs().max()
    layered.load_state_dict({**layered.state_dict(), **identity_state(config)})
    without = outputs(layered.unet, plain)  # type: ignore[arg-type]
    assert (made - without).abs().max() > 100 * ROUNDED * wanted.abs().max(), "the projections do nothing"
    return merged


def require_plain(folder: Path, config: UNetConfig) -> None:
    """Check that a folder is a plain UNet2DModel: diffusers' files, tensors and work, and nothing beside them."""
    assert {file.name for file in folder.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert json.loads((folder / "config.json").read_text())["_class_name"] == "UNet2DModel"
    tensors = load_tensors(folder / "diffusion_pytorch_model.safetensors")
    assert sum(value.numel() for value in tensors.values()) == config.parameters
    with torch.device("meta"):
        assert set(tensors) == set(build_model(replace(config, projections="none")).unet.state_dict())  # type: ignore[operator, union-attr]


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_cifar_with_foldable_projections_becomes_plain(roomy: Path) -> None:
    base, experts = experts_of("unet-cifar", "foldable", 32, 1)
    require_trained(base, experts, 35_746_307 + 3 * 256**2 + 128**2)
    merged = whole(fold_and_reload(base, experts, 35_746_307))
    config = read_config(merged)
    assert isinstance(config, UNetConfig)
    assert fold_difference(config, load_weights(merged, "ema")) < EXACT


@pytest.mark.slow
def test_an_imported_unet_of_lsun_s_blocks_becomes_plain(workspace: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    network = unet_preset("unet-lsun", image_size=32, channels=3).network
    narrow = {**network, "block_out_channels": [width // 16 for width in network["block_out_channels"]]}
    torch.manual_seed(0)
    theirs = UNet2DModel(**{**narrow, "norm_num_groups": 4})
    theirs.save_pretrained(tmp_path / "unet")
    base = run_cli("convert", tmp_path / "unet").path
    experts = trained(base, "foldable", 2, "--data", "photos")
    own = sum(parameter.numel() for parameter in theirs.parameters())
    require_trained(base, experts, own + 688_128 // 16**2)
    fold_and_reload(base, experts, own)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_lsun_at_its_own_size_becomes_plain(roomy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    for index in range(10):
        pixels = torch.randint(256, (256, 256, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / f"{index}.png")
    base, experts = experts_of("unet-lsun", "foldable", 256, 1, f"folder:{tmp_path / 'images'}")
    require_trained(base, experts, 113_673_219 + 688_128)
    fold_and_reload(base, experts, 113_673_219)
    with capsys.disabled():
        print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_cifar_with_all_projections_keeps_what_cannot_be_folded(roomy: Path) -> None:
    base, experts = experts_of("unet-cifar", "blocks", 32, 1)
    require_trained(base, experts, 35_746_307 + 491_520)
    folded = run_cli("merge", experts, "--weights", WEIGHTS, "--fold")
    for where in ("down_blocks.0", "down_blocks.1", "down_blocks.2", "down_blocks.3", "mid_block"):
        assert f"the projection behind {where} stays as a layer: " in folded.err
    config = read_config(whole(folded.path))
    assert config.projections == "unfoldable"
    assert total_parameters(config) == 35_746_307 + 128**2 + 4 * 256**2
    refused = run_cli("convert", folded.path, "--to", "diffusers")
    assert refused.code == 3 and refused.out == "" and "skip connection" in refused.err
    assert "Projections in diffusers" in refused.err and "### Projections in diffusers" in README
    made = outputs(loader()(folded.path), config)  # type: ignore[arg-type]
    assert torch.equal(made, outputs(load_any_model(whole(folded.path)).unet, config))  # type: ignore[arg-type]
    merged = run_cli("merge", experts, "--weights", WEIGHTS).path
    require_merged(base, experts, merged)
    wanted = outputs(loader()(merged), config)  # type: ignore[arg-type]
    assert (made - wanted).abs().max() < ROUNDED * wanted.abs().max()


@pytest.mark.parametrize(("architecture", "network"), [("unet2d", LABELLED), ("unet2d-condition", TEXT)])
def test_the_readmes_loader_and_fold_with_classes_and_with_text(
    tmp_path: Path, architecture: str, network: dict[str, Any]
) -> None:
    labelled = {"num_classes": 3, "null_class": True} if architecture == "unet2d" else {}
    bare = UNetConfig(architecture, network, 8, 2, 0, **labelled)  # type: ignore[arg-type]
    with torch.device("meta"):
        own = sum(parameter.numel() for parameter in build_model(bare).parameters())
        plain = replace(bare, parameters=own)
        projected = add_projections(plain, "blocks")
        counted = sum(parameter.numel() for parameter in build_model(projected).parameters())
    assert counted == total_parameters(projected) == own + 2 * 8**2 + 3 * 16**2
    torch.manual_seed(0)
    state = build_model(projected).state_dict()
    state = {name: value + 0.1 * torch.randn(value.shape) for name, value in state.items()}
    assert fold_difference(projected, state) < EXACT
    more: dict[str, Any] = {"class_labels": torch.tensor([2])}
    if architecture != "unet2d":
        more = {"encoder_hidden_states": torch.randn(1, 5, 12)}
    for config, weights in ((projected, state), fold(projected, state)[:2]):
        write_json(tmp_path / "config.json", config.to_dict())
        save_tensors(tmp_path / "model.safetensors", weights)
        model = build_model(config)
        model.load_state_dict(weights)
        made = outputs(loader()(tmp_path), config, **more)
        assert torch.equal(made, outputs(model.unet, config, **more))  # type: ignore[arg-type]
        assert not torch.allclose(made, outputs(build_plain(plain, weights), config, **more), rtol=1e-3)


def build_plain(config: UNetConfig, state: dict[str, Tensor]) -> nn.Module:
    """Return a network without the projections of its state."""
    model = build_model(config)
    model.load_state_dict({name: value for name, value in state.items() if not name.startswith("projections.")})
    network: nn.Module = model.unet  # type: ignore[assignment]
    return network


def test_a_folded_model_costs_what_the_base_costs() -> None:
    plain = unet_preset("unet-nano", image_size=32, channels=3)
    projected = add_projections(plain, "foldable")
    with torch.device("meta"):
        state = build_model(projected).state_dict()
    folded = fold(projected, {name: torch.zeros(value.shape) for name, value in state.items()})
    assert count_forward(folded.config, 1) == count_forward(plain, 1)
    assert (count_forward(projected, 1) or 0) > (count_forward(plain, 1) or 0)


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A workspace with a model, experts of it, one expert, and a merged model."""
    root = tmp_path_factory.mktemp("nano")
    place = ("--workspace", root)
    base = run_cli("init", "--method", "he", "--model", "unet-nano", *place).path
    one = ("--ranges", 2, "--steps", 1, "--batch-size", 4, "--eval-every", 0)
    experts = run_cli("finetune-ranges", base, *one, *place).path
    expert = next(path for path in sorted((root / "expert").iterdir()) if path.is_dir() and not path.is_symlink())
    kept = run_cli("merge", experts, "--weights", "1,1", "--fold", *place).path
    return {"root": root, "base": base, "experts": experts, "expert": expert, "kept": kept}


@pytest.mark.parametrize(
    ("command", "says", "mends"),
    [
        ("merge {experts} --weights 0.1", "1 number, and there are 2 models", "--weights 0.5,0.5"),
        ("merge {experts} --weights 0.1,,0.2", "no list of numbers", "--weights 0.5,0.5"),
        ("merge {experts} --weights 0.1, 0.2", "'0.2' was read as an INPUT", "without spaces"),
        ("merge {experts} --weights 0.1, -0.2", "No such option: -0", "without spaces"),
        ("merge {experts} --weights 0.1 0.2", "'0.2' was read as an INPUT", "without spaces"),
        ("merge {base} {base} --base {base} --weights 1, 1", "'1' was read as an INPUT", "without spaces"),
        ("merge {base} {kept} --weights 1,1", "2 inputs were given", "--base MODEL"),
        ("merge {expert} --weights 1,1", "of kind 'expert'", "without --only"),
        ("merge {expert} --base {base} --weights 1", "of kind 'expert'", "then finectl merge"),
        ("merge {base} --weights 1,1", "of kind 'model'", "finectl finetune-ranges {base}"),
        ("merge {base} --method linear --weights 1 --fold", "no projections", "leave --fold out"),
        ("merge {kept} --method linear --weights 1 --fold", "can be folded", "leave --fold out"),
        ("convert {experts} --to diffusers", "of kind 'experts'", "finectl merge {experts}"),
        ("convert {expert} --to diffusers", "of kind 'expert'", "then finectl merge"),
        ("convert {kept} --to diffusers", "cannot be folded", "--projection foldable"),
    ],
)
def test_what_is_wrong_is_said_in_one_block_with_what_mends_it(
    nano: dict[str, Path], command: str, says: str, mends: str
) -> None:
    ran = run_cli(*command.format(**nano).split(), "--workspace", nano["root"])
    assert ran.code in (2, 3) and ran.out == ""
    error, *rest = ran.err.splitlines()
    assert error.startswith("error: ") and says in error
    assert rest[-1].startswith("  try: ") and mends.format(**nano) in rest[-1]
    assert len(rest) <= 2
