"""The starts of fine-tuning by name. No torch."""

from __future__ import annotations

STARTS = {
    "lora": "LoRA start: the base itself",
    "e2gan": "E2GAN's start: the base itself, its crucial layers alone",
    "mean": "mean of the training LoRAs",
    "nearest": "LoRA of the nearest training prompt",
    "noised": "LoRA of the nearest training prompt, with noise",
    "ridge": "ridge regression on the text",
    "prediction": "prediction",
    "shuffled": "prediction from another prompt",
    "oracle": "the concept's own trained LoRA",
}
PREDICTED = ("prediction", "shuffled")
"""Those that need a generator of weights."""
DRAWN = ("noised", "prediction", "shuffled")
"""Those that are others with another seed."""
