"""Text encoders: the weightless one, CLIP through transformers, and how they are found and told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_clip

from finectl.errors import InputError, UsageError
from finectl.models.text import describe_text, find_recorded_text, load_text, require_same_text

TEXTS = ["", "a photo of a cat", "a photo of a dog", "a cat of photo a"]


def test_hashed_words_have_unit_variance_are_always_the_same_and_know_their_places() -> None:
    encoder = load_text(describe_text("hash"))
    tokens, mask = encoder.encode(TEXTS)
    assert tokens.shape == (4, 32, 64) == (4, encoder.length, encoder.width) and mask.sum(1).tolist() == [2, 7, 7, 7]
    assert torch.equal(load_text(describe_text("hash")).encode(TEXTS[1:2])[0][0], tokens[1])
    assert not tokens[~mask].any() and 0.8 < tokens[mask].square().mean() < 1.25
    assert torch.equal(tokens[1, :5], tokens[2, :5]) and not torch.allclose(tokens[1, 5], tokens[2, 5])
    assert not torch.allclose(tokens[1], tokens[3]), "the order of words must count"
    # The first numbers of a word's vector, worked out by hand from SHAKE-256, guard every model that was trained so.
    assert tokens[1, 1, :2].tolist() == pytest.approx(KNOWN, abs=1e-6)


KNOWN = [0.0319323185, 0.0714942922]


def test_hashed_texts_are_cut_and_normalised() -> None:
    encoder = load_text(describe_text("hash", 8))
    long, longer, wide, narrow, odd = encoder.encode(["a " * 30, "a " * 300, "\uff23\uff21\uff34", "cat", "\ud800"])[0]
    assert torch.equal(long, longer) and torch.equal(wide, narrow) and bool(odd.isfinite().all())
    assert describe_text("hash", 8)["digest"] != describe_text("hash")["digest"]
    with pytest.raises(UsageError, match="7 numbers"):
        describe_text("hash", 7)


def test_clip_gives_what_transformers_gives(tmp_path: Path) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = tiny_clip(tmp_path / "pipeline")
    record = describe_text(str(folder))
    assert (record["name"], record["length"], record["width"]) == (str(folder), 8, 16)
    texts = ["", "a b", "g f e d c b a g f e"]
    tokens, mask = load_text(record).encode(texts)
    tokenizer = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"))
    ids = tokenizer(texts, padding="max_length", max_length=8, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = CLIPTextModel.from_pretrained(str(folder / "text_encoder")).eval()(ids).last_hidden_state
    torch.testing.assert_close(tokens, wanted, rtol=0, atol=1e-6)
    assert mask.sum(1).tolist() == [2, 4, 8]
    assert describe_text(str(folder / "text_encoder"))["digest"] == record["digest"], "beside its tokenizer"


def test_what_decides_the_vectors_decides_the_digest(tmp_path: Path) -> None:
    one = describe_text(str(tiny_clip(tmp_path / "a")))
    assert one["digest"] == describe_text(str(tiny_clip(tmp_path / "b")))["digest"]
    others = [
        describe_text(str(tiny_clip(tmp_path / "c", seed=1)))["digest"],
        describe_text(str(tiny_clip(tmp_path / "d", words="gfedcba")))["digest"],
        describe_text("hash", 16)["digest"],
    ]
    assert len({one["digest"], *others}) == 4
    with pytest.raises(InputError, match="this encoder is") as caught:
        require_same_text(one, describe_text("hash", 16), "the model")
    assert "hash" in caught.value.what and one["name"] in caught.value.what


def gone(folder: Path, name: str) -> None:
    (folder / name).unlink()


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda f: gone(f, "text_encoder/model.safetensors"), "model.safetensors is missing"),
        (
            lambda f: (f / "text_encoder/model.safetensors").rename(f / "text_encoder/pytorch_model.bin"),
            "a pickle, which can hold code",
        ),
        (lambda f: (f / "tokenizer").rename(f / "words"), "no tokenizer"),
        (lambda f: (f / "text_encoder").rename(f / "encoder"), "no text encoder"),
        (lambda f: (f / "text_encoder/config.json").write_text('{"model_type": "t5"}'), "of type 't5'"),
        (lambda f: (f / "text_encoder/config.json").write_text("{"), "config.json"),
        (lambda f: (f / "text_encoder/model.safetensors").write_bytes(b"1" * 100), "model.safetensors"),
    ],
)
def test_what_is_missing_or_damaged_is_said_with_what_to_put_where(tmp_path: Path, break_it: Any, says: str) -> None:
    folder = tiny_clip(tmp_path / "pipeline")
    recorded = describe_text(str(folder))
    break_it(folder)
    with pytest.raises(InputError) as caught:
        describe_text(str(folder))
    assert says in caught.value.what and caught.value.fix
    with pytest.raises(InputError, match="cannot be read") as later:
        find_recorded_text(recorded, "the model")
    assert "--text-encoder PATH" in later.value.fix


def test_nothing_there_names_the_files_and_no_network_is_used() -> None:
    for name in ("/nowhere", "openai/clip-vit-large-patch14"):
        with pytest.raises(InputError) as caught:
            describe_text(name)
        assert "--download" in caught.value.fix and "vocab.json" in f"{caught.value.fix} {caught.value.expected}"
