"""What a generator is trained on: low-rank weights of a GAN, or sigma of models; the rest of training is the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from finectl.adapters.sigma_dataset import HOW, SIGMA, SigmaDataset, open_sigma
from finectl.adapters.weight_dataset import WeightDataset, open_weights, target_of
from finectl.artifacts.store import Artifact
from finectl.data.concepts import Concept
from finectl.errors import UsageError
from finectl.models.weights.curves import Grid, layer_layout, model_layout
from finectl.models.weights.layout import Layout

if TYPE_CHECKING:
    from torch import Tensor

    from finectl.models.weights.config import WeightUNetConfig
    from finectl.models.weights.unet import WeightUNet
    from finectl.training.weights.generate import Codec


class Dataset(Protocol):
    """What the two kinds of collections have in common."""

    @property
    def artifact(self) -> Artifact: ...
    @property
    def concepts(self) -> tuple[Concept, ...]: ...
    @property
    def base(self) -> str: ...
    @property
    def text(self) -> Mapping[str, Any] | None: ...
    @property
    def initial(self) -> dict[str, Tensor]: ...
    def checkpoints(self, concept: Concept) -> dict[str, Tensor]: ...


class Generator(Protocol):
    """A trained generator that can be stored."""

    def save(self, directory: Any, raw: Any, ema: Any) -> None: ...


class Target(Protocol):
    """A collection as a generator is trained on it."""

    @property
    def name(self) -> str: ...
    @property
    def dataset(self) -> Dataset: ...
    @property
    def layout(self) -> Layout:
        """All blocks of one concept."""

    @property
    def network_blocks(self) -> int:
        """Blocks that the network has tables for."""

    def fit_codec(self, initial: Tensor, train: Tensor, basis: str) -> Codec:
        """Measure mean, scales and components; see `finectl.training.weights.fitting.fit_codec`."""

    def network(self, config: WeightUNetConfig) -> WeightUNet:
        """Return the network."""

    def linear_codec(self, codec: Codec) -> Any:
        """Return what encodes weights for the linear path's start."""

    def generator(self, network: Any, codec: Codec, text: Any, t_star: int, words: Sequence[str]) -> Generator:
        """Return the trained generator."""


def target(artifact: Artifact, rule: int, block_size: int) -> Target:
    """Open a collection, without torch.

    Args:
        artifact: Of kind `weight-dataset`.
        rule: How tensors of a LoRA are grouped.
        block_size: Numbers a block.

    Raises:
        UsageError: `rule` does not go with what the collection holds.
        InputError: it is damaged.
    """
    if target_of(artifact) != SIGMA:
        dataset = open_weights(artifact)
        return LoraTarget(dataset, Layout.of(dataset.layers, rule, block_size))
    if rule != 1:
        raise UsageError(f"--rule {rule} is one of low-rank weights, and {artifact.path} holds sigma", fix="--rule 1")
    if block_size < 1:
        raise UsageError(f"--block-size {block_size}", expected="at least 1")
    found = open_sigma(artifact)
    kinds = layer_layout(found.shapes, block_size)
    return SigmaTarget(found, kinds, Grid.of(found.depths), model_layout(kinds, found.depths))


@dataclass(frozen=True, eq=False)
class LoraTarget:
    """Low-rank weights."""

    dataset: WeightDataset
    layout: Layout
    name: str = "lora"

    @property
    def network_blocks(self) -> int:
        """See `Target`."""
        return self.layout.blocks

    def fit_codec(self, initial: Tensor, train: Tensor, basis: str) -> Codec:
        """See `Target`."""
        from finectl.training.weights.fitting import fit_codec

        return fit_codec(self.layout, initial, train, basis)

    def network(self, config: WeightUNetConfig) -> WeightUNet:
        """See `Target`."""
        from finectl.models.weights.unet import WeightUNet

        return WeightUNet(config)

    def linear_codec(self, codec: Codec) -> Any:
        """See `Target`."""
        return codec

    def generator(self, network: Any, codec: Codec, text: Any, t_star: int, words: Sequence[str]) -> Generator:
        """See `Target`."""
        from finectl.training.weights.generate import WeightGenerator

        return WeightGenerator(network, codec, self.dataset.layers, text, self.dataset.base, t_star, tuple(words))


@dataclass(eq=False)
class SigmaTarget:
    """What the layers of models own, at several depths."""

    dataset: SigmaDataset
    kinds: Layout
    grid: Grid
    layout: Layout
    name: str = SIGMA
    _codec: Any = None

    @property
    def network_blocks(self) -> int:
        """See `Target`."""
        return self.grid.rows * self.kinds.blocks

    def fit_codec(self, initial: Tensor, train: Tensor, basis: str) -> Codec:
        """See `Target`."""
        from finectl.training.weights.sigma import CurveCodec

        differences = (train - initial).flatten(0, 1).unflatten(1, (-1, self.kinds.blocks))
        self._codec = CurveCodec.fit(self.grid, self.kinds, self.dataset.depths, differences, basis)
        return self._codec.at(self.dataset.depths, initial)

    def network(self, config: WeightUNetConfig) -> WeightUNet:
        """See `Target`."""
        from finectl.models.weights.curve_unet import CurveUNet

        return CurveUNet(config, self.grid.mix_all(self.dataset.depths))

    def linear_codec(self, codec: Codec) -> Any:
        """See `Target`."""
        from finectl.training.weights.sigma import KnotCodec

        return KnotCodec(codec, self.grid.mix_all(self.dataset.depths), self.kinds.blocks)

    def generator(self, network: Any, codec: Codec, text: Any, t_star: int, words: Sequence[str]) -> Generator:
        """See `Target`."""
        from finectl.training.weights.sigma import SigmaGenerator

        config = self.dataset.config
        how = {"depths": list(self.dataset.depths), **{name: config[name] for name in HOW if name != "base"}}
        return SigmaGenerator(network, self._codec, text, self.dataset.base, t_star, tuple(words), how)
