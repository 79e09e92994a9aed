"""The generators: residual blocks between two halvings and two doublings, with or without a text-conditioned block.

Doublings are nearest-neighbour enlargement and a convolution: low-rank adapters of transposed convolutions could not be
loaded by PEFT. Parameter names are those of `GeneratorConfig.layers`.

Reference: E2GAN, arXiv 2401.06127, section 3; pix2pix, arXiv 1611.07004; the transformer block is that of
arXiv 2112.10752, section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finectl.models.gan.config import CHANNELS, FEED_FORWARD, HALVINGS, KERNEL, WIDE_KERNEL, GeneratorConfig

INIT_STD = 0.02


def make_norm(kind: str, channels: int, affine: bool = True) -> nn.Module:
    """Return an instance or batch normalisation."""
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.InstanceNorm2d(channels, affine=affine)


class ConvNorm(nn.Module):
    """Enlarge, pad by reflection, convolve, normalise, ReLU; each but the convolution where it is asked for."""

    def __init__(
        self, config: GeneratorConfig, inputs: int, outputs: int, *, wide: bool = False, scale: float = 1.0
    ) -> None:
        super().__init__()
        kernel = WIDE_KERNEL if wide else KERNEL
        self.reflect = kernel // 2 if wide else 0
        self.enlarge = scale > 1
        # A low-rank adapter copies stride and padding of its layer, and knows zeros only.
        stride, padding = 2 if scale < 1 else 1, 0 if wide else kernel // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=config.bias)
        self.norm = make_norm(config.norm, outputs, config.affine)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Return (B, outputs, H * scale, W * scale); `skip`, of that shape, is added before the ReLU."""
        if self.enlarge:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.reflect:
            x = F.pad(x, (self.reflect,) * 4, mode="reflect")
        y: Tensor = self.norm(self.conv(x))
        return F.relu(y if skip is None else y + skip)


class Residual(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))), both convolutions padded by reflection."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        width = config.width
        self.conv1, self.conv2 = (nn.Conv2d(width, width, KERNEL, bias=config.bias) for _ in range(2))
        self.norm1, self.norm2 = (make_norm(config.norm, width, config.affine) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W), the shape of x."""
        y = F.relu(self.norm1(self.conv1(F.pad(x, (1,) * 4, mode="reflect"))))
        return x + self.norm2(self.conv2(F.pad(y, (1,) * 4, mode="reflect")))


class Attention(nn.Module):
    """Attention of an image's places to a sequence: to themselves, or to the text."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (B, T, D) for x (B, T, D), context (B, S, E) and mask (B, S), True where context says something."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T or S, D / heads)
            for part in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        allowed = None if mask is None else mask[:, None, None, :]
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        out: Tensor = self.to_out(seen.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """Linear, GEGLU, linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * FEED_FORWARD * width)
        self.out = nn.Linear(FEED_FORWARD * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, D), the shape of x."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        out: Tensor = self.out(value * F.gelu(gate))
        return out


class Transformer(nn.Module):
    """Self-attention, cross-attention to the text and feed-forward, each behind a LayerNorm and added."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        width = config.width
        self.attn1 = Attention(width, width, config.heads)
        self.attn2 = Attention(width, config.text_width, config.heads)
        self.ff = FeedForward(width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Return (B, C, H, W), the shape of x."""
        y = x.flatten(2).transpose(1, 2)  # (B, H*W, C)
        normed = self.norm1(y)
        y = y + self.attn1(normed, normed)
        y = y + self.attn2(self.norm2(y), tokens, mask)
        y = y + self.ff(self.norm3(y))
        return y.transpose(1, 2).unflatten(2, x.shape[-2:])


class Head(nn.Module):
    """The last convolution, and tanh."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.conv = nn.Conv2d(config.ngf, CHANNELS, WIDE_KERNEL, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 3, H, W) in [-1, 1]."""
        return torch.tanh(self.conv(F.pad(x, (WIDE_KERNEL // 2,) * 4, mode="reflect")))


class Generator(nn.Module):
    """An image-to-image network, see the module.

    Args:
        config: Its sizes.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = ConvNorm(config, CHANNELS, config.ngf, wide=True)
        for n in range(HALVINGS):
            width = config.ngf * 2**n
            self.add_module(f"down{n + 1}", ConvNorm(config, width, 2 * width, scale=0.5))
        for block in range(config.blocks):
            self.add_module(f"res{block + 1}", Residual(config))
        if config.text_width:
            self.reduce = ConvNorm(config, config.width, config.width, scale=0.5)
            self.transformer = Transformer(config)
            self.enlarge = ConvNorm(config, config.width, config.width, scale=2)
        for n in range(HALVINGS):
            width = config.width // 2**n
            self.add_module(f"up{n + 1}", ConvNorm(config, width, width // 2, scale=2))
        self.head = Head(config)

    def forward(self, x: Tensor, tokens: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Edit images.

        Args:
            x: Images, float (B, 3, H, W) in [-1, 1].
            tokens: Vectors of the texts, float (B, S, E); of no use to a generator without text.
            mask: Which of them stand for something written, bool (B, S); all by default.

        Returns:
            Images, float (B, 3, H, W) in [-1, 1].
        """
        x = self.stem(x)
        before: list[Tensor] = []  # the last is that of the size that the first doubling ends at
        for n in range(HALVINGS):
            before.append(x)
            x = self.get_submodule(f"down{n + 1}")(x)
        for block in range(self.config.blocks):
            if self.config.text_width and block == self.config.blocks - 1:
                if tokens is None:
                    raise ValueError("this generator is conditioned on text, and no tokens are given")
                edited = self.enlarge(self.transformer(self.reduce(x), tokens, mask))
                x = x + edited if self.config.bypass else edited
            x = self.get_submodule(f"res{block + 1}")(x)
        for n in range(HALVINGS):
            x = self.get_submodule(f"up{n + 1}")(x, before.pop() if self.config.skips else None)
        out: Tensor = self.head(x)
        return out


@torch.no_grad()
def initialize_(model: nn.Module, generator: torch.Generator) -> None:
    """Draw all weights: convolutions N(0, 0.02^2), linear layers uniform up to 1/sqrt(inputs); biases 0, norms 1 and 0.

    Args:
        model: A generator or a discriminator, on the CPU.
        generator: Where all random numbers come from.

    Reference: arXiv 1611.07004, section 6.2.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.normal_(0.0, INIT_STD, generator=generator)
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            module.weight.uniform_(-bound, bound, generator=generator)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            module.bias.zero_()


@torch.no_grad()
def recompute_statistics(model: nn.Module, batches: Iterable[tuple[Tensor, ...]]) -> None:
    """Set the running mean and variance of batch normalisations to the average over batches; others have none.

    Weights that were generated or merged bring no statistics of their own.

    Args:
        model: A generator.
        batches: Arguments of its calls.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    momenta, training = [norm.momentum for norm in norms], model.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
    model.train()
    for batch in batches:
        model(*batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(training)
