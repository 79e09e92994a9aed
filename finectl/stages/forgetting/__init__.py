"""Forgetting: what a fine-tuned model lost of the one that it started from, and at which noise.

Chain of forgetting: the last steps of the reverse process, those of least noise, are handed over to the pre-trained
model; if that makes images of the new domain better, fine-tuning has harmed what was general there. EWC distance: how
far the weights moved, each weighed by how much the old task needs it. And the loss of both models on both domains, by
timestep. Each analysis is kept when it is done, so that an interrupted run goes on with the next.

Reference: Diff-Tuning, arXiv 2406.00773 (chain of forgetting); Kirkpatrick et al., arXiv 1612.00796, Eq. 3 (EWC).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from finectl.artifacts.analyses import kept, parse_only
from finectl.artifacts.files import write_json
from finectl.artifacts.job import Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.store import Artifact
from finectl.data.bank import KIND as BANK_KIND
from finectl.data.bank import bank_info
from finectl.diffusion.schedulers import steps_handed_over
from finectl.errors import UsageError
from finectl.metrics.objective import Objective
from finectl.models.autoencoder import find_autoencoder
from finectl.models.io import read_config, require_sampling, total_parameters
from finectl.stages.forgetting.config import ANALYSES, CHAIN, EWC, LOSS, Config, neutral
from finectl.stages.forgetting.subjects import Subjects, describe_metric, require_comparable
from finectl.training.text_settings import unchanged

METRICS_FILE = "metrics.json"


def reads(config: Config) -> Reads:
    """Return what is compared: a fine-tuned model, the pre-trained one, and perhaps a bank of its images.

    Raises:
        UsageError: no pre-trained model is named.
    """
    if config.pretrained is None:
        raise UsageError("there is no pre-trained model to compare with", fix="--pretrained MODEL")
    also = [Reads("pretrained", ("model",), named=(config.pretrained,))]
    if config.bank is not None:
        also.append(Reads("bank", (BANK_KIND,), named=(config.bank,)))
    return Reads("model", ("model",), also=tuple(also))


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Resolve which analyses are made, and count what they cost.

    Raises:
        UsageError: an analysis or a metric is none, or is not possible of these models.
        InputError: the models, the bank and the data do not go together.
    """
    asked = parse_only(config.only, ANALYSES) if config.only is not None else None
    subjects = Subjects.of(config, parents)
    wanted, notes = possible(asked, subjects)
    fields: dict[str, Any] = dict(subjects.fields)
    metric: Objective | None = None
    if CHAIN in wanted:
        require_sampling(
            read_config(subjects.finetuned),
            scheduler=config.scheduler,
            sampling_steps=config.sampling_steps,
            guidance=config.guidance,
        )
        metric, more = describe_metric(config, subjects)
        vae = find_autoencoder(config.vae, subjects.finetuned, read_config(subjects.finetuned).channels)
        notes += more
        fields |= {
            "fractions": ",".join(f"{share:g}" for share in config.shares),
            "metric": metric.metric if metric else None,
            "metric_digest": metric.digest if metric else "",
            "vae": vae["name"] if vae else None,
            "vae_digest": vae["digest"] if vae else "",
        }
    if EWC in wanted:
        left = require_comparable(subjects.finetuned, subjects.pretrained, config.weights)
        notes += (f"{len(left)} tensors that only the fine-tuned model has are left out of EWC",) if left else ()
    resolved = neutral(
        replace(
            config,
            **fields,
            only=",".join(wanted),
            pretrained=str(subjects.pretrained.path.resolve()),
            bank=str(subjects.bank.path.resolve()) if subjects.bank is not None else None,
            source_data=subjects.source.name if subjects.source is not None else None,
            source_digest=subjects.source.fingerprint if subjects.source is not None else "",
        )
    )
    return Plan(
        resolved,
        slug=f"{subjects.finetuned.name.rsplit('-', 1)[0]}-forgetting",
        data=subjects.target,
        summary=costs(resolved, subjects, metric),
        notes=(*subjects.notes, *notes),
    )


def possible(asked: tuple[str, ...] | None, subjects: Subjects) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the analyses that the images at hand allow, and a note on what is left out.

    Raises:
        UsageError: the EWC distance is asked for, and there are no images of the source.
    """
    if subjects.source is not None or subjects.bank is not None:
        return asked or ANALYSES, ()
    if asked and EWC in asked:
        raise UsageError(
            f"--only {','.join(asked)}: there are no images that {subjects.pretrained.path} knows",
            expected="--source-data DATA or --bank BANK",
            fix=f"finectl bank {subjects.pretrained.path}",
        )
    return asked or (CHAIN, LOSS), ("without images of the source no EWC distance, and no loss on them",)


def costs(config: Config, subjects: Subjects, metric: Objective | None) -> dict[str, Any]:
    """Return what `--dry-run` prints: network calls of each analysis, an image and a step at a time, and memory."""
    found: dict[str, Any] = {
        "models": [str(subjects.finetuned.path), str(subjects.pretrained.path)],
        "source": subjects.source_name,
        "analyses": list(config.chosen),
    }
    if CHAIN in config.chosen:
        steps, images = config.sampling_steps, config.samples if metric else config.pictures
        handed = [steps_handed_over(share, steps) for share in config.shares]
        found["chain_images"] = images * len(handed)
        found["chain_network_calls"] = images * (steps - min(handed))  # the steps that all have in common, once
        found["chain_pretrained_network_calls"] = images * sum(handed)
    if EWC in config.chosen:
        found["fisher_gradients"] = min(config.fisher_images, source_count(subjects)) * config.fisher_draws
        # theta and theta_0, one gradient, all float32, and the sum of squares in float64
        found["fisher_memory_bytes"] = total_parameters(read_config(subjects.pretrained)) * (3 * 4 + 8)
    if LOSS in config.chosen:
        counts = [subjects.target.heldout_count, subjects.source.heldout_count if subjects.source else 0]
        counts[1] = counts[1] or (bank_info(subjects.bank).count if subjects.bank is not None else 0)
        found["loss_network_calls"] = sum(min(config.images, count) for count in counts) * config.draws * 2
    return found


def source_count(subjects: Subjects) -> int:
    """Return how many images there are for the Fisher information."""
    if subjects.bank is not None:
        return bank_info(subjects.bank).count
    return subjects.source.train_count if subjects.source is not None else 0


def run(job: Job[Config]) -> Outcome:
    """Make each analysis that is not there yet, then write numbers, tables and pictures.

    Raises:
        InputError: a file is damaged.
        ComputationError: a weight, an image or a loss is not finite.
        Interrupted: a signal came; the analyses that are done are kept.
    """
    from finectl.stages.forgetting.report import summary, write_report
    from finectl.stages.forgetting.setting import Setting

    setting = Setting(job, Subjects.of(job.config, job.parents))
    job.state.mkdir(parents=True, exist_ok=True)
    found = {name: kept(job, name, lambda name=name: analyse(name, setting)) for name in job.config.chosen}  # type: ignore[misc]
    models = {"finetuned": setting.subjects.finetuned.name, "pretrained": setting.subjects.pretrained.name}
    write_json(job.directory / METRICS_FILE, {**models, **found})
    write_report(job, found)
    return Outcome(metrics={**models, **summary(found)})


def analyse(name: str, setting: Any) -> dict[str, Any]:
    """Make one analysis."""
    if name == CHAIN:
        from finectl.stages.forgetting.chain import chain_of_forgetting

        return chain_of_forgetting(setting)
    if name == EWC:
        from finectl.stages.forgetting.ewc import ewc

        return ewc(setting)
    from finectl.stages.forgetting.losses import losses_by_timestep

    return losses_by_timestep(setting)


STAGE = Stage(
    name="analyse-forgetting",
    version=1,
    makes="analysis",
    config=Config,
    reads=reads,
    plan=plan,
    run=run,
    locations=(
        *("data", "pretrained", "bank", "source_data", "vae", "reference", "text_encoder"),
        *("features_weights", "inception", "clip", "dino"),
    ),
    unchanged_at=unchanged("text_digest"),
)
