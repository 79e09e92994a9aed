"""Sample with a ControlNet: images of controls, beside prompts, as PNG files, one tensor file and a grid.

The controls are those of the held-out images of its training data, the user's own, or measured on the user's images.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from finectl.artifacts.files import write_json
from finectl.artifacts.job import InheritedData, Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import load_tensors, save_tensors
from finectl.data.captions import ALL, PROMPTS
from finectl.data.controls import FOLDER, ControlInfo, describe_control
from finectl.data.controls.given import digest_of_files, image_files_of, read_square
from finectl.data.prompts import read_lines
from finectl.data.sources import DataInfo, DataOptions
from finectl.errors import UsageError
from finectl.models.control_config import KIND, require_controllable
from finectl.models.io import read_config, require_sampling
from finectl.models.text import describe_text
from finectl.models.unet_config import UNetConfig
from finectl.models.vae import find_recorded
from finectl.training.prompting import PromptFields, resolve_prompts
from finectl.training.settings import DataFields, resolve_data

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from finectl.diffusion.losses import Denoiser
    from finectl.models.control import Controlled
    from finectl.models.vae import Vae
    from finectl.training.controls import Pairs

GRID_IMAGES = 16
NAMES = ("control", "generated")


@dataclass(frozen=True)
class Config(PromptFields):
    """The options of `finectl sample CONTROLNET`."""

    weights: str
    samples: int
    scheduler: str
    sampling_steps: int
    guidance: float
    batch_size: int
    seed: int
    control_image: Sequence[str] | None = None
    from_image: Sequence[str] | None = None
    control_scale: float = 1.0
    control_files_digest: str = ""
    base: str | None = None
    vae: str | None = None
    vae_digest: str = ""


def reads(config: Config) -> Reads:
    """Return the inputs: the ControlNet, and the model that it was trained on."""
    return Reads(KIND, (KIND,), also=(Reads("model", ("model",), named=(config.base or "",)),))


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Check the options against the ControlNet and its model.

    Raises:
        UsageError: there is no such scheduler, there are too many steps, or options contradict one another.
        InputError: control images, prompts, text encoder, autoencoder or data are missing.
    """
    branch, base = parents
    model = require_controllable(read_config(base), str(base.path))
    require_sampling(model, scheduler=config.scheduler, sampling_steps=config.sampling_steps, guidance=config.guidance)
    if config.control_image and config.from_image:
        raise UsageError("--control-image and --from-image are both given", expected="one of them")
    if config.from_image and branch.manifest.config["control"] == FOLDER:
        raise UsageError(
            "--from-image: the control of this ControlNet came from a folder and is not measured",
            fix="--control-image PATH",
        )
    given = [os.path.abspath(path) for path in config.control_image or config.from_image or ()]
    data = InheritedData.of(branch) if given else heldout_of(branch)
    prompted = bool(config.prompt) or config.prompts is not None
    text, _ = resolve_prompts(config if prompted else replace(config, prompt=[""]), parents, model)
    if not prompted and not given:  # the captions of the held-out images
        text["prompt"] = None
    recorded = branch.manifest.data.get("vae")
    if config.vae is not None and recorded is None:
        raise UsageError(f"--vae {config.vae}: {branch.path} was trained on pixels", fix="leave --vae out")
    vae = find_recorded({**recorded, "name": config.vae or recorded["name"]}, str(branch.path)) if recorded else None
    resolved = replace(
        config,
        **text,
        control_image=given if config.control_image else None,
        from_image=given if config.from_image else None,
        control_files_digest=digest_of_files(image_files_of(given)) if given else "",
        base=None,  # it is a parent
        vae=vae["name"] if vae else None,
        vae_digest=vae["digest"] if vae else "",
    )
    return Plan(
        resolved,
        slug=f"{branch.name.rsplit('-', 1)[0]}-n{config.samples}",
        data=data,
        summary={"images": config.samples, "network_calls": 2 * config.samples * config.sampling_steps},
    )


def heldout_of(branch: Artifact) -> DataInfo:
    """Return the data set whose held-out images have the controls, as the ControlNet's training read it.

    Raises:
        InputError: it is not where it was.
    """
    fields = DataFields(None, branch.manifest.config["image_size"], None, None)
    data, _ = resolve_data(fields, [branch], captions=ALL)
    return replace(data, text=branch.manifest.data["text"])


def control_of(branch: Artifact) -> ControlInfo:
    """Return what control a ControlNet obeys, as it is measured here.

    Raises:
        InputError: the network that measures it is not where it was.
    """
    config = branch.manifest.config
    if config["control"] == FOLDER:
        return ControlInfo.from_dict(
            {name: branch.manifest.metrics["control"][name] for name in ControlInfo.__dataclass_fields__}
        )
    return describe_control(config["control"], config["control_set"], config["control_model"])


def run(job: Job[Config]) -> Outcome:
    """Generate the images batch by batch, keeping finished batches for a resumed run."""
    import torch

    from finectl.data.images import make_rows, save_pngs, to_uint8
    from finectl.diffusion.sampling import sample_images
    from finectl.models.control import Controlled, load_branch
    from finectl.models.io import load_any_model
    from finectl.models.vae import load_vae
    from finectl.training.device import arithmetic, resolve_device

    config, (branch, base) = job.config, job.parents
    device = resolve_device(job.execution.device)
    vae = load_vae(config.vae, device) if config.vae else None
    backbone: Any = load_any_model(base, branch.manifest.config["weights"])
    pairs, texts, levels = _pairs(job, backbone.config, device, vae)
    model = Controlled(backbone, load_branch(branch, config.weights), pairs.table).to(device).eval()
    model.scale = config.control_scale
    batches: list[Tensor] = []
    with job.console.progress("sampling", config.samples, unit="image") as progress:
        for first in range(0, config.samples, config.batch_size):
            rows = list(range(first, min(first + config.batch_size, config.samples)))
            kept = job.state / f"images-{config.batch_size}-{first}.safetensors"
            if not kept.exists():
                with arithmetic(device, job.execution.dtype):
                    images = sample_images(
                        keeping_controls(model, pairs) if config.guidance != 1.0 else model,
                        (model.config.channels, model.config.image_size, model.config.image_size),
                        rows,
                        null_label=pairs.null,
                        scheduler=config.scheduler,
                        sampling_steps=config.sampling_steps,
                        guidance=config.guidance,
                        seed=config.seed,
                        first=first,
                        learned_sigma=model.config.learn_sigma,
                        device=device,
                        after_step=lambda: job.stop_if_requested(_keep if batches else None),
                        diffusion=model.config.diffusion,
                        clip=vae is None,
                    )
                save_tensors(kept, {"images": to_uint8(images if vae is None else vae.decode(images)).cpu()})
            batches.append(load_tensors(kept)["images"])
            save_pngs(job.directory / "samples", batches[-1], first)
            save_pngs(job.directory / "controls", levels[rows], first)
            progress.advance(len(rows), samples=len(rows))
    made = torch.cat(batches)
    write_json(job.directory / PROMPTS, texts)
    tensors = {"images": made, "labels": torch.zeros(len(made), dtype=torch.int64), "controls": levels}
    save_tensors(job.directory / "samples.safetensors", tensors)
    make_rows([levels[:GRID_IMAGES], made[:GRID_IMAGES]], NAMES).save(job.directory / "grid.png")
    return Outcome(metrics={"images": config.samples}, cost={"samples": config.samples})


def keeping_controls(model: Controlled, pairs: Pairs) -> Denoiser:
    """Return a model whose unconditional half, in guidance, is without the texts and with the controls.

    Args:
        model: Of the rows of `pairs`.
        pairs: Row N + k is row k without its text.
    """
    import torch

    def guided(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        half = len(y) // 2
        return cast("Tensor", model(x, t, torch.cat([y[:half], y[:half] + pairs.count])))

    return guided


def _keep() -> None:
    """Finished batches are in the state directory already."""


def _pairs(
    job: Job[Config], model: UNetConfig, device: torch.device, vae: Vae | None
) -> tuple[Pairs, list[str], Tensor]:
    """Return the pairs of all images, their prompts, and their controls, uint8 (N, 3, H, W)."""
    import torch

    from finectl.data.captions import captions_of
    from finectl.data.dataset import load
    from finectl.training.controls import InMemory, open_controls, pair_up
    from finectl.training.texts import open_table

    config, branch = job.config, job.parents[0]
    info = control_of(branch)
    side = model.image_size * (int(vae.record["downscale"]) if vae else 1)
    named = [*(read_lines(config.prompts) if config.prompts else ()), *(config.prompt or ())]
    if config.control_image or config.from_image:
        files = image_files_of(config.control_image or config.from_image or ())
        channels = (int(vae.record["channels"]) if vae else model.channels) if config.from_image else 3
        levels = torch.stack([torch.from_numpy(read_square(file, side, channels)) for file in files])
        levels = info.extractor(device)(levels) if config.from_image else levels
    else:
        data, read = cast(DataInfo, job.data), branch.manifest.config
        options = DataOptions(
            resize_filter=read["resize_filter"],
            skip_bad=bool(read["skip_bad"]),
            console=job.console,
            check=job.stop_if_requested,
            captions=ALL,
        )
        held = load(data.name, "heldout", data.image_size, options)
        chosen = held.indices[: config.samples]
        levels = open_controls(job, held, info, options, device, vae).take(chosen)
        captions = captions_of(held.info, options, held.store.labels.tolist())
        named = named or [captions[index] for index in chosen.tolist()]
    every = torch.arange(config.samples)
    shown = levels.expand(-1, 3, -1, -1)[every % len(levels)].contiguous()
    texts = [named[index % len(named)] for index in range(config.samples)]
    record = describe_text(config.text_encoder or "", int(model.network["cross_attention_dim"]))
    table = open_table(texts, record, device, job.console, job.stop_if_requested)
    return pair_up(table, table.rows_of(texts), InMemory(shown), side), texts, shown


STAGE = Stage(
    name="sample",
    version=1,
    makes="samples",
    config=Config,
    reads=reads,
    plan=plan,
    run=run,
    locations=("text_encoder", "prompts", "control_image", "from_image", "vae", "base"),
)
