"""The 1-D U-Net that denoises one block of weights, told the time, which block it is, and the text.

Six residual blocks and five transformer blocks at three resolutions. Time and index enter every residual block, the
text enters every transformer block.

Reference: arXiv 2407.11966, section 4.3 and figure 2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finectl.diffusion.schedule import NoiseSchedule
from finectl.models.weights.config import FEED_FORWARD, FREQUENCIES, GROUPS, WeightUNetConfig


def sinusoid(values: Tensor, width: int) -> Tensor:
    """Return the sine and cosine code of numbers, one after the other: (M,) to (M, width).

    Args:
        values: (M,), timesteps or indices of blocks.
        width: Even.

    Reference: arXiv 2407.11966, section 4.3; arXiv 1706.03762, section 3.5.
    """
    rates = FREQUENCIES ** (-torch.arange(0, width, 2, device=values.device, dtype=torch.float32) / width)
    angles = values.float()[:, None] * rates  # (M, width / 2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class ResBlock(nn.Module):
    """Norm, SiLU, convolution; scale and shift by the embedding; the same again; and the input added."""

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, inputs)
        self.conv1 = nn.Conv1d(inputs, outputs, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * outputs)
        self.norm2 = nn.GroupNorm(GROUPS, outputs)
        self.conv2 = nn.Conv1d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return (M, outputs, L) of (M, inputs, L) and the activated embedding (M, E)."""
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(embedding)[:, :, None].chunk(2, dim=1)  # (M, outputs, 1)
        h = self.norm2(h) * (1 + scale) + shift
        result: Tensor = self.skip(x) + self.conv2(F.silu(h))
        return result


class TransformerBlock(nn.Module):
    """Self-attention over the positions of a block, cross-attention to the text, and a feed-forward layer."""

    def __init__(self, channels: int, text_width: int, head_width: int) -> None:
        super().__init__()
        self.heads = channels // head_width
        self.norm1 = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.query = nn.Linear(channels, channels, bias=False)
        self.text = nn.Linear(text_width, 2 * channels, bias=False)
        self.cross_out = nn.Linear(channels, channels)
        self.norm3 = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, FEED_FORWARD * channels)
        self.fc2 = nn.Linear(FEED_FORWARD * channels, channels)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return (M, C, L) of (M, C, L), text vectors (M or 1, S, E) and which of them count (M or 1, S)."""
        h = x.transpose(1, 2)  # (M, L, C)
        q, k, v = (self._split(part) for part in self.qkv(self.norm1(h)).chunk(3, dim=-1))
        h = h + self.out(_join(F.scaled_dot_product_attention(q, k, v)))
        q = self._split(self.query(self.norm2(h)))
        # One text for all blocks is projected once.
        k, v = (self._split(part).expand(len(x), -1, -1, -1) for part in self.text(tokens).chunk(2, dim=-1))
        allowed = mask[:, None, None, :].expand(len(x), 1, 1, -1)
        h = h + self.cross_out(_join(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)))
        h = h + self.fc2(F.gelu(self.fc1(self.norm3(h))))
        return h.transpose(1, 2)

    def _split(self, values: Tensor) -> Tensor:
        return values.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (M, heads, L, C / heads)


def _join(values: Tensor) -> Tensor:
    return values.transpose(1, 2).flatten(2)


def _embedding(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))


class WeightUNet(nn.Module):
    """The network of a configuration.

    Args:
        config: Its numbers.
    """

    def __init__(self, config: WeightUNetConfig) -> None:
        super().__init__()
        self.config = config
        first, second, third = config.channels
        width, text, head = config.embedding, config.text_width, config.head_width
        self.time = _embedding(first, width)
        self.index = _embedding(first, width)
        self.index_table = nn.Embedding(config.blocks, width) if config.index_embed == "sin+table" else None
        self.positions = nn.Embedding(config.blocks, config.length) if config.pos_embed == "learned" else None
        self.pooled = _embedding(text, width) if config.text_input == "tokens+pooled" else None
        self.stem = nn.Conv1d(1 + (self.positions is not None), first, 3, padding=1)
        self.enc1, self.tf1 = ResBlock(first, first, width), TransformerBlock(first, text, head)
        self.down1 = nn.Conv1d(first, first, 3, stride=2, padding=1)
        self.enc2, self.tf2 = ResBlock(first, second, width), TransformerBlock(second, text, head)
        self.down2 = nn.Conv1d(second, second, 3, stride=2, padding=1)
        self.enc3 = ResBlock(second, third, width)
        self.mid = TransformerBlock(third, text, head)
        self.dec3 = ResBlock(2 * third, third, width)
        self.up2 = nn.Conv1d(third, second, 3, padding=1)
        self.dec2, self.tf4 = ResBlock(2 * second, second, width), TransformerBlock(second, text, head)
        self.up1 = nn.Conv1d(second, first, 3, padding=1)
        self.dec1, self.tf5 = ResBlock(2 * first, first, width), TransformerBlock(first, text, head)
        self.norm_out = nn.GroupNorm(GROUPS, first)
        self.conv_out = nn.Conv1d(first, 1, 3, padding=1)
        self.linear_in = nn.Linear(text, config.text_rank, bias=False) if config.text_rank else None
        self.linear_out = nn.Embedding(config.blocks, config.text_rank * config.length) if config.text_rank else None
        self.register_buffer("linear_gain", _gain(config), persistent=False)
        # Frozen, not buffers: the moving average that is saved follows parameters.
        self.text_mean = nn.Parameter(torch.zeros(text), requires_grad=False)
        self.text_unit = nn.Parameter(torch.ones(()), requires_grad=False)
        initialise_(self)

    def forward(self, x: Tensor, t: Tensor, n: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the prediction for noisy blocks.

        Args:
            x: (M, 1, b), float32.
            t: (M,), int64 timesteps.
            n: (M,), int64, which block each is, 0..N-1.
            tokens: (M, S, E), float32 text vectors, or (1, S, E) for one text.
            mask: (M, S) or (1, S), bool, which of them count.

        Returns:
            (M, 1, b).
        """
        first = self.config.channels[0]
        embedding = self.time(sinusoid(t, first)) + self.embed_index(n)
        pooled = (pool(tokens, mask) - self.text_mean) / self.text_unit  # (M or 1, E)
        if self.pooled is not None:
            embedding = embedding + self.pooled(pooled)
        embedding = F.silu(embedding)
        given = x if self.positions is None else torch.cat([x, self.rows_of(self.positions, n)[:, None]], dim=1)
        h = self._denoise(self.stem(given), embedding, tokens, mask)
        result: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        if self.linear_in is not None and self.linear_out is not None:
            rows = self.rows_of(self.linear_out, n).unflatten(1, (self.config.text_rank, -1))  # (M, r, b)
            told = self.linear_in(pooled).expand(len(x), -1)  # (M, r)
            gain = self.linear_gain[t].to(result.dtype)  # type: ignore[index]
            result = result + (gain[:, None] * torch.einsum("mr,mrb->mb", told, rows))[:, None]
        return result

    @property
    def places(self) -> int:
        """How many different blocks it works on."""
        return self.config.blocks

    def embed_index(self, n: Tensor) -> Tensor:
        """Return what tells the network which blocks these are: (M,) to (M, width)."""
        embedding: Tensor = self.index(sinusoid(n, self.config.channels[0]))
        return embedding if self.index_table is None else embedding + self.index_table(n)

    def rows_of(self, table: nn.Embedding, n: Tensor) -> Tensor:
        """Return what a table holds for blocks: (M,) to (M, width of the table)."""
        rows: Tensor = table(n)
        return rows

    @torch.no_grad()
    def centre_texts_(self, pooled: Tensor) -> Tensor:
        """Take mean and unit of the mean text vectors from the training texts, (V, E), and return them in that unit."""
        self.text_mean.copy_(pooled.mean(0))
        self.text_unit.copy_((pooled - self.text_mean).square().mean().sqrt().clamp(min=1e-6))
        return (pooled - self.text_mean) / self.text_unit

    @torch.no_grad()
    def set_linear_(self, weights: Tensor) -> None:
        """Put a linear map from texts to clean blocks into the linear path, as well as its rank allows.

        Args:
            weights: (E, N, L), of texts in the unit of `centre_texts_`.
        """
        if self.linear_in is None or self.linear_out is None:
            return
        rank, flat = self.config.text_rank, weights.flatten(1).double()
        # The texts' side is narrow: its directions are those of the small product. The last ones are the largest.
        directions = torch.linalg.eigh(flat @ flat.T).eigenvectors.flip(1)[:, :rank]  # (E, kept)
        kept = directions.shape[1]
        self.linear_in.weight.zero_()
        rows = torch.zeros(rank, self.config.blocks, self.config.length, dtype=torch.float64)
        # The text's side keeps unit size, so that both sides learn at a rate of their own size.
        self.linear_in.weight[:kept] = directions.T.float()
        rows[:kept] = (directions.T @ flat).unflatten(1, (self.config.blocks, -1))
        self.linear_out.weight.copy_(rows.transpose(0, 1).flatten(1).float())  # (N, r L)

    def _denoise(self, h: Tensor, embedding: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        h1 = self.tf1(self.enc1(h, embedding), tokens, mask)  # (M, C1, b)
        h2 = self.tf2(self.enc2(self.down1(h1), embedding), tokens, mask)  # (M, C2, b / 2)
        h3 = self.enc3(self.down2(h2), embedding)  # (M, C3, b / 4)
        h = self.mid(h3, tokens, mask)
        h = self.up2(_double(self.dec3(torch.cat([h, h3], dim=1), embedding)))  # (M, C2, b / 2)
        h = self.tf4(self.dec2(torch.cat([h, h2], dim=1), embedding), tokens, mask)
        h = self.up1(_double(h))  # (M, C1, b)
        result: Tensor = self.tf5(self.dec1(torch.cat([h, h1], dim=1), embedding), tokens, mask)
        return result


def _double(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=-1)


def pool(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the text vectors that count: (M, S, E) and (M, S) to (M, E)."""
    counted = mask.to(tokens.dtype)[:, :, None]
    return (tokens * counted).sum(1) / counted.sum(1).clamp(min=1)


def _gain(config: WeightUNetConfig) -> Tensor:
    """Return what an estimate of clean weights counts in the prediction, for every timestep, (T,).

    Noise is (w_t - alpha w) / sigma; v is alpha noise - sigma w, of which what w says of the noise is left to the
    network.
    """
    kept = NoiseSchedule.from_config(config.diffusion).alphas_cumprod
    signal, noise = kept.sqrt(), (1 - kept).sqrt()
    gains = {"epsilon": -signal / noise, "v_prediction": -noise, "sample": torch.ones_like(kept)}
    return gains[config.diffusion.prediction].float()


@torch.no_grad()
def initialise_(model: WeightUNet, seed: int = 0) -> None:
    """Draw the first weights from a seed; the last layer, tables and second layers of branches start small or at 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = name.rsplit(".", 2)[-2]
        if parameter.ndim < 2:
            parameter.fill_(1.0 if "norm" in kind and name.endswith("weight") else 0.0)
        elif kind in ("conv2", "out", "cross_out", "fc2", "conv_out", "linear_out"):
            parameter.zero_()
        elif kind in ("index_table", "positions"):
            parameter.normal_(0.0, 1.0 if kind == "index_table" else 0.02, generator=generator)
        else:
            inputs = math.prod(parameter.shape[1:])
            parameter.normal_(0.0, inputs**-0.5, generator=generator)
