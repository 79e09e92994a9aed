"""The autoencoder that belongs to a model of latents. No torch."""

from __future__ import annotations

from typing import Any

from finectl.artifacts.store import Artifact
from finectl.errors import InputError, UsageError
from finectl.models.foreign import components
from finectl.models.vae import MENDING, describe_vae, find_recorded, require_same_space

PIXEL_CHANNELS = (1, 3)


def works_on_latents(artifact: Artifact, channels: int) -> bool:
    """Tell whether a model's images are latents, whether or not the autoencoder is at hand.

    Args:
        artifact: The model.
        channels: Those of its images.
    """
    kept = components.read_parts(artifact).parts if artifact.has(components.NAME) else {}
    recorded = artifact.manifest.data.get("vae")
    return recorded is not None or components.VAE in kept or channels not in PIXEL_CHANNELS


def find_autoencoder(given: str | None, artifact: Artifact, channels: int) -> dict[str, Any] | None:
    """Return what decodes a model's latents; None for a model of pixels.

    Args:
        given: What `--vae` names.
        artifact: The model.
        channels: Those of its images.

    Raises:
        UsageError: an autoencoder is named, and the model was trained on pixels.
        InputError: it is not the one whose latents the model was trained on, or it is nowhere to be found.
    """
    recorded = artifact.manifest.data.get("vae")
    if given is not None and artifact.manifest.data and recorded is None:
        raise UsageError(
            f"--vae {given}: {artifact.path} was trained on pixels ({artifact.manifest.data['name']})",
            fix="leave --vae out",
        )
    kept = components.read_parts(artifact).parts if artifact.has(components.NAME) else {}
    if given is not None:
        found = describe_vae(given)
    elif components.VAE in kept:
        found = describe_vae(str(components.locate(artifact, components.VAE, kept[components.VAE])))
    elif recorded is not None:
        return find_recorded(recorded, str(artifact.path))
    elif channels in PIXEL_CHANNELS:
        return None
    else:
        raise InputError(
            f"{artifact.path} works on {channels} channels, which are no pixels, and no autoencoder is recorded for it",
            expected="the one whose latents it was trained on",
            fix=MENDING,
        )
    if recorded is not None:
        require_same_space(recorded, found, str(artifact.path))
    if found["latent_channels"] != channels:
        raise InputError(
            f"{artifact.path} works on {channels} channels, the latents of {found['name']} have "
            f"{found['latent_channels']}",
            expected="the autoencoder whose latents the model was trained on",
        )
    return found
