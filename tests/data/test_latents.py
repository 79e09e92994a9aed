"""Latents on disk: what is read is what was written, by several threads, from few open files; and what is damaged."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import child_environment
from torch import Tensor

from finectl.artifacts.job import Job, Outcome, Plan, Stage
from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import save_tensors
from finectl.console import Console
from finectl.data import mapped as mapped_module
from finectl.data.dataset import load
from finectl.data.latents import INDEX, KIND, LatentIndex, LatentStore, is_whole, write_shard
from finectl.data.sources import DataOptions, describe, heldout_indices
from finectl.errors import ComputationError, InputError, UsageError
from finectl.runner import RunOptions, run_stage

COUNT, SHARD = 23, 5
SOURCE = "ab" * 32
INDEX_OF_23 = LatentIndex(
    count=COUNT,
    shard_size=SHARD,
    latent_channels=4,
    latent_size=3,
    image_size=24,
    storage="float16",
    flips=True,
    class_names=("ant", "bee", "cat"),
    vae={
        "digest": "cd" * 32, "scaling_factor": 0.5, "shift_factor": 0.25, "downscale": 8, "latent_channels": 4,
        "channels": 3,
    },
    source={"fingerprint": SOURCE, "bundled": False, "resize_filter": "bicubic", "skipped": 2},
)  # fmt: skip


def moments(index: LatentIndex) -> tuple[Tensor, Tensor]:
    """Return moments of all images and of all mirrored ones, exact in float16."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randn((2, index.count, *index.row), generator=generator).half().float()
    return both[0], both[1]


def labels(index: LatentIndex) -> Tensor:
    return torch.arange(index.count) % len(index.class_names)


@dataclass(frozen=True)
class Config:
    """Options of the stage below."""

    vae: str = "/somewhere/vae"


def make(place: Path, index: LatentIndex) -> Path:
    """Make an artifact of random latents, as `finectl encode` lays it out."""
    plain, mirrored = moments(index)

    def run(job: Job[Config]) -> Outcome:
        for shard in index.shards:
            part = slice(shard.first, shard.first + shard.count)
            flipped = mirrored[part] if index.flips else None
            write_shard(job.directory / shard.file, index.storage, plain[part], labels(index)[part], flipped)
        index.write(job.directory)
        return Outcome()

    def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
        return Plan(config, slug="random")

    stage = Stage("encode", 1, KIND, Config, lambda config: None, plan, run)
    made = run_stage(stage, Config(), [], RunOptions(out=place), Console(quiet=True)).artifact
    assert made is not None
    return made.path


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return make(tmp_path / "latents", INDEX_OF_23)


def store(path: Path) -> LatentStore:
    return LatentStore(path, LatentIndex.read(path / INDEX))


def test_what_is_said_of_latents(artifact: Path) -> None:
    info = describe(f"latents:{artifact}")
    assert info.name == f"latents:{artifact.resolve()}"
    assert (info.count, info.train_count, info.heldout_count, info.skipped) == (23, 18, 5, 2)
    assert (info.image_size, info.channels, info.class_names, info.bundled) == (3, 4, ("ant", "bee", "cat"), False)
    assert info.vae == {"name": "/somewhere/vae", **INDEX_OF_23.vae} and info.resize_filter == "bicubic"
    assert describe(f"latents:{artifact}", 3) == info


def test_it_is_said_without_torch(artifact: Path) -> None:
    code = (
        f"import sys; from finectl.data.sources import describe; describe('latents:{artifact}');"
        "print([m for m in ('torch', 'numpy', 'diffusers', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=child_environment()
    )
    assert done.stdout == "[]\n", done.stderr


def test_the_split_is_that_of_the_images_and_the_fingerprint_that_of_the_latents(tmp_path: Path) -> None:
    one = make(tmp_path / "one", INDEX_OF_23)
    other = make(tmp_path / "other", replace(INDEX_OF_23, flips=False))
    infos = [describe(f"latents:{path}") for path in (one, other)]
    assert infos[0].fingerprint != infos[1].fingerprint
    for path in (one, other):
        assert load(f"latents:{path}", "heldout").indices.tolist() == list(heldout_indices(SOURCE, COUNT))


def test_a_split_reads_its_own_images(artifact: Path) -> None:
    plain, mirrored = moments(INDEX_OF_23)
    train = load(f"latents:{artifact}", "train", options=DataOptions(flip=True))
    assert train.sampled and train.flip and len(train) == 18 and train.shape == (4, 3, 3)
    assert torch.equal(train.labels, labels(INDEX_OF_23)[train.indices])
    positions = torch.tensor([17, 0, 5, 5, 12])
    raw = train.read(positions)
    assert raw.dtype == torch.float16 and torch.equal(raw.float(), plain[train.indices[positions]])
    flips = torch.tensor([True, False, True, False, True])
    wanted = torch.where(flips[:, None, None, None], mirrored[train.indices[positions]], raw.float())
    assert torch.equal(train.read(positions, flips).float(), wanted)


@pytest.mark.parametrize("storage", ["float16", "float32"])
@pytest.mark.parametrize("flips", [True, False])
def test_every_image_of_every_shard(storage: str, flips: bool, tmp_path: Path) -> None:
    index = replace(INDEX_OF_23, storage=storage, flips=flips)
    latents = store(make(tmp_path / "latents", index))
    plain, mirrored = moments(index)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))
    read = latents.read(order)
    assert read.dtype == getattr(torch, storage) and torch.equal(read.float(), plain[order])
    assert torch.equal(latents.read(torch.arange(5, 10)).float(), plain[5:10])
    assert torch.equal(latents.labels, labels(index))
    everything = torch.ones(COUNT, dtype=torch.bool)
    if flips:
        assert torch.equal(latents.read(order, everything).float(), mirrored[order])
    else:
        with pytest.raises(UsageError, match="no latents of mirrored images"):
            latents.read(order, everything)


def test_the_draw_and_the_scale(artifact: Path) -> None:
    latents = store(artifact)
    raw = latents.read(torch.arange(4))
    mean, log_variance = raw.double().chunk(2, dim=1)
    noise = torch.randn(4, 4, 3, 3)
    wanted = (mean + torch.exp(0.5 * log_variance) * noise - 0.25) * 0.5
    drawn = latents.transform(raw, noise)
    assert drawn.dtype == torch.float32 and torch.allclose(drawn.double(), wanted, atol=1e-6)
    assert torch.allclose(latents.transform(raw).double(), (mean - 0.25) * 0.5, atol=1e-6)


def test_several_threads_read_and_few_files_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_module, "OPEN_SHARDS", 3)
    index = replace(INDEX_OF_23, count=200)
    latents = store(make(tmp_path / "latents", index))
    plain, _ = moments(index)
    before = len(os.listdir("/proc/self/fd"))

    def read(seed: int) -> bool:
        chosen = torch.randint(0, 200, (64,), generator=torch.Generator().manual_seed(seed))
        return torch.equal(latents.read(chosen).float(), plain[chosen])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(40)))
    assert len(index.shards) == 40 and len(os.listdir("/proc/self/fd")) - before <= 3


def test_what_was_read_does_not_stay_in_memory(tmp_path: Path) -> None:
    path = make(tmp_path / "latents", replace(INDEX_OF_23, count=600, shard_size=200, latent_size=32))
    latents = store(path)
    latents.read(torch.arange(600))
    lines = re.escape(str(path)) + r"/(latents-\d+)\.safetensors\n(?:.*\n)*?Rss: +(\d+) kB"
    entries = re.findall(lines, Path("/proc/self/smaps").read_text())
    assert sorted(entries) == [(f"latents-0000{number}", "0") for number in range(3)]


def test_what_is_stored_is_clamped_and_finite(tmp_path: Path) -> None:
    extreme = torch.zeros(1, 8, 1, 1)
    extreme[0, 4:6, 0, 0] = torch.tensor([99.0, -99.0])
    write_shard(tmp_path / "a.safetensors", "float16", extreme, torch.zeros(1, dtype=torch.int64))
    from finectl.artifacts.tensors import load_tensors

    assert load_tensors(tmp_path / "a.safetensors")["moments"][0, 4:6, 0, 0].tolist() == [20.0, -30.0]
    for value, storage in ((1e5, "float16"), (float("nan"), "float32"), (float("inf"), "float32")):
        extreme[0, 0] = value
        with pytest.raises(ComputationError, match="not finite"):
            write_shard(tmp_path / "b.safetensors", storage, extreme, torch.zeros(1, dtype=torch.int64))
    assert not (tmp_path / "b.safetensors").exists()


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "latents", replace(INDEX_OF_23, flips=False))
    with pytest.raises(UsageError, match=r"are 3x3 \(of images of 24x24 pixels\), 24 was asked for"):
        describe(f"latents:{path}", 24)
    with pytest.raises(UsageError, match="no latents of mirrored images"):
        describe(f"latents:{path}", None, DataOptions(flip=True))


def rewrite(path: Path, shard: int, **tensors: Tensor) -> None:
    """Replace a shard and make the manifest fit, as one does who edits an artifact."""
    import hashlib

    file = path / f"latents-{shard:05d}.safetensors"
    old = hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_size
    save_tensors(file, tensors)
    new = hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_size
    text = (path / "manifest.yaml").read_text()
    for before, after in zip(old, new, strict=True):
        text = text.replace(str(before), str(after), 1 if isinstance(before, str) else -1)
    (path / "manifest.yaml").write_text(text)


def test_shards_that_are_not_what_the_index_says(artifact: Path) -> None:
    good = {"moments": torch.zeros(5, 8, 3, 3).half(), "moments_flipped": torch.zeros(5, 8, 3, 3).half()}
    numbers = torch.zeros(5, dtype=torch.int64)
    index = LatentIndex.read(artifact / INDEX)
    rewrite(artifact, 1, labels=numbers, **good)
    assert store(artifact).read(torch.tensor([5])).eq(0).all() and is_whole(artifact, index, index.shards[1])
    wrong: list[dict[str, Any]] = [
        {"labels": numbers, "moments": good["moments"]},
        {"labels": numbers, **good, "more": numbers},
        {"labels": numbers, "moments": good["moments"].float(), "moments_flipped": good["moments"].float()},
        {"labels": numbers[:4], "moments": good["moments"][:4], "moments_flipped": good["moments"][:4]},
        {"labels": numbers.int(), **good},
    ]
    for tensors in wrong:
        save_tensors(artifact / index.shards[1].file, {name: value.clone() for name, value in tensors.items()})
        assert not is_whole(artifact, index, index.shards[1])
        with pytest.raises(InputError, match=r"latents-00001.safetensors is not the shard"):
            store(artifact)
    rewrite(artifact, 1, labels=numbers + 3, **good)
    with pytest.raises(InputError, match=r"labels 0\.\.3"):
        store(artifact)


def test_a_damaged_artifact_is_named(artifact: Path, tmp_path: Path) -> None:
    spec = f"latents:{artifact}"
    shard = artifact / "latents-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(InputError, match=r"latents-00002.safetensors has"):
        describe(spec)
    shard.unlink()
    with pytest.raises(InputError, match=r"latents-00002.safetensors is missing"):
        load(spec)
    shard.write_bytes(content)
    with pytest.raises(InputError, match="there is no artifact at") as error:
        describe(f"latents:{tmp_path / 'nowhere'}")
    assert "finectl encode" in error.value.fix
    manifest = artifact / "manifest.yaml"
    manifest.write_text(manifest.read_text().replace("kind: latents", "kind: model"))
    with pytest.raises(InputError, match="is of kind 'model'"):
        describe(spec)


@pytest.mark.parametrize(
    "harm",
    [
        {"format": 2}, {"count": "23"}, {"count": 0}, {"shard_size": -1}, {"storage": "int4"}, {"vae": {}},
        {"source": None}, {"class_names": 3},
    ],
)  # fmt: skip
def test_a_damaged_index_is_named(harm: dict[str, Any], artifact: Path) -> None:
    path = artifact / INDEX
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | harm))
    with pytest.raises(InputError, match=r"index\.json"):
        LatentIndex.read(path)
    path.write_text("[]")
    with pytest.raises(InputError, match="is not an index"):
        LatentIndex.read(path)
    path.write_text(json.dumps(values))
    assert LatentIndex.read(path) == INDEX_OF_23
