"""`finectl encode`: its options."""

from __future__ import annotations

from finectl.cli import groups
from finectl.cli import options as opt
from finectl.cli.command import stage_command


@stage_command("finectl.stages.encode", groups.data)
def encode(
    vae: opt.Vae = None,
    flip: opt.StoreFlips = False,
    storage: opt.Storage = "float16",
    shard_size: opt.ShardSize = 4096,
    batch_size: opt.ComputeBatchSize = 16,
) -> None:
    """Turn images into an autoencoder's latents, for --data latents:PATH.

    Mean and log-variance are kept, so that training draws anew each time. Needs --vae. A run that stops goes on with
    the shards that are missing; under torchrun processes share the shards.
    """
