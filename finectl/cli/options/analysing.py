"""What analyse looks at."""

from __future__ import annotations

from typing import Annotated

import typer

OnlyAnalyses = Annotated[
    str | None,
    typer.Option(
        "--only",
        metavar="LIST",
        help="Some of norms, cosines, gradients, landscape, activations. [default: all that fit]",
    ),
]
GradientTimesteps = Annotated[
    int, typer.Option("--timesteps", min=2, help="Timesteps whose gradients are compared, spread evenly.")
]
AnalysedImages = Annotated[
    int, typer.Option("--images", min=1, help="Images for gradients, landscape and activations, at most.")
]
Plane = Annotated[
    str, typer.Option("--plane", metavar="I,J", help="The two task vectors of the landscape, counted from 0.")
]
LandscapeGrid = Annotated[int, typer.Option("--grid", min=3, help="Points along each side of the landscape.")]
MergedModel = Annotated[
    str | None, typer.Option("--merged", metavar="MODEL", help="A merged model to mark in the landscape.")
]
ForgettingPretrained = Annotated[
    str | None,
    typer.Option("--pretrained", metavar="MODEL", help="What INPUT was fine-tuned from. [default: what it records]"),
]
ForgettingBank = Annotated[
    str | None,
    typer.Option("--bank", metavar="BANK", help="Images of that model for ewc. [default: INPUT's, else its data]"),
]
SourceData = Annotated[
    str | None, typer.Option("--source-data", metavar="NAME", help="Its data, as --data. [default: what it records]")
]
OnlyForgetting = Annotated[
    str | None, typer.Option("--only", metavar="LIST", help="Some of chain, ewc, loss. [default: all that fit]")
]
Fractions = Annotated[
    str, typer.Option("--fractions", metavar="LIST", help="Shares x of the steps that are handed over, 0 to 1.")
]
ChainMetric = Annotated[
    str | None,
    typer.Option("--metric", metavar="NAME", help="A metric of evaluate, of images. [default: frechet where it fits]"),
]
ChainSamples = Annotated[int, typer.Option("--samples", min=2, help="Images to generate for each share.")]
ChainPictures = Annotated[int, typer.Option("--pictures", min=1, help="Images of each share that are shown.")]
FisherImages = Annotated[int, typer.Option("--fisher-images", min=1, help="Images whose gradients ewc takes.")]
FisherDraws = Annotated[int, typer.Option("--fisher-draws", min=1, help="Timesteps and noises of each of them.")]
LossImages = Annotated[int, typer.Option("--images", min=1, help="Held-out images of each domain, at most.")]
LossRanges = Annotated[int, typer.Option("--ranges", min=1, help="Equal timestep ranges in which the loss is given.")]
