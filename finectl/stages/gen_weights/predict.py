"""Predict: the weights of a LoRA for a text, all blocks in one denoising step.

Several steps (DDIM) and the mean over several noises are there to compare with.

Reference: Gong et al., arXiv 2407.11966, sections 4.3 and 5.1; its Eq. 3 is put right.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from finectl.adapters.lora_export import FORMATS, export_lora
from finectl.artifacts.files import write_json
from finectl.artifacts.job import InheritedData, Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import save_tensors
from finectl.data.concepts import slug
from finectl.errors import ComputationError, UsageError
from finectl.models.text import describe_text, find_recorded_text, require_same_text
from finectl.models.text.hashed import NAME as HASH
from finectl.training.weights.files import read_generator, require_timestep, unknown_words

ADAPTER, CONFIG, EXPORT = "lora.safetensors", "config.json", "export"
LAYOUTS = tuple(name for name in FORMATS if name != "merged")
"""Merged weights take the base, which a generator does not hold."""


@dataclass(frozen=True)
class Config:
    """The options of `finectl gen-weights predict`."""

    prompt: str
    weights: str
    t_star: int | None
    steps: int
    draws: int
    batch_size: int
    text_encoder: str | None
    export: str | None
    seed: int
    text_digest: str = ""


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Check the prompt and the options against the generator.

    Raises:
        UsageError: the prompt is empty, has no word that a closed vocabulary knows, or an option is out of range.
        InputError: the generator is damaged, or its text encoder is another one or gone.
    """
    network, others = read_generator(parents[0])
    if not config.prompt.strip():
        raise UsageError(
            "the prompt is empty", expected='words, such as finectl gen-weights predict "warm pencil drawing"'
        )
    recorded = others["text"]
    whose = str(parents[0].path)
    if config.text_encoder is None:
        text = find_recorded_text(recorded, whose)
    else:
        named = config.text_encoder
        text = describe_text(named, recorded["width"] if named == HASH else None)
        require_same_text(recorded, text, whose)
    notes = unknown_words(config.prompt, others["words"]) if text["name"] == HASH else ()
    t_star = require_timestep(others["t_star"] if config.t_star is None else config.t_star, network)
    if config.steps > t_star + 1:
        raise UsageError(
            f"--steps {config.steps} from timestep {t_star}", expected=f"at most {t_star + 1}", fix="fewer --steps"
        )
    if config.export is not None and config.export not in LAYOUTS:
        raise UsageError(f"--export {config.export!r}", expected=f"one of: {', '.join(LAYOUTS)}")
    resolved = replace(config, t_star=t_star, text_encoder=str(text["name"]), text_digest=str(text["digest"]))
    data = InheritedData.of(parents[0])
    return Plan(
        resolved,
        slug=slug(config.prompt)[:40].strip("-"),
        data=replace(data, text=text) if data else None,
        summary={
            "blocks": network.blocks,
            "weights": sum(_numbers(part["shape"]) for group in others["layout"]["groups"] for part in group["parts"]),
            "network_calls": network.blocks * config.steps * config.draws,
        },
        notes=notes,
    )


def _numbers(shape: Sequence[int]) -> int:
    total = 1
    for side in shape:
        total *= int(side)
    return total


def run(job: Job[Config]) -> Outcome:
    """Generate the weights, and write them as adapters and in the layout that was asked for."""
    import torch

    from finectl.training.device import arithmetic, resolve_device
    from finectl.training.weights.generate import Sampling, load_generator

    config = job.config
    device = resolve_device(job.execution.device)
    generator = load_generator(job.parents[0], config.weights, device)
    record = {**generator.text, "name": config.text_encoder}
    texts = replace(generator, text=record).encode([config.prompt], device)
    sampling = Sampling(config.t_star or 0, config.steps, config.draws, config.batch_size, config.seed)
    with arithmetic(device, job.execution.dtype):
        start_s = time.perf_counter()
        lora = {name: tensor.cpu() for name, tensor in generator.lora(texts, sampling).items()}  # waits for the device
        seconds = time.perf_counter() - start_s
    bad = [name for name, tensor in lora.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise ComputationError(f"{bad[0]} is not finite", fix="another --t-star, or --dtype float32")
    save_tensors(job.directory / ADAPTER, lora)
    described: dict[str, Any] = {
        "base": generator.base,
        "layers": [layer.to_dict() for layer in generator.layers],
        "prompt": config.prompt,
        "text": dict(record),
        "generator": job.parents[0].manifest.digest,
    }
    write_json(job.directory / CONFIG, described)
    if config.export is not None:
        export_lora(job.directory / EXPORT, config.export, generator.layers, lora)
    blocks, weights = generator.codec.layout.blocks, generator.codec.layout.length
    job.console.note(f"{weights:,} weights in {blocks} blocks: {seconds:.3f} s on {device}")
    found = {"prediction_s": round(seconds, 4), "blocks": blocks, "weights": weights, "t_star": config.t_star}
    return Outcome(metrics=found, cost={"samples": blocks * config.steps * config.draws})


STAGE = Stage(
    name="gen-weights-predict",
    version=1,
    makes="lora",
    config=Config,
    reads=lambda config: Reads("weight-generator", ("weight-generator",)),
    plan=plan,
    run=run,
    locations=("text_encoder",),
)
