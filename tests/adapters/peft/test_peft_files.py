"""What was trained, in a folder of its own: loaded where it is to be loaded, it gives the tuned model's answers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from tuned import DIT, LABELLED, TEXT, answer, inputs, lively, train

from finectl.adapters.peft.files import SETTINGS, WEIGHTS
from finectl.adapters.peft.table import PeftOptions, is_trained, result_config
from finectl.adapters.peft.tuning import Tuning, tune
from finectl.models.io import ModelConfig, build_model


def merged(tuning: Tuning, state: dict[str, Tensor]) -> Any:
    plain: Any = build_model(result_config(tuning.config, tuning.peft)).eval()
    plain.load_state_dict(tuning.result_state(state))
    return plain


def saved(
    config: ModelConfig, peft: PeftOptions, folder: Path, model: Any = None
) -> tuple[Tuning, dict[str, Tensor], list[Path]]:
    """Tune a model, write its adapter, and return both with the averages."""
    tuning = tune(model or lively(config), peft, seed=0)
    state = train(tuning.model).state_dict()
    return tuning, state, tuning.save_adapter(folder, state, "artifacts/model/base")


@pytest.mark.parametrize(
    "settings", [{}, {"layers": "qkv,proj,fc1,fc2", "rank": 3, "alpha": 6.0}, {"labels": False, "alpha": 8.0}]
)
def test_the_peft_library_loads_lora_on_the_base(settings: dict[str, Any], tmp_path: Path) -> None:
    tuning, state, files = saved(DIT, PeftOptions("lora", settings), tmp_path)
    assert {path.name for path in files} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    base = lively(DIT)
    before = answer(base)
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    with torch.no_grad():
        found = loaded(*inputs(DIT))
        expected = answer(merged(tuning, state))
        assert (found - before).abs().max() > 1e-3
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
        assert torch.allclose(loaded.merge_and_unload()(*inputs(DIT)), expected, rtol=1e-5, atol=1e-5)


def test_a_model_with_an_adapter_takes_another_one(tmp_path: Path) -> None:
    peft = PeftOptions("lora", {"labels": False})
    one, first, _ = saved(DIT, peft, tmp_path / "one")
    other = tune(lively(DIT), peft, seed=9)
    second = train(other.model, steps=1).state_dict()
    other.save_adapter(tmp_path / "two", second)
    model = PeftModel.from_pretrained(lively(DIT), str(tmp_path / "one"), adapter_name="one").eval()
    model.load_adapter(str(tmp_path / "two"), adapter_name="two")
    for name, tuning, state in (("two", other, second), ("one", one, first)):
        model.set_adapter(name)
        with torch.no_grad():
            assert torch.allclose(model(*inputs(DIT)), answer(merged(tuning, state)), rtol=1e-5, atol=1e-5)


def test_a_table_of_other_classes_is_loaded_as_the_folder_says(tmp_path: Path) -> None:
    """The model that was tuned had another table than the base: the folder says how to make room for it."""
    config = replace(DIT, num_classes=6)
    wider = lively(config)
    narrow = lively(DIT)
    state = {name: value for name, value in narrow.state_dict().items() if "y_embedder" not in name}
    wider.load_state_dict(state, strict=False)
    tuning, averages, _ = saved(config, PeftOptions("lora"), tmp_path, wider)
    text = (tmp_path / "README.md").read_text()
    (line,) = re.findall(r"^    (model\.y_embedder\..*)$", text, re.MULTILINE)
    exec(line, {"model": narrow, "torch": torch})
    assert "artifacts/model/base" in text
    loaded = PeftModel.from_pretrained(narrow, str(tmp_path)).eval()
    x, t, _ = inputs(DIT)
    y = torch.tensor([0, 5, 6])
    with torch.no_grad():
        assert torch.allclose(loaded(x, t, y), merged(tuning, averages)(x, t, y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [LABELLED, TEXT], ids=["labels", "text"])
def test_the_peft_library_loads_lora_on_diffusers_networks(config: ModelConfig, tmp_path: Path) -> None:
    tuning, state, _ = saved(config, PeftOptions("lora"), tmp_path)
    network = PeftModel.from_pretrained(lively(config).unet, str(tmp_path)).eval()
    x, t, y = inputs(config)
    extra = {"encoder_hidden_states": y} if config is TEXT else {"class_labels": y}
    with torch.no_grad():
        assert torch.allclose(network(x, t, **extra).sample, answer(merged(tuning, state)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["difffit", "bitfit", "adaptformer", "vpt"])
def test_other_methods_keep_all_that_they_trained(method: str, tmp_path: Path) -> None:
    tuning, state, files = saved(DIT, PeftOptions(method), tmp_path)
    assert {path.name for path in files} == {WEIGHTS, SETTINGS, "README.md"}
    described = json.loads((tmp_path / SETTINGS).read_text())
    tensors = load_file(tmp_path / WEIGHTS)
    assert described["tensors"] == len(tensors) > 0
    assert described["base"] == "artifacts/model/base"
    assert sum(value.numel() for value in tensors.values()) == tuning.trainable
    again = tune(lively(DIT), PeftOptions.from_dict(described), seed=5)
    with torch.no_grad():
        for name, parameter in again.model.named_parameters():
            if is_trained(name, again.peft):
                parameter.copy_(tensors.pop(name.replace(".base_layer.", ".")))
    assert not tensors
    assert torch.allclose(answer(again.model), answer(merged(tuning, state)), rtol=1e-5, atol=1e-5)


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    def files(folder: str) -> dict[str, bytes]:
        tuning = tune(lively(DIT), PeftOptions("lora"), seed=0)
        paths = tuning.save_adapter(tmp_path / folder, tuning.model.state_dict(), "base")
        return {path.name: path.read_bytes() for path in paths}

    assert files("a") == files("b")
