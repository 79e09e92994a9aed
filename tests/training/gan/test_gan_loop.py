"""The loop that trains GANs: it learns, its discriminator starts late, and a resumed run equals an unbroken one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finectl.adapters.lora import attach_lora, initial_lora, load_lora, lora_layers, lora_shapes
from finectl.artifacts.job import Execution
from finectl.console import Console
from finectl.errors import ComputationError, InputError, Interrupted, UsageError
from finectl.models.gan.config import DiscriminatorConfig, GeneratorConfig
from finectl.models.gan.discriminator import PatchDiscriminator
from finectl.models.gan.generator import Generator, initialize_
from finectl.models.text import describe_text, load_text
from finectl.training.gan.loop import Place, TrainedGan, fit_gan
from finectl.training.gan.pairs import PairStream, Texts, edit_rows, heldout_l1
from finectl.training.gan.settings import GanFields, GanSettings, last_checkpoints, resolve_gan

CPU = torch.device("cpu")
SETTINGS = GanSettings(steps=6, batch_size=4, lr=2e-3, lr_discriminator=2e-3, gan_from=0.5, eval_every=3)


@dataclass(frozen=True)
class Memory:
    """Pairs in memory: `dark` halves the levels, `bright` inverts them."""

    images: Tensor

    def source_rows(self, rows: Tensor) -> Tensor:
        return self.images[rows]

    def target_rows(self, concept: str, rows: Tensor) -> Tensor:
        return self.images[rows] // 2 if concept == "dark" else 255 - self.images[rows]


def memory() -> Memory:
    blocks = torch.randint(0, 256, (10, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    return Memory(blocks.repeat_interleave(8, 2).repeat_interleave(8, 3).to(torch.uint8))


def texts() -> Texts:
    return Texts.of(load_text(describe_text("hash", 6)), [["dark", "gloomy"], ["bright"]])


def stream(batch_size: int = 4, seed: int = 0) -> PairStream:
    return PairStream(memory(), torch.arange(8), ("dark", "bright"), texts(), batch_size, seed, CPU)


def players(seed: int = 0) -> tuple[Generator, PatchDiscriminator]:
    found = Generator(GeneratorConfig(4, 2, 16, 6)), PatchDiscriminator(DiscriminatorConfig(4, 1))
    for model in found:
        initialize_(model, torch.Generator().manual_seed(seed))
    return found


def place(folder: Path, stop: Callable[[], bool] = lambda: False, **execution: object) -> Place:
    folder.mkdir(exist_ok=True)
    (folder / "state").mkdir(exist_ok=True)
    return Place(folder, folder / "state", Console(quiet=True), Execution(**execution), stop)  # type: ignore[arg-type]


def run(where: Place, settings: GanSettings = SETTINGS, keep: tuple[int, ...] = ()) -> TrainedGan:
    heldout = heldout_l1(memory(), torch.tensor([8, 9]), ("dark", "bright"), texts(), CPU)
    return fit_gan(where, *players(), stream(settings.batch_size), settings, heldout=heldout, keep=keep)


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_step_has_the_same_pairs_whenever_it_is_asked_for() -> None:
    first, again = stream()(5), stream()(5)
    assert torch.equal(first.x, again.x) and torch.equal(first.y, again.y)
    assert all(torch.equal(a, b) for a, b in zip(first.text, again.text, strict=True))
    assert not torch.equal(stream(seed=1)(5).x, first.x)
    assert -1 <= first.x.min() and first.x.max() <= 1


def test_an_epoch_has_every_pair_once_with_a_text_of_its_concept() -> None:
    batch = stream(16)(0)
    source, target = ((part + 1) * 127.5 for part in (batch.x, batch.y))
    dark = (target - torch.floor(source.round() / 2)).abs().amax((1, 2, 3)) < 1e-3
    bright = (target - (255 - source)).abs().amax((1, 2, 3)) < 1e-3
    assert dark.sum() >= 8 and bright.sum() >= 8 and bool((dark | bright).all())
    known = texts()
    said = [[bool(torch.equal(row, text)) for text in known.tokens].index(True) for row in batch.text[0]]
    assert {said[index] for index in range(16) if dark[index] and not bright[index]} == {0, 1}
    assert {said[index] for index in range(16) if bright[index] and not dark[index]} == {2}


def test_it_learns_and_the_discriminator_starts_late(tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=40, batch_size=8, eval_every=40)
    run(place(tmp_path), settings)
    entries = log(tmp_path)
    heldout = [entry["heldout_l1"] for entry in entries if "heldout_l1" in entry]
    assert len(heldout) == 2 and heldout[1] < 0.8 * heldout[0]
    losses = {entry["step"]: "discriminator_loss" in entry for entry in entries if "l1" in entry}
    assert [step for step, judged in losses.items() if judged] == list(range(21, 41))


def test_the_discriminator_is_left_alone_until_it_takes_part(tmp_path: Path) -> None:
    before = players()[1].state_dict()
    never = run(place(tmp_path / "a"), replace(SETTINGS, gan_from=1.0)).discriminator.state_dict()
    late = run(place(tmp_path / "b")).discriminator.state_dict()
    assert all(torch.equal(never[name], before[name]) for name in before)
    assert not torch.equal(late["conv1.weight"], before["conv1.weight"])


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_interrupted_and_resumed_equals_unbroken(tmp_path: Path, ema: float) -> None:
    settings = replace(SETTINGS, ema=ema)
    whole = run(place(tmp_path / "whole"), settings, keep=(2, 5))
    asked = iter([False] * 3 + [True])
    with pytest.raises(Interrupted) as stopped:
        run(place(tmp_path / "parts", lambda: next(asked)), settings, keep=(2, 5))
    assert stopped.value.exit_code == 75
    parts = run(place(tmp_path / "parts"), settings, keep=(2, 5))
    for one, two in ((whole.generator, parts.generator), (whole.discriminator, parts.discriminator)):
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert set(whole.kept) == set(parts.kept) == {2, 5}
    assert all(torch.equal(whole.kept[2][name], parts.kept[2][name]) for name in whole.kept[2])
    assert (whole.ema is None) == (ema == 0)
    if whole.ema is not None and parts.ema is not None:
        assert all(torch.equal(whole.ema[name], parts.ema[name]) for name in whole.ema)
    timeless = [
        [{k: v for k, v in entry.items() if k != "seconds"} for entry in log(tmp_path / n)] for n in ("whole", "parts")
    ]
    assert timeless[0] == timeless[1]


def test_saved_by_steps_and_killed(tmp_path: Path) -> None:
    """What is in memory is lost between two saved states, and the same steps are done again."""
    whole = run(place(tmp_path / "whole"))
    calls = iter([False] * 4 + [True])

    def kill() -> bool:
        if next(calls):
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        run(place(tmp_path / "parts", kill, save_every=2))
    parts = run(place(tmp_path / "parts", save_every=2))
    assert parts.cost["steps"] == whole.cost["steps"] == 6
    state = parts.generator.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.generator.state_dict().items())


def test_adapters_are_trained_and_the_rest_stays(tmp_path: Path) -> None:
    generator, discriminator = players()
    layers = lora_layers(generator.config, 2)
    start = initial_lora(generator.state_dict(), layers, 0)
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    attach_lora(generator, layers)
    load_lora(generator, layers, start)
    trained = fit_gan(place(tmp_path), generator, discriminator, stream(), SETTINGS, keep=(6,))
    assert set(trained.kept[6]) == set(lora_shapes(layers))
    state = generator.state_dict()
    changed = {name for name in state if name in start and not torch.equal(state[name], start[name])}
    assert changed == set(start)
    assert all(torch.equal(state[name], value) for name, value in before.items() if name not in start)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(ComputationError, match="not finite"):
        run(place(tmp_path), replace(SETTINGS, lr=float("inf")))


def test_a_state_of_other_networks_is_refused(tmp_path: Path) -> None:
    asked = iter([True])
    with pytest.raises(Interrupted):
        run(place(tmp_path, lambda: next(asked)))
    wider = Generator(GeneratorConfig(8, 2, 16, 6))
    with pytest.raises(InputError, match="not the state"):
        fit_gan(place(tmp_path), wider, players()[1], stream(), SETTINGS)


def test_learning_rates_fall_in_the_second_half() -> None:
    factors = [replace(SETTINGS, steps=8).lr_factor(step) for step in range(8)]
    assert factors == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_checkpoints_are_the_last_ones() -> None:
    assert last_checkpoints(150, 3) == (130, 140, 150)
    assert last_checkpoints(10, 2) == (9, 10)
    with pytest.raises(UsageError, match="3 checkpoints"):
        last_checkpoints(10, 3)


def test_epochs_become_steps() -> None:
    fields = GanFields(None, 3, None, None, None, 100.0, None, None, 0)
    defaults = {"batch_size": 4, "lr": 1e-3, "lr_discriminator": 1e-3, "gan_from": 0.0, "epochs": 20}
    assert resolve_gan(fields, 10, defaults)["steps"] == 8
    assert resolve_gan(replace(fields, epochs=None), 10, defaults)["steps"] == 50
    with pytest.raises(UsageError, match="both given"):
        resolve_gan(replace(fields, steps=3), 10, defaults)


def test_edited_images_are_levels() -> None:
    generator = players()[0]
    made = edit_rows(generator, memory(), torch.tensor([1, 2]), texts(), 1, CPU)
    assert made.dtype == torch.uint8 and made.shape == (2, 3, 16, 16)
