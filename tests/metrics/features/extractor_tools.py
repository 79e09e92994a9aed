"""What the tests of extractors share: images, a file that would run code, and Python without torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
from support import child_environment


def image(height: int = 40, width: int = 56, channels: int = 3, seed: int = 0) -> Any:
    """Return an image (height, width, channels) of noise, uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def clean_resized(pixels: Any, size: int) -> Any:
    """Return clean-fid's resizing of an image (H, W, 3): PIL's bicubic filter on each channel as floats."""
    from PIL import Image

    channels = [
        Image.fromarray(pixels[..., c].astype(np.float32)).resize((size, size), Image.BICUBIC) for c in range(3)
    ]
    return np.stack([np.asarray(channel).clip(0, 255) for channel in channels], axis=-1)


class Harmful:
    """Prints a word when it is unpickled."""

    def __reduce__(self) -> Any:
        return (print, ("run",))


def run_python(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=child_environment()
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
