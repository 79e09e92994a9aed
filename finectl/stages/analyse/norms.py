"""Norms of task vectors by block and by kind of layer, and their cosines.

Reference: DeMe, arXiv 2410.06664, sections 5 and 12, Figs. 6b and 7.
"""

from __future__ import annotations

from typing import Any

from finectl.models.io import total_parameters
from finectl.stages.analyse.setting import Setting
from finectl.stages.analyse.vectors import SHARES, Sums, Vectors, read_vectors


def norms(setting: Setting) -> dict[str, Any]:
    """Return norms, also relative to theta_0's, and quantiles of |tau|: of everything, by block, by kind of layer."""
    found = _read(setting)

    def described(groups: dict[str, Sums]) -> dict[str, Any]:
        return {name: sums.described() for name, sums in groups.items()}

    return {
        "shares": list(SHARES),
        "whole": found.whole.described(),
        "blocks": described(found.blocks),
        "layers": described(found.layers),
    }


def cosines(setting: Setting) -> dict[str, Any]:
    """Return the cosines of all pairs of task vectors, over all parameters and by block."""
    found = _read(setting)
    return {
        "whole": found.whole.cosines(),
        "blocks": {name: sums.cosines() for name, sums in found.blocks.items()},
    }


def _read(setting: Setting) -> Vectors:
    parts = setting.parts
    with setting.job.console.progress("task vectors", total_parameters(parts.config), unit="parameter") as progress:
        return read_vectors(parts, check=setting.check, progress=progress.advance)
