"""What `analyse` writes and shows: tables, pictures, and the few numbers that the manifest keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from finectl.artifacts.files import write_atomic
from finectl.artifacts.job import Job
from finectl.metrics.plots import available
from finectl.metrics.report import Table
from finectl.stages.analyse import plots
from finectl.stages.analyse.config import ACTIVATIONS, COSINES, GRADIENTS, LANDSCAPE, NORMS, Config
from finectl.stages.analyse.vectors import in_order

Found = Mapping[str, Mapping[str, Any]]
TABLES = "tables.md"
PLOTS = "plots"


def write_report(job: Job[Config], names: Sequence[str], found: Found) -> None:
    """Write the tables and draw the pictures of the analyses that were made, and show the tables.

    Args:
        job: The run.
        names: The models.
        found: The analyses, by name.
    """
    tables = {name: TABLE_OF[name](names, result) for name, result in found.items()}
    for title, table in tables.items():
        job.console.table(TITLES[title], table.columns, table.cells, table.best, table.notes)
    text = "\n".join(f"## {TITLES[name]}\n\n{table.to_markdown()}" for name, table in tables.items())
    write_atomic(job.directory / TABLES, text.encode())
    if not available():
        job.console.note("no plots: matplotlib is not installed (pip install 'finectl[plots]')")
        return
    folder = job.directory / PLOTS
    folder.mkdir(parents=True, exist_ok=True)
    for name, result in found.items():
        plots.PLOT_OF[name](folder, names, result)


def summary(found: Found) -> dict[str, Any]:
    """Return what the manifest keeps: one number a model, or a pair of models."""
    kept: dict[str, Any] = {}
    if NORMS in found:
        whole = found[NORMS]["whole"]
        kept |= {"task_vector_norms": whole["norms"], "relative_norms": whole["relative"]}
    if COSINES in found:
        kept["task_vector_cosines"] = found[COSINES]["whole"]
    if GRADIENTS in found:
        kept["gradient_cosines"] = {key: found[GRADIENTS][key] for key in ("within", "between")}
    if LANDSCAPE in found:
        kept["landscape"] = {point["name"]: point["loss"] for point in found[LANDSCAPE]["points"]}
        kept["landscape_least"] = least(found[LANDSCAPE])
    if ACTIVATIONS in found:
        kept["activation_ratios"] = [mean_ratio(model["blocks"]) for model in found[ACTIVATIONS]["models"]]
    return kept


def least(landscape: Mapping[str, Any]) -> dict[str, float]:
    """Return the grid's point of least loss."""
    loss, row, column = min((loss, i, j) for i, row in enumerate(landscape["loss"]) for j, loss in enumerate(row))
    return {"a": landscape["a"][column], "b": landscape["b"][row], "loss": loss}


def mean_ratio(blocks: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Return the mean over blocks of the variance between channels divided by that between positions."""
    ratios = [block["ratio"] for block in blocks.values() if block["ratio"] is not None]
    return fmean(ratios) if ratios else None


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _norms_table(names: Sequence[str], found: Mapping[str, Any]) -> Table:
    whole, blocks = found["whole"], found["blocks"]
    rows = []
    for index, name in enumerate(names):
        shares = {block: part["relative"][index] for block, part in blocks.items() if part["relative"][index]}
        most = max(shares, key=lambda block: shares[block], default=None)
        rows.append(
            (
                name,
                _number(whole["norms"][index]),
                _number(whole["relative"][index]),
                _number(whole["quantiles"][index][2]),
                "-" if most is None else f"{most} ({_number(shares[most], 3)})",
            )
        )
    columns = ("model", "|tau|", "|tau|/|theta_0|", "median of entries", "moved most (relative)")
    return Table(columns, tuple(rows))


def _cosines_table(names: Sequence[str], found: Mapping[str, Any]) -> Table:
    rows = [(name, *(f"{value:.3f}" for value in row)) for name, row in zip(names, found["whole"], strict=True)]
    return Table(("model", *names), tuple(rows))


def _gradients_table(names: Sequence[str], found: Mapping[str, Any]) -> Table:
    values = found["cosines"]
    neighbours = fmean(values[i][i + 1] for i in range(len(values) - 1)) if len(values) > 1 else None
    farthest = values[0][-1] if len(values) > 1 else None
    rows = [
        ("timesteps of one range", _number(found["within"])),
        ("timesteps of two ranges", _number(found["between"])),
        ("neighbouring timesteps", _number(neighbours)),
        ("first and last timestep", _number(farthest)),
    ]
    note = f"gradients of {len(values)} timesteps at theta_0, over {found['images']} training images"
    return Table(("pairs", "mean cosine"), tuple(rows), notes=(note,))


def _landscape_table(names: Sequence[str], found: Mapping[str, Any]) -> Table:
    rows: list[tuple[str, ...]] = [
        (
            point["name"],
            f"{point['place'][0]:.4g}, {point['place'][1]:.4g}",
            f"{point['inside']:.0%}",
            _number(point["loss"], 5),
            _number(point.get("own_loss", point["loss"]), 5),
        )
        for point in found["points"]
    ]
    best = least(found)
    rows.append(("least on the grid", f"{best['a']:.4g}, {best['b']:.4g}", "100%", *[_number(best["loss"], 5)] * 2))
    note = f"{found['images']} held-out images, {found['draws']} draws each, the same noise at every point"
    return Table(("point", "place", "in the plane", "loss there", "loss of the model"), tuple(rows), notes=(note,))


def _activations_table(names: Sequence[str], found: Mapping[str, Any]) -> Table:
    rows = [
        (model["name"], where, _number(block["change"], 3), _number(_relative(block), 3), _number(block["ratio"], 3))
        for model in found["models"]
        for where, block in sorted(model["blocks"].items(), key=lambda item: in_order(item[0]))
    ]
    columns = ("model", "block", "mean change", "relative to |F|", "variance by channel / by position")
    return Table(columns, tuple(rows), notes=(f"{found['images']} held-out images, at timesteps of each range",))


def _relative(block: Mapping[str, Any]) -> float | None:
    return block["change"] / block["before"] if block["before"] else None


TITLES = {
    NORMS: "Task vectors: norms",
    COSINES: "Task vectors: cosines",
    GRADIENTS: "Gradient similarity between timesteps",
    LANDSCAPE: "Held-out loss in the plane of two task vectors",
    ACTIVATIONS: "Change of blocks' outputs",
}
TABLE_OF = {
    NORMS: _norms_table,
    COSINES: _cosines_table,
    GRADIENTS: _gradients_table,
    LANDSCAPE: _landscape_table,
    ACTIVATIONS: _activations_table,
}
