"""Files of weights that are not bundled: what they are called, where they come from, where they lie. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from finectl import hub
from finectl.artifacts.cache import cache_root, remembered_sha256
from finectl.errors import FinectlError, InputError
from finectl.metrics import METRICS

WITHOUT = "--metrics loss, and on the digits frechet and accuracy, need no file of weights"


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights that others publish.

    Args:
        file: Its usual name.
        url: Its usual address.
        sha256: sha256 of its bytes in hex, or the first digits of it as far as they are known; None: not known.
        option: The option that names another place for it.
        what: What it holds, for messages.
    """

    file: str
    url: str
    sha256: str | None
    option: str
    what: str


WEIGHTS: Mapping[str, WeightsFile] = {
    "inception": WeightsFile(
        "inception-2015-12-05.pt",
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
        "--inception",
        "the Inception network of 2015",
    ),
    "dinov2": WeightsFile(
        "dinov2_vitl14_pretrain.pth",
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        None,
        "--dino",
        "the DINOv2 network ViT-L/14",
    ),
    "lpips": WeightsFile(
        "alexnet-owt-7be5be79.pth",
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "7be5be79",
        "--lpips",
        "torchvision's AlexNet",
    ),
}


def cached_file(name: str) -> Path:
    """Return where a file of weights of `WEIGHTS` is in the cache, or would be."""
    return cache_root() / "weights" / WEIGHTS[name].file


def locate(name: str, given: str | None) -> Path:
    """Return where a file of weights is on this machine; with the permission to use the network it is fetched.

    Args:
        name: Key of `WEIGHTS`.
        given: The file that the user named; any content will do, its digest is recorded with what it measures.

    Returns:
        That file, or the one of the usual name in the cache.

    Raises:
        InputError: there is no such file, and it may not or cannot be fetched.
        OutputError: the cache cannot be written.
        ResourceError: the disk is full.
    """
    entry = WEIGHTS[name]
    cached = cached_file(name)
    by_hand = f"copy it from {entry.url} to {cached}, or name your copy with {entry.option} FILE; {WITHOUT}"
    if given is not None:
        path = Path(given).expanduser()
        if path.is_file():
            return path
        problem = "is a folder" if path.is_dir() else "is not there"
        raise InputError(
            f"{entry.option} {given} {problem}",
            expected=f"a file: {entry.what}, usually called {entry.file}",
            fix=f"name that file, or leave {entry.option} out and fetch it with --download; or {by_hand}",
        )
    if cached.is_file():
        return cached
    if hub.is_offline():
        raise InputError(
            f"{entry.what}, {entry.file}, is not on this machine, and the network is not to be used",
            expected=f"the file {cached}, for {_served(name)}",
            fix=f"fetch it with --download, or {by_hand}",
        )
    return hub.fetch_file(entry.url, cached, entry.sha256, by_hand=by_hand)


def content_digest(path: Path) -> str:
    """Return the sha256 (hex) of a file; it is remembered in the cache for as long as the file does not change.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        return remembered_sha256(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _served(name: str) -> str:
    """Return the metrics that need a file, in one line."""
    return ", ".join(metric for metric in METRICS if name in (metric, METRICS[metric].features))


def _unreadable(path: Path, error: OSError) -> FinectlError:
    return InputError(f"{path} cannot be read: {error.strerror}", expected="a file of weights")
