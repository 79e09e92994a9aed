"""Time the prediction of all 854 blocks of the paper's preset with the paper-size network, in one denoising step.

The network has random weights: the time does not depend on them. In batches of 64, as in the paper (1.19 s on an H100),
and in one batch; in float32 and, by autocast, in bfloat16; on the CPU and on a GPU where there is one. What is timed is
from noise to the tensors of the LoRA; the text is encoded before. `--layers` times the blocks of the first layers only:
all of them take a quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from timing import say

from finectl.adapters.lora import RANKS_854, lora_layers
from finectl.models.gan.config import preset as gan_preset
from finectl.models.weights.config import PRESETS, count_parameters, preset
from finectl.models.weights.layout import Layout
from finectl.models.weights.normalise import Normaliser
from finectl.models.weights.unet import WeightUNet
from finectl.training.device import arithmetic
from finectl.training.weights.blocks import LabelledBlocks, Texts
from finectl.training.weights.generate import Codec, Sampling, WeightGenerator

PAPER_S, AIM_S = 1.19, 0.3
TEXT_LENGTH, TEXT_WIDTH = 77, 768
T_STAR = 800


def generator_of(size: str, device: torch.device, adapted: int | None = None) -> WeightGenerator:
    """Return a generator of 854 blocks of 256 weights, or of those of the first layers, with random weights."""
    layers = lora_layers(gan_preset("e2gan", 256), RANKS_854)[:adapted]
    layout = Layout.of(layers, 1, 256)
    config = preset(size, blocks=layout.blocks, length=256, text_width=TEXT_WIDTH)
    zeros = torch.zeros(layout.blocks, 256)
    normaliser = Normaliser(zeros, zeros, torch.ones_like(zeros), layout.mask)
    network = WeightUNet(config).eval()
    return WeightGenerator(network, Codec(layout, normaliser), layers, {}, "", T_STAR).to(device)


def seconds(generator: WeightGenerator, texts: Texts, batch: int, dtype: str, repeats: int) -> list[float]:
    """Return the seconds of each repetition, after one that is not counted where there are several."""
    device, times = texts.tokens.device, []
    for _ in range(repeats + (repeats > 1)):
        with arithmetic(device, dtype):
            start_s = time.perf_counter()
            lora = generator.lora(texts, Sampling(T_STAR, batch_size=batch))
            float(next(iter(lora.values())).sum())  # waits for the device
            times.append(time.perf_counter() - start_s)
    return times[-repeats:]


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time every device, precision and batch size."""
    rows = []
    for name in options.devices:
        device = torch.device(name)
        generator = generator_of(options.size, device, options.layers)
        draws = torch.Generator().manual_seed(0)
        tokens = torch.randn(1, TEXT_LENGTH, TEXT_WIDTH, generator=draws)
        texts = Texts(tokens, torch.ones(1, TEXT_LENGTH, dtype=torch.bool)).to(device)
        blocks = generator.codec.layout.blocks
        where = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
        )
        for dtype in options.dtypes:
            for batch in options.batches:
                times = seconds(generator, texts, batch, dtype, options.repeats)
                median, count = statistics.median(times), batch or blocks
                rows.append({"device": where, "dtype": dtype, "batch": count, "median_s": median, "times_s": times})
                say(f"{where:24} {dtype:9} batches of {count:4}: {median:8.3f} s, {blocks / median:8.1f} blocks/s")
    return rows


def main() -> None:
    """Measure and print, and write JSON where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(PRESETS), default="paper")
    parser.add_argument("--layers", type=int, help="adapted layers; all 24 by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 0], help="0: all blocks at once")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--devices", nargs="+", default=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    layout = generator_of("tiny", torch.device("cpu"), options.layers).codec.layout
    config = preset(options.size, blocks=layout.blocks, length=256, text_width=TEXT_WIDTH)
    texts = Texts(torch.zeros(1, TEXT_LENGTH, TEXT_WIDTH), torch.ones(1, TEXT_LENGTH, dtype=torch.bool))
    operations = LabelledBlocks(WeightUNet(config), texts).forward_operations() * layout.blocks
    size = f"{options.size}, {count_parameters(config):,} parameters, {operations / 1e12:.2f} TFLOP"
    say(f"{layout.blocks} blocks of 256, {layout.length:,} weights; {size}")
    rows = measure(options)
    best = max(rows, key=lambda row: layout.blocks / row["median_s"])
    if options.layers is None:
        say(f"best: {best['median_s']:.3f} s on {best['device']}; aim on an H100 {AIM_S} s, the paper's {PAPER_S} s")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
