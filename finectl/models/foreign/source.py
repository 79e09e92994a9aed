"""What SOURCE of `finectl convert` is: a file or a folder, of which format, with which weights (no torch import)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finectl.artifacts.files import read_json_object, sha256_file, sha256_json
from finectl.artifacts.manifest import NAME as MANIFEST
from finectl.artifacts.tensors import tensor_shapes
from finectl.errors import InputError, UsageError
from finectl.hub import HUB_ID, local_folder
from finectl.models.foreign import diffusers_dit, diffusers_unet, edm, published_dit
from finectl.models.foreign.readers import SafetensorsReader, sharded_files
from finectl.registry import Entry, Registry, nearest

FORMATS = Registry(
    "format",
    {
        published_dit.NAME: Entry("finectl.models.foreign.published_dit", "facebookresearch/DiT: .pt or .safetensors"),
        diffusers_dit.NAME: Entry("finectl.models.foreign.diffusers_dit", "DiTPipeline or DiTTransformer2DModel"),
        diffusers_unet.NAME: Entry(
            "finectl.models.foreign.diffusers_unet", "DDPMPipeline, StableDiffusionPipeline, UNet2D(Condition)Model"
        ),
        edm.NAME: Entry("finectl.models.foreign.edm", "EDM state dict of the ADM architecture (DhariwalUNet)"),
    },
)
UNKNOWN_YET = "pytorch"
"""A file of PyTorch, which is opened only when the work starts."""

PIPELINES = {
    "DiTPipeline": "transformer",
    "DDPMPipeline": "unet",
    "DDIMPipeline": "unet",
    "StableDiffusionPipeline": "unet",
}
"""Pipeline -> the folder of the network that is trained."""

MODEL_CLASSES = {
    **dict.fromkeys(diffusers_dit.CLASSES, diffusers_dit.NAME),
    **dict.fromkeys(diffusers_unet.ARCHITECTURE_OF, diffusers_unet.NAME),
}
INDEX = "model_index.json"
MODEL_CONFIG = "config.json"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
OWN = "finectl.json"
OWN_WEIGHTS = "dit.safetensors"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
RAW_WEIGHTS = "diffusion_pytorch_model.non_ema.safetensors"
PICKLED_WEIGHTS = "diffusion_pytorch_model.bin"
ZIP, PICKLE = b"PK\x03\x04", b"\x80"
HUB_PATTERNS = ("*.json", "*.txt", "*.safetensors", "*.model", f"*/{PICKLED_WEIGHTS}", PICKLED_WEIGHTS)
CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".safetensors")


@dataclass(frozen=True)
class Source:
    """A checkpoint that has been found and not been read.

    Args:
        name: As the user gave it.
        format: A key of `FORMATS`, or `UNKNOWN_YET`.
        where: The file, or the folder of the network.
        weights: `raw` and, where there are both, `ema` -> files. A PyTorch file that holds both is under `raw`.
        values: The network's config.json, for diffusers' classes.
        scheduler: The scheduler's configuration, where there is one.
        index: The pipeline's model_index.json, where there is one.
        root: The pipeline's folder.
        own: What finectl wrote beside an export.
    """

    name: str
    format: str
    where: Path
    weights: Mapping[str, Sequence[Path]]
    values: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] | None = None
    index: Mapping[str, Any] | None = None
    root: Path | None = None
    own: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pickled(self) -> bool:
        """Whether the weights are in a file of PyTorch."""
        return self.weights["raw"][0].suffix != ".safetensors"

    @property
    def files(self) -> list[Path]:
        """Every file that decides the model, in a fixed order."""
        base = self.root or self.where
        named = [base / INDEX, base / SCHEDULER_CONFIG, self.where / MODEL_CONFIG, base / OWN] if base.is_dir() else []
        return [path for path in named if path.is_file()] + [
            p for key in sorted(self.weights) for p in self.weights[key]
        ]

    def digest(self, more: Sequence[str] = ()) -> str:
        """Return the hash of the content of all files, wherever they lie.

        Args:
            more: Digests of what else is taken from the source.
        """
        return sha256_json([[path.name, sha256_file(path)] for path in self.files] + list(more))

    def reader(self, which: str) -> SafetensorsReader:
        """Open the safetensors files of the `raw` or `ema` weights."""
        return SafetensorsReader(
            self.weights[which][0] if len(self.weights[which]) == 1 else self.where, self.weights[which]
        )


def find_source(text: str, wanted: str | None = None) -> Source:
    """Find out what SOURCE is by looking at its content.

    Args:
        text: A path, or the id of a repository on the hub.
        wanted: A key of `FORMATS` that the user named.

    Raises:
        InputError: nothing is there, or nothing that can be imported.
        UsageError: it is of another format than the user named.
    """
    if wanted is not None:
        FORMATS[wanted]  # an unknown name is an error here
    path = Path(text)
    if path.is_file():
        found = _file(text, path, wanted)
    elif path.is_dir():
        found = _folder(text, path)
    elif HUB_ID.fullmatch(text) and path.suffix not in CHECKPOINT_SUFFIXES:
        found = _folder(text, local_folder(text, "a diffusers pipeline or model", HUB_PATTERNS))
    else:
        raise InputError(
            f"there is no checkpoint {text!r}",
            expected="a .pt or .safetensors file, a diffusers folder, a hub id such as facebook/DiT-XL-2-256, or an "
            "artifact with --to",
        )
    if wanted is not None and found.format not in (wanted, UNKNOWN_YET):
        raise UsageError(f"{text} is of format {found.format!r}, not {wanted!r}", fix=f"--format {found.format}")
    return found


def _file(name: str, path: Path, wanted: str | None) -> Source:
    with path.open("rb") as stream:
        start = stream.read(4)
    own = _json(path.parent / OWN) if path.name == OWN_WEIGHTS and (path.parent / OWN).is_file() else {}
    if path.suffix == ".safetensors":
        reader = SafetensorsReader(path, [path])
        return Source(name, wanted or format_of(list(reader.shapes), path), path, {"raw": [path]}, own=own)
    if path.suffix == ".pkl" and start != ZIP:
        raise InputError(
            f"{path} is a Python pickle, which holds code: loading it could run anything, so it was refused",
            expected="a state dict: a .safetensors file, or a .pt file of tensors alone",
            fix="in the program that wrote it: torch.save(network.state_dict(), 'weights.pt')",
        )
    if start != ZIP and start[:1] != PICKLE:
        raise InputError(
            f"{path} is no checkpoint: it starts with {start!r}",
            expected="a .safetensors file, or a .pt file that torch.save wrote; perhaps the download is incomplete",
        )
    return Source(name, wanted or UNKNOWN_YET, path, {"raw": [path]})


def format_of(names: Sequence[str], where: Path) -> str:
    """Return the format that the names of a file's tensors belong to.

    Raises:
        InputError: none of those that stand alone.
    """
    if all(mark in names for mark in published_dit.MARKS):
        return published_dit.NAME
    if any(name.removeprefix(edm.PREFIX).startswith(edm.MARK) for name in names):
        return edm.NAME
    if any(name.startswith(("transformer_blocks.", "down_blocks.")) for name in names):
        raise InputError(
            f"{where} holds the weights of a diffusers model without its configuration",
            expected=f"the whole folder, with {MODEL_CONFIG}",
            fix=f"finectl convert {where.parent}",
        )
    shown = names[0] if names else "nothing"
    raise InputError(
        f"{where} holds {len(names)} tensors of an unknown architecture, such as {shown!r}", expected=supported()
    )


def supported() -> str:
    """Return what can be imported, for an error message."""
    return "one of: " + "; ".join(entry.help for entry in FORMATS.values())


def _folder(name: str, folder: Path) -> Source:
    if (folder / INDEX).is_file():
        return _pipeline(name, folder)
    if (folder / OWN_WEIGHTS).is_file():
        return _file(name, folder / OWN_WEIGHTS, None)
    values = _json(folder / MODEL_CONFIG) if (folder / MODEL_CONFIG).is_file() else {}
    kind = str(values.get("_class_name", ""))
    if not kind:
        if (folder / MANIFEST).is_file():
            raise UsageError(
                f"{name} is an artifact of finectl, and --to was not given",
                expected="--to with an artifact, or a foreign checkpoint without it",
                fix=f"finectl convert {name} --to diffusers",
            )
        raise InputError(f"{folder} holds no {INDEX} and no {MODEL_CONFIG} of diffusers", expected=supported())
    if kind not in MODEL_CLASSES:
        raise InputError(
            f"{folder} holds a {kind}, which is not supported{nearest(kind, list(MODEL_CLASSES))}", expected=supported()
        )
    parent = folder.resolve().parent
    if (parent / INDEX).is_file() and folder.name in PIPELINES.values():
        return _pipeline(name, parent)
    return Source(
        name, MODEL_CLASSES[kind], folder, _weights(folder), values, scheduler=_scheduler(folder),
        own=_json(folder / OWN) if (folder / OWN).is_file() else {},
    )  # fmt: skip


def _pipeline(name: str, folder: Path) -> Source:
    index = _json(folder / INDEX)
    kind = str(index.get("_class_name", ""))
    if kind not in PIPELINES:
        raise InputError(
            f"{folder} is a {kind or 'pipeline of no class'}, which is not supported{nearest(kind, list(PIPELINES))}",
            expected=f"one of: {', '.join(PIPELINES)}",
        )
    network = folder / PIPELINES[kind]
    if not (network / MODEL_CONFIG).is_file():
        raise InputError(f"{network / MODEL_CONFIG} is missing", expected=f"the network of the {kind}")
    values = _json(network / MODEL_CONFIG)
    of_class = str(values.get("_class_name", ""))
    if of_class not in MODEL_CLASSES:
        raise InputError(
            f"the network of {folder} is a {of_class}{nearest(of_class, list(MODEL_CLASSES))}",
            expected=f"one of: {', '.join(MODEL_CLASSES)}",
        )
    return Source(
        name, MODEL_CLASSES[of_class], network, _weights(network), values, scheduler=_scheduler(folder), index=index,
        root=folder, own=_json(folder / OWN) if (folder / OWN).is_file() else {},
    )  # fmt: skip


def _scheduler(folder: Path) -> Mapping[str, Any] | None:
    path = folder / SCHEDULER_CONFIG
    return _json(path) if path.is_file() else None


def _weights(folder: Path) -> dict[str, Sequence[Path]]:
    """Return the files of the weights; Stable Diffusion's folders hold those without the average, too."""
    found: Sequence[Path] = ()
    for name in WEIGHTS:
        if (folder / f"{name}.index.json").is_file():
            found = sharded_files(folder / f"{name}.index.json")
        elif (folder / name).is_file():
            found = [folder / name]
        if found:
            break
    if not found and (folder / PICKLED_WEIGHTS).is_file():
        found = [folder / PICKLED_WEIGHTS]
    if not found:
        raise InputError(f"{folder} holds no weights", expected=f"{WEIGHTS[0]}, in one file or in shards")
    missing = [path for path in found if not path.is_file()]
    if missing:
        raise InputError(f"{missing[0]} is missing", expected="every shard that the index names")
    if (folder / RAW_WEIGHTS).is_file():
        return {"raw": [folder / RAW_WEIGHTS], "ema": found}
    return {"raw": found}


def _json(path: Path) -> dict[str, Any]:
    return read_json_object(path, fix="copy or download it again")


def shapes_of(source: Source) -> dict[str, tuple[int, ...]] | None:
    """Return name -> shape of the weights where that takes no torch; None for a file of PyTorch."""
    if source.pickled:
        return None
    return {name: shape for file in source.weights["raw"] for name, shape in tensor_shapes(file).items()}
