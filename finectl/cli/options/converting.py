"""What convert and encode read and write."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Source = Annotated[
    str | None,
    typer.Argument(
        metavar="[SOURCE]", help="A foreign file, folder or hub id; with --to a model. [default: the newest]"
    ),
]
To = Annotated[
    Literal["diffusers", "dit", "peft"] | None,
    typer.Option("--to", help="Export to diffusers, to facebookresearch/DiT's tensors, or what --peft trained alone."),
]
Format = Annotated[
    Literal["dit", "diffusers-dit", "diffusers-unet", "edm"] | None,
    typer.Option("--format", help="SOURCE's format. [default: what its content shows]"),
]
Components = Annotated[
    Literal["reference", "copy", "none"] | None,
    typer.Option("--components", help="VAE, text encoder, ... [default: reference; with --to copy]"),
]
ExportVae = Annotated[
    str | None, typer.Option("--vae", metavar="PATH", help="AutoencoderKL, path or hub id. [default: the model's own]")
]
Heads = Annotated[
    int | None, typer.Option("--heads", min=1, help="Attention heads, which weights do not tell. [default: by width]")
]
NumClasses = Annotated[
    int | None,
    typer.Option("--num-classes", min=0, help="Classes in SOURCE's label table. [default: all of its rows]"),
]
SourceDigest = Annotated[
    str | None, typer.Option("--source-digest", metavar="HEX", help="Refuse SOURCE if its content has another digest.")
]
StoreFlips = Annotated[bool, typer.Option("--flip/--no-flip", help="Encode mirrored images too, for training --flip.")]
Storage = Annotated[Literal["float16", "float32"], typer.Option("--storage", help="Type of the stored latents.")]
ShardSize = Annotated[
    int, typer.Option("--shard-size", min=1, help="Images a file; what is lost at most when a run is killed.")
]
