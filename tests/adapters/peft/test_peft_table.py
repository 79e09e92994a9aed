"""Methods and settings of parameter-efficient tuning without torch, and the parameters that they train."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from finectl.adapters.peft.table import PEFTS, PeftOptions, require_peft, result_config, trainable_parameters
from finectl.errors import InputError, UsageError
from finectl.models.extras import Extras
from finectl.models.io import config_from
from finectl.models.presets import DiTConfig, FactorConfig, count_parameters, preset
from finectl.models.unet_presets import unet_preset

DIT = preset("dit-nano", image_size=8, channels=1, num_classes=10, depth=2)
UNET = unet_preset("unet-nano", image_size=8, channels=1)
FOOD = preset("dit-xl", image_size=32, channels=4, num_classes=101, learn_sigma=True)
METHODS = [name for name in PEFTS if name != "none"]

# Worked out by hand from the shapes of DiT-XL/2: 17,280 biases a block, 5,792 outside; 102 x 1,152 labels.
TABLE = 102 * 1152
BIASES = 28 * (3 + 1 + 4 + 1 + 6) * 1152 + 3 * 1152 + 2 * 1152 + 2 * 2 * 2 * 4
PUBLISHED = [
    ("lora", {"rank": 8}, TABLE + 28 * 8 * (1152 + 3456), 1.15),
    ("lora", {}, TABLE + 28 * 16 * (1152 + 3456), 2.18),
    ("adaptformer", {}, TABLE + 28 * (2 * 64 * 1152 + 64 + 1152), 4.28),
    ("bitfit", {}, TABLE + BIASES, 0.61),
    ("difffit", {}, TABLE + BIASES + 28 * 2 * 1152, None),
    ("difffit", {"layers": "qkv,proj,fc2", "blocks": 14}, TABLE + BIASES + 14 * 5 * 1152, None),
    ("vpt", {}, TABLE + 28 * 10 * 1152, None),
    ("vpt", {"tokens": 84, "labels": False}, 28 * 84 * 1152, None),
]


@pytest.mark.parametrize(("method", "settings", "count", "printed"), PUBLISHED)
def test_counts_of_dit_xl(method: str, settings: dict[str, Any], count: int, printed: float | None) -> None:
    counted = trainable_parameters(FOOD, PeftOptions(method, settings))
    assert counted == count
    assert printed is None or round(counted / 1e6, 2) == printed


def test_no_method_trains_everything() -> None:
    assert trainable_parameters(FOOD, PeftOptions()) == count_parameters(FOOD)["total"]


def test_options_are_complete_and_survive_json() -> None:
    peft = PeftOptions.parse("lora", ["rank=8", "layers=qkv, fc1", "labels=no"])
    assert peft.settings == {"rank": 8, "alpha": 0.0, "layers": "qkv, fc1", "labels": False}
    assert PeftOptions.from_dict(json.loads(json.dumps(peft.to_dict()))) == peft


@pytest.mark.parametrize(
    ("method", "assignments", "message"),
    [
        ("lore", [], "did you mean 'lora'"),
        ("lora", ["rnak=8"], "did you mean 'rank'"),
        ("lora", ["rank=0"], "rank=0"),
        ("lora", ["rank=2.5"], "rank=2.5"),
        ("lora", ["rank"], "rank"),
        ("lora", ["labels=8"], "labels=8"),
        ("lora", ["alpha=nan"], "alpha=nan"),
        ("none", ["rank=8"], "no setting 'rank'"),
        ("vpt", ["tokens=0"], "tokens=0"),
    ],
)
def test_wrong_options_are_refused(method: str, assignments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PeftOptions.parse(method, assignments)


def test_an_unknown_setting_is_answered_with_all_that_there_are() -> None:
    with pytest.raises(UsageError) as caught:
        PeftOptions.parse("lora", ["dim=8"])
    for name, setting in PEFTS["lora"].settings.items():
        assert f"{name}: {setting.help}" in caught.value.expected


def test_wrong_json_is_refused() -> None:
    with pytest.raises(InputError):
        PeftOptions.from_dict({"method": "lora", "settings": {"rank": "8"}})


@pytest.mark.parametrize("method", ["difffit", "adaptformer", "vpt"])
def test_a_unet_says_which_methods_it_takes(method: str) -> None:
    with pytest.raises(UsageError, match="UNet2DModel") as caught:
        require_peft(UNET, PeftOptions(method))
    assert caught.value.expected == "--peft none or lora or bitfit"


def test_what_a_model_lacks_is_refused() -> None:
    plain = {**UNET.network, "down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3}
    plain["add_attention"] = False
    from finectl.models.unet import build_network

    odd = replace(UNET, network=plain)
    odd = replace(odd, parameters=sum(value.numel() for value in build_network(odd).parameters()))
    with pytest.raises(UsageError, match="has none"):
        require_peft(odd, PeftOptions("lora"))
    for method in METHODS:
        with pytest.raises(UsageError, match="share factors"):
            require_peft(replace(DIT, factorized=FactorConfig(("qkv",), 8)), PeftOptions(method))
    with pytest.raises(UsageError, match="did you mean 'qkv'"):
        require_peft(DIT, PeftOptions("lora", {"layers": "qvk"}))
    with pytest.raises(UsageError, match="blocks=3"):
        require_peft(DIT, PeftOptions("difffit", {"blocks": 3}))


def test_parts_of_another_size_are_refused_and_the_same_ones_taken() -> None:
    there = replace(DIT, extras=Extras(bottleneck=8, prompts=3))
    with pytest.raises(UsageError) as caught:
        require_peft(there, PeftOptions("adaptformer"))
    assert caught.value.fix == "--peft-set dim=8 --peft-set scale=0.1"
    with pytest.raises(UsageError) as caught:
        require_peft(there, PeftOptions("vpt"))
    assert caught.value.fix == "--peft-set tokens=3"
    for peft in (PeftOptions("adaptformer", {"dim": 8}), PeftOptions("vpt", {"tokens": 3}), PeftOptions("lora")):
        require_peft(there, peft)
        assert result_config(there, peft) == there


@pytest.mark.parametrize("method", METHODS)
def test_only_parts_that_stay_change_the_configuration(method: str) -> None:
    result = result_config(DIT, PeftOptions(method))
    assert isinstance(result, DiTConfig)
    assert (result == DIT) == (method in ("lora", "difffit", "bitfit"))
    assert ("extras" in result.to_dict()) == (result != DIT)
    assert config_from(json.loads(json.dumps(result.to_dict()))) == result


@pytest.mark.parametrize("extras", [{"bottleneck": "8"}, {"bottleneck": -1}, {"prompt": 3}, 7])
def test_wrong_parts_of_a_configuration_are_refused(extras: Any) -> None:
    with pytest.raises(InputError):
        config_from({**DIT.to_dict(), "extras": extras})


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError) as caught:
        require_peft(DIT, PeftOptions("lora"))
    assert caught.value.fix == "pip install 'finectl[peft]'"
    require_peft(DIT, PeftOptions("bitfit"))


def test_the_table_needs_no_torch() -> None:
    program = """
import sys
from finectl.adapters.peft.table import PEFTS, PeftOptions, require_peft, trainable_parameters
from finectl.models.presets import preset
from finectl.models.unet_presets import unet_preset
config = preset("dit-b", image_size=32, channels=4, num_classes=10)
for name in PEFTS:
    require_peft(config, PeftOptions(name))
    trainable_parameters(config, PeftOptions(name))
trainable_parameters(unet_preset("unet-cifar", image_size=32, channels=3), PeftOptions("lora"))
assert not {"torch", "numpy", "diffusers", "peft"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
