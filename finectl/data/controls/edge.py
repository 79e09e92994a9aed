"""`--control edge`: scikit-image's Canny edges, one pixel wide, white (255) on black (0).

Reference: Canny, A Computational Approach to Edge Detection, IEEE TPAMI 8 (1986).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finectl.data.controls import ControlInfo, Extractor, Setting
from finectl.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHANNELS = 1
SETTINGS = {
    "sigma": Setting(1.0, 0.0, 100.0, "standard deviation of the Gaussian before it, pixels"),
    "low": Setting(0.1, 0.0, 10.0, "gradient above which an edge goes on"),
    "high": Setting(0.2, 0.0, 10.0, "gradient above which an edge begins"),
}


def make(info: ControlInfo, device: str | torch.device) -> Extractor:
    """Return what finds the edges; it runs on the CPU.

    Raises:
        UsageError: an edge would end at a stronger gradient than it begins at.
        InputError: scikit-image is not installed.
    """
    from finectl.data.controls.lines import require_skimage, to_grey

    sigma, low, high = (info.settings[name] for name in ("sigma", "low", "high"))
    if low > high:
        raise UsageError(f"--control-set low={low:g},high={high:g}", expected="low at most high")
    require_skimage(info.name)

    def edges(images: Tensor) -> Tensor:
        import numpy as np
        import torch
        from skimage.feature import canny

        found = [canny(one, sigma=sigma, low_threshold=low, high_threshold=high) for one in to_grey(images).numpy()]
        return torch.from_numpy(np.stack(found).astype(np.uint8) * 255)[:, None]  # (B, 1, H, W)

    return edges
