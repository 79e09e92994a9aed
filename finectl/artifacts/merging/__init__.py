"""Merging fine-tuned models on disk, piece by piece, without torch: `plan` says what, `engine` does it."""
