"""CLIP models of open_clip as extractors, with a tiny network and random weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from extractor_tools import Harmful, clean_resized, image, run_python
from safetensors.torch import load_file, save_file

from finectl.errors import InputError, UsageError
from finectl.metrics.features import FeatureOptions, clip

NETWORK: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
IMAGES = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
PROMPTS = ["a photo of a dog", "a painting of two cats", "a photo of a dog", "The Number 7"]


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    import open_clip

    torch.manual_seed(0)
    return {name: tensor.contiguous() for name, tensor in open_clip.CLIP(**NETWORK).state_dict().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, state: dict[str, torch.Tensor]) -> Path:
    return written(tmp_path_factory.mktemp("clip") / "tiny", state)


@pytest.fixture(scope="module")
def tiny(folder: Path) -> clip.ClipFeatures:
    return load(folder)


def written(path: Path, state: dict[str, torch.Tensor], config: Any = NETWORK, images: Any = IMAGES) -> Path:
    """Write a model as open_clip does."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": images}))
    save_file(state, path / "open_clip_model.safetensors")
    return path


def describe(given: object) -> Any:
    return clip.describe(FeatureOptions(clip=str(given)))


def load(given: object, dtype: str = "float32") -> clip.ClipFeatures:
    options = FeatureOptions(clip=str(given), dtype=dtype)
    return clip.load(clip.describe(options), options, torch.device("cpu"))


def embedded(extractor: clip.ClipFeatures, count: int = 2) -> torch.Tensor:
    batch = torch.stack([extractor.prepare(image(seed=i)) for i in range(count)])
    return extractor.forward(batch, ["features"])["features"]


def test_embeddings_are_those_of_open_clip(tiny: clip.ClipFeatures, folder: Path) -> None:
    import open_clip

    extractor = tiny
    network = open_clip.create_model(f"local-dir:{folder}").eval()
    mean, std = (torch.tensor(IMAGES[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = [torch.from_numpy(clean_resized(image(seed=i), 32)).permute(2, 0, 1) for i in range(2)]
    batch = torch.stack([(one / 255 - mean) / std for one in pixels]).float()
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(PROMPTS)
    with torch.no_grad():
        images, texts = network.encode_image(batch), network.encode_text(tokens)
    assert extractor.outputs == {"features": 16}
    assert torch.allclose(embedded(extractor), images, atol=1e-5)
    found = extractor.encode_text(PROMPTS)
    assert found.shape == (4, 16) and torch.allclose(found, texts, atol=1e-5)
    assert torch.equal(found[0], found[2]) and not torch.allclose(found[0], found[1], atol=1e-2)


def test_any_number_of_prompts_in_any_order(tiny: clip.ClipFeatures) -> None:
    extractor = tiny
    prompts = [f"a photo of {i} apples" for i in range(70)]
    found = extractor.encode_text(prompts)
    assert torch.allclose(extractor.encode_text(prompts[::-1]), found.flip(0), atol=1e-6)
    assert torch.allclose(extractor.encode_text(prompts[66:67]), found[66:67], atol=1e-5)
    assert extractor.encode_text([]).shape == (0, 16)
    assert extractor.encode_text(["word " * 500]).isfinite().all()


def test_images_of_any_shape_and_grey_ones(tiny: clip.ClipFeatures) -> None:
    extractor = tiny
    for size in ((1, 1), (32, 32), (77, 31)):
        assert extractor.prepare(image(*size)).shape == (3, 32, 32)
    grey = image(channels=1)
    assert torch.equal(extractor.prepare(grey), extractor.prepare(grey.repeat(3, axis=2)))


def test_bfloat16_is_near_and_not_the_same(tiny: clip.ClipFeatures, folder: Path) -> None:
    exact, rough = tiny, load(folder, "bfloat16")
    for one, two in (
        (embedded(exact), embedded(rough)),
        (exact.encode_text(PROMPTS), rough.encode_text(PROMPTS)),
    ):
        assert two.dtype == torch.float32
        assert 1e-5 < (one - two).norm() / one.norm() < 0.05


def test_pickled_weights_are_read_where_there_are_no_others(
    tiny: clip.ClipFeatures, folder: Path, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    (tmp_path / "open_clip_config.json").write_bytes((folder / "open_clip_config.json").read_bytes())
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    assert describe(tmp_path).details["file"] == "open_clip_pytorch_model.bin"
    assert torch.equal(embedded(load(tmp_path)), embedded(tiny))
    torch.save({"state_dict": {f"module.{name}": t for name, t in state.items()}, "epoch": 1},
               tmp_path / "open_clip_pytorch_model.bin")  # fmt: skip
    assert torch.equal(embedded(load(tmp_path)), embedded(tiny))
    torch.save({**state, "x": Harmful()}, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(InputError, match="could run code"):
        load(tmp_path)


def test_all_that_decides_the_embeddings_is_in_the_digest(
    tiny: clip.ClipFeatures, folder: Path, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    digest = describe(folder).digest
    assert describe(written(tmp_path / "copy", state)).digest == digest
    assert describe(written(tmp_path / "gelu", state, {**NETWORK, "quick_gelu": True})).digest != digest
    assert describe(written(tmp_path / "mean", state, images={**IMAGES, "mean": [0.1, 0.2, 0.3]})).digest != digest
    changed = {**state, "ln_final.bias": state["ln_final.bias"] + 1}
    assert describe(written(tmp_path / "values", changed)).digest != digest
    assert (embedded(load(tmp_path / "gelu")) - embedded(tiny)).abs().max() > 1e-4


def test_means_are_openais_where_the_configuration_has_none(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": NETWORK}))
    save_file(state, tmp_path / "open_clip_model.safetensors")
    white = load(tmp_path).prepare(image(8, 8) * 0 + 255)
    expected = [(1 - mean) / std for mean, std in zip(clip.MEAN, clip.STD, strict=True)]
    assert white[:, 0, 0].tolist() == pytest.approx(expected, rel=1e-5)
    assert describe(tmp_path).resize == "clean bicubic 32"


def test_the_scale_of_the_loss_does_not_count(
    tiny: clip.ClipFeatures, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    for name, value in (("vector", torch.ones(1)), ("none", None)):
        other = {key: tensor for key, tensor in state.items() if key != "logit_scale"}
        written(tmp_path / name, other if value is None else {**other, "logit_scale": value})
        assert torch.equal(embedded(load(tmp_path / name)), embedded(tiny))


def test_weights_that_do_not_fit_are_refused_by_name(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    fewer = {name: tensor for name, tensor in state.items() if name != "visual.proj"}
    with pytest.raises(InputError, match=r"visual.proj is missing"):
        load(written(tmp_path / "a", fewer))
    with pytest.raises(InputError, match=r"extra has no place"):
        load(written(tmp_path / "b", {**state, "extra": torch.ones(2)}))
    with pytest.raises(InputError, match=r"text_projection is \(32, 16\) and should be \(32, 24\)"):
        load(written(tmp_path / "c", state, {**NETWORK, "embed_dim": 24}))


@pytest.mark.parametrize(
    "config",
    [
        {"embed_dim": 16},
        {**NETWORK, "embed_dim": "wide"},
        {**NETWORK, "vision_cfg": 3},
        {**NETWORK, "vision_cfg": {**NETWORK["vision_cfg"], "image_size": [1, 2, 3]}},
    ],
)
def test_a_configuration_of_something_else_is_refused(
    config: Any, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="not the configuration of an open_clip model"):
        describe(written(tmp_path, state, config))


def test_a_network_that_open_clip_cannot_build_is_refused(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="open_clip cannot build"):
        load(written(tmp_path / "a", state, {**NETWORK, "unheard_of": 1}))
    of_timm = {**NETWORK, "vision_cfg": {"timm_model_name": "no_such_network", "image_size": 32}}
    with pytest.raises(InputError, match="no_such_network"):
        load(written(tmp_path / "b", state, of_timm))


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make open_clip know a tiny architecture, and no other."""
    (tmp_path / "package" / "model_configs").mkdir(parents=True)
    (tmp_path / "package" / "model_configs" / "ViT-T-16.json").write_text(json.dumps(NETWORK))
    found = SimpleNamespace(origin=str(tmp_path / "package" / "__init__.py"))
    monkeypatch.setattr(clip.importlib.util, "find_spec", lambda name: found)


def test_an_architecture_and_a_file(known: None, folder: Path, tmp_path: Path) -> None:
    extractor = load(f"ViT-T-16:{folder / 'open_clip_model.safetensors'}")
    assert extractor.info.details["architecture"] == "ViT-T-16"
    one, two = load(folder), extractor
    same = one.prepare(image())[None]
    assert torch.equal(one.forward(same, ["features"])["features"], two.forward(same, ["features"])["features"])
    with pytest.raises(UsageError, match=r"no architecture 'ViT-T-61'.*did you mean 'ViT-T-16'"):
        describe(f"ViT-T-61:{folder / 'open_clip_model.safetensors'}")
    with pytest.raises(InputError, match=r"gone.safetensors is not there"):
        describe(f"ViT-T-16:{tmp_path / 'gone.safetensors'}")


def test_open_clips_own_architectures_are_known_without_importing_it(folder: Path) -> None:
    info = describe(f"ViT-L-14-336:{folder / 'open_clip_model.safetensors'}")
    assert info.resize == "clean bicubic 336"


def test_what_is_missing_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        clip.describe(FeatureOptions())
    text = " ".join((caught.value.what, caught.value.expected, caught.value.fix))
    for part in ("laion/CLIP-ViT-g-14-laion2B-s12B-b42K", "open_clip_config.json", "open_clip_model.safetensors",
                 "https://huggingface.co/", "--clip", "--download", "loss"):  # fmt: skip
        assert part in text
    with pytest.raises(InputError, match="there is no --clip"):
        describe(tmp_path / "gone")
    with pytest.raises(InputError, match=r"open_clip_config.json is missing"):
        describe(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="transformers' layout"):
        describe(tmp_path)
    (tmp_path / "open_clip_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"open_clip_config.json is a list"):
        describe(tmp_path)
    (tmp_path / "open_clip_config.json").write_bytes((folder / "open_clip_config.json").read_bytes())
    with pytest.raises(InputError, match=r"open_clip_model.safetensors is missing"):
        describe(tmp_path)
    (tmp_path / "open_clip_model.safetensors").write_bytes((folder / "open_clip_model.safetensors").read_bytes()[:-8])
    with pytest.raises(InputError, match="truncated"):
        describe(tmp_path)
    with pytest.raises(InputError, match="does not say of what architecture") as caught:
        describe(folder / "open_clip_model.safetensors")
    assert "--clip ViT-B-32:" in caught.value.fix


def test_pickled_weights_of_the_hub_are_asked_for_last(
    folder: Path, state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def local_folder(name: str, what: str, patterns: tuple[str, ...]) -> Path:
        asked.append(patterns[1])
        if len(asked) == 2:
            torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
        return tmp_path

    (tmp_path / "open_clip_config.json").write_bytes((folder / "open_clip_config.json").read_bytes())
    monkeypatch.setattr(clip, "local_folder", local_folder)
    info = describe("some/model")
    assert asked == ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    assert info.path == str(tmp_path / "open_clip_pytorch_model.bin") and info.details["architecture"] == "some/model"
    asked.clear()
    monkeypatch.setattr(clip, "local_folder", lambda name, what, patterns: asked.append(patterns[1]) or folder)
    assert describe("some/model").digest == describe(folder).digest
    assert asked == ["open_clip_model.safetensors"]


def test_a_tokenizer_of_the_hub_that_is_not_here_is_missed_by_prompts_alone(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    text = {**NETWORK["text_cfg"], "hf_tokenizer_name": "nobody/no-tokenizer"}
    extractor = load(written(tmp_path, state, {**NETWORK, "text_cfg": text}))
    assert embedded(extractor).isfinite().all()
    with pytest.raises(InputError, match="nobody/no-tokenizer") as caught:
        extractor.encode_text(["a"])
    assert "--download" in caught.value.fix and "https://huggingface.co/nobody/no-tokenizer" in caught.value.expected


def test_a_configuration_may_not_have_a_tokenizers_code_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from open_clip import tokenizer

    given: list[Any] = []
    monkeypatch.setattr(tokenizer, "HFTokenizer", lambda source, **options: given.extend((source, options)))
    text = {"hf_tokenizer_name": "a/b", "tokenizer_kwargs": {"trust_remote_code": True, "clean": "canonicalize"}}
    model = clip.Model("x", {"text_cfg": text}, (), (), (1, 1), tmp_path, tmp_path)
    clip.tokenizer(model)
    assert given == ["a/b", {"context_length": 77, "clean": "canonicalize"}]
    (tmp_path / "tokenizer.json").write_text("{}")
    clip.tokenizer(model)
    assert given[2] == str(tmp_path), "the folder's own tokenizer is taken"


def test_weights_that_are_not_numbers_give_features_that_are_not(
    state: dict[str, torch.Tensor], folder: Path, tmp_path: Path
) -> None:
    broken = load_file(folder / "open_clip_model.safetensors")
    broken["visual.proj"][0] = math.nan
    extractor = load(written(tmp_path, broken))
    assert not embedded(extractor).isfinite().all()


def test_planning_needs_neither_torch_nor_open_clip(folder: Path) -> None:
    code = (
        "import sys; from finectl.metrics.features import FeatureOptions, clip\n"
        f"info = clip.describe(FeatureOptions(clip={str(folder)!r}))\n"
        "print(info.digest, [name for name in ('torch', 'open_clip', 'numpy') if name in sys.modules])"
    )
    assert run_python(code).split() == [describe(folder).digest, "[]"]
