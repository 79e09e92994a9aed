"""diffusers' UNets behind the interface of finectl's own networks.

The parameters lie under `unet.`, with diffusers' names behind it; those of channel-wise projections, which are no part
of diffusers' network, under `projections.`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from finectl.diffusion.edm import NOISE_SCALE, log_sigmas, network_times
from finectl.diffusion.schedule import NoiseSchedule, at_images
from finectl.errors import InputError, UsageError
from finectl.models.projection_layers import ImageProjection, attach, build_projections
from finectl.models.unet_config import CLASSES, UNET, UNetConfig

PREFIX = "unet."


def build_network(config: UNetConfig) -> Any:
    """Return diffusers' network of a configuration; PyTorch's own random numbers are left as they were.

    Raises:
        InputError: diffusers cannot build it.
    """
    import diffusers

    options = {name: value for name, value in config.network.items() if not name.startswith("_")}
    try:
        with torch.random.fork_rng(devices=[]):
            return getattr(diffusers, CLASSES[config.architecture])(**options)
    except (TypeError, ValueError, NotImplementedError, AttributeError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"diffusers cannot build this {CLASSES[config.architecture]}: {reason}",
            expected=f"options that diffusers {diffusers.__version__} knows",
        ) from error


def projected(network: Any, config: UNetConfig) -> nn.ModuleDict:
    """Put the projections of a configuration, as identities, behind the blocks of its network, and return them."""
    projections = build_projections(config.places, ImageProjection)
    attach(network, projections, config.places)
    return projections


def initial_state(config: UNetConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Return a UNet's weights as diffusers draws them, the same for the same generator, and identity projections."""
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed))
        network = UNet(config) if config.architecture == UNET else TextUNet(config)
    return {name: tensor.detach() for name, tensor in network.state_dict().items()}


def register_times(network: nn.Module, config: UNetConfig) -> None:
    """Give a network the table of what it is told of each timestep of EDM's process; None for another process.

    EDM's own networks are told c_noise, others what their sinusoids resolve.
    """
    told = None
    if config.diffusion.is_edm:
        own = config.sigma_data is not None
        told = log_sigmas(config.diffusion) / NOISE_SCALE if own else network_times(config.diffusion)
    network.register_buffer("times", None if told is None else told.float(), persistent=False)  # (T,)


class UNet(nn.Module):
    """An unconditional or class-conditional UNet; its weights mean nothing until `load_state_dict`.

    Args:
        config: With architecture `unet2d`.
    """

    is_convolutional = True  # channels last suits it
    times: Tensor | None

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.unet = build_network(config)
        self.projections = projected(self.unet, config)
        register_times(self, config)
        if config.sigma_data is not None and not config.diffusion.is_edm:
            kept = NoiseSchedule.of(config).alphas_cumprod
            self.sigmas: Tensor
            self.register_buffer("sigmas", ((1 - kept) / kept).sqrt(), persistent=False)  # (T,)

    def enable_gradient_checkpointing(self) -> None:
        """Keep only the inputs of the blocks for the backward pass, and compute the rest again there."""
        self.unet.enable_gradient_checkpointing()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise (or another target) in a batch of noisy images.

        Args:
            x: (B, C, H, W), float.
            t: (B,), timesteps in 0..T-1.
            y: (B,), int64 labels; `num_classes` is the null class where there is one. Without classes they are ignored.

        Returns:
            (B, out_channels, H, W).
        """
        labels = y if self.config.num_classes else None
        told = t if self.times is None else self.times[t]
        if self.config.sigma_data is None:
            return self.unet(x, told, class_labels=labels).sample
        if self.times is not None:  # x is c_in z already, and F is -v
            return -self.unet(x, told, class_labels=labels).sample
        return self._preconditioned(x, t, labels, self.config.sigma_data)

    def _preconditioned(self, x: Tensor, t: Tensor, labels: Tensor | None, sigma_data: float) -> Tensor:
        """Turn the network F of EDM into a noise prediction.

        With sigma^2 = (1 - alpha_bar) / alpha_bar, the noisy image of EDM is z = x / sqrt(alpha_bar), the denoised one
        D = c_skip z + c_out F(c_in z; ln(sigma) / 4), and the noise (z - D) / sigma.

        Reference: Karras et al., arXiv 2206.00364, Eq. 7 and table 1.
        """
        sigma = self.sigmas[t]  # (B,), float64
        total = (sigma.square() + sigma_data**2).sqrt()
        z = x * at_images((1 + sigma.square()).sqrt(), x)
        inner = self.unet(z * at_images(1 / total, x), (sigma.log() / 4).float(), class_labels=labels).sample
        # (z - D) / sigma, with c_skip = (sigma_data / total)^2 and c_out = sigma sigma_data / total put in.
        return z * at_images(sigma / total.square(), x) - inner * at_images(sigma_data / total, x)


class Texts(Protocol):
    """A frozen table of encoded texts, which stands in the place of a table of classes; the last row is the empty one.

    It is no part of the model: neither its weights nor the files know of it.
    """

    def __len__(self) -> int: ...
    @property
    def length(self) -> int: ...
    def gather(self, rows: Tensor) -> Tensor:
        """Return the vectors of rows (B,), int64 on any device: (B, S, E), floating-point on the same device."""


class TextUNet(nn.Module):
    """A text-conditional UNet; its weights mean nothing until `load_state_dict`.

    With a table of texts (`condition`) it is a model of (x, t, label) like any other, and its `config` says so.

    Args:
        config: With architecture `unet2d-condition`.
    """

    times: Tensor | None

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.unet = build_network(config)
        self.projections = projected(self.unet, config)
        register_times(self, config)
        self._texts: Texts | None = None

    def condition(self, texts: Texts, dropout: float) -> None:
        """Let labels stand for texts.

        Args:
            texts: The table; a teacher and its student share one.
            dropout: Probability in [0, 1] with which training replaces a text by the empty one.
        """
        self._texts = texts
        self.config = self.config.with_texts(len(texts) - 1, texts.length, dropout)

    def enable_gradient_checkpointing(self) -> None:
        """Keep only the inputs of the blocks for the backward pass, and compute the rest again there."""
        self.unet.enable_gradient_checkpointing()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise (or another target) in a batch of noisy images.

        As in Stable Diffusion, all S vectors of a text are attended to, those that fill its rest too.

        Args:
            x: (B, C, H, W), float.
            t: (B,), timesteps in 0..T-1.
            y: (B,), int64 rows of the table of texts; or (B, S, E), floating-point, the text encoder's output.

        Returns:
            (B, out_channels, H, W).

        Raises:
            UsageError: rows are given, and there is no table.
        """
        if not y.is_floating_point():
            if self._texts is None:
                raise UsageError("a model of text was given rows of a table, and no table")
            y = self._texts.gather(y)
        told = t if self.times is None else self.times[t]
        return self.unet(x, told, encoder_hidden_states=y.to(x.dtype)).sample


def condition(model: nn.Module, texts: Texts, dropout: float) -> None:
    """Let labels stand for texts in a model of text, or in each of the experts of an ensemble; see `TextUNet`."""
    for network in getattr(model, "experts", [model]):
        network.condition(texts, dropout)
        model.config = network.config
