"""Models of EDM's process from their initialisation to their evaluation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import TINY_DATA, run_cli

from finectl.artifacts.store import open_artifact
from finectl.data.dataset import load
from finectl.diffusion import edm
from finectl.diffusion.config import DDPM, PROCESSES
from finectl.errors import InputError
from finectl.models.dit import DiT
from finectl.models.io import build_model, read_config
from finectl.models.presets import DiTConfig
from finectl.models.unet_config import UNetConfig
from finectl.models.unet_presets import unet_preset

EDM = PROCESSES["edm"]
NANO = ("init", "--method", "he", "--model", "dit-nano", "--depth", 1)
SMALL = DiTConfig(width=16, depth=1, heads=2, patch_size=2, image_size=8, channels=1, num_classes=3)


def test_a_model_is_made_trained_sampled_and_measured(workspace: Path) -> None:
    made = run_cli(*NANO, "--process", "edm").path
    assert read_config(open_artifact(made)).diffusion == EDM
    trained = run_cli("train", made, *TINY_DATA, "--sample-every", 3).path
    assert read_config(open_artifact(trained)).diffusion == EDM
    images = run_cli("sample", trained, "--samples", 4, "--sampling-steps", 3, "--guidance", 1.5).path
    assert (images / "grid.png").is_file()
    few = ("--samples", 20, "--sampling-steps", 2, "--allow-few", "--metrics", "loss,frechet")
    row = json.loads((run_cli("evaluate", trained, *few).path / "metrics.json").read_text())[0]
    assert row["loss"]["protocol"]["prediction"] == "v_prediction"
    # A network that predicts 0 has the mean square of v; of data of mean square sigma_data^2 that is 1.
    first = json.loads((run_cli("evaluate", made, "--metrics", "loss").path / "metrics.json").read_text())[0]
    kept, square = edm.alphas_cumprod(EDM), float(load("digits", "heldout").images.square().mean())
    wanted = float((kept + (1 - kept) * square / EDM.sigma_data**2).mean())
    assert first["loss"]["value"] == pytest.approx(wanted, rel=0.02)


def test_it_is_tuned_to_a_range_and_initialised_from(workspace: Path) -> None:
    trained = run_cli("train", run_cli(*NANO, "--process", "edm").path, *TINY_DATA).path
    experts = run_cli(
        "finetune-ranges", trained, "--ranges", 2, "--steps", 1, "--batch-size", 4, "--projection", "none"
    )
    assert run_cli("sample", experts.path, "--samples", 2, "--sampling-steps", 3).code == 0
    kept = run_cli("init", trained, "--method", "he", "--depth", 2).path
    assert read_config(open_artifact(kept)).diffusion == EDM
    other = run_cli("init", trained, "--method", "he", "--depth", 2, "--process", "ddpm").path
    assert read_config(open_artifact(other)).diffusion == DDPM


def test_it_is_fine_tuned_by_the_rank_of_its_noise(workspace: Path) -> None:
    """Diff-Tuning's psi(t) = (t + 1) / T is the quantile of ln(sigma): new images have two thirds of it on average."""
    trained = run_cli("train", run_cli(*NANO, "--process", "edm", "--data", "digits#0,1").path, *TINY_DATA).path
    tuned = run_cli("finetune", trained, "--data", "digits#2", "--bank-samples", 6, *TINY_DATA).path
    artifact = open_artifact(tuned)
    assert read_config(artifact).diffusion == EDM
    assert artifact.manifest.metrics["mean_timestep"]["target"] == pytest.approx(666, abs=1)
    assert run_cli("sample", tuned, "--samples", 2, "--sampling-steps", 2).code == 0


def test_the_usual_process_by_its_name_is_no_other_artifact(workspace: Path) -> None:
    assert run_cli(*NANO).path == run_cli(*NANO, "--process", "ddpm").path
    unet = ("init", "--method", "he", "--model", "unet-nano")
    assert run_cli(*unet).path == run_cli(*unet, "--process", "ddpm").path


def test_a_unet(workspace: Path) -> None:
    made = run_cli("init", "--method", "he", "--model", "unet-nano", "--process", "edm").path
    trained = run_cli("train", made, *TINY_DATA).path
    assert run_cli("sample", trained, "--samples", 2, "--sampling-steps", 2).code == 0
    refused = run_cli("convert", trained, "--to", "diffusers")
    assert refused.code in (2, 3) and "EDM" in refused.err


def test_no_other_layout_holds_the_process(workspace: Path) -> None:
    made = run_cli(*NANO, "--process", "edm").path
    for layout in ("diffusers", "dit"):
        refused = run_cli("convert", made, "--to", layout)
        assert refused.code in (2, 3) and "EDM" in refused.err, layout


def test_networks_are_told_the_noise() -> None:
    """A transformer and a UNet of the process compute what plain ones do at the time of the level."""
    torch.manual_seed(0)
    x, y, t = torch.randn(5, 1, 8, 8), torch.zeros(5, dtype=torch.int64), torch.tensor([0, 1, 500, 998, 999])
    told = edm.network_times(EDM).float()[t]
    for plain in (SMALL, unet_preset("unet-nano", image_size=8, channels=1)):
        ours, theirs = build_model(replace(plain, diffusion=EDM)), build_model(plain)
        state = {name: 0.1 * torch.randn(value.shape) for name, value in theirs.state_dict().items()}
        theirs.load_state_dict(state)
        ours.load_state_dict(state)  # the table is no part of the weights
        with torch.no_grad():
            assert torch.equal(ours.eval()(x, t, y), theirs.eval()(x, told, y))


def test_an_imported_network_of_edm_predicts_v_of_its_process() -> None:
    """The same F gives the same denoised image in EDM's process as in that of DDPM, at the same sigma."""
    torch.manual_seed(0)
    plain = replace(unet_preset("unet-nano", image_size=8, channels=1), sigma_data=0.5)
    ours = build_model(replace(plain, diffusion=EDM)).eval()
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    level = torch.tensor([700])
    sigma = edm.log_sigmas(EDM).exp()[level]
    seen: list[torch.Tensor] = []
    inner = ours.unet.forward
    ours.unet.forward = lambda *given, **named: seen.append(given[1]) or inner(*given, **named)  # type: ignore[func-returns-value]
    with torch.no_grad():
        v = ours(x.float(), level, torch.zeros(1, dtype=torch.int64)).double()
    assert float(seen[0]) == pytest.approx(float(sigma.log() / 4), abs=1e-6)  # c_noise itself
    with torch.no_grad():
        network = inner(x.float(), seen[0]).sample.double()
    z = x * (sigma**2 + 0.25).sqrt()  # x is c_in z
    denoised = 0.25 / (sigma**2 + 0.25) * z + sigma * 0.5 / (sigma**2 + 0.25).sqrt() * network
    kept = edm.alphas_cumprod(EDM)[level]
    assert torch.allclose(0.5 * (kept.sqrt() * x - (1 - kept).sqrt() * v), denoised, atol=1e-6)


def test_what_does_not_go_with_it() -> None:
    with pytest.raises(InputError, match="sigma_data"):
        replace(unet_preset("unet-nano", image_size=8, channels=1), sigma_data=1.0, diffusion=EDM)
    with pytest.raises(InputError, match="variance"):
        DiTConfig.from_dict({**SMALL.to_dict(), "learn_sigma": True, "diffusion": EDM.to_dict()})
    config = replace(unet_preset("unet-nano", image_size=8, channels=1), diffusion=EDM)
    assert UNetConfig.from_dict(config.to_dict()) == config
    assert DiTConfig.from_dict(replace(SMALL, diffusion=EDM).to_dict()) == replace(SMALL, diffusion=EDM)
    assert DiT(SMALL).times is None
