"""Blocks as the items of the training loop, their loss, and the step from noise back to a LoRA."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from finectl.adapters.lora import LoraLayer
from finectl.diffusion.config import DiffusionConfig
from finectl.diffusion.losses import Noised
from finectl.diffusion.schedule import NoiseSchedule
from finectl.models.weights.basis import Basis
from finectl.models.weights.config import preset
from finectl.models.weights.layout import Layout
from finectl.models.weights.unet import WeightUNet, pool
from finectl.training.weights.blocks import BlockLoss, LabelledBlocks, Texts, block_set
from finectl.training.weights.collection import Collection
from finectl.training.weights.fitting import fit_codec, set_linear_path_
from finectl.training.weights.generate import Sampling, draw_values
from finectl.training.weights.starts import ridge

MASK = torch.tensor([[True] * 8, [True] * 4 + [False] * 4])


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_every_block_comes_with_every_text_of_its_concept() -> None:
    values = torch.arange(2 * 3 * 4, dtype=torch.float32).reshape(2, 3, 4, 1) * torch.ones(8)
    items = block_set(values, [(0, 1), (2,)], "f")
    assert len(items) == 2 * 3 * 2 * 4
    everything = torch.arange(len(items))
    images, labels = items.transform(items.read(everything)), items.labels
    assert images.shape == (48, 1, 1, 8)
    found = {(int(value), int(label)) for value, label in zip(images[:, 0, 0, 0], labels, strict=True)}
    wanted = set()
    for concept, texts in enumerate([(0, 1), (2,)]):
        for checkpoint in range(3):
            for block in range(4):
                wanted |= {((concept * 3 + checkpoint) * 4 + block, text * 4 + block) for text in texts}
    assert found == wanted
    # A concept with one text comes as often as one with two.
    assert int((labels // 4 == 2).sum()) == 24


def test_labels_name_text_and_block() -> None:
    network = WeightUNet(preset("tiny", blocks=3, length=8, text_width=4))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    texts = Texts.of(tensor(2, 5, 4), torch.tensor([[True, True, False, False, False], [True] * 3 + [False] * 2]))
    assert texts.tokens.shape == (2, 3, 4)
    model = LabelledBlocks(network, texts)
    x, t = tensor(1, 1, 1, 8), torch.tensor([300])
    found = model(x, t, torch.tensor([1 * 3 + 2]))
    row = texts.row(1)
    torch.testing.assert_close(found[:, 0], network(x[:, 0], t, torch.tensor([2]), row.tokens, row.mask))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, t, torch.tensor([0])).sum().backward()
    assert model.update_operations() == counter.get_total_flops() > 100_000
    assert set(model.state_dict()) == {f"network.{name}" for name in network.state_dict()}


def test_a_text_without_words_has_one_place_to_look_at() -> None:
    texts = Texts.of(tensor(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool))
    assert texts.mask.tolist() == [[True], [True]]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_filling_does_not_count(prediction: str) -> None:
    schedule = NoiseSchedule.from_config(DiffusionConfig(prediction=prediction))
    x0, noise = tensor(4, 1, 1, 8) * MASK[[0, 1, 0, 1]][:, None, None], tensor(4, 1, 1, 8, seed=1)
    y, t = torch.tensor([0, 1, 2, 3]), torch.tensor([100, 500, 700, 900])
    target = schedule.target(x0, noise, t)
    loss = BlockLoss(MASK)

    def off(by: Tensor) -> Tensor:
        return loss(lambda x, t, y: target + by[y % 2][:, None, None], schedule, Noised(x0, y, t, noise), step=0)

    assert off(torch.zeros(2, 8)).abs().max() == 0
    assert off(~MASK * 5.0)[[1, 3]].abs().max() == 0
    # Six weights a block on average: a full block counts 8 / 6, one half full 4 / 6.
    torch.testing.assert_close(off(torch.ones(2, 8)), torch.tensor([8.0, 4, 8, 4]) / 6)


def test_the_decoded_loss_is_the_squared_error_of_the_weights() -> None:
    schedule = NoiseSchedule.from_config(DiffusionConfig(prediction="v_prediction"))
    scale = torch.where(MASK, torch.tensor([[0.5], [0.25]]), 1.0)
    z = tensor(20, 2, 8) * MASK
    basis = Basis.fit(z, 4)
    x0, noise = basis.coefficients(z)[3][:, None, None], tensor(2, 1, 1, 4, seed=2)
    y, t = torch.tensor([0, 1]), torch.tensor([600, 800])
    off = 0.1 * tensor(2, 4, seed=3)
    target = schedule.target(x0, noise, t)
    loss = BlockLoss(torch.ones(2, 4, dtype=torch.bool), scale, basis)
    found = loss(lambda x, t, y: target + off[:, None, None], schedule, Noised(x0, y, t, noise), step=0)
    sigma = (1 - schedule.alphas_cumprod[t]).sqrt().float()
    error = basis.expand(sigma[:, None] * off) * scale * MASK
    unit = (8 * 0.5**2 + 4 * 0.25**2) / 2
    torch.testing.assert_close(found, error.square().sum(1) / unit)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_one_step_and_many_return_what_a_perfect_network_knows(prediction: str) -> None:
    schedule = NoiseSchedule.from_config(DiffusionConfig(prediction=prediction))
    clean = tensor(5, 8, seed=4)

    def predict(x: Tensor, t: Tensor, n: Tensor) -> Tensor:
        kept = schedule.alphas_cumprod[t].float()[:, None, None]
        noise = (x - kept.sqrt() * clean[n][:, None]) / (1 - kept).sqrt()
        return schedule.target(clean[n][:, None, None], noise[:, None], t)[:, 0]

    for sampling in (Sampling(600), Sampling(600, steps=7), Sampling(600, draws=3, batch_size=2)):
        found = draw_values(predict, 5, schedule, sampling, 8)
        torch.testing.assert_close(found, clean, rtol=0, atol=1e-4)


def test_draws_do_not_depend_on_the_batch_size_and_differ_by_seed() -> None:
    network = WeightUNet(preset("tiny", blocks=5, length=8, text_width=4)).eval()
    with torch.no_grad():
        network.conv_out.weight.normal_(generator=torch.Generator().manual_seed(0))
    row = Texts.of(tensor(1, 2, 4), torch.ones(1, 2, dtype=torch.bool))
    schedule = NoiseSchedule.of(network.config)

    def predict(x: Tensor, t: Tensor, n: Tensor) -> Tensor:
        return network(x, t, n, row.tokens, row.mask)  # type: ignore[no-any-return]

    usual = Sampling(500)
    whole = draw_values(predict, 5, schedule, usual, 8)
    torch.testing.assert_close(
        draw_values(predict, 5, schedule, replace(usual, batch_size=2), 8), whole, rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(draw_values(predict, 5, schedule, replace(usual, seed=1), 8), whole)
    several = [draw_values(predict, 5, schedule, replace(usual, draws=count), 8) for count in (1, 2)]
    torch.testing.assert_close(several[0], whole)
    assert not torch.allclose(several[1], whole)


def test_the_linear_path_is_the_ridge_regression_of_the_baseline_and_stays_so() -> None:
    layout = Layout.of([LoraLayer("a", "linear", (1, 7), (1, 1))], 1, 8)
    texts = Texts(tensor(9, 2, 4), torch.ones(9, 2, dtype=torch.bool))
    rows = ((0, 1), (2,), (3, 4), (5, 6), (7,))
    features = pool(texts.tokens, texts.mask)
    linear = tensor(4, 1, 8, seed=8)
    blocks = torch.einsum("ve,enb->vnb", features[[concept[0] for concept in rows]], linear)[:, None]
    train = Collection(tuple("abcde"), blocks, rows)
    codec = fit_codec(layout, torch.zeros(1, 8), blocks, "none")
    network = WeightUNet(preset("tiny", blocks=1, length=8, text_width=4, text_rank=4))
    network.centre_texts_(features[:8])
    said = set_linear_path_(network, texts, codec, train, None)
    assert said == {"regulariser": 0.1, "r2_of_coefficients": None}
    units = (features - network.text_mean) / network.text_unit
    places = torch.tensor([[0, 1], [2, 2], [3, 4], [5, 6], [7, 7]])
    wanted = ridge(units[places], codec.encode(train.means).flatten(1).double(), 0.1).float()
    told = network.linear_in(units[8:])
    found = told @ network.linear_out.weight.reshape(4, 8)
    torch.testing.assert_close(found, units[8:] @ wanted, rtol=1e-4, atol=1e-5)
    names = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert names == {"text_mean", "text_unit", "linear_in.weight", "linear_out.weight"}
