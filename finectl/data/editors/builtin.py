"""The builtin editor: the edits of `finectl.data.edits`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finectl.data.concepts import Concept
from finectl.data.edits import apply


class Builtin:
    """See `finectl.data.editors.ImageEditor`; what it makes depends on the image alone."""

    def __init__(self, *_: Any) -> None:
        pass

    def edit(self, images: Tensor, concept: Concept, rows: Sequence[int], draw: int) -> Tensor:
        """Edit images uint8 (B, 3, H, W)."""
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        edited = np.stack([apply(concept.edit, image) for image in pixels])
        return torch.from_numpy(edited).permute(0, 3, 1, 2).contiguous()
