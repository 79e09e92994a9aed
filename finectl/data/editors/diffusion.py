"""Editors that are pipelines of diffusers: InstructPix2Pix, image to image, image to image with a ControlNet.

Every image has random numbers of its own, which (seed, concept, image, draw) decide, whatever else is in its batch.

Reference: Brooks et al., arXiv 2211.09800; Meng et al., arXiv 2108.01073; Zhang et al., arXiv 2302.05543.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from finectl.data.concepts import Concept
from finectl.data.editors import EditOptions, EditorSpec
from finectl.data.edits import apply
from finectl.errors import InputError
from finectl.hub import is_offline

CONTROL_EDIT = "grey:edges"
SEED_BYTES = 8


class _Pipeline:
    """What the editors have in common: the pipeline is read, and works at the size of its network."""

    pipeline = ""

    def __init__(self, spec: EditorSpec, options: EditOptions, device: torch.device, dtype: str) -> None:
        import diffusers

        kind: Any = getattr(diffusers, self.pipeline)
        half = dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda")
        try:
            pipe = kind.from_pretrained(spec.path, local_files_only=is_offline(), use_safetensors=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"--editor {spec}: diffusers cannot read it: {reason}", expected=f"a {self.pipeline}"
            ) from error
        pipe.set_progress_bar_config(disable=True)
        self.pipe: Any = pipe.to(device, torch.bfloat16 if half else torch.float32)
        self.options = options
        self.size = options.size or int(self.pipe.unet.config.sample_size) * int(self.pipe.vae_scale_factor)

    def edit(self, images: Tensor, concept: Concept, rows: Sequence[int], draw: int) -> Tensor:
        """Edit images uint8 (B, 3, H, W); they come back in their own size."""
        side = images.shape[-1]
        sources = [
            Image.fromarray(image.permute(1, 2, 0).numpy()).resize((self.size, self.size), Image.Resampling.LANCZOS)
            for image in images
        ]
        generators = [self._generator(concept, row, draw) for row in rows]
        made = self.pipe(
            [concept.prompt] * len(sources),
            image=sources,
            generator=generators,
            num_inference_steps=self.options.steps,
            guidance_scale=self.options.guidance,
            **self._further(sources),
        )
        if any(getattr(made, "nsfw_content_detected", None) or ()):
            raise InputError(
                f"the safety checker of {self.pipeline} blacked out an image of {concept.name!r} ({concept.prompt!r})",
                expected="images that it lets pass",
                fix="take the concept out of the prompts, or another editor",
            )
        resized = [picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS) for picture in made.images]
        return torch.from_numpy(np.stack([np.asarray(picture) for picture in resized])).permute(0, 3, 1, 2).contiguous()

    def _generator(self, concept: Concept, row: int, draw: int) -> torch.Generator:
        text = f"{self.options.seed}:{concept.name}:{row}:{draw}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:SEED_BYTES], "little") >> 1
        return torch.Generator("cpu").manual_seed(seed)

    def _further(self, sources: list[Image.Image]) -> dict[str, Any]:
        """Return what this pipeline takes beside what all take."""
        return {"strength": self.options.strength}


class InstructPix2Pix(_Pipeline):
    """The prompt as an instruction."""

    pipeline = "StableDiffusionInstructPix2PixPipeline"

    def _further(self, sources: list[Image.Image]) -> dict[str, Any]:
        return {"image_guidance_scale": self.options.image_guidance}


class ImageToImage(_Pipeline):
    """The source image, noised and denoised towards the prompt."""

    pipeline = "StableDiffusionImg2ImgPipeline"


class Controlled(_Pipeline):
    """The same, held to the outlines of the source image, bright on black."""

    pipeline = "StableDiffusionControlNetImg2ImgPipeline"

    def _further(self, sources: list[Image.Image]) -> dict[str, Any]:
        outlines = [Image.fromarray(apply(CONTROL_EDIT, np.asarray(source))) for source in sources]
        return {"strength": self.options.strength, "control_image": outlines}
