"""What the options of `finectl finetune` come to with a model, a data set and a bank: no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from finectl.adapters.peft.table import require_peft, result_config, trainable_parameters
from finectl.artifacts.job import Execution, Plan
from finectl.artifacts.store import Artifact
from finectl.data.bank import bank_info, require_bank_of
from finectl.data.classes import have_same_labels
from finectl.data.sources import DataInfo
from finectl.errors import UsageError
from finectl.models.io import ModelConfig, read_config, total_parameters
from finectl.models.label_rows import NEW, REUSE, has_label_table, require_rows, with_classes
from finectl.stages.finetune.config import OWN, PAPER, SMALL, Config, canonical, peft_of
from finectl.training.chain_settings import BANK, DIFF_TUNING, FULL, KD, NO_RETENTION, chain_of, resolve_chain
from finectl.training.estimate import measure_training, training_estimate
from finectl.training.settings import (
    describe_settings,
    require_images,
    resolve_settings,
    settings_of,
    settled_betas,
)
from finectl.training.text_settings import resolve_captioned


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Resolve the options against the model, the data set and the bank.

    Raises:
        InputError: the data, the text encoder or the bank do not fit the model, or a class has no row.
        UsageError: options contradict each other, or the model has no room for `--peft`.
    """
    base, model = parents[0], read_config(parents[0])
    config, peft = replace(config, **resolve_chain(config)), peft_of(config)
    require_peft(model, peft)
    data, fields = _data_of(config, parents, model)
    require_images(base, data)
    _require_teacher(config, base, model)
    if len(parents) > 1:
        require_bank_of(parents[1], base)
    small, paper = ({**usual, "lr": usual["lr"] * peft.lr_scale} for usual in (SMALL, PAPER))
    resolved = replace(
        config,
        **fields,
        **resolve_settings(config, data.bundled, small=small, paper=paper),
        betas=settled_betas(config.betas),
        bank=str(parents[1].path.absolute()) if len(parents) > 1 else None,
        label_rows=_label_rows(config, base, model, data),
        bank_labels=_bank_labels(config, base, model, data),
        peft_set=canonical(peft),
    )
    settings, student = settings_of(resolved), student_config(resolved, model, data.num_classes)
    described = description(resolved, parents, student)
    estimate = training_estimate(
        result_config(student, peft),
        settings,
        teacher=model if resolved.retention == KD else None,
        trained=described["trainable_parameters"],
    )
    tuned = f"-{peft.method}" if peft else ""
    notes = _notes(described, data, own=resolved.bank_labels == OWN)
    return Plan(
        resolved,
        slug=f"{base.name.rsplit('-', 1)[0]}-{config.method}{tuned}-t{settings.steps}",
        data=data,
        summary={**described, **estimate},
        notes=(f"fine-tuning on {data.name}: {describe_settings(settings)}", *notes),
    )


def _data_of(config: Config, parents: Sequence[Artifact], model: ModelConfig) -> tuple[DataInfo, dict[str, Any]]:
    """Describe the data at the model's size, and where they have another one only, at that."""
    try:
        return resolve_captioned(config, parents, model, model.image_size)
    except UsageError:
        if config.image_size is not None:
            raise
        return resolve_captioned(config, parents, model)


def student_config(config: Config, model: ModelConfig, classes: int) -> ModelConfig:
    """Return the architecture that is tuned: the model's, with rows for the classes of the data.

    Args:
        config: The resolved options.
        model: The pre-trained architecture.
        classes: Classes of the data.
    """
    if config.label_rows is None:
        return model
    return with_classes(model, classes, null=config.retention not in (None, NO_RETENTION))


def description(config: Config, parents: Sequence[Artifact], student: ModelConfig) -> dict[str, Any]:
    """Return what is trained and how, for the manifest and for `--dry-run`.

    Args:
        config: The resolved options.
        parents: The model, and the bank if there is one.
        student: What `student_config` returned.
    """
    peft, chain, model = peft_of(config), chain_of(config, config.batch_size or 0), read_config(parents[0])
    found: dict[str, Any] = {
        "method": config.method,
        "shots": config.shots,
        "parameters": total_parameters(result_config(student, peft)),
        "trainable_parameters": trainable_parameters(student, peft),
        "peft": peft.to_dict(),
        "label_rows": None,
    }
    if config.label_rows is not None:
        null = "kept" if model.has_null_class else "mean of the rows" if student.has_null_class else None
        found["label_rows"] = {"rows": config.label_rows, "classes": student.num_classes, "null": null}
    if chain is None:
        return {**found, "batch": {"target": config.batch_size}}
    found |= {
        "batch": {"retained": chain.retained, "target": chain.new},
        "coefficients": chain.coefficients,
        "mean_timestep": chain.mean_timesteps(model.diffusion.timesteps),
        "retention": config.retention,
    }
    if len(parents) > 1:
        found["bank"] = {**_banked(parents[1]), "labels": config.bank_labels}
    return found


def _banked(bank: Artifact) -> dict[str, Any]:
    info = bank_info(bank)
    told = {name: getattr(info, name) for name in ("count", "space", "guidance", "scheduler", "sampling_steps")}
    return {"digest": bank.manifest.digest, **told}


def _label_rows(config: Config, base: Artifact, model: ModelConfig, data: DataInfo) -> str | None:
    """Return what becomes of the label table; None for a model without one.

    Raises:
        UsageError: the model has none, and the options ask for rows.
        InputError: there are more classes than rows.
    """
    if not has_label_table(model):
        if config.label_rows is not None:
            raise UsageError(
                f"--label-rows {config.label_rows}: {base.path} has no label table",
                expected="a model with classes",
                fix="leave --label-rows out: the labels of the data are not read",
            )
        return None
    rows = config.label_rows or (REUSE if have_same_labels(base.manifest.data, data) else NEW)
    if rows == REUSE:
        require_rows(model, data.num_classes, data.name)
    return rows


def _bank_labels(config: Config, base: Artifact, model: ModelConfig, data: DataInfo) -> str | None:
    """Return `own` if the bank's images keep their classes; None if they are retained under no class.

    Raises:
        UsageError: there is no bank, or its classes are others than those that are learned.
    """
    if config.bank_labels is None:
        return None
    told = f"--bank-labels {config.bank_labels}"
    if config.method == FULL or config.retention != BANK:
        raise UsageError(
            f"{told}: no bank is retained",
            expected=f"--method {DIFF_TUNING} --retention {BANK}",
            fix="leave --bank-labels out",
        )
    if config.bank_labels != OWN:
        return None
    if not has_label_table(model):
        raise UsageError(f"{told}: {base.path} has no label table", fix="leave --bank-labels out")
    if config.label_rows == NEW or not have_same_labels(base.manifest.data, data):
        raise UsageError(
            f"{told}: the classes of {data.name} are others than those of the images that {base.path} makes",
            expected="more classes of the set that it was trained on (digits#0,1, then digits#2), whose rows stay",
            fix="leave --bank-labels out: what the model knows is then retained under no class",
        )
    return OWN


def _require_teacher(config: Config, base: Artifact, model: ModelConfig) -> None:
    """Check that the pre-trained model can predict without a class, which a teacher is asked for.

    Raises:
        UsageError: it cannot.
    """
    if config.retention == KD and has_label_table(model) and not model.has_null_class:
        raise UsageError(
            f"--retention {KD}: {base.path} has {model.num_classes} classes and none that stands for no class",
            expected="a model that predicts without a class",
            fix=f"--retention {BANK}; or, if the last row of its table is the null class, import it again with "
            "--num-classes",
        )


def _notes(described: dict[str, Any], data: DataInfo, *, own: bool) -> list[str]:
    """Return what was decided, one line each."""
    rows, batch, trained = described["label_rows"], described["batch"], described["trainable_parameters"]
    notes = ["the model has no label table: labels are not read"]
    if rows is not None:
        origin = "drawn anew" if rows["rows"] == NEW else "the model's own first ones"
        null = f"; null class: {rows['null']}" if rows["null"] else ""
        notes = [f"label table: rows of the {rows['classes']} classes of {data.name}: {origin}{null}"]
    if described["method"] != FULL:
        means = {name: f" at mean timestep {mean:.0f}" for name, mean in described["mean_timestep"].items()}
        of = f"{described['retention']}, in their classes" if own else described["retention"]
        kept = f"{batch['retained']} retained images ({of}){means.get('retained', '')}, "
        new = f"{batch['target']} new ones{means['target']}; coefficients as {described['coefficients']}"
        notes.append(f"a batch: {kept if batch['retained'] else ''}{new}")
    if described["shots"]:
        notes.append(f"{described['shots']} images a class, chosen by --seed")
    share = 100 * trained / described["parameters"]
    return [*notes, f"training {trained:,} of {described['parameters']:,} parameters ({share:.3g} %)"]


def measure(plan: Plan[Config], parents: Sequence[Artifact], execution: Execution) -> dict[str, Any]:
    """Time a step, for `--dry-run`; of a teacher's forward pass the share of the images that it sees."""
    config, model, peft = plan.config, read_config(parents[0]), peft_of(plan.config)
    rows = plan.summary["label_rows"]
    student, settings = student_config(config, model, rows["classes"] if rows else 0), settings_of(config)

    def adapt(network: Any) -> Any:
        from finectl.adapters.peft.tuning import tune

        return tune(network, peft, 0).model

    trained = plan.summary["trainable_parameters"]
    measured = measure_training(student, settings, execution, adapt=adapt if peft else None, trained=trained)
    if config.retention == KD:
        both = measure_training(
            student, settings, execution, teacher=model, adapt=adapt if peft else None, trained=trained
        )
        share = plan.summary["batch"]["retained"] / settings.batch_size
        step_s = measured["step_s"] + share * max(both["step_s"] - measured["step_s"], 0.0)
        measured = {**both, "step_s": round(step_s, 4), "training_s": round(step_s * settings.steps)}
    return {**measured, "steps_per_s": round(1 / measured["step_s"], 4)}
