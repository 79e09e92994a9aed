"""Files of the Hugging Face hub and of other addresses: the one place that may touch the network. No torch.

`HF_HUB_OFFLINE=1`, which the command line sets unless `--download` is given, keeps it away from the network.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from finectl.errors import FinectlError, InputError, OutputError, ResourceError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WEB = "https://huggingface.co"
YES = ("1", "on", "yes", "true")
SHOWN_CHARACTERS = 200
SHOWN_DIGITS = 16
SCHEMES = ("https",)
TIMEOUT_S = 60.0  # without a byte
CHUNK_BYTES = 1 << 20
DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)


def is_offline() -> bool:
    """Tell whether the network is out of bounds."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in YES


def is_hub_id(name_or_path: str) -> bool:
    """Tell whether a name is that of a repository on the hub: `OWNER/NAME`, and no path that is there."""
    return not Path(name_or_path).expanduser().exists() and HUB_ID.fullmatch(name_or_path) is not None


def local_folder(name_or_path: str, what: str, patterns: Sequence[str]) -> Path:
    """Return where on this machine a model is that a path or a hub id names.

    Args:
        name_or_path: A path, which is returned as it is, or the id of a repository on the hub.
        what: What it is, for messages, such as "the autoencoder".
        patterns: The files that are wanted of a repository, as globs.

    Returns:
        The path, or the snapshot's folder in the hub's cache. Not all of the files need be in it.

    Raises:
        InputError: nothing is there, or the repository is not in the cache and may not or cannot be fetched.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    if not is_hub_id(name_or_path):
        raise InputError(
            f"there is no {name_or_path[:SHOWN_CHARACTERS]!r}, which is to be {what}",
            expected=f"a folder that holds {_listed(patterns)}, or a hub id",
            fix="give the path of such a folder, or a hub id (OWNER/NAME) with --download",
        )
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise InputError(
            f"huggingface_hub is needed to find {name_or_path} and is not installed", fix="pip install huggingface_hub"
        ) from error
    # Its errors have no base of their own, and differ from version to version.
    refusals: tuple[type[Exception], ...] = (OSError, *(value for value in vars(errors).values() if _is_error(value)))
    try:
        return Path(snapshot_download(name_or_path, allow_patterns=list(patterns), local_files_only=is_offline()))
    except refusals as error:
        raise _not_to_be_had(name_or_path, what, patterns, error) from error


def fetch_file(url: str, target: Path, sha256: str | None, *, by_hand: str = "") -> Path:
    """Fetch a file from an address; under its name it is there as a whole or not at all.

    Args:
        url: Where it is, over https.
        target: Where it is put; missing folders are made.
        sha256: sha256 (hex) that its bytes must have, or the first digits of it; None: any.
        by_hand: For messages, what else the user can do.

    Returns:
        `target`.

    Raises:
        InputError: the network is not to be used, the file cannot be had, or it is another one.
        OutputError: `target` cannot be written.
        ResourceError: the disk is full.
    """
    if is_offline():
        raise InputError(f"{url} is to be fetched, and the network is not to be used", fix=by_hand or "--download")
    digest = hashlib.sha256()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            for chunk in _chunks(url, by_hand):
                digest.update(chunk)
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
        if not digest.hexdigest().startswith(sha256 or ""):
            raise InputError(
                f"{url} gave a file with the sha256 {digest.hexdigest()[:SHOWN_DIGITS]}...; it is not kept",
                expected=f"the sha256 {sha256}",
                fix=by_hand,
            )
        os.replace(temporary, target)
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return target


def _chunks(url: str, by_hand: str) -> Iterator[bytes]:
    """Yield what an address holds, bit by bit; its errors are those of the network, not those of the disk."""
    from http.client import HTTPException
    from urllib.request import urlopen

    try:
        _require_scheme(url)
        with urlopen(url, timeout=TIMEOUT_S) as response:  # noqa: S310 - the scheme was checked
            _require_scheme(response.url)  # it may have led elsewhere
            stated, received = response.headers.get("Content-Length"), 0
            while chunk := response.read(CHUNK_BYTES):
                received += len(chunk)
                yield chunk
            if stated is not None and received != int(stated):
                raise OSError(f"the connection ended after {received:,} of {int(stated):,} bytes")
    except (OSError, HTTPException, ValueError) as error:
        reason = " ".join(str(error).split())[:SHOWN_CHARACTERS] or type(error).__name__
        raise InputError(f"{url} cannot be fetched: {reason}", fix=by_hand) from error


def _require_scheme(url: str) -> None:
    scheme = url.partition(":")[0]
    if scheme not in SCHEMES:
        raise OSError(f"{scheme} is not one of {', '.join(SCHEMES)}")


def _unwritable(target: Path, error: OSError) -> FinectlError:
    if error.errno in DISK_FULL_ERRORS:
        return ResourceError(f"no space left on the disk while writing {target}", fix="free some space")
    return OutputError(f"{target} cannot be written: {error.strerror}", fix="FINECTL_CACHE=DIR names another place")


def _not_to_be_had(name: str, what: str, patterns: Sequence[str], error: Exception) -> InputError:
    """Return the error for a repository that is not in the cache, or that the hub does not give."""
    by_hand = f"copy {_listed(patterns)} of {WEB}/{name} into a folder and give its path"
    if is_offline():
        return InputError(
            f"{what}, {name}, is not in the hub's cache on this machine, and the network is not to be used",
            expected=f"{name} in {_cache()}, or a folder with its files",
            fix=f"fetch it with --download, or {by_hand}",
        )
    reason = " ".join(str(error).split())[:SHOWN_CHARACTERS] or type(error).__name__
    return InputError(f"{what}, {name}, cannot be fetched from the hub: {reason}", fix=by_hand)


def _is_error(value: Any) -> TypeGuard[type[Exception]]:
    return isinstance(value, type) and issubclass(value, Exception) and value is not Exception


def _cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _listed(patterns: Sequence[str]) -> str:
    return ", ".join(patterns) or "its files"
