"""The log's file, the defaults of training options, and devices."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import settings

from finectl.data.order import batch_indices
from finectl.diffusion.random import generator_for
from finectl.errors import InputError, UsageError
from finectl.models.presets import preset
from finectl.training.device import arithmetic, resolve_device
from finectl.training.estimate import training_estimate
from finectl.training.log import Log, read_log
from finectl.training.settings import (
    PAPER,
    SMALL,
    DataFields,
    describe_settings,
    resolve_data,
    resolve_settings,
    settings_of,
)


def test_the_log_is_cut_back_to_the_saved_step(tmp_path: Path) -> None:
    with Log(tmp_path, 0) as log:
        for step in range(1, 6):
            log.write(step, loss=float(step))
        log.sync()
        assert len(read_log(log.path)) == 5, "what was synced is on the disk"
    with Log(tmp_path, 3) as log:
        log.write(4, loss=0.5)
    assert [(entry["step"], entry["loss"]) for entry in read_log(log.path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 0.5)]
    with Log(tmp_path, 0):
        pass
    assert read_log(log.path) == []


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n[3]\n{"loss": 2}\n{"step": 2, "lo')
    assert read_log(path) == [{"step": 1, "loss": 1.0}]
    with Log(tmp_path, 2) as log:
        log.write(3, loss=0.0)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]
    assert read_log(tmp_path / "none") == []


@dataclass
class Options:
    steps: Any = None
    batch_size: Any = None
    lr: Any = None
    lr_schedule: str = "constant"
    warmup_steps: Any = None
    weight_decay: float = 0.0
    clip_grad: Any = None
    ema: Any = None
    eval_every: Any = None
    keep_at: Any = None
    seed: int = 0


def resolved(bundled: bool, **given: Any) -> dict[str, Any]:
    return resolve_settings(Options(**given), bundled, small={"steps": 500, "lr": 2e-3}, paper={"steps": 7000})


def test_what_is_left_out_depends_on_the_data() -> None:
    assert resolved(True).items() >= {**SMALL, "steps": 500, "lr": 2e-3, "eval_every": 50}.items()
    assert resolved(False).items() >= {**PAPER, "steps": 7000, "eval_every": 700}.items()
    assert PAPER["lr"] == 1e-4 and PAPER["batch_size"] == 256 and PAPER["ema"] == 0.9999


def test_what_is_given_stays_even_when_it_is_zero() -> None:
    given = {"steps": 3, "batch_size": 1, "lr": 0.0, "ema": 0.0, "eval_every": 0}
    assert resolved(True, **given).items() >= given.items()
    assert resolved(False, steps=3)["eval_every"] == 1


def test_a_list_of_updates_has_one_way_of_writing() -> None:
    assert resolved(True)["keep_at"] is None
    assert resolved(True, keep_at="300, 30,30,500")["keep_at"] == "30,300,500"
    for wrong in ("", "0", "3,", "3,-1", "1.5", "3;4", "²"):
        with pytest.raises(UsageError, match="no list of updates"):
            resolved(True, keep_at=wrong)
    with pytest.raises(UsageError, match="501, and there are 500"):
        resolved(True, keep_at="30,501")


def test_updates_are_kept_regularly_or_by_name() -> None:
    for every, at, expected in ((0, "1,4,9", [1, 4, 9]), (3, "1,6,10", [1, 3, 6, 9]), (0, "10", []), (4, None, [4, 8])):
        chosen = settings(steps=10, keep_every=every, keep_at=at)
        assert [update for update in range(12) if chosen.keeps(update)] == expected
        assert chosen.kept == len(expected), "what the estimate of the disk counts"


def test_settings_of_a_configuration_are_all_its_fields() -> None:
    assert settings_of(settings(steps=7)) == settings(steps=7)
    assert set(resolved(True)) <= set(asdict(settings()))
    assert "7 steps, batch 8" in describe_settings(settings(steps=7))


def test_the_estimate_grows_with_what_it_counts() -> None:
    small = preset("dit-nano", image_size=8, channels=1, num_classes=10)
    large = preset("dit-s", image_size=8, channels=1, num_classes=10)
    one, two = training_estimate(small, settings()), training_estimate(large, settings())
    assert all(two[key] > one[key] for key in ("parameters", "memory_bytes", "disk_bytes"))
    assert training_estimate(small, settings(batch_size=64))["memory_bytes"] > one["memory_bytes"]


def test_data_by_default_and_by_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    def name(data: str | None) -> str:
        return resolve_data(DataFields(data, None, None, None), ())[0].name

    assert name(None) == "digits"
    (tmp_path / "pictures").mkdir()
    for index in range(3):
        Image.new("L", (4, 4), index).save(tmp_path / "pictures" / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    assert name("folder:pictures") == f"folder:{tmp_path / 'pictures'}"
    with pytest.raises(InputError):
        name("folder:none")


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    with pytest.raises(UsageError, match="no device 'abacus'"):
        resolve_device("abacus")
    with pytest.raises(UsageError, match="CUDA devices"):
        resolve_device("cuda:99")
    with arithmetic(torch.device("cpu"), "bfloat16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with arithmetic(torch.device("cpu"), "float32"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_random_numbers_are_a_function_of_purpose_and_key() -> None:
    def draw(*key: Any) -> float:
        return float(torch.rand((), generator=generator_for(*key)))

    assert draw("train", 0, 1) == draw("train", 0, 1)
    keys = [("train", 0, 1), ("train", 1, 0), ("sample", 0, 1), ("train", 0), ("train", 0, 1, 0), ("train", 11, 0)]
    assert len({draw(*key) for key in keys}) == len(keys)


def test_the_order_of_the_data_is_a_function_of_seed_and_epoch() -> None:
    epoch = torch.cat([batch_indices(10, 5, step, 3) for step in range(2)])
    assert sorted(epoch.tolist()) == list(range(10))
    assert torch.equal(batch_indices(10, 10, 0, 3), epoch)
