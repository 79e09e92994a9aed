"""A generator of sigma and biases: from a task's text to what the layers of a model of any depth own, in one step.

Blocks are pairs of layer type and layer. Mean, scale and principal components are measured over all layers and depths:
the mean between the knots of a grid (`finectl.models.weights.curves`), scale and components for each layer type. So a
depth that was never collected has a normalisation as well as a network.

Reference: arXiv 2407.11966, sections 4.2 and 4.3, with sigma of FINE (arXiv 2409.19289) in the place of LoRAs; ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finectl.artifacts.files import write_json
from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import load_tensors, save_tensors
from finectl.diffusion.schedule import NoiseSchedule
from finectl.errors import InputError
from finectl.models.io import CONFIG, FILES, weights_file
from finectl.models.text import load_text
from finectl.models.weights.basis import NONE, Basis
from finectl.models.weights.config import WeightUNetConfig, coefficients_of
from finectl.models.weights.curve_unet import CurveUNet
from finectl.models.weights.curves import Grid, by_layer, model_layout
from finectl.models.weights.layout import Layout
from finectl.models.weights.normalise import Normaliser
from finectl.training.weights.blocks import Texts
from finectl.training.weights.files import NORMALISER, read_sigma_generator
from finectl.training.weights.generate import Codec, Sampling, draw_values

MEANS = "knots"
SMOOTH = (1e-4, 1e-2)
"""Regularisers of what is read off at the knots, and of its slopes: what is seen at one depth only has none."""


@dataclass(frozen=True, eq=False)
class CurveCodec:
    """Between what layers own and what the network sees, at any depth.

    Args:
        grid: Of the knots.
        kinds: Codec of the blocks of one layer, without a start; its mean is what is left over of the knots.
        means: (P, kinds, b), the mean difference from the start, at the knots.
    """

    grid: Grid
    kinds: Codec
    means: Tensor

    @classmethod
    def fit(cls, grid: Grid, kinds: Layout, depths: Sequence[int], differences: Tensor, basis: str) -> CurveCodec:
        """Measure means, scales and components.

        Args:
            grid: Of the knots.
            kinds: Layout of one layer.
            depths: Of the models.
            differences: (M, layers of all depths, kinds, b), training values less their starts.
            basis: `none` or `pcaN`.
        """
        mix = grid.mix_all(depths)  # (layers, P)
        means = at_knots(mix, differences.mean(0))
        rest = (differences - torch.einsum("lp,pkb->lkb", mix, means)).flatten(0, 1)
        normaliser = Normaliser.fit(kinds, rest, torch.zeros(kinds.blocks, kinds.block_size))
        count = coefficients_of(basis)
        found = None if count is None else Basis.fit(normaliser.normalise(rest), count)
        return cls(grid, Codec(kinds, normaliser, found), means)

    def at(self, depths: Sequence[int], initial: Tensor) -> Codec:
        """Return the codec of models of some depths.

        Args:
            depths: Theirs.
            initial: (N, b), their packed starts.
        """
        layers, inner = sum(depths), self.kinds.normaliser
        means = torch.einsum("lp,pkb->lkb", self.grid.mix_all(depths), self.means) + inner.mean
        layout = model_layout(self.kinds.layout, depths)
        normaliser = Normaliser(initial, means.flatten(0, 1), inner.scale.repeat(layers, 1), layout.mask)
        basis = self.kinds.basis
        spread = None if basis is None else Basis(basis.components.repeat(layers, 1, 1), basis.unit)
        return Codec(layout, normaliser, spread)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what `from_state` needs beside the layout and the grid."""
        return {**self.kinds.state_dict(), MEANS: self.means}

    @classmethod
    def from_state(cls, grid: Grid, kinds: Layout, state: Mapping[str, Tensor]) -> CurveCodec:
        """Build it from what `state_dict` returned.

        Raises:
            InputError: a tensor is missing or does not fit.
        """
        shape = (grid.rows, kinds.blocks, kinds.block_size)
        if MEANS not in state or tuple(state[MEANS].shape) != shape:
            raise InputError(f"the means of a generator of sigma do not fit it: no {MEANS!r} of shape {shape}")
        return cls(grid, Codec.from_state(kinds, state), state[MEANS])


def at_knots(mix: Tensor, values: Tensor) -> Tensor:
    """Read values of all layers off at the knots, by least squares.

    Args:
        mix: (layers, P).
        values: (layers, ...).

    Returns:
        (P, ...), float32.
    """
    a, y = mix.double(), values.double()
    ridge = torch.tensor(SMOOTH, dtype=torch.float64).repeat_interleave(a.shape[1] // 2)
    return torch.linalg.solve(a.T @ a + ridge.diag(), a.T @ y.flatten(1)).float().reshape(-1, *values.shape[1:])


@dataclass(frozen=True, eq=False)
class KnotCodec:
    """Gives the values of models as those of the knots, of which the linear path of a `CurveUNet` is made.

    Args:
        codec: Of the models.
        mix: (layers, P).
        kinds: Blocks of one layer.
    """

    codec: Codec
    mix: Tensor
    kinds: int

    def encode(self, blocks: Tensor) -> Tensor:
        """Return (C, P kinds, L) of packed values, (C, N, b)."""
        values = self.codec.encode(blocks).unflatten(1, (-1, self.kinds))  # (C, layers, kinds, L)
        return at_knots(self.mix, values.transpose(0, 1)).transpose(0, 1).flatten(1, 2)


@dataclass(frozen=True, eq=False)
class SigmaGenerator:
    """A trained generator with all that is needed to use it.

    Args:
        network: Of the blocks.
        codec: Between its numbers and what layers own.
        text: The record of the text encoder that it was trained with.
        base: Digest of the learngene.
        t_star: The timestep of the one step.
        words: Those of the training texts.
        how: The learngene's architecture, the collected depths, and how the starts are read.
    """

    network: CurveUNet
    codec: CurveCodec
    text: Mapping[str, Any]
    base: str
    t_star: int
    words: tuple[str, ...]
    how: Mapping[str, Any]

    def curves(self, prompt: str, start: Mapping[str, Tensor], sampling: Sampling | None = None) -> dict[str, Tensor]:
        """Return what the layers of a model own, `<name>.<type>` to (L, ...).

        Args:
            prompt: The task in words.
            start: What the learngene gives for that depth, of the same names and shapes.
            sampling: How; one step at t* by default.

        Raises:
            InputError: the text encoder is gone, or another one is in its place.
        """
        depth = len(next(iter(start.values())))
        layers = by_layer(start, depth)
        layout = model_layout(self.codec.kinds.layout, [depth])
        codec = self.codec.at([depth], layout.pack(layers))
        network = self.network.at(self.codec.grid.mix(depth))
        texts = Texts.of(*load_text(self.text).encode([prompt]))

        def predict(x: Tensor, t: Tensor, n: Tensor) -> Tensor:
            result: Tensor = network(x, t, n, texts.tokens, texts.mask)
            return result

        schedule = NoiseSchedule.of(network.config, torch.device("cpu"))
        sampling = sampling or Sampling(self.t_star)
        found = layout.unpack(codec.decode(draw_values(predict, layout.blocks, schedule, sampling, codec.length)))
        return {name: torch.stack([found[f"l{depth}.{layer}.{name}"] for layer in range(depth)]) for name in start}

    def save(self, directory: Path, raw: Mapping[str, Tensor], ema: Mapping[str, Tensor]) -> None:
        """Write the generator into an artifact; see `finectl.training.weights.generate.WeightGenerator.save`."""
        write_json(directory / CONFIG, self.to_dict())
        save_tensors(directory / FILES["raw"], raw)
        save_tensors(directory / FILES["ema"], ema)
        save_tensors(directory / NORMALISER, self.codec.state_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return all but the tensors as plain JSON values."""
        basis = self.codec.kinds.basis
        return {
            **self.network.config.to_dict(),
            **self.how,
            "target": "sigma",
            "layout": self.codec.kinds.layout.to_dict(),
            "grid": self.codec.grid.to_dict(),
            "basis": NONE if basis is None else f"pca{basis.count}",
            "text": dict(self.text),
            "base": self.base,
            "t_star": self.t_star,
            "words": list(self.words),
        }


def load_sigma_generator(artifact: Artifact, weights: str = "ema") -> SigmaGenerator:
    """Read a generator of sigma, on the CPU.

    Args:
        artifact: Of kind `weight-generator`.
        weights: `ema` or `raw`.

    Raises:
        InputError: it generates something else, a file is damaged, or its tensors do not fit.
    """
    values = read_sigma_generator(artifact)
    names = WeightUNetConfig.__dataclass_fields__
    config = WeightUNetConfig.from_dict({name: values[name] for name in ("architecture", *names)})
    grid, kinds = Grid.from_dict(values["grid"]), Layout.from_dict(values["layout"])
    codec = CurveCodec.from_state(grid, kinds, load_tensors(artifact.file(NORMALISER)))
    if (config.blocks, config.length) != (grid.rows * kinds.blocks, codec.kinds.length):
        raise InputError(f"{artifact.path}: its network does not fit its layout", fix="make it again with --force")
    network = CurveUNet(config, grid.mix(1))
    state, wanted = load_tensors(weights_file(artifact, weights)), network.state_dict()
    if {name: value.shape for name, value in state.items()} != {name: value.shape for name, value in wanted.items()}:
        raise InputError(f"the weights of {artifact.path} do not fit its {CONFIG}", fix="make it again with --force")
    network.load_state_dict(state)
    told = values["text"], str(values["base"]), int(values["t_star"]), tuple(values["words"])
    how = {name: values[name] for name in ("source", "depths", "sigma", "depth_scale")}
    return SigmaGenerator(network.eval(), codec, *told, how)
