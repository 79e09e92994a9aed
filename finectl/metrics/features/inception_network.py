"""The Inception network of 2015 that FID is defined by, computed from the tensors of its published TorchScript file.

Every batch norm is folded into its convolution. Convolutions of one block that read the same input are one; the one
behind an average pooling is among them, since the average of a linear map is the map of the average.

Reference: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", arXiv 1512.00567, section 6, in
    TensorFlow's model of 2015-12-05: average poolings leave the border out, and the last block pools by the maximum.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

EPSILON = 1e-3  # of the batch norms
SIDE = 299
FEATURES, CLASSES = 2048, 1008
SPATIAL_BLOCK, SPATIAL_CHANNELS, SPATIAL_SIDE = "mixed_6", 7, 17
OUTPUTS = {"features": FEATURES, "spatial": SPATIAL_CHANNELS * SPATIAL_SIDE**2, "logits": CLASSES}
CLASSIFIER = "output.weight"
PARTS = ("weight", "beta", "mean", "var")

Kernel = tuple[int, int]
Shape = tuple[int, int, int, int]  # outputs, inputs, height, width
POINT, SQUARE, LARGE, ACROSS, ALONG = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)
INPUTS_A = {"mixed": (192, 32), "mixed_1": (256, 64), "mixed_2": (288, 64)}  # inputs, outputs of the pooled tower
WIDTHS_C = {"mixed_4": 128, "mixed_5": 160, "mixed_6": 160, "mixed_7": 192}
INPUTS_E = {"mixed_9": 1280, "mixed_10": 2048}
HALVING = ("conv", "mixed_3.conv", "mixed_3.tower.conv_2", "mixed_8.tower.conv_1", "mixed_8.tower_1.conv_3")
UNPADDED = (*HALVING, "conv_1", "conv_4")  # the others keep the size


def _tower(name: str, inputs: int, *layers: tuple[int, Kernel]) -> Iterator[tuple[str, Shape]]:
    """Yield name and shape of the convolutions of a tower: conv, conv_1, conv_2, ..."""
    for number, (outputs, kernel) in enumerate(layers):
        yield f"{name}.conv_{number}" if number else f"{name}.conv", (outputs, inputs, *kernel)
        inputs = outputs


def _shapes() -> Iterator[tuple[str, Shape]]:
    """Yield name and shape of all convolutions."""
    yield from (("conv", (32, 3, *SQUARE)), ("conv_1", (32, 32, *SQUARE)), ("conv_2", (64, 32, *SQUARE)))
    yield from (("conv_3", (80, 64, *POINT)), ("conv_4", (192, 80, *SQUARE)))
    for name, (inputs, pooled) in INPUTS_A.items():
        yield f"{name}.conv", (64, inputs, *POINT)
        yield from _tower(f"{name}.tower", inputs, (48, POINT), (64, LARGE))
        yield from _tower(f"{name}.tower_1", inputs, (64, POINT), (96, SQUARE), (96, SQUARE))
        yield from _tower(f"{name}.tower_2", inputs, (pooled, POINT))
    yield "mixed_3.conv", (384, 288, *SQUARE)
    yield from _tower("mixed_3.tower", 288, (64, POINT), (96, SQUARE), (96, SQUARE))
    for name, width in WIDTHS_C.items():
        one, other = (width, ACROSS), (width, ALONG)
        yield f"{name}.conv", (192, 768, *POINT)
        yield from _tower(f"{name}.tower", 768, (width, POINT), one, (192, ALONG))
        yield from _tower(f"{name}.tower_1", 768, (width, POINT), other, one, other, (192, ACROSS))
        yield from _tower(f"{name}.tower_2", 768, (192, POINT))
    yield from _tower("mixed_8.tower", 768, (192, POINT), (320, SQUARE))
    yield from _tower("mixed_8.tower_1", 768, (192, POINT), (192, ACROSS), (192, ALONG), (192, SQUARE))
    for name, inputs in INPUTS_E.items():
        yield f"{name}.conv", (320, inputs, *POINT)
        yield f"{name}.tower_conv", (384, inputs, *POINT)
        yield f"{name}.tower_1_conv", (448, inputs, *POINT)
        yield f"{name}.tower_1_conv_1", (384, 448, *SQUARE)
        for tower in ("tower", "tower_1"):
            yield f"{name}.{tower}_mixed_conv", (384, 384, 1, 3)
            yield f"{name}.{tower}_mixed_conv_1", (384, 384, 3, 1)
        yield f"{name}.tower_2_conv", (192, inputs, *POINT)


SHAPES = dict(_shapes())
# The convolutions of a block that read its input, in the order of their outputs; one that is pooled is the last.
HEADS = {
    **{
        name: (f"{name}.conv", f"{name}.tower.conv", f"{name}.tower_1.conv", f"{name}.tower_2.conv")
        for name in (*INPUTS_A, *WIDTHS_C)
    },
    "mixed_8": ("mixed_8.tower.conv", "mixed_8.tower_1.conv"),
    "mixed_9": ("mixed_9.conv", "mixed_9.tower_conv", "mixed_9.tower_1_conv", "mixed_9.tower_2_conv"),
    "mixed_10": ("mixed_10.conv", "mixed_10.tower_conv", "mixed_10.tower_1_conv"),
}


def expected_tensors() -> dict[str, tuple[int, ...]]:
    """Return name and shape of the tensors that the file has and this network reads."""
    expected: dict[str, tuple[int, ...]] = {CLASSIFIER: (CLASSES, FEATURES)}
    for name, shape in SHAPES.items():
        for part in PARTS:
            expected[f"layers.{name}.{part}"] = shape if part == "weight" else shape[:1]
    return expected


class Layer(NamedTuple):
    """A convolution with all that belongs to it."""

    weight: Tensor
    bias: Tensor
    stride: int
    padding: tuple[int, int]


def fold(state: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Return float64 weight and bias of the convolution that does what convolution and batch norm do."""
    weight, beta, mean, var = (state[f"layers.{name}.{part}"].detach().double() for part in PARTS)
    scale = (var + EPSILON).rsqrt()
    return weight * scale[:, None, None, None], beta - mean * scale


class InceptionNetwork:
    """The network, for inference.

    Args:
        state: The tensors of `expected_tensors`.
        device: Where to compute.
        dtype: Arithmetic of the convolutions; features and logits are float32.
    """

    def __init__(self, state: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
        joined = {name: block for block, names in HEADS.items() for name in names}
        self._layers: dict[str, Layer] = {}
        for name, (_, _, height, width) in SHAPES.items():
            if name not in joined:
                padding = (0, 0) if name in UNPADDED else (height // 2, width // 2)
                self._layers[name] = Layer(*fold(state, name), 2 if name in HALVING else 1, padding)
        for block, names in HEADS.items():
            weights, biases = zip(*(fold(state, name) for name in names), strict=True)
            self._layers[block] = Layer(torch.cat(weights), torch.cat(biases), 1, (0, 0))
        for name, layer in self._layers.items():
            weight = layer.weight.to(device, dtype).contiguous(memory_format=torch.channels_last)
            self._layers[name] = layer._replace(weight=weight, bias=layer.bias.to(device, dtype))
        self._classifier = state[CLASSIFIER].detach().to(device, torch.float32)
        self._device, self._dtype = device, dtype

    def __call__(self, images: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """Compute what is wanted and no more.

        Args:
            images: float32 (B, 3, 299, 299) in [0, 255], on any device.
            wanted: Keys of `OUTPUTS`.

        Returns:
            Each float32 (B, width), where the network is: "features", pooled; "spatial", the first channels of the
            block mixed_6 in the order C, H, W; "logits", without the bias, as the Inception Score has them.
        """
        x = ((images.to(self._device) - 128) / 128).to(self._dtype).contiguous(memory_format=torch.channels_last)
        found: dict[str, Tensor] = {}
        x = self._stem(x)  # (B, 192, 35, 35)
        for block in INPUTS_A:
            x = self._towers(block, self._heads(block, x))
        x = self._shrink_3(x)  # (B, 768, 17, 17)
        for block in WIDTHS_C:
            heads = self._heads(block, x)
            if block == SPATIAL_BLOCK and "spatial" in wanted:
                found["spatial"] = heads[0][:, :SPATIAL_CHANNELS].float().flatten(1)
                if set(wanted) == {"spatial"}:
                    return found
            x = self._towers(block, heads)
        x = self._shrink_8(x)  # (B, 1280, 8, 8)
        for block in INPUTS_E:
            x = self._wide(block, x)  # (B, 2048, 8, 8)
        features = x.float().mean((2, 3))
        if "features" in wanted:
            found["features"] = features
        if "logits" in wanted:
            found["logits"] = functional.linear(features, self._classifier)
        return found

    def _stem(self, x: Tensor) -> Tensor:
        # ReLU after a maximum is ReLU before it, on a quarter of the values.
        x = _max_pool(self._linear("conv_2", self._chain(x, "conv", "conv_1"))).relu_()
        return _max_pool(self._linear("conv_4", self._chain(x, "conv_3"))).relu_()

    def _towers(self, block: str, heads: list[Tensor]) -> Tensor:
        """Return the output of a block whose towers keep the size, from what its first convolutions gave."""
        direct, tower, tower_1, pooled = heads
        length, length_1 = (2, 3) if block in INPUTS_A else (3, 5)
        tower = self._chain(tower, *(f"{block}.tower.conv_{number}" for number in range(1, length)))
        tower_1 = self._chain(tower_1, *(f"{block}.tower_1.conv_{number}" for number in range(1, length_1)))
        return torch.cat([direct, tower, tower_1, pooled], 1)

    def _shrink_3(self, x: Tensor) -> Tensor:
        tower = self._chain(x, "mixed_3.tower.conv", "mixed_3.tower.conv_1", "mixed_3.tower.conv_2")
        return torch.cat([self._chain(x, "mixed_3.conv"), tower, _max_pool(x)], 1)

    def _shrink_8(self, x: Tensor) -> Tensor:
        tower, tower_1 = self._heads("mixed_8", x)
        tower = self._chain(tower, "mixed_8.tower.conv_1")
        tower_1 = self._chain(tower_1, *(f"mixed_8.tower_1.conv_{number}" for number in (1, 2, 3)))
        return torch.cat([tower, tower_1, _max_pool(x)], 1)

    def _wide(self, block: str, x: Tensor) -> Tensor:
        direct, one, other, *pooled = self._heads(block, x)
        if not pooled:
            pooled = [self._chain(functional.max_pool2d(x, 3, 1, 1), f"{block}.tower_2_conv")]
        other = self._chain(other, f"{block}.tower_1_conv_1")
        split = [
            self._chain(source, f"{block}.{tower}_mixed_{conv}")
            for tower, source in (("tower", one), ("tower_1", other))
            for conv in ("conv", "conv_1")
        ]
        return torch.cat([direct, *split, *pooled], 1)

    def _heads(self, block: str, x: Tensor) -> list[Tensor]:
        """Return what each of a block's convolutions of its input gives."""
        widths = [SHAPES[name][0] for name in HEADS[block]]
        together = self._linear(block, x)
        if "tower_2" not in HEADS[block][-1]:
            return list(together.relu_().split(widths, 1))
        pooled = functional.avg_pool2d(together[:, -widths[-1] :], 3, 1, 1, count_include_pad=False).relu_()
        return [*together.relu_().split(widths, 1)[:-1], pooled]

    def _chain(self, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = self._linear(name, x).relu_()
        return x

    def _linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias, stride, padding = self._layers[name]
        return functional.conv2d(x, weight, bias, stride, padding)


def _max_pool(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, 3, 2)
