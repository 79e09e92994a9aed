"""Weights as data: LoRA tensors cut into blocks, and the network that generates the blocks from a text."""
