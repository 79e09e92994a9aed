"""Time a training step of finectl's DiT beside its peers, and factorised layers beside dense ones.

Every contestant of a model runs in a process of its own, so that settings which hold for a whole process (memory
allocation, threads) are each one's own, and the peers run as they ship. All take turns within one run, one step each,
in an order that changes from round to round; figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

BATCH, SIDE, CHANNELS, CLASSES, THREADS = 16, 16, 4, 1000, 2
TIMESTEPS = 1000
STEP_TARGETS = {"finectl fp32": 0.95, "finectl bf16": 0.45}
LAYER_TARGETS = {
    ("all", 1.0, 4096): 1.25,
    ("all", 1.0, 16384): 1.08,
    ("all", 0.5, 4096): 0.75,
    ("all", 0.5, 16384): 0.75,
    ("sigma", 1.0, 4096): 0.95,
    ("sigma", 1.0, 16384): 0.95,
    ("sigma", 0.5, 4096): 0.55,
    ("sigma", 0.5, 16384): 0.55,
}
DIT_B_LAYERS = {"qkv": (2304, 768), "o": (768, 768), "in": (3072, 768), "out": (768, 3072)}

Step = Callable[[], float]


def say(line: str = "") -> None:
    """Write one line to stdout at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


# --------------------------------------------------------------------------------------------------- contestants


def batch() -> tuple[Any, Any]:
    """Return the fixed batch of latents and labels that every contestant trains on."""
    import torch

    torch.manual_seed(0)
    return torch.randn(BATCH, CHANNELS, SIDE, SIDE), torch.randint(0, CLASSES, (BATCH,))


def finectl_step(model_name: str, *, autocast: bool) -> Step:
    """Return the step of `finectl train`, on a data set of one batch."""
    from types import SimpleNamespace

    from finectl.training.memory import tune_allocator

    tune_allocator()
    import torch

    from finectl.artifacts.job import Execution
    from finectl.data.dataset import ImageSet
    from finectl.data.sources import DataInfo
    from finectl.diffusion.schedule import NoiseSchedule
    from finectl.models.dit import DiT, initialize_
    from finectl.models.presets import preset
    from finectl.training.loop import train_step
    from finectl.training.settings import TrainSettings
    from finectl.training.step import Ema, make_optimizer

    x, y = batch()
    info = DataInfo("latents", "", BATCH, BATCH, 0, SIDE, CHANNELS, CLASSES, (), False)
    data = ImageSet(info, "train", x, y)
    config = preset(model_name, image_size=SIDE, channels=CHANNELS, num_classes=CLASSES)
    model = initialize_(DiT(config), torch.Generator().manual_seed(0)).train()
    settings = TrainSettings(
        steps=10**6,
        batch_size=BATCH,
        lr=1e-4,
        lr_schedule="constant",
        warmup_steps=0,
        weight_decay=0.0,
        ema=0.9999,
        eval_every=0,
        seed=0,
    )
    optimizer = make_optimizer(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    ema = Ema(model.named_parameters(), settings.ema)
    schedule = NoiseSchedule.linear(torch.device("cpu"))
    # Of the job, a step reads the arithmetic only.
    job: Any = SimpleNamespace(execution=Execution("cpu", "bfloat16" if autocast else "float32"))
    steps = itertools.count()

    def step() -> float:
        return train_step(job, model, data, settings, schedule, optimizer, ema, next(steps))

    return step


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

    torch.manual_seed(0)
    size = model_name.partition("/")[0].removeprefix("dit-").upper()
    model = DiT_models[f"DiT-{size}/2"](input_size=SIDE, num_classes=CLASSES, learn_sigma=hybrid)
    average = deepcopy(model).requires_grad_(False)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    diffusion = create_diffusion(timestep_respacing="", learn_sigma=hybrid)
    x, y = batch()
    alpha_bar = schedule()

    def loss_of() -> Any:
        t = torch.randint(0, TIMESTEPS, (BATCH,))
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

    config = preset(model_name, image_size=SIDE, channels=CHANNELS, num_classes=CLASSES)
    model = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=CHANNELS,
        num_layers=config.depth,
        sample_size=SIDE,
        patch_size=config.patch_size,
        num_embeds_ada_norm=CLASSES,
        norm_eps=1e-6,
    )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    ema = EMAModel(model.parameters(), decay=0.9999)
    scheduler = DDPMScheduler(TIMESTEPS)
    x, y = batch()

    def step() -> float:
        t = torch.randint(0, TIMESTEPS, (BATCH,))
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

    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, TIMESTEPS), 0)


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
    table["finectl fp32"] = lambda model: finectl_step(model, autocast=False)
    table["finectl bf16"] = lambda model: finectl_step(model, autocast=True)
    return table


# ------------------------------------------------------------------------------------------------- step worker


def serve(contestant: str, model: str, peer: Path | None) -> None:
    """Build one contestant, then time one step for every line on stdin and answer with a line of JSON."""
    import resource

    # Importing finectl repairs torchvision beside a CPU-only torch; timm and diffusers import torchvision.
    importlib.import_module("finectl")
    # Whatever a peer prints goes to stderr: stdout carries the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    make = contestants(peer)[contestant]
    step: Step | None = None
    for _ in sys.stdin:
        if step is None:
            import torch

            torch.set_num_threads(THREADS)
            step = make(model)
        start = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        answers.write(json.dumps({"seconds": seconds, "loss": loss, "peak_mib": peak}) + "\n")
        answers.flush()


class Worker:
    """A process that holds one contestant and runs a step when asked."""

    def __init__(self, contestant: str, model: str, peer: Path | None) -> None:
        command = [sys.executable, __file__, "--worker", contestant, "--models", model]
        command += ["--peer-dit", str(peer)] if peer is not None else []
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.times: list[float] = []
        self.last: dict[str, float] = {}

    def step(self) -> float:
        """Run one step and return its seconds."""
        if self.process.stdin is None or self.process.stdout is None:
            raise SystemExit("a worker has no pipes")
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with exit code {self.process.wait()}")
        self.last = json.loads(line)
        return self.last["seconds"]

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def bench_steps(model: str, peer: Path | None, rounds: int, warmup: int) -> list[dict[str, Any]]:
    """Time all contestants on one model and print their table."""
    workers = {name: Worker(name, model, peer) for name in contestants(peer)}
    names = list(workers)
    try:
        for worker in workers.values():
            for _ in range(warmup):
                worker.step()
        for index in range(rounds):
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                workers[name].times.append(workers[name].step())
    finally:
        for worker in workers.values():
            worker.close()
    peers = [name for name in names if not name.startswith("finectl") and "MSE only" not in name]
    say(f"\n{model}: batch {BATCH}, {SIDE}x{SIDE}x{CHANNELS}, {CLASSES} classes, {THREADS} threads, {rounds} rounds")
    say(f"{'contestant':34} {'median ms':>10} {'min ms':>8} {'peak MiB':>9}  ratio to each peer (median of rounds)")
    rows = []
    for name, worker in workers.items():
        ratios = {other: paired_ratio(worker.times, workers[other].times) for other in peers if other != name}
        worst = max(ratios.values(), default=math.nan)
        target = STEP_TARGETS.get(name)
        verdict = "" if target is None else f"  target {target}: {'reached' if worst <= target else 'MISSED'}"
        shown = "  ".join(f"{ratio:.3f} ({other.split()[0]})" for other, ratio in ratios.items())
        median, least = statistics.median(worker.times) * 1e3, min(worker.times) * 1e3
        say(f"{name:34} {median:10.0f} {least:8.0f} {worker.last['peak_mib']:9.0f}  {shown}{verdict}")
        rows.append({"model": model, "contestant": name, "median_ms": median, "min_ms": least, "ratios": ratios})
    return rows


def paired_ratio(times: list[float], others: list[float]) -> float:
    """Return the median over the rounds of the ratio within a round: slow spells of the machine hit both."""
    return statistics.median(mine / other for mine, other in zip(times, others, strict=True))


# ------------------------------------------------------------------------------------------- factorised layers


def layer_pass(layer: Any, tokens: int, inputs: int) -> Step:
    """Return a timed forward and backward of one layer, with a gradient for its input."""
    import torch

    x = torch.randn(tokens, inputs, requires_grad=True)

    def run() -> float:
        start = time.perf_counter()
        y = layer(x)
        # The gradient's values do not matter for time; the output's own buffer saves memory.
        y.backward(y.detach())
        seconds = time.perf_counter() - start
        layer.zero_grad(set_to_none=True)
        x.grad = None
        return seconds

    return run


def factorised_layer(outputs: int, inputs: int, rank: int, trained: str) -> Any:
    """Return a factorised layer with random factors, all trained or sigma only."""
    import torch

    from finectl.models.factorized import FactorizedLinear, SharedFactors, random_sigma, unit_columns

    generator = torch.Generator().manual_seed(0)
    shared = SharedFactors(outputs, inputs, rank)
    layer = FactorizedLinear(shared)
    with torch.no_grad():
        shared.U.copy_(unit_columns(outputs, rank, generator))
        shared.V.copy_(unit_columns(inputs, rank, generator))
        layer.sigma.copy_(random_sigma(rank, outputs, inputs, rank, generator))
    shared.requires_grad_(trained == "all")
    return layer


def bench_layers(rounds: int) -> list[dict[str, Any]]:
    """Time the factorised layers of a DiT-B beside its dense ones and print the table."""
    import torch

    from finectl.training.memory import tune_allocator

    tune_allocator()
    torch.set_num_threads(THREADS)
    rows = []
    say(f"\ndit-b layers qkv, o, in, out: forward + backward, fp32, {THREADS} threads, {rounds} rounds")
    say(f"{'trained':8} {'rank':>6} {'tokens':>7} {'dense ms':>9} {'ms':>7} {'ratio':>6}   by layer")
    for tokens in (4096, 16384):
        for trained in ("all", "sigma"):
            for fraction in (1.0, 0.5):
                rows.append(bench_layer_group(tokens, trained, fraction, rounds))
    return rows


def bench_layer_group(tokens: int, trained: str, fraction: float, rounds: int) -> dict[str, Any]:
    """Time the four layers at one rank, one number of tokens and one choice of trained factors; print one row."""
    import torch

    rank = int(768 * fraction)
    dense_times: dict[str, list[float]] = {kind: [] for kind in DIT_B_LAYERS}
    our_times: dict[str, list[float]] = {kind: [] for kind in DIT_B_LAYERS}
    ways = {}
    for kind, (outputs, inputs) in DIT_B_LAYERS.items():
        layer = factorised_layer(outputs, inputs, rank, trained)
        dense = layer_pass(torch.nn.Linear(inputs, outputs), tokens, inputs)
        ours = layer_pass(layer, tokens, inputs)
        ways[kind] = layer.choose(torch.empty(tokens, inputs, requires_grad=True))
        dense()
        ours()
        for index in range(rounds):
            pair = [(dense, dense_times), (ours, our_times)]
            for run, store in pair if index % 2 else pair[::-1]:
                store[kind].append(run())
    dense_sums = [sum(times) for times in zip(*dense_times.values(), strict=True)]
    our_sums = [sum(times) for times in zip(*our_times.values(), strict=True)]
    ratio, target = paired_ratio(our_sums, dense_sums), LAYER_TARGETS[trained, fraction, tokens]
    by_kind = {kind: paired_ratio(our_times[kind], dense_times[kind]) for kind in ways}
    parts = " ".join(f"{kind} {value:.2f}({ways[kind][:3]})" for kind, value in by_kind.items())
    dense_ms, our_ms = statistics.median(dense_sums) * 1e3, statistics.median(our_sums) * 1e3
    verdict = "reached" if ratio <= target else "MISSED"
    say(
        f"{trained:8} {rank:>6} {tokens:>7} {dense_ms:9.0f} {our_ms:7.0f} {ratio:6.3f}   {parts}  "
        f"target {target}: {verdict}"
    )
    return {"trained": trained, "rank": rank, "tokens": tokens, "dense_ms": dense_ms, "ms": our_ms, "ratio": ratio}


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
    parser.add_argument("--models", default="dit-s,dit-b", help="presets, separated by commas (default: %(default)s)")
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
        serve(options.worker, options.models, options.peer_dit)
        return
    if options.peer_dit is not None and not (options.peer_dit / "models.py").is_file():
        raise SystemExit(f"{options.peer_dit} is no checkout of facebookresearch/DiT: it has no models.py (see --help)")
    rows: list[dict[str, Any]] = []
    if options.only != "layers":
        for model in options.models.split(","):
            rows += bench_steps(model, options.peer_dit and options.peer_dit.resolve(), options.rounds, options.warmup)
    if options.only != "steps":
        rows += bench_layers(options.rounds)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
