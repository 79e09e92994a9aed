"""Images from a model: the reverse process, and the autoencoder's decoder where the model works on latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finectl.artifacts.store import Artifact
from finectl.data.images import to_uint8
from finectl.diffusion import sampling
from finectl.models.dit import DiT
from finectl.models.io import load_model
from finectl.models.unet import UNet, condition
from finectl.models.vae import Vae, load_vae
from finectl.training.device import arithmetic
from finectl.training.texts import Prompts


@dataclass(frozen=True, eq=False)
class Generator:
    """A model and how it is sampled.

    Args:
        model: On `device`, in evaluation mode.
        vae: What decodes its latents; None for a model of pixels.
        scheduler: A key of `finectl.diffusion.schedulers.SCHEDULERS`.
        sampling_steps: Steps of the reverse process.
        guidance: Scale of classifier-free guidance; 1 is none.
        seed: Seed of the run.
        device: Where to compute.
        dtype: Arithmetic, as `--dtype` names it.
        prompts: What images are generated of, for a model of text; it has been given their table.
        pretrained: A second model, and what it does in the reverse process.
    """

    model: DiT | UNet
    vae: Vae | None
    scheduler: str
    sampling_steps: int
    guidance: float
    seed: int
    device: torch.device
    dtype: str
    prompts: Prompts | None = None
    pretrained: sampling.Pretrained | None = None

    @classmethod
    def of(
        cls,
        artifact: Artifact,
        weights: str,
        vae: str | None,
        device: torch.device,
        *,
        checkpoint: int | None = None,
        scheduler: str,
        sampling_steps: int,
        guidance: float,
        seed: int,
        dtype: str,
        prompts: Prompts | None = None,
        pretrained: Artifact | None = None,
        fraction: float | None = None,
    ) -> Generator:
        """Load a model and its autoencoder; see the class for the rest."""
        model = load_model(artifact, weights, checkpoint)
        if prompts is not None:
            condition(model, prompts.table, 0.0)
        return cls(
            model.to(device).eval(),
            load_vae(vae, device) if vae else None,
            scheduler,
            sampling_steps,
            guidance,
            seed,
            device,
            dtype,
            prompts,
            load_pretrained(pretrained, weights, fraction, device, prompts) if pretrained is not None else None,
        )

    def images(self, first: int, labels: Sequence[int], after_step: Callable[[], None] | None = None) -> Tensor:
        """Generate one batch.

        Args:
            first: Number of its first image; image k depends on `seed` and k alone.
            labels: The class of each image, or the row of its prompt.
            after_step: Called after each step of the reverse process.

        Returns:
            uint8 levels (B, C, H, W) on the CPU, as an image file would hold them.

        Raises:
            ComputationError: the images are not finite.
        """
        values = self.values(first, labels, after_step, clip=self.vae is None)
        return to_uint8(values if self.vae is None else self.vae.decode(values)).cpu()

    def values(
        self, first: int, labels: Sequence[int], after_step: Callable[[], None] | None = None, *, clip: bool
    ) -> Tensor:
        """Generate one batch as the model makes it: pixels in [-1, 1], or scaled latents that nothing has decoded.

        Args:
            first: As of `images`, and so `labels` and `after_step`.
            clip: Whether they are pixels, which lie in [-1, 1].

        Returns:
            float32 (B, C, H, W) on `device`.

        Raises:
            ComputationError: they are not finite.
        """
        config = self.model.config
        with arithmetic(self.device, self.dtype):
            return sampling.sample_images(
                self.model,
                (config.channels, config.image_size, config.image_size),
                labels,
                null_label=config.num_classes,
                scheduler=self.scheduler,
                sampling_steps=self.sampling_steps,
                guidance=self.guidance,
                seed=self.seed,
                first=first,
                learned_sigma=config.learn_sigma,
                device=self.device,
                after_step=after_step,
                diffusion=config.diffusion,
                clip=clip,
                pretrained=self.pretrained,
            )


def load_pretrained(
    artifact: Artifact, weights: str, share: float | None, device: torch.device, prompts: Prompts | None = None
) -> sampling.Pretrained:
    """Load a second model for the reverse process.

    Args:
        artifact: The model; `finectl.training.pretrained` checked it.
        weights: `ema` or `raw`.
        share: As of `sampling.Pretrained`.
        device: Where to compute.
        prompts: What images are generated of, for models of text.
    """
    model = load_model(artifact, weights)
    if prompts is not None:
        condition(model, prompts.table, 0.0)
    return sampling.Pretrained(model.to(device).eval(), model.config.num_classes, share)
