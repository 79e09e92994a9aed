"""Time factorised linear layers beside dense ones of the same shapes, forward and backward."""

from __future__ import annotations

import statistics
import time
from typing import Any

from timing import THREADS, Step, paired_ratio, say

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
