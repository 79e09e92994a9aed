"""How much fine-tuning changes the outputs of blocks, by channel and by position.

Reference: DeMe, arXiv 2410.06664, section 3.2 and Fig. 2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finectl.artifacts.tensors import load_tensors
from finectl.models.dit import DiT
from finectl.models.io import ModelConfig
from finectl.stages.analyse.setting import Setting

DIGITS = 6


def outputs_of(network: nn.Module, config: ModelConfig) -> dict[str, nn.Module]:
    """Return the module that gives the output of each block, that of its projection where there is one.

    In a UNet a projection changes its block's output by a hook, before any that is added later.
    """
    if not isinstance(network, DiT):
        return {place.where: network.get_submodule(f"unet.{place.where}") for place in config.all_places}
    projected = {place.where for place in config.places}
    return {
        place.where: network.get_submodule(f"projections.{place.where}" if place.where in projected else place.where)
        for place in config.all_places
    }


@contextlib.contextmanager
def watching(modules: dict[str, nn.Module], seen: dict[str, Tensor]) -> Iterator[None]:
    """Keep the outputs of modules, of several the first, as (B, C, positions) inside a `with` block."""

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found = output[0] if isinstance(output, tuple) else output
            # (B, C, H, W) of a UNet, (B, T, C) of a transformer
            seen[name] = found.flatten(2) if found.ndim == 4 else found.transpose(1, 2)

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def spread_timesteps(first: int, end: int, count: int) -> Tensor:
    """Return `count` timesteps spread evenly over [first, end), (count,), int64."""
    return first + ((torch.arange(count, dtype=torch.float64) + 0.5) / count * (end - first)).long()


@torch.no_grad()
def activation_changes(setting: Setting) -> dict[str, Any]:
    """Compare each model's blocks with those of theta_0, on noisy held-out images at the timesteps of its range.

    Returns:
        `models`: for each its range and, by block, the mean of |F_after - F_before| by channel and by position, the
        mean of |F_before|, and the variance between channels divided by that between positions (None where that is 0).
    """
    data = setting.images("heldout")
    x0 = setting.clean(data, "analyse-activations")
    noise = setting.noise("analyse-activations", 0, tuple(x0.shape))
    before = setting.network(setting.base_state())
    borders = setting.parts.borders
    found = []
    with setting.job.console.progress("activations", setting.parts.count, unit="model") as progress:
        for index, (name, file) in enumerate(zip(setting.parts.names, setting.parts.files, strict=True)):
            first, end = (borders[index], borders[index + 1]) if borders else (0, len(setting.schedule))
            t = spread_timesteps(first, end, len(x0))
            after = setting.network(load_tensors(file))
            sums = _summed(setting, (before, after), (x0, noise, t, data.labels))
            blocks = {where: _described(*values) for where, values in sums.items()}
            found.append({"name": name, "range": [first, end], "blocks": blocks})
            progress.advance(samples=len(x0))
    return {"images": len(x0), "models": found}


def _summed(
    setting: Setting, networks: Sequence[nn.Module], inputs: Sequence[Tensor]
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Return, by block, the mean |change| by channel (C,) and by position, float64, and the mean |F_before|."""
    config = setting.parts.config
    seen: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    total: dict[str, list[Any]] = {}
    count = len(inputs[0])
    with contextlib.ExitStack() as stack:
        for network, kept in zip(networks, seen, strict=True):
            stack.enter_context(watching(outputs_of(network, config), kept))
        for rows in torch.arange(count).split(setting.job.config.batch_size):
            setting.check()
            x0, noise, t, y = (value[rows].to(setting.device) for value in inputs)
            x_t = setting.schedule.add_noise(x0, noise, t)
            for network in networks:
                network(x_t, t, y)
            for where, before in seen[0].items():
                change = (seen[1][where].double() - before.double()).abs()  # (B, C, positions)
                new = [change.mean(2).sum(0), change.mean(1).sum(0), before.double().abs().mean((1, 2)).sum()]
                old = total.get(where)
                total[where] = new if old is None else [one + two for one, two in zip(old, new, strict=True)]
    return {
        where: (channels.cpu() / count, positions.cpu() / count, float(size) / count)
        for where, (channels, positions, size) in total.items()
    }


def _described(channels: Tensor, positions: Tensor, size: float) -> dict[str, Any]:
    between = [float(values.var(correction=0)) for values in (channels, positions)]
    return {
        "channels": _rounded(channels),
        "positions": _rounded(positions),
        "before": size,
        "change": float(channels.mean()),
        "ratio": between[0] / between[1] if between[1] else None,
    }


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]
