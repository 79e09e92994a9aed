"""A causal language model that says prompts in other words, through transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finectl.artifacts.cache import remembered_sha256
from finectl.artifacts.files import sha256_json
from finectl.errors import InputError
from finectl.hub import local_folder

if TYPE_CHECKING:
    import torch

PATTERNS = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "*.txt",
            "special_tokens_map.json", "vocab.json", "chat_template.jinja")  # fmt: skip
INSTRUCTION = "Say the following in other words, in one short line, and write nothing else: {}"
PLAIN = "In other words.\nText: a dog at the sea\nOther words: a hound on the beach\nText: {}\nOther words:"
NEW_TOKENS = 40
TEMPERATURE, TOP_P = 0.9, 0.95
MARKS = re.compile(r"^\s*(?:[-*]|\d+[.)])\s*|^[\"'\s]+|[\"'\s]+$")


def find_paraphraser(name: str) -> Path:
    """Return the folder of a causal language model.

    Raises:
        InputError: it is not there, or has no weights in safetensors.
    """
    folder = local_folder(name, "the language model", PATTERNS)
    if not (folder / "config.json").is_file() or not sorted(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder} is no language model that can be read",
            expected="a folder with config.json, a tokenizer and *.safetensors, as transformers saves them",
        )
    return folder


def paraphraser_digest(folder: Path) -> str:
    """Return the hash of all that decides what the model writes."""
    files = sorted({file for pattern in PATTERNS for file in folder.glob(pattern) if file.is_file()})
    return sha256_json([[file.name, remembered_sha256(file)] for file in files])


class Paraphraser:
    """The model, ready to write.

    Args:
        folder: Where it is.
        device: Where it runs.

    Raises:
        InputError: transformers is not installed, or cannot read the folder.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise InputError("transformers is not installed", fix="pip install 'finectl[text]'") from error
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"transformers cannot read {folder}: {reason}", expected="a causal language model"
            ) from error
        self._model = model.to(device).eval()
        self._device = device

    def write(self, prompt: str, count: int, seed: int) -> tuple[str, ...]:
        """Return at most `count` different lines that say a prompt in other words.

        Args:
            prompt: The prompt.
            count: Lines that are drawn.
            seed: Decides them, whatever was written before.
        """
        import torch

        text = self._asked(prompt)
        tokens = self._tokenizer(text, return_tensors="pt").to(self._device)
        known = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.inference_mode():
            torch.manual_seed(seed)
            written = self._model.generate(
                **known,
                do_sample=True,
                temperature=TEMPERATURE,
                top_p=TOP_P,
                num_return_sequences=count,
                max_new_tokens=NEW_TOKENS,
                pad_token_id=self._tokenizer.pad_token_id or self._tokenizer.eos_token_id or 0,
            )
        length = known["input_ids"].shape[1]
        lines = [self._tokenizer.decode(row[length:], skip_special_tokens=True) for row in written]
        return tuple(dict.fromkeys(line for line in map(first_line, lines) if line))

    def _asked(self, prompt: str) -> str:
        if getattr(self._tokenizer, "chat_template", None):
            chat = [{"role": "user", "content": INSTRUCTION.format(prompt)}]
            asked: str = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            return asked
        return PLAIN.format(prompt)


def first_line(text: str) -> str:
    """Return the first line that a model wrote, without numbers, bullets and quotation marks around it."""
    for line in text.splitlines():
        cleaned = MARKS.sub("", MARKS.sub("", line)).strip()
        if cleaned:
            return cleaned
    return ""
