"""Memory allocation of long-running CPU work (no torch import)."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_THRESHOLD = -3
M_MMAP_MAX = -4

KEPT_BYTES = 2**31 - 1
LARGE_BYTES = 2**30
PADDING_BYTES = 64 * 2**20


def tune_allocator() -> bool:
    """Make this process keep the memory that it frees; call it before training on a CPU.

    glibc gives blocks above 32 MiB at most, and the free end of the heap, back to the kernel at once, so that a step
    gets zeroed pages for its activations anew. With the pages kept, a step of a DiT-S (batch 16, 64 tokens) takes 0.97
    of the processor time in float32 and 0.96 in bfloat16 autocast (medians of 16 interleaved rounds, one thread); peak
    memory grows by at most 1 %. Huge pages (THP_MEM_ALLOC_ENABLE=1) gave nothing beyond the noise on top of that.

    It changes nothing on a system without glibc, and results nowhere.

    Returns:
        Whether the C library took the settings.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
        libc.gnu_get_libc_version  # noqa: B018  (musl has no mallopt of this meaning, and lacks this symbol)
    except (AttributeError, OSError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    kept = mallopt(M_TRIM_THRESHOLD, KEPT_BYTES) and mallopt(M_TOP_PAD, PADDING_BYTES)
    # Older versions refuse a threshold above 32 MiB; there, no block at all may be a mapping of its own.
    large = mallopt(M_MMAP_THRESHOLD, LARGE_BYTES) or mallopt(M_MMAP_MAX, 0)
    return bool(kept and large)
