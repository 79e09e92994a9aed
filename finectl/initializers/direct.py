"""Direct pre-training: the target's own size is trained from DiT's own start with what an ancestor cost.

The upper row of the papers' tables, which pays for a pre-training for every size where the other methods share one
ancestor: n sizes cost n times as much. Data is all that it takes; INPUT gives the shapes and the budget. `--tune-steps`
is that budget: the updates that INPUT and everything it was made from cost, or without INPUT those of `finectl train`.
It is trained as `finectl train` trains by default: constant rate with its warm-up, all training images, and the
averaged weights (EMA) are the result. So it equals `init --method he`, then `train` for as many updates.

Reference: FINE, arXiv 2409.19289, the row of direct pre-training ("Direct PT") in its tables of initialisation.
"""

from __future__ import annotations

from finectl.data.dataset import load
from finectl.errors import UsageError
from finectl.initializers.base import Initialized, Request
from finectl.initializers.transfer import fresh_state
from finectl.models.dit import DiT
from finectl.training.loop import fit
from finectl.training.settings import PAPER, SMALL, TrainSettings, data_options


def initialize(request: Request) -> Initialized:
    """Train the target from DiT's own start.

    Raises:
        UsageError: there are no updates to train for.
        ComputationError: the loss is not finite.
        Interrupted: a signal came; the state is saved.
    """
    config = request.job.config
    if not config.tune_steps:
        raise UsageError(
            "--method direct is training, and --tune-steps is 0",
            expected="at least 1 update",
            fix="leave --tune-steps out; or --method he, the start alone",
        )
    usual = SMALL if request.data.bundled else PAPER
    settings = TrainSettings(
        steps=config.tune_steps,
        batch_size=config.batch_size,
        lr=usual["lr"],
        lr_schedule="constant",
        warmup_steps=int(usual["warmup_steps"]),
        weight_decay=0.0,
        ema=usual["ema"],
        eval_every=0,
        seed=config.seed,
    )
    model = DiT(request.target)
    model.load_state_dict(fresh_state(request))
    data = load(config.data, "train", config.image_size, data_options(config, request.job))
    trained = fit(request.job, model, data, settings)
    return Initialized({name: value.cpu() for name, value in trained.ema.items()}, cost=trained.cost)
