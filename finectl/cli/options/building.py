"""What condense and init build."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Model = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="PRESET", help="dit-nano, dit-s, dit-b, dit-l, dit-xl [/2 /4 /8]. [default: dit-nano]"
    ),
]
FromModel = Annotated[
    str | None,
    typer.Option(
        "--from", metavar="MODEL", help="Fit the factors to this dense model: a path, kind/name, latest or -."
    ),
]
CpWeighting = Annotated[
    Literal["inputs", "none"],
    typer.Option(
        "--cp-weighting", help="What errors of --from's fit are weighed by: the layers' inputs on data, or nothing."
    ),
]
CpIterations = Annotated[
    int, typer.Option("--cp-iterations", min=0, help="Most sweeps of alternating least squares a type, with --from.")
]
DistillSteps = Annotated[
    int | None,
    typer.Option(
        "--distill-steps",
        min=0,
        help="Updates towards predictions: --from's, before --steps [default: 0]; --distill's, of --steps [all].",
    ),
]
Distill = Annotated[
    str | None,
    typer.Option("--distill", metavar="TEACHER", help="Train towards this model's predictions instead of the noise."),
]
CondenseMethod = Annotated[
    Literal["fine", "share", "tleg", "wave"],
    typer.Option("--method", help="How layers share: fine U and V, share all, tleg a line over depth, wave templates."),
]
TemplateSize = Annotated[
    int | None,
    typer.Option("--template-size", min=1, help="Side of wave's templates, a divisor of the width. [default: half]"),
]
CondenseSteps = Annotated[
    int | None,
    typer.Option(
        "--steps", min=0, help="Optimiser updates. [default: small on bundled data, else the paper's; 0 with --from]"
    ),
]
ModelOrNone = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PRESET",
        help="Build this preset instead of INPUT's shapes, where the method can; unet-nano, -cifar, -lsun, -text-nano, "
        "-sd14: he only.",
    ),
]
ImportProcess = Annotated[
    Literal["ddpm", "edm"] | None,
    typer.Option("--process", help="Of an imported EDM network: how images are made noisy. [default: ddpm]"),
]
Process = Annotated[
    Literal["ddpm", "edm"] | None,
    typer.Option(
        "--process", help="What makes images noisy: edm as EDM's preconditioning. [default: INPUT's, or ddpm]"
    ),
]
Depth = Annotated[int | None, typer.Option("--depth", min=1, help="Number of layers. [default: the preset's]")]
Factorize = Annotated[
    str | None,
    typer.Option("--factorize", metavar="TYPES", help="Types that share, of qkv,o,in,out,adaln. [default: all]"),
]
Rank = Annotated[
    int | None,
    typer.Option("--rank", min=1, help="Columns of U and V; of wave, a budget as large. [default: the width]"),
]
Overcomplete = Annotated[bool, typer.Option("--overcomplete", help="Allow a rank above what the width gives room for.")]
SigmaLr = Annotated[
    float | None,
    typer.Option("--sigma-lr", min=0.0, help="Learning rate of sigma. [default: 5 times --lr bundled data, else --lr]"),
]
SigmaSharing = Annotated[int, typer.Option("--sigma-sharing", min=1, help="Entries of sigma that share one value.")]
LearnSigma = Annotated[
    bool, typer.Option("--learn-sigma/--no-learn-sigma", help="Predict the variance too, with its bound in the loss.")
]
FrequencyDivisor = Annotated[
    int,
    typer.Option(
        "--frequency-divisor", min=1, help="Divisor of the time frequencies: 128 as DiT's authors, 127 as diffusers."
    ),
]
Method = Annotated[
    str,
    typer.Option(
        "--method", metavar="NAME", help="Initialisation method, several with commas, or all: see finectl ls methods."
    ),
]
Variant = Annotated[
    str | None,
    typer.Option("--variant", metavar="NAME", help="Variant of the method, or all. [default: its usual one]"),
]
FamilyDepths = Annotated[
    str | None, typer.Option("--depths", metavar="LIST", help="Make one model of each depth, such as 2,4,6,8.")
]
Only = Annotated[
    str | None,
    typer.Option(
        "--only", metavar="LIST", help="Of several models make these now: METHOD, lDEPTH or METHOD[-VARIANT]-lDEPTH."
    ),
]
Constants = Annotated[
    str | None,
    typer.Option("--set", metavar="NAME=VALUE,...", help="Other numbers in the method's definition: see ls methods."),
]
Sigma = Annotated[
    Literal["interpolated", "nearest", "identical", "random"] | None,
    typer.Option(
        "--sigma", help="Where sigma starts from. [default: interpolated; nearest for what condense --from made]"
    ),
]
SigmaFrom = Annotated[
    str | None,
    typer.Option("--sigma-from", metavar="GENERATOR", help="Generate sigma and biases from --prompt, in one step."),
]
TaskPrompt = Annotated[
    str | None,
    typer.Option("--prompt", metavar="TEXT", help="The task of --sigma-from in words: the digits 3 and 7."),
]
DepthScale = Annotated[
    float,
    typer.Option(
        "--depth-scale", help="Residual branches times (old depth / new depth) to this power; 0 leaves them as read."
    ),
]
TuneSteps = Annotated[
    int | None,
    typer.Option(
        "--tune-steps", min=0, help="Updates of sigma before W is written out. [default: 50 bundled data, else 300]"
    ),
]
TuneSamples = Annotated[
    int | None,
    typer.Option("--tune-samples", min=1, help="Images tuned on, a fixed part. [default: 5 %, at least 256]"),
]
TuneLr = Annotated[
    float, typer.Option("--tune-lr", min=0.0, help="Rate of what is tuned in place of weights (sigma), cosine to 0.")
]
WidthMap = Annotated[
    Literal["rows", "learned"],
    typer.Option(
        "--width-map", help="Rows of U and V in another width: chosen, or mixed by matrices tuned with sigma."
    ),
]
TuneBiases = Annotated[bool, typer.Option("--tune-biases/--no-tune-biases", help="Tune the biases with sigma.")]
Depths = Annotated[
    str, typer.Option("--depths", metavar="LIST", help="Depths of the family whose storage is compared.")
]
