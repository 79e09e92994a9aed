"""What samples are measured against: a data set, image files, statistics of them, or another tool's .npz. No torch."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finectl.artifacts.store import Workspace
from finectl.artifacts.tensors import read_metadata
from finectl.data.sources import SOURCES, DataInfo, DataOptions, absolute_spec, describe, split_classes
from finectl.errors import InputError, UsageError
from finectl.metrics.features.weights import content_digest

BUNDLED = "bundled"
KIND = "statistics"
FILE = "statistics.safetensors"
NPZ_TENSORS = ("mu", "sigma")
EXPECTED = "a data set as --data takes it, 'bundled', a statistics artifact, a .safetensors file of one, or a .npz file"


@dataclass(frozen=True)
class ReferenceInfo:
    """A reference as far as it decides values.

    Args:
        form: "data" (a data set, all images at one size), "files" (image files as they are), "statistics" (moments and
            rows of features that finectl wrote) or "npz" (moments that another tool wrote).
        name: How the table names it.
        fingerprint: Hash of its content.
        location: The data's specification, or the path of a file.
        part: "train" or "all" of a data set.
        count: Images; None where nobody knows.
        image_size: Side of the images in pixels; 0 where they are as they are, or nobody knows.
        resize_filter: What brought them to that size.
        latents: The autoencoder's record where they are latents.
        recorded: For "statistics" what the file says of itself.
    """

    form: str
    name: str
    fingerprint: str
    location: str
    part: str = "all"
    count: int | None = None
    image_size: int = 0
    resize_filter: str = "none"
    latents: dict[str, Any] | None = None
    recorded: dict[str, Any] | None = None

    def protocol(self) -> dict[str, Any]:
        """Return what two values must have in common to be comparable, of the reference."""
        return {
            "reference": self.name,
            "reference_fingerprint": self.fingerprint,
            "reference_n": self.count,
            "image_size": self.image_size or "as stored",
            "resize_filter": self.resize_filter,
        }


def describe_reference(
    text: str | None,
    data: DataInfo | None,
    image_size: int | None,
    options: DataOptions,
    workspace: Workspace | None = None,
    *,
    as_stored: bool = False,
) -> ReferenceInfo:
    """Find out what `--reference` names, without reading images.

    Args:
        text: The option; None for the training part of `data`.
        data: The data set of the models that are measured.
        image_size: Side of the samples in pixels; a data set is brought to it.
        options: How images are read.
        workspace: Where `statistics/NAME` is looked for.
        as_stored: Whether image files are measured at their own sizes.

    Raises:
        InputError: nothing is there, or it is damaged.
        UsageError: it is none of what may be named.
    """
    if text is None and data is None:
        raise UsageError("there is nothing to compare the images with", expected=f"--reference, {EXPECTED}")
    if text is None or text == BUNDLED:
        bundled = (
            data if data is not None and (text is None or data.bundled) else describe("digits", image_size, options)
        )
        return _of_data(bundled, "train")
    path = Path(text)
    if path.suffix == ".npz":
        return _of_npz(path)
    if path.suffix == ".safetensors":
        return _of_statistics(path, path.stem)
    if path.is_dir() or text.startswith(f"{KIND}/"):
        artifact = (workspace or Workspace()).find(text, [KIND])
        return _of_statistics(artifact.file(FILE), artifact.name)
    if split_classes(text)[0].partition(":")[0] not in SOURCES:
        raise UsageError(f"--reference {text!r} is neither a data set nor a file", expected=EXPECTED)
    located = absolute_spec(text)
    if as_stored and located.startswith("folder:") and not split_classes(located)[1]:
        from finectl.data.files import describe_files

        files = describe_files(located.partition(":")[2], options)
        return ReferenceInfo("files", text, files.fingerprint, located, count=files.count)
    # Latents have the size that they have; their images are compared after decoding.
    return _of_data(describe(located, None if located.startswith("latents:") else image_size, options), "all")


def _of_data(data: DataInfo, part: str) -> ReferenceInfo:
    size = data.image_size * int(data.vae["downscale"]) if data.vae else data.image_size
    return ReferenceInfo(
        "data",
        f"{data.name}/{part}",
        # Of the images without their captions; of some classes, their own.
        data.split_by if data.captions and data.vae is None and not data.whole else data.fingerprint,
        data.name,
        part,
        data.train_count if part == "train" else data.count,
        size,
        data.resize_filter,
        dict(data.vae) if data.vae else None,
    )


def _of_npz(path: Path) -> ReferenceInfo:
    """Describe moments as clean-fid, pytorch-fid and ADM's evaluator write them."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as content:
            names = set(content.files)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} cannot be read as .npz: {error}", expected="arrays mu (d,) and sigma (d, d), no objects"
        ) from error
    if not set(NPZ_TENSORS) <= names:
        raise InputError(
            f"{path} holds {', '.join(sorted(names)) or 'nothing'}", expected="arrays mu (d,) and sigma (d, d)"
        )
    return ReferenceInfo("npz", path.name, content_digest(path), str(path.absolute()))


def _of_statistics(path: Path, name: str) -> ReferenceInfo:
    recorded = read_metadata(path)
    if not isinstance(recorded, dict) or "extractor" not in recorded:
        raise InputError(
            f"{path} holds no statistics of features", expected=f"the {FILE} of a statistics artifact of finectl"
        )
    return ReferenceInfo(
        "statistics",
        str(recorded["reference"]),
        str(recorded["reference_fingerprint"]),
        str(path.absolute()),
        count=recorded["reference_n"],
        image_size=recorded["image_size"] if isinstance(recorded["image_size"], int) else 0,
        resize_filter=str(recorded["resize_filter"]),
        recorded=recorded,
    )


def require_extractor(info: ReferenceInfo, name: str, digest: str, resize: str, dtype: str) -> None:
    """Check that statistics are of the features in which the samples are measured.

    Raises:
        InputError: they are of another network, of other weights, or images reached it in another way.
    """
    if info.recorded is None:
        return
    wanted = {"extractor": name, "extractor_digest": digest, "resize": resize, "dtype": dtype}
    for key, value in wanted.items():
        if info.recorded.get(key) != value:
            raise InputError(
                f"the statistics {info.location} have {key} {str(info.recorded.get(key))[:20]!r}",
                expected=f"{str(value)[:20]!r}, as the samples are measured",
                fix="give the images themselves: --reference folder:PATH",
            )
