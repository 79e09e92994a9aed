"""The text encoder `hash`, which needs no weights: every word has a random vector of its own, always the same.

A text is made lower case (Unicode NFKC) and cut into words and signs. Vector k of it is (w + p) / sqrt(2): w is drawn
from a standard normal distribution with bits that SHAKE-256 makes of the word, p is the sine-cosine code of place k,
scaled to unit variance. A start mark comes first and an end mark last, so that the empty text is no zero; what is left
of the length is zero. Words past the length are dropped. Nothing is learned: texts that share words are near, texts
that mean the same are not. It is for machines without any weights, for tests and for small closed vocabularies.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from finectl.artifacts.files import sha256_json
from finectl.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NAME = "hash"
VERSION = 1  # raised with every change of the vectors
LENGTH, WIDTH = 32, 64
START, END = "\0start", "\0end"  # no word has such a sign in it
WORDS = re.compile(r"\w+|[^\w\s]")
PERIODS = 10_000.0


def describe_hash(width: int | None = None) -> dict[str, Any]:
    """Return the record of the encoder; see `finectl.models.text.describe_text`.

    Args:
        width: Numbers a vector, even.

    Raises:
        UsageError: the width is odd.
    """
    width = width or WIDTH
    if width % 2:
        raise UsageError(f"--text-encoder {NAME} for vectors of {width} numbers", expected="an even width")
    return {"name": NAME, "digest": sha256_json([NAME, VERSION, LENGTH, width]), "length": LENGTH, "width": width}


def words_of(text: str) -> list[str]:
    """Return the words and signs of a text, at most `LENGTH` with the two marks around them."""
    found = WORDS.findall(unicodedata.normalize("NFKC", text).lower())
    return [START, *found[: LENGTH - 2], END]


class HashEncoder:
    """See the module; a `finectl.models.text.TextEncoder`."""

    def __init__(self, record: Mapping[str, Any], device: str | torch.device = "cpu") -> None:
        self.name = str(record["name"])
        self.digest = str(record["digest"])
        self.length = int(record["length"])
        self.width = int(record["width"])
        self._device = device
        self._word = lru_cache(maxsize=65_536)(self._draw)
        self._places = self._codes()  # (length, width)

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See `finectl.models.text.TextEncoder.encode`."""
        import torch

        tokens = torch.zeros(len(texts), self.length, self.width)
        mask = torch.zeros(len(texts), self.length, dtype=torch.bool)
        for row, text in enumerate(texts):
            words = words_of(text)
            vectors = torch.stack([self._word(word) for word in words])  # (n, width)
            tokens[row, : len(words)] = (vectors + self._places[: len(words)]) / 2**0.5
            mask[row, : len(words)] = True
        return tokens.to(self._device), mask.to(self._device)

    def _draw(self, word: str) -> Tensor:
        """Return the vector of a word, by the Box-Muller transform of the bits of its hash."""
        import numpy as np
        import torch

        bits = hashlib.shake_256(f"{VERSION}:{word}".encode("utf-8", "surrogatepass")).digest(4 * self.width)
        uniform = (np.frombuffer(bits, "<u4").astype(np.float64) + 0.5) / 2**32  # (width,), in (0, 1)
        first, second = uniform.reshape(2, -1)
        radius, angle = np.sqrt(-2 * np.log(first)), 2 * np.pi * second
        return torch.from_numpy(np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]).astype(np.float32))

    def _codes(self) -> Tensor:
        """Return the codes of the places, (length, width), of mean square 1.

        Reference: Vaswani et al., arXiv 1706.03762, section 3.5.
        """
        import torch

        rates = PERIODS ** (-torch.arange(0, self.width, 2, dtype=torch.float64) / self.width)
        angles = torch.arange(self.length, dtype=torch.float64)[:, None] * rates
        return (torch.cat([angles.sin(), angles.cos()], dim=1) * 2**0.5).float()
