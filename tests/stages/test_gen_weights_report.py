"""`finectl gen-weights report`: starts compared at equal updates, resumable run by run; a whole tiny pipeline."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_pairs import make_pairs
from support import run_cli, whole

from finectl.artifacts.store import Artifact
from finectl.errors import EXIT_INPUT, EXIT_SAVED, EXIT_USAGE
from finectl.stages.gen_weights.report.config import pictured_places
from finectl.training.gan import workers

QUICK = ("--batch-size", 4, "--subset", 4, "--oracle-steps", 5, "--workers", 1, "--concepts", "test")
AT = ("--at", "0,1,2", "--seeds", 2)
FEW = ("--starts", "lora,mean,prediction,oracle")


@pytest.fixture(scope="module")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    root = tmp_path_factory.mktemp("report")
    place = ("--workspace", root)
    pairs = make_pairs(root)
    base = run_cli("gen-weights", "base", pairs, "--batch-size", 4, "--steps", 2, *place).path
    options = ("--steps", 5, "--checkpoints", 1, "--eval-every", 0, "--batch-size", 4, "--workers", 1)
    weights = run_cli("gen-weights", "collect", base, *options, *place).path
    small = ("--steps", 2, "--basis", "pca4", "--batch-size", 8, "--t-star", 900)
    yield root, run_cli("gen-weights", "train", weights, *small, *place).path


@pytest.fixture
def made(_made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.setenv("FINECTL_WORKSPACE", str(_made[0]))
    return _made


@pytest.fixture(scope="module")
def _report(_made: tuple[Path, Path]) -> Artifact:
    return whole(run_cli("gen-weights", "report", _made[1], *QUICK, *AT, "--workspace", _made[0]).path)


def rows_of(report: Path) -> list[dict[str, str]]:
    with (report / "runs.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_start_of_every_seed_is_measured_at_every_step(_report: Artifact) -> None:
    rows = rows_of(_report.path)
    assert {(row["start"], row["seed"], row["updates"]) for row in rows} == {
        (start, seed, step)
        for start in ("lora", "e2gan", "mean", "nearest", "noised", "ridge", "prediction", "shuffled", "oracle")
        for seed in ("0", "1")
        for step in ("0", "1", "2")
    }
    assert all(row["concept"] == "inverted" and row["role"] == "test" for row in rows)
    assert all(0 < float(row["l1"]) < 2 and float(row["psnr"]) > 0 for row in rows)


def test_e2gan_starts_where_lora_does_and_goes_another_way(_report: Artifact) -> None:
    values = {(row["start"], row["seed"], row["updates"]): float(row["l1"]) for row in rows_of(_report.path)}
    for seed in ("0", "1"):
        assert values["lora", seed, "0"] == values["e2gan", seed, "0"]
        assert values["lora", seed, "2"] != values["e2gan", seed, "2"]
    assert values["lora", "0", "0"] == values["lora", "1", "0"] and values["lora", "0", "2"] != values["lora", "1", "2"]
    assert values["prediction", "0", "0"] != values["prediction", "1", "0"]


def test_tables_say_what_was_compared(_report: Artifact) -> None:
    text = (_report.path / "table.md").read_text()
    assert "1 held-out concept " in text and "2 seeds" in text and "4 training pairs, batch 4, lr 0.0015" in text
    assert "FID" not in text  # no Inception file, no FID
    tables = json.loads((_report.path / "table.json").read_text())
    assert [table["title"].split(",")[0].split(":")[0] for table in tables][1] == "The prediction against the others"
    main = {row["start"]: row for row in tables[0]["rows"]}
    values = [float(row["l1"]) for row in rows_of(_report.path) if row["start"] == "mean" and row["updates"] == "2"]
    assert main["mean"]["l1_2"] == pytest.approx(sum(values) / 2)
    metrics = json.loads((_report.path / "metrics.json").read_text())
    against = metrics["test"]["against_lora"]["2"]
    assert against["difference"] == pytest.approx(main["prediction"]["l1_2"] - main["lora"]["l1_2"])
    assert "seconds" not in (_report.path / "metrics.json").read_text()
    assert (_report.path / "plots" / "test-l1.png").is_file() and (_report.path / "samples" / "inverted.png").is_file()
    assert not (_report.path / "concepts").exists()


def test_a_report_that_is_stopped_goes_on_and_equals_an_unbroken_one(
    made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ("gen-weights", "report", made[1], *QUICK, *FEW, "--at", "0,1", "--seeds", 1, "--pictures", 0)
    unbroken = run_cli(*options, "--out", tmp_path / "unbroken").path
    done: list[str] = []
    usual = workers.train_alone

    def stopping(work: object, items: list[object], asked: object, count: object) -> None:
        def stop() -> bool:
            return len(done) >= 2

        def counted(name: str, l1: float | None) -> None:
            done.append(name)

        usual(work, items, stop, counted)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(workers, "train_alone", stopping)
        assert run_cli(*options).code == EXIT_SAVED
    first = set(done)
    done.clear()
    resumed = run_cli(*options).path
    assert len(first) == 2
    for name in ("runs.csv", "metrics.json"):
        assert (resumed / name).read_bytes() == (unbroken / name).read_bytes()


def test_pictures_are_of_images_far_apart() -> None:
    assert pictured_places(150, 4) == [0, 37, 75, 112]
    assert pictured_places(3, 4) == [0, 1, 2] and pictured_places(3, 0) == []


def test_the_number_of_processes_changes_nothing(made: tuple[Path, Path], tmp_path: Path) -> None:
    options = ("gen-weights", "report", made[1], *QUICK, *FEW, "--at", "0,1", "--seeds", 1)
    alone = run_cli(*options, "--out", tmp_path / "alone").path
    shared = run_cli(*options, "--workers", 2, "--out", tmp_path / "shared").path
    for name in ("runs.csv", "metrics.json", "samples/inverted.png"):
        assert (alone / name).read_bytes() == (shared / name).read_bytes()


def test_what_it_refuses(made: tuple[Path, Path], tmp_path: Path) -> None:
    _, generator = made
    for options, said in (
        (("--concepts", "red"), "red is a training concept"),
        (("--concepts", "tset"), "did you mean 'test'"),
        (("--at", "0"), "the last one above 0"),
        (("--at", "0;10"), "such as 0,10,20,50"),
        (("--starts", "lora,ridgee"), "did you mean 'ridge'"),
    ):
        ran = run_cli("gen-weights", "report", generator, *options)
        assert ran.code == EXIT_USAGE and said in ran.err, ran.err
    ran = run_cli("gen-weights", "report", generator, "--concepts", "unseen")
    assert ran.code == EXIT_INPUT and "no concepts of unseen" in ran.err
    alone = tmp_path / "weight-generator" / generator.name
    shutil.copytree(generator, alone)
    ran = run_cli("gen-weights", "report", alone)
    assert ran.code == EXIT_INPUT and "--collection PATH" in ran.err


def test_a_dry_run_counts_the_work(made: tuple[Path, Path]) -> None:
    ran = run_cli("gen-weights", "report", made[1], "--concepts", "test", *AT, "--dry-run", "--json")
    plan = json.loads(ran.out)
    assert (plan["runs"], plan["updates"], plan["oracle_updates"]) == (18, 36, 5)
