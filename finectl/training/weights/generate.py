"""A weight generator as it is stored and used: from a text to the weights of a LoRA, in one denoising step.

Reference: arXiv 2407.11966, sections 4.3 and 5.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finectl.adapters.lora import LoraLayer
from finectl.artifacts.files import write_json
from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import load_tensors, save_tensors
from finectl.diffusion.random import generator_for
from finectl.diffusion.schedule import NoiseSchedule
from finectl.errors import InputError
from finectl.models.io import CONFIG, FILES, weights_file
from finectl.models.text import load_text
from finectl.models.weights.basis import NAMES as BASIS
from finectl.models.weights.basis import NONE, Basis
from finectl.models.weights.layout import Layout
from finectl.models.weights.normalise import Normaliser
from finectl.models.weights.recovery import clean_of, noise_of
from finectl.models.weights.unet import WeightUNet
from finectl.training.weights.blocks import Texts
from finectl.training.weights.files import NORMALISER, read_generator


@dataclass(frozen=True)
class Sampling:
    """How weights are drawn.

    Args:
        t: The timestep of the one step, or of the first of several.
        steps: Denoising steps; several are those of DDIM.
        draws: Noises over which the result is averaged.
        batch_size: Blocks at once; 0 for all.
        seed: Of the noise.
    """

    t: int
    steps: int = 1
    draws: int = 1
    batch_size: int = 0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Codec:
    """Between the weights of a LoRA and what the network sees of them.

    Args:
        layout: How tensors lie in blocks.
        normaliser: Between weights and numbers of unit size.
        basis: Between these and coefficients; None where the network sees them as they are.
    """

    layout: Layout
    normaliser: Normaliser
    basis: Basis | None = None

    @property
    def length(self) -> int:
        """Numbers of a block as the network sees it."""
        return self.layout.block_size if self.basis is None else self.basis.count

    @property
    def mask(self) -> Tensor:
        """Which of them count, bool (N, L)."""
        if self.basis is None:
            return self.normaliser.mask
        return self.basis.components.square().sum(-1) > 0

    def encode(self, blocks: Tensor) -> Tensor:
        """Return what the network sees of packed weights, (..., N, b) to (..., N, L)."""
        z = self.normaliser.normalise(blocks)
        return z if self.basis is None else self.basis.coefficients(z)

    def decode(self, values: Tensor) -> Tensor:
        """Return the packed weights, (..., N, L) to (..., N, b)."""
        return self.normaliser.restore(values if self.basis is None else self.basis.expand(values))

    def state_dict(self) -> dict[str, Tensor]:
        """Return what `from_state` needs beside the layout."""
        return {**self.normaliser.state_dict(), **(self.basis.state_dict() if self.basis is not None else {})}

    @classmethod
    def from_state(cls, layout: Layout, state: Mapping[str, Tensor]) -> Codec:
        """Build it from what `state_dict` returned.

        Raises:
            InputError: a tensor does not fit the layout.
        """
        has_basis = any(name in state for name in BASIS)
        basis = Basis.from_state(state, layout.blocks, layout.block_size) if has_basis else None
        return cls(layout, Normaliser.from_state(state, layout), basis)

    def to(self, device: torch.device) -> Codec:
        """Return it on a device."""
        return Codec(self.layout, self.normaliser.to(device), None if self.basis is None else self.basis.to(device))


Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(w_t (M, 1, L), t (M,), n (M,)) to the prediction (M, 1, L), for one text."""


@torch.no_grad()
def draw_values(predict: Predict, blocks: int, schedule: NoiseSchedule, sampling: Sampling, length: int) -> Tensor:
    """Draw all blocks for one text.

    Args:
        predict: The network, on the device of the schedule.
        blocks: N.
        schedule: The forward process, and what is predicted.
        sampling: How.
        length: L, numbers of a block as the network sees it.

    Returns:
        float32 (N, L): what stands for clean weights.

    Reference: arXiv 2407.11966, Eq. 3, put right (`finectl.models.weights.recovery`).
    """
    device = schedule.betas.device
    total = torch.zeros(blocks, length, device=device)
    for draw in range(sampling.draws):
        generator = generator_for("weights", sampling.seed, draw)
        # Drawn on the CPU and for all blocks, so that neither the device nor the batch size changes them.
        total += _denoise(predict, schedule, sampling, torch.randn(total.shape, generator=generator).to(device))
    return total / sampling.draws


def _denoise(predict: Predict, schedule: NoiseSchedule, sampling: Sampling, noise: Tensor) -> Tensor:
    count = len(noise)
    size = sampling.batch_size or count
    # From t down: one step recovers the clean weights at once, several go over less noisy ones.
    times = torch.linspace(sampling.t, 0, sampling.steps + 1)[:-1].round().long().tolist()
    results = []
    for first in range(0, count, size):
        n = torch.arange(first, min(first + size, count), device=noise.device)
        x = clean = noise[first : first + size, None]  # (M, 1, L)
        for place, time in enumerate(times):
            t = torch.full((len(n),), time, dtype=torch.int64, device=noise.device)
            clean = clean_of(schedule, predict(x, t, n).float(), x, t)
            if place + 1 < len(times):
                later = torch.full_like(t, times[place + 1])
                x = schedule.add_noise(clean[:, None], noise_of(schedule, clean, x, t)[:, None], later)[:, 0]
        results.append(clean[:, 0])
    return torch.cat(results)


@dataclass(frozen=True, eq=False)
class WeightGenerator:
    """A trained generator with all that is needed to use it.

    Args:
        network: Of the blocks.
        codec: Between its numbers and weights.
        layers: The adapted layers, in order.
        text: The record of the text encoder that it was trained with.
        base: Digest of the GAN that the weights belong to.
        t_star: The timestep of the one step.
        words: Those of the training texts.
    """

    network: WeightUNet
    codec: Codec
    layers: tuple[LoraLayer, ...]
    text: Mapping[str, Any]
    base: str
    t_star: int
    words: tuple[str, ...] = ()

    def encode(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> Texts:
        """Encode prompts with the generator's own text encoder.

        Raises:
            InputError: it is gone, or another one is in its place.
        """
        return Texts.of(*load_text(self.text, device).encode(prompts))

    def lora(self, texts: Texts, sampling: Sampling | None = None) -> dict[str, Tensor]:
        """Return the LoRA of one text, float32, on the texts' device.

        Args:
            texts: One text, encoded by `encode`.
            sampling: How; one step at t* by default.
        """

        def predict(x: Tensor, t: Tensor, n: Tensor) -> Tensor:
            result: Tensor = self.network(x, t, n, texts.tokens, texts.mask)
            return result

        config, sampling = self.network.config, sampling or Sampling(self.t_star)
        schedule = NoiseSchedule.of(config, texts.tokens.device)
        values = draw_values(predict, self.network.places, schedule, sampling, config.length)
        return self.codec.layout.unpack(self.codec.decode(values))

    def save(self, directory: Path, raw: Mapping[str, Tensor], ema: Mapping[str, Tensor]) -> None:
        """Write the generator into an artifact.

        Args:
            directory: That of the artifact.
            raw: The network's weights.
            ema: Their moving average.
        """
        write_json(directory / CONFIG, self.to_dict())
        save_tensors(directory / FILES["raw"], raw)
        save_tensors(directory / FILES["ema"], ema)
        save_tensors(directory / NORMALISER, self.codec.state_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return all but the tensors as plain JSON values."""
        return {
            **self.network.config.to_dict(),
            "layout": self.codec.layout.to_dict(),
            "layers": [layer.to_dict() for layer in self.layers],
            "basis": NONE if self.codec.basis is None else f"pca{self.codec.basis.count}",
            "text": dict(self.text),
            "base": self.base,
            "t_star": self.t_star,
            "words": list(self.words),
        }

    def to(self, device: torch.device) -> WeightGenerator:
        """Return it on a device; the network is moved."""
        return replace(self, network=self.network.to(device), codec=self.codec.to(device))


def load_generator(artifact: Artifact, weights: str = "ema", device: torch.device | None = None) -> WeightGenerator:
    """Read a generator.

    Args:
        artifact: Of kind `weight-generator`.
        weights: `ema` or `raw`.
        device: Where it is to be; the CPU by default.

    Raises:
        InputError: a file is damaged, or its tensors do not fit.
    """
    config, others = read_generator(artifact)
    layout = Layout.from_dict(others["layout"])
    codec = Codec.from_state(layout, load_tensors(artifact.file(NORMALISER)))
    if (config.blocks, config.length) != (layout.blocks, codec.length):
        raise InputError(
            f"{artifact.path}: a network of {config.blocks} blocks of {config.length} numbers",
            expected=f"{layout.blocks} of {codec.length}, as its layout says",
        )
    network = WeightUNet(config)
    state, wanted = load_tensors(weights_file(artifact, weights)), network.state_dict()
    odd = [name for name in {**wanted, **state} if name not in wanted or name not in state]
    odd += [name for name in wanted if name in state and wanted[name].shape != state[name].shape]
    if odd:
        raise InputError(f"the weights of {artifact.path} do not fit its {CONFIG}: {odd[0]!r}")
    network.load_state_dict(state)
    layers = tuple(LoraLayer.from_dict(layer) for layer in others["layers"])
    told = str(others["base"]), int(others["t_star"]), tuple(others["words"])
    made = WeightGenerator(network.eval(), codec, layers, others["text"], *told)
    return made if device is None else made.to(device)
