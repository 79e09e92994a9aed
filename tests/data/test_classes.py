"""Some classes of a data set: labels and split are those of the whole."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from support import TINY_DATA, run_cli

from finectl.data.classes import chosen_labels
from finectl.data.dataset import load, load_both
from finectl.data.sources import absolute_spec, describe, split_classes
from finectl.errors import UsageError


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_part_holds_exactly_the_images_of_its_classes_in_the_same_split(split: str) -> None:
    whole, part = load("digits", split), load("digits#7,3", split)
    wanted = (whole.labels == 3) | (whole.labels == 7)
    assert 0 < len(part) == int(wanted.sum())
    assert torch.equal(part.images, whole.images[wanted])
    assert torch.equal(part.labels, whole.labels[wanted])  # labels are not counted anew
    assert len(part) == (part.info.train_count if split == "train" else part.info.heldout_count)


def test_a_part_is_described_without_torch_as_a_set_of_its_own() -> None:
    whole, part, turned = describe("digits"), describe("digits#3,7"), describe("digits#7, 3")
    assert part == turned
    assert part.name == "digits#3,7" and part.whole == whole.fingerprint
    assert part.fingerprint not in (whole.fingerprint, describe("digits#3").fingerprint)
    assert part.num_classes == 10 and chosen_labels(part) == (3, 7)
    assert len(load_both("digits#3,7")) == part.count == part.train_count + part.heldout_count


def test_the_classes_of_photographs_and_folders(tmp_path: Path) -> None:
    assert set(load("photos#cat,rocket").labels.tolist()) == {1, 6}
    for name, count in (("apple", 4), ("pear", 3)):
        for number in range(count):
            (tmp_path / name).mkdir(exist_ok=True)
            PIL.Image.fromarray(np.full((8, 8), number, np.uint8)).save(tmp_path / name / f"{number}.png")
    assert describe(f"folder:{tmp_path}#pear").count == 3
    assert set(load(f"folder:{tmp_path}#pear").labels.tolist()) == {1}


def test_a_path_with_the_sign_in_it_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine#3").mkdir()
    monkeypatch.chdir(tmp_path)
    assert split_classes("folder:mine#3") == ("folder:mine#3", ())
    assert absolute_spec("folder:mine#3#a,b") == f"folder:{os.path.join(tmp_path, 'mine#3')}#a,b"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("digits#", "names no class"),
        ("digits#3,3", "twice"),
        ("photos#cet", "did you mean"),
        ("shape:1x8x8:4#1", "class"),
    ],
)
def test_what_is_no_class_is_refused(spec: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        describe(spec)


def test_training_goes_on_with_the_classes_of_its_input(workspace: Path) -> None:
    model = run_cli("init", "--method", "he", "--model", "dit-nano", "--depth", 1, "--data", "digits#3,7").path
    trained = run_cli("train", model, *TINY_DATA).path
    assert "name: digits#3,7" in (trained / "manifest.yaml").read_text()
