"""The `inception` extractor: FID's network of 2015, with images resized as clean-fid or as TensorFlow's FID did.

The file is read for its tensors; what computes is `inception_network`.
"""

from __future__ import annotations

import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finectl.errors import InputError, UsageError
from finectl.metrics.features import ExtractorInfo, FeatureOptions
from finectl.metrics.features.networks import as_rgb, clean_resizer, computing, require_packages
from finectl.metrics.features.weights import WEIGHTS, WITHOUT, content_digest, locate

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor

NAME = "inception"
RESIZES = {"clean": "clean bicubic 299", "legacy_tensorflow": "tensorflow bilinear 299"}
DTYPES = ("float32", "bfloat16")
CPU_BATCH, GPU_BATCH = 16, 256
EXPECTED = f"the TorchScript file {WEIGHTS[NAME].file}, as published"
FIX = f"fetch it again from {WEIGHTS[NAME].url}, and name it with {WEIGHTS[NAME].option} FILE; {WITHOUT}"


def describe(options: FeatureOptions) -> ExtractorInfo:
    """Find and hash the network's file, without torch.

    Raises:
        InputError: the file is missing or no archive, or clean-fid is needed and missing.
        UsageError: there is no such way to resize, or no such arithmetic.
    """
    if options.resize_mode not in RESIZES:
        raise UsageError(f"resize mode {options.resize_mode!r}", expected=" or ".join(RESIZES))
    if options.dtype not in DTYPES:
        raise UsageError(f"dtype {options.dtype!r} of the Inception network", expected=" or ".join(DTYPES))
    if options.resize_mode == "clean":
        require_packages(["cleanfid"], "resizing images for Inception as clean-fid does")
    path = locate(NAME, options.inception)
    digest = content_digest(path)
    if not zipfile.is_zipfile(path):
        raise _other_file(path, "it is no archive, or not all of one")
    details = {"mode": options.resize_mode, "dtype": options.dtype}
    return ExtractorInfo(NAME, digest, RESIZES[options.resize_mode], str(path), details)


def load(info: ExtractorInfo, options: FeatureOptions, device: torch.device) -> InceptionExtractor:
    """Load the network.

    Args:
        info: What `describe` returned.
        options: As for `describe`.
        device: Where to compute.

    Raises:
        InputError: the file is damaged or of another network.
    """
    return InceptionExtractor(info, device)


class InceptionExtractor:
    """The loaded network; see `Extractor`.

    Args:
        info: What `describe` returned.
        device: Where to compute.
    """

    def __init__(self, info: ExtractorInfo, device: torch.device) -> None:
        import torch

        from finectl.metrics.features.inception_network import OUTPUTS, InceptionNetwork

        self.info = info
        self._device = device
        self.outputs: Mapping[str, int] = OUTPUTS
        self.batch_size = GPU_BATCH if device.type == "cuda" else CPU_BATCH
        self._resize = _clean_resize() if info.details["mode"] == "clean" else _tensorflow_resize
        self._network = InceptionNetwork(
            _tensors(Path(info.path), info.digest), device, getattr(torch, info.details["dtype"])
        )

    def prepare(self, image: npt.NDArray[np.uint8]) -> Tensor:
        """Return an image (H, W, C), C 1 or 3, as float32 (3, 299, 299) in [0, 255]; grey is repeated."""
        return self._resize(as_rgb(image))

    def forward(self, batch: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """Return what is wanted of prepared images (batch_size, 3, 299, 299), float32 on the CPU."""
        with computing(self._device, "float32"):  # the network knows its own arithmetic
            found = self._network(batch, wanted)
        # Copies made outside inference mode are ordinary tensors.
        return {name: values.to("cpu", copy=True) for name, values in found.items()}


def _tensors(path: Path, digest: str) -> dict[str, Tensor]:
    """Return the tensors of the file that the network reads, after a look at their shapes and values."""
    import torch

    from finectl.metrics.features.inception_network import expected_tensors

    # Of the published file all is known; in another one a flipped bit would be one more odd weight.
    if digest != WEIGHTS[NAME].sha256:
        _require_whole(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that TorchScript is old
            state: dict[str, Any] = dict(torch.jit.load(path, map_location="cpu").state_dict())
    except (OSError, RuntimeError, ValueError) as error:
        raise _other_file(path, str(error).strip().partition("\n")[0]) from error
    for name, shape in expected_tensors().items():
        if name not in state:
            raise _other_file(path, f"it has no tensor {name}")
        if tuple(state[name].shape) != shape:
            raise _other_file(path, f"its tensor {name} has the shape {tuple(state[name].shape)}, not {shape}")
        if not state[name].isfinite().all():
            raise _other_file(path, f"its tensor {name} has values that are no numbers")
    return state


def _require_whole(path: Path) -> None:
    """Check the archive's own checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise _other_file(path, str(error)) from error
    if damaged:
        raise _other_file(path, f"its part {damaged} is damaged")


def _clean_resize() -> Callable[[npt.NDArray[np.uint8]], Tensor]:
    """Return clean-fid's own resizing."""
    import torch

    from finectl.metrics.features.inception_network import SIDE

    resize = clean_resizer(SIDE, SIDE)
    return lambda image: torch.from_numpy(resize(image)).permute(2, 0, 1)


def _tensorflow_resize(image: npt.NDArray[np.uint8]) -> Tensor:
    """Resize as the first versions of TensorFlow did: bilinear, corner on corner, whatever the ratio of the sizes."""
    import torch
    from torch.nn import functional

    from finectl.metrics.features.inception_network import SIDE

    height, width = image.shape[:2]
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()  # (1, 3, H, W)
    theta = torch.eye(2, 3)
    theta[0, 2] = theta[0, 0] / width - theta[0, 0] / SIDE
    theta[1, 2] = theta[1, 1] / height - theta[1, 1] / SIDE
    grid = functional.affine_grid(theta[None], [1, 3, SIDE, SIDE], align_corners=False)
    sampled = functional.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled[0]


def _other_file(path: Path, reason: str) -> InputError:
    return InputError(f"{path} does not hold the Inception network: {reason}", expected=EXPECTED, fix=FIX)
