"""Block sizes and grouping rules of generated weights, measured on one concept: see gen_weights_ablation.sh."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from finectl.adapters.weight_dataset import open_weights
from finectl.artifacts.store import open_artifact
from finectl.console import format_table
from finectl.metrics.pairs.measure import PairMeter, metrics_for
from finectl.metrics.pairs.names import DECIMALS, LABELS
from finectl.training.gan.adapted import edited, merged_generator, wanted
from finectl.training.gan.adapting import Adapter, Task
from finectl.training.gan.settings import GanSettings
from finectl.training.weights.generate import Sampling, load_generator

HERE = Path(__file__).resolve().parent
CONCEPTS = HERE.parent / "gen-weights-ci.jsonl"
# (block size, grouping rule): table 2 of the paper, then table 3.
CASES = ((128, 1), (256, 1), (512, 1), (256, 2), (256, 3))
PAPER_MODE = ("--basis", "none", "--linear-rank", "0", "--linear-start", "zero", "--pos-embed", "learned")
TIMED = 3


def finectl(*arguments: object) -> Path:
    """Run a step and return its artifact."""
    call = [sys.executable, "-m", "finectl", "gen-weights", *map(str, arguments), "--quiet"]
    sys.stderr.write(f"$ finectl {' '.join(call[3:-1])}\n")
    return Path(subprocess.run(call, check=True, capture_output=True, text=True).stdout.strip())


class Measurer:
    """Measures weights of one concept on its test images.

    Args:
        base: The GAN.
        pairs: The images.
        collection: The trained weights.
        name: The concept.
    """

    def __init__(self, base: Path, pairs: Path, collection: Path, name: str) -> None:
        self.dataset = open_weights(open_artifact(collection))
        self.concept = next((one for one in self.dataset.concepts if one.name == name), self.dataset.concepts[0])
        if self.concept.name != name:
            raise SystemExit(f"{name} is none of: {', '.join(one.name for one in self.dataset.concepts)}")
        settings = GanSettings(steps=1, batch_size=16, lr=0.0, lr_discriminator=0.0)
        rows = tuple(self.dataset.config["rows"])
        self.adapter = Adapter(Task(base, pairs, self.dataset.layers, settings, rows))
        self.rows = self.adapter.pairs.rows("test")
        self.meter = PairMeter(metrics_for(len(self.rows), self.adapter.pairs.image_size, None))

    def row(self, title: str, lora: dict[str, torch.Tensor], *more: str) -> list[str]:
        """Return a row of the table: what a generator with these weights makes of the test images."""
        images = edited(self.adapter, self.concept, merged_generator(self.adapter, self.concept, lora), self.rows)
        found = self.meter.measure(images, wanted(self.adapter, self.concept, self.rows))
        return [title, *more, *(f"{record['value']:.{DECIMALS[name]}f}" for name, record in found.items())]


def generated(collection: Path, measurer: Measurer, size: int, rule: int, steps: int) -> list[str]:
    """Train a generator of weights and return its row."""
    options = ("--block-size", size, "--rule", rule, "--steps", steps, "--size", "tiny", *PAPER_MODE)
    artifact = open_artifact(finectl("train", collection, *options))
    generator = load_generator(artifact)
    texts, sampling = generator.encode([measurer.concept.prompt]), Sampling(generator.t_star)
    times = []
    for _ in range(TIMED):
        start_s = time.perf_counter()
        lora = generator.lora(texts, sampling)
        times.append(time.perf_counter() - start_s)
    layout = generator.codec.layout
    r2 = artifact.manifest.metrics["r2"]["train"]
    return measurer.row(
        f"b = {size}, rule {rule}", lora, str(layout.blocks), str(layout.padding), f"{min(times):.2f}", f"{r2:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("concept", nargs="?", default="sepia-pencil")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    images, base_steps, tuned, steps = (40, 4, 5, 2) if given.quick else (300, 600, 150, given.steps)
    pairs = finectl("pairs", finectl("prompts", "--set", CONCEPTS), "--images", images)
    base = finectl("base", pairs, "--steps", base_steps)
    collection = finectl(
        "collect", base, "--pairs", pairs, "--steps", tuned, "--eval-every", 0, "--checkpoints", 1 if given.quick else 3
    )
    measurer = Measurer(base, pairs, collection, given.concept)
    trained = {name: value.mean(0) for name, value in measurer.dataset.checkpoints(measurer.concept).items()}
    nothing = ("", "", "", "")
    rows = [measurer.row("the base itself", measurer.dataset.initial, *nothing)]
    rows.append(measurer.row("trained weights", trained, *nothing))
    rows += [generated(collection, measurer, size, rule, steps) for size, rule in CASES]
    columns = ["weights", "blocks", "padding", "seconds", "R2", *measurer.meter.names]
    sys.stdout.write(f"{measurer.concept.name}: {len(measurer.rows)} test images, {steps} updates\n")
    sys.stdout.write(format_table(columns, rows) + "\n")
    sys.stdout.write("".join(f"- {name}: {LABELS[name]}\n" for name in measurer.meter.names))


if __name__ == "__main__":
    main()
