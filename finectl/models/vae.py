"""Autoencoders between images and latents: diffusers' AutoencoderKL, from a folder or the hub.

What is said of one (`describe_vae`) is found out without torch; it is read and run by `load_vae`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finectl.artifacts.files import CHUNK_BYTES, read_json_object, sha256_json
from finectl.artifacts.tensors import check_header, read_header
from finectl.errors import FinectlError, InputError
from finectl.hub import is_hub_id, local_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CLASS = "AutoencoderKL"
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLED = "diffusion_pytorch_model.bin"
SUBFOLDER = "vae"
PATTERNS = (CONFIG, WEIGHTS, f"{SUBFOLDER}/{CONFIG}", f"{SUBFOLDER}/{WEIGHTS}")
EXAMPLE = "stabilityai/sd-vae-ft-ema"
MENDING = (
    f"--vae {EXAMPLE} --download, or copy {CONFIG} and {WEIGHTS} of https://huggingface.co/{EXAMPLE} into a folder "
    "and give its path: --vae PATH"
)
# What decides the latents, with diffusers' defaults for files that leave something out.
ESSENTIALS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
LOG_VARIANCE_RANGE = (-30.0, 20.0)
# Pixels decoded at a time: a decoder keeps hundreds of channels at full size.
DECODED_PIXELS = 8 * 256 * 256
SHOWN_DIGITS = 12
CHANNELS = {1: "grey", 3: "RGB"}


def describe_vae(name_or_path: str) -> dict[str, Any]:
    """Say what an autoencoder is, without torch.

    Args:
        name_or_path: A folder of diffusers' layout, a pipeline's folder with one in `vae/`, or a hub id of either.

    Returns:
        "name" (hub id or absolute path), "digest" (sha256 over configuration and weights, hexadecimal),
        "scaling_factor" and "shift_factor" (latents are (z - shift) * scaling), "downscale" (pixels a latent, along a
        side), "latent_channels", "channels" (of the images).

    Raises:
        InputError: it is not there, is of another kind, or its weights are not safetensors.
    """
    return _record(name_or_path, _find(name_or_path))


def _find(name_or_path: str) -> Path:
    """Return the folder that holds the configuration and the weights."""
    if not is_hub_id(name_or_path) and not Path(name_or_path).expanduser().exists():
        raise InputError(
            f"there is no autoencoder at {name_or_path!r}",
            expected=f"a folder with {CONFIG} and {WEIGHTS}",
            fix=MENDING,
        )
    root = local_folder(name_or_path, "the autoencoder", PATTERNS)
    if not root.is_dir():
        raise InputError(f"{root} is a file", expected=f"a folder with {CONFIG} and {WEIGHTS}", fix=MENDING)
    found = {folder: _class_of(folder / CONFIG) for folder in (root, root / SUBFOLDER)}
    folder = next((folder for folder, name in found.items() if name == CLASS), None)
    if folder is None:
        others = [f"{folder / CONFIG} is of class {name}" for folder, name in found.items() if name]
        raise InputError(
            f"{root} holds no autoencoder{': ' + others[0] if others else ''}",
            expected=f"{CONFIG} of class {CLASS} and {WEIGHTS}, in it or in its folder {SUBFOLDER}/",
            fix=MENDING,
        )
    if not (folder / WEIGHTS).is_file():
        raise _without_weights(folder)
    return folder


def _class_of(config: Path) -> str | None:
    if not config.is_file():
        return None
    return str(_read_config(config).get("_class_name") or "unknown")


def _read_config(path: Path) -> dict[str, Any]:
    return read_json_object(path, expected="the configuration of an autoencoder")


def _without_weights(folder: Path) -> InputError:
    if not (folder / PICKLED).is_file():
        return InputError(f"{folder / WEIGHTS} is missing", expected=f"{CONFIG} and {WEIGHTS}", fix=MENDING)
    return InputError(
        f"{folder} has its weights as {PICKLED}, a pickle, which can hold code and is not opened",
        expected=WEIGHTS,
        fix='take the safetensors file of the same model; or, where the pickle is trusted: python -c "from diffusers '
        f"import {CLASS} as A; A.from_pretrained('{folder}', use_safetensors=False).save_pretrained('NEW')\"",
    )


def _record(name_or_path: str, folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    config = {**ESSENTIALS, **_read_config(path)}
    weights = folder / WEIGHTS
    status = weights.stat()
    try:
        content = _content_digest(os.fspath(weights), status.st_size, status.st_mtime_ns)
    except FinectlError as error:
        raise InputError(error.what, expected=error.expected, fix="download or copy the file again") from error
    try:
        record = {
            "name": name_or_path if is_hub_id(name_or_path) else os.path.abspath(Path(name_or_path).expanduser()),
            "digest": sha256_json([{key: config[key] for key in ESSENTIALS}, content]),
            "scaling_factor": float(config["scaling_factor"]),
            "shift_factor": float(config["shift_factor"] or 0.0),
            "downscale": 2 ** (len(config["block_out_channels"]) - 1),
            "latent_channels": int(config["latent_channels"]),
            "channels": int(config["in_channels"]),
        }
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} is not a whole configuration: {error}", expected=f"that of {CLASS}") from error
    if not (math.isfinite(record["scaling_factor"]) and record["scaling_factor"] > 0):
        raise InputError(f"{path} has the scaling factor {record['scaling_factor']}", expected="a positive number")
    if config["latents_mean"] is not None or config["latents_std"] is not None:
        raise InputError(
            f"{path} scales each channel of its latents by a number of its own (latents_mean, latents_std)",
            expected="an autoencoder with one scaling factor",
        )
    if config["out_channels"] != config["in_channels"]:
        raise InputError(
            f"{path} turns {config['in_channels']} channels into {config['out_channels']}", expected="equal numbers"
        )
    return record


@lru_cache(maxsize=16)
def _content_digest(path: str, size: int, mtime_ns: int) -> str:
    """Hash names, types, shapes and values of the tensors in a file; their order and its metadata do not count.

    It is done once a process: size and time of change are part of the key only.
    """
    check_header(Path(path))
    header = read_header(Path(path))
    start = header["__data_start__"]
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        for name in sorted(name for name in header if not name.startswith("__")):
            info = header[name]
            digest.update(json.dumps([name, info["dtype"], info["shape"]]).encode())
            first, last = info["data_offsets"]
            stream.seek(start + first)
            while first < last:
                chunk = stream.read(min(CHUNK_BYTES, last - first))
                digest.update(chunk)
                first += len(chunk)
    return digest.hexdigest()


def latent_space(vae: Mapping[str, Any]) -> str:
    """Return what a message calls the latents of an autoencoder: its name, the start of its digest, its scale."""
    shift = f", shift {vae['shift_factor']:g}" if vae.get("shift_factor") else ""
    return f"{vae['name']} (digest {vae['digest'][:SHOWN_DIGITS]}, scaling factor {vae['scaling_factor']:g}{shift})"


def is_same_space(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tell whether two autoencoders have the same latents at the same scale, wherever they lie."""

    def key(vae: Mapping[str, Any]) -> tuple[Any, ...]:
        return vae["digest"], float(vae["scaling_factor"]), float(vae.get("shift_factor") or 0.0)

    return key(one) == key(other)


def require_same_space(recorded: Mapping[str, Any], found: Mapping[str, Any], whose: str) -> None:
    """Check that an autoencoder is the one whose latents a model works on.

    Args:
        recorded: The one that a manifest or an index records.
        found: The one at hand.
        whose: What works on the latents, for the message.

    Raises:
        InputError: it is not; the message names both.
    """
    if not is_same_space(recorded, found):
        raise InputError(
            f"{whose} works on the latents of {latent_space(recorded)}, and this autoencoder is {latent_space(found)}",
            expected="the same weights and the same scale",
            fix=f"--vae {recorded['name']}, or another folder with the same files",
        )


def find_recorded(recorded: Mapping[str, Any], whose: str) -> dict[str, Any]:
    """Describe the autoencoder that a manifest records, where it was then.

    Raises:
        InputError: it is no longer there, or another one is; the message names the option that says where it is.
    """
    try:
        found = describe_vae(str(recorded["name"]))
    except InputError as error:
        raise InputError(
            f"{whose} works on the latents of {latent_space(recorded)}, which cannot be read: {error.what}",
            expected=error.expected,
            fix=f"say where it is now: --vae PATH{'; or fetch it with --download' * is_hub_id(str(recorded['name']))}",
        ) from error
    require_same_space(recorded, found, whose)
    return found


def require_images(vae: Mapping[str, Any], channels: int, image_size: int, whose: str) -> None:
    """Check that an autoencoder takes images of a shape.

    Raises:
        InputError: it takes other channels, or the size is not a multiple of the pixels a latent.
    """
    if channels != vae["channels"]:
        raise InputError(
            f"{whose} has {CHANNELS.get(channels, 'other')} images (channels: {channels}), "
            f"{vae['name']} takes {CHANNELS.get(vae['channels'], 'other')} ones (channels: {vae['channels']})",
            expected="images of the autoencoder's channels; grey ones are not repeated to RGB",
            fix="convert the images, or use an autoencoder that was trained on such images",
        )
    if image_size % vae["downscale"] != 0:
        near = max(1, round(image_size / vae["downscale"])) * vae["downscale"]
        raise InputError(
            f"images of {image_size}x{image_size} pixels do not fit {vae['name']}, which makes one latent of each "
            f"{vae['downscale']}x{vae['downscale']} pixels",
            expected=f"a multiple of {vae['downscale']}",
            fix=f"--image-size {near}",
        )


@dataclass(frozen=True, eq=False)
class Vae:
    """An autoencoder ready for use.

    Args:
        module: diffusers' model, in evaluation mode.
        record: What `describe_vae` says of it.
        device: Where it is.
    """

    module: Any
    record: Mapping[str, Any]
    device: torch.device

    def encode_moments(self, images: Tensor) -> Tensor:
        """Return the distributions of images' latents, unscaled.

        Args:
            images: float32 (B, C, H, W) in [-1, 1], on any device.

        Returns:
            float32 (B, 2c, H / downscale, W / downscale) on the autoencoder's device: c channels of means, then c of
            log-variances, these in [-30, 20].

        Raises:
            InputError: the images have other channels or a size that does not fit.

        Reference: Kingma and Welling, arXiv 1312.6114, section 3.
        """
        import torch

        require_images(self.record, images.shape[1], images.shape[-1], "the batch")
        with torch.no_grad():
            posterior = self.module.encode(images.to(self.device, self.module.dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.logvar.clamp(*LOG_VARIANCE_RANGE)], dim=1).float()

    def decode(self, latents: Tensor, *, scaled: bool = True) -> Tensor:
        """Return the images of latents.

        Args:
            latents: (B, c, h, w), on any device.
            scaled: Whether they are at the scale at which models see them, (z - shift) * scaling.

        Returns:
            float32 (B, C, H, W) in [-1, 1] on the autoencoder's device.
        """
        import torch

        z = latents.to(self.device, torch.float32)
        if scaled:
            z = z / self.record["scaling_factor"] + self.record["shift_factor"]
        at_once = max(1, DECODED_PIXELS // (z.shape[-2] * z.shape[-1] * self.record["downscale"] ** 2))
        with torch.no_grad():
            parts = [self.module.decode(part.to(self.module.dtype)).sample.float() for part in z.split(at_once)]
        return torch.cat(parts).clamp(-1, 1)


def load_vae(name_or_path: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Vae:
    """Read an autoencoder.

    Args:
        name_or_path: See `describe_vae`.
        device: Where it is to be.
        dtype: Of its weights and its arithmetic; float32 by default.

    Raises:
        InputError: see `describe_vae`; or the weights do not fit the configuration.
    """
    import torch
    from diffusers import AutoencoderKL

    folder = _find(name_or_path)
    record = _record(name_or_path, folder)
    try:
        module, loading = AutoencoderKL.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
            torch_dtype=dtype or torch.float32,
        )
    # diffusers and torch raise each of these for files that do not fit.
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder} cannot be read as an autoencoder: {reason}", fix=MENDING) from error
    missing = sorted(loading["missing_keys"])
    if missing:  # diffusers would leave these at random values
        raise InputError(
            f"{folder / WEIGHTS} lacks {len(missing)} tensors of its configuration, such as {missing[0]}", fix=MENDING
        )
    return Vae(module.to(device).eval().requires_grad_(False), record, torch.device(device))
