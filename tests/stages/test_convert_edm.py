"""EDM's ADM architecture against a forward pass that shares no code with finectl or diffusers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import run_cli, whole
from torch import Tensor
from torch.nn import functional as F

from finectl.diffusion import edm
from finectl.diffusion.config import PROCESSES
from finectl.diffusion.schedule import NoiseSchedule
from finectl.models.io import load_model, read_config

WIDTH, SIDE, CHANNELS, CLASSES, EMBEDDING = 128, 8, 3, 3, 512
WIDTHS = {8: 128, 4: 256}
ATTENTION = (4,)


def adm_state(classes: int = CLASSES) -> dict[str, Tensor]:
    """Return the state of EDMPrecond with a DhariwalUNet of one block a level, under `model.`, no weight at zero."""
    random = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def draw(name: str, rows: int, columns: int, kernel: int | None = None) -> None:
        shape = (rows, columns) if kernel is None else (rows, columns, kernel, kernel)
        state[f"{name}.weight"] = torch.randn(shape, generator=random) / math.sqrt(columns * (kernel or 1) ** 2)
        state[f"{name}.bias"] = 0.1 * torch.randn(rows, generator=random)

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=random)
        state[f"{name}.bias"] = 0.1 * torch.randn(width, generator=random)

    def block(name: str, inputs: int, outputs: int, attention: bool = False, resamples: bool = False) -> None:
        norm(f"{name}.norm0", inputs)
        draw(f"{name}.conv0", outputs, inputs, 3)
        draw(f"{name}.affine", 2 * outputs, EMBEDDING)
        norm(f"{name}.norm1", outputs)
        draw(f"{name}.conv1", outputs, outputs, 3)
        if inputs != outputs:
            draw(f"{name}.skip", outputs, inputs, 1)
        if resamples:
            for part in ("conv0", "skip"):
                state[f"{name}.{part}.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
        if attention:
            norm(f"{name}.norm2", outputs)
            draw(f"{name}.qkv", 3 * outputs, outputs, 1)
            draw(f"{name}.proj", outputs, outputs, 1)

    draw("map_layer0", EMBEDDING, WIDTH)
    draw("map_layer1", EMBEDDING, EMBEDDING)
    if classes:
        state["map_label.weight"] = torch.randn(EMBEDDING, classes, generator=random)
    draw("enc.8x8_conv", WIDTH, CHANNELS, 3)
    block("enc.8x8_block0", 128, 128)
    block("enc.4x4_down", 128, 128, resamples=True)
    block("enc.4x4_block0", 128, 256, attention=True)
    block("dec.4x4_in0", 256, 256, attention=True)
    block("dec.4x4_in1", 256, 256)
    block("dec.4x4_block0", 512, 256, attention=True)
    block("dec.4x4_block1", 384, 256, attention=True)
    block("dec.8x8_up", 256, 256, resamples=True)
    block("dec.8x8_block0", 384, 128)
    block("dec.8x8_block1", 256, 128)
    norm("out_norm", 128)
    draw("out_conv", CHANNELS, 128, 3)
    return {f"model.{name}": tensor for name, tensor in state.items()}


def adm_denoise(state: dict[str, Tensor], z: Tensor, sigma: Tensor, y: Tensor | None) -> Tensor:
    """Return EDM's denoised image D(z; sigma) with sigma_data = 0.5 (arXiv 2206.00364, Eq. 7 and table 1)."""
    w = {name.removeprefix("model."): tensor for name, tensor in state.items()}

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def conv(name: str, value: Tensor) -> Tensor:
        weight = w[f"{name}.weight"]
        return F.conv2d(value, weight, w[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(name: str, value: Tensor) -> Tensor:
        return F.group_norm(value, 32, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-5)

    def resample(name: str, value: Tensor) -> Tensor:
        if name.endswith("_down"):
            return value.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
        return value.repeat_interleave(2, 2).repeat_interleave(2, 3) if name.endswith("_up") else value

    def block(name: str, value: Tensor, embedding: Tensor) -> Tensor:
        h = conv(f"{name}.conv0", resample(name, F.silu(norm(f"{name}.norm0", value))))
        scale, shift = linear(f"{name}.affine", embedding)[:, :, None, None].chunk(2, 1)
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", h) * (1 + scale) + shift))
        skip = resample(name, value)
        h = h + (conv(f"{name}.skip", skip) if f"{name}.skip.weight" in w else skip)
        if f"{name}.qkv.weight" not in w:
            return h
        batch, width, rows, columns = h.shape
        heads = width // 64
        qkv = conv(f"{name}.qkv", norm(f"{name}.norm2", h)).reshape(batch * heads, 64, 3, rows * columns)
        q, k, v = qkv.unbind(2)  # (B heads, 64, pixels)
        weights = torch.einsum("ncq,nck->nqk", q, k / 8).softmax(2)
        mixed = torch.einsum("nqk,nck->ncq", weights, v).reshape(h.shape)
        return h + conv(f"{name}.proj", mixed)

    sigma = sigma.float()
    rates = (1 / 10000) ** (torch.arange(WIDTH // 2) / (WIDTH // 2))
    angles = torch.outer(sigma.log() / 4, rates)
    embedding = linear("map_layer1", F.silu(linear("map_layer0", torch.cat([angles.cos(), angles.sin()], 1))))
    if y is not None:
        hot = F.one_hot(y.clamp(max=CLASSES - 1), CLASSES).float() * (y < CLASSES)[:, None]
        embedding = embedding + hot @ w["map_label.weight"].T
    embedding = F.silu(embedding)
    s = sigma[:, None, None, None]
    total = (s**2 + 0.25).sqrt()
    h = conv("enc.8x8_conv", z / total)
    skips = [h]
    for name in ("enc.8x8_block0", "enc.4x4_down", "enc.4x4_block0"):
        h = block(name, h, embedding)
        skips.append(h)
    for name in ("dec.4x4_in0", "dec.4x4_in1"):
        h = block(name, h, embedding)
    for name in ("dec.4x4_block0", "dec.4x4_block1", "dec.8x8_up", "dec.8x8_block0", "dec.8x8_block1"):
        h = block(name, h if name.endswith("_up") else torch.cat([h, skips.pop()], 1), embedding)
    h = conv("out_conv", F.silu(norm("out_norm", h)))
    return 0.25 / total**2 * z + s * 0.5 / total * h


@pytest.mark.parametrize("classes", [0, CLASSES])
def test_an_adm_network_of_edm_predicts_the_same_noise(workspace: Path, tmp_path: Path, classes: int) -> None:
    state = adm_state(classes)
    torch.save(state, tmp_path / "adm.pt")
    path = run_cli("convert", tmp_path / "adm.pt").path
    model = load_model(whole(path)).eval()
    t = torch.tensor([0, 10, 300, 600, 999])
    x = torch.randn(len(t), CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    y = torch.arange(len(t)) % (classes + 1)  # the null class among them
    kept = NoiseSchedule.linear().alphas_cumprod[t]
    sigma = ((1 - kept) / kept).sqrt()
    z = x / kept.sqrt().float()[:, None, None, None]
    with torch.no_grad():
        denoised = adm_denoise(state, z, sigma, y if classes else None)
        noise = model(x, t, y)
    # The noise is (z - D) / sigma, in which a float32 rounding of z counts 1 / sigma times at the smallest sigma.
    wanted = (z - denoised) / sigma.float()[:, None, None, None]
    torch.testing.assert_close(noise[1:], wanted[1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(noise[:1], wanted[:1], rtol=1e-4, atol=1e-4)
    config = read_config(whole(path))
    assert (config.num_classes, config.has_null_class) == (classes, classes > 0)
    assert run_cli("convert", path, "--to", "diffusers").code == 3


def test_an_adm_network_is_trained_and_sampled(workspace: Path, tmp_path: Path) -> None:
    state = adm_state(0)
    weight = "model.enc.8x8_conv.weight"
    state[weight] = state[weight][:, :1].contiguous()
    state["model.out_conv.weight"] = state["model.out_conv.weight"][:1].contiguous()
    state["model.out_conv.bias"] = state["model.out_conv.bias"][:1].contiguous()
    save_file(state, tmp_path / "adm.safetensors")
    model = run_cli("convert", tmp_path / "adm.safetensors").path
    arguments = ("--data", "digits", "--steps", 1, "--batch-size", 2, "--eval-every", 0)
    trained = run_cli("train", model, *arguments).path
    assert run_cli("sample", trained, "--samples", 1, "--sampling-steps", 1).code == 0
    assert set(load_file(trained / "model.safetensors")) == set(load_file(model / "model.safetensors"))


def test_an_adm_network_in_its_own_process(workspace: Path, tmp_path: Path) -> None:
    """What it predicts there is -F, so that the denoised image is EDM's; it is trained and sampled."""
    state = adm_state(0)
    torch.save(state, tmp_path / "adm.pt")
    path = run_cli("convert", tmp_path / "adm.pt", "--process", "edm").path
    config = read_config(whole(path)).diffusion
    assert config == PROCESSES["edm"]
    t = torch.tensor([0, 10, 300, 600, 999])
    sigma, kept = edm.log_sigmas(config).exp()[t], edm.alphas_cumprod(config)[t]
    z = torch.randn(len(t), CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1)).double()
    total = (sigma**2 + 0.25).sqrt()[:, None, None, None]
    x = z / total
    signal, spread = (value.sqrt()[:, None, None, None] for value in (kept, 1 - kept))
    with torch.no_grad():
        v = load_model(whole(path)).eval()(x.float(), t, torch.zeros(len(t), dtype=torch.int64)).double()
        wanted = adm_denoise(state, z.float(), sigma, None)
    torch.testing.assert_close((0.5 * (signal * x - spread * v)).float(), wanted, rtol=1e-4, atol=1e-4)
    assert (
        run_cli("convert", tmp_path / "adm.pt", "--process", "ddpm").path
        == run_cli("convert", tmp_path / "adm.pt").path
    )
    refused = run_cli("convert", path, "--to", "diffusers", "--process", "edm")
    assert refused.code == 2 and "--process" in refused.err


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model.out_gain": torch.ones(())}, "EDM2"),
        ({"u": torch.ones(3)}, "iDDPM"),
        ({"model.out_norm.weight": None}, "SongUNet"),
        ({"model.enc.8x8_block0.qkv.weight": torch.ones(384, 128, 1, 1)}, "unknown|missing"),
        ({"model.dec.8x8_up.conv0.resample_filter": torch.full((1, 1, 4, 4), 0.1)}, "resample_filter"),
    ],
)
def test_another_architecture_of_edm_is_refused_by_name(
    workspace: Path, tmp_path: Path, changes: dict[str, Tensor | None], word: str
) -> None:
    state = {name: tensor for name, tensor in {**adm_state(), **changes}.items() if tensor is not None}
    torch.save(state, tmp_path / "adm.pt")
    ran = run_cli("convert", tmp_path / "adm.pt")
    assert ran.code == 3
    assert any(part in ran.err for part in word.split("|")), ran.err
