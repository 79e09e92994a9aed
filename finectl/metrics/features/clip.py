"""The `clip` extractor: image and text embeddings of a CLIP model of open_clip.

A model is a folder of open_clip's layout, a hub id of one, or ARCH:FILE, weights of an architecture that open_clip
knows. Images are brought to the network's size with clean-fid's bicubic filter, whatever their proportions.

Reference: Radford et al., arXiv 2103.00020; Cherti et al., arXiv 2212.07143.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finectl.artifacts.files import read_json_object, sha256_json
from finectl.errors import InputError, UsageError
from finectl.hub import WEB, is_hub_id, local_folder
from finectl.metrics.features import ExtractorInfo, FeatureOptions
from finectl.metrics.features.networks import (
    CleanPreparation,
    check_weights,
    computing,
    fit,
    read_state,
    require_packages,
    uninitialised,
)
from finectl.metrics.features.weights import WITHOUT, content_digest
from finectl.registry import nearest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor, nn

NAME = "clip"
DEFAULT = "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"
CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json")
BATCH_SIZE = 32
TEXT_BATCH_SIZE = 64
USUAL_SIZE = 224
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's
CONTEXT_LENGTH = 77
# Parameters of the loss, which embeddings do not depend on and whose shape differs from version to version.
OF_THE_LOSS = ("logit_scale", "logit_bias")
# What a configuration may say to a tokenizer; everything else, such as to trust code, it may not.
TOKENIZER_OPTIONS = ("clean", "strip_sep_token", "language")
FOLDER = f"a folder with {CONFIG} and {WEIGHTS[0]} (or {WEIGHTS[1]})"
EXPECTED = f"{FOLDER}, a hub id of such files, or ARCH:FILE such as ViT-B-32:/path/model.safetensors"
FIX = f"--clip {DEFAULT} --download, or copy {CONFIG} and {WEIGHTS[0]} of {WEB}/{DEFAULT} into a folder: --clip FOLDER"


@dataclass(frozen=True)
class Model:
    """A model that has been found and not been read.

    Args:
        architecture: open_clip's name of it, or that of the folder or the repository.
        config: open_clip's configuration of the network.
        mean: Of the pixels in [0, 1], a channel.
        std: Of the pixels.
        size: (height, width) of the images that the network takes.
        weights: The file.
        folder: Where tokenizer files could be.
    """

    architecture: str
    config: Mapping[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    weights: Path
    folder: Path | None

    @property
    def digest(self) -> str:
        """Hash of all that decides the embeddings: weights, network, mean and deviation of the pixels."""
        return sha256_json([self.config, self.mean, self.std, self.size, content_digest(self.weights)])


def describe(options: FeatureOptions) -> ExtractorInfo:
    """Find and hash the model, without torch or open_clip.

    Raises:
        UsageError: open_clip knows no such architecture.
        InputError: the files, or the packages that run them, are missing or damaged.
    """
    require_packages(["open_clip", "cleanfid"], "a CLIP model (clip-score, fd-clip)")
    model = find(options.clip or DEFAULT)
    check_weights(model.weights, f"copy or download it again; {WITHOUT}")
    height, width = model.size
    size = f"{width}" if width == height else f"{width}x{height}"
    details = {"architecture": model.architecture, "file": model.weights.name}
    return ExtractorInfo(NAME, model.digest, f"clean bicubic {size}", str(model.weights), details)


def load(info: ExtractorInfo, options: FeatureOptions, device: torch.device) -> ClipFeatures:
    """Build the network and read its weights.

    Raises:
        UsageError, InputError: see `describe`; or the weights do not fit the configuration.
    """
    model = find(options.clip or DEFAULT)
    network = build(model.config, model.weights)
    state = read_state(model.weights)
    own = network.state_dict()
    for name in OF_THE_LOSS:
        state.pop(name, None)
        if name in own:
            state[name] = own[name]
    fit(network, state, model.weights, f"open_clip's {model.architecture}")
    network.float().eval().requires_grad_(False).to(device)
    return ClipFeatures(info, network, model, device, options.dtype)


def find(given: str) -> Model:
    """Find the model that `--clip` names.

    Args:
        given: A folder, a hub id, or ARCH:FILE.

    Raises:
        UsageError: open_clip knows no such architecture.
        InputError: a file is missing, or it is of another layout.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        return _of_folder(path, given)
    if path.exists():
        raise InputError(
            f"--clip {given} is a file, which does not say of what architecture it is",
            expected=EXPECTED,
            fix=f"--clip ViT-B-32:{given}, with the architecture that it is",
        )
    architecture, colon, file = given.partition(":")
    if colon:
        return _of_file(architecture, Path(file).expanduser(), given)
    if not is_hub_id(given):
        raise InputError(f"there is no --clip {given!r}", expected=EXPECTED, fix=f"{FIX}; {WITHOUT}")
    return _of_folder(_repository(given), given)


def _repository(name: str) -> Path:
    """Return the folder of a repository in the hub's cache; the pickled weights are fetched only for want of others."""
    try:
        folder = local_folder(name, "the CLIP model", (CONFIG, WEIGHTS[0], *TOKENIZERS))
        if not (folder / WEIGHTS[0]).is_file():
            folder = local_folder(name, "the CLIP model", (CONFIG, WEIGHTS[1], *TOKENIZERS))
    except InputError as error:
        raise InputError(
            f"{error.what} (for clip-score and fd-clip)",
            expected=f"{CONFIG} and {WEIGHTS[0]} of {WEB}/{name}",
            fix=f"fetch it with --download, or copy these files into a folder: --clip FOLDER; {WITHOUT}",
        ) from error
    return folder


def _of_folder(folder: Path, given: str) -> Model:
    if not (folder / CONFIG).is_file():
        other = " (it is of transformers' layout)" if (folder / "config.json").is_file() else ""
        raise InputError(f"--clip {given}: {folder / CONFIG} is missing{other}", expected=FOLDER, fix=FIX)
    values = read_json_object(folder / CONFIG, expected="the configuration of an open_clip model", fix=FIX)
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise InputError(
            f"--clip {given}: {folder / WEIGHTS[0]} is missing", expected=FOLDER, fix=f"add that file; {WITHOUT}"
        )
    name = given if is_hub_id(given) else folder.resolve().name
    return _model(name, values, folder / CONFIG, weights, folder)


def _of_file(architecture: str, file: Path, given: str) -> Model:
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise InputError("open_clip is not installed", fix="pip install 'finectl[vision]'")
    configs = {path.stem: path for path in Path(package.origin).parent.joinpath("model_configs").glob("*.json")}
    if architecture not in configs:
        raise UsageError(
            f"--clip {given}: open_clip knows no architecture {architecture!r}{nearest(architecture, list(configs))}",
            expected=EXPECTED,
            fix=f"name one that it knows; or give {FOLDER}, which says what the network is",
        )
    if not file.is_file():
        raise InputError(
            f"--clip {given}: {file} is {'a folder' if file.is_dir() else 'not there'}",
            expected=f"the file of the weights of {architecture}",
            fix=f"{FIX}; {WITHOUT}",
        )
    path = configs[architecture]
    return _model(architecture, read_json_object(path), path, file, None)


def _model(name: str, values: Mapping[str, Any], where: Path, weights: Path, folder: Path | None) -> Model:
    """Take what is needed out of a configuration, which is the network's alone or has the images' beside it."""
    try:
        config = dict(values.get("model_cfg", values))
        images = dict(values.get("preprocess_cfg") or {})
        size = config["vision_cfg"].get("image_size") or images.get("size") or USUAL_SIZE
        height, width = (size, size) if isinstance(size, int) else map(int, size)
        mean, std = (tuple(map(float, images.get(key) or usual)) for key, usual in (("mean", MEAN), ("std", STD)))
        if int(config["embed_dim"]) < 1 or min(height, width) < 1 or len(mean) != 3 or len(std) != 3 or 0 in std:
            raise ValueError("a size or a mean is out of range")
        dict(config["text_cfg"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{where} is not the configuration of an open_clip model: {error}",
            expected="model_cfg with embed_dim, vision_cfg and text_cfg",
            fix=FIX,
        ) from error
    return Model(name, config, mean, std, (height, width), weights, folder)


def build(config: Mapping[str, Any], where: Path) -> nn.Module:
    """Return open_clip's network of a configuration, without weights and without looking for any.

    Raises:
        InputError: open_clip does not understand the configuration.
    """
    from open_clip import CLIP, CoCa, CustomTextCLIP

    values = dict(config)
    values["vision_cfg"] = {**values["vision_cfg"]}
    values["text_cfg"] = {**values["text_cfg"]}
    if "timm_model_name" in values["vision_cfg"]:
        values["vision_cfg"]["timm_model_pretrained"] = False
    by_transformers = "hf_model_name" in values["text_cfg"]
    if by_transformers:
        values["text_cfg"]["hf_model_pretrained"] = False
    custom = values.pop("custom_text", False) or by_transformers
    kind = CLIP if not custom else CoCa if "multimodal_cfg" in values else CustomTextCLIP
    try:
        with uninitialised():
            network: nn.Module = kind(**values)
    # open_clip, timm and transformers raise each of these for what they do not know or cannot find.
    except (
        TypeError,
        ValueError,
        KeyError,
        RuntimeError,
        AttributeError,
        AssertionError,
        OSError,
        ImportError,
    ) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"open_clip cannot build the network of {where}: {reason}", fix=FIX) from error
    return network


class ClipFeatures:
    """The network with its preparation of images and its tokenizer; see `Extractor`.

    Args:
        info: What `describe` found.
        network: open_clip's network, on the device.
        model: What it was made from.
        device: Where it is.
        dtype: "float32" or "bfloat16".
    """

    batch_size = BATCH_SIZE

    def __init__(self, info: ExtractorInfo, network: nn.Module, model: Model, device: torch.device, dtype: str) -> None:
        self.info = info
        self.outputs: Mapping[str, int] = {"features": int(model.config["embed_dim"])}
        self._network: Any = network
        self._model = model
        self._prepare = CleanPreparation(*model.size, model.mean, model.std)
        self._device, self._dtype = device, dtype
        self._tokenizer: Any = None  # most metrics have no prompts

    def prepare(self, image: npt.NDArray[np.uint8]) -> Tensor:
        """Return an image (H, W, 1 or 3) as float32 (3, height, width)."""
        return self._prepare(image)

    def forward(self, batch: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """Return "features" (B, d) float32 of prepared images: embeddings, not normalised."""
        with computing(self._device, self._dtype):
            features: Tensor = self._network.encode_image(batch.to(self._device), normalize=False)
        found = {"features": features.float().cpu()}
        return {name: found[name] for name in wanted}

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings of prompts, not normalised; each distinct prompt is computed once.

        Args:
            prompts: Any number of them; what exceeds the network's context is cut off.

        Returns:
            float32 (N, d) on the CPU.

        Raises:
            InputError: the tokenizer is another model's and not on this machine.
        """
        import torch

        distinct = sorted(set(prompts))
        if not distinct:
            return torch.empty(0, self.outputs["features"])
        if self._tokenizer is None:
            self._tokenizer = tokenizer(self._model)
        tokens = self._tokenizer(distinct)  # (M, L)
        parts = []
        for part in tokens.split(TEXT_BATCH_SIZE):
            filling = part[-1:].expand(TEXT_BATCH_SIZE - len(part), -1)
            with computing(self._device, self._dtype):
                rows = self._network.encode_text(torch.cat([part, filling]).to(self._device), normalize=False)
            parts.append(rows[: len(part)].float().cpu())
        place = {prompt: row for row, prompt in enumerate(distinct)}
        return torch.cat(parts)[torch.tensor([place[prompt] for prompt in prompts])]


def tokenizer(model: Model) -> Any:
    """Return what turns a list of prompts into tokens, int64 (N, L).

    Raises:
        InputError: it is a tokenizer of the hub that is not on this machine.
    """
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    text = model.config["text_cfg"]
    options = {key: value for key, value in text.get("tokenizer_kwargs", {}).items() if key in TOKENIZER_OPTIONS}
    length = int(text.get("context_length", CONTEXT_LENGTH))
    name = str(text.get("hf_tokenizer_name") or "")
    if not name:
        return SimpleTokenizer(context_length=length, **options)
    has_own = model.folder is not None and any((model.folder / file).is_file() for file in TOKENIZERS)
    source = str(model.folder) if has_own else name
    mode = {"tokenizer_mode": text["tokenizer_mode"]} if text.get("tokenizer_mode") else {}
    try:
        return HFTokenizer(source, context_length=length, **mode, **options)
    # transformers raises each of these for files that are missing or of another kind.
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"the tokenizer {source} of {model.architecture} cannot be had: {reason}",
            expected=f"the files of {WEB}/{name} in the hub's cache, or {TOKENIZERS[0]} beside {CONFIG}",
            fix="fetch it with --download; fd-clip and every other metric but clip-score work without it",
        ) from error
