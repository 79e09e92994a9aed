"""Makes reference_values.json: what other people's programs measure on features that a seed gives back.

Run by hand, with torch-fidelity, clean-fid and scipy installed: `python tests/metrics/make_reference_values.py`.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import finectl  # noqa: F401 - makes torchvision importable where its extension is not

PATH = Path(__file__).with_name("reference_values.json")
# Name -> features, images, images of the reference, seed.
CASES = {
    "d2048-full": (2048, 2500, 2500, 1),
    "d2048-singular": (2048, 500, 500, 2),
    "d64": (64, 1000, 800, 3),
}
SPLITS = 10
FACTORS = 8


def feature_sets(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features float64 (N, d) and those of the reference (M, d): spreads that fall, a few shared factors."""
    dim, count, others, seed = CASES[case]
    random = np.random.Generator(np.random.PCG64(seed))
    spread = np.logspace(0, -1.5, dim)
    mixing = random.standard_normal((FACTORS, dim)) * 0.05

    def draw(rows: int, shift: float, scale: float) -> NDArray[np.float64]:
        factors, noise = random.standard_normal((rows, FACTORS)), random.standard_normal((rows, dim))
        return scale * (noise * spread + factors @ mixing) + shift * spread

    x, y = draw(count, 0.1, 1.1), draw(others, 0.0, 1.0)
    return torch.from_numpy(x), torch.from_numpy(y)


def distance_of_rows(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Return the Frechet distance by the singular values of the product of the centred rows, which is always exact."""
    import scipy.linalg

    first, second = x - x.mean(axis=0), y - y.mean(axis=0)
    first, second = first / math.sqrt(len(x) - 1), second / math.sqrt(len(y) - 1)
    overlap = scipy.linalg.svdvals(first @ second.T).sum()
    distance = np.square(x.mean(axis=0) - y.mean(axis=0)).sum() + np.square(first).sum() + np.square(second).sum()
    return float(distance - 2 * overlap)


def measure(case: str) -> dict[str, Any]:
    """Return all values of one case."""
    from cleanfid import fid as cleanfid
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = feature_sets(case)
    first, second = fid_features_to_statistics(x), fid_features_to_statistics(y)
    least = min(len(x), len(y))
    score = isc_features_to_metric(x, splits=SPLITS, shuffle=False)
    neighbours = prc_features_to_metric(x, y, prc_neighborhood=3, verbose=False)
    return {
        "checksum": float(x.sum() + y.sum()),
        "fid": {
            "torch-fidelity": fid_statistics_to_metric(first, second, verbose=False)["frechet_inception_distance"],
            "clean-fid": float(cleanfid.frechet_distance(first["mu"], first["sigma"], second["mu"], second["sigma"])),
            "rows": distance_of_rows(x.numpy(), y.numpy()),
        },
        "is": {"mean": score["inception_score_mean"], "std": score["inception_score_std"]},
        "kid": {
            "torch-fidelity": kid_features_to_metric(
                x[:least], y[:least], kid_subsets=1, kid_subset_size=least, verbose=False
            )["kernel_inception_distance_mean"],
            "clean-fid": cleanfid.kernel_distance(
                x[:least].numpy(), y[:least].numpy(), num_subsets=1, max_subset_size=least
            ),
        },
        "precision": neighbours["precision"],
        "recall": neighbours["recall"],
    }


def main() -> None:
    """Measure all cases and write the file."""
    packages = ("torch-fidelity", "clean-fid", "scipy", "numpy", "torch")
    values = {case: measure(case) for case in CASES}
    made_with = {name: importlib.metadata.version(name) for name in packages}
    PATH.write_text(json.dumps({"made_with": made_with, "cases": values}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
