"""What a stage reads: artifacts, images, captions."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Input = Annotated[
    str | None,
    typer.Argument(metavar="[INPUT]", help="A path, kind/name, 'latest', or '-' for stdin. [default: the newest]"),
]
Inputs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[INPUT]...", help="Paths, kind/name, 'latest', or '-' for stdin. [default: the newest model]"
    ),
]
Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[INPUT]...",
        help="Paths, kind/name, 'latest', or '-' for stdin; a method takes the first it can start from. "
        "[default: the newest; for several models the newest that init did not make]",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="NAME",
        help="digits, photos, folder:PATH (or .zip), latents:PATH or hf:NAME; digits#3,7 for some classes. [default: "
        "INPUT's, else digits]",
    ),
]
ImageSize = Annotated[
    int | None, typer.Option("--image-size", min=1, help="Side of the images, pixels. [default: that of the data]")
]
ResizeFilter = Annotated[
    Literal["bicubic", "lanczos", "bilinear", "box", "nearest"] | None,
    typer.Option("--resize-filter", help="How images are brought to --image-size. [default: INPUT's, else bicubic]"),
]
SkipBad = Annotated[
    bool | None,
    typer.Option("--skip-bad/--no-skip-bad", help="Leave corrupt images out and count them. [default: INPUT's]"),
]
Flip = Annotated[
    bool, typer.Option("--flip/--no-flip", help="Mirror half of the training images, drawn anew each time.")
]
Weights = Annotated[
    Literal["ema", "raw"], typer.Option("--weights", help="Which of INPUT's weights; raw where there is no EMA.")
]
EnsembleOf = Annotated[
    str | None,
    typer.Option(
        "--ensemble", metavar="EXPERTS", help="Experts as one model, a timestep its own: a path, 'latest' or '-'."
    ),
]
Vae = Annotated[
    str | None,
    typer.Option("--vae", metavar="PATH|ID", help="Autoencoder, as diffusers stores it. [default: INPUT's, if any]"),
]
TextEncoder = Annotated[
    str | None,
    typer.Option("--text-encoder", metavar="PATH|ID", help="CLIP's for a model of text, or hash. [default: INPUT's]"),
]
CaptionDropout = Annotated[
    float | None,
    typer.Option(
        "--caption-dropout", min=0.0, max=1.0, help="How often a caption is left out in training. [default: 0.1]"
    ),
]
PromptsFile = Annotated[
    str | None,
    typer.Option("--prompts", metavar="FILE", help="Prompts, one a line; - reads them from stdin."),
]
Prompt = Annotated[
    list[str] | None,
    typer.Option("--prompt", metavar="TEXT", help="A prompt; may be repeated. [default: the held-out captions]"),
]
