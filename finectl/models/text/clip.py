"""CLIP's text encoder through transformers, as Stable Diffusion 1 uses it: the last hidden states of all 77 places.

A model is the folder of a diffusers pipeline with `text_encoder/` and `tokenizer/`, a folder `text_encoder` beside a
folder `tokenizer`, a folder of transformers with the tokenizer's files in it, or a hub id of any of these.

Reference: Radford et al., arXiv 2103.00020; Rombach et al., arXiv 2112.10752, section 4.3.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finectl.artifacts.cache import remembered_sha256
from finectl.artifacts.files import read_json_object, sha256_file, sha256_json
from finectl.artifacts.tensors import check_header
from finectl.errors import FinectlError, InputError
from finectl.hub import WEB, is_hub_id, local_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ENCODER, TOKENIZER = "text_encoder", "tokenizer"
CONFIG, WEIGHTS, PICKLED = "config.json", "model.safetensors", "pytorch_model.bin"
VOCABULARY = ("vocab.json", "merges.txt")
WHOLE_TOKENIZER = "tokenizer.json"
SPECIAL = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES = (*VOCABULARY, WHOLE_TOKENIZER, *SPECIAL)
KINDS = ("clip", "clip_text_model")
EXAMPLE = "openai/clip-vit-large-patch14"
PATTERNS = (
    *(f"{folder}{name}" for folder in ("", f"{ENCODER}/") for name in (CONFIG, WEIGHTS)),
    *(f"{folder}{name}" for folder in ("", f"{TOKENIZER}/") for name in TOKENIZER_FILES),
)
MENDING = (
    f"--text-encoder {EXAMPLE} --download, or copy {CONFIG}, {WEIGHTS}, {' and '.join(VOCABULARY)} of {WEB}/{EXAMPLE} "
    "into a folder and give its path: --text-encoder PATH; --text-encoder hash needs no files"
)
EXPECTED = f"{CONFIG} and {WEIGHTS} of a CLIP text model, and {' and '.join(VOCABULARY)} of its tokenizer"
INSTALL = "pip install 'finectl[text]'"
# What decides the vectors, with transformers' defaults for files that leave something out.
ESSENTIALS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
}


@dataclass(frozen=True)
class Found:
    """A text encoder that has been found and not been read: its folder, its tokenizer's, and its configuration."""

    folder: Path
    tokenizer: Path
    config: dict[str, Any]


def describe_clip(name_or_path: str) -> dict[str, Any]:
    """Describe a CLIP text model; see `finectl.models.text.describe_text`.

    Raises:
        InputError: it is not there, is of another kind, or its weights are not safetensors.
    """
    found = find(name_or_path)
    weights = found.folder / WEIGHTS
    try:
        check_header(weights)
    except FinectlError as error:
        raise InputError(error.what, expected=error.expected, fix="download or copy the file again") from error
    words = [[name, sha256_file(found.tokenizer / name)] for name in TOKENIZER_FILES if _holds(found.tokenizer, name)]
    named = is_hub_id(name_or_path)
    return {
        "name": name_or_path if named else os.path.abspath(Path(name_or_path).expanduser()),
        "digest": sha256_json([found.config, remembered_sha256(weights), words]),
        "length": int(found.config["max_position_embeddings"]),
        "width": int(found.config["hidden_size"]),
    }


def find(name_or_path: str) -> Found:
    """Return where a text encoder and its tokenizer are.

    Raises:
        InputError: one of them is not there, or of another kind.
    """
    if not is_hub_id(name_or_path) and not Path(name_or_path).expanduser().exists():
        raise InputError(f"there is no text encoder at {name_or_path!r}", expected=EXPECTED, fix=MENDING)
    root = local_folder(name_or_path, "the text encoder", PATTERNS)
    if not root.is_dir():
        raise InputError(f"{root} is a file", expected=f"a folder with {EXPECTED}", fix=MENDING)
    folder = root / ENCODER if (root / ENCODER / CONFIG).is_file() else root
    if not (folder / CONFIG).is_file():
        raise InputError(f"{root} holds no text encoder", expected=EXPECTED, fix=MENDING)
    values = read_json_object(folder / CONFIG, expected="the configuration of a text encoder", fix=MENDING)
    kind = str(values.get("model_type", "unknown"))
    if kind not in KINDS:
        raise InputError(f"{folder / CONFIG} is of type {kind!r}", expected=f"one of: {', '.join(KINDS)}", fix=MENDING)
    text = values.get("text_config") if kind == "clip" else values
    config = {key: (text if isinstance(text, dict) else {}).get(key, usual) for key, usual in ESSENTIALS.items()}
    if not all(isinstance(config[key], int) for key in ("hidden_size", "max_position_embeddings")):
        raise InputError(f"{folder / CONFIG} is not a whole configuration", expected="that of a CLIP text model")
    if not (folder / WEIGHTS).is_file():
        raise _without_weights(folder)
    places = (root / TOKENIZER, folder.parent / TOKENIZER, folder)
    tokenizer = next((place for place in places if _is_tokenizer(place)), None)
    if tokenizer is None:
        raise InputError(
            f"{folder} has no tokenizer with it",
            expected=f"{' and '.join(VOCABULARY)} in {places[0]}, in {places[1]} or beside the weights",
            fix=MENDING,
        )
    return Found(folder, tokenizer, config)


def _is_tokenizer(folder: Path) -> bool:
    return all(_holds(folder, name) for name in VOCABULARY) or _holds(folder, WHOLE_TOKENIZER)


def _holds(folder: Path, name: str) -> bool:
    return (folder / name).is_file()


def _without_weights(folder: Path) -> InputError:
    if not (folder / PICKLED).is_file():
        return InputError(f"{folder / WEIGHTS} is missing", expected=EXPECTED, fix=MENDING)
    return InputError(
        f"{folder} has its weights as {PICKLED}, a pickle, which can hold code and is not opened",
        expected=WEIGHTS,
        fix="take the safetensors file of the same model",
    )


class ClipEncoder:
    """See the module; a `finectl.models.text.TextEncoder`."""

    def __init__(self, record: dict[str, Any], tokenizer: Any, model: Any, device: str | torch.device) -> None:
        self.name, self.digest = str(record["name"]), str(record["digest"])
        self.length, self.width = int(record["length"]), int(record["width"])
        self._tokenizer, self._model, self._device = tokenizer, model, device

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See `finectl.models.text.TextEncoder.encode`; texts past the length are cut off, as Stable Diffusion does."""
        import torch

        found = self._tokenizer(
            list(texts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            # Without a mask, as Stable Diffusion was trained: attention is causal, what fills the rest is seen.
            tokens = self._model(input_ids=found["input_ids"].to(self._device)).last_hidden_state
        return tokens.float(), found["attention_mask"].bool().to(self._device)


def load_clip(name_or_path: str, device: str | torch.device = "cpu") -> ClipEncoder:
    """Read a CLIP text model and its tokenizer, in float32.

    Raises:
        InputError: see `describe_clip`; or transformers is not installed, or the weights do not fit.
    """
    if importlib.util.find_spec("transformers") is None:
        raise InputError("transformers, which runs CLIP's text encoder, is not installed", fix=INSTALL)
    import torch
    from transformers import CLIPTextModel, CLIPTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # stderr has one kind of progress
    record, found = describe_clip(name_or_path), find(name_or_path)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(found.tokenizer), local_files_only=True)
        loaded: Any = CLIPTextModel.from_pretrained(
            str(found.folder), use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        model, loading = loaded
    # transformers, tokenizers and torch raise each of these for files that do not fit.
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{found.folder} cannot be read as a text encoder: {reason}", fix=MENDING) from error
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers would leave these at random values
        raise InputError(
            f"{found.folder / WEIGHTS} lacks {len(missing)} tensors of its configuration, such as {missing[0]}",
            fix=MENDING,
        )
    return ClipEncoder(record, tokenizer, model.to(device, torch.float32).eval().requires_grad_(False), device)
