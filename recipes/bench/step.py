"""Time a training step of finectl's DiT beside its peers, and factorised layers beside dense ones.

Every contestant of a model runs in a process of its own, so that settings which hold for a whole process (memory
allocation, threads) are each one's own, and the peers run as they ship. All take turns within one run, one step each,
in an order that changes from round to round; figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from timing import THREADS, Step, Worker, paired_ratio, peak_flops, say, serve, take_turns

CHANNELS, CLASSES, TIMESTEPS = 4, 1000, 1000
# Batch and latent side: a step of about a second on two cores, the papers' 256 tokens on a GPU.
SIZES = {"cpu": (16, 16), "cuda": (64, 32)}
MODELS = {"cpu": "dit-s,dit-b", "cuda": "dit-s,dit-b,dit-l"}
# Of the time of facebookresearch/DiT as shipped.
TARGETS = {
    ("cpu", "finectl fp32"): 0.95,
    ("cpu", "finectl bf16"): 0.45,
    ("cpu", "finectl bf16 compiled", "dit-s"): 0.39,
    ("cpu", "finectl bf16 compiled", "dit-b"): 0.35,
    ("cuda", "finectl bf16 compiled"): 0.5,
}
UTILISATION_TARGETS = {("cuda", "finectl bf16 compiled", "dit-l"): 0.45}


# --------------------------------------------------------------------------------------------------- contestants


def device() -> Any:
    """Return the device that all contestants run on."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def batch() -> tuple[Any, Any]:
    """Return the fixed batch of latents and labels that every contestant trains on."""
    import torch

    torch.manual_seed(0)
    images, side = SIZES[device().type]
    x, y = torch.randn(images, CHANNELS, side, side), torch.randint(0, CLASSES, (images,))
    return x.to(device()), y.to(device())


def finectl_step(model_name: str, dtype: str, *, compiled: bool) -> Step:
    """Return the step of `finectl train`, on a data set of one batch."""
    from finectl.artifacts.job import Execution
    from finectl.models.presets import preset
    from finectl.training.estimate import trial_run
    from finectl.training.run import train_step

    images, side = SIZES[device().type]
    config = preset(model_name, image_size=side, channels=CHANNELS, num_classes=CLASSES)
    run = trial_run(config, Execution(device().type, dtype, compile=compiled), images)
    steps = itertools.count()
    return lambda: float(train_step(run, next(steps)))


def facebook_step(model_name: str, peer: Path, *, hybrid: bool) -> Step:
    """Return the step of facebookresearch/DiT: its model, default AdamW, and an EMA loop over named parameters.

    Args:
        model_name: A preset of finectl; the peer's model of the same size is taken.
        peer: The checkout.
        hybrid: Its own loss with a learned variance, as shipped, or the MSE of the noise alone.
    """
    import torch

    sys.path.insert(0, str(peer))
    from diffusion import create_diffusion  # type: ignore[import-not-found]
    from models import DiT_models  # type: ignore[import-not-found]

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as its train.py does
    torch.manual_seed(0)
    size = model_name.partition("/")[0].removeprefix("dit-").upper()
    side = SIZES[device().type][1]
    model = DiT_models[f"DiT-{size}/2"](input_size=side, num_classes=CLASSES, learn_sigma=hybrid).to(device())
    average = deepcopy(model).requires_grad_(False)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    diffusion = create_diffusion(timestep_respacing="", learn_sigma=hybrid)
    x, y = batch()
    alpha_bar = schedule()

    def loss_of() -> Any:
        t = torch.randint(0, TIMESTEPS, y.shape, device=device())
        if hybrid:
            return diffusion.training_losses(model, x, t, {"y": y})["loss"].mean()
        noise = torch.randn_like(x)
        return torch.nn.functional.mse_loss(model(add_noise(x, noise, alpha_bar[t]), t, y), noise)

    def step() -> float:
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            followed = dict(average.named_parameters())
            for name, parameter in model.named_parameters():
                followed[name].mul_(0.9999).add_(parameter, alpha=1 - 0.9999)
        return float(loss.item())

    return step


def diffusers_step(model_name: str) -> Step:
    """Return a step of diffusers' DiTTransformer2DModel with default AdamW and diffusers' EMAModel."""
    import torch
    from diffusers import DDPMScheduler, DiTTransformer2DModel
    from diffusers.training_utils import EMAModel

    from finectl.models.presets import preset

    side = SIZES[device().type][1]
    config = preset(model_name, image_size=side, channels=CHANNELS, num_classes=CLASSES)
    model = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=CHANNELS,
        num_layers=config.depth,
        sample_size=side,
        patch_size=config.patch_size,
        num_embeds_ada_norm=CLASSES,
        norm_eps=1e-6,
    )
    model.to(device()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    ema = EMAModel(model.parameters(), decay=0.9999)
    scheduler = DDPMScheduler(TIMESTEPS)
    x, y = batch()

    def step() -> float:
        t = torch.randint(0, TIMESTEPS, y.shape, device=device())
        noise = torch.randn_like(x)
        noisy = scheduler.add_noise(x, noise, t)
        loss = torch.nn.functional.mse_loss(model(noisy, timestep=t, class_labels=y).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.step(model.parameters())
        return float(loss.item())

    return step


def schedule() -> Any:
    """Return the linear schedule's cumulative products of 1 - beta, (1000,)."""
    import torch

    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, TIMESTEPS), 0).to(device())


def add_noise(x: Any, noise: Any, alpha_bar: Any) -> Any:
    """Return sqrt(alpha_bar) x + sqrt(1 - alpha_bar) noise, one alpha_bar a sample."""
    signal = alpha_bar.view(-1, 1, 1, 1)
    return signal.sqrt() * x + (1 - signal).sqrt() * noise


def contestants(peer: Path | None) -> dict[str, Callable[[str], Step]]:
    """Return the contestants by name, each a function from model name to step."""
    table: dict[str, Callable[[str], Step]] = {}
    if peer is not None:
        table["facebookresearch/DiT as shipped"] = lambda model: facebook_step(model, peer, hybrid=True)
        table["facebookresearch/DiT MSE only"] = lambda model: facebook_step(model, peer, hybrid=False)
    table["diffusers"] = diffusers_step
    for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        for compiled in (False, True):
            table[f"finectl {name}{' compiled' * compiled}"] = functools.partial(
                finectl_step, dtype=dtype, compiled=compiled
            )
    return table


# ------------------------------------------------------------------------------------------------- step worker


def start(contestant: str, model: str, peer: Path | None) -> Worker:
    """Return the process of a contestant."""
    command = [sys.executable, __file__, "--worker", contestant, "--models", model]
    return Worker([*command, *(["--peer-dit", str(peer)] if peer is not None else [])])


def bench_steps(model: str, peer: Path | None, rounds: int, warmup: int, words: list[str]) -> list[dict[str, Any]]:
    """Time the contestants on one model, all in memory at once, and print their table."""
    chosen = [name for name in contestants(peer) if not words or any(word in name for word in words)]
    workers = {name: start(name, model, peer) for name in chosen}
    names = list(workers)
    take_turns(workers, rounds, warmup)
    return [report(model, name, workers, names) for name in print_header(model, names, rounds)]


def print_header(model: str, names: list[str], rounds: int) -> list[str]:
    """Print what was timed and the table's columns."""
    images, side = SIZES[device().type]
    say(f"\n{model}: batch {images}, {side}x{side}x{CHANNELS}, {CLASSES} classes, {device()}, {rounds} rounds")
    say(f"{'contestant':34} {'median ms':>10} {'steps/s':>8} {'images/s':>9} {'use':>6}  ratio to each peer")
    return names


def report(model: str, name: str, workers: dict[str, Worker], names: list[str]) -> dict[str, Any]:
    """Print one contestant's row: time, throughput, model FLOP utilisation, and ratios within the rounds."""
    peers = [other for other in names if not other.startswith("finectl") and "MSE only" not in other]
    times = workers[name].times
    median_s = statistics.median(times)
    images, side = SIZES[device().type]
    ratios = {other: paired_ratio(times, workers[other].times) for other in peers if other != name}
    use = 3 * images * model_flops(model, side) / median_s / peak("bf16" if "bf16" in name else "fp32")
    shown = "  ".join(f"{ratio:.3f} ({other.split()[0]})" for other, ratio in ratios.items())
    verdict = ""
    kind = device().type
    target = TARGETS.get((kind, name, model), TARGETS.get((kind, name)))
    if target is not None and ratios:
        verdict = f"  target {target}: {'reached' if next(iter(ratios.values())) <= target else 'MISSED'}"
    wanted = UTILISATION_TARGETS.get((kind, name, model))
    if wanted is not None:
        verdict += f"  utilisation {wanted:.0%}: {'reached' if use >= wanted else 'MISSED'}"
    say(f"{name:34} {median_s * 1e3:10.0f} {1 / median_s:8.2f} {images / median_s:9.1f} {use:6.1%}  {shown}{verdict}")
    return {"model": model, "contestant": name, "median_ms": median_s * 1e3, "utilisation": use, "ratios": ratios}


def model_flops(model: str, side: int) -> int:
    """Return the floating-point operations of one image's forward pass."""
    from finectl.models.presets import preset
    from finectl.training.estimate import forward_flops

    return forward_flops(preset(model, image_size=side, channels=CHANNELS, num_classes=CLASSES))


@functools.lru_cache
def peak(arithmetic: str) -> float:
    """Return what utilisation is a share of, and say once where it is from."""
    import torch

    torch.set_num_threads(THREADS)
    flops, source = peak_flops(device(), torch.bfloat16 if arithmetic == "bf16" else torch.float32)
    say(f"(use: of {flops / 1e12:.2f} TFLOP/s in {arithmetic}: {source})")
    return flops


# --------------------------------------------------------------------------------------------------------- main


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="step.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The peer: git clone https://github.com/facebookresearch/DiT peer-dit && pip install timm diffusers\n"
        "It is under CC-BY-NC 4.0: run it, do not copy it. Without --peer-dit only diffusers is compared.",
    )
    parser.add_argument("--peer-dit", type=Path, help="a checkout of facebookresearch/DiT (needs timm)")
    parser.add_argument("--models", help="presets, separated by commas (default: dit-s,dit-b; on a GPU dit-l too)")
    parser.add_argument(
        "--contestants", default="", help="only those whose names hold one of these words, separated by commas"
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps of each (default: %(default)s)")
    parser.add_argument("--only", choices=("steps", "layers"), help="run one half of the comparison")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the comparison, or one of its workers."""
    options = parse()
    if options.worker:
        serve(lambda: contestants(options.peer_dit)[options.worker](options.models))
        return
    if options.peer_dit is not None and not (options.peer_dit / "models.py").is_file():
        raise SystemExit(f"{options.peer_dit} is no checkout of facebookresearch/DiT: it has no models.py (see --help)")
    rows: list[dict[str, Any]] = []
    if options.only != "layers":
        for model in (options.models or MODELS[device().type]).split(","):
            peer = options.peer_dit and options.peer_dit.resolve()
            words = [word for word in options.contestants.split(",") if word]
            rows += bench_steps(model, peer, options.rounds, options.warmup, words)
    if options.only != "steps":
        from layers import bench_layers

        rows += bench_layers(options.rounds)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
