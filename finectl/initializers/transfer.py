"""What the methods share that start from a dense ancestor: its layers, what else fits the target, and the counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor

from finectl.artifacts.store import Artifact
from finectl.diffusion.random import generator_for
from finectl.initializers.base import Initialized, Request
from finectl.models.dit import DiT, dense_state_dict, initialize_
from finectl.models.io import load_weights, read_dit_config
from finectl.models.learngene import dense_config
from finectl.models.presets import LAYER_TYPES, DiTConfig

BLOCKS = "blocks."
BRANCH_ENDS = ("o", "out")
"""Types of the layers that end a residual branch."""
LABELS = "y_embedder."
Layer = Mapping[str, Tensor]  # a block's parameters by their names in it, such as "attn.qkv.weight"


@dataclass(frozen=True, eq=False)
class Ancestor:
    """A dense model to start from.

    Args:
        config: Its architecture, without shared factors.
        state: Its weights, the averaged ones where there are some.
    """

    config: DiTConfig
    state: Mapping[str, Tensor]

    @classmethod
    def of(cls, request: Request) -> Ancestor:
        """Read the ancestor of a request; of a condensed model W = U diag(sigma) V^T is written out.

        Raises:
            InputError: it is no Diffusion Transformer, or a file is damaged.
        """
        artifact = cast(Artifact, request.source)
        config, state = read_dit_config(artifact), load_weights(artifact, "ema")
        if config.factorized is not None:
            state = dense_state_dict(state, config)
        return cls(dense_config(config, config.depth), state)

    @property
    def layers(self) -> list[Layer]:
        """Its blocks, from the first to the last."""
        prefixes = [f"{BLOCKS}{index}." for index in range(self.config.depth)]
        return [{n[len(p) :]: v for n, v in self.state.items() if n.startswith(p)} for p in prefixes]

    @property
    def rest(self) -> dict[str, Tensor]:
        """Its embedders and its final layer."""
        return {name: value for name, value in self.state.items() if not name.startswith(BLOCKS)}


def fresh_state(request: Request) -> dict[str, Tensor]:
    """Return the target as DiT's own initialisation makes it: what a method does not fill stays so."""
    model = initialize_(DiT(request.target), generator_for("init", request.job.config.seed))
    return model.state_dict()


def assemble(
    request: Request,
    layers: Mapping[int, Layer] | Sequence[Layer],
    rest: Mapping[str, Tensor],
    fresh: Mapping[str, Tensor] | None = None,
) -> Initialized:
    """Put layers and the rest into the target; what is missing, or does not fit, starts as DiT's own initialisation.

    Args:
        request: What is to be made.
        layers: Blocks by their place in the target, from 0.
        rest: Embedders and final layer by name. Other channels start anew, and so do labels of another data set.
        fresh: What `fresh_state` returned, where the method has it already.

    Returns:
        The dense state, with the counts of what came from the source.
    """
    state = dict(fresh_state(request) if fresh is None else fresh)
    numbered = layers.items() if isinstance(layers, Mapping) else enumerate(layers)
    blocks = {f"{BLOCKS}{index}.{name}": value for index, layer in numbered for name, value in layer.items()}
    kept = fitting(request, rest, state)
    state.update({name: value.to(state[name].dtype).clone() for name, value in {**blocks, **kept}.items()})
    return Initialized(state, transferred=count(blocks), transferred_embedders=count(kept))


def copy_layers(request: Request, placement: Callable[[int, int], Mapping[int, int]]) -> Initialized:
    """Copy some of a dense ancestor's layers, its embedders and its final layer; other layers start anew.

    Args:
        request: What is to be made.
        placement: From L and L' to the layer of the ancestor that each filled layer of the target comes from.

    Raises:
        InputError: the ancestor is no Diffusion Transformer, or a file is damaged.
    """
    ancestor = Ancestor.of(request)
    layers = ancestor.layers
    sources = placement(len(layers), request.target.depth)
    return assemble(request, {index: layers[source] for index, source in sources.items()}, ancestor.rest)


def fitting(request: Request, rest: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the embedders and the final layer that fit the target: other channels, or labels of other data, do not."""
    return {
        name: value
        for name, value in rest.items()
        if value.shape == target[name].shape and (request.same_labels or not name.startswith(LABELS))
    }


def scale_branches(made: Initialized, factor: float) -> Initialized:
    """Multiply weights and biases of the layers that end a residual branch (`o` and `out`), in all blocks."""
    ends = tuple(f"{LAYER_TYPES[kind]}.{part}" for kind in BRANCH_ENDS for part in ("weight", "bias"))
    scaled = {n: v * factor if n.startswith(BLOCKS) and n.endswith(ends) else v for n, v in made.state.items()}
    return replace(made, state=scaled)


def count(tensors: Mapping[str, Tensor]) -> int:
    """Return the number of values in some tensors."""
    return sum(value.numel() for value in tensors.values())
