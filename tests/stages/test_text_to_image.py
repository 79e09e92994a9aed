"""Text to image through every stage: a tiny UNet of text, captions, and an encoder without weights."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support import ROOT, run_cli, tiny_clip, tiny_vae, weights, whole

from finectl.artifacts.tensors import load_tensors
from finectl.data.captions import captions_of
from finectl.data.dataset import load
from finectl.data.sources import DataOptions
from finectl.errors import EXIT_INPUT, EXIT_USAGE
from finectl.models.io import load_any_model, read_config
from finectl.models.unet_config import UNetConfig
from finectl.training import run as training_run

FEW = ("--batch-size", 8, "--eval-every", 0)
QUICK = ("--sampling-steps", 2)
SMALL = ("--data", "photos", "--image-size", 12)
WORDS = ("red", "green", "blue", "black", "white")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A workspace with a model, the same one trained, and experts of it."""
    root = tmp_path_factory.mktemp("text")
    place = ("--workspace", root)
    base = run_cli("init", "--method", "he", "--model", "unet-text-nano", "--text-encoder", "hash", *place).path
    trained = run_cli("train", base, "--steps", 3, *FEW, *place).path
    experts = run_cli("finetune-ranges", trained, "--ranges", 2, "--steps", 2, *FEW, *place).path
    return {"root": root, "base": base, "trained": trained, "experts": experts}


@pytest.fixture
def here(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    monkeypatch.setenv("FINECTL_WORKSPACE", str(made["root"]))
    yield made


def pictures(folder: Path, count: int = 20, missing: int | None = None) -> Path:
    folder.mkdir()
    lines = []
    for index in range(count):
        Image.new("RGB", (16, 16), (12 * index, 40, 200 - 9 * index)).save(folder / f"{index:02}.png")
        if index != missing:
            lines.append(json.dumps({"file_name": f"{index:02}.png", "text": f"a {WORDS[index % 5]} square"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def heldout_captions() -> list[str]:
    options = DataOptions(captions="all")
    held = load("digits", "heldout", None, options)
    texts = captions_of(held.info, options, held.store.labels.tolist())
    return [texts[index] for index in held.indices.tolist()]


def test_the_saved_model_is_the_unet_alone_and_the_manifest_says_with_which_texts(here: dict[str, Path]) -> None:
    base, trained = whole(here["base"]), whole(here["trained"])
    config = read_config(trained)
    assert config == read_config(base) and config.num_classes == 0
    assert "text_length" not in json.loads((here["trained"] / "config.json").read_text())
    state = load_tensors(here["trained"] / "model.safetensors")
    assert set(state) == set(load_any_model(base).state_dict())
    before = load_tensors(here["base"] / "model.safetensors")
    assert not torch.equal(state["unet.conv_in.weight"], before["unet.conv_in.weight"])
    for artifact in (base, trained, whole(here["experts"])):
        data = artifact.manifest.data
        assert data["text"] == {"name": "hash", "digest": data["text"]["digest"], "length": 32, "width": 64}
        assert len(data["captions"]) == 64
    assert trained.manifest.config["caption_dropout"] == 0.1
    assert trained.manifest.cost["flops"] > 0


def test_interrupted_training_goes_on_bit_for_bit(here: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    command = ("train", here["base"], "--steps", 6, "--save-every", 2, "--caption-dropout", 0.5, *FEW, "--workspace")
    unbroken = weights(run_cli(*command, tmp_path / "a").path)
    step_of, seen = training_run.train_step, []

    def broken(run: Any, step: int) -> Any:
        seen.append(step)
        if step == 5:
            raise RuntimeError("power cut")
        return step_of(run, step)

    with monkeypatch.context() as patched:
        patched.setattr("finectl.training.loop.train_step", broken)
        assert run_cli(*command, tmp_path / "b").code == 1
    resumed = run_cli(*command, tmp_path / "b")
    assert seen == [0, 1, 2, 3, 4, 5] and weights(resumed.path) == unbroken
    other = run_cli("train", here["base"], "--steps", 6, "--caption-dropout", 0, *FEW, "--workspace", tmp_path / "c")
    assert weights(other.path) != unbroken, "leaving captions out does nothing"


def test_captions_decide_what_is_learned(here: dict[str, Path], tmp_path: Path) -> None:
    base = here["base"]
    found = {}
    for name, texts in (("told", WORDS), ("same", ("red",) * 5)):
        folder = tmp_path / name
        folder.mkdir()
        for index in range(10):
            Image.new("L", (8, 8), 20 * index).save(folder / f"{index}.png")
            (folder / f"{index}.txt").write_text(f"a {texts[index % 5]} square")
        ran = run_cli("train", base, "--data", f"folder:{folder}", "--steps", 2, *FEW, "--lr", 1e-3)
        found[name] = weights(ran.path)
    assert found["told"] != found["same"]


def test_an_image_without_a_caption_is_one_clear_error(here: dict[str, Path], tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", missing=7)
    ran = run_cli("train", here["base"], "--data", f"folder:{folder}", "--image-size", 8)
    assert ran.code == EXIT_INPUT and "07.png" in ran.err and ran.err.count("error:") == 1
    bare = tmp_path / "bare"
    bare.mkdir()
    Image.new("L", (8, 8)).save(bare / "0.png")
    ran = run_cli("train", here["base"], "--data", f"folder:{bare}")
    assert ran.code == EXIT_INPUT and "no captions" in ran.err and "metadata.jsonl" in ran.err


def test_another_encoder_is_refused(here: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    clip = tiny_clip(tmp_path / "clip", width=64)
    for stage in ("train", "sample", "evaluate", "finetune-ranges"):
        ran = run_cli(stage, here["trained"], "--text-encoder", clip)
        assert ran.code == EXIT_INPUT and "this encoder is" in ran.err and str(clip) in ran.err
    ran = run_cli("merge", here["experts"], "--text-encoder", clip)
    assert ran.code == EXIT_INPUT and "this encoder is" in ran.err
    fits = run_cli("init", "--method", "he", "--model", "unet-text-nano", "--text-encoder", clip)
    config = read_config(whole(fits.path))
    assert isinstance(config, UNetConfig) and config.network["cross_attention_dim"] == 64
    assert run_cli("train", fits.path, "--steps", 1, *FEW).code == 0
    shutil.rmtree(clip)
    ran = run_cli("train", fits.path, "--steps", 2, *FEW)
    assert ran.code == EXIT_INPUT and "--text-encoder PATH" in ran.err


def test_prompts_are_the_heldout_captions_or_those_that_are_named(here: dict[str, Path], tmp_path: Path) -> None:
    trained = here["trained"]
    plain = run_cli("sample", trained, "--samples", 4, *QUICK).path
    assert json.loads((plain / "prompts.json").read_text()) == heldout_captions()[:4]
    labels = load_tensors(plain / "samples.safetensors")["labels"].tolist()
    assert [f"a photo of the digit {label}" for label in labels] == heldout_captions()[:4]
    (tmp_path / "a.txt").write_text("\n  one three \n\ntwo\n")
    shutil.copy(tmp_path / "a.txt", tmp_path / "b.txt")
    command = ("sample", trained, "--samples", 3, *QUICK, "--prompt", "a dog")
    named = run_cli(*command, "--prompts", tmp_path / "a.txt").path
    assert json.loads((named / "prompts.json").read_text()) == ["one three", "two", "a dog"]
    assert run_cli(*command, "--prompts", tmp_path / "b.txt").path == named, "the same prompts elsewhere"
    piped = run_cli(*command, "--prompts", "-", stdin="one three\ntwo\n").path
    assert weights(piped) == weights(named)
    images = load_tensors(named / "samples.safetensors")["images"]
    assert not torch.equal(images, load_tensors(plain / "samples.safetensors")["images"][:3])
    guided = [
        run_cli("sample", trained, "--samples", 1, *QUICK, "--guidance", g, "--prompt", "x").path for g in (0, 1, 5)
    ]
    empty = run_cli("sample", trained, "--samples", 1, *QUICK, "--prompt", " ").path
    assert len({bytes(weights(path)["samples.safetensors"]) for path in guided}) == 3
    assert weights(guided[0]) == weights(empty), "guidance 0 is the empty prompt, the last row"


def test_wrong_calls(here: dict[str, Path], chain: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    for stage, arguments, code, says in (
        ("sample", (here["trained"], "--labels", "1"), EXIT_USAGE, "--prompt TEXT"),
        ("sample", (chain.model, "--prompt", "x"), EXIT_USAGE, "not conditioned on text"),
        ("sample", (here["trained"], "--prompts", tmp_path / "gone.txt"), EXIT_INPUT, "cannot be read"),
        ("sample", (here["trained"], "--prompts", tmp_path / "empty.txt"), EXIT_INPUT, "no prompts"),
        ("train", (chain.model, "--text-encoder", "hash"), EXIT_USAGE, "not conditioned on text"),
        ("train", (chain.model, "--caption-dropout", 0.2), EXIT_USAGE, "not conditioned on text"),
        ("evaluate", (here["trained"], chain.model), EXIT_INPUT, "not conditioned on the same"),
        ("init", ("--method", "he", "--model", "unet-text-nano"), EXIT_USAGE, "--text-encoder hash"),
        ("init", ("--method", "he", "--model", "unet-nano", "--text-encoder", "hash"), EXIT_USAGE, "unet-text-nano"),
        ("init", ("--method", "he", "--model", "unet-sd14", "--text-encoder", "hash", *SMALL), EXIT_USAGE, "of 8"),
    ):
        ran = run_cli(stage, *arguments)
        assert ran.code == code and says in ran.err, (stage, arguments, ran.err)


def test_models_without_text_keep_the_names_of_their_artifacts(chain: Any) -> None:
    from dataclasses import asdict, replace

    from finectl.artifacts.store import open_artifact
    from finectl.runner import recipe_of
    from finectl.stages.train import STAGE, plan

    manifest = open_artifact(chain.model).manifest
    fields = STAGE.config.__dataclass_fields__
    config = STAGE.config(**{name: value for name, value in manifest.config.items() if name in fields})
    parents = [open_artifact(chain.init)]
    planned = plan(config, parents)
    assert recipe_of(STAGE, planned, parents, STAGE.reads(config)) == manifest.recipe
    before = {k: v for k, v in asdict(planned.config).items() if k not in ("text_encoder", "text_digest")}
    del before["caption_dropout"]
    stub = replace(planned, config=_as_dataclass(before))
    assert recipe_of(replace(STAGE, unchanged_at={}), stub, parents, STAGE.reads(config)) == manifest.recipe


def _as_dataclass(values: dict[str, Any]) -> Any:
    from dataclasses import make_dataclass

    return make_dataclass("Before", list(values))(**values)


def test_experts_and_merged_models_are_measured_like_any_others(here: dict[str, Path]) -> None:
    trained, experts = here["trained"], here["experts"]
    merged = run_cli("merge", experts, "--weights", "1,0").path
    assert whole(merged).manifest.data["text"]["name"] == "hash"
    some = ("--samples", 24, *QUICK, "--draws", 1, "--allow-few")
    table = run_cli("evaluate", trained, experts, merged, *some).path
    rows = json.loads((table / "metrics.json").read_text())
    assert [set(row) >= {"loss", "frechet", "accuracy"} for row in rows] == [True] * 3
    assert len({row["loss"]["value"] for row in rows}) == 3
    assert rows[0]["loss"]["protocol"]["text_encoder"] == whole(trained).manifest.data["text"]["digest"]
    searched = run_cli(
        "merge", experts, "--grid-step", 1, "--objective", "loss", "--search-samples", 300, "--rescored", 1
    )
    manifest = whole(searched.path).manifest
    controls = {row["name"]: row["value"] for row in manifest.metrics["controls"]}
    assert controls["merged"] == min(controls[name] for name in ("merged", "theta_0", "sum"))
    assert len({round(value, 6) for name, value in controls.items() if name != "merged"}) >= 4
    assert manifest.config["text_digest"] == manifest.data["text"]["digest"]
    pictures_of = run_cli("sample", "--ensemble", experts, "--samples", 2, *QUICK, "--guidance", 3).path
    assert json.loads((pictures_of / "prompts.json").read_text()) == heldout_captions()[:2]


def test_what_fine_tuning_did_is_analysed_with_captions(here: dict[str, Path]) -> None:
    few = ("--timesteps", 2, "--images", 4, "--draws", 1, "--grid", 3)
    ran = run_cli("analyse", here["experts"], *few)
    found = json.loads((ran.path / "metrics.json").read_text())
    assert set(found) >= {"norms", "cosines", "gradients", "landscape", "activations"}
    assert whole(ran.path).manifest.config["text_encoder"] == "hash"


def test_teacher_and_student_share_one_table_and_the_consistency_counts(
    here: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from finectl.training import texts

    given: list[Any] = []
    put = texts.condition
    monkeypatch.setattr(
        texts, "condition", lambda model, table, dropout: (given.append(table), put(model, table, dropout))
    )
    command = ("finetune-ranges", here["trained"], "--ranges", 2, "--only", 0, "--steps", 2, *FEW, "--seed", 5)
    held = run_cli(*command).path
    assert len(given) == 2 and given[0] is given[1]
    assert weights(held) != weights(run_cli(*command, "--consistency", 0).path)


def test_latents_carry_captions_to_a_pipeline_and_back_to_diffusers(workspace: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    folder, clip = pictures(tmp_path / "p"), tiny_clip(tmp_path / "clip")
    vae = tiny_vae(tmp_path / "vae", channels=3)
    latents = run_cli("encode", "--data", f"folder:{folder}", "--vae", vae, "--shard-size", 8).path
    texts = json.loads((latents / "captions.json").read_text())
    assert texts[:2] == ["a red square", "a green square"] and len(texts) == 20
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=4, cross_attention_dim=16,
    )  # fmt: skip
    from transformers import CLIPTextModel, CLIPTokenizer

    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL.from_pretrained(vae), unet=unet,
        text_encoder=CLIPTextModel.from_pretrained(clip / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(clip / "tokenizer"), scheduler=diffusers.PNDMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(tmp_path / "sd")
    model = run_cli("convert", tmp_path / "sd").path
    data = ("--data", f"latents:{latents}")
    experts = run_cli("finetune-ranges", model, "--ranges", 2, "--steps", 1, *FEW, *data, "--projection", "none").path
    assert whole(experts).manifest.data["text"]["name"] == str(tmp_path / "sd" / "text_encoder")
    merged = run_cli("merge", experts, "--weights", "0.5,0.5").path
    drawn = run_cli("sample", merged, "--samples", 2, *QUICK, "--scheduler", "pndm", "--guidance", 7.5).path
    assert load_tensors(drawn / "samples.safetensors")["images"].shape == (2, 3, 16, 16)
    exported = run_cli("convert", merged, "--to", "diffusers").path
    ours = load_any_model(whole(merged)).eval()
    theirs = diffusers.UNet2DConditionModel.from_pretrained(
        exported / "unet" if (exported / "unet").is_dir() else exported
    ).eval()
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 8, 16)
    with torch.no_grad():
        assert torch.equal(ours(x, t, text), theirs(x, t, encoder_hidden_states=text).sample)  # type: ignore[operator]


def test_latents_of_images_without_captions_are_what_they_were(workspace: Path, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p")
    (folder / "metadata.jsonl").unlink()
    latents = run_cli("encode", "--data", f"folder:{folder}", "--vae", tiny_vae(tmp_path / "vae", channels=3)).path
    assert not (latents / "captions.json").exists()
    assert "captions" not in json.loads((latents / "index.json").read_text())


def test_clip_score_of_a_model_takes_its_captions_for_prompts(here: dict[str, Path]) -> None:
    ran = run_cli("evaluate", here["trained"], "--metrics", "clip-score", "--clip", "/nowhere")
    assert ran.code == EXIT_INPUT and "/nowhere" in ran.err, "it gets as far as the network"


def test_the_papers_recipe_plans_experts_of_latents_with_captions(workspace: Path) -> None:
    data = ("--data", "shape:4x64x64:1")
    new = ("init", "--method", "he", "--text-encoder", "hash", *data, "--model")
    sizes = run_cli(*new, "unet-sd14", "--dry-run", "--json")
    assert json.loads(sizes.out)["parameters"] == 859_520_964
    model = run_cli(*new, "unet-text-nano").path
    recipe = ("--recipe", ROOT / "recipes" / "deme-sd14.yaml", "--dry-run", "--json")
    plan = json.loads(run_cli("finetune-ranges", model, *recipe, "--only", 3).out)
    assert plan["config"]["text_encoder"] == "hash" and plan["config"]["p"] == 0.3 and plan["config"]["flip"] is True
    assert plan["data"]["text"]["width"] == 64 and plan["step_s"] > 0 and plan["range"] == [750, 1000]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_stable_diffusion_from_a_step_to_diffusers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SD-1.4's UNet with random weights: a step of an expert, merge, fold, export, reload with equal outputs.

    Weights, gradients, two moments and the average take 16 GiB; a teacher would take 3.2 more, and is left out.
    """
    available = available_gib()
    if available < 22 or shutil.disk_usage(tmp_path).free < 40 * 2**30:
        pytest.skip(f"{available:.1f} GiB of memory are available, 22 are needed, and 40 GiB of disk")
    import diffusers

    monkeypatch.setenv("FINECTL_WORKSPACE", str(tmp_path / "artifacts"))
    folder, vae = pictures(tmp_path / "p", count=5), tiny_vae(tmp_path / "vae", channels=3)
    data = f"latents:{run_cli('encode', '--data', f'folder:{folder}', '--vae', vae).path}"
    base = run_cli("init", "--method", "he", "--model", "unet-sd14", "--text-encoder", "hash", "--data", data).path
    config = read_config(whole(base))
    assert isinstance(config, UNetConfig) and config.parameters == 859_520_964
    one = ("--ranges", 1, "--steps", 1, "--batch-size", 1, "--eval-every", 0, "--consistency", 0, "--lr", 1e-3)
    experts = run_cli("finetune-ranges", base, *one, "--projection", "foldable").path
    before, after = load_tensors(base / "model.safetensors"), load_tensors(experts / "experts/0/model.safetensors")
    assert all(not torch.equal(before[name], after[name]) for name in list(before)[::50])
    del before, after
    layered = run_cli("merge", experts, "--weights", 0.5).path
    folded = run_cli("merge", experts, "--weights", 0.5, "--fold").path
    assert read_config(whole(folded)) == config
    exported = run_cli("convert", folded, "--to", "diffusers", "--components", "none").path
    random = torch.Generator().manual_seed(0)
    x, t = torch.randn(1, 4, 8, 8, generator=random), torch.tensor([300])
    text = torch.randn(1, 77, 768, generator=random)
    with torch.no_grad():
        wanted = load_any_model(whole(folded)).eval()(x, t, text)
        kept = load_any_model(whole(layered)).eval()(x, t, text)
        theirs = diffusers.UNet2DConditionModel.from_pretrained(exported).eval()
        made = theirs(x, t, encoder_hidden_states=text).sample
    assert torch.equal(made, wanted)
    assert (wanted - kept).abs().max() < 1e-4 * kept.abs().max()
    with capsys.disabled():
        print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


def available_gib() -> float:
    """Return the memory that a process can still take, GiB: what is free and what the system only caches."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), "0")
    return int(found) / 2**20
