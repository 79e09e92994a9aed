"""The CLIP score: how well generated images agree with the prompts they were made from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finectl.errors import InputError
from finectl.metrics.measured import Measured

if TYPE_CHECKING:
    from torch import Tensor

SCALE = 100.0


def clip_score(images: Tensor, texts: Tensor) -> Measured:
    """Return the mean over pairs of max(100 cos(image, text), 0).

    The paper scales by 2.5; 100 is what is reported in tables, torchmetrics' among them. That program clips the mean
    at 0 and not each pair, which differs only where pairs point away from one another.

    Args:
        images: (N, d) embeddings of the images, of any length and float dtype, N at least 1.
        texts: (N, d) embeddings of their prompts, in the same order.

    Returns:
        The score, 0 to 100, with its interval over the images.

    Raises:
        InputError: the shapes differ, or there are no pairs.

    Reference: Hessel et al., arXiv 2104.08718, section 3.
    """
    from torch.nn.functional import normalize

    if images.ndim != 2 or images.shape != texts.shape or len(images) == 0:
        raise InputError(
            f"the CLIP score got images of shape {tuple(images.shape)} and prompts of shape {tuple(texts.shape)}",
            expected="one embedding (N, d) an image and one a prompt, of the same network",
        )
    cosines = (normalize(images.double(), dim=1) * normalize(texts.double(), dim=1)).sum(dim=1)  # (N,)
    return Measured.mean_of((SCALE * cosines).clamp(min=0.0))
