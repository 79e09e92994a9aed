"""How a stage runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def _use_recipe(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make the recipe's values the defaults of the options that the command line leaves out."""
    if path is not None and not ctx.resilient_parsing:
        from finectl.cli.commands import section_of
        from finectl.cli.recipe import load_recipe

        parameters = {p.name: getattr(p, "multiple", False) or p.nargs == -1 for p in ctx.command.params if p.name}
        known, repeated = list(parameters), [name for name, many in parameters.items() if many]
        ctx.default_map = load_recipe(path, section_of(ctx.command_path), known, repeated)
    return path


Recipe = Annotated[
    Path | None,
    typer.Option("--recipe", metavar="FILE", callback=_use_recipe, is_eager=True, help="YAML with other defaults."),
]
Workspace = Annotated[
    Path | None,
    typer.Option(
        "--workspace", metavar="DIR", help="Where artifacts lie. [default: $FINECTL_WORKSPACE, else ./artifacts]"
    ),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Make the artifact there; new or empty.")]
Force = Annotated[bool, typer.Option("--force", help="Make it anew even if it is there.")]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Go on with unfinished work, or drop it.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved plan and leave.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the path.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no notes, tables and progress.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print a traceback with an error.")]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    Literal["auto", "float32", "tf32", "bfloat16"],
    typer.Option("--dtype", help="Arithmetic of matrix products. auto: bfloat16 autocast on CUDA, else float32."),
]
Download = Annotated[bool, typer.Option("--download", help="Allow the network: fetch hub ids that are not here yet.")]
Offline = Annotated[bool, typer.Option("--offline", help="Refuse the network, whatever else is said.")]
SaveEvery = Annotated[
    str,
    typer.Option("--save-every", metavar="N|TIME", help="Save the resume state every N updates, or every 10m or 1h."),
]
MaxTime = Annotated[
    str | None,
    typer.Option("--max-time", metavar="TIME", help="Save and exit with 75 after so long, such as 90s, 55m or 3h30m."),
]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Threads that read batches ahead.")]
Accumulate = Annotated[
    int, typer.Option("--accumulate", min=1, help="Compute a process's share of a batch in so many parts.")
]
Compile = Annotated[bool, typer.Option("--compile", help="Let torch.compile make the model's code; slow to start.")]
GradCheckpointing = Annotated[
    bool, typer.Option("--grad-checkpointing", help="Compute activations again in the backward pass to save memory.")
]
Fsdp = Annotated[bool, typer.Option("--fsdp", help="Spread weights and optimiser over the processes of torchrun.")]
Tensorboard = Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard events beside the log.")]
SampleEvery = Annotated[
    int, typer.Option("--sample-every", min=0, help="Draw samples every so many updates into previews/; 0 never.")
]
