"""How experts of timestep ranges are trained."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

RangeCount = Annotated[
    int | None, typer.Option("--ranges", min=1, help="Number of equal timestep ranges, an expert each. [default: 4]")
]
Borders = Annotated[
    str | None, typer.Option("--borders", metavar="LIST", help="Borders of unequal ranges, such as 0,250,500,1000.")
]
GlobalP = Annotated[
    float, typer.Option("--p", min=0.0, max=1.0, help="Probability that timesteps are drawn from all, not the range.")
]
Coin = Annotated[
    Literal["batch", "sample"],
    typer.Option("--coin", help="Decide that for a whole batch, or for each of its samples."),
]
Antithetic = Annotated[
    bool, typer.Option("--antithetic/--no-antithetic", help="Mirror half of a batch's timesteps within their range.")
]
RangeMethod = Annotated[
    Literal["deme", "diff-tuning"],
    typer.Option(
        "--method", help="Hold experts to INPUT's predictions (DeMe), or to images that it made (Diff-Tuning)."
    ),
]
ConsistencyWeight = Annotated[
    float | None,
    typer.Option(
        "--consistency",
        min=0.0,
        help="Weight of the distance from INPUT's predictions; 0: no teacher. [default: 1; diff-tuning: 0]",
    ),
]
RangeTeacher = Annotated[
    Literal["frozen", "refreshed"],
    typer.Option(
        "--teacher",
        help="INPUT throughout, as the paper has it; or refreshed from the expert's own EMA at each epoch, as the "
        "released code does by mistake: for replication.",
    ),
]
Projection = Annotated[
    Literal["none", "blocks", "foldable"],
    typer.Option("--projection", help="Channel projections after all blocks, after those that fold away, or none."),
]
OnlyRange = Annotated[
    int | None, typer.Option("--only", metavar="I", min=0, help="Train the expert of this range, counted from 0.")
]
Collect = Annotated[
    bool, typer.Option("--collect", help="Train nothing: put the experts together; an error where one is missing.")
]
RangeSteps = Annotated[
    int | None, typer.Option("--steps", min=1, help="Updates of each expert. [default: 300 bundled data, else 20,000]")
]
RangeBatchSize = Annotated[
    int | None, typer.Option("--batch-size", min=1, help="Images a step, over all processes. [default: 64]")
]
RangeLr = Annotated[
    float | None, typer.Option("--lr", min=0.0, help="AdamW's rate. [default: 5e-4 bundled data, else 5e-5]")
]
RangeWarmup = Annotated[
    int | None, typer.Option("--warmup-steps", min=0, help="Updates over which the rate rises to --lr. [default: 0]")
]
RangeEma = Annotated[
    float | None, typer.Option("--ema", min=0.0, max=1.0, help="Largest decay of the EMA. [default: 0.9999]")
]
