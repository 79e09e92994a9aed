"""The `dinov2` extractor: the class token of DINOv2, in whose features FDD is measured.

Weights are facebook's own files (`dinov2_vitl14_pretrain.pth`; others of that family have other names of their own and
give other values). They run through timm's vision transformer, with the position embedding brought to the smaller
image as facebook's program does it. Images are resized as EDM2's evaluation does: bicubic with antialiasing on floats;
Stein et al.'s program rounds to 8 bits after PIL's filter, which gives nearly the same.

Reference: Oquab et al., arXiv 2304.07193; Stein et al., arXiv 2306.04675; Karras et al., arXiv 2312.02696, appendix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finectl.errors import InputError
from finectl.metrics.features import ExtractorInfo, FeatureOptions
from finectl.metrics.features.networks import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SAFETENSORS,
    as_rgb,
    check_weights,
    computing,
    fit,
    normalised,
    read_state,
    require_packages,
)
from finectl.metrics.features.weights import WEIGHTS, WITHOUT, content_digest, locate
from finectl.models.foreign.readers import SafetensorsReader

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor, nn

NAME = "dinov2"
IMAGE_SIZE, PATCH, HEAD_DIM = 224, 14, 64
GRID = IMAGE_SIZE // PATCH
OFFSET = 0.1  # facebook's interpolate_offset
BATCH_SIZE = 32
RESIZE = f"bicubic {IMAGE_SIZE}, antialiased, on floats (as EDM2)"
KNOWN = {(384, 12): "ViT-S/14", (768, 12): "ViT-B/14", (1024, 24): "ViT-L/14", (1536, 40): "ViT-g/14"}
BLOCK = re.compile(r"blocks\.(\d+)\.norm1\.weight")
MARKS = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.ls1.gamma", "blocks.0.mlp.fc2.weight")
TRAINED_ONLY = "mask_token"
FUSED = {".mlp.w12.": ".mlp.fc1.", ".mlp.w3.": ".mlp.fc2."}
FIX = f"take {WEIGHTS[NAME].file} from {WEIGHTS[NAME].url} and name it with --dino; {WITHOUT}"


def describe(options: FeatureOptions) -> ExtractorInfo:
    """Find and hash the weights, without torch.

    Raises:
        InputError: they, or the packages that run them, are missing; or they are damaged or of another network.
    """
    require_packages(["timm"], "the DINOv2 network (fdd)")
    path = locate(NAME, options.dino)
    check_weights(path, FIX)
    details = {"file": path.name}
    if path.suffix == SAFETENSORS:
        details["architecture"] = Layout(path, renamed(SafetensorsReader(path, [path]).shapes)).name
    return ExtractorInfo(NAME, content_digest(path), RESIZE, str(path), details)


def load(info: ExtractorInfo, options: FeatureOptions, device: torch.device) -> DinoFeatures:
    """Read the network.

    Raises:
        InputError: the file holds another network, or more than tensors.
    """
    path = Path(info.path)
    return DinoFeatures(info, build(read_state(path), path).to(device), device, options.dtype)


def renamed(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table of facebook's names under those of timm; what only training needs is left out."""
    result = {}
    for name, value in table.items():
        new = name
        for old, other in FUSED.items():
            new = new.replace(old, other)
        if new != TRAINED_ONLY:
            result[new] = value
    return result


class Layout:
    """What the shapes of a state, under timm's names, say of the network.

    Args:
        where: Where the state is, for messages.
        shapes: Name -> shape.

    Raises:
        InputError: it is no DINOv2 network of facebook's layout.
    """

    def __init__(self, where: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        missing = [name for name in MARKS if name not in shapes]
        if missing:
            raise _other(where, f"it has no {missing[0]}")
        if "register_tokens" in shapes or "reg_token" in shapes:
            raise _other(where, "it has register tokens, with which features are others")
        self.width = shapes["cls_token"][-1]
        self.depth = 1 + max(int(match[1]) for match in map(BLOCK.fullmatch, shapes) if match)
        self.hidden = shapes["blocks.0.mlp.fc2.weight"][-1]
        rows = shapes["blocks.0.mlp.fc1.weight"][0] if "blocks.0.mlp.fc1.weight" in shapes else 0
        self.gated = rows == 2 * self.hidden
        self.grid = math.isqrt(max(shapes["pos_embed"][1] - 1, 0))
        if shapes["patch_embed.proj.weight"] != (self.width, 3, PATCH, PATCH):
            raise _other(where, f"its patches are {shapes['patch_embed.proj.weight'][2:]}, not ({PATCH}, {PATCH})")
        if self.width % HEAD_DIM != 0 or self.grid**2 + 1 != shapes["pos_embed"][1]:
            raise _other(where, f"width {self.width}, {shapes['pos_embed'][1]} positions")

    @property
    def name(self) -> str:
        """Its name in the paper, else its size."""
        return KNOWN.get((self.width, self.depth), f"width {self.width}, depth {self.depth}")


def _other(where: Path, why: str) -> InputError:
    return InputError(
        f"{where} holds no DINOv2 network: {why}", expected="facebook's DINOv2, without registers", fix=FIX
    )


def build(state: Mapping[str, Tensor], where: Path) -> nn.Module:
    """Return the network for images of 224x224 pixels.

    Args:
        state: Facebook's state dict, of any width and depth; timm's own files of it have the same names.
        where: Where it is, for messages.

    Raises:
        InputError: it is no DINOv2 network of facebook's layout.
    """
    import torch
    from timm.layers import SwiGLUPacked
    from timm.models.vision_transformer import VisionTransformer

    state = renamed(state)
    layout = Layout(where, {name: tuple(tensor.shape) for name, tensor in state.items()})
    state["pos_embed"] = interpolated(state["pos_embed"].float(), layout.grid)
    gated: dict[str, Any] = {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU} if layout.gated else {}
    rows = layout.hidden * (2 if layout.gated else 1)
    with torch.device("meta"):  # the file has every tensor
        network: nn.Module = VisionTransformer(
            img_size=IMAGE_SIZE,
            patch_size=PATCH,
            embed_dim=layout.width,
            depth=layout.depth,
            num_heads=layout.width // HEAD_DIM,
            mlp_ratio=(rows + 0.5) / layout.width,  # timm rounds the product down
            init_values=1.0,
            num_classes=0,
            global_pool="token",
            **gated,
        )
    fit(network, state, where, f"DINOv2 {layout.name}")
    return network.float().eval().requires_grad_(False)


def interpolated(positions: Tensor, grid: int, target: int = GRID) -> Tensor:
    """Return a position embedding for another number of patches, as facebook's program does.

    It asks for the scale (target + 0.1) / grid, so that the points lie a little closer together than the patches.

    Args:
        positions: float32 (1, 1 + grid^2, D), the class token first.
        grid: Patches along a side.
        target: Patches along a side of the result.

    Returns:
        float32 (1, 1 + target^2, D).
    """
    from torch import cat
    from torch.nn.functional import interpolate

    if grid == target:
        return positions
    scale = (target + OFFSET) / grid
    own, patches = positions[:, :1], positions[:, 1:]
    square = patches.reshape(1, grid, grid, -1).permute(0, 3, 1, 2)  # (1, D, grid, grid)
    square = interpolate(square, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    return cat([own, square.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


class DinoFeatures:
    """The network with its preparation of images; see `Extractor`.

    Args:
        info: What `describe` found.
        network: What `build` made, on the device.
        device: Where it is.
        dtype: "float32" or "bfloat16".
    """

    batch_size = BATCH_SIZE

    def __init__(self, info: ExtractorInfo, network: Any, device: torch.device, dtype: str) -> None:
        self.info = info
        self._network = network
        self._device, self._dtype = device, dtype
        self.outputs: Mapping[str, int] = {"features": int(network.embed_dim)}

    def prepare(self, image: npt.NDArray[np.uint8]) -> Tensor:
        """Return an image (H, W, 1 or 3) as float32 (3, 224, 224)."""
        import torch
        from torch.nn.functional import interpolate

        pixels = torch.from_numpy(as_rgb(image).transpose(2, 0, 1).copy()).float()[None]  # (1, 3, H, W), 0..255
        size = (IMAGE_SIZE, IMAGE_SIZE)
        resized = interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)
        return normalised(resized[0], IMAGENET_MEAN, IMAGENET_STD)

    def forward(self, batch: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """Return "features" (B, D) float32 of prepared images (B, 3, 224, 224): the class token after the last norm."""
        with computing(self._device, self._dtype):
            features: Tensor = self._network(batch.to(self._device))
        found = {"features": features.float().cpu()}
        return {name: found[name] for name in wanted}
