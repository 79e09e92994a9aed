"""How models are merged."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

MergeInputs = Annotated[
    list[str] | None,
    typer.Argument(metavar="[INPUT]...", help="Experts, or models with --base. [default: the newest experts]"),
]
Base = Annotated[str | None, typer.Option("--base", metavar="MODEL", help="What the models were fine-tuned from.")]
MergeMethod = Annotated[
    Literal["task-arithmetic", "linear", "ties", "dare"],
    typer.Option("--method", help="How weights become one: theta_0 + sum w tau, its kin, or a mean (linear)."),
]
MergeWeights = Annotated[
    str | None, typer.Option("--weights", metavar="LIST", help="A weight for each model. [default: searched]")
]
BlockWeights = Annotated[
    str | None,
    typer.Option("--block-weights", metavar="BLOCK=LIST;...", help="Weights of single blocks, beside --weights."),
]
Density = Annotated[
    float, typer.Option("--density", min=0.0, max=1.0, help="Share of a task vector's entries that ties and dare keep.")
]
OutputDtype = Annotated[
    Literal["same", "float32", "bfloat16", "float16"],
    typer.Option("--output-dtype", help="Type of the merged weights in the file."),
]
Fold = Annotated[
    bool, typer.Option("--fold/--no-fold", help="Fold channel projections into convolutions, where that is exact.")
]
MergeRanges = Annotated[
    int | None, typer.Option("--ranges", min=1, help="How many ranges the experts must have. [default: as they have]")
]
GridStep = Annotated[float, typer.Option("--grid-step", min=0.0, help="Distance of the values that a weight takes.")]
GridMin = Annotated[float, typer.Option("--grid-min", help="Least value of a weight.")]
GridMax = Annotated[float, typer.Option("--grid-max", help="Largest value of a weight.")]
MaxCandidates = Annotated[
    int, typer.Option("--max-candidates", min=1, help="Largest grid that is measured whole without --search grid.")
]
SearchStrategy = Annotated[
    Literal["grid", "coarse-to-fine", "surrogate", "bayes", "cma-es"] | None,
    typer.Option("--search", help="How weights are searched. [default: grid, above --max-candidates coarse-to-fine]"),
]
ObjectiveName = Annotated[
    str | None,
    typer.Option("--objective", metavar="METRIC", help="What is searched for. [default: on digits frechet, else loss]"),
]
SearchSamples = Annotated[
    int, typer.Option("--search-samples", min=2, help="Images, or terms of the loss, a candidate.")
]
Rescored = Annotated[
    int, typer.Option("--rescored", min=1, help="The best candidates that are measured again, on fresh noise.")
]
JournalFile = Annotated[
    str | None,
    typer.Option("--journal", metavar="FILE", help="Keep candidates there, for machines that share one search."),
]
