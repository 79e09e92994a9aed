"""The methods of parameter-efficient tuning, their settings, and what they train, counted by formula (no torch).

All of them train the table of the labels too, unless `labels=no`: the classes of the new data need vectors. That is
what the counts printed for DiT-XL/2 show as well: with the table of 101 classes and a null class (117,504 numbers),

| method | counted | as printed in the DiffFit paper |
|---|---|---|
| LoRA, rank 8 on the query-key-value layers | 1,149,696 | 1.15 M |
| LoRA, rank 16 | 2,181,888 | 2.18 M |
| AdaptFormer of width 64 | 4,280,320 | 4.28 M |
| BitFit | 607,136 | 0.61 M |
| DiffFit, scales on attention and MLP outputs | 671,648 | 0.83 M |
| VPT-Deep, 10 tokens; 83; 84 | 440,064; 2,794,752; 2,827,008 | 2.81 M |

The first four agree, and their settings (rank 16) are the defaults here. The printed count of DiffFit leaves about 7
numbers for scales to each channel of each block; those of the attention's and the MLP's output are 2. The code released
with Diff-Tuning has 6, in the first 14 of 28 blocks: 3 on query, key and value, 2 on the attention's output, 1 on the
MLP's. `layers=qkv,proj,fc2 blocks=14` is that, the two of one output taken as one: 687,776. VPT's printed count falls
between two numbers of tokens. With the 1,001 rows of ImageNet every count is 1,035,648 larger.

Reference: LoRA, arXiv 2106.09685; DiffFit, arXiv 2304.06648; BitFit, arXiv 2106.10199; AdaptFormer, arXiv 2205.13535;
VPT, arXiv 2203.12119.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from finectl.errors import InputError, UsageError
from finectl.models.extras import BOTTLENECK, PROMPTS, Extras
from finectl.models.io import ModelConfig, total_parameters
from finectl.models.presets import LAYER_TYPES, DiTConfig, layer_shapes
from finectl.models.shapes import Shapes, parameter_shapes
from finectl.models.unet_config import CLASSES, UNetConfig
from finectl.registry import Entry, Registry, nearest

NONE = "none"
INSTALL = "pip install 'finectl[peft]'"
SCALE = "gamma"
LORA = ("lora_A", "lora_B")
BASE = "base_layer"
"""Module of the pre-trained layer inside one that adapters or scales stand around."""
TYPES = {"qkv": "qkv", "proj": "o", "fc1": "in", "fc2": "out"}
"""Layer of a Diffusion Transformer, as settings name it -> its type."""
ATTENTION = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
"""Layer of a UNet's attention, as settings name it -> its module."""
TABLES = ("y_embedder.", "unet.class_embedding.")


@dataclass(frozen=True)
class Setting:
    """A setting of a method.

    Args:
        default: Its value, whose type is the setting's.
        help: One line.
        least: The smallest number that it may be.
    """

    default: int | float | str | bool
    help: str
    least: float = 0

    def parse(self, name: str, text: str) -> int | float | str | bool:
        """Return the value that a text stands for.

        Raises:
            UsageError: it stands for none.
        """
        kind = type(self.default)
        if kind is bool:
            if text.lower() not in ("yes", "no", "true", "false"):
                raise UsageError(f"--peft-set {name}={text}", expected="yes or no")
            return text.lower() in ("yes", "true")
        if kind is str:
            return text
        try:
            value = int(text) if kind is int else float(text)
        except ValueError as error:
            raise UsageError(f"--peft-set {name}={text}", expected=_NUMBERS[kind]) from error
        if not math.isfinite(value) or value < self.least:
            raise UsageError(f"--peft-set {name}={text}", expected=f"{_NUMBERS[kind]} of at least {self.least:g}")
        return value


_NUMBERS: dict[type, str] = {int: "a whole number", float: "a number"}
LABELS = Setting(True, "train the table of the labels too")


@dataclass(frozen=True)
class PeftEntry(Entry):
    """A method: where it is, what it is, and what it takes.

    Args:
        settings: By name.
        lr_scale: What the learning rate of full fine-tuning is multiplied by.
        unets: Whether it is there for diffusers' UNets.
    """

    settings: Mapping[str, Setting] = field(default_factory=dict, hash=False)
    lr_scale: float = 10.0
    unets: bool = False


PEFTS: Registry[PeftEntry] = Registry(
    "parameter-efficient tuning",
    {
        NONE: PeftEntry("", "all parameters are trained", lr_scale=1.0, unets=True),
        "lora": PeftEntry(
            "finectl.adapters.peft.lora",
            "low-rank products beside linear layers, merged into them in the end",
            {
                "rank": Setting(16, "rank of the products", 1),
                "alpha": Setting(0.0, "the products are multiplied by alpha / rank; 0: by 1"),
                "layers": Setting(
                    "", "layers, by commas: qkv, proj, fc1, fc2 [qkv]; of a UNet to_q, to_k, to_v, to_out [all]"
                ),
                "labels": LABELS,
            },
            unets=True,
        ),
        "difffit": PeftEntry(
            "finectl.adapters.peft.difffit",
            "biases, norms and a scale for each channel of layers' outputs, folded into them in the end",
            {
                "layers": Setting("proj,fc2", "layers with scales, by commas: qkv, proj, fc1, fc2"),
                "blocks": Setting(0, "only the first so many blocks have scales; 0: all"),
                "labels": LABELS,
            },
        ),
        "bitfit": PeftEntry("finectl.adapters.peft.bitfit", "biases only", {"labels": LABELS}, unets=True),
        "adaptformer": PeftEntry(
            "finectl.adapters.peft.adaptformer",
            "a bottleneck beside every feed-forward part; it stays in the model",
            {
                "dim": Setting(64, "width of the bottleneck", 1),
                "scale": Setting(0.1, "what its output is multiplied by"),
                "labels": LABELS,
            },
        ),
        "vpt": PeftEntry(
            "finectl.adapters.peft.vpt",
            "prompt tokens before every block; they stay in the model, and change it at once",
            {"tokens": Setting(10, "prompt tokens of every block", 1), "labels": LABELS},
        ),
    },
)


@dataclass(frozen=True)
class PeftOptions:
    """A method and its settings.

    Args:
        method: A name of `PEFTS`.
        settings: All settings of the method; those that are left out have their defaults.

    Raises:
        UsageError: there is no such method or setting, or a value is of another type.
    """

    method: str = NONE
    settings: Mapping[str, int | float | str | bool] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        known = PEFTS[self.method].settings
        for name, value in self.settings.items():
            if name not in known:
                has = "; ".join(f"{other}: {setting.help}" for other, setting in known.items()) or "no settings"
                raise UsageError(f"--peft {self.method} has no setting {name!r}{nearest(name, known)}", expected=has)
            kind = type(known[name].default)
            numbers = (int, float) if kind is float else (kind,)
            if not isinstance(value, numbers) or (kind is not bool and isinstance(value, bool)):
                raise UsageError(f"setting {name!r} of --peft {self.method} is {value!r}", expected=kind.__name__)
        complete = {name: self.settings.get(name, setting.default) for name, setting in known.items()}
        object.__setattr__(self, "settings", complete)

    @classmethod
    def parse(cls, method: str, assignments: Sequence[str] = ()) -> PeftOptions:
        """Return the options that `--peft` and `--peft-set NAME=VALUE` stand for.

        Raises:
            UsageError: there is no such method or setting, or a text is no value of it.
        """
        known = PEFTS[method].settings
        values: dict[str, Any] = {}
        for assignment in assignments:
            name, separator, text = assignment.partition("=")
            if not separator:
                raise UsageError(f"--peft-set {assignment}", expected="NAME=VALUE, such as rank=8")
            values[name.strip()] = known[name.strip()].parse(name, text.strip()) if name.strip() in known else text
        return cls(method, values)

    def __getitem__(self, name: str) -> Any:
        return self.settings[name]

    def __bool__(self) -> bool:
        return self.method != NONE

    @property
    def lr_scale(self) -> float:
        """What the learning rate of full fine-tuning is multiplied by.

        DiffFit was published with 1e-3 where full fine-tuning has 1e-4; the others take the same factor. Held-out loss
        of a dit-nano (4 layers, digits 0 to 4, 600 updates) after 300 updates of 32 images of the digits 5 to 9, at
        5e-4, 2e-3 and 5e-3: LoRA 0.1257, 0.1244, 0.1237; DiffFit 0.1254, 0.1239, 0.1233; BitFit 0.1255, 0.1240,
        0.1233; AdaptFormer 0.1253, 0.1227, 0.1206; VPT 0.1326, 0.1277, 0.1266; all parameters 0.1198, 0.1245, 0.1383.
        """
        return PEFTS[self.method].lr_scale

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain JSON."""
        return {"method": self.method, "settings": dict(self.settings)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PeftOptions:
        """Return the options that `to_dict` wrote.

        Raises:
            InputError: they are none.
        """
        try:
            return cls(str(values["method"]), dict(values.get("settings", {})))
        except (UsageError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{values!r} are no options of parameter-efficient tuning: {error}") from error


NO_PEFT = PeftOptions()


def require_peft(config: ModelConfig, peft: PeftOptions) -> None:
    """Check that an architecture takes a method, and that what the method needs is installed.

    Raises:
        UsageError: it does not; the message names the methods that it takes.
    """
    entry = PEFTS[peft.method]
    if not peft:
        return
    if not isinstance(config, DiTConfig) and not entry.unets:
        raise UsageError(
            f"--peft {peft.method} is for Diffusion Transformers, and this is a {CLASSES[config.architecture]}",
            expected=f"--peft {' or '.join(name for name, other in PEFTS.items() if other.unets)}",
        )
    if isinstance(config, DiTConfig):
        _require_dense(config, peft)
    if peft.method == "lora":
        if not lora_targets(config, peft):
            raise UsageError(
                "--peft lora goes on layers of attention, and this UNet has none", expected="--peft none or bitfit"
            )
        if importlib.util.find_spec("peft") is None:
            raise UsageError("--peft lora needs the package peft", expected="it installed", fix=INSTALL)


def _require_dense(config: DiTConfig, peft: PeftOptions) -> None:
    if config.factorized is not None:
        raise UsageError(
            f"--peft {peft.method} goes on layers with weights of their own, and those of this model share factors",
            expected="--peft none, or a dense model",
            fix="finectl init MODEL, which makes one",
        )
    if peft.method == "difffit" and peft["blocks"] > config.depth:
        raise UsageError(f"--peft-set blocks={peft['blocks']}", expected=f"at most the model's {config.depth} blocks")
    if "layers" in peft.settings:
        _chosen(peft, TYPES, "qkv")
    there, wanted = config.extras, result_extras(config, peft)
    if there.bottleneck and (wanted.bottleneck, wanted.scale) != (there.bottleneck, there.scale):
        raise UsageError(
            f"the model has bottlenecks of width {there.bottleneck} and scale {there.scale:g} already, and "
            f"--peft adaptformer asks for {wanted.bottleneck} and {wanted.scale:g}",
            expected="the same ones, to be trained on",
            fix=f"--peft-set dim={there.bottleneck} --peft-set scale={there.scale:g}",
        )
    if there.prompts and wanted.prompts != there.prompts:
        raise UsageError(
            f"the model has {there.prompts} prompt tokens a block already, and --peft vpt asks for {wanted.prompts}",
            expected="the same ones, to be trained on",
            fix=f"--peft-set tokens={there.prompts}",
        )


def _chosen(peft: PeftOptions, known: Mapping[str, str], default: str = "") -> list[str]:
    """Return the layers that the setting `layers` names, each once, in the order of `known`."""
    names = [name.strip() for name in str(peft["layers"] or default).split(",")]
    for name in names:
        if name not in known:
            raise UsageError(
                f"--peft-set layers={peft['layers']}: there is no layer {name!r}{nearest(name, dict(known))}",
                expected=f"of: {', '.join(known)}",
            )
    return [name for name in known if name in names]


def result_extras(config: DiTConfig, peft: PeftOptions) -> Extras:
    """Return the extra parts of the model that comes out."""
    if peft.method == "adaptformer":
        return replace(config.extras, bottleneck=peft["dim"], scale=float(peft["scale"]))
    if peft.method == "vpt":
        return replace(config.extras, prompts=peft["tokens"])
    return config.extras


def result_config(config: ModelConfig, peft: PeftOptions) -> ModelConfig:
    """Return the architecture of the model that comes out: with bottlenecks or prompts, or the one that went in."""
    return replace(config, extras=result_extras(config, peft)) if isinstance(config, DiTConfig) else config


def layer_targets(config: DiTConfig, peft: PeftOptions, default: str = "") -> dict[str, tuple[int, int]]:
    """Return module to shape of the layers of a Diffusion Transformer that the setting `layers` names."""
    shapes = layer_shapes(config)
    kinds = [TYPES[name] for name in _chosen(peft, TYPES, default)]
    blocks = peft.settings.get("blocks") or config.depth
    return {f"blocks.{i}.{LAYER_TYPES[kind]}": shapes[kind] for i in range(int(blocks)) for kind in kinds}


def lora_targets(config: ModelConfig, peft: PeftOptions) -> dict[str, tuple[int, int]]:
    """Return module to shape (outputs, inputs) of the layers that get low-rank products."""
    if isinstance(config, DiTConfig):
        return layer_targets(config, peft, "qkv")
    ends = tuple(f".{ATTENTION[name]}.weight" for name in _chosen(peft, ATTENTION, ",".join(ATTENTION)))
    shapes = _shapes(config)
    found = {name: shape for name, shape in shapes.items() if name.endswith(ends) and len(shape) == 2}
    return {name.removesuffix(".weight"): (shape[0], shape[1]) for name, shape in found.items()}


def added_shapes(config: ModelConfig, peft: PeftOptions) -> Shapes:
    """Return name to shape of the parameters beside those of the model that comes out."""
    found: Shapes = {}
    if peft.method == "lora":
        for name, (outputs, inputs) in lora_targets(config, peft).items():
            found[f"{name}.{LORA[0]}.weight"] = (peft["rank"], inputs)
            found[f"{name}.{LORA[1]}.weight"] = (outputs, peft["rank"])
    if peft.method == "difffit" and isinstance(config, DiTConfig):
        found = {f"{name}.{SCALE}": shape[:1] for name, shape in layer_targets(config, peft).items()}
    return found


def is_trained(name: str, peft: PeftOptions) -> bool:
    """Tell whether a parameter of the model that is tuned is trained.

    Args:
        name: Of the parameter.
        peft: The method.

    Reference: arXiv 2304.06648, section 3 (biases, norms, scales and the label table); arXiv 2106.10199 (biases).
    """
    if not peft or (peft["labels"] and name.startswith(TABLES)):
        return True
    marks = {
        "lora": tuple(f".{part}." for part in LORA),
        "difffit": ("bias", "norm", SCALE),
        "bitfit": ("bias",),
        "adaptformer": (f".{BOTTLENECK}.",),
        "vpt": (f".{PROMPTS}",),
    }[peft.method]
    return any(mark in name for mark in marks)


def trainable_parameters(config: ModelConfig, peft: PeftOptions) -> int:
    """Return how many parameters are trained.

    Args:
        config: Of the model to be tuned.
        peft: The method.
    """
    if not peft:
        return total_parameters(config)
    shapes = {**_shapes(result_config(config, peft)), **added_shapes(config, peft)}
    return sum(math.prod(shape) for name, shape in shapes.items() if is_trained(name, peft))


def _shapes(config: ModelConfig) -> Shapes:
    """Return the parameters' shapes, by formula where there is one; else the network is built, without memory."""
    found = parameter_shapes(config)
    if found is None:
        import torch

        from finectl.models.io import build_model

        # Preconditioning has no parameters, and needs values to be built.
        bare = replace(cast(UNetConfig, config), sigma_data=None)
        with torch.device("meta"):
            found = {name: tuple(value.shape) for name, value in build_model(bare).named_parameters()}
    return found
