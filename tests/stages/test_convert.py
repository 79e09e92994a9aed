"""Convert: for every kind of checkpoint, outputs before and after are equal, both ways."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    CHANNELS,
    CLASSES,
    DEPTH,
    HEADS,
    SIDE,
    diffusers_dit,
    diffusers_unet,
    diffusers_vae,
    inputs,
    published_forward,
    published_state,
    text_parts,
    text_unet,
)
from safetensors.torch import load_file, save_file
from support import child_environment, run_cli, whole
from torch import Tensor

from finectl.models.io import load_any_model, load_model, read_config
from finectl.models.unet import TextUNet

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def convert(*arguments: object) -> Path:
    path = run_cli("convert", *arguments).path
    whole(path)
    return path


@torch.no_grad()
def outputs(path: Path, weights: str = "ema", **kind: Any) -> Tensor:
    return load_model(whole(path), weights).eval()(*inputs(**kind))


@torch.no_grad()
def diffusers_outputs(model: Any, classes: int = CLASSES, null: int | None = None) -> Tensor:
    x, t, y = inputs(classes=classes)
    if null is not None:
        y = torch.where(y == classes, null, y)
    return model(x, t, class_labels=y).sample


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_a_published_dit_computes_the_same(workspace: Path, tmp_path: Path, learn_sigma: bool) -> None:
    state = published_state(learn_sigma=learn_sigma)
    torch.save(state, tmp_path / "dit.pt")
    path = convert(tmp_path / "dit.pt", "--heads", HEADS)
    torch.testing.assert_close(outputs(path), published_forward(state, *inputs()), **CLOSE)
    config = read_config(whole(path))
    assert (config.num_classes, config.image_size, config.learn_sigma) == (CLASSES, SIDE, learn_sigma)
    assert config.frequency_divisor == 128
    assert not (path / "ema.safetensors").exists()


def test_raw_and_averaged_weights_of_a_training_checkpoint_are_kept_apart(workspace: Path, tmp_path: Path) -> None:
    raw, ema = published_state(1), published_state(2)
    options = argparse.Namespace(model="DiT-XL/2", image_size=8 * SIDE, num_classes=CLASSES)
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    prefixed = {f"module._orig_mod.{name}": tensor for name, tensor in raw.items()}
    torch.save({"model": prefixed, "ema": ema, "opt": optimizer, "args": options}, tmp_path / "0050000.pt")
    path = convert(tmp_path / "0050000.pt", "--heads", HEADS)
    torch.testing.assert_close(outputs(path, "raw"), published_forward(raw, *inputs()), **CLOSE)
    torch.testing.assert_close(outputs(path, "ema"), published_forward(ema, *inputs()), **CLOSE)


def test_the_published_layout_is_read_from_safetensors_and_old_files(workspace: Path, tmp_path: Path) -> None:
    state = published_state()
    save_file(state, tmp_path / "dit.safetensors")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    half = {name: tensor.to(torch.bfloat16) for name, tensor in state.items() if name != "pos_embed"}
    save_file(half, tmp_path / "half.safetensors")
    wanted = published_forward(state, *inputs())
    for name in ("dit.safetensors", "old.pt"):
        torch.testing.assert_close(outputs(convert(tmp_path / name, "--heads", HEADS)), wanted, **CLOSE)
    narrow = convert(tmp_path / "half.safetensors", "--heads", HEADS, "--image-size", SIDE)
    stored = load_file(narrow / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    same = half["t_embedder.mlp.0.weight"].float()
    assert torch.equal(stored["t_embedder.mlp.0.weight"], same)


def test_an_import_and_an_export_restore_the_published_file(workspace: Path, tmp_path: Path) -> None:
    state = published_state()
    torch.save(state, tmp_path / "dit.pt")
    model = convert(tmp_path / "dit.pt", "--heads", HEADS)
    export = convert(model, "--to", "dit")
    made = load_file(export / "dit.safetensors")
    assert set(made) == set(state)
    for name, tensor in state.items():
        torch.testing.assert_close(made[name], tensor, rtol=0, atol=1e-6 if name == "pos_embed" else 0)
    assert export.parent.name == "export"
    assert not list(export.rglob("*.pt"))
    assert "load_file" in (export / "README.md").read_text()
    back = convert(export)  # the number of heads is known from finectl.json
    assert torch.equal(outputs(back), outputs(model))


def test_a_diffusers_dit_computes_the_same(workspace: Path, tmp_path: Path) -> None:
    theirs = diffusers_dit()
    theirs.save_pretrained(tmp_path / "dit")
    path = convert(tmp_path / "dit")
    torch.testing.assert_close(outputs(path), diffusers_outputs(theirs), **CLOSE)
    assert read_config(whole(path)).frequency_divisor == 127


def test_the_epsilon_of_a_diffusers_dit_is_kept(workspace: Path, tmp_path: Path) -> None:
    theirs = diffusers_dit(norm_eps=1e-2)
    theirs.save_pretrained(tmp_path / "dit")
    path = convert(tmp_path / "dit")
    torch.testing.assert_close(outputs(path), diffusers_outputs(theirs), **CLOSE)
    assert json.loads((path / "config.json").read_text())["mlp_norm_eps"] == 1e-2
    from diffusers import DiTTransformer2DModel

    back = DiTTransformer2DModel.from_pretrained(convert(path, "--to", "diffusers"))
    assert back.config.norm_eps == 1e-2


def test_the_class_of_older_checkpoints_is_known(workspace: Path, tmp_path: Path) -> None:
    from diffusers import Transformer2DModel

    new = diffusers_dit()
    options = {name: value for name, value in new.config.items() if not name.startswith("_")}
    options.pop("norm_eps")  # as in the published checkpoint, where it is 1e-5
    theirs = Transformer2DModel(**options, norm_eps=1e-5).eval()
    theirs.load_state_dict(new.state_dict())
    theirs.save_pretrained(tmp_path / "dit")
    values = json.loads((tmp_path / "dit/config.json").read_text())
    assert values.pop("norm_eps") == 1e-5
    (tmp_path / "dit/config.json").write_text(json.dumps({**values, "_class_name": "Transformer2DModel"}))
    path = convert(tmp_path / "dit")
    x, t, y = inputs()
    with torch.no_grad():
        wanted = theirs(x, timestep=t, class_labels=y).sample
    torch.testing.assert_close(outputs(path), wanted, **CLOSE)
    assert json.loads((path / "config.json").read_text())["mlp_norm_eps"] == 1e-5


def test_sharded_and_pickled_weights_of_diffusers_are_read(workspace: Path, tmp_path: Path) -> None:
    theirs = diffusers_dit()
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    theirs.save_pretrained(tmp_path / "bin", safe_serialization=False)
    wanted = diffusers_outputs(theirs)
    for name in ("shards", "bin"):
        torch.testing.assert_close(outputs(convert(tmp_path / name)), wanted, **CLOSE)


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_a_dit_goes_to_diffusers_and_back(workspace: Path, tmp_path: Path, learn_sigma: bool) -> None:
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    theirs = diffusers_dit(out_channels=CHANNELS * (2 if learn_sigma else 1))
    theirs.save_pretrained(tmp_path / "dit")
    model = convert(tmp_path / "dit")
    export = convert(model, "--to", "diffusers")
    loaded = DiTTransformer2DModel.from_pretrained(export).eval()
    assert loaded.config.num_embeds_ada_norm == 1000
    torch.testing.assert_close(diffusers_outputs(loaded, null=1000), outputs(model), **CLOSE)
    table = loaded.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight
    assert table.shape[0] == 1001
    assert not table[CLASSES:1000].any()
    scheduler = DDIMScheduler.from_pretrained(export, subfolder="scheduler")
    assert (scheduler.config.beta_schedule, scheduler.config.beta_end) == ("linear", 0.02)
    back = convert(export)
    assert read_config(whole(back)) == read_config(whole(model))
    assert torch.equal(outputs(back), outputs(model))
    # Fine-tuned elsewhere, the padding is undone by name.
    loaded.save_pretrained(tmp_path / "tuned")
    tuned = convert(tmp_path / "tuned", "--num-classes", CLASSES)
    assert torch.equal(outputs(tuned), outputs(model))
    assert read_config(whole(convert(tmp_path / "tuned"))).num_classes == 1000


def test_crossing_the_frequency_divisor_is_said_and_is_what_changes(workspace: Path, tmp_path: Path) -> None:
    from diffusers import DiTTransformer2DModel

    state = published_state()
    torch.save(state, tmp_path / "dit.pt")
    model = convert(tmp_path / "dit.pt", "--heads", HEADS)
    ran = run_cli("convert", model, "--to", "diffusers")
    assert "over 128" in ran.err
    assert "over 127" in ran.err
    loaded = DiTTransformer2DModel.from_pretrained(ran.path).eval()
    with_127 = published_forward(state, *inputs(), divisor=127)
    torch.testing.assert_close(diffusers_outputs(loaded, null=1000), with_127, **CLOSE)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(with_127, outputs(model), **CLOSE)
    assert read_config(whole(convert(ran.path))).frequency_divisor == 128  # untouched: what it was trained with


def test_a_dit_pipeline_runs_with_guidance_on_ten_classes(workspace: Path, tmp_path: Path) -> None:
    from diffusers import DiTPipeline

    diffusers_dit().save_pretrained(tmp_path / "dit")
    diffusers_vae().save_pretrained(tmp_path / "vae")
    model = convert(tmp_path / "dit")
    export = convert(model, "--to", "diffusers", "--vae", tmp_path / "vae")
    pipeline = DiTPipeline.from_pretrained(export)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([3, 9], guidance_scale=4.0, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, SIDE, SIDE, 3)
    assert not pipeline.scheduler.config.clip_sample  # latents are not bounded
    back = convert(export, "--components", "copy")
    assert torch.equal(outputs(back), outputs(model))
    assert (back / "components/vae/config.json").is_file()


def test_labels_and_parts_of_a_pipeline_survive(workspace: Path, tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, DiTPipeline

    scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    DiTPipeline(diffusers_dit(), diffusers_vae(), scheduler).save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe/model_index.json").read_text())
    index["id2label"] = {str(number): f"name {number}" for number in range(CLASSES)}
    (tmp_path / "pipe/model_index.json").write_text(json.dumps(index))
    model = convert(tmp_path / "pipe")
    kept = json.loads((model / "components.json").read_text())["components"]
    assert set(kept) == {"vae", "scheduler"}
    assert kept["vae"]["source"] == str(tmp_path / "pipe")
    config = read_config(whole(model))
    assert (config.diffusion.beta_schedule, config.diffusion.prediction) == ("scaled_linear", "v_prediction")
    export = convert(model, "--to", "diffusers")
    pipeline = DiTPipeline.from_pretrained(export)
    assert pipeline.get_label_ids(["name 7"]) == [7]
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert run_cli("sample", model, "--samples", 2, "--sampling-steps", 2, "--guidance", 2).code == 0
    bare = convert(model, "--to", "diffusers", "--components", "none")
    assert (bare / "config.json").is_file()
    assert not (bare / "vae").exists()


@pytest.mark.parametrize("classes", [0, 4])
def test_a_unet_goes_both_ways(workspace: Path, tmp_path: Path, classes: int) -> None:
    from diffusers import DDPMPipeline, UNet2DModel

    theirs = diffusers_unet(num_class_embeds=classes or None)
    theirs.save_pretrained(tmp_path / "unet")
    model = convert(tmp_path / "unet")
    x, t, y = inputs(1, classes=classes)
    y = y.clamp(max=max(classes - 1, 0))
    labels = {"class_labels": y} if classes else {}
    with torch.no_grad():
        wanted = theirs(x, t, **labels).sample
        torch.testing.assert_close(load_model(whole(model)).eval()(x, t, y), wanted, **CLOSE)
    config = read_config(whole(model))
    assert config.parameters == sum(parameter.numel() for parameter in theirs.parameters())  # type: ignore[union-attr]
    export = convert(model, "--to", "diffusers")
    if classes:
        loaded = UNet2DModel.from_pretrained(export).eval()
    else:
        pipeline = DDPMPipeline.from_pretrained(export)
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, SIDE, SIDE, 1)
        loaded = pipeline.unet.eval()
    with torch.no_grad():
        assert torch.equal(loaded(x, t, **labels).sample, wanted)
    back = convert(export)
    assert (back / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_a_unet_pipeline_with_old_attention_names_and_a_cosine_schedule(workspace: Path, tmp_path: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler

    theirs = diffusers_unet(in_channels=3, out_channels=6)
    DDPMPipeline(theirs, DDPMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(tmp_path / "pipe")
    weights = tmp_path / "pipe/unet/diffusion_pytorch_model.safetensors"
    renames = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old = {}
    for name, tensor in load_file(weights).items():
        former = name
        for new, replaced in renames.items():
            former = former.replace(new, replaced)
        old[former] = tensor
    assert any(".query." in name for name in old)
    save_file(old, weights)
    model = convert(tmp_path / "pipe")
    config = read_config(whole(model))
    assert config.learn_sigma
    assert config.diffusion.beta_schedule == "squaredcos_cap_v2"
    with torch.no_grad():
        x, t, y = inputs(3, classes=0)
        torch.testing.assert_close(load_model(whole(model)).eval()(x, t, y), theirs(x, t).sample, **CLOSE)


def test_a_table_with_a_null_class_can_be_guided(workspace: Path, tmp_path: Path) -> None:
    diffusers_unet(num_class_embeds=11).save_pretrained(tmp_path / "unet")
    plain = convert(tmp_path / "unet")
    refused = run_cli("sample", plain, "--samples", 1, "--sampling-steps", 1, "--guidance", 2)
    assert refused.code == 2
    assert "null class" in refused.err
    model = convert(tmp_path / "unet", "--num-classes", 10)
    config = read_config(whole(model))
    assert (config.num_classes, config.has_null_class, config.label_dropout) == (10, True, 0.1)
    assert run_cli("sample", model, "--samples", 2, "--sampling-steps", 2, "--guidance", 2).code == 0


def test_a_unet_is_trained_measured_and_sampled(workspace: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    theirs = diffusers_unet(num_class_embeds=11)
    theirs.save_pretrained(tmp_path / "unet")
    model = convert(tmp_path / "unet", "--num-classes", 10)
    assert run_cli("train", model, "--data", "digits", "--dry-run").code == 0
    trained = run_cli("train", model, "--data", "digits", "--steps", 2, "--batch-size", 4, "--eval-every", 0).path
    assert json.loads((trained / "config.json").read_text()) == json.loads((model / "config.json").read_text())
    before, after = load_file(model / "model.safetensors"), load_file(trained / "model.safetensors")
    assert set(before) == set(after) == set(load_file(trained / "ema.safetensors"))
    assert not torch.equal(before["unet.conv_in.weight"], after["unet.conv_in.weight"])
    evaluated = run_cli("evaluate", trained, "--metrics", "loss", "--draws", 1).path
    row = json.loads((evaluated / "metrics.json").read_text())[0]
    assert row["parameters"] == sum(parameter.numel() for parameter in theirs.parameters())
    assert row["loss"]["value"] > 0
    assert run_cli("sample", trained, "--samples", 2, "--sampling-steps", 2).code == 0
    loaded = UNet2DModel.from_pretrained(convert(trained, "--to", "diffusers", "--weights", "raw"))
    assert torch.equal(loaded.conv_in.weight, after["unet.conv_in.weight"])


def test_an_unconditional_unet_ignores_the_labels_of_the_data(workspace: Path, tmp_path: Path) -> None:
    diffusers_unet().save_pretrained(tmp_path / "unet")
    model = convert(tmp_path / "unet")
    arguments = ("--data", "digits", "--steps", 1, "--batch-size", 4, "--eval-every", 0)
    trained = run_cli("train", model, *arguments).path
    sampled = run_cli("sample", trained, "--samples", 2, "--sampling-steps", 1).path
    assert load_file(sampled / "samples.safetensors")["images"].shape == (2, 1, SIDE, SIDE)


@pytest.mark.parametrize("way", ["reference", "copy"])
def test_stable_diffusion_goes_both_ways(workspace: Path, tmp_path: Path, way: str) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    encoder, tokenizer = text_parts(tmp_path / "words")
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    theirs = text_unet()
    pipeline = StableDiffusionPipeline(
        vae=diffusers_vae(), text_encoder=encoder, tokenizer=tokenizer, unet=theirs, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "sd")
    model = convert(tmp_path / "sd", "--components", way)
    copied = sorted(path.name for path in (model / "components").glob("*")) if way == "copy" else []
    assert copied == (["scheduler", "text_encoder", "tokenizer", "vae"] if way == "copy" else [])
    config = read_config(whole(model))
    assert config.diffusion.beta_schedule == "scaled_linear"
    network = load_any_model(whole(model)).eval()
    assert isinstance(network, TextUNet)
    x, t, _ = inputs()
    text = torch.randn(len(x), 5, 12, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = theirs(x, t, encoder_hidden_states=text).sample
        torch.testing.assert_close(network(x, t, text), wanted, **CLOSE)
    export = convert(model, "--to", "diffusers")
    loaded = StableDiffusionPipeline.from_pretrained(export)
    with torch.no_grad():
        assert torch.equal(loaded.unet.eval()(x, t, encoder_hidden_states=text).sample, wanted)
    assert loaded.scheduler.config.beta_end == 0.012
    assert not [path for path in export.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    made = run_cli("sample", model, "--prompt", "a b", "--samples", 1, "--sampling-steps", 1, "--guidance", 2).path
    assert json.loads((made / "prompts.json").read_text()) == ["a b"]
    config_of_run = whole(made).manifest.config
    place = model / "components" if way == "copy" else tmp_path / "sd"
    assert config_of_run["text_encoder"] == str(place / "text_encoder") and config_of_run["text_digest"]
    unnamed = run_cli("sample", model)
    assert unnamed.code == 2 and "--prompts FILE" in unnamed.err
    uncaptioned = run_cli("train", model, "--data", "latents:/nowhere")
    assert uncaptioned.code == 3 and "latents" in uncaptioned.err


def test_weights_without_the_average_of_stable_diffusion_are_the_raw_ones(workspace: Path, tmp_path: Path) -> None:
    averaged, raw = diffusers_unet(), diffusers_unet(norm_eps=1e-5)
    averaged.save_pretrained(tmp_path / "unet")
    with torch.no_grad():
        raw.conv_in.bias += 1
    save_file(dict(raw.state_dict()), tmp_path / "unet/diffusion_pytorch_model.non_ema.safetensors")
    model = convert(tmp_path / "unet")
    assert torch.equal(load_file(model / "ema.safetensors")["unet.conv_in.bias"], averaged.conv_in.bias)
    assert torch.equal(load_file(model / "model.safetensors")["unet.conv_in.bias"], raw.conv_in.bias)


def test_a_condensed_model_is_exported_dense(workspace: Path, tmp_path: Path) -> None:
    arguments = ("--depth", DEPTH, "--steps", 1, "--batch-size", 4, "--frequency-divisor", 127)
    condensed = run_cli("condense", *arguments).path
    from diffusers import DiTTransformer2DModel

    export = convert(condensed, "--to", "diffusers")
    loaded = DiTTransformer2DModel.from_pretrained(export).eval()
    x, t, y = inputs(1)
    with torch.no_grad():
        wanted = load_model(whole(condensed)).eval()(x, t, y)
        found = loaded(x, t, class_labels=torch.where(y == CLASSES, 1000, y)).sample
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_the_same_content_elsewhere_is_the_same_model(workspace: Path, tmp_path: Path) -> None:
    torch.save(published_state(), tmp_path / "dit.pt")
    first = convert(tmp_path / "dit.pt", "--heads", HEADS)
    (tmp_path / "moved").mkdir()
    (tmp_path / "dit.pt").rename(tmp_path / "moved/dit.pt")
    assert convert(tmp_path / "moved/dit.pt", "--heads", HEADS) == first
    torch.save(published_state(5), tmp_path / "dit.pt")
    assert convert(tmp_path / "dit.pt", "--heads", HEADS) != first


def test_a_manifest_makes_the_model_again_and_checks_the_source(workspace: Path, tmp_path: Path) -> None:
    torch.save(published_state(), tmp_path / "dit.pt")
    first = convert(tmp_path / "dit.pt", "--heads", HEADS)
    ran = run_cli("convert", "--recipe", first / "manifest.yaml", "--out", tmp_path / "again")
    assert (ran.path / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    torch.save(published_state(5), tmp_path / "dit.pt")
    refused = run_cli("convert", "--recipe", first / "manifest.yaml", "--out", tmp_path / "third")
    assert refused.code == 3
    assert "digest" in refused.err


def test_a_dry_run_counts_parameters_and_writes_nothing(workspace: Path, tmp_path: Path) -> None:
    theirs = diffusers_unet()
    theirs.save_pretrained(tmp_path / "unet")
    ran = run_cli("convert", tmp_path / "unet", "--dry-run", "--json")
    assert json.loads(ran.out)["parameters"] == sum(parameter.numel() for parameter in theirs.parameters())
    assert not workspace.exists()


@pytest.mark.parametrize("sharded", [False, True])
def test_a_hub_id_is_read_from_the_cache_whose_files_are_links(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
    from huggingface_hub import constants

    theirs = diffusers_dit()
    pipeline = DiTPipeline(theirs, diffusers_vae(), DDIMScheduler())
    repository = tmp_path / "hub/models--someone--tiny-dit"
    snapshot = repository / "snapshots" / ("0" * 40)
    pipeline.save_pretrained(snapshot)
    if sharded:
        (snapshot / "transformer/diffusion_pytorch_model.safetensors").unlink()
        theirs.save_pretrained(snapshot / "transformer", max_shard_size="50KB")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        blob = path.rename(repository / "blobs" / str(number))
        path.symlink_to(blob)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = convert("someone/tiny-dit")
    torch.testing.assert_close(outputs(model), diffusers_outputs(theirs), **CLOSE)
    kept = json.loads((model / "components.json").read_text())["components"]
    assert kept["vae"]["source"] == "someone/tiny-dit"
    export = convert(model, "--to", "diffusers")
    assert not [path for path in export.rglob("*") if path.is_symlink()]
    loaded = DiTPipeline.from_pretrained(export).transformer.eval()
    assert isinstance(loaded, DiTTransformer2DModel)
    torch.testing.assert_close(diffusers_outputs(loaded, null=1000), outputs(model), **CLOSE)


def test_a_plan_needs_no_torch(workspace: Path, tmp_path: Path) -> None:
    diffusers_dit().save_pretrained(tmp_path / "dit")
    torch.save(published_state(), tmp_path / "dit.pt")
    model = convert(tmp_path / "dit")
    for arguments in ((tmp_path / "dit",), (tmp_path / "dit.pt",), (model, "--to", "diffusers")):
        call = ["convert", *map(str, arguments), "--dry-run"]
        code = f"import sys; from finectl.cli.main import main; main({call!r}); print('torch' in sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=child_environment()
        )
        assert done.stdout == "False\n", done.stderr
        assert "parameters" in done.stderr
