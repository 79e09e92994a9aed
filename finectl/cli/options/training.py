"""How a network is trained."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Steps = Annotated[
    int | None,
    typer.Option("--steps", min=1, help="Optimiser updates. [default: small on bundled data, else the paper's]"),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size", min=1, help="Images a step, over all processes. [default: 128 bundled data, else 256]"
    ),
]
ComputeBatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images computed at a time.")]
Lr = Annotated[
    float | None, typer.Option("--lr", min=0.0, help="AdamW's rate. [default: 1e-3 (condense 4e-3); not bundled: 1e-4]")
]
LrSchedule = Annotated[
    Literal["constant", "cosine"], typer.Option("--lr-schedule", help="Course of the learning rate.")
]
WarmupSteps = Annotated[
    int | None,
    typer.Option(
        "--warmup-steps", min=0, help="Updates over which the rate rises to --lr. [default: 100 bundled data, else 0]"
    ),
]
Betas = Annotated[
    str | None,
    typer.Option("--betas", metavar="B1,B2", help="Decays of AdamW's two moments. [default: 0.9,0.999]"),
]
EmaPower = Annotated[
    float,
    typer.Option(
        "--ema-power", min=0.0, help="The EMA's decay rises as 1-(1+k)^-POWER up to --ema; 0: from the start."
    ),
]
Weighting = Annotated[
    Literal["uniform", "snr", "snr+1", "trunc-snr", "min-snr", "p2"],
    typer.Option(
        "--weighting", help="Weights of the loss over timesteps; uniform: of what is predicted, snr: of the noise."
    ),
]
NormaliseWeights = Annotated[
    bool, typer.Option("--normalise-weights/--no-normalise-weights", help="Divide those weights by their mean.")
]
Mtl = Annotated[
    Literal["none", "ant-uw", "ant-nash", "pcgrad"],
    typer.Option("--mtl", help="Weigh timestep clusters as tasks: by uncertainty, Nash bargaining, gradient surgery."),
]
Clusters = Annotated[
    int | None,
    typer.Option("--clusters", min=2, help="Equal timestep intervals that --mtl weighs. [default: 4]"),
]
WeightDecay = Annotated[float, typer.Option("--weight-decay", min=0.0, help="Decoupled weight decay.")]
ClipGrad = Annotated[
    float | None,
    typer.Option(
        "--clip-grad", min=0.0, help="Largest norm of all gradients together; 0 leaves them. [default: 0, ant-nash 1]"
    ),
]
Ema = Annotated[
    float | None,
    typer.Option("--ema", min=0.0, max=1.0, help="Decay of the EMA. [default: 0.99 bundled data, else 0.9999]"),
]
EvalEvery = Annotated[
    int | None,
    typer.Option(
        "--eval-every", min=0, help="Held-out loss every so many updates; 0 never. [default: a tenth of --steps]"
    ),
]
KeepEvery = Annotated[
    int,
    typer.Option(
        "--keep-every",
        min=0,
        help="Keep the EMA weights of every N-th update in checkpoints/; 0 keeps the last only.",
    ),
]
KeepAt = Annotated[
    str | None,
    typer.Option("--keep-at", metavar="LIST", help="Keep those of these updates too, such as 30,100,300."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of every random number.")]
