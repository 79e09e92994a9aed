"""What was trained, in a folder of its own: `adapter/` in a model, and what `convert --to peft` exports.

LoRA is in the layout of the `peft` library, which loads it on the network that was tuned. What other methods trained
is in `adapter.safetensors`, under the model's own names, and `adapter.json` says how.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finectl.adapters.lora_export import PEFT_CONFIG, PEFT_PREFIX, PEFT_WEIGHTS, write_plain
from finectl.adapters.peft.table import BASE, SCALE, TABLES, PeftOptions, is_trained, lora_targets
from finectl.artifacts.files import write_atomic, write_json
from finectl.artifacts.store import Artifact
from finectl.errors import InputError
from finectl.models.io import ModelConfig
from finectl.models.presets import DiTConfig

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "adapter"
WEIGHTS, SETTINGS, README = "adapter.safetensors", "adapter.json", "README.md"
UNET_PREFIX = "unet."

LOAD_LORA = """# How to load this

    from peft import PeftModel
    tuned = PeftModel.from_pretrained(model, "THIS FOLDER")

where `model` is {model}
The weights are averaged ones.
{table}"""
DIT = """the Diffusion Transformer that was tuned, with its averaged weights:

    from pathlib import Path
    from finectl.artifacts.store import open_artifact
    from finectl.models.io import load_model
    model = load_model(open_artifact(Path("{base}")))
"""
UNET = """diffusers' {kind} of the model that was tuned ({base}), with its averaged weights.
"""
TABLE = """
The table of the labels was trained too, and is in the folder. Where the model's has another number of rows, first give
it {rows}, whose values the folder then replaces:

    import torch
    model.{module} = torch.nn.Embedding({rows}, {width})
"""
LOAD_OTHER = """# What this is

`adapter.safetensors` holds the {count} tensors that --peft {method} trained, averaged, under the names of the model
that was tuned ({base}). {rest}
"""
RESTS = {
    "difffit": f"They take the places of the model's own, and a layer with `{SCALE}` multiplies its output by that.",
    "bitfit": "They take the places of the model's own.",
    "adaptformer": "Its bottlenecks stand beside the feed-forward parts; the rest takes the places of the model's own.",
    "vpt": "Every block attends to its `prompts` too; the rest takes the places of the model's own.",
}


def save_adapter(
    directory: Path, config: ModelConfig, peft: PeftOptions, state: Mapping[str, Tensor], base: str | None
) -> list[Path]:
    """Write what was trained.

    Args:
        directory: Where the files go; it is made if need be.
        config: Of the model that went in.
        peft: The method.
        state: Of the tuned model, whole.
        base: How the files name the model that went in.

    Returns:
        The files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    trained = {name.replace(f".{BASE}.", "."): value for name, value in state.items() if is_trained(name, peft)}
    if peft.method == "lora":
        return _save_lora(directory, config, peft, trained, base)
    write_plain(directory / WEIGHTS, trained, {"format": "pt"})
    write_json(directory / SETTINGS, {**peft.to_dict(), "base": base, "tensors": len(trained)})
    text = LOAD_OTHER.format(count=len(trained), method=peft.method, base=base or "the model", rest=RESTS[peft.method])
    write_atomic(directory / README, text.encode())
    return [directory / name for name in (WEIGHTS, SETTINGS, README)]


def _save_lora(
    directory: Path, config: ModelConfig, peft: PeftOptions, trained: Mapping[str, Tensor], base: str | None
) -> list[Path]:
    """Write adapters as the `peft` library does; those of a UNet under the names of diffusers' network."""
    from finectl.adapters.peft.lora import ADAPTER, scaling

    tensors = {
        PEFT_PREFIX + name.removeprefix(UNET_PREFIX).replace(f".{ADAPTER}.", "."): value
        for name, value in trained.items()
    }
    write_plain(directory / PEFT_WEIGHTS, tensors, {"format": "pt"})
    tables = {name: value for name, value in trained.items() if name.startswith(TABLES)}
    modules = [name.removeprefix(UNET_PREFIX).rpartition(".")[0] for name in tables]
    values: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": peft["rank"],
        "lora_alpha": scaling(peft) * peft["rank"],
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [name.removeprefix(UNET_PREFIX) for name in lora_targets(config, peft)],
        "modules_to_save": modules or None,
    }
    write_json(directory / PEFT_CONFIG, values)
    table = ""
    for module, value in zip(modules, tables.values(), strict=True):
        table += TABLE.format(module=module, rows=len(value), width=value.shape[1])
    shown = base or "PATH OF THE MODEL"
    model = DIT if isinstance(config, DiTConfig) else UNET
    kind = "" if isinstance(config, DiTConfig) else "UNet2D(Condition)Model"
    text = LOAD_LORA.format(model=model.format(base=shown, kind=kind), table=table)
    write_atomic(directory / README, text.encode())
    return [directory / name for name in (PEFT_WEIGHTS, PEFT_CONFIG, README)]


def adapter_files(artifact: Artifact) -> list[str]:
    """Return the paths, inside a model, of what parameter-efficient tuning trained.

    Raises:
        InputError: the model has none.
    """
    found = sorted(file.path for file in artifact.manifest.files if file.path.startswith(f"{FOLDER}/"))
    if not found:
        raise InputError(
            f"{artifact.path} has no adapter apart from its weights",
            expected="a model that `finetune --peft` made, whose adapter is kept beside the merged weights",
            fix="finectl finetune MODEL --peft lora, or export all weights: finectl convert MODEL --to diffusers",
        )
    return found
