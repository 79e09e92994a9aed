"""Finetune-ranges: one expert a range of timesteps, each a copy of the model that is fine-tuned for itself.

An expert sees mostly the timesteps of its range and is held to the predictions of the model it started from. Channel
projections, the identity at the start, are trained with all other weights. With `--method diff-tuning` it sees images
of the model too, at all timesteps, instead of being held to its predictions. Each expert is an artifact of its own
(`expert.py`); when all are there, a second stage puts them together (`collection.py`).

Reference: DeMe, arXiv 2410.06664, sections 3.2 and 8.
"""

from __future__ import annotations

from finectl.artifacts.job import Reads, Stage
from finectl.data.bank import KIND as BANK
from finectl.stages.finetune_ranges.config import LOCATIONS, NAME, UNCHANGED_AT, Config
from finectl.stages.finetune_ranges.expert import measure, plan_expert, run_expert


def reads(config: Config) -> Reads:
    """Return what is read: the model, and the bank where one is named."""
    bank = (Reads(BANK, (BANK,), named=(config.bank,)),) if config.bank is not None else ()
    return Reads("base", ("model",), also=bank)


STAGE = Stage(
    name=NAME,
    version=1,
    makes="expert",
    config=Config,
    reads=reads,
    plan=plan_expert,
    run=run_expert,
    shares_work=True,
    locations=LOCATIONS,
    unchanged_at=UNCHANGED_AT,
    measure=measure,
)
