"""Pairs: source images and their splits, folders made elsewhere, and the files of the artifact."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finectl.data.concepts import Concept
from finectl.data.pair_folders import describe_folders, read_folder
from finectl.data.pair_sources import LEAST_RANGE, describe_sources, most_images, read_sources, split_of, thinned
from finectl.data.pairs import INDEX, SPLITS, Pairs, Source, target_file, write_images, write_sources
from finectl.errors import InputError

ONE = (Concept("one", "a thing", atoms=("one",)),)
TWO = (*ONE, Concept("two", "another", atoms=("two",)))


def colour(seed: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, 3, dtype=np.uint8)
    return Image.fromarray(np.broadcast_to(levels, (size[1], size[0], 3)).copy())


def save(path: Path, seed: int, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colour(seed, size).save(path)


def layout(root: Path, kind: str, count: int = 4, splits: bool = False, after: int = 100) -> Path:
    """Write pairs: A of seed i, B of seed `after` + i."""
    for index in range(count):
        split = f"{SPLITS[index % 3]}/" if splits else ""
        if kind == "halves":
            both = Image.new("RGB", (16, 8))
            both.paste(colour(index), (0, 0))
            both.paste(colour(after + index), (8, 0))
            (root / split).mkdir(parents=True, exist_ok=True)
            both.save(root / f"{split}{index}.png")
        elif kind == "folders":
            save(root / "A" / f"{split}{index}.png", index)
            save(root / "B" / f"{split}{index}.png", after + index)
        else:
            save(root / f"{split}{index}_A.png", index)
            save(root / f"{split}{index}_B.png", after + index)
    return root


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("splits", [True, False])
@pytest.mark.parametrize("kind", ["halves", "folders", "suffixes"])
def test_the_three_layouts(kind: str, splits: bool, named: bool, tmp_path: Path) -> None:
    found = describe_folders(layout(tmp_path, kind, 4, splits), ONE, kind if named else "auto")
    assert found.count == 4 and found.folders[0].size == (8, 8)
    before, after = (read_folder(found.folders[0], 8, before=which) for which in (True, False))
    assert before.shape == after.shape == (4, 3, 8, 8) and before.dtype == torch.uint8
    for source, a, b in zip(found.sources, before, after, strict=True):
        index = int(source.name.rsplit("/", 1)[-1])
        assert a[:, 0, 0].tolist() == list(colour(index).getpixel((0, 0)))
        assert b[:, 0, 0].tolist() == list(colour(100 + index).getpixel((0, 0)))
        if splits:
            assert source.split == SPLITS[index % 3]
    assert {source.split for source in found.sources} == set(SPLITS)
    assert read_folder(found.folders[0], 4, before=True).shape == (4, 3, 4, 4)


def test_a_folder_a_concept(tmp_path: Path) -> None:
    layout(tmp_path / "one", "folders")
    layout(tmp_path / "two", "suffixes", after=200)
    found = describe_folders(tmp_path, TWO, "auto")
    assert [folder.concept for folder in found.folders] == ["one", "two"]
    assert not torch.equal(*(read_folder(folder, 8, before=False) for folder in found.folders))
    before = found.fingerprint
    save(tmp_path / "two" / "3_B.png", 7)
    assert describe_folders(tmp_path, TWO, "auto").fingerprint != before
    save(tmp_path / "two" / "3_A.png", 7)
    with pytest.raises(InputError, match=r"'two' are not those of 'one': 3"):
        describe_folders(tmp_path, TWO, "auto")
    (tmp_path / "two" / "3_A.png").unlink()
    (tmp_path / "two" / "3_B.png").unlink()
    with pytest.raises(InputError, match=r"'one' has 4 pairs and 'two' has 3; not in both: 3"):
        describe_folders(tmp_path, TWO, "auto")
    with pytest.raises(InputError, match="no folder for 1 of 3 concepts: three"):
        describe_folders(tmp_path, (*TWO, Concept("three", "x")), "auto")


def test_what_does_not_match_is_listed(tmp_path: Path) -> None:
    root = layout(tmp_path / "f", "folders")
    save(root / "A" / "lonely.png", 1)
    save(root / "B" / "other.png", 1)
    save(root / "B" / "third.png", 1)
    with pytest.raises(InputError, match=r"5 images A and 6 images B; .*lonely \(A\), other \(B\), third \(B\)"):
        describe_folders(root, ONE, "auto")
    root = layout(tmp_path / "s", "suffixes")
    save(root / "plain.png", 1)
    with pytest.raises(InputError, match=r"neither _A nor _B: plain\.png"):
        describe_folders(root, ONE, "auto")
    root = layout(tmp_path / "z", "folders")
    save(root / "B" / "2.png", 1, (9, 8))
    with pytest.raises(InputError, match=r"two sizes: 2 \(8x8 and 9x8\)"):
        describe_folders(root, ONE, "auto")
    root = layout(tmp_path / "h", "halves")
    save(root / "odd.png", 1, (9, 8))
    with pytest.raises(InputError, match="odd width: odd"):
        describe_folders(root, ONE, "auto")
    root = layout(tmp_path / "t", "halves", 2, splits=True)
    with pytest.raises(InputError, match="has the splits train, val"):
        describe_folders(root, ONE, "auto")
    (tmp_path / "e").mkdir()
    with pytest.raises(InputError, match="has no pairs"):
        describe_folders(tmp_path / "e", ONE, "auto")
    (tmp_path / "e" / "x.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"x.png is not a readable image"):
        describe_folders(tmp_path / "e", ONE, "auto")
    with pytest.raises(InputError, match="there is no folder"):
        describe_folders(tmp_path / "none", ONE, "auto")
    with pytest.raises(InputError, match="there are 2 source images"):
        describe_folders(layout(tmp_path / "few", "halves", 2), ONE, "auto")


def test_the_photographs_are_split_whole() -> None:
    info = describe_sources("photos", 32)
    sources, images = read_sources("photos", info, 32, None)
    assert images.shape == (len(sources), 3, 32, 32) and images.dtype == torch.uint8
    assert len({source.name for source in sources}) == len(sources) <= most_images("photos", info, 32, None)
    of = {split: {source.picture for source in sources if source.split == split} for split in SPLITS}
    assert of["test"] == {"cat"} and of["val"] == {"rocket"} and not of["train"] & {"cat", "rocket"}
    assert len(of["train"]) == 6
    weights = torch.tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)
    brightness = (images * weights).sum(dim=1).flatten(1)
    assert (brightness.amax(1) - brightness.amin(1)).min() > LEAST_RANGE - 1
    assert len(sources) > 1000
    fewer, some = read_sources("photos", info, 32, 100)
    assert len(fewer) == len(some) == 100 == most_images("photos", info, 32, 100)
    places = {source.name: row for row, source in enumerate(sources)}
    assert all(torch.equal(images[places[source.name]], image) for source, image in zip(fewer, some, strict=True))


def test_splits_of_pictures() -> None:
    names = [f"n{i}" for i in range(200)]
    splits = split_of(names, "salt")
    assert Counter(splits) == {"train": 160, "val": 20, "test": 20}
    of = dict(zip(names, splits, strict=True))
    backwards = split_of(names[::-1], "salt")
    assert dict(zip(names[::-1], backwards, strict=True)) == of
    assert split_of(names, "pepper") != splits
    assert Counter(split_of(names[:3], "")) == {"train": 1, "val": 1, "test": 1}


def test_thinning_keeps_every_split() -> None:
    sources = [Source(str(i), str(i), "val" if i == 7 else "test" if i > 95 else "train") for i in range(100)]
    kept = thinned(sources, 10)
    assert len(kept) == len(set(kept)) == 10 and {sources[row].split for row in kept} == set(SPLITS)
    assert thinned(sources, None) == list(range(100)) == thinned(sources, 1000)


def artifact(folder: Path, count: int = 6) -> Pairs:
    images = torch.randint(0, 256, (count, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_sources(folder, [Source(f"s{i}", f"p{i}", SPLITS[i % 3]) for i in range(count)], images)
    write_images(target_file(folder, "one"), 255 - images)
    return Pairs(folder, ONE)


def test_pairs_are_read_by_split_and_by_row(tmp_path: Path) -> None:
    pairs = artifact(tmp_path)
    assert pairs.image_size == 4 and pairs.concepts == ONE
    for place, split in enumerate(SPLITS):
        assert pairs.rows(split).tolist() == [place, place + 3] and pairs.count(split) == 2
        assert torch.equal(pairs.targets("one", split), 255 - pairs.sources(split))
        assert torch.equal(pairs.targets(ONE[0], split), pairs.targets("one", split))
    rows = torch.tensor([5, 0, 5])
    assert torch.equal(pairs.target_rows("one", rows), 255 - pairs.source_rows(rows))
    with pytest.raises(InputError, match="no pairs of the concept 'two'"):
        pairs.targets("two", "train")
    with pytest.raises(ValueError, match="heldout"):
        pairs.rows("heldout")


def test_damaged_pairs_are_refused(tmp_path: Path) -> None:
    pairs = artifact(tmp_path)
    write_images(target_file(tmp_path, "one"), torch.zeros(5, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"targets of shape \(5, 3, 4, 4\)"):
        pairs.targets("one", "train")
    write_images(target_file(tmp_path, "one"), torch.zeros(6, 3, 4, 4))
    with pytest.raises(InputError, match="has no images"):
        Pairs(tmp_path, ONE).targets("one", "train")
    index = json.loads((tmp_path / INDEX).read_text())
    for change, said in (
        ([], "differ in their number"),
        ([{**index[0], "split": "x"}], "unknown split"),
        (3, "cannot be"),
    ):
        (tmp_path / INDEX).write_text(json.dumps(change))
        with pytest.raises(InputError, match=said):
            Pairs(tmp_path, ONE)
