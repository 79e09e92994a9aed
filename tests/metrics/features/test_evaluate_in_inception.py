"""`evaluate` with every metric in Inception's features, on a network of random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inception_standin import write_standin
from PIL import Image
from support import Ran, run_cli

from finectl.errors import EXIT_INPUT, EXIT_USAGE

METRICS = ("fid", "fid-infinity", "sfid", "is", "kid", "precision", "recall", "density", "coverage")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "inception-2015-12-05.pt"
    write_standin(path)
    return path


def pictures(folder: Path, count: int, seed: int) -> Path:
    folder.mkdir()
    for index, values in enumerate(np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)):
        Image.fromarray(values).resize((40, 33), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


def measured(ran: Ran) -> dict[str, Any]:
    row: dict[str, Any] = json.loads((ran.path / "metrics.json").read_text())[0]
    return row


def test_all_metrics_of_a_folder(network: Path, tmp_path: Path, workspace: Path) -> None:
    made, real = pictures(tmp_path / "made", 16, 0), pictures(tmp_path / "real", 17, 1)
    arguments = ("evaluate", "--images", f"folder:{made}", "--inception", network, "--metrics", ",".join(METRICS))
    few = run_cli(*arguments, "--reference", f"folder:{real}")
    assert few.code == EXIT_USAGE and "at least 2,048 images" in few.err and "--allow-few" in few.err
    row = measured(run_cli(*arguments, "--reference", f"folder:{real}", "--allow-few"))
    assert set(METRICS) <= set(row)
    for name in METRICS:
        protocol, (low, high) = row[name]["protocol"], row[name]["interval"]
        assert row[name]["n"] == protocol["n"] == 16 and low <= row[name]["value"] <= high
        assert protocol["extractor"] == "inception" and protocol["resize"] == "clean bicubic 299"
        assert len(protocol["extractor_digest"]) == 64
    assert row["fid"]["protocol"]["reference_n"] == 17 and "reference" not in row["is"]["protocol"]
    assert row["fid"]["value"] > 0
    again = run_cli(*arguments, "--reference", f"folder:{real}", "--allow-few", "--force", "--workers", 0)
    assert "statistics of the reference are kept" not in again.err
    other = measured(again)
    for name in METRICS:
        assert other[name]["value"] == pytest.approx(row[name]["value"], rel=1e-9)


@pytest.mark.slow
def test_a_set_against_itself_and_the_other_way_to_resize(network: Path, tmp_path: Path, workspace: Path) -> None:
    made = pictures(tmp_path / "made", 8, 0)
    names = "fid,precision,recall,coverage"
    arguments = ("evaluate", "--images", f"folder:{made}", "--inception", network, "--metrics", names, "--allow-few")
    row = measured(run_cli(*arguments, "--reference", f"folder:{made}"))
    assert row["fid"]["value"] < 1e-6
    assert [row[name]["value"] for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    old = measured(run_cli(*arguments, "--reference", f"folder:{made}", "--fid-mode", "legacy_tensorflow"))
    assert old["fid"]["protocol"]["resize"] == "tensorflow bilinear 299"


def test_a_file_of_something_else(tmp_path: Path, workspace: Path) -> None:
    wrong = tmp_path / "weights.pt"
    wrong.write_bytes(b"no archive")
    made = pictures(tmp_path / "made", 2, 0)
    options = ("--metrics", "is", "--inception", wrong)
    ran = run_cli("evaluate", "--images", f"folder:{made}", *options)
    assert ran.code == EXIT_INPUT and "inception-2015-12-05.pt" in ran.err and "Traceback" not in ran.err
