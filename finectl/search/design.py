"""Space-filling beginnings: Latin hypercubes on the grid, the one of many from which a quadratic is learnt best."""

from __future__ import annotations

import numpy as np

from finectl.search.base import Candidate, Space, seed_for
from finectl.search.quadratic import terms

TRIES = 256
RIDGE = 1e-3


def latin_hypercube(space: Space, count: int, seed: int, *, starts: tuple[Candidate, ...] = ()) -> list[Candidate]:
    """Return different candidates whose values in every dimension are spread evenly over its range.

    Of 256 random Latin hypercubes whose outer points lie on the border, that with the largest determinant of the
    information matrix of a quadratic is taken: it fills the box and leaves no direction of the quadratic unknown.

    Args:
        space: The box.
        count: Candidates, the starts included; fewer where the box is smaller.
        seed: Of the random choices.
        starts: Candidates that it begins with.

    Reference: McKay et al., Technometrics 21(2), 1979; Kiefer and Wolfowitz, Can. J. Math. 12, 1960 (D-optimality).
    """
    generator = np.random.default_rng(seed_for("design", seed))
    given = [space.indices(start) for start in starts]
    wanted = min(count, space.size) - len(dict.fromkeys(given))
    if wanted <= 0:
        return [space.candidate(indices) for indices in dict.fromkeys(given)]
    best: tuple[float, list[tuple[int, ...]]] | None = None
    for _ in range(TRIES):
        strata = np.column_stack([generator.permutation(wanted) for _ in range(space.dimensions)])  # (M, N)
        steps = np.rint(strata / max(wanted - 1, 1) * (space.levels - 1)).astype(np.int64)
        rows = list(dict.fromkeys([*given, *(tuple(int(k) for k in row) for row in steps)]))
        design = terms(scaled(space, np.array(rows)))
        _, volume = np.linalg.slogdet(design.T @ design + RIDGE * np.eye(design.shape[1]))
        if best is None or (len(rows), volume) > (len(best[1]), best[0]):
            best = (float(volume), rows)
    rows = best[1] if best else []
    while len(rows) < min(count, space.size):
        row = tuple(int(k) for k in generator.integers(space.levels, size=space.dimensions))
        rows = list(dict.fromkeys([*rows, row]))
    return [space.candidate(row) for row in rows]


def scaled(space: Space, indices: np.typing.NDArray[np.int64]) -> np.typing.NDArray[np.float64]:
    """Return grid steps (M, N) as coordinates between -1 and 1."""
    return 2.0 * indices / max(space.levels - 1, 1) - 1.0
