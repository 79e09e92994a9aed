"""The table of encoded texts: its rows, its place in the cache, and how it goes on after a kill."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from finectl.errors import InputError
from finectl.models import text as encoders
from finectl.models.text import describe_text
from finectl.models.unet import TextUNet, UNet, condition
from finectl.models.unet_presets import text_unet_preset
from finectl.training import texts
from finectl.training.flops import count_forward
from finectl.training.texts import TextTable, open_table

RECORD = describe_text("hash", 8)
CPU = torch.device("cpu")
TEXTS = ["b", "a", "c", "a", ""]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FINECTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that the encoder is asked for."""
    asked: list[str] = []
    load = encoders.load_text

    class Counting:
        def __init__(self, record: Any, device: Any) -> None:
            self.encoder = load(record, device)

        def encode(self, some: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
            asked.extend(some)
            return self.encoder.encode(some)

    monkeypatch.setattr(texts, "load_text", Counting)
    return asked


def test_each_text_once_in_order_the_empty_one_last_and_a_second_run_encodes_nothing(encoded: list[str]) -> None:
    table = open_table(TEXTS, RECORD, CPU)
    assert encoded == ["a", "b", "c", ""] == list(table.texts) and len(table) == 4
    wanted = encoders.load_text(RECORD).encode(["c", "", "a"])[0].half()
    assert torch.equal(table.gather(table.rows_of(["c", "", "a"])), wanted)
    assert torch.equal(table.gather(torch.tensor([3])), wanted[1:2]), "the null class is the last row"
    again = open_table(reversed(TEXTS), RECORD, CPU)
    assert len(encoded) == 4 and torch.equal(again.gather(torch.arange(4)), table.gather(torch.arange(4)))


def test_another_encoder_and_other_texts_have_tables_of_their_own(encoded: list[str], cache: Path) -> None:
    open_table(["a"], RECORD, CPU)
    open_table(["a"], describe_text("hash", 16), CPU)
    open_table(["a", "b"], RECORD, CPU)
    assert len(encoded) == 2 + 2 + 3 and len(list((cache / "texts").iterdir())) == 3


def test_a_killed_run_goes_on_with_the_batches_that_are_missing(
    encoded: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "BATCH", 2)
    many = [f"text {index}" for index in range(9)]
    whole = open_table(many, RECORD, CPU).gather(torch.arange(10))
    (path,) = cache.glob("texts/*/texts.safetensors")
    encoded.clear()
    path.unlink()
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_table(many, RECORD, CPU, check=check)
    assert len(encoded) == 4
    (part,) = path.parent.glob(".texts*")
    with part.open("ab") as stream:
        stream.write(b"half a batch")
    assert torch.equal(open_table(many, RECORD, CPU).gather(torch.arange(10)), whole)
    assert len(encoded) == 10 and [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_damaged_file_is_made_again(encoded: list[str], cache: Path) -> None:
    wanted = open_table(TEXTS, RECORD, CPU).gather(torch.arange(4))
    (path,) = cache.glob("texts/*/texts.safetensors")
    for damaged in (path.read_bytes()[:-8], b"", b"\0" * 5000):
        path.write_bytes(damaged)
        assert torch.equal(open_table(TEXTS, RECORD, CPU).gather(torch.arange(4)), wanted)
    assert len(encoded) == 16


def test_large_tables_stay_in_the_file_and_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    table = open_table(TEXTS, RECORD, CPU)
    monkeypatch.setattr(texts, "WHOLE_BYTES", 0)
    mapped = open_table(TEXTS, RECORD, CPU)
    rows = torch.tensor([3, 0, 0, 2])
    assert torch.equal(table.gather(rows), mapped.gather(rows)) and mapped._whole is None


def test_the_rows_of_a_step_are_read_once_and_changed_rows_are_seen() -> None:
    table = open_table(TEXTS, RECORD, CPU)
    rows = torch.tensor([0, 1])
    first = table.gather(rows)
    assert table.gather(rows) is first
    rows[0] = 2
    assert not torch.equal(table.gather(rows), first)
    with pytest.raises(IndexError):
        table.gather(torch.tensor([4]))


def test_another_encoder_in_the_place_of_the_one_that_was_found_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(InputError):
        open_table(["a"], {**RECORD, "name": str(tmp_path)}, CPU)


def test_a_model_of_text_with_a_table_is_a_model_of_labels() -> None:
    table = open_table(TEXTS, RECORD, CPU)
    config = text_unet_preset("unet-text-nano", image_size=8, channels=1, text_width=8)
    model = TextUNet(config).eval()
    names = list(model.state_dict())
    condition(model, table, 0.25)
    assert list(model.state_dict()) == names, "the table is no part of the model"
    assert (model.config.num_classes, model.config.label_dropout) == (3, 0.25) and model.config.has_null_class
    assert model.config.to_dict()["architecture"] == "unet2d-condition"
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 900])
    rows = torch.tensor([2, 3])
    with torch.no_grad():
        by_row, by_vector = model(x, t, rows), model(x, t, table.gather(rows).float())
    assert torch.equal(by_row, by_vector)
    with torch.no_grad():
        assert not torch.allclose(model(x, t, torch.tensor([0, 3])), by_row, atol=1e-6)
    assert (count_forward(model.config, 2) or 0) > 0
    assert count_forward(model.config, 1) != count_forward(config, 1), "32 vectors a text here, 77 where none is known"


def test_without_a_table_rows_mean_nothing() -> None:
    config = text_unet_preset("unet-text-nano", image_size=8, channels=1, text_width=8)
    with pytest.raises(Exception, match="no table"):
        TextUNet(config)(torch.zeros(1, 1, 8, 8), torch.zeros(1).long(), torch.zeros(1).long())
    assert not hasattr(UNet, "condition") and isinstance(open_table([""], RECORD, CPU), TextTable)
