"""Low-rank adapters in other tools' layouts, and back: PEFT, diffusers, kohya, and merged dense weights.

| layout | files | tensors |
|---|---|---|
| peft | adapter_model.safetensors, adapter_config.json | base_model.model.<module>.lora_A.weight; norms, too |
| diffusers | pytorch_lora_weights.safetensors, configuration in its header | unet.<module>.lora_A.weight |
| kohya | lora.safetensors | lora_unet_<module, dots as _>.lora_down.weight, .lora_up.weight, .alpha |
| merged | model.safetensors | those of the model |

diffusers and kohya have no place for normalisations: theirs go into `norms.safetensors` beside, to be loaded into the
base model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finectl.adapters.lora import A, B, LoraLayer, merge_lora, require_lora
from finectl.artifacts.files import read_json_object, staged, write_json
from finectl.artifacts.tensors import load_tensors, save_tensors
from finectl.errors import InputError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("peft", "diffusers", "kohya", "merged")
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
KOHYA_WEIGHTS = "lora.safetensors"
MERGED_WEIGHTS = "model.safetensors"
NORMS = "norms.safetensors"
PEFT_PREFIX, DIFFUSERS_PREFIX, KOHYA_PREFIX = "base_model.model.", "unet.", "lora_unet_"
METADATA_KEY = "lora_adapter_metadata"
ALIGNMENT = 8


def export_lora(
    directory: Path,
    form: str,
    layers: Sequence[LoraLayer],
    lora: Mapping[str, Tensor],
    base: Mapping[str, Tensor] | None = None,
) -> list[Path]:
    """Write adapters for another tool.

    Args:
        directory: Where the files go; it is made if need be.
        form: One of `FORMATS`.
        layers: Of the adapters.
        lora: Their tensors.
        base: State of the model that they are of; `merged` needs it.

    Returns:
        The files.

    Raises:
        UsageError: there is no such layout, or `merged` without a base.
        InputError: the tensors are not those of the adapters.
    """
    require_lora(layers, lora)
    directory.mkdir(parents=True, exist_ok=True)
    if form == "peft":
        tensors = {f"{PEFT_PREFIX}{name}": value for name, value in lora.items()}
        write_plain(directory / PEFT_WEIGHTS, tensors, {"format": "pt"})
        write_json(directory / PEFT_CONFIG, peft_config(layers))
        return [directory / PEFT_WEIGHTS, directory / PEFT_CONFIG]
    if form == "merged":
        if base is None:
            raise UsageError("merged weights need the model that the adapters are of")
        save_tensors(directory / MERGED_WEIGHTS, merge_lora(base, lora))
        return [directory / MERGED_WEIGHTS]
    if form not in ("diffusers", "kohya"):
        raise UsageError(f"unknown layout {form!r} of adapters", expected=f"one of: {', '.join(FORMATS)}")
    file = _write_diffusers(directory, layers, lora) if form == "diffusers" else _write_kohya(directory, layers, lora)
    norms = {name: lora[name] for layer in layers for name in layer.shapes if ".lora_" not in name}
    if not norms:
        return [file]
    write_plain(directory / NORMS, norms, {"format": "pt"})
    return [file, directory / NORMS]


def peft_config(layers: Sequence[LoraLayer]) -> dict[str, Any]:
    """Return PEFT's configuration of the adapters: the rank that most have, and the others one by one."""
    usual, patterns = _usual_rank(layers)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [layer.name for layer in layers],
        "rank_pattern": patterns,
        "alpha_pattern": patterns,  # a scale of 1 everywhere
        "modules_to_save": [layer.norm for layer in layers if layer.norm] or None,
    }


def _usual_rank(layers: Sequence[LoraLayer]) -> tuple[int, dict[str, int]]:
    counts = Counter(layer.rank for layer in layers)
    usual = max(counts, key=lambda rank: (counts[rank], rank))
    return usual, {layer.name: layer.rank for layer in layers if layer.rank != usual}


def _write_diffusers(directory: Path, layers: Sequence[LoraLayer], lora: Mapping[str, Tensor]) -> Path:
    tensors = {f"{DIFFUSERS_PREFIX}{name}": lora[name] for layer in layers for name in _factors(layer)}
    usual, patterns = _usual_rank(layers)
    config = {
        "r": usual,
        "lora_alpha": usual,
        "target_modules": [layer.name for layer in layers],
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "lora_bias": False,
        "use_dora": False,
    }
    described = json.dumps({f"{DIFFUSERS_PREFIX}{key}": value for key, value in config.items()}, sort_keys=True)
    write_plain(directory / DIFFUSERS_WEIGHTS, tensors, {"format": "pt", METADATA_KEY: described})
    return directory / DIFFUSERS_WEIGHTS


def _write_kohya(directory: Path, layers: Sequence[LoraLayer], lora: Mapping[str, Tensor]) -> Path:
    import torch

    # One alpha for all, and the rest of the scale in the weights: diffusers' conversion looks for alphas of single
    # attention layers under names that it has just changed, and would give those layers another scale.
    usual, _ = _usual_rank(layers)
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        stem, (down, up) = kohya_name(layer.name), _factors(layer)
        tensors[f"{stem}.lora_down.weight"] = lora[down]
        tensors[f"{stem}.lora_up.weight"] = lora[up] * (layer.rank / usual)
        tensors[f"{stem}.alpha"] = torch.tensor(float(usual))
    header = {"ss_network_module": "networks.lora", "ss_network_dim": str(usual), "ss_network_alpha": str(usual)}
    write_plain(directory / KOHYA_WEIGHTS, tensors, header)
    return directory / KOHYA_WEIGHTS


def kohya_name(module: str) -> str:
    """Return kohya's name of a layer."""
    return KOHYA_PREFIX + module.replace(".", "_")


def _factors(layer: LoraLayer) -> tuple[str, str]:
    return f"{layer.name}.{A}.weight", f"{layer.name}.{B}.weight"


def write_plain(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose header holds other tools' own keys, with the same bytes for the same content.

    Raises:
        ResourceError: the disk is full.
    """
    from safetensors.torch import save

    content = save({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)})
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    # The library writes the keys of its metadata in an order that changes from run to run.
    rewritten = json.dumps({"__metadata__": dict(sorted(metadata.items())), **header}, separators=(",", ":")).encode()
    rewritten += b" " * (-len(rewritten) % ALIGNMENT)
    with staged(path) as temporary:
        temporary.write_bytes(len(rewritten).to_bytes(8, "little") + rewritten + content[8 + length :])


def read_exported(path: Path, layers: Sequence[LoraLayer]) -> dict[str, Tensor]:
    """Read adapters that were written in the layout of PEFT, diffusers or kohya; alpha is taken into B.

    Args:
        path: The folder that `export_lora` wrote, or one with the same files.
        layers: Of the adapters.

    Raises:
        InputError: none of the files is there, or the tensors are not those of the adapters.
    """
    if (path / PEFT_WEIGHTS).is_file():
        found = load_tensors(path / PEFT_WEIGHTS)
        config = read_json_object(path / PEFT_CONFIG, expected="PEFT's configuration", fix="export the adapters again")
        lora = {name.removeprefix(PEFT_PREFIX): value for name, value in found.items()}
        for layer in layers:
            alpha = config.get("alpha_pattern", {}).get(layer.name, config.get("lora_alpha", layer.rank))
            _rescale(lora, layer, float(alpha))
    elif (path / DIFFUSERS_WEIGHTS).is_file():
        found = load_tensors(path / DIFFUSERS_WEIGHTS)
        lora = {name.removeprefix(DIFFUSERS_PREFIX): value for name, value in found.items()}
    elif (path / KOHYA_WEIGHTS).is_file():
        found, lora = load_tensors(path / KOHYA_WEIGHTS), {}
        for layer in layers:
            stem = kohya_name(layer.name)
            for name, part in zip(_factors(layer), ("lora_down", "lora_up"), strict=True):
                if f"{stem}.{part}.weight" in found:
                    lora[name] = found[f"{stem}.{part}.weight"]
            if f"{stem}.alpha" in found:
                _rescale(lora, layer, float(found[f"{stem}.alpha"]))
    else:
        raise InputError(
            f"{path} holds no adapters", expected=f"{PEFT_WEIGHTS}, {DIFFUSERS_WEIGHTS} or {KOHYA_WEIGHTS} in it"
        )
    if (path / NORMS).is_file():
        lora.update(load_tensors(path / NORMS))
    require_lora(layers, lora, str(path))
    return lora


def _rescale(lora: dict[str, Tensor], layer: LoraLayer, alpha: float) -> None:
    _, up = _factors(layer)
    if alpha != layer.rank and up in lora:
        lora[up] = lora[up] * (alpha / layer.rank)
