"""Exhausted memory, a full disk and forbidden places, however a library reports them, as finectl's own errors."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finectl.artifacts.files import disk_full, is_disk_full
from finectl.errors import OutputError, ResourceError

READ_ONLY_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def resources_as_errors(path: Path) -> Iterator[None]:
    """Turn a full disk and exhausted memory, however a library reports them, into the error with exit code 6.

    Raises:
        ResourceError: disk or memory ran out.
        OutputError: `path`, where the artifact goes, may not be written to.
    """
    try:
        yield
    except ResourceError:
        raise
    except MemoryError as error:
        raise _out_of_memory(error) from error
    except (OSError, RuntimeError) as error:
        if is_disk_full(error):
            raise disk_full(path) from error
        if isinstance(error, OSError) and error.errno in READ_ONLY_ERRORS:
            raise OutputError(
                f"{error.filename or path}: {error.strerror}",
                expected="a directory that can be written to",
                fix="choose another --workspace or --out",
            ) from error
        if "allocate memory" in str(error) or "out of memory" in str(error).lower():
            raise _out_of_memory(error) from error
        raise


def _out_of_memory(error: BaseException) -> ResourceError:
    return ResourceError(
        f"out of memory: {' '.join(str(error).split())[:200] or 'no more can be allocated'}",
        expected="memory for the model, its gradients, two moments and the EMA; --dry-run prints an estimate",
        fix="use a smaller --batch-size or --model; saved state is intact",
    )
