"""A folder of images, and what shows whether the cache is used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finectl.data import collection, decoded
from finectl.data.dataset import ImageSet, load
from finectl.data.sources import DataOptions

PLAIN = DataOptions()
SKIP = DataOptions(skip_bad=True)


def whole(folder: Path, options: DataOptions = PLAIN, size: int | None = None) -> tuple[ImageSet, torch.Tensor]:
    data = load(f"folder:{folder}", image_size=size, options=options)
    return data, data.store.read(torch.arange(data.info.count))


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let nothing decode ("_decode_one") or read whole files and headers ("_header") any more."""

    def fail(*arguments: object) -> None:
        raise AssertionError("this should have come from the cache")

    for module in (collection, decoded):
        for name in names:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, fail)


def make_folder(root: Path) -> Path:
    """Write 20 noisy JPEG files of 16x16 pixels, those of even numbers into one class and the others into another."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        path = root / ("cat", "dog")[number % 2] / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root
