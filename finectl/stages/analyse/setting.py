"""What the analyses that look at images have in common: theta_0 and the models as networks, images, device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from finectl.adapters.projection import identity_state
from finectl.artifacts.job import Job
from finectl.artifacts.tensors import load_tensors
from finectl.data.dataset import ImageSet, load
from finectl.data.sources import DataInfo
from finectl.diffusion.random import generator_for
from finectl.diffusion.schedule import NoiseSchedule
from finectl.models.io import build_model
from finectl.models.parts import Parts
from finectl.models.unet import condition
from finectl.stages.analyse.config import Config
from finectl.training.device import resolve_device
from finectl.training.settings import data_options
from finectl.training.texts import Captions


@dataclass
class Setting:
    """The models and images of a run, each read when it is first needed.

    Args:
        job: The run.
        parts: The models around their base.
    """

    job: Job[Config]
    parts: Parts

    @cached_property
    def device(self) -> torch.device:
        """Where to compute."""
        return resolve_device(self.job.execution.device, self.job.world.local_rank)

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The models' forward process, on the device."""
        return NoiseSchedule.of(self.parts.config, self.device)

    def images(self, split: str) -> ImageSet:
        """Return the fixed, class-balanced images of a split that are looked at, `--images` of them or all."""
        config = self.job.config
        found = load(config.data or "", split, config.image_size, data_options(config, self.job))
        found = found if self._captions is None else self._captions.of(found)
        return found.subset(min(config.images, len(found)), config.seed)

    def base_state(self) -> dict[str, Tensor]:
        """Return theta_0, with identity projections where the models have projections."""
        if self.parts.base is None:
            raise ValueError("an analysis without theta_0")
        return {**identity_state(self.parts.config), **load_tensors(self.parts.base)}

    def network(self, state: dict[str, Tensor]) -> Any:
        """Return the network of these weights on the device, in evaluation mode."""
        network = build_model(self.parts.config)
        network.load_state_dict(state)
        return self.conditioned(network).to(self.device).eval().requires_grad_(False)

    def conditioned(self, network: Any) -> Any:
        """Let the labels of a network of text stand for captions; another one is returned as it is."""
        if self._captions is not None:
            condition(network, self._captions.table, 0.0)
        return network

    @cached_property
    def _captions(self) -> Captions | None:
        """The captions of the data set, for models of text."""
        info, config = self.job.data, self.job.config
        if not isinstance(info, DataInfo) or info.text is None:
            return None
        held = load(config.data or "", "heldout", config.image_size, data_options(config, self.job))
        return Captions.opened(self.job, held, info, self.device)

    def noise(self, purpose: str, index: int, shape: tuple[int, ...]) -> Tensor:
        """Return the noise of an analysis on the CPU, a function of `--seed`, the purpose and an index alone."""
        return torch.randn(shape, generator=generator_for(purpose, self.job.config.seed, index))

    def clean(self, data: ImageSet, purpose: str) -> Tensor:
        """Return the images (N, C, H, W) on the CPU; of latents one sample each."""
        raw = data.read(torch.arange(len(data)))
        noise = self.noise(f"{purpose}-latents", 0, (len(data), *data.shape)) if data.sampled else None
        return data.transform(raw, noise)

    def check(self) -> None:
        """Leave when a signal asked for it; the analyses that are done are kept."""
        kept = any(self.job.state.glob("*.json"))
        self.job.stop_if_requested((lambda: None) if kept else None)
