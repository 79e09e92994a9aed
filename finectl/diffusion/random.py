"""Random numbers as a pure function of what they are for, so that a resumed run draws what an unbroken one would."""

from __future__ import annotations

import hashlib

import torch


def generator_for(purpose: str, *key: int, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a generator seeded by a purpose and integers such as (seed, rank, step).

    Args:
        purpose: Keeps the streams of different uses apart ("train", "sample", ...).
        key: The integers; a hash keeps (1, 0) and (0, 1) apart.
        device: Where the numbers are drawn.
    """
    digest = hashlib.sha256(":".join([purpose, *map(str, key)]).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
