"""How images are generated."""

from __future__ import annotations

from typing import Annotated

import typer

Samples = Annotated[int, typer.Option("--samples", min=1, help="Images to generate.")]
ControlImage = Annotated[
    list[str] | None,
    typer.Option(
        "--control-image",
        metavar="PATH",
        help="With a ControlNet: a control, or a folder of them; may be repeated. [default: those of held-out images]",
    ),
]
FromImage = Annotated[
    list[str] | None,
    typer.Option(
        "--from-image", metavar="PATH", help="The same of photographs, whose control is measured; may be repeated."
    ),
]
ControlScale = Annotated[
    float, typer.Option("--control-scale", min=0.0, help="What a ControlNet's branch counts; 0 is the model alone.")
]
Scheduler = Annotated[str, typer.Option("--scheduler", metavar="NAME", help="ddpm, ddim, pndm or dpm-solver++.")]
SamplingSteps = Annotated[int, typer.Option("--sampling-steps", min=1, help="Steps of the reverse process.")]
Guidance = Annotated[float, typer.Option("--guidance", min=0.0, help="Classifier-free guidance scale; 1 is none.")]
Handover = Annotated[
    str | None,
    typer.Option("--handover", metavar="PRETRAINED", help="Let this model, without classes, make the last steps."),
]
Fraction = Annotated[
    float | None,
    typer.Option(
        "--fraction",
        min=0.0,
        max=1.0,
        help="Share of the steps, those of least noise, that --handover makes. [default: 0.1]",
    ),
]
DomainGuidance = Annotated[
    str | None,
    typer.Option(
        "--domain-guidance", metavar="PRETRAINED", help="Guide away from this model's unconditional prediction."
    ),
]
Labels = Annotated[
    str | None,
    typer.Option("--labels", metavar="LIST", help="Classes to generate, in turn. [default: those of the data]"),
]
