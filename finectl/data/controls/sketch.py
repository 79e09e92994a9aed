"""`--control sketch`: soft lines, white on black, by an extended difference of Gaussians.

With the grey image blurred at two scales, D = (1 + p) G_sigma - p G_(k sigma); a pixel counts 1 where D is at least
the level, else 1 + tanh(slope (D - level)): paper that is white but for dark, soft lines. The control is its inverse,
lines on black like a scribble. The level is relative to the image's own brightness around the pixel, so that a dark
image is not one large stroke.

Reference: Winnemoeller, Kyprianidis and Olsen, XDoG, Computers & Graphics 36 (2012), Eq. 5 and 7.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finectl.data.controls import ControlInfo, Extractor, Setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHANNELS = 1
SETTINGS = {
    "sigma": Setting(0.8, 0.1, 100.0, "standard deviation of the narrow Gaussian, pixels"),
    "ratio": Setting(1.6, 1.01, 100.0, "of the wide Gaussian's to it"),
    "sharpness": Setting(2.0, 0.0, 1000.0, "p, weight of the difference"),
    "slope": Setting(10.0, 0.1, 1000.0, "how hard lines are"),
}


def make(info: ControlInfo, device: str | torch.device) -> Extractor:
    """Return what draws the lines; it runs on the CPU.

    Raises:
        InputError: scikit-image is not installed.
    """
    from finectl.data.controls.lines import require_skimage, to_grey

    sigma, ratio, sharpness, slope = (info.settings[name] for name in SETTINGS)
    require_skimage(info.name)

    def lines(images: Tensor) -> Tensor:
        import numpy as np
        import torch
        from skimage.filters import gaussian

        drawn = []
        for grey in to_grey(images).numpy():  # (H, W)
            narrow, wide = gaussian(grey, sigma), gaussian(grey, ratio * sigma)
            # (1 + p) narrow - p wide, less its level `wide`: what is darker than what surrounds it is a line.
            below = np.minimum((1 + sharpness) * (narrow - wide), 0.0)
            drawn.append(-np.tanh(slope * below))
        return torch.from_numpy(np.rint(np.stack(drawn) * 255).astype(np.uint8))[:, None]

    return lines
