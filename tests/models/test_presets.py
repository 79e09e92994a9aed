"""Configurations, presets and parameter counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from finectl.errors import InputError, UsageError
from finectl.models.dit import DiT
from finectl.models.presets import LAYER_TYPES, DiTConfig, FactorConfig, count_parameters, preset

LATENTS = {"image_size": 32, "channels": 4, "num_classes": 1000, "learn_sigma": True}
ALL_TYPES = tuple(LAYER_TYPES)

# Counts of the published architecture, worked out by hand from its layer shapes.
COMPONENTS = {
    "dit-b": {
        "block": 10_628_352,
        "block.qkv": 1_769_472 + 2_304,
        "block.o": 589_824 + 768,
        "block.in": 2_359_296 + 3_072,
        "block.out": 2_359_296 + 768,
        "block.adaln": 3_538_944 + 4_608,
        "x_embedder": 13_056,
        "t_embedder": 787_968,
        "y_embedder": 768_768,
        "final_layer": 24_608 + 1_181_184,
    },
    "dit-l": {
        "block": 18_889_728,
        "x_embedder": 17_408,
        "t_embedder": 1_312_768,
        "y_embedder": 1_025_024,
        "final_layer": 32_800 + 2_099_200,
    },
}
TOTALS = {
    "dit-b": {4: 45_288_992, 6: 66_545_696, 8: 87_802_400, 10: 109_059_104, 12: 130_315_808},
    "dit-l": {4: 80_046_112, 12: 231_163_936, 24: 457_840_672},
}


def built(config: DiTConfig) -> DiT:
    with torch.device("meta"):
        return DiT(config)


@pytest.mark.parametrize("name", COMPONENTS)
def test_components_match_the_published_counts(name: str) -> None:
    counted = count_parameters(preset(name, **LATENTS))
    assert {key: counted[key] for key in COMPONENTS[name]} == COMPONENTS[name]


@pytest.mark.parametrize("name", TOTALS)
def test_totals_match_the_published_counts_at_every_depth(name: str) -> None:
    counted = {depth: count_parameters(preset(name, depth=depth, **LATENTS))["total"] for depth in TOTALS[name]}
    assert counted == TOTALS[name]


@pytest.mark.parametrize("name", ["dit-nano", "dit-s/4", "dit-b", "dit-l/8", "dit-xl"])
@pytest.mark.parametrize("factors", [None, FactorConfig(ALL_TYPES, 48), FactorConfig(("qkv", "in"), 50, 4)])
def test_counts_are_those_of_the_built_model(name: str, factors: FactorConfig | None) -> None:
    config = dataclasses.replace(preset(name, **LATENTS), factorized=factors)
    model, counted = built(config), count_parameters(config)

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    for component in ("x_embedder", "t_embedder", "y_embedder", "blocks", "final_layer", "factors"):
        assert counted[component] == count(getattr(model, component)), component
    for kind, path in LAYER_TYPES.items():
        assert counted[f"block.{kind}"] == count(model.blocks[0].get_submodule(path)), kind
    assert counted["total"] == count(model)


def test_learngene_at_full_rank_has_the_published_size() -> None:
    config = preset("dit-b", **LATENTS)
    five = dataclasses.replace(config, factorized=FactorConfig(ALL_TYPES, 768))
    four = dataclasses.replace(config, factorized=FactorConfig(("qkv", "o", "in", "out"), 768))
    assert count_parameters(five)["factors"] == 13_565_952
    assert count_parameters(four)["factors"] == 9_437_184


def test_preset_takes_patch_size_depth_and_any_case() -> None:
    config = preset("DiT-B/4", image_size=32, channels=4, num_classes=10, depth=5)
    assert (config.width, config.depth, config.heads, config.patch_size, config.tokens) == (768, 5, 12, 4, 64)
    assert preset("dit-s", image_size=8, channels=1, num_classes=3).patch_size == 2
    assert preset("dit-s", image_size=8, channels=1, num_classes=3).out_channels == 1
    assert preset("dit-s", image_size=8, channels=3, num_classes=3, learn_sigma=True).out_channels == 6


@pytest.mark.parametrize(
    ("name", "size", "depth", "words"),
    [
        ("dit-bb", 32, None, ("dit-bb", "'dit-b'")),
        ("dit-b/3", 32, None, ("'3'",)),
        ("dit-b/8", 12, None, ("8 pixels", "12 pixels")),
        ("dit-b", 32, 0, ("depth 0",)),
    ],
)
def test_wrong_preset_says_what_is_wrong(name: str, size: int, depth: int | None, words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as raised:
        preset(name, image_size=size, channels=4, num_classes=10, depth=depth)
    assert all(word in raised.value.what for word in words)


def test_configuration_survives_its_dictionary() -> None:
    config = dataclasses.replace(preset("dit-nano", **LATENTS), factorized=FactorConfig(("o", "adaln"), 7, 2))
    values = config.to_dict()
    assert values["architecture"] == "dit"
    assert DiTConfig.from_dict(values) == config
    values["factorized"] = None
    assert DiTConfig.from_dict(values) == dataclasses.replace(config, factorized=None)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"architecture": "unet"}, "unet"),
        ({"widht": 3}, "width"),
        ({"width": "64"}, "width"),
        ({"width": True}, "width"),
        ({"learn_sigma": 1}, "learn_sigma"),
        ({"depth": 0}, "depth"),
        ({"depth": None}, "depth"),
        ({"heads": 5}, "heads"),
        ({"factorized": 3}, "factorized"),
        ({"factorized": {"types": "qkv", "rank": 3}}, "types"),
        ({"factorized": {"types": ["qqkv"], "rank": 3}}, "'qkv'"),
        ({"factorized": {"types": ["qkv"]}}, "rank"),
        ({"factorized": {"types": ["qkv"], "rank": 0}}, "rank"),
    ],
)
def test_wrong_dictionary_is_an_input_error(change: dict[str, object], word: str) -> None:
    values = {**preset("dit-nano", **LATENTS).to_dict(), **change}
    with pytest.raises(InputError) as raised:
        DiTConfig.from_dict(values)
    assert word in raised.value.what


def test_missing_field_is_named() -> None:
    values = preset("dit-nano", **LATENTS).to_dict()
    del values["heads"]
    with pytest.raises(InputError, match="heads"):
        DiTConfig.from_dict(values)
