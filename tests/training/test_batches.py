"""Batches: the same images, mirrorings and noise, however they are cut up and whoever reads them."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from fitting import images
from torch import Tensor

from finectl.data.dataset import ImageSet, mirror
from finectl.data.order import batch_indices
from finectl.data.sources import DataInfo
from finectl.errors import UsageError
from finectl.training.batches import Batches, Part, Retained, share_of
from finectl.world import World

COUNT, BATCH, STEPS = 23, 12, 5
CPU = torch.device("cpu")
INFO = DataInfo("x", "f", COUNT, COUNT, 0, 4, 1, 10, (), False)
THREADS = "finectl-read"


@dataclass
class Latents:
    """Means and log-variances, of which training draws; reading takes a while, and who reads is noted."""

    moments: Tensor
    labels: Tensor
    sampled: bool = True
    delay_s: float = 0.0
    readers: list[str] = field(default_factory=list)

    def read(self, indices: Tensor, flips: Tensor | None = None) -> Tensor:
        self.readers.append(threading.current_thread().name)
        time.sleep(self.delay_s)
        return mirror(self.moments.index_select(0, indices), flips)

    def transform(self, raw: Tensor, noise: Tensor | None = None) -> Tensor:
        mean, variance = raw.chunk(2, 1)
        return mean if noise is None else mean + (0.5 * variance).exp() * noise


def latents(delay_s: float = 0.0) -> Latents:
    generator = torch.Generator().manual_seed(0)
    return Latents(torch.randn(COUNT, 2, 4, 4, generator=generator), torch.arange(COUNT) % 10, delay_s=delay_s)


def image_set(store: Any = None, flip: bool = True) -> ImageSet:
    return ImageSet(INFO, "train", store or latents(), torch.arange(COUNT), flip=flip)


def batches(rank: int = 0, size: int = 1, data: ImageSet | None = None, **options: Any) -> Batches:
    return Batches(data or image_set(), BATCH, 7, CPU, World(rank, size), **options)


def together(parts: list[Part]) -> tuple[Tensor, Tensor]:
    """Return images and labels of parts that make up a whole batch, by their places in it."""
    ordered = sorted(parts, key=lambda part: part.slots.start)
    covered = [slot for part in ordered for slot in range(part.slots.start, part.slots.stop)]
    assert covered == list(range(BATCH)), "the parts are not the batch"
    return torch.cat([part.x0 for part in ordered]), torch.cat([part.labels for part in ordered])


@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize(
    ("size", "cut", "workers"), [(2, 1, 0), (1, 3, 0), (3, 2, 0), (5, 2, 0), (1, 1, 2), (4, 3, 1), (12, 1, 0)]
)
def test_the_slices_together_are_the_global_batch(size: int, cut: int, workers: int, pixels: bool) -> None:
    data = replace(images(), flip=True) if pixels else image_set()
    whole = batches(data=data)
    ranks = [batches(rank, size, data, parts=cut, workers=workers) for rank in range(size)]
    for step in range(STEPS):
        parts = [part for one in ranks for part in one.get(step)]
        assert len(parts) == size * cut
        x0, labels = together(parts)
        expected, expected_labels = together(whole.get(step))
        assert torch.equal(x0, expected) and torch.equal(labels, expected_labels)
        assert max(len(part.labels) for part in parts) - min(len(part.labels) for part in parts) <= 1
    for one in ranks:
        one.__exit__()


def test_a_batch_is_what_the_order_says() -> None:
    data = image_set(flip=False)
    one = batches(data=data)
    for step in range(STEPS):
        (part,) = one.get(step)
        indices = batch_indices(COUNT, BATCH, step, 7)
        assert torch.equal(part.labels, data.labels[indices]) and torch.equal(one.indices(step), indices)
        assert not torch.equal(part.x0, data.store.moments[indices][:, :1]), "the mean, and no draw of it"


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    def stream(batch: int, seed: int, epochs: int = 3) -> list[int]:
        steps = -(-epochs * COUNT // batch)
        return torch.cat([batch_indices(COUNT, batch, step, seed) for step in range(steps)])[: epochs * COUNT].tolist()

    reference = stream(1, 0)
    for batch in (2, 7, COUNT, 3 * COUNT, 100):
        assert stream(batch, 0) == reference, "the batch size changed the stream"
    orders = [reference[first : first + COUNT] for first in (0, COUNT, 2 * COUNT)]
    assert all(sorted(order) == list(range(COUNT)) for order in orders)
    assert len({tuple(order) for order in [*orders, stream(1, 1)[:COUNT], stream(1, 2)[:COUNT]]}) == 5


def test_mirroring_and_noise_are_drawn_anew_at_each_step_and_for_each_seed() -> None:
    store = Latents(torch.zeros(COUNT, 2, 4, 4), torch.zeros(COUNT, dtype=torch.int64))
    one, other = batches(data=image_set(store)), Batches(image_set(store), BATCH, 8, CPU, World())
    draws = [one.get(0)[0].x0, one.get(1)[0].x0, other.get(0)[0].x0]
    assert abs(float(torch.cat(draws).mean())) < 0.2 and abs(float(torch.cat(draws).std()) - 1) < 0.1
    assert not any(torch.equal(draws[a], draws[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    ramp = torch.arange(4.0).expand(COUNT, 1, 4, 4)
    store = Latents(torch.cat([ramp, torch.full_like(ramp, -100.0)], 1), torch.zeros(COUNT, dtype=torch.int64))
    one = batches(data=image_set(store))
    mirrored = [one.get(step)[0].x0[:, 0, 0, 0] > 1.5 for step in range(20)]
    assert 0.35 < float(torch.cat(mirrored).float().mean()) < 0.65
    assert len({tuple(row.tolist()) for row in mirrored}) > 15
    never = batches(data=image_set(store, flip=False))
    assert not any(bool((never.get(step)[0].x0[:, 0, 0, 0] > 1.5).any()) for step in range(5))


def test_reading_ahead_gives_the_same_in_any_order_of_steps() -> None:
    plain = batches()
    with batches(workers=2) as ahead:
        for step in (0, 1, 2, 7, 8, 3, 3, 4, 0):  # a run that goes on elsewhere, and one that goes back
            x0, labels = together(ahead.get(step))
            expected, expected_labels = together(plain.get(step))
            assert torch.equal(x0, expected) and torch.equal(labels, expected_labels)


def test_the_next_batches_are_read_while_one_is_used() -> None:
    store = latents(delay_s=0.05)
    with batches(data=image_set(store), workers=2) as ahead:
        ahead.get(0)
        assert all(name.startswith(THREADS) for name in store.readers), "the caller read itself"
        time.sleep(0.3)
        reads = len(store.readers)
        assert reads == 3, "two are read ahead, and no more"
        start_s = time.monotonic()
        ahead.get(1)
        assert time.monotonic() - start_s < 0.04, "it was not there yet"
    store = latents()
    batches(data=image_set(store), workers=0).get(0)
    assert store.readers == [threading.current_thread().name]


def test_the_threads_end_with_the_run_also_after_an_error() -> None:
    def readers() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith(THREADS)]

    with pytest.raises(RuntimeError, match="inside"), batches(workers=3) as ahead:
        ahead.get(0)
        assert readers()
        raise RuntimeError("inside")
    assert readers() == []


def test_an_error_in_a_thread_comes_out_where_the_batch_is_asked_for() -> None:
    class Broken(Latents):
        def read(self, indices: Tensor, flips: Tensor | None = None) -> Tensor:
            raise OSError("the disk is gone")

    broken = Broken(*(getattr(latents(), name) for name in ("moments", "labels")))
    with pytest.raises(OSError, match="the disk is gone"), batches(data=image_set(broken), workers=2) as ahead:
        ahead.get(0)


def test_more_shares_than_images_are_refused() -> None:
    with pytest.raises(UsageError, match="--batch-size 12") as caught:
        batches(0, 4, parts=4)
    assert "at least 16" in caught.value.expected
    with pytest.raises(UsageError):
        batches(0, 13)
    assert [len(part.labels) for part in batches(0, 4, parts=3).get(0)] == [1, 1, 1]


def test_shares_are_nearly_equal_and_cover_everything() -> None:
    for count in (1, 7, 12, 100):
        for parts in range(1, min(count, 9) + 1):
            shares = [share_of(count, index, parts) for index in range(parts)]
            assert [slot for one in shares for slot in range(one.start, one.stop)] == list(range(count))
            sizes = [one.stop - one.start for one in shares]
            assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


def test_images_are_in_the_range_of_pixels() -> None:
    info = replace(INFO, image_size=2)
    levels = torch.tensor([0, 255], dtype=torch.uint8).repeat(COUNT, 1, 2, 1)
    data = ImageSet.in_memory(info, "train", levels, torch.zeros(COUNT, dtype=torch.int64))
    (part,) = Batches(data, BATCH, 0, CPU, World()).get(0)
    assert part.x0.dtype == torch.float32 and sorted(set(part.x0.flatten().tolist())) == [-1.0, 1.0]


def mixed(rank: int = 0, size: int = 1, kept: ImageSet | None = None, seed: int = 7, **options: Any) -> Batches:
    retained = Retained(image_set() if kept is None else kept, 5)
    return Batches(image_set(), BATCH, seed, CPU, World(rank, size), retained=retained, **options)


@pytest.mark.parametrize(("size", "cut", "workers"), [(2, 1, 0), (1, 3, 2), (3, 2, 0), (5, 2, 0), (12, 1, 0)])
def test_two_sets_are_cut_up_as_one_batch(size: int, cut: int, workers: int) -> None:
    ranks = [mixed(rank, size, parts=cut, workers=workers) for rank in range(size)]
    for step in range(STEPS):
        (whole,) = mixed().get(step)
        x0, labels = together([part for one in ranks for part in one.get(step)])
        assert torch.equal(x0, whole.x0) and torch.equal(labels, whole.labels)
    for one in ranks:
        one.__exit__()


def test_retained_images_come_first_and_have_their_own_order_mirrorings_and_noise() -> None:
    one, data = mixed(), image_set()
    seen: list[int] = []
    for step in range(STEPS):
        (part,) = one.get(step)
        new, again = one.indices(step), one.retained_indices(step)
        assert (len(again), len(new), len(part.x0)) == (5, 7, BATCH)
        assert part.labels.tolist() == data.labels[torch.cat([again, new])].tolist()
        (alone,) = Batches(data, 7, 7, CPU, World()).get(step)
        assert torch.equal(part.x0[5:], alone.x0) and torch.equal(new, batch_indices(COUNT, 7, step, 7))
        (other,) = Batches(data, 5, 7, CPU, World()).get(step)
        assert not torch.equal(part.x0[:5], other.x0)
        seen += again.tolist()
    assert sorted(seen[:COUNT]) == list(range(COUNT)), "all of them in turn"
    assert not torch.equal(mixed(seed=8).retained_indices(0), one.retained_indices(0))


def test_retained_images_are_kept_in_another_form_than_the_data() -> None:
    """A bank holds latents, the data their means and variances."""
    held = torch.randn(COUNT, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    kept = ImageSet.in_memory(INFO, "train", held, torch.full((COUNT,), 10))
    one = mixed(kept=kept)
    (part,) = one.get(0)
    assert torch.equal(part.x0[:5], held[one.retained_indices(0)]) and part.labels[:5].tolist() == [10] * 5


@pytest.mark.parametrize("count", [0, BATCH])
def test_a_batch_has_images_of_both_sets(count: int) -> None:
    with pytest.raises(UsageError, match="retained images in a batch of 12"):
        Batches(image_set(), BATCH, 7, CPU, World(), retained=Retained(image_set(), count))
