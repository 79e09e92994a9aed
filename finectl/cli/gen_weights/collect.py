"""`finectl gen-weights collect`: its options."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from finectl.cli import options as opt
from finectl.cli.command import Call, run_one, stage_command
from finectl.cli.gen_weights import groups
from finectl.cli.gen_weights import options as own
from finectl.errors import UsageError

if TYPE_CHECKING:
    from finectl.runner import Result


SIGMA = "sigma"
OF_LORA = (
    *("pairs", "weights", "ranks", "lora_seed", "orders", "subset", "subset_clip", "eval_every"),
    *("epochs", "lr_discriminator", "l1", "gan_from"),
)
OF_SIGMA = ("tasks", "task_classes", "depths", "data")


def run(call: Call) -> Result | None:
    """Run the stage of the target.

    Raises:
        UsageError: an option is given that only the other target has.
    """
    sigma = call.values["target"] == SIGMA
    odd = [name for name in (OF_LORA if sigma else OF_SIGMA) if name in call.typed]
    if odd:
        raise UsageError(
            f"--{odd[0].replace('_', '-')} does not go with --target {call.values['target']}",
            fix="leave it out" if sigma else f"leave it out, or --target {SIGMA}",
        )
    if not sigma:
        return run_one(call)
    from finectl.stages.gen_weights.collect_sigma import STAGE

    config = {name: call.values[name] for name in STAGE.config.__dataclass_fields__ if name in call.values}
    return run_one(replace(call, stage=STAGE, config=config))


@stage_command("finectl.stages.gen_weights.collect", groups.gan, groups.gan_run, run=run)
def collect(
    input: opt.Input = None,
    target: own.CollectTarget = "lora",
    tasks: own.SigmaTasks = 24,
    task_classes: own.TaskClasses = 3,
    depths: own.SigmaDepths = "2,4,6",
    data: own.SigmaData = None,
    pairs: own.PairsInput = None,
    weights: opt.Weights = "ema",
    ranks: own.Ranks = None,
    lora_seed: own.LoraSeed = 0,
    checkpoints: own.Checkpoints = 3,
    orders: own.Orders = 1,
    subset: own.Subset = 0,
    subset_clip: own.SubsetClip = None,
    roles: own.Roles = "train,val",
    only: own.OnlyConcept = None,
    shard: own.Shard = None,
    eval_every: own.AdaptEvalEvery = None,
    workers: own.ConceptWorkers = 0,
) -> None:
    """Train the low-rank weights of every concept from one start; concepts that are finished are never redone.

    With --target sigma, INPUT is a learngene: sigma and biases of models that `init --method fine` makes of it are
    tuned on tasks, each of some classes of the data set, at several depths. --steps, --batch-size and --lr are those of
    that tuning; --only names a task, or one at a depth such as 3-7-l4.
    """
