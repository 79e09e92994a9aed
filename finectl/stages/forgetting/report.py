"""What `analyse forgetting` writes and shows: tables, pictures, and the few numbers that the manifest keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finectl.artifacts.files import write_atomic
from finectl.artifacts.job import Job
from finectl.artifacts.tensors import load_tensors
from finectl.metrics.plots import available, draw_samples
from finectl.metrics.report import Table
from finectl.metrics.units import measured_texts
from finectl.stages.forgetting import plots
from finectl.stages.forgetting.chain import PICTURES
from finectl.stages.forgetting.config import CHAIN, EWC, LOSS, Config
from finectl.stages.forgetting.losses import NULL
from finectl.stages.forgetting.setting import SOURCE, TARGET
from finectl.stages.forgetting.subjects import FINETUNED, PRETRAINED

Found = Mapping[str, Mapping[str, Any]]
TABLES, PLOTS = "tables.md", "plots"
ROWS_OF_BLOCKS = 40


def write_report(job: Job[Config], found: Found) -> None:
    """Write the tables and draw the pictures of the analyses that were made, and show the tables."""
    tables = {name: TABLE_OF[name](result) for name, result in found.items()}
    for name, table in tables.items():
        job.console.table(TITLES[name], table.columns, table.cells, table.best, table.notes)
    text = "\n".join(f"## {TITLES[name]}\n\n{table.to_markdown()}" for name, table in tables.items())
    write_atomic(job.directory / TABLES, text.encode())
    folder = job.directory / PLOTS
    folder.mkdir(parents=True, exist_ok=True)
    if CHAIN in found:
        pictures = load_tensors(job.directory / PICTURES)
        names = [row_name(point["x"]) for point in found[CHAIN]["points"]]
        draw_samples(folder / "chain-samples.png", [pictures[key] for key in sorted(pictures)], names)
    if not available():
        job.console.note("no plots: matplotlib is not installed (pip install 'finectl[plots]')")
        return
    for name, result in found.items():
        plots.PLOT_OF[name](folder, result)


def row_name(share: float) -> str:
    """Return what the picture calls a share of the steps."""
    note = {0.0: " (fine-tuned alone)", 1.0: " (pre-trained alone)"}.get(share, "")
    return f"x = {100 * share:g} %{note}"


def summary(found: Found) -> dict[str, Any]:
    """Return what the manifest keeps."""
    kept: dict[str, Any] = {}
    if CHAIN in found and found[CHAIN]["metric"] is not None:
        points = found[CHAIN]["points"]
        kept["chain"] = {
            "metric": found[CHAIN]["metric"],
            "x": [point["x"] for point in points],
            "values": [point["value"] for point in points],
            "best_x": best(found[CHAIN])["x"],
        }
    if EWC in found:
        kept["ewc"] = {key: found[EWC][key] for key in ("total", "mean", "parameters")}
    if LOSS in found:
        kept["loss"] = {
            domain: {model: part["models"][model]["value"] for model in (PRETRAINED, FINETUNED)}
            for domain, part in found[LOSS].items()
        }
    return kept


def best(chain: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the point whose images measure best."""
    sign = 1 if chain["better"] == "lower" else -1
    point: Mapping[str, Any] = min(chain["points"], key=lambda point: sign * point["value"])
    return point


def _chain_table(found: Mapping[str, Any]) -> Table:
    points, metric = found["points"], found["metric"]
    measured = [measured_texts(metric, points)] if metric is not None else []
    if metric is not None and points[0]["change"] is not None:
        measured.append(measured_texts(metric, [point["change"] for point in points]))
    values = list(zip(*measured, strict=True)) or [() for _ in points]
    rows = []
    for point, value in zip(points, values, strict=True):
        times = "none" if point["first"] is None else f"t <= {point['first']}"
        rows.append((f"{100 * point['x']:g} %", str(point["steps"]), times, *value))
    titles = (metric, f"difference from x = {100 * points[0]['x']:g} %")[: len(measured)] if metric else ()
    columns = ("x handed over", "steps of the pre-trained model", "its timesteps", *titles)
    how = f"{found['sampling_steps']} steps of {found['scheduler']}"
    notes = [f"{found['samples']:,} images a row from the same noise, {how}"]
    if metric is not None:
        lowest = best(found)
        notes += [
            f"{metric} in features of {found['features']} against {found['reference'] or 'no reference'}; "
            f"{found['better']} is better; ± is half of a 95 % interval, that of differences for pairs of images from "
            "the same noise",
            f"best at x = {100 * lowest['x']:g} %",
        ]
    return Table(columns, tuple(rows), notes=tuple(notes))


def _ewc_table(found: Mapping[str, Any]) -> Table:
    blocks = sorted(found["blocks"], key=lambda part: -part["total"])
    rows = [("all", f"{found['total']:.4g}", "100 %", f"{found['mean']:.3g}", f"{found['parameters']:,}")]
    for part in blocks[:ROWS_OF_BLOCKS]:
        share = part["total"] / found["total"] if found["total"] else 0.0
        rows.append(
            (
                part["name"],
                f"{part['total']:.4g}",
                f"{100 * share:.1f} %",
                f"{part['mean']:.3g}",
                f"{part['parameters']:,}",
            )
        )
    of = "images of the bank" if found["of"] == "bank" else f"training images of {found['source']}"
    notes = [
        f"sum of F_i (theta_i - theta_0,i)^2; F from {found['images'] * found['draws']:,} gradients of single images: "
        f"{found['images']:,} {of}, {found['draws']} timesteps and noises each"
    ]
    notes += [
        f"{count:,} rows of {name} are left out: their labels do not mean the same in both models"
        for name, count in found["left_out"].items()
    ]
    columns = ("block", "EWC distance", "share", "mean a parameter", "parameters")
    return Table(columns, tuple(rows), notes=tuple(notes))


def _loss_table(found: Mapping[str, Any]) -> Table:
    rows, notes = [], []
    for domain in (SOURCE, TARGET):
        if domain not in found:
            continue
        part = found[domain]
        models = part["models"]
        texts = measured_texts("loss", [models[PRETRAINED], models[FINETUNED], part["difference"]])
        labelled = [f"{model} {loss['value']:.4f}" for model, loss in part["labelled"].items()]
        rows.append((domain, part["data"], part["compared"], *texts, "; ".join(labelled) or "-"))
        notes.append(f"{domain}: {part['images']:,} images, {part['draws']} draws each, the same noise for both models")
    if any(part["compared"] == NULL for part in found.values()):
        notes.append("both models get no class where one of them was not trained on the classes")
    columns = ("domain", "images", "given", PRETRAINED, FINETUNED, "difference", "with its labels")
    return Table(columns, tuple(rows), notes=tuple(notes))


TITLES = {
    CHAIN: "Chain of forgetting: the last steps handed over to the pre-trained model",
    EWC: "EWC distance of the fine-tuned weights",
    LOSS: "Held-out loss of both models",
}
TABLE_OF = {CHAIN: _chain_table, EWC: _ewc_table, LOSS: _loss_table}
