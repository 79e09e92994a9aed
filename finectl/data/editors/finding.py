"""Where the pipeline of a diffusion editor is, and what decides what it makes. No torch."""

from __future__ import annotations

from pathlib import Path

from finectl.artifacts.cache import remembered_sha256
from finectl.artifacts.files import read_json_object, sha256_json
from finectl.errors import InputError
from finectl.hub import local_folder

INDEX = "model_index.json"
PATTERNS = (INDEX, "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model")
NEEDED = {
    "ip2p": ("unet", "vae", "text_encoder", "tokenizer"),
    "sd-img2img": ("unet", "vae", "text_encoder", "tokenizer"),
    "controlnet": ("unet", "vae", "text_encoder", "tokenizer", "controlnet"),
}


def find_pipeline(editor: str, path: str) -> tuple[Path, str]:
    """Return the folder of an editor's pipeline and its digest.

    Args:
        editor: `ip2p`, `sd-img2img` or `controlnet`.
        path: A folder or a hub id.

    Raises:
        InputError: it is not there, or parts of it are missing.
    """
    folder = local_folder(path, f"the pipeline of {editor}", PATTERNS)
    expected = f"a pipeline as diffusers saves it: {INDEX} and {', '.join(f'{part}/' for part in NEEDED[editor])}"
    if not (folder / INDEX).is_file():
        raise InputError(f"--editor {editor}:{path}: {folder / INDEX} is missing", expected=expected)
    parts = read_json_object(folder / INDEX, expected=expected)
    missing = [part for part in NEEDED[editor] if not parts.get(part) or not (folder / part).is_dir()]
    if missing:
        raise InputError(f"--editor {editor}:{path} has no {', '.join(missing)}", expected=expected)
    files = sorted({file for pattern in PATTERNS for file in folder.glob(pattern) if file.is_file()})
    return folder, sha256_json([[str(file.relative_to(folder)), remembered_sha256(file)] for file in files])
