"""What convert refuses: with one clear block, the right exit code, and nothing of the checkpoint run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import HEADS, diffusers_dit, diffusers_unet, diffusers_vae, published_state, text_unet
from safetensors.torch import load_file, save_file
from support import Ran, run_cli

from finectl.artifacts.store import Workspace


def refused(code: int, *arguments: object) -> str:
    """Run convert, check that it left one block and nothing else, and return the block."""
    ran: Ran = run_cli("convert", *arguments)
    assert ran.code == code, ran.err
    assert ran.out == ""
    assert ran.err.count("error:") == 1, ran.err
    assert "Traceback" not in ran.err
    workspace = Workspace()
    assert workspace.paths("model") == []
    return " ".join(ran.err.split())


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class Trap:
    """An object that would make a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_file_with_code_is_refused_and_nothing_runs(workspace: Path, tmp_path: Path, old_format: bool) -> None:
    sprung = tmp_path / "sprung"
    content = {"model": published_state(), "args": Trap(sprung)}
    torch.save(content, tmp_path / "bad.pt", _use_new_zipfile_serialization=not old_format)
    message = refused(3, tmp_path / "bad.pt", "--heads", HEADS)
    assert "could run code" in message
    assert "mkdir" in message
    assert not sprung.exists()
    torch.load(tmp_path / "bad.pt", weights_only=False)  # the trap works
    assert sprung.exists()


def test_a_plain_pickle_with_code_is_refused(workspace: Path, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    for name in ("network.pkl", "network.pt"):
        (tmp_path / name).write_bytes(pickle.dumps({"ema": Trap(sprung)}))
        assert "run" in refused(3, tmp_path / name)
    assert not sprung.exists()


def test_pickled_weights_of_a_folder_with_code_are_refused(workspace: Path, tmp_path: Path) -> None:
    diffusers_unet().save_pretrained(tmp_path / "unet", safe_serialization=False)
    torch.save({"conv_in.weight": Trap(tmp_path / "sprung")}, tmp_path / "unet/diffusion_pytorch_model.bin")
    assert "could run code" in refused(3, tmp_path / "unet")
    assert not (tmp_path / "sprung").exists()


def test_a_truncated_file_is_named(workspace: Path, tmp_path: Path) -> None:
    torch.save(published_state(), tmp_path / "dit.pt")
    save_file(published_state(), tmp_path / "dit.safetensors")
    for name in ("dit.pt", "dit.safetensors"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-1000])
        message = refused(3, path, "--heads", HEADS)
        assert name in message
        assert "truncated" in message or "damaged" in message
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "page.pt").write_bytes(b"<html>not found</html>")
    for name in ("empty.pt", "page.pt"):
        assert "no checkpoint" in refused(3, tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    assert "state dict" in refused(3, tmp_path / "list.pt")


def test_tensors_of_another_architecture_are_named(workspace: Path, tmp_path: Path) -> None:
    torch.save({"layer.weight": torch.ones(2)}, tmp_path / "other.pt")
    message = refused(3, tmp_path / "other.pt")
    assert "layer.weight" in message
    assert "facebookresearch/DiT" in message
    state = published_state()
    del state["blocks.1.mlp.fc1.bias"]
    state["blocks.1.extra"] = torch.ones(1)
    torch.save(state, tmp_path / "dit.pt")
    message = refused(3, tmp_path / "dit.pt", "--heads", HEADS)
    assert "blocks.1.mlp.fc1.bias" in message
    assert "blocks.1.extra" in message


def test_a_learned_position_embedding_is_refused(workspace: Path, tmp_path: Path) -> None:
    state = published_state()
    state["pos_embed"] = state["pos_embed"] + 0.01
    torch.save(state, tmp_path / "dit.pt")
    assert "pos_embed" in refused(3, tmp_path / "dit.pt", "--heads", HEADS)


def test_what_the_weights_do_not_tell_is_asked_for(workspace: Path, tmp_path: Path) -> None:
    state = published_state()
    torch.save(state, tmp_path / "dit.pt")
    assert "--heads" in refused(2, tmp_path / "dit.pt")
    assert "24" in refused(3, tmp_path / "dit.pt", "--heads", 5)
    del state["pos_embed"]
    torch.save(state, tmp_path / "bare.pt")
    assert "--image-size" in refused(2, tmp_path / "bare.pt", "--heads", HEADS)
    assert "--num-classes" in refused(2, tmp_path / "dit.pt", "--heads", HEADS, "--num-classes", 7)


def test_embedders_that_differ_between_blocks_are_refused(workspace: Path, tmp_path: Path) -> None:
    diffusers_dit().save_pretrained(tmp_path / "dit")
    weights = tmp_path / "dit/diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"][0] += 1e-3
    save_file(state, weights)
    message = refused(3, tmp_path / "dit")
    assert "block 1" in message
    assert "linear_2.bias" in message


@pytest.mark.parametrize(
    ("option", "value"),
    [("norm_type", "ada_norm"), ("activation_fn", "gelu"), ("attention_bias", False), ("out_channels", 5)],
)
def test_an_option_that_a_dit_does_not_have_is_named(
    workspace: Path, tmp_path: Path, option: str, value: object
) -> None:
    diffusers_dit().save_pretrained(tmp_path / "dit")
    edit(tmp_path / "dit/config.json", **{option: value})
    message = refused(3, tmp_path / "dit")
    assert str(value) in message


def test_a_configuration_of_other_sizes_than_the_weights_is_refused(workspace: Path, tmp_path: Path) -> None:
    diffusers_dit().save_pretrained(tmp_path / "dit")
    edit(tmp_path / "dit/config.json", num_embeds_ada_norm=12)
    assert "shape" in refused(3, tmp_path / "dit")
    diffusers_unet().save_pretrained(tmp_path / "unet")
    edit(tmp_path / "unet/config.json", block_out_channels=[8, 24])
    assert "shape" in refused(3, tmp_path / "unet")
    edit(tmp_path / "unet/config.json", block_out_channels=[8])
    assert "diffusers cannot build" in refused(3, tmp_path / "unet")


def test_unets_that_need_more_than_the_interface_gives_are_refused(workspace: Path, tmp_path: Path) -> None:
    diffusers_unet().save_pretrained(tmp_path / "unet")
    config = tmp_path / "unet/config.json"
    original = config.read_text()
    for changes, word in (
        ({"time_embedding_type": "fourier"}, "noise levels"),
        ({"class_embed_type": "timestep"}, "table"),
        ({"out_channels": 3}, "channels"),
        ({"sample_size": [8, 16]}, "square"),
    ):
        edit(config, **changes)
        assert word in refused(3, tmp_path / "unet")
        config.write_text(original)
    text_unet().save_pretrained(tmp_path / "text")
    edit(tmp_path / "text/config.json", addition_embed_type="text_time")
    assert "XL" in refused(3, tmp_path / "text")


def test_other_pipelines_and_classes_are_refused_with_those_that_are_known(workspace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipe"
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    message = refused(3, folder)
    assert "StableDiffusionXLPipeline" in message
    assert "did you mean 'StableDiffusionPipeline'" in message
    (folder / "model_index.json").unlink()
    (folder / "config.json").write_text(json.dumps({"_class_name": "PixArtTransformer2DModel"}))
    assert "PixArtTransformer2DModel" in refused(3, folder)
    (folder / "config.json").write_text("{")
    assert "not JSON" in refused(3, folder)
    (folder / "config.json").unlink()
    assert "model_index.json" in refused(3, folder)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"beta_schedule": "sigmoid"}, "sigmoid"),
        ({"prediction_type": "flow"}, "flow"),
        ({"num_train_timesteps": "many"}, "many"),
    ],
)
def test_a_noise_schedule_that_is_not_known_is_refused(
    workspace: Path, tmp_path: Path, changes: dict[str, Any], word: str
) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler

    DDPMPipeline(diffusers_unet(), DDPMScheduler()).save_pretrained(tmp_path / "pipe")
    edit(tmp_path / "pipe/scheduler/scheduler_config.json", **changes)
    assert word in refused(3, tmp_path / "pipe")


def test_a_hub_id_that_is_not_here_says_what_to_do(workspace: Path) -> None:
    message = refused(3, "nobody/no-such-model", "--offline")
    assert "nobody/no-such-model" in message
    assert "--download" in message


def test_nothing_named_and_nothing_there(workspace: Path, tmp_path: Path) -> None:
    assert "--to" in refused(2)
    assert "no checkpoint" in refused(3, tmp_path / "none.pt")
    assert "no checkpoint" in refused(3, "./none")
    assert "finectl init" in refused(3, "--to", "diffusers")
    assert "'dit'" in refused(2, "--to", "diffuser")
    assert "'edm'" in refused(2, tmp_path, "--format", "diffusers-di")
    torch.save(published_state(), tmp_path / "dit.pt")
    assert "--vae" in refused(2, tmp_path / "dit.pt", "--heads", HEADS, "--vae", tmp_path)


def test_the_weights_of_diffusers_alone_lack_their_configuration(workspace: Path, tmp_path: Path) -> None:
    diffusers_unet().save_pretrained(tmp_path / "unet")
    assert "config.json" in refused(3, tmp_path / "unet/diffusion_pytorch_model.safetensors")
    os.remove(tmp_path / "unet/diffusion_pytorch_model.safetensors")
    assert "no weights" in refused(3, tmp_path / "unet")


def test_another_format_than_the_one_named(workspace: Path, tmp_path: Path) -> None:
    diffusers_unet().save_pretrained(tmp_path / "unet")
    assert "diffusers-unet" in refused(2, tmp_path / "unet", "--format", "dit")


def test_a_name_that_leads_out_of_the_folder_is_refused(workspace: Path, tmp_path: Path) -> None:
    diffusers_unet().save_pretrained(tmp_path / "unet")
    (tmp_path / "secret").mkdir()
    index = {"weight_map": {"conv_in.weight": "../unet/diffusion_pytorch_model.safetensors"}}
    (tmp_path / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert "leads out" in refused(3, tmp_path / "unet")
    pipeline = {"_class_name": "DDPMPipeline", "../secret": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "unet/diffusion_pytorch_model.safetensors.index.json").unlink()
    (tmp_path / "model_index.json").write_text(json.dumps(pipeline))
    assert "leads out" in refused(3, tmp_path)


class TestExport:
    """Refusals of --to, with one imported model each."""

    def test_options_of_an_import_do_not_go_with_it(self, workspace: Path, tmp_path: Path) -> None:
        model = self._model(tmp_path)
        for arguments in (("--heads", 3), ("--components", "reference"), ("--format", "dit")):
            ran = run_cli("convert", model, "--to", "diffusers", *arguments)
            assert ran.code == 2
            assert str(arguments[0]) in ran.err

    def test_a_unet_has_no_published_dit_layout(self, workspace: Path, tmp_path: Path) -> None:
        diffusers_unet().save_pretrained(tmp_path / "unet")
        model = run_cli("convert", tmp_path / "unet").path
        ran = run_cli("convert", model, "--to", "dit")
        assert ran.code == 2
        assert "--to diffusers" in ran.err

    def test_the_vae_must_be_there_and_fit(self, workspace: Path, tmp_path: Path) -> None:
        model = self._model(tmp_path)
        diffusers_vae(channels=3).save_pretrained(tmp_path / "vae")
        for vae, word in ((tmp_path / "vae", "3 channels"), (tmp_path / "none", "none"), (tmp_path / "dit", "VAE")):
            ran = run_cli("convert", model, "--to", "diffusers", "--vae", vae)
            assert ran.code == 3, ran.err
            assert word in ran.err or "AutoencoderKL" in ran.err

    def test_a_part_that_is_gone_or_has_changed_is_named(self, workspace: Path, tmp_path: Path) -> None:
        from diffusers import DDIMScheduler, DiTPipeline

        DiTPipeline(diffusers_dit(), diffusers_vae(), DDIMScheduler()).save_pretrained(tmp_path / "pipe")
        model = run_cli("convert", tmp_path / "pipe").path
        edit(tmp_path / "pipe/vae/config.json", scaling_factor=0.5)
        ran = run_cli("convert", model, "--to", "diffusers")
        assert ran.code == 3
        assert "has changed" in ran.err
        shutil.rmtree(tmp_path / "pipe/vae")
        ran = run_cli("convert", model, "--to", "diffusers")
        assert ran.code == 3
        assert "vae" in ran.err
        assert "missing" in ran.err

    def test_more_classes_than_the_pipeline_has_are_refused(self, workspace: Path, tmp_path: Path) -> None:
        diffusers_dit(num_embeds_ada_norm=1200).save_pretrained(tmp_path / "dit")
        diffusers_vae().save_pretrained(tmp_path / "vae")
        model = run_cli("convert", tmp_path / "dit").path
        ran = run_cli("convert", model, "--to", "diffusers", "--vae", tmp_path / "vae")
        assert ran.code == 3
        assert "1200 classes" in ran.err
        assert run_cli("convert", model, "--to", "diffusers", "--components", "none").code == 0

    def test_parts_with_pickled_weights_are_not_copied(self, workspace: Path, tmp_path: Path) -> None:
        from diffusers import DDIMScheduler, DiTPipeline

        DiTPipeline(diffusers_dit(), diffusers_vae(), DDIMScheduler()).save_pretrained(tmp_path / "pipe")
        diffusers_vae().save_pretrained(tmp_path / "pipe/vae", safe_serialization=False)
        os.remove(tmp_path / "pipe/vae/diffusion_pytorch_model.safetensors")
        ran = run_cli("convert", tmp_path / "pipe", "--components", "copy")
        assert ran.code == 3
        assert "pickled" in ran.err

    def test_an_artifact_without_a_target(self, workspace: Path, tmp_path: Path) -> None:
        ran = run_cli("convert", self._model(tmp_path))
        assert ran.code == 2
        assert "--to diffusers" in ran.err

    def test_a_dit_only_stage_refuses_a_unet(self, workspace: Path, tmp_path: Path) -> None:
        diffusers_unet().save_pretrained(tmp_path / "unet")
        model = run_cli("convert", tmp_path / "unet").path
        ran = run_cli("init", model, "--method", "he", "--depth", 2)
        assert ran.code == 3
        assert "unet2d" in ran.err

    @staticmethod
    def _model(tmp_path: Path) -> Path:
        diffusers_dit().save_pretrained(tmp_path / "dit")
        return run_cli("convert", tmp_path / "dit").path
