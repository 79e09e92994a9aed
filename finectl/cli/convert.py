"""`finectl convert`: its options."""

from __future__ import annotations

from finectl.cli import options as opt
from finectl.cli.command import stage_command


@stage_command("finectl.stages.convert")
def convert(
    source: opt.Source = None,
    to: opt.To = None,
    format: opt.Format = None,
    weights: opt.Weights = "ema",
    components: opt.Components = None,
    vae: opt.ExportVae = None,
    heads: opt.Heads = None,
    image_size: opt.ImageSize = None,
    num_classes: opt.NumClasses = None,
    source_digest: opt.SourceDigest = None,
    process: opt.ImportProcess = None,
) -> None:
    """Import other people's checkpoints, or export a model to diffusers, the published DiT layout or PEFT.

    Without --to, SOURCE is a .pt or .safetensors file of facebookresearch/DiT or EDM (ADM architecture), or a folder
    or hub id of diffusers (DiT, UNet2D, Stable Diffusion); it becomes a model, with raw and EMA weights where both are
    there. With --to, SOURCE is a model of finectl, and --weights chooses between the two. --to peft exports what
    finetune --peft trained apart from the model: of LoRA a folder that the peft library loads.
    Nothing in a checkpoint is ever run, and no pickle is written.
    """
