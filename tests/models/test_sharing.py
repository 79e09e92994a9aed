"""Forms of sharing: counts, starts, gradients, and that a condensed model computes what its dense form does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from finectl.diffusion.random import generator_for
from finectl.errors import InputError, UsageError
from finectl.models.dit import DiT, dense_state_dict, initialize_
from finectl.models.learngene import dense_config, split_state, storage
from finectl.models.presets import LAYER_TYPES, DiTConfig, FactorConfig, count_parameters, layer_shapes, preset
from finectl.models.tied import join_templates, read_line
from finectl.models.tying import OWN, LineConfig, TemplateConfig, Tying

DENSE = DiTConfig(width=16, depth=3, heads=2, patch_size=2, image_size=4, channels=1, num_classes=3)
TYPES = tuple(LAYER_TYPES)
FORMS: dict[str, Tying] = {
    "fine": FactorConfig(TYPES, 16),
    "share": LineConfig(slope=False),
    "tleg": LineConfig(slope=True),
    "wave": TemplateConfig.of_rank(TYPES, 8, 16, layer_shapes(DENSE)),
    "wave-some": TemplateConfig(("qkv", "out"), size=4, counts=(7, 5)),
}
every_form = pytest.mark.parametrize("tying", FORMS.values(), ids=FORMS)


def built(tying: Tying, config: DiTConfig = DENSE) -> DiT:
    model = initialize_(DiT(replace(config, factorized=tying)), generator_for("test", 0))
    with torch.no_grad():  # adaLN starts at zero, which would hide all that lies behind its gates
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator_for("noise", parameter.numel())))
    return model


def predict(model: DiT) -> Tensor:
    x = torch.randn(2, 1, 4, 4, generator=generator_for("x", 0))
    return model(x, torch.tensor([3, 700]), torch.tensor([0, 3]))


@every_form
def test_the_dense_form_computes_the_same(tying: Tying) -> None:
    model = built(tying).double()
    dense = DiT(DENSE)
    dense.load_state_dict(dense_state_dict(model, model.config))
    x = torch.randn(2, 1, 4, 4, generator=generator_for("x", 0))
    t, y = torch.tensor([3, 700]), torch.tensor([0, 3])
    assert torch.allclose(model(x.double(), t, y).float(), dense(x, t, y), atol=1e-5)


@every_form
def test_counts_are_those_of_the_built_model(tying: Tying) -> None:
    model = DiT(replace(DENSE, factorized=tying))
    counts = count_parameters(model.config)
    assert counts["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert counts["factors"] == sum(p.numel() for name, p in model.named_parameters() if name.startswith("factors."))
    kept = split_state(model.state_dict(), model.config)
    stored = storage(model.config, [2, 3])
    for part, tensors in (("learngene", kept.factors), ("rest", kept.rest), ("curves", kept.curves)):
        assert stored[part] == sum(value.numel() for value in tensors.values()), part


@every_form
def test_the_configuration_survives_its_json(tying: Tying) -> None:
    config = replace(DENSE, factorized=tying)
    assert DiTConfig.from_dict(config.to_dict()) == config


@every_form
def test_the_start_is_a_function_of_the_generator_with_layers_apart(tying: Tying) -> None:
    config = replace(DENSE, factorized=tying)
    one, two = (initialize_(DiT(config), generator_for("start", 1)).state_dict() for _ in range(2))
    other = initialize_(DiT(config), generator_for("start", 2)).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["x_embedder.proj.weight"], other["x_embedder.proj.weight"])
    dense = dense_state_dict(one, config)
    for kind in ("qkv", "out"):
        first, last = (dense[f"blocks.{index}.{LAYER_TYPES[kind]}.weight"] for index in (0, 2))
        assert torch.equal(first, last) == (tying.method == "share")
        share = (first - last).norm() / first.norm()
        assert share < 0.5, "layers start near each other, so that what they own has a curve over depth"
        rows, columns = first.shape
        assert float(first.var()) == pytest.approx(2 / (rows + columns), rel=0.5)
    assert not dense["blocks.1.adaLN_modulation.1.weight"].any(), "adaLN-Zero"


@every_form
def test_gradients_reach_all_that_is_shared_and_owned(tying: Tying) -> None:
    model = built(tying)
    predict(model).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("factors.") or name.rpartition(".")[2] in OWN:
            assert parameter.grad is not None and bool(parameter.grad.any()), name


def test_layers_of_a_line_lie_on_it() -> None:
    model = built(FORMS["tleg"])
    dense = dense_state_dict(model, model.config)
    for path in LAYER_TYPES.values():
        for part in ("weight", "bias"):
            first, middle, last = (dense[f"blocks.{index}.{path}.{part}"] for index in range(3))
            assert torch.allclose(middle - first, last - middle, atol=1e-6)
            assert not torch.equal(first, last)


def test_a_line_ends_before_its_slope_does() -> None:
    line = {"base_weight": torch.ones(1, 1), "slope_weight": torch.full((1, 1), 3.0)}
    assert [float(read_line(line, "weight", index / 3)) for index in range(3)] == [1.0, 2.0, 3.0]


def test_templates_are_joined_as_kronecker_products() -> None:
    scalers = torch.randn(3, 2, 5, generator=generator_for("s", 0), dtype=torch.float64)
    templates = torch.randn(3, 4, 4, generator=generator_for("t", 0), dtype=torch.float64)
    wanted = sum(torch.kron(scalers[n], templates[n]) for n in range(3))
    assert torch.allclose(join_templates(scalers, templates), torch.as_tensor(wanted), atol=1e-12)


def test_one_template_of_full_size_is_a_shared_matrix() -> None:
    tying = TemplateConfig.of_rank(("o",), 16, 8, layer_shapes(DENSE))
    assert tying.counts == (1,)
    model = built(tying)
    with torch.no_grad():
        for block in model.blocks:
            block.get_submodule("attn.proj").get_parameter("scalers").fill_(1.0)
    dense = dense_state_dict(model, model.config)
    for index in range(3):
        assert torch.equal(dense[f"blocks.{index}.attn.proj.weight"], model.state_dict()["factors.o.templates"][0])


@pytest.mark.parametrize(
    ("name", "shared", "with_embedders"),
    [
        ("dit-b", {"share": 10_628_352, "tleg": 2 * 10_628_352, "fine": 13_565_952, "wave": 13_565_952}, 2_775_584),
        ("dit-l", {"share": 18_889_728, "tleg": 2 * 18_889_728, "fine": 24_117_248, "wave": 24_117_248}, 4_487_200),
    ],
)
def test_what_is_kept_of_the_papers_models(name: str, shared: dict[str, int], with_embedders: int) -> None:
    dense = preset(name, depth=12, image_size=32, channels=4, num_classes=1000, learn_sigma=True)
    types = tuple(LAYER_TYPES)
    forms: dict[str, Tying] = {
        "share": LineConfig(slope=False),
        "tleg": LineConfig(slope=True),
        "fine": FactorConfig(types, dense.width),
        "wave": TemplateConfig.of_rank(types, dense.width // 2, dense.width, layer_shapes(dense)),
    }
    for form, tying in forms.items():
        counts = storage(replace(dense, factorized=tying), [4, 6])
        assert counts["learngene"] == shared[form]
        assert counts["rest"] == with_embedders
    assert storage(replace(dense, factorized=forms["share"]), [4])["curves"] == 0


def test_a_template_that_does_not_tile_is_refused() -> None:
    with pytest.raises(UsageError, match="5x5"):
        replace(DENSE, factorized=TemplateConfig(("o",), size=5, counts=(4,)))


def test_an_unknown_form_is_refused() -> None:
    values = replace(DENSE, factorized=FORMS["wave"]).to_dict()
    values["factorized"]["method"] = "waves"
    with pytest.raises(InputError, match="waves"):
        DiTConfig.from_dict(values)


def test_the_dense_configuration_shares_nothing() -> None:
    assert dense_config(replace(DENSE, factorized=FORMS["tleg"]), 5) == replace(DENSE, depth=5)
