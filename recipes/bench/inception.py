"""Time finectl's Inception network beside clean-fid's on one file of weights: images a second, and the features.

python recipes/bench/inception.py [--rounds 7] [--threads 2] [--file inception-2015-12-05.pt] [--device cpu]

Without --file the weights are random. Every contestant has a process of its own, as a user's program would; they take
turns, and a ratio is the median of those within a round. "end to end" reads PNG files, resizes and computes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from timing import THREADS, paired_ratio, say, synchronise

ROOT = Path(__file__).resolve().parents[2]
FILE = "inception-2015-12-05.pt"
FROZEN, SHIPPED = "clean-fid, frozen", "clean-fid, as shipped"
FLOAT32, BFLOAT16, WHOLE = "finectl, float32", "finectl, bfloat16", "finectl, end to end"
CONTESTANTS = (FROZEN, SHIPPED, FLOAT32, BFLOAT16, WHOLE)
COUNT, FILES, SIDE = 16, 64, 256
AIM, WHOLE_AIM, LARGEST_DIFFERENCE = 1.6, 0.95, 1e-4
Run = Callable[[], Any]


def images(count: int, side: int) -> Any:
    """Return smooth random images, float32 (count, 3, side, side) in 0..255."""
    import torch

    coarse = torch.rand(count, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 255
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 255)


def clean_fid(name: str, path: Path, device: Any) -> Run:
    """Return clean-fid's pass, as shipped or as one TorchScript graph with its weights frozen into it."""
    import torch
    from cleanfid.inception_torchscript import InceptionV3W

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / FILE).symlink_to(path.resolve())
        shipped = InceptionV3W(folder, download=False).to(device).eval()

    class Pass(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = shipped.base.layers

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers((x - 128) / 128).flatten(1)

    network = torch.jit.freeze(torch.jit.script(Pass().eval())) if name == FROZEN else shipped
    batch = images(COUNT, 299)

    def run() -> Any:
        with torch.inference_mode():
            return network(batch.to(device)).cpu()

    return run


def finectl(name: str, path: Path, device_name: str, folder: Path) -> Run:
    """Return finectl's pass, or all that it does with image files."""
    from finectl.data.files import open_files
    from finectl.data.sources import DataOptions
    from finectl.metrics.extraction import FeatureExtraction
    from finectl.metrics.features import FeatureOptions
    from finectl.metrics.features.inception import describe, load
    from finectl.training.device import resolve_device

    options = FeatureOptions(inception=str(path), dtype="bfloat16" if name == BFLOAT16 else "float32")
    extractor = load(describe(options), options, resolve_device(device_name))
    if name == WHOLE:
        files = open_files(str(folder), DataOptions())
        extraction = FeatureExtraction({"inception": extractor}, {"inception": ["features"]})
        return lambda: extraction.extract(files.read, FILES)["inception/features"]
    batch = images(COUNT, 299)
    return lambda: extractor.forward(batch, ["features"])["features"]


def serve(name: str, path: Path, device_name: str, folder: Path, threads: int, pipe: Any) -> None:
    """Be one contestant: answer each request with seconds and features."""
    warnings.simplefilter("ignore")
    import torch

    import finectl as package  # noqa: F401 - makes torchvision importable where its extension is not

    torch.set_num_threads(threads)
    device = torch.device(device_name)
    ours = name.startswith("finectl")
    run = finectl(name, path, device_name, folder) if ours else clean_fid(name, path, device)
    while pipe.recv():
        synchronise(device)
        start_s = time.perf_counter()
        features = run()
        synchronise(device)
        pipe.send((time.perf_counter() - start_s, features[:COUNT].numpy()))


def main() -> int:
    """Time and print the table; the exit code says whether the aims were met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        os.environ.setdefault("FINECTL_CACHE", folder)
        path = options.file or standin(Path(folder) / FILE)
        pictures = write_pictures(Path(folder) / "pictures")
        pipes = {}
        for name in CONTESTANTS:
            pipes[name], theirs = spawn.Pipe()
            given = (name, path, options.device, pictures, options.threads, theirs)
            process = spawn.Process(target=serve, args=given, daemon=True)
            process.start()
            stack.callback(process.kill)
        features: dict[str, Any] = {}
        seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
        for number in range(options.rounds + 2):  # two to warm up
            for name, pipe in pipes.items():
                pipe.send(True)
                taken_s, features[name] = pipe.recv()
                if number > 1:
                    seconds[name].append(taken_s / (FILES if name == WHOLE else COUNT))
    return table(features, seconds)


def table(features: dict[str, Any], seconds: dict[str, list[float]]) -> int:
    """Print one row a contestant and return the exit code."""
    base = features[FROZEN]
    say(
        f"Inception, {COUNT} images of 299x299 at once, {len(seconds[FROZEN])} rounds; "
        "difference: the largest, of the features' standard deviation\n"
    )
    say("| network | images/s | of clean-fid, frozen | difference |\n|---|--:|--:|--:|")
    speedups = {}
    for name, times in seconds.items():
        speedups[name] = 1 / paired_ratio(times, seconds[FROZEN])
        difference = "" if name == WHOLE else f"{float(abs(features[name] - base).max() / base.std()):.1e}"
        say(f"| {name} | {1 / statistics.median(times):.1f} | {speedups[name]:.2f} | {difference} |")
    difference = float(abs(features[FLOAT32] - base).max() / base.std())
    whole = 1 / paired_ratio(seconds[WHOLE], seconds[FLOAT32])
    met = speedups[FLOAT32] >= AIM and difference <= LARGEST_DIFFERENCE and whole >= WHOLE_AIM
    say(
        f"\nfloat32: {speedups[FLOAT32]:.2f} times (aim {AIM}), {difference:.1e} (at most {LARGEST_DIFFERENCE:.0e}); "
        f"end to end {whole:.2f} of the pass alone (aim {WHOLE_AIM}): {'met' if met else 'not met'}"
    )
    return 0 if met else 1


def standin(path: Path) -> Path:
    """Write the network with random weights."""
    sys.path.insert(0, str(ROOT / "tests" / "metrics" / "features"))
    from inception_standin import write_standin

    write_standin(path)
    return path


def write_pictures(folder: Path) -> Path:
    """Write the PNG files that are read end to end."""
    from PIL import Image

    folder.mkdir()
    for index, levels in enumerate(images(FILES, SIDE).round().byte().permute(0, 2, 3, 1).numpy()):
        Image.fromarray(levels).save(folder / f"{index}.png")
    return folder


if __name__ == "__main__":
    sys.exit(main())
