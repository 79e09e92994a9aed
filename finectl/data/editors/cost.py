"""What editing costs, as it is said before it begins."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finectl.data.concepts import Concept
from finectl.data.editors import FOLDER, EditOptions, EditorSpec, load_editor, network_calls

if TYPE_CHECKING:
    import torch


def cost_of(
    editors: Sequence[EditorSpec], options: EditOptions, concepts: int, images: int, best_of: int, size: int
) -> dict[str, Any]:
    """Return what the work costs, as far as it can be said without doing any.

    Args:
        editors: The editors.
        options: How diffusion editors work.
        concepts: Number of concepts.
        images: Number of source images, at most.
        best_of: Edits of an image by each editor.
        size: Side of the images that are kept, in pixels.
    """
    made = 0 if editors[0].name == FOLDER else concepts * images * best_of
    return {
        "concepts": concepts,
        "images": images,
        "pairs": concepts * images,
        "edits": made * len(editors),
        "network_calls": made * sum(network_calls(editor, options) for editor in editors),
        "disk_bytes": (concepts + 1) * images * 3 * size**2,
    }


def cost_note(cost: dict[str, Any], editors: Sequence[EditorSpec]) -> str:
    """Return one line that says what the work costs."""
    calls = f", {cost['network_calls']:,} evaluations of diffusion networks" if cost["network_calls"] else ""
    return (
        f"{cost['concepts']:,} concepts x at most {cost['images']:,} images by {', '.join(map(str, editors))}: "
        f"{cost['edits']:,} edits{calls}, {cost['disk_bytes'] / 1e6:,.1f} MB"
    )


def seconds_of(
    editors: Sequence[EditorSpec],
    options: EditOptions,
    edits: int,
    concept: Concept,
    size: int,
    device: torch.device,
    dtype: str,
) -> dict[str, Any]:
    """Edit one image of `size` pixels by each editor, and return the seconds of one edit and of `edits` of them."""
    import torch

    image = torch.arange(3 * size * size).remainder(256).to(torch.uint8).reshape(1, 3, size, size)
    seconds = 0.0
    for spec in editors:
        editor = load_editor(spec, options, device, dtype)
        editor.edit(image, concept, [0], 0)  # the first call imports and allocates
        start_s = time.perf_counter()
        editor.edit(image, concept, [0], 0)
        seconds += time.perf_counter() - start_s
    mean_s = seconds / len(editors)
    return {"seconds_an_edit": round(mean_s, 6), "seconds": round(mean_s * edits, 3)}
