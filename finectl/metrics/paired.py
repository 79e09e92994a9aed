"""Values of single pairs of images, for models that turn an image into another: l1, PSNR, SSIM and LPIPS.

All take levels 0..255, uint8 (B, C, H, W), and give one value a pair, on the CPU. Importing torchmetrics takes seconds
and is done where it is needed.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finectl.errors import InputError
from finectl.metrics.features import ExtractorInfo
from finectl.metrics.measured import Measured

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INSTALL = "pip install 'finectl[vision]'"
LEVELS = 255
SSIM_SIGMA = 1.5
SSIM_WINDOW = 11
LPIPS_VERSION = "0.1"
LPIPS_LINEAR = Path("functional", "image", "lpips_models", "alex.pth")  # in torchmetrics' package
LPIPS_SMALLEST = 31  # smaller images leave nothing of AlexNet's last layers
# Pairs computed at once: a constant and not the caller's batch, so that rounding and memory depend on nothing else.
CHUNK = 8

PairValues = Callable[["Tensor", "Tensor"], "Tensor"]


def l1(images: Tensor, targets: Tensor) -> Tensor:
    """Return the mean absolute difference of each pair, as a share of the range.

    Args:
        images: uint8 (B, C, H, W), levels 0..255.
        targets: The same shape.

    Returns:
        float64 (B,), 0 for identical images to 1 for black and white.

    Raises:
        InputError: the shapes differ.
    """
    return _differences(images, targets).abs().double().mean(dim=(1, 2, 3)).cpu() / LEVELS


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each pair.

    Args:
        images: uint8 (B, C, H, W), levels 0..255.
        targets: The same shape.

    Returns:
        float64 (B,), dB, 10 log10(range^2 / mean squared difference); infinite for identical images.

    Raises:
        InputError: the shapes differ.
    """
    errors = _differences(images, targets).square().double().mean(dim=(1, 2, 3)).cpu()
    return 10 * (LEVELS**2 / errors).log10()


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """Return the structural similarity of each pair: a Gaussian window of 11x11 pixels (sigma 1.5), the channels' mean.

    The mean is over the windows around all pixels, the images mirrored at their borders, as torchmetrics has it since
    1.4.2; earlier versions, like the paper, have the mean over the windows inside alone. The mean is taken here, so
    that the value is the same with all. It is computed in float64: in float32 the variances are differences of nearly
    equal numbers.

    Args:
        images: uint8 (B, C, H, W), levels 0..255, H and W at least 11.
        targets: The same shape.

    Returns:
        float64 (B,), at most 1, which identical images have.

    Raises:
        InputError: the shapes differ, the images are too small, or torchmetrics is not installed.

    Reference: Wang et al., Image quality assessment: from error visibility to structural similarity, IEEE TIP 13(4),
    2004, equation 13, with K1 = 0.01, K2 = 0.03 and the range 1.
    """
    import torch

    _require_pairs(images, targets)
    _require_size(images, SSIM_WINDOW, f"SSIM, whose window has {SSIM_WINDOW}x{SSIM_WINDOW} pixels")
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise _not_installed("torchmetrics", "ssim") from error
    values = [torch.zeros(0, dtype=torch.float64)]
    for image, target in zip(images.split(CHUNK), targets.split(CHUNK), strict=True):
        if len(image):
            _, local = structural_similarity_index_measure(
                image.double() / LEVELS,
                target.double() / LEVELS,
                gaussian_kernel=True,
                sigma=SSIM_SIGMA,
                kernel_size=SSIM_WINDOW,
                reduction="none",
                data_range=1.0,
                return_full_image=True,
            )  # (B, C, H, W)
            values.append(local.mean(dim=(1, 2, 3)).cpu())
    return torch.cat(values)


# What needs no network.
PAIRED: Mapping[str, PairValues] = {"l1": l1, "psnr": psnr, "ssim": ssim}


def describe_lpips(given: str | None) -> ExtractorInfo:
    """Find and hash the weights of LPIPS, without torch.

    Args:
        given: File of torchvision's AlexNet that the user named; None for the usual place.

    Raises:
        InputError: the file, torchmetrics or torchvision is missing.
        OutputError: the file is to be fetched and the cache cannot be written.
        ResourceError: the disk is full.
    """
    from finectl.metrics.features.weights import content_digest, locate

    linear = _package("torchmetrics") / LPIPS_LINEAR
    _package("torchvision")
    path = locate("lpips", given)
    details: dict[str, Any] = {
        "version": LPIPS_VERSION,
        "network": "alexnet",
        "linear_digest": content_digest(linear),
    }
    return ExtractorInfo("lpips", content_digest(path), "own size, [-1, 1]", str(path.resolve()), details)


class Lpips:
    """The perceptual distance LPIPS 0.1 in AlexNet's features, computed in float32.

    Args:
        path: torchvision's file of AlexNet's weights. The distance's own weights are in torchmetrics' package.
        device: Where it is computed.

    Raises:
        InputError: the file is damaged or of another network, or torchmetrics or torchvision is not installed.

    Reference: Zhang et al., arXiv 1801.03924, equation 1.
    """

    def __init__(self, path: str | Path, device: torch.device) -> None:
        self.device = device
        self._network = _with_backbone(_untrained(), Path(path)).to(device)

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """Return the distance of each pair.

        Args:
            images: uint8 (B, C, H, W), levels 0..255, H and W at least 31, C 3, or 1, which is repeated.
            targets: The same shape.

        Returns:
            float32 (B,), 0 for identical images.

        Raises:
            InputError: the shapes differ, or the images are too small or of other channels.
        """
        import torch

        _require_pairs(images, targets)
        _require_size(images, LPIPS_SMALLEST, "LPIPS")
        if images.shape[1] not in (1, 3):
            raise InputError(f"LPIPS of images with {images.shape[1]} channels", expected="1 (grey) or 3 (RGB)")
        values = [torch.zeros(0)]
        for image, target in zip(images.split(CHUNK), targets.split(CHUNK), strict=True):
            with torch.no_grad():
                value = self._network(self._prepared(image), self._prepared(target))
            values.append(value.reshape(-1)[: len(image)].float().cpu())
        return torch.cat(values)

    def _prepared(self, levels: Tensor) -> Tensor:
        """Return CHUNK images as the network takes them, float32 (CHUNK, 3, H, W) in [-1, 1]; the last are padding."""
        import torch.nn.functional as F

        scaled = levels.to(self.device).float() * (2 / LEVELS) - 1
        padded = F.pad(scaled, (0, 0, 0, 0, 0, 0, 0, CHUNK - len(scaled)))
        return padded.expand(-1, 3, -1, -1)


def measure_pairs(name: str, images: Tensor, targets: Tensor, lpips: Lpips | None = None) -> Tensor:
    """Return one value a pair.

    Args:
        name: A key of `PAIRED`, or "lpips".
        images: uint8 (B, C, H, W), levels 0..255.
        targets: The same shape.
        lpips: The network, for "lpips".

    Returns:
        float64 or float32 (B,), on the CPU.

    Raises:
        InputError: the shapes differ or do not suit the metric.
    """
    if name == "lpips" and lpips is not None:
        return lpips(images, targets)
    return PAIRED[name](images, targets)


def summarize_pairs(name: str, values: Tensor) -> Measured:
    """Return the mean of the values of all pairs.

    The PSNR of identical images is infinite. It cannot enter a mean, and no number can stand for it; so the mean is
    that of the pairs that differ, and "identical" counts the others, which have to be looked at with it. Where all
    are identical the mean is infinite.

    Args:
        name: The metric.
        values: (N,), N at least 1.

    Returns:
        The mean with its interval; of PSNR with the details "identical" and "n", the pairs in the mean.
    """
    if name != "psnr":
        return Measured.mean_of(values)
    different = values[values.isfinite()]
    identical = values.numel() - different.numel()
    if not different.numel():
        return Measured(math.inf, math.inf, math.inf, {"n": 0, "identical": identical})
    return Measured.mean_of(different, {"identical": identical})


def _differences(images: Tensor, targets: Tensor) -> Tensor:
    """Return the differences as int32 (B, C, H, W), so that sums are exact."""
    _require_pairs(images, targets)
    return images.int() - targets.int()


def _require_pairs(images: Tensor, targets: Tensor) -> None:
    import torch

    if images.shape != targets.shape:
        raise InputError(
            f"images and their targets differ in shape: {_shape(images)} and {_shape(targets)}",
            expected="pairs of one shape (channels x height x width)",
        )
    if images.dtype != torch.uint8 or targets.dtype != torch.uint8:
        raise InputError(f"pairs of {images.dtype} and {targets.dtype}", expected="levels 0..255, torch.uint8")


def _require_size(images: Tensor, smallest: int, what: str) -> None:
    if min(images.shape[-2:]) < smallest:
        raise InputError(
            f"images of {images.shape[-1]}x{images.shape[-2]} pixels are too small for {what}",
            expected=f"at least {smallest}x{smallest} pixels",
            fix="leave this metric out; l1 and psnr take any size",
        )


def _shape(images: Tensor) -> str:
    count, *image = images.shape
    return f"{count} of {'x'.join(map(str, image))}"


def _package(name: str) -> Path:
    """Return an installed package's folder, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise _not_installed(name, "lpips")
    return Path(spec.submodule_search_locations[0])


def _not_installed(package: str, metric: str) -> InputError:
    return InputError(f"{package}, which the metric {metric} needs, is not installed", fix=INSTALL)


def _untrained() -> torch.nn.Module:
    """Return LPIPS with its own weights and a backbone at random values; nothing is fetched."""
    import torch

    try:
        from torchmetrics.functional.image.lpips import _NoTrainLpips

        with torch.random.fork_rng(devices=[]):
            network: torch.nn.Module = _NoTrainLpips(net="alex", pnet_rand=True)
    except ImportError as error:
        raise _not_installed(str(error.name or "torchmetrics"), "lpips") from error
    return network


def _with_backbone(network: torch.nn.Module, path: Path) -> torch.nn.Module:
    """Put the weights of torchvision's AlexNet into LPIPS, its classifier left out.

    Raises:
        InputError: a tensor is missing or of another shape.
    """
    import torch

    from finectl.models.foreign.readers import as_state, load_pickled

    state = as_state(load_pickled(path), path)
    with torch.no_grad():
        for name, parameter in network.get_submodule("net").named_parameters():
            stored = f"features.{name.split('.', 1)[1]}"  # "slice2.3.weight" is torchvision's "features.3.weight"
            if stored not in state or state[stored].shape != parameter.shape:
                found = f"has the shape {list(state[stored].shape)}" if stored in state else "is missing"
                raise InputError(
                    f"{path} is not torchvision's AlexNet: its tensor {stored} {found}",
                    expected=f"the shape {list(parameter.shape)}",
                    fix="--lpips FILE, usually called alexnet-owt-7be5be79.pth",
                )
            parameter.copy_(state[stored])
    return network
