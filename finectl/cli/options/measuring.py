"""What is measured, and against what."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Metrics = Annotated[
    str | None,
    typer.Option(
        "--metrics",
        metavar="LIST",
        help="Those above, separated by commas. [default: loss; on digits frechet, accuracy]",
    ),
]
Draws = Annotated[int, typer.Option("--draws", min=1, help="Noise draws an image in the held-out loss.")]
Ranges = Annotated[int, typer.Option("--ranges", min=1, help="Equal timestep ranges in which the loss is given, too.")]
Reference = Annotated[
    str | None,
    typer.Option(
        "--reference",
        metavar="WHAT",
        help="folder:, latents:, hf:, a statistics artifact, .safetensors or .npz. [default: INPUT's training images]",
    ),
]
Images = Annotated[
    str | None,
    typer.Option("--images", metavar="folder:PATH", help="Measure these images, as they are, instead of INPUT."),
]
Features = Annotated[
    str | None,
    typer.Option("--features", metavar="NAME", help="For frechet and accuracy: digits, or torchvision:NETWORK."),
]
FeaturesWeights = Annotated[
    str | None, typer.Option("--features-weights", metavar="FILE", help="Weights of --features torchvision:NETWORK.")
]
Inception = Annotated[
    str | None, typer.Option("--inception", metavar="FILE", help="inception-2015-12-05.pt. [default: in the cache]")
]
Clip = Annotated[
    str | None,
    typer.Option("--clip", metavar="WHAT", help="Folder, ARCHITECTURE:FILE or hub id. [default: ViT-g/14 of laion2b]"),
]
Dino = Annotated[
    str | None, typer.Option("--dino", metavar="FILE", help="dinov2_vitl14_pretrain.pth. [default: in the cache]")
]
LpipsWeights = Annotated[
    str | None, typer.Option("--lpips", metavar="FILE", help="alexnet-owt-7be5be79.pth. [default: in the cache]")
]
FidMode = Annotated[
    Literal["clean", "legacy_tensorflow"],
    typer.Option("--fid-mode", help="How images reach Inception: clean-fid's bicubic filter, or as in 2017."),
]
FeaturesDtype = Annotated[
    Literal["float32", "bfloat16"],
    typer.Option("--features-dtype", help="Arithmetic of the feature networks; values in bfloat16 are kept apart."),
]
AllowFew = Annotated[bool, typer.Option("--allow-few", help="Allow a Fréchet distance of fewer images than features.")]
StepsEvery = Annotated[
    int,
    typer.Option(
        "--steps-every", min=0, help="Measure the kept checkpoints of every N-th update too; 1 measures all of them."
    ),
]
Reach = Annotated[
    str | None,
    typer.Option(
        "--reach", metavar="TEST", help="With --steps-every: updates until 'loss<0.1' holds, or the scores of a model."
    ),
]
TableFormat = Annotated[
    Literal["md", "csv", "json"] | None,
    typer.Option("--format", help="Print the table in this form on stdout, instead of the artifact's path."),
]
FailIf = Annotated[
    str | None, typer.Option("--fail-if", metavar="TEST", help="Exit with 5 when it holds, such as 'loss>0.1'.")
]
