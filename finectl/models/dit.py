"""The Diffusion Transformer, dense or factorised: one class, different linear layers.

Reference: Peebles and Xie, arXiv 2212.09748, section 3 (adaLN-Zero blocks); parameter names as in its published
checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finectl.diffusion.edm import network_times
from finectl.models.extra_layers import Bottleneck, draw_extra
from finectl.models.extras import BOTTLENECK, PROMPTS
from finectl.models.presets import FREQUENCIES, LAYER_TYPES, NORM_EPS, DiTConfig, layer_shapes
from finectl.models.projection_layers import PREFIX as PROJECTIONS
from finectl.models.projection_layers import TokenProjection, build_projections
from finectl.models.sharing import (
    SHARED,
    draw_own,
    draw_shared,
    shared_part,
    tied_layer,
    written_out,
    xavier_uniform,
)
from finectl.models.tying import OWN, Tying
from finectl.models.zero_layers import ZeroConv2d, ZeroEmbedding, ZeroLinear

MAX_PERIOD = 10_000.0
EMBEDDING_STD = 0.02
EXPLICIT_ATTENTION_TOKENS = 512
"""Up to this many tokens, half-precision training on a CPU holds the matrix of attention weights."""


class PatchEmbedder(nn.Module):
    """Cut an image into patches and map each to a token: (B, C, H, W) -> (B, T, D)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.proj = ZeroConv2d(config.channels, config.width, config.patch_size, stride=config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.proj(x)).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Map timesteps to vectors through sinusoids and two layers: (B,) -> (B, D)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.frequency_divisor = config.frequency_divisor
        first = ZeroLinear(FREQUENCIES, config.width)
        self.mlp = nn.Sequential(first, nn.SiLU(), ZeroLinear(config.width, config.width))

    def forward(self, t: Tensor) -> Tensor:
        waves = timestep_frequencies(t, self.frequency_divisor)  # (B, 256)
        return cast(Tensor, self.mlp(waves.to(cast(nn.Linear, self.mlp[0]).weight.dtype)))


class LabelEmbedder(nn.Module):
    """Look labels up in a table whose last row is the null class: (B,) -> (B, D)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.embedding_table = ZeroEmbedding(config.num_classes + 1, config.width)

    def forward(self, y: Tensor) -> Tensor:
        return cast(Tensor, self.embedding_table(y))


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused query-key-value layer."""

    def __init__(self, heads: int, qkv: nn.Module, proj: nn.Module) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = qkv
        self.proj = proj

    def forward(self, x: Tensor, prompts: int = 0) -> Tensor:
        """Mix tokens: (B, T, D) to (B, T - prompts, D).

        The first `prompts` tokens are attended to only.
        """
        batch, tokens, width = x.shape
        parts = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B, heads, T, D / heads)
        if prompts:
            q = q[:, :, prompts:]
        mixed = attention(q, k, v)
        return cast(Tensor, self.proj(mixed.transpose(1, 2).reshape(batch, tokens - prompts, width)))


class FeedForward(nn.Module):
    """Two layers with a tanh-approximated GELU between them, and a bottleneck beside them where there is one."""

    def __init__(self, fc1: nn.Module, fc2: nn.Module, bottleneck: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1 = fc1
        self.fc2 = fc2
        self.bottleneck = bottleneck

    def forward(self, x: Tensor) -> Tensor:
        output = cast(Tensor, self.fc2(F.gelu(self.fc1(x), approximate="tanh")))
        return output if self.bottleneck is None else output + self.bottleneck(x)


class Block(nn.Module):
    """A transformer block whose shifts, scales and gates come from the condition (adaLN-Zero).

    Args:
        config: The model's configuration.
        layers: The block's linear layers by type, dense or factorised.
    """

    def __init__(self, config: DiTConfig, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.mlp_norm_eps = config.mlp_norm_eps
        self.attn = SelfAttention(config.heads, layers["qkv"], layers["o"])
        self.mlp = FeedForward(layers["in"], layers["out"])
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), layers["adaln"])
        self.prompts: nn.Parameter | None
        self.register_parameter(PROMPTS, None)
        self.extend(config)

    def extend(self, config: DiTConfig) -> None:
        """Add those of the configuration's extra parts that are not there yet; they hold zeros."""
        extras = config.extras
        if extras.bottleneck and self.mlp.bottleneck is None:
            self.mlp.bottleneck = Bottleneck(config.width, extras.bottleneck, extras.scale)
        if extras.prompts and self.prompts is None:
            self.prompts = nn.Parameter(torch.zeros(extras.prompts, config.width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        signals = self.adaLN_modulation(condition).unsqueeze(1).chunk(6, dim=2)  # 6 x (B, 1, D)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = signals
        if self.prompts is None:
            attended = self.attn(modulated_norm(x, shift, scale))
        else:
            longer = torch.cat([self.prompts.to(x.dtype).expand(len(x), -1, -1), x], dim=1)  # (B, P + T, D)
            attended = self.attn(modulated_norm(longer, shift, scale), len(self.prompts))
        x = torch.addcmul(x, gate, attended)  # (B, T, D)
        hidden = modulated_norm(x, mlp_shift, mlp_scale, self.mlp_norm_eps)
        return torch.addcmul(x, mlp_gate, self.mlp(hidden))


class FinalLayer(nn.Module):
    """Map tokens to the pixels of their patches: (B, T, D) -> (B, T, p * p * out_channels)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.linear = ZeroLinear(config.width, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ZeroLinear(config.width, 2 * config.width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).unsqueeze(1).chunk(2, dim=2)  # 2 x (B, 1, D)
        return cast(Tensor, self.linear(modulated_norm(x, shift, scale)))


class DiT(nn.Module):
    """A Diffusion Transformer; all parameters are zero until `initialize_` or `load_state_dict`, projections one.

    Args:
        config: Sizes, which layer types are factorised, and whether projections follow the blocks.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbedder(config)
        self.t_embedder = TimestepEmbedder(config)
        self.y_embedder = LabelEmbedder(config)
        self.pos_embed: Tensor
        positions = position_embedding(config.width, config.image_size // config.patch_size)
        self.register_buffer("pos_embed", positions, persistent=False)  # (T, D)
        self.times: Tensor | None
        told = network_times(config.diffusion).float() if config.diffusion.is_edm else None
        self.register_buffer("times", told, persistent=False)  # (timesteps,)
        self.factors = _shared_parts(config)
        self.blocks = nn.ModuleList(Block(config, self._layers(index)) for index in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.projections = build_projections(config.places, TokenProjection)
        self._running: Sequence[int] | None = None

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise (or another target) in a batch of noisy images.

        Args:
            x: (B, C, H, W), float.
            t: (B,), timesteps in 0..T-1, integer or, but of EDM's process, float.
            y: (B,), int64 labels in 0..num_classes; `num_classes` is the null class.

        Returns:
            (B, out_channels, H, W).
        """
        tokens = self.x_embedder(x) + self.pos_embed  # (B, T, D)
        told = t if self.times is None else self.times[t]
        condition = self.t_embedder(told) + self.y_embedder(y)  # (B, D)
        for index in range(len(self.blocks)) if self._running is None else self._running:
            tokens = self.blocks[index](tokens, condition)
            if "blocks" in self.projections:
                tokens = cast(nn.ModuleDict, self.projections["blocks"])[str(index)](tokens)
        return self._unpatchify(self.final_layer(tokens, condition))

    @contextmanager
    def running(self, layers: Sequence[int]) -> Iterator[None]:
        """Run these layers alone, in this order, inside a `with` block."""
        self._running = layers
        try:
            yield
        finally:
            self._running = None

    def _unpatchify(self, patches: Tensor) -> Tensor:
        p, channels = self.config.patch_size, self.config.out_channels
        side = self.config.image_size // p
        grid = patches.view(-1, side, side, p, p, channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, side * p, side * p)

    def _layers(self, index: int) -> dict[str, nn.Module]:
        """Build the linear layers of one block by type."""
        config = self.config
        layers: dict[str, nn.Module] = {}
        for kind, (outputs, inputs) in layer_shapes(config).items():
            if config.factorized is not None and kind in self.factors:
                shape, place = (outputs, inputs), index / config.depth
                layers[kind] = tied_layer(config.factorized, kind, self.factors[kind], shape, place)
            else:
                layers[kind] = ZeroLinear(inputs, outputs)
        return layers


def _shared_parts(config: DiTConfig) -> nn.ModuleDict:
    tying = config.factorized
    if tying is None:
        return nn.ModuleDict()
    shapes = layer_shapes(config)
    return nn.ModuleDict({kind: shared_part(tying, kind, shapes[kind]) for kind in tying.types})


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute softmax(q k^T / sqrt(d)) v.

    Args:
        q: (B, heads, T, d), and so `k` and `v`.

    Returns:
        (B, heads, T, d).
    """
    narrow = q.dtype in (torch.bfloat16, torch.float16) and q.device.type == "cpu"
    if narrow and q.requires_grad and q.shape[2] <= EXPLICIT_ATTENTION_TOKENS:
        # The CPU's flash kernel is 3 to 8 times slower than this in its backward in half precision.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, T, T)
        return scores.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = NORM_EPS) -> Tensor:
    """Normalise each token and apply the condition's scale and shift.

    Args:
        x: (B, T, D).
        shift: (B, 1, D).
        scale: (B, 1, D).
        eps: Added to the variance.

    Returns:
        (B, T, D).
    """
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


def timestep_frequencies(t: Tensor, divisor: int) -> Tensor:
    """Return the sinusoidal embedding of timesteps, (B, 256) float32: 128 cosines, then 128 sines.

    Args:
        t: (B,), timesteps.
        divisor: Frequencies are exp(-ln(1e4) i / divisor), i in 0..127.

    Reference: arXiv 2212.09748, section 3.2.
    """
    index = torch.arange(FREQUENCIES // 2, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * index / divisor)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def position_embedding(width: int, side: int) -> Tensor:
    """Return the fixed 2-D sine-cosine embedding of a square grid, (side^2, width) float32, row by row.

    The first half of the channels encodes the column, the second the row; each half is sines, then cosines.
    """
    quarter = width // 4
    omega = MAX_PERIOD ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D / 2)
    columns = axis.repeat(side, 1)
    rows = axis.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()


def drop_labels(y: Tensor, null: int, probability: float, generator: torch.Generator) -> Tensor:
    """Replace each label by the null class with the given probability.

    Args:
        y: (B,), int64.
        null: The null class's index.
        probability: In [0, 1].
        generator: Source of the random numbers; it may be on another device than `y`.

    Returns:
        (B,), int64.

    Reference: Ho and Salimans, arXiv 2207.12598, algorithm 1.
    """
    draws = torch.rand(y.shape, generator=generator, device=generator.device)
    return torch.where(draws.to(y.device) < probability, null, y)


@torch.no_grad()
def initialize_(model: DiT, generator: torch.Generator) -> DiT:
    """Initialise a DiT in place; every random number comes from `generator`.

    Linear layers are Xavier-uniform, embeddings and the timestep MLP N(0, 0.02), biases, adaLN layers and the final
    layer zero, projections the identity. How what layers share is drawn, `finectl.models.sharing` says; extra parts,
    `finectl.models.extra_layers`.

    Args:
        model: Dense or factorised.
        generator: On any device; the same one gives the same weights whatever the model's device.

    Returns:
        `model`.

    Reference: arXiv 2212.09748, section 3.2.
    """
    tying, shapes = model.config.factorized, layer_shapes(model.config)
    kind_of = {path: kind for kind, path in LAYER_TYPES.items()}
    drawn: dict[str, Tensor] = {}  # what the layers of a type have in common at the start
    for name, parameter in model.named_parameters():
        layer, _, last = name.rpartition(".")
        if name.startswith(PROJECTIONS):
            value = torch.eye(len(parameter))
        elif f".{BOTTLENECK}." in name or name.endswith(f".{PROMPTS}"):
            value = draw_extra(name, parameter.shape, model.config.patch_inputs, generator)
        elif name.endswith("bias") or ".adaLN_modulation." in name or name.startswith("final_layer."):
            value = torch.zeros(parameter.shape)
        elif tying is not None and name.startswith(SHARED):
            kind = layer.removeprefix(SHARED)
            value = draw_shared(tying, kind, last, parameter.shape, shapes[kind], generator)
        elif tying is not None and last in OWN:
            kind = kind_of[layer.split(".", 2)[2]]
            value = draw_own(tying, parameter.shape, shapes[kind], drawn, kind, generator)
        elif name.startswith(("t_embedder.", "y_embedder.")):
            value = EMBEDDING_STD * torch.randn(parameter.shape, generator=generator, device=generator.device)
        else:
            value = xavier_uniform(parameter.shape, generator)
        parameter.copy_(value)
    return model


@torch.no_grad()
def dense_state_dict(model: DiT | Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """Return the state of the dense DiT that computes what a factorised one does.

    Args:
        model: A DiT, or its state dict.
        config: Its configuration, dense or factorised.

    Returns:
        Parameter name -> float32 tensor; weights of layers that share parameters are built (for FINE as
        U diag(sigma) V^T), the others are the given tensors where those are float32 already.
    """
    state = model.state_dict() if isinstance(model, DiT) else model
    kept = (name for name in state if not name.startswith(SHARED) and name.rpartition(".")[2] not in OWN)
    dense = {name: state[name].detach().float() for name in kept}
    tying = config.factorized
    for kind in tying.types if tying is not None else ():
        prefix = f"{SHARED}{kind}."
        shared = {name[len(prefix) :]: value.float() for name, value in state.items() if name.startswith(prefix)}
        for index in range(config.depth):
            layer = f"blocks.{index}.{LAYER_TYPES[kind]}"
            own = {name: state[f"{layer}.{name}"].float() for name in OWN if f"{layer}.{name}" in state}
            for part, value in written_out(cast(Tying, tying), shared, own, index / config.depth).items():
                dense[f"{layer}.{part}"] = value
    return dense
