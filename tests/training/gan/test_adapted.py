"""What a base makes with adapters: merged, it is what the adapters compute beside it; E2GAN's layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stages.small_pairs import CONCEPTS, make_pairs
from support import run_cli

from finectl.adapters.lora import count_lora, lora_layers, lora_shapes
from finectl.models.gan.config import preset
from finectl.training.gan.adapted import crucial_layers, edited, merged_generator, of_layers, wanted
from finectl.training.gan.adapting import Adapter, Task
from finectl.training.gan.pairs import recompute_on
from finectl.training.gan.settings import GanSettings


@pytest.fixture(scope="module", name="adapter")
def _adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    root = tmp_path_factory.mktemp("adapted")
    pairs = make_pairs(root)
    base = run_cli("gen-weights", "base", pairs, "--batch-size", 4, "--steps", 1, "--workspace", root).path
    layers = lora_layers(preset("nano", 16), 2)
    return Adapter(Task(Path(base), pairs, layers, GanSettings(1, 4, 1e-3, 1e-3), tuple(range(8))))


def test_crucial_layers_have_as_many_weights_as_e2gan_has() -> None:
    layers = crucial_layers(lora_layers(preset("e2gan", 256), 1))
    assert count_lora(layers) == 22_934
    assert not any(layer.name.startswith("res") or layer.norm for layer in layers)


def test_a_merged_generator_makes_what_the_adapters_make(adapter: Adapter) -> None:
    generator = torch.Generator().manual_seed(1)
    lora = {name: torch.randn(s, generator=generator) * 0.1 for name, s in lora_shapes(adapter.task.layers).items()}
    concept, rows = CONCEPTS[2], adapter.pairs.rows("test")
    beside, _ = adapter.networks(lora)
    recompute_on(beside, adapter.stream(concept))
    made = edited(adapter, concept, beside.eval(), rows)
    assert torch.allclose(edited(adapter, concept, merged_generator(adapter, concept, lora), rows), made, atol=1e-4)
    plain = edited(adapter, concept, adapter.generator.eval(), rows)
    assert (made - plain).abs().max() > 0.01
    assert made.shape == wanted(adapter, concept, rows).shape == (2, 3, 16, 16)
    assert set(of_layers(lora, crucial_layers(adapter.task.layers))) < set(lora)
