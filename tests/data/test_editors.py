"""Diffusion editors and the paraphrasing language model, with tiny networks of random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_clip

from finectl.data.concepts import Concept
from finectl.data.concepts.paraphraser import Paraphraser, find_paraphraser, first_line, paraphraser_digest
from finectl.data.editors import EditOptions, load_editor, network_calls, parse_editor
from finectl.errors import InputError, UsageError

CPU = torch.device("cpu")
OPTIONS = EditOptions(steps=2, guidance=2.0, image_guidance=1.5, strength=1.0, size=None, seed=0)
CONCEPT = Concept("abc", "a b c", atoms=("abc",))
UNET: dict[str, Any] = {
    "sample_size": 8, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 16, "attention_head_dim": 4,
}  # fmt: skip
UP = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
KINDS = {
    "ip2p": "StableDiffusionInstructPix2PixPipeline",
    "sd-img2img": "StableDiffusionImg2ImgPipeline",
    "controlnet": "StableDiffusionControlNetImg2ImgPipeline",
}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import diffusers
    from transformers import CLIPTextModel, CLIPTokenizer

    root = tmp_path_factory.mktemp("pipelines")
    text = tiny_clip(root / "text")
    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "vae": diffusers.AutoencoderKL(
            in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4,
        ),
        "text_encoder": CLIPTextModel.from_pretrained(text / "text_encoder"),
        "tokenizer": CLIPTokenizer.from_pretrained(text / "tokenizer"),
        "scheduler": diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        "safety_checker": None, "feature_extractor": None,
    }  # fmt: skip
    for name, kind in KINDS.items():
        unet = diffusers.UNet2DConditionModel(in_channels=8 if name == "ip2p" else 4, **UNET, **UP)
        extra = {}
        if name == "controlnet":
            extra["controlnet"] = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
        pipe = getattr(diffusers, kind)(**parts, unet=unet, **extra, requires_safety_checker=False)
        pipe.save_pretrained(root / name)
    return {name: root / name for name in KINDS}


@pytest.mark.parametrize("name", KINDS)
def test_an_image_is_edited_the_same_way_whatever_its_batch(name: str, pipelines: dict[str, Path]) -> None:
    spec = parse_editor(f"{name}:{pipelines[name]}")
    editor = load_editor(spec, OPTIONS, CPU, "float32")
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = editor.edit(images, CONCEPT, [3, 4], 0)
    assert made.shape == images.shape and made.dtype == torch.uint8
    alone = editor.edit(images[1:], CONCEPT, [4], 0)
    assert (alone[0].int() - made[1].int()).abs().max() <= 1
    assert not torch.equal(editor.edit(images, CONCEPT, [3, 4], 1), made)
    assert not torch.equal(made[0], made[1])


def test_a_pipeline_is_found_and_hashed(pipelines: dict[str, Path], tmp_path: Path) -> None:
    spec = parse_editor(f"sd-img2img:{pipelines['sd-img2img']}")
    copy = tmp_path / "copy"
    shutil.copytree(pipelines["sd-img2img"], copy)
    assert parse_editor(f"sd-img2img:{copy}").digest == spec.digest
    (copy / "scheduler" / "scheduler_config.json").write_text("{}")
    assert parse_editor(f"sd-img2img:{copy}").digest != spec.digest
    with pytest.raises(InputError, match="has no controlnet"):
        parse_editor(f"controlnet:{copy}")
    (copy / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel", "sample_size": "x"}))
    with pytest.raises(InputError, match="diffusers cannot read it"):
        load_editor(parse_editor(f"sd-img2img:{copy}"), OPTIONS, CPU, "float32")
    shutil.rmtree(copy / "unet")
    with pytest.raises(InputError, match="has no unet"):
        parse_editor(f"sd-img2img:{copy}")
    with pytest.raises(InputError, match=r"model_index.json is missing"):
        parse_editor(f"ip2p:{tmp_path}")


def test_names_of_editors() -> None:
    assert str(parse_editor("builtin")) == "builtin"
    with pytest.raises(UsageError, match="did you mean 'ip2p'"):
        parse_editor("ip2:x")
    for text in ("builtin:x", "ip2p", "folder:"):
        with pytest.raises(UsageError):
            parse_editor(text)
    with pytest.raises(InputError):
        parse_editor("ip2p:/nowhere/at/all")
    assert network_calls(parse_editor("builtin"), OPTIONS) == 0


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("lm")
    vocabulary = ["<unk>", "<eos>", "a", "dog", "robot", "tin", "man", "red", "sea", "Text", "Other", "words", ":"]
    model = models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(vocabulary), n_positions=128, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_a_language_model_writes_the_same_for_the_same_seed(language_model: Path) -> None:
    model = Paraphraser(find_paraphraser(str(language_model)), CPU)
    state = torch.get_rng_state()
    first, again, other = (model.write("a robot", 2, seed) for seed in (1, 1, 2))
    assert first == again != other and 1 <= len(first) <= 2 and all(first)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_folder_that_is_no_language_model(language_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no language model"):
        find_paraphraser(str(tmp_path))
    copy = tmp_path / "copy"
    shutil.copytree(language_model, copy)
    digest = paraphraser_digest(copy)
    assert digest == paraphraser_digest(language_model)
    (copy / "config.json").write_text("{}")
    assert paraphraser_digest(copy) != digest
    with pytest.raises(InputError, match="transformers cannot read"):
        Paraphraser(copy, CPU)


@pytest.mark.parametrize(
    ("text", "line"),
    [("\n  1. a tin man\nmore", "a tin man"), ('"a dog."', "a dog."), ("- 'x y' ", "x y"), ("", ""), ("\n\n", "")],
)
def test_what_is_kept_of_a_models_text(text: str, line: str) -> None:
    assert first_line(text) == line
