"""Editors: what makes the image after an edit out of the image before it. Naming one imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from finectl.data.concepts import Concept
from finectl.errors import UsageError
from finectl.registry import Entry, Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FOLDER = "folder"
EDITORS = Registry(
    "editor",
    {
        "builtin": Entry("finectl.data.editors.builtin:Builtin", "deterministic edits of the concepts of --set demo"),
        FOLDER: Entry("finectl.data.pair_folders", "folder:PATH, pairs made elsewhere"),
        "ip2p": Entry("finectl.data.editors.diffusion:InstructPix2Pix", "ip2p:PATH, a pipeline of InstructPix2Pix"),
        "sd-img2img": Entry("finectl.data.editors.diffusion:ImageToImage", "sd-img2img:PATH, Stable Diffusion"),
        "controlnet": Entry("finectl.data.editors.diffusion:Controlled", "controlnet:PATH, one with a ControlNet"),
    },
)


@dataclass(frozen=True)
class EditorSpec:
    """An editor as `--editor` names it: its kind, its path if it has one, and the digest of what is there."""

    name: str
    path: str = ""
    digest: str = ""

    def __str__(self) -> str:
        return f"{self.name}:{self.path}" if self.path else self.name


@dataclass(frozen=True)
class EditOptions:
    """How diffusion editors work.

    Args:
        steps: Of the scheduler.
        guidance: Guidance scale of the text.
        image_guidance: Guidance scale of the source image, of ip2p.
        strength: How far the source image is left, 0 to 1, of sd-img2img and controlnet.
        size: Side at which the network works, in pixels; None for its own.
        seed: Decides the noise together with concept, image and draw.
    """

    steps: int
    guidance: float
    image_guidance: float
    strength: float
    size: int | None
    seed: int


class ImageEditor(Protocol):
    """Makes images out of images."""

    def edit(self, images: Tensor, concept: Concept, rows: Sequence[int], draw: int) -> Tensor:
        """Edit images.

        Args:
            images: uint8 (B, 3, H, W).
            concept: What is to become of them.
            rows: Number of each image, which decides its random numbers.
            draw: Number of the attempt, which does so, too.

        Returns:
            uint8 (B, 3, H, W).
        """


def parse_editor(text: str) -> EditorSpec:
    """Read the name of an editor and find what it names.

    Raises:
        UsageError: there is no such editor, or its path is missing or is one too many.
        InputError: nothing is there.
    """
    name, colon, path = text.strip().partition(":")
    _ = EDITORS[name]
    if (name == "builtin") == bool(path) or (colon and not path):
        form = "builtin" if name == "builtin" else f"{name}:PATH"
        raise UsageError(f"--editor {text.strip()!r}", expected=form)
    if name == "builtin":
        return EditorSpec(name)
    if name == FOLDER:
        return EditorSpec(name, os.path.abspath(Path(path).expanduser()))
    from finectl.data.editors.finding import find_pipeline

    folder, digest = find_pipeline(name, path)
    return EditorSpec(name, str(folder), digest)


def load_editor(spec: EditorSpec, options: EditOptions, device: torch.device, dtype: str) -> ImageEditor:
    """Read an editor.

    Raises:
        InputError: it cannot be read.
    """
    editor: ImageEditor = EDITORS.load(spec.name)(spec, options, device, dtype)
    return editor


def network_calls(spec: EditorSpec, options: EditOptions) -> int:
    """Return how often an editor's network looks at an image, guidance included; 0 where there is no network."""
    calls: Mapping[str, Any] = {
        "ip2p": options.steps * 3,
        "sd-img2img": int(options.steps * options.strength) * 2,
        "controlnet": int(options.steps * options.strength) * 2,
    }
    return int(calls.get(spec.name, 0))
