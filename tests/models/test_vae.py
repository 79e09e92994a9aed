"""Autoencoders: what is said of them without torch, encoding and decoding, and every way in which one can be wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import child_environment, tiny_vae

from finectl.errors import InputError
from finectl.models import vae as vae_module
from finectl.models.vae import (
    CONFIG,
    PICKLED,
    WEIGHTS,
    describe_vae,
    find_recorded,
    load_vae,
    require_images,
    require_same_space,
)


@pytest.fixture(scope="module")
def _grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vae(tmp_path_factory.mktemp("vae") / "grey")


@pytest.fixture
def grey(_grey: Path, tmp_path: Path) -> Path:
    """An autoencoder of the test's own, to be harmed at will."""
    return Path(shutil.copytree(_grey, tmp_path / "grey"))


def edit(folder: Path, **values: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_what_is_said_of_an_autoencoder(grey: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(grey.parent)
    record = describe_vae("grey")
    digest = record.pop("digest")
    assert len(digest) == 64 and int(digest, 16)
    assert record == {
        "name": str(grey), "scaling_factor": 0.5, "shift_factor": 0.0, "downscale": 2, "latent_channels": 4,
        "channels": 1,
    }  # fmt: skip


def test_it_is_said_without_torch(grey: Path) -> None:
    code = (
        f"import sys; from finectl.models.vae import describe_vae; describe_vae({str(grey)!r});"
        "print([m for m in ('torch', 'numpy', 'diffusers', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=child_environment()
    )
    assert done.stdout == "[]\n", done.stderr


def test_the_digest_is_that_of_the_content(grey: Path, tmp_path: Path) -> None:
    digest = describe_vae(str(grey))["digest"]
    tensors = load_file(grey / WEIGHTS)
    save_file(dict(reversed(tensors.items())), grey / WEIGHTS, metadata={"saved": "again"})
    edit(grey, _diffusers_version="0.0.0", sample_size=77)
    assert describe_vae(str(grey))["digest"] == digest
    assert describe_vae(str(shutil.copytree(grey, tmp_path / "elsewhere")))["digest"] == digest
    edit(grey, scaling_factor=0.25)
    rescaled = describe_vae(str(grey))["digest"]
    tensors["quant_conv.bias"] = tensors["quant_conv.bias"].clone()
    tensors["quant_conv.bias"][0] += 1e-6
    edit(grey, scaling_factor=0.5)
    save_file(tensors, grey / WEIGHTS)
    assert len({digest, rescaled, describe_vae(str(grey))["digest"]}) == 3


def test_settings_left_out_of_the_file_are_diffusers_own(grey: Path) -> None:
    digest = describe_vae(str(grey))["digest"]
    values = json.loads((grey / CONFIG).read_text())
    for name in ("mid_block_add_attention", "use_quant_conv", "shift_factor", "latents_mean", "act_fn"):
        values.pop(name, None)
    (grey / CONFIG).write_text(json.dumps(values))
    assert describe_vae(str(grey))["digest"] == digest
    assert load_vae(str(grey)).decode(torch.zeros(1, 4, 2, 2)).shape == (1, 1, 4, 4)


def test_moments_are_those_of_diffusers(grey: Path) -> None:
    vae = load_vae(str(grey))
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    moments = vae.encode_moments(images)
    with torch.no_grad():
        wanted = vae.module.encode(images).latent_dist
    assert moments.shape == (3, 8, 4, 4) and moments.dtype == torch.float32 and not moments.requires_grad
    assert torch.equal(moments[:, :4], wanted.mean) and torch.equal(moments[:, 4:], wanted.logvar)
    assert not vae.module.training


def test_log_variances_stay_in_range(grey: Path) -> None:
    vae = load_vae(str(grey))
    with torch.no_grad():
        vae.module.quant_conv.bias[4:6] = torch.tensor([99.0, -99.0])
    moments = vae.encode_moments(torch.zeros(1, 1, 8, 8))
    assert moments[:, 4].eq(20).all() and moments[:, 5].eq(-30).all()


def test_decoding_undoes_scale_and_shift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = load_vae(str(tiny_vae(tmp_path / "vae", channels=3, scaling_factor=0.25, shift_factor=0.75)))
    z = torch.randn(5, 4, 4, 4)
    images = vae.decode((z - 0.75) * 0.25)
    with torch.no_grad():
        wanted = vae.module.decode(z).sample.clamp(-1, 1)
    assert images.shape == (5, 3, 8, 8) and torch.allclose(images, wanted, atol=1e-5)
    assert torch.allclose(vae.decode(z, scaled=False), wanted, atol=1e-6)
    assert images.min() >= -1 and images.max() <= 1
    monkeypatch.setattr(vae_module, "DECODED_PIXELS", 2 * 8 * 8)
    assert torch.allclose(vae.decode((z - 0.75) * 0.25), images, atol=1e-5), "in parts it is the same"


def test_a_folder_of_a_pipeline(grey: Path, tmp_path: Path) -> None:
    wanted = describe_vae(str(grey))["digest"]
    pipeline = tmp_path / "pipeline"
    shutil.copytree(grey, pipeline / "vae")
    (pipeline / "model_index.json").write_text("{}")
    assert describe_vae(str(pipeline))["digest"] == wanted
    (pipeline / CONFIG).write_text(json.dumps({"architecture": "dit"}))
    assert describe_vae(str(pipeline))["digest"] == wanted and load_vae(str(pipeline)).record["digest"] == wanted


def broken_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / PICKLED)


def truncated(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


HARM: dict[str, tuple[Any, str]] = {
    "nothing there": (shutil.rmtree, "no autoencoder at"),
    "no configuration": (lambda folder: (folder / CONFIG).unlink(), "holds no autoencoder"),
    "another class": (lambda folder: edit(folder, _class_name="UNet2DModel"), "is of class UNet2DModel"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "a pickle": (broken_pickle, "a pickle, which can hold code and is not opened"),
    "half the weights": (truncated, "truncated"),
    "no JSON": (lambda folder: (folder / CONFIG).write_text("{"), "is not JSON"),
    "a list": (lambda folder: (folder / CONFIG).write_text("[]"), "is a list"),
    "a scale of zero": (lambda folder: edit(folder, scaling_factor=0), "scaling factor 0"),
    "a scale of words": (lambda folder: edit(folder, scaling_factor="big"), "not a whole configuration"),
    "a scale for each channel": (lambda folder: edit(folder, latents_std=[1, 1, 1, 1]), "each channel"),
    "other channels out": (lambda folder: edit(folder, out_channels=3), "turns 1 channels into 3"),
}


@pytest.mark.parametrize("name", sorted(HARM))
def test_what_is_wrong_is_said(name: str, grey: Path) -> None:
    harm, message = HARM[name]
    harm(grey)
    with pytest.raises(InputError, match=message):
        describe_vae(str(grey))
    with pytest.raises(InputError, match=message):
        load_vae(str(grey))


def test_a_missing_one_says_what_to_download_and_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        describe_vae(str(tmp_path / "vae"))
    for part in ("stabilityai/sd-vae-ft-ema", CONFIG, WEIGHTS, "--vae PATH", "--download"):
        assert part in error.value.fix
    with pytest.raises(InputError, match=r"stabilityai/sd-vae-ft-ema.* not in the hub's cache"):
        describe_vae("stabilityai/sd-vae-ft-ema")
    (tmp_path / "vae.safetensors").touch()
    with pytest.raises(InputError, match="is a file"):
        describe_vae(str(tmp_path / "vae.safetensors"))


def test_weights_that_do_not_fit_the_configuration(grey: Path) -> None:
    tensors = load_file(grey / WEIGHTS)
    save_file({name: value for name, value in tensors.items() if name != "quant_conv.bias"}, grey / WEIGHTS)
    with pytest.raises(InputError, match=r"lacks 1 tensors .* quant_conv.bias"):
        load_vae(str(grey))
    save_file({**tensors, "quant_conv.bias": torch.zeros(3)}, grey / WEIGHTS)
    with pytest.raises(InputError, match="cannot be read as an autoencoder"):
        load_vae(str(grey))


def test_another_space_is_refused(grey: Path, tmp_path: Path) -> None:
    record = describe_vae(str(grey))
    moved = grey.rename(tmp_path / "moved")
    require_same_space(record, describe_vae(str(moved)), "the model")
    other = describe_vae(str(tiny_vae(tmp_path / "other", seed=1)))
    with pytest.raises(InputError) as error:
        require_same_space(record, other, "the model")
    assert str(grey) in error.value.what and str(tmp_path / "other") in error.value.what
    edit(moved, scaling_factor=0.25)
    with pytest.raises(InputError, match=r"scaling factor 0\.5\).*scaling factor 0\.25"):
        require_same_space(record, describe_vae(str(moved)), "the model")
    with pytest.raises(InputError, match="cannot be read: there is no autoencoder") as gone:
        find_recorded(record, "the model")
    assert gone.value.fix == "say where it is now: --vae PATH"
    moved.rename(grey)
    with pytest.raises(InputError, match="the model works on the latents of"):
        find_recorded(record, "the model")


def test_images_that_do_not_fit(grey: Path) -> None:
    record = describe_vae(str(grey))
    require_images(record, 1, 8, "the data")
    with pytest.raises(InputError, match=r"has RGB images \(channels: 3\).* takes grey ones"):
        require_images(record, 3, 8, "the data")
    with pytest.raises(InputError, match="7x7 pixels do not fit") as error:
        require_images(record, 1, 7, "the data")
    assert error.value.fix == "--image-size 8"
    with pytest.raises(InputError):
        load_vae(str(grey)).encode_moments(torch.zeros(1, 3, 8, 8))
