"""A TorchScript file laid out as inception-2015-12-05.pt is, with random weights, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Size = int | tuple[int, int]


class Layer(nn.Module):
    """Convolution, batch norm without a factor, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: Size, stride: int = 1, padding: Size = 0) -> None:
        super().__init__()
        high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
        self.stride = stride
        self.padding: tuple[int, int] = (padding, padding) if isinstance(padding, int) else padding
        self.weight = nn.Parameter(torch.empty(outputs, inputs, high, wide))
        self.register_buffer("beta", torch.empty(outputs))
        self.register_buffer("mean", torch.empty(outputs))
        self.register_buffer("var", torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, stride=self.stride, padding=self.padding)
        return F.relu(F.batch_norm(x, running_mean=self.mean, running_var=self.var, bias=self.beta, eps=1e-3))


def chain(*layers: Layer, pool: nn.Module | None = None) -> nn.Sequential:
    """Return a tower: a pooling if there is one, then conv, conv_1, conv_2, ..."""
    tower = nn.Sequential()
    if pool is not None:
        tower.add_module("pool", pool)
    for number, layer in enumerate(layers):
        tower.add_module(f"conv_{number}" if number else "conv", layer)
    return tower


def averaging() -> nn.Module:
    return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.conv = Layer(inputs, 64, 1)
        self.tower = chain(Layer(inputs, 48, 1), Layer(48, 64, 5, padding=2))
        self.tower_1 = chain(Layer(inputs, 64, 1), Layer(64, 96, 3, padding=1), Layer(96, 96, 3, padding=1))
        self.tower_2 = chain(Layer(inputs, pooled, 1), pool=averaging())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), self.tower(x), self.tower_1(x), self.tower_2(x)], 1)


class BlockB(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.conv = Layer(inputs, 384, 3, stride=2)
        self.tower = chain(Layer(inputs, 64, 1), Layer(64, 96, 3, padding=1), Layer(96, 96, 3, stride=2))
        self.pool = nn.MaxPool2d(3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), self.tower(x), self.pool(x)], 1)


class BlockC(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()

        def across(outputs: int) -> Layer:
            return Layer(width, outputs, (1, 7), padding=(0, 3))

        def along(outputs: int) -> Layer:
            return Layer(width, outputs, (7, 1), padding=(3, 0))

        self.conv = Layer(inputs, 192, 1)
        self.tower = chain(Layer(inputs, width, 1), across(width), along(192))
        self.tower_1 = chain(Layer(inputs, width, 1), along(width), across(width), along(width), across(192))
        self.tower_2 = chain(Layer(inputs, 192, 1), pool=averaging())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), self.tower(x), self.tower_1(x), self.tower_2(x)], 1)


class BlockD(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.tower = chain(Layer(inputs, 192, 1), Layer(192, 320, 3, stride=2))
        self.tower_1 = chain(
            Layer(inputs, 192, 1),
            Layer(192, 192, (1, 7), padding=(0, 3)),
            Layer(192, 192, (7, 1), padding=(3, 0)),
            Layer(192, 192, 3, stride=2),
        )
        self.pool = nn.MaxPool2d(3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.tower(x), self.tower_1(x), self.pool(x)], 1)


class BlockE(nn.Module):
    def __init__(self, inputs: int, pool: nn.Module) -> None:
        super().__init__()
        self.conv = Layer(inputs, 320, 1)
        self.tower_conv = Layer(inputs, 384, 1)
        self.tower_mixed_conv = Layer(384, 384, (1, 3), padding=(0, 1))
        self.tower_mixed_conv_1 = Layer(384, 384, (3, 1), padding=(1, 0))
        self.tower_1_conv = Layer(inputs, 448, 1)
        self.tower_1_conv_1 = Layer(448, 384, 3, padding=1)
        self.tower_1_mixed_conv = Layer(384, 384, (1, 3), padding=(0, 1))
        self.tower_1_mixed_conv_1 = Layer(384, 384, (3, 1), padding=(1, 0))
        self.tower_2_pool = pool
        self.tower_2_conv = Layer(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.tower_conv(x)
        other = self.tower_1_conv_1(self.tower_1_conv(x))
        parts = [
            self.conv(x),
            self.tower_mixed_conv(one),
            self.tower_mixed_conv_1(one),
            self.tower_1_mixed_conv(other),
            self.tower_1_mixed_conv_1(other),
            self.tower_2_conv(self.tower_2_pool(x)),
        ]
        return torch.cat(parts, 1)


class StandIn(nn.Module):
    """The network: `layers` and `output`; it resizes inside as TensorFlow did."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        parts: Sequence[tuple[str, nn.Module]] = (
            ("conv", Layer(3, 32, 3, stride=2)),
            ("conv_1", Layer(32, 32, 3)),
            ("conv_2", Layer(32, 64, 3, padding=1)),
            ("pool0", nn.MaxPool2d(3, stride=2)),
            ("conv_3", Layer(64, 80, 1)),
            ("conv_4", Layer(80, 192, 3)),
            ("pool1", nn.MaxPool2d(3, stride=2)),
            ("mixed", BlockA(192, 32)),
            ("mixed_1", BlockA(256, 64)),
            ("mixed_2", BlockA(288, 64)),
            ("mixed_3", BlockB(288)),
            ("mixed_4", BlockC(768, 128)),
            ("mixed_5", BlockC(768, 160)),
            ("mixed_6", BlockC(768, 160)),
            ("mixed_7", BlockC(768, 192)),
            ("mixed_8", BlockD(768)),
            ("mixed_9", BlockE(1280, averaging())),
            ("mixed_10", BlockE(2048, nn.MaxPool2d(3, stride=1, padding=1))),
            ("pool2", nn.AvgPool2d(8)),
        )
        for name, part in parts:
            self.layers.add_module(name, part)
        self.output = nn.Linear(2048, 1008)

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        count, channels, height, width = img.shape
        theta = torch.eye(2, 3, device=img.device)
        theta[0, 2] += theta[0, 0] / width - theta[0, 0] / 299
        theta[1, 2] += theta[1, 1] / height - theta[1, 1] / 299
        grid = F.affine_grid(theta.unsqueeze(0).repeat([count, 1, 1]), [count, channels, 299, 299], align_corners=False)
        x = F.grid_sample(img.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
        features = self.layers((x - 128) / 128).reshape(-1, 2048)
        if return_features:
            return features
        if no_output_bias:
            return F.linear(features, self.output.weight).softmax(1)
        return self.output(features).softmax(1)


def standin(seed: int = 0) -> StandIn:
    """Return the network with weights under which the activations neither die nor grow."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        network = StandIn()
    network = network.to_empty(device="cpu").eval()
    for module in network.modules():
        if isinstance(module, Layer):
            # Mean squares stay near 1 from layer to layer. Weights without a common mean would tell images apart
            # better, but multiply rounding by a thousand, which a trained network does not.
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5, generator=generator)
            nn.init.uniform_(module.var, 0.3, 0.7, generator=generator)
            nn.init.normal_(module.mean, std=0.1, generator=generator)
            nn.init.normal_(module.beta, std=0.3, generator=generator)
    nn.init.normal_(network.output.weight, std=0.05, generator=generator)
    nn.init.normal_(network.output.bias, std=0.5, generator=generator)
    return network


def write_standin(path: Path, seed: int = 0) -> None:
    """Write the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.jit.save(torch.jit.script(standin(seed)), str(path))
