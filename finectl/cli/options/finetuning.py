"""How a model is fine-tuned on other data, and what it retains."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Shots = Annotated[
    int | None,
    typer.Option("--shots", min=1, help="Training images a class, chosen by --seed. [default: all]"),
]
FinetuneMethod = Annotated[
    Literal["diff-tuning", "full"],
    typer.Option("--method", help="Keep what the model knows at low noise while it learns (Diff-Tuning); or plainly."),
]
Coefficients = Annotated[
    Literal["sampling", "weights"] | None,
    typer.Option(
        "--coefficients",
        help="What psi and xi are: how timesteps are drawn, as released, or weights of losses, as written. [default: "
        "sampling]",
    ),
]
ChainPower = Annotated[
    float | None,
    typer.Option("--power", min=0.0, help="Exponent of psi(t), by which new images count; 0: all alike. [default: 1]"),
]
RetentionPower = Annotated[
    float | None,
    typer.Option(
        "--retention-power", min=0.0, help="Exponent of xi(t), by which retained ones do. [default: --power, else 1]"
    ),
]
Retention = Annotated[
    Literal["bank", "kd", "none"] | None,
    typer.Option(
        "--retention", help="What is kept: images of the model, its predictions on the data, nothing. [default: bank]"
    ),
]
RetentionWeight = Annotated[
    float | None,
    typer.Option(
        "--retention-weight", min=0.0, help="What retained images' mean loss counts. [default: 0.1; weights: 1]"
    ),
]
RetentionShare = Annotated[
    float | None,
    typer.Option("--retention-share", min=0.0, max=1.0, help="Share of a batch that is retained. [default: 0.2]"),
]
Bank = Annotated[
    str | None,
    typer.Option(
        "--bank", metavar="ARTIFACT", help="Images that INPUT made (finectl bank). [default: its newest, or a new one]"
    ),
]
BankSamples = Annotated[
    int | None,
    typer.Option(
        "--bank-samples", min=1, help="Images of the bank made without --bank. [default: 500 bundled data, else 2,000]"
    ),
]
BankLabels = Annotated[
    Literal["null", "own"] | None,
    typer.Option(
        "--bank-labels",
        help="Retain the bank's images under no class, or under their own, where data adds to the model's classes. "
        "[default: null]",
    ),
]
LabelRows = Annotated[
    Literal["new", "reuse"] | None,
    typer.Option(
        "--label-rows", help="Rows of the classes: drawn anew, or the first ones. [default: reuse of the same labels]"
    ),
]
Peft = Annotated[
    Literal["none", "lora", "difffit", "bitfit", "adaptformer", "vpt"],
    typer.Option("--peft", help="Train few parameters instead of all (parameter-efficient tuning)."),
]
PeftSet = Annotated[
    list[str] | None,
    typer.Option(
        "--peft-set",
        metavar="NAME=VALUE",
        help="Of --peft: rank, alpha, layers, blocks, dim, scale, tokens or labels; may be repeated.",
    ),
]
FinetuneSteps = Annotated[
    int | None, typer.Option("--steps", min=1, help="Optimiser updates. [default: 600 bundled data, else 24,000]")
]
FinetuneBatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, help="Images a step, over all processes. [default: 64 bundled data, else 32]"),
]
FinetuneLr = Annotated[
    float | None,
    typer.Option(
        "--lr", min=0.0, help="AdamW's rate. [default: 5e-4 bundled data, else 1e-4; ten times that with --peft]"
    ),
]
FinetuneWarmup = Annotated[
    int | None, typer.Option("--warmup-steps", min=0, help="Updates over which the rate rises to --lr. [default: 0]")
]
Then = Annotated[
    list[str] | None,
    typer.Option(
        "--then",
        metavar="DATA",
        help="Go on with this data, from the model before, and measure all so far; repeatable.",
    ),
]
ThenMetrics = Annotated[
    str | None, typer.Option("--metrics", metavar="LIST", help="With --then: what is measured. [default: as evaluate]")
]
ThenSamples = Annotated[
    int | None, typer.Option("--samples", min=1, help="With --then: images of each measurement. [default: 1,000]")
]
BankSize = Annotated[
    int | None,
    typer.Option(
        "--samples", min=1, help="Images to generate. [default: 500 bundled data, else 50 a class, 5,000 to 50,000]"
    ),
]
BankPrompt = Annotated[
    list[str] | None,
    typer.Option("--prompt", metavar="TEXT", help="A prompt; may be repeated. [default: the training captions]"),
]
BankGuidance = Annotated[
    float | None,
    typer.Option(
        "--guidance", min=0.0, help="Classifier-free guidance scale; 1 is none. [default: 1.5, without null class 1]"
    ),
]
ControlName = Annotated[
    Literal["edge", "sketch", "depth", "normal", "segmentation", "folder"] | None,
    typer.Option(
        "--control", help="Train a ControlNet for this control on a UNet of text, which itself stays as it is."
    ),
]
ControlModel = Annotated[
    str | None,
    typer.Option("--control-model", metavar="PATH|ID", help="What measures depth, normal or segmentation."),
]
ControlSet = Annotated[
    str | None,
    typer.Option("--control-set", metavar="NAME=VALUE,...", help="Numbers of the control, such as sigma=1 of edge."),
]
ControlImages = Annotated[
    str | None,
    typer.Option(
        "--control-images", metavar="PATH", help="The images of --control folder, named like those of --data."
    ),
]
BankControl = Annotated[
    Literal["empty", "extracted"] | None,
    typer.Option(
        "--bank-control", help="The control of retained images: none, or their own. [default: extracted; folder: empty]"
    ),
]
ValidateEvery = Annotated[
    int | None,
    typer.Option(
        "--validate-every",
        min=0,
        help="Make images of held-out controls every so many updates, and measure these again; 0 never. [default: a "
        "thirtieth of --steps bundled data, else 100]",
    ),
]
ValidationImages = Annotated[
    int, typer.Option("--validation-images", min=1, help="How many images that --validate-every makes.")
]
ValidationSteps = Annotated[
    int, typer.Option("--validation-steps", min=1, help="Steps of the reverse process in which it makes them.")
]
