"""Memory allocation."""
import ctypes, os
def tune_allocator() -> bool:
    mode=os.environ.get("MODE","")
    if "thp" in mode: os.environ["THP_MEM_ALLOC_ENABLE"]="1"
    if "malloc" in mode:
        libc=ctypes.CDLL(None)
        libc.mallopt(-3, 1<<30), libc.mallopt(-1, 2**31-1), libc.mallopt(-2, 64<<20)
    if "mmax" in mode:
        libc=ctypes.CDLL(None)
        libc.mallopt(-4, 0)
    return False
