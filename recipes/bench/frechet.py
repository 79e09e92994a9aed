"""Time the Frechet distance beside those of clean-fid (scipy's sqrtm) and torch-fidelity (eigenvalues of the product).

Usage: python recipes/bench/frechet.py [ROUNDS]. Each round times all three, one after another, on the same statistics:
what each keeps of the features is there before. The table has medians, the median of the rounds' ratios, and the
relative difference of the values.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
import torch
from timing import THREADS

from finectl.metrics.frechet import Gaussian, frechet_distance
from finectl.metrics.gaussian import EPSILON

DIM = 2048
# Name -> images of the one set and of the other.
CASES = {"5000 and 5000": (5000, 5000), "1000 and 1000": (1000, 1000), "1000 and 5000": (1000, 5000)}


def by_sqrtm(product: Any) -> float:
    """Return the trace of the root as clean-fid and pytorch-fid take it."""
    return float(np.trace(scipy.linalg.sqrtm(product)).real)


def by_eigenvalues(product: Any) -> float:
    """Return it as torch-fidelity does."""
    return float(np.sqrt(np.linalg.eigvals(product).astype(complex)).real.sum())


def features(rows: int, seed: int) -> torch.Tensor:
    """Return features (rows, DIM) float64 whose variances fall a thousandfold."""
    random = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0, -1.5, DIM, dtype=torch.float64)
    return torch.randn(rows, DIM, generator=random, dtype=torch.float64) * spread + 0.05 * seed * spread


def timed(function: Callable[[], float]) -> tuple[float, float]:
    """Return seconds and value."""
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


def contest(first: torch.Tensor, second: torch.Tensor, rounds: int) -> list[dict[str, float]]:
    """Return for each round the seconds and values of the three; all start from what they keep of the features."""
    ours, reference = Gaussian.of(first), Gaussian.of(second)
    mean1, mean2, cov1, cov2 = (
        part.numpy() for part in (ours.mean, reference.mean, ours.covariance, reference.covariance)
    )
    separate = float(np.square(mean1 - mean2).sum() + cov1.trace() + cov2.trace())
    rows = []
    for _ in range(rounds):
        # Fresh ones: a Gaussian keeps its decomposition.
        fresh = [_fresh(ours), _fresh(reference)]
        row: dict[str, float] = {}
        row["ours"], row["value"] = timed(lambda pair=fresh: frechet_distance(*pair))  # type: ignore[misc]
        row["sqrtm"], root = timed(lambda: by_sqrtm(cov1 @ cov2))
        row["sqrtm value"] = separate - 2 * root
        row["eigvals"], root = timed(lambda: by_eigenvalues(cov1 @ cov2))
        row["eigvals value"] = separate - 2 * root
        rows.append(row)
    return rows


def _fresh(gaussian: Gaussian) -> Gaussian:
    if gaussian.factor is not None:
        return Gaussian(gaussian.count, gaussian.mean, gaussian.factor, factored=True)
    return Gaussian(gaussian.count, gaussian.mean, gaussian.covariance)


def main() -> None:
    """Print the table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    torch.set_num_threads(THREADS)
    sys.stdout.write("| images | finectl, s | sqrtm, s | ratio | difference | eigvals, s | ratio | difference |\n")
    sys.stdout.write("|---|---|---|---|---|---|---|---|\n")
    for name, (count, others) in CASES.items():
        rows = contest(features(count, 1), features(others, 2), rounds)
        cells = [f"{statistics.median(row['ours'] for row in rows):.3f}"]
        for other in ("sqrtm", "eigvals"):
            value = rows[0]["value"]
            cells.append(f"{statistics.median(row[other] for row in rows):.2f}")
            cells.append(f"{statistics.median(row[other] / row['ours'] for row in rows):.1f}")
            cells.append(f"{abs(rows[0][f'{other} value'] - value) / max(value, EPSILON):.1e}")
        sys.stdout.write(f"| {name} | {' | '.join(cells)} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
