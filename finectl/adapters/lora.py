"""Low-rank adapters: y = W x + B(A x) on linear layers and convolutions, and the normalisations behind the layers.

A layer of kernels (f, c, h, w) gets A of (r, c, h, w), with the layer's stride and padding, and B of (f, r, 1, 1); a
linear layer (out, in) gets (r, in) and (out, r). The scale alpha / r is 1 everywhere. States are named
`<module>.lora_A.weight`, `<module>.lora_B.weight`, and `<norm>.weight` and `<norm>.bias`.

Only `lora_layers` and what describes layers works without torch.

Reference: LoRA, arXiv 2106.09685, section 4.1; E2GAN, arXiv 2401.06127, section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

from finectl.errors import InputError, UsageError
from finectl.registry import nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

A, B = "lora_A", "lora_B"
RANKS_854 = "6,stem=4,reduce=4,enlarge=4,head=4"
"""Ranks at which the adapters of the `e2gan` generator fill 854 blocks of 256 weights, grouped by layers."""


class Adaptable(Protocol):
    """A layer with a weight of its own: its module's name, its shape, and the normalisation behind it."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def norm(self) -> str | None: ...
    @property
    def norm_size(self) -> int: ...


class Layered(Protocol):
    """A configuration that lists its layers in the order in which they are applied."""

    def layers(self) -> Sequence[Adaptable]: ...


@dataclass(frozen=True)
class LoraLayer:
    """The adapter of one layer.

    Args:
        name: The layer's module.
        kind: `conv` or `linear`.
        a_shape: Of A, whose first number is the rank.
        b_shape: Of B.
        norm: The module of the normalisation behind the layer, None without one that learns.
        norm_size: Its channels, 0 without one.
    """

    name: str
    kind: str
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    norm: str | None = None
    norm_size: int = 0

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a_shape[0]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of the adapter's tensors, in order."""
        found = {f"{self.name}.{A}.weight": self.a_shape, f"{self.name}.{B}.weight": self.b_shape}
        if self.norm:
            found.update({f"{self.norm}.{part}": (self.norm_size,) for part in ("weight", "bias")})
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the adapter as plain JSON."""
        return {**asdict(self), "a_shape": list(self.a_shape), "b_shape": list(self.b_shape)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraLayer:
        """Return the adapter that `to_dict` wrote.

        Raises:
            InputError: a field is missing, unknown or of another type.
        """
        known = {field.name for field in fields(cls)}
        if set(values) != known:
            raise InputError(
                f"the description of an adapter has the fields {', '.join(sorted(map(str, values)))}",
                expected=", ".join(sorted(known)),
            )
        try:
            shapes = {key: tuple(int(side) for side in values[key]) for key in ("a_shape", "b_shape")}
            return cls(**{**values, **shapes})
        except (TypeError, ValueError) as error:
            raise InputError(f"the description of the adapter of {values['name']!r} is wrong: {error}") from error


def parse_ranks(text: str) -> tuple[int, dict[str, int]]:
    """Return the rank of all layers, and those of single modules, from `6` or `6,stem=4,head=4`.

    Raises:
        UsageError: it is no such list.
    """
    first, *others = [part.strip() for part in text.split(",")]
    try:
        single = {name: int(rank) for name, rank in (part.split("=") for part in others)}
        ranks = (int(first), single)
    except ValueError as error:
        raise UsageError(f"{text!r} are no ranks", expected="such as 4, or 6,stem=4,head=4") from error
    if min(ranks[0], *ranks[1].values(), ranks[0]) < 1:
        raise UsageError(f"{text!r} has a rank below 1", expected="ranks of at least 1")
    return ranks


def lora_layers(config: Layered, ranks: str | int) -> tuple[LoraLayer, ...]:
    """Return the adapters of all layers of a model, in the order of its configuration.

    Args:
        config: Of the model.
        ranks: A rank, or text as `parse_ranks` reads it: a name in it is a module, with all that is inside.

    Raises:
        UsageError: the ranks are none, or name a module that the model has not.
    """
    usual, single = parse_ranks(str(ranks))
    layers = config.layers()
    for name in single:
        if not any(_inside(layer.name, name) for layer in layers):
            modules = sorted({layer.name.split(".")[0] for layer in layers})
            raise UsageError(
                f"there is no module {name!r} to give a rank to{nearest(name, modules)}",
                expected=f"one of: {', '.join(modules)}, or a module inside one of them",
            )
    found = []
    for layer in layers:
        # The longest name that fits is the most exact one.
        named = max((name for name in single if _inside(layer.name, name)), key=len, default="")
        rank = single.get(named, usual)
        kernel = (1,) * (len(layer.shape) - 2)
        found.append(
            LoraLayer(
                name=layer.name,
                kind="conv" if kernel else "linear",
                a_shape=(rank, *layer.shape[1:]),
                b_shape=(layer.shape[0], rank, *kernel),
                norm=layer.norm if layer.norm_size else None,
                norm_size=layer.norm_size,
            )
        )
    return tuple(found)


def _inside(layer: str, module: str) -> bool:
    return layer == module or layer.startswith(f"{module}.")


def lora_shapes(layers: Sequence[LoraLayer]) -> dict[str, tuple[int, ...]]:
    """Return name to shape of all tensors of the adapters, in order."""
    return {name: shape for layer in layers for name, shape in layer.shapes.items()}


def count_lora(layers: Sequence[LoraLayer]) -> int:
    """Return the numbers in the adapters, the normalisations' included."""
    return sum(math.prod(shape) for shape in lora_shapes(layers).values())


def initial_lora(base: Mapping[str, Tensor], layers: Sequence[LoraLayer], seed: int) -> dict[str, Tensor]:
    """Return adapters that change nothing: A drawn, B zero, the normalisations as they are.

    All concepts start from the same ones: from A's of their own, equal products BA would be unequal weights.

    Args:
        base: State of the model.
        layers: From `lora_layers`.
        seed: Of A: uniform with a bound of 1 / sqrt(inputs of the layer), as PEFT draws it.

    Raises:
        InputError: the model has no such layer.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    lora: dict[str, Tensor] = {}
    for layer in layers:
        _require_layer(base, layer)
        bound = 1.0 / math.sqrt(math.prod(layer.a_shape[1:]))
        lora[f"{layer.name}.{A}.weight"] = torch.empty(layer.a_shape).uniform_(-bound, bound, generator=generator)
        lora[f"{layer.name}.{B}.weight"] = torch.zeros(layer.b_shape)
        if layer.norm:
            for part in ("weight", "bias"):
                lora[f"{layer.norm}.{part}"] = base[f"{layer.norm}.{part}"].detach().clone()
    return lora


def _require_layer(base: Mapping[str, Tensor], layer: LoraLayer) -> None:
    names = [f"{layer.name}.weight", *([f"{layer.norm}.weight"] if layer.norm else [])]
    for name in names:
        if name not in base:
            raise InputError(f"the model has no {name!r}, which the adapters are of", expected="adapters of this model")


def attach_lora(model: nn.Module, layers: Sequence[LoraLayer]) -> nn.Module:
    """Give a model adapters, in place; only they and the normalisations behind the layers are trained from then on.

    Args:
        model: Any model with modules of these names. What its adapters hold is to be loaded (`load_lora`).
        layers: From `lora_layers`.

    Returns:
        The model. Its state has the adapters' tensors beside its own.

    Raises:
        InputError: the model has no such layer, or it has another shape.
    """
    from torch import nn

    from finectl.adapters.low_rank_layers import sum_, sums

    modules = dict(model.named_modules())
    model.requires_grad_(False)
    for layer in layers:
        module = modules.get(layer.name)
        weight = getattr(module, "weight", None)
        wanted = (layer.b_shape[0], *layer.a_shape[1:])
        if module is None or weight is None or tuple(weight.shape) != wanted:
            found = "is not there" if weight is None else f"has a weight of shape {tuple(weight.shape)}"
            raise InputError(f"layer {layer.name!r} {found}", expected=f"a weight of shape {wanted}")
        if isinstance(module, nn.Conv2d):
            like: Any = module
            inner: list[nn.Module] = [
                nn.Conv2d(like.in_channels, layer.rank, like.kernel_size, like.stride, like.padding, bias=False),
                nn.Conv2d(layer.rank, like.out_channels, 1, bias=False),
            ]
        else:
            inner = [
                nn.Linear(layer.a_shape[1], layer.rank, bias=False),
                nn.Linear(layer.rank, layer.b_shape[0], bias=False),
            ]
        for name, part in zip((A, B), inner, strict=True):
            module.add_module(name, part.to(weight.device, weight.dtype))
        if sums(module):
            sum_(module)
        else:
            module.register_forward_hook(_add_low_rank)
        if layer.norm:
            modules[layer.norm].requires_grad_(True)
    return model


def _add_low_rank(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    low: Tensor = module.get_submodule(B)(module.get_submodule(A)(inputs[0]))
    return output + low


def lora_state(model: nn.Module, layers: Sequence[LoraLayer]) -> dict[str, Tensor]:
    """Return what the adapters of a model hold now, as copies."""
    state = model.state_dict()
    return {name: state[name].detach().clone() for name in lora_shapes(layers)}


def load_lora(model: nn.Module, layers: Sequence[LoraLayer], lora: Mapping[str, Tensor]) -> None:
    """Put values into the adapters of a model.

    Raises:
        InputError: names or shapes are others.
    """
    import torch

    require_lora(layers, lora)
    tensors = model.state_dict()
    with torch.no_grad():
        for name, value in lora.items():
            tensors[name].copy_(value)


def require_lora(layers: Sequence[LoraLayer], lora: Mapping[str, Tensor], whose: str = "the state") -> None:
    """Check that a state is that of these adapters.

    Raises:
        InputError: names or shapes are others.
    """
    shapes = lora_shapes(layers)
    odd = sorted(set(shapes) ^ set(lora))
    if odd:
        kind = "lacks" if odd[0] in shapes else "has the unknown"
        raise InputError(f"{whose} does not fit the adapters: it {kind} {odd[0]!r}", expected=f"{len(shapes)} tensors")
    for name, shape in shapes.items():
        if tuple(lora[name].shape) != shape:
            raise InputError(
                f"{whose} does not fit the adapters: {name!r} has shape {tuple(lora[name].shape)}", expected=f"{shape}"
            )


def low_rank_product(a: Tensor, b: Tensor) -> Tensor:
    """Return BA as what is added to the layer's weight, in the shape of that weight."""
    product: torch.Tensor = b.flatten(1) @ a.flatten(1)  # (out, in * h * w)
    return product.reshape(b.shape[0], *a.shape[1:])


def merge_lora(state: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of a model without adapters that computes the same: W + BA, and the adapters' normalisations.

    Args:
        state: Of the model, without adapters.
        lora: Of the adapters.

    Raises:
        InputError: the model has no such layer.
    """
    merged = {name: value.detach().clone() for name, value in state.items()}
    for name, value in lora.items():
        layer, _, part = name.rpartition(".")
        layer, _, factor = layer.rpartition(".") if layer.endswith((f".{A}", f".{B}")) else (layer, "", "")
        target = f"{layer}.{part}"
        if target not in merged:
            raise InputError(
                f"the model has no {target!r}, which the adapters are of", expected="adapters of this model"
            )
        if factor == A:
            product = low_rank_product(value.float(), lora[f"{layer}.{B}.weight"].float())
            merged[target] = (merged[target].float() + product.to(merged[target].device)).to(merged[target].dtype)
        elif not factor:
            merged[target] = value.detach().clone().to(merged[target])
    return merged
