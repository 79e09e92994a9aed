"""The blocks of a weight data set in the place of images, so that the one training loop trains their generator.

An item is one block of one checkpoint of one concept, with one of the texts that name the concept. Its label y says
which text and which block it is: y = text N + n.

Reference: arXiv 2407.11966, sections 4.2 and 4.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from finectl.data.dataset import ImageSet, MemoryStore
from finectl.data.sources import DataInfo
from finectl.diffusion.config import DiffusionConfig
from finectl.diffusion.losses import Denoiser, Noised
from finectl.diffusion.schedule import NoiseSchedule
from finectl.models.operations import Call, count_operations
from finectl.models.weights.basis import Basis
from finectl.models.weights.recovery import clean_of
from finectl.models.weights.unet import WeightUNet

LOSSES = ("prediction", "decoded")


@dataclass(frozen=True, eq=False)
class Texts:
    """Encoded texts.

    Args:
        tokens: (V, S, E), float32.
        mask: (V, S), bool, which vectors count; each text has one at least.
    """

    tokens: Tensor
    mask: Tensor

    @classmethod
    def of(cls, tokens: Tensor, mask: Tensor) -> Texts:
        """Return encoded texts without the places that none of them uses."""
        used = mask.any(0).nonzero()
        length = int(used.max()) + 1 if len(used) else 1
        # A text of which nothing counts would have no place to look at.
        counted = mask[:, :length] | (~mask.any(1, keepdim=True) & (torch.arange(length, device=mask.device) == 0))
        return cls(tokens[:, :length].float(), counted)

    def __len__(self) -> int:
        return len(self.tokens)

    def row(self, index: int) -> Texts:
        """Return one of them."""
        return Texts(self.tokens[index : index + 1], self.mask[index : index + 1])

    def to(self, device: torch.device | str) -> Texts:
        """Return them on a device."""
        return Texts(self.tokens.to(device), self.mask.to(device))


@dataclass(frozen=True, eq=False)
class BlockStore(MemoryStore):
    """Blocks of which several items are the same, under other texts.

    Args:
        source: (items,), int64, the block of each item; `labels` are those of the items.
    """

    source: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def read(self, indices: Tensor, flips: Tensor | None = None) -> Tensor:
        """See `finectl.data.dataset.Store.read`."""
        return self.images.index_select(0, self.source[indices])


def block_set(values: Tensor, texts_of: Sequence[Sequence[int]], fingerprint: str) -> ImageSet:
    """Return the items of a training set.

    Args:
        values: (C, K, N, L), float32: concepts, checkpoints, blocks and their numbers, or their coefficients.
        texts_of: The rows of each concept's texts.
        fingerprint: Of the weights.

    Returns:
        Images of shape (1, 1, L). Every concept counts the same, however many texts it has.
    """
    concepts, checkpoints, blocks, length = values.shape
    most = max(len(rows) for rows in texts_of)
    source, labels = [], []
    places = torch.arange(blocks)
    for concept, rows in enumerate(texts_of):
        for checkpoint in range(checkpoints):
            for variant in range(most):
                source.append((concept * checkpoints + checkpoint) * blocks + places)
                labels.append(rows[variant % len(rows)] * blocks + places)
    count = concepts * checkpoints * most * blocks
    info = DataInfo("weights", fingerprint, count, count, 0, length, 1, 1, ("weights",), bundled=False)
    store = BlockStore(values.reshape(-1, 1, 1, length).contiguous(), torch.cat(labels), source=torch.cat(source))
    return ImageSet(info, "train", store, torch.arange(count))


@dataclass(frozen=True)
class Conditioning:
    """What the training loop asks of a model's configuration.

    Args:
        diffusion: The forward process.
        num_classes: Labels.
        label_dropout: How often a label is left out: never, for a text alone says which weights are meant.
    """

    diffusion: DiffusionConfig
    num_classes: int
    label_dropout: float = 0.0


class LabelledBlocks(nn.Module):
    """A weight generator as a denoiser of (x_t, t, y).

    Args:
        network: It, without the texts.
        texts: Those that the labels name.
    """

    tokens: Tensor
    mask: Tensor

    def __init__(self, network: WeightUNet, texts: Texts) -> None:
        super().__init__()
        self.network = network
        self.config = Conditioning(network.config.diffusion, len(texts) * network.places)
        self.register_buffer("tokens", texts.tokens, persistent=False)
        self.register_buffer("mask", texts.mask, persistent=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the prediction, (M, 1, 1, L), for noisy blocks of that shape, timesteps (M,) and labels (M,)."""
        blocks = self.network.places
        rows = y // blocks
        predicted: Tensor = self.network(x[:, 0], t, y % blocks, self.tokens[rows], self.mask[rows])
        return predicted[:, None]

    def update_operations(self) -> int | None:
        """Return the floating-point operations of an update on one block; see `training.flops`."""

        def make() -> Call:
            x = torch.zeros(1, 1, 1, self.network.config.length, device=self.tokens.device)
            zero = torch.zeros(1, dtype=torch.int64, device=x.device)
            return self, (x, zero, zero), list(self.parameters())

        return count_operations(make)


@dataclass(frozen=True, eq=False)
class BlockLoss:
    """The squared error of blocks, filling left out: of the prediction, or of the weights that it stands for.

    Args:
        mask: (N, L), bool, which numbers count.
        scale: (N, b), what the normalised weights were divided by, for the loss of decoded weights; None for that of
            the prediction.
        basis: What the numbers are coefficients of, if any.

    Reference: arXiv 2407.11966, Eq. 2; the loss of decoded weights is ours.
    """

    mask: Tensor
    scale: Tensor | None = None
    basis: Basis | None = None

    def __call__(self, model: Denoiser, schedule: NoiseSchedule, batch: Noised, *, step: int) -> Tensor:
        """Return each block's loss, (B,); see `finectl.training.run.Loss`."""
        x0, y, t, noise = batch.tensors
        n, x_t = y % len(self.mask), batch.at(schedule)
        predicted = model(x_t, t, y).float()
        if self.scale is None:
            counted = self.mask[n].float()  # (B, L)
            error = (predicted - schedule.target(x0, noise, t))[:, 0, 0] * counted
            # Every number counts the same, so a block that is mostly filling counts less than a full one.
            return error.square().sum(1) / (self.mask.sum() / len(self.mask))
        error = (clean_of(schedule, predicted, x_t, t) - x0)[:, 0, 0]
        if self.basis is not None:
            error = self.basis.expand_rows(error, n)  # (B, b)
        weights = self.scale[n] * (self.scale[n] != 1.0)  # filling has the scale 1
        unit = (self.scale * (self.scale != 1.0)).square().sum() / len(self.scale)
        return (error * weights).square().sum(1) / unit
