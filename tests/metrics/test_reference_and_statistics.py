"""References: what `--reference` may name, statistics that are kept, and those that other tools wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from finectl.artifacts.chunks import Chunks
from finectl.artifacts.tensors import save_tensors
from finectl.data.sources import DataOptions, describe
from finectl.errors import InputError, UsageError
from finectl.metrics import statistics as statistics_module
from finectl.metrics.extraction import IDENTITY
from finectl.metrics.frechet import Gaussian, frechet_distance
from finectl.metrics.reference import describe_reference, require_extractor
from finectl.metrics.statistics import fit, load, load_npz, save

DIGITS = describe("digits")
OPTIONS = DataOptions()


def chunked(rows: torch.Tensor, folder: Path, size: int = 16) -> Chunks:
    chunks = Chunks(folder, "reference", len(rows), size)
    names = torch.randint(-(2**60), 2**60, (len(rows), 2), generator=torch.Generator().manual_seed(7))
    for first in chunks.firsts:
        part = slice(first, first + size)
        chunks.save(first, {"net/features": rows[part], IDENTITY: names[part]})
    return chunks


def rows_of(count: int, dim: int = 6) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(count))


def test_the_usual_reference_is_the_training_part_of_the_models_data() -> None:
    info = describe_reference(None, DIGITS, 8, OPTIONS)
    assert (info.form, info.part, info.count, info.name) == ("data", "train", 1438, "digits/train")
    assert describe_reference("bundled", None, 8, OPTIONS) == info
    whole = describe_reference("digits", DIGITS, 8, OPTIONS)
    assert (whole.part, whole.count) == ("all", 1797) and whole.protocol() != info.protocol()


def test_a_folder_is_brought_to_the_samples_size_or_taken_as_it_is(tmp_path: Path) -> None:
    for index, size in enumerate([(9, 12), (20, 10)]):
        Image.new("RGB", size, (index, 40, 90)).save(tmp_path / f"{index}.png")
    info = describe_reference(f"folder:{tmp_path}", None, 8, OPTIONS)
    assert (info.form, info.image_size, info.count, info.resize_filter) == ("data", 8, 2, "bicubic")
    raw = describe_reference(f"folder:{tmp_path}", None, None, OPTIONS, as_stored=True)
    assert (raw.form, raw.count, raw.protocol()["image_size"]) == ("files", 2, "as stored")


def test_without_a_reference_or_data_there_is_nothing_to_compare_with() -> None:
    with pytest.raises(UsageError, match="nothing to compare"):
        describe_reference(None, None, 8, OPTIONS)
    with pytest.raises(UsageError, match="neither a data set nor a file"):
        describe_reference("stats.npy", DIGITS, 8, OPTIONS)


@pytest.mark.parametrize("kept", [10_000, 20])
def test_statistics_are_those_of_all_rows(tmp_path: Path, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics_module, "KEPT_ROWS", kept)
    rows = rows_of(50)
    fitted = fit(chunked(rows, tmp_path), "net", ["features"])["features"]
    assert fitted.rows is not None and len(fitted.rows) == min(50, kept)
    assert {tuple(row) for row in fitted.rows.tolist()} <= {tuple(row) for row in rows.tolist()}
    assert frechet_distance(fitted.gaussian, Gaussian.of(rows)) < 1e-12


@pytest.mark.parametrize("count", [50, 4])
def test_kept_statistics_give_the_same_distance(tmp_path: Path, count: int) -> None:
    fitted = fit(chunked(rows_of(count), tmp_path), "net", ["features"])
    save(tmp_path / "kept.safetensors", fitted, {"extractor": "net"})
    again = load(tmp_path / "kept.safetensors", count, ["features"])["features"]
    other = Gaussian.of(rows_of(40))
    assert frechet_distance(again.gaussian, other) == frechet_distance(fitted["features"].gaussian, other)
    assert again.rows is not None and fitted["features"].rows is not None
    assert torch.equal(again.rows, fitted["features"].rows)
    with pytest.raises(InputError, match="no statistics of 'spatial'"):
        load(tmp_path / "kept.safetensors", count, ["spatial"])


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_moments_that_other_tools_wrote(tmp_path: Path) -> None:
    rows = rows_of(60)
    mu, sigma = rows.double().mean(0).numpy(), np.cov(rows.double().numpy(), rowvar=False)
    path = npz(tmp_path / "clean.npz", mu=mu, sigma=sigma)
    info = describe_reference(str(path), None, None, OPTIONS)
    assert info.form == "npz" and len(info.fingerprint) == 64 and info.count is None
    found = load_npz(path, ["features"], {"features": 6})["features"]
    assert frechet_distance(found.gaussian, Gaussian.of(rows)) < 1e-12
    with pytest.raises(InputError, match="moments only"):
        found.require_rows("kid", "clean.npz")
    with pytest.raises(InputError, match="statistics of 6 features"):
        load_npz(path, ["features"], {"features": 2048})
    with pytest.raises(InputError, match="no statistics of 'spatial'"):
        load_npz(path, ["spatial"], {"spatial": 2023})


def test_files_that_are_no_statistics(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds x"):
        describe_reference(str(npz(tmp_path / "other.npz", x=np.zeros(3))), None, None, OPTIONS)
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 not a zip file")
    with pytest.raises(InputError, match="cannot be read"):
        describe_reference(str(tmp_path / "torn.npz"), None, None, OPTIONS)
    harmful = tmp_path / "harmful.npz"
    np.savez(harmful, mu=np.array([print], dtype=object), sigma=np.zeros((1, 1)))
    with pytest.raises(InputError, match="cannot be read"):
        load_npz(harmful, ["features"], {"features": 1})
    save_tensors(tmp_path / "weights.safetensors", {"x": torch.zeros(2)})
    with pytest.raises(InputError, match="no statistics of features"):
        describe_reference(str(tmp_path / "weights.safetensors"), None, None, OPTIONS)
    with pytest.raises(InputError, match="missing"):
        describe_reference(str(tmp_path / "gone.safetensors"), None, None, OPTIONS)


def test_statistics_of_other_features_are_refused(tmp_path: Path) -> None:
    recorded = {
        "extractor": "inception", "extractor_digest": "ab" * 32, "resize": "clean bicubic 299", "dtype": "float32",
        "reference": "folder:x/all", "reference_fingerprint": "f", "reference_n": 50, "image_size": 32,
        "resize_filter": "bicubic",
    }  # fmt: skip
    fitted = fit(chunked(rows_of(50), tmp_path), "net", ["features"])
    save(tmp_path / "kept.safetensors", fitted, recorded)
    info = describe_reference(str(tmp_path / "kept.safetensors"), None, None, OPTIONS)
    assert (info.form, info.count, info.image_size) == ("statistics", 50, 32)
    assert json.loads(json.dumps(info.protocol()))["reference"] == "folder:x/all"
    require_extractor(info, "inception", "ab" * 32, "clean bicubic 299", "float32")
    for change in (("clip", "ab" * 32), ("inception", "cd" * 32)):
        with pytest.raises(InputError, match="the statistics"):
            require_extractor(info, *change, "clean bicubic 299", "float32")
