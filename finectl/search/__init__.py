"""The strategies that `merge --search` names: one file each, listed without importing them."""

from __future__ import annotations

from dataclasses import dataclass

from finectl.registry import Entry, Registry


@dataclass(frozen=True)
class Strategy(Entry):
    """A line of the table of strategies.

    Args:
        target: Where its class is, constructed from a `Space` and `Options`.
        help: What it does, in one line.
        reference: Where it is from.
        extra: The extra of finectl that installs what it needs; empty where nothing is missing.
    """

    reference: str = ""
    extra: str = ""


SEARCHES: Registry[Strategy] = Registry(
    "search",
    {
        "grid": Strategy("finectl.search.grid:Grid", "every candidate of the box"),
        "coarse-to-fine": Strategy(
            "finectl.search.coarse_to_fine:CoarseToFine",
            "a coarse grid, then the neighbours of the best on finer ones",
            reference="arXiv 2410.06664, section 8",
        ),
        "surrogate": Strategy(
            "finectl.search.surrogate:Surrogate",
            "a quadratic learnt from few candidates ranks the whole box, the best are measured",
            reference="Box and Wilson, J. R. Stat. Soc. B 13(1), 1951",
        ),
        "bayes": Strategy(
            "finectl.search.bayes:Bayes",
            "Bayesian optimisation with a Gaussian process (optuna)",
            reference="arXiv 1807.02811",
            extra="search",
        ),
        "cma-es": Strategy(
            "finectl.search.cma_es:CmaEs",
            "evolution of a normal distribution over the box (optuna)",
            reference="arXiv 1604.00772",
            extra="search",
        ),
    },
)
