"""Images that stand for many."""

from __future__ import annotations

import torch

from finectl.data.subset import representative_rows


def test_one_of_each_cluster() -> None:
    generator = torch.Generator().manual_seed(0)
    levels = torch.tensor([10, 240, 120]).repeat(5)[:, None, None, None]
    images = (levels + torch.randint(0, 5, (15, 3, 16, 16), generator=generator)).to(torch.uint8)
    chosen = representative_rows(images, 3, 0)
    assert sorted((row % 3) for row in chosen.tolist()) == [0, 1, 2]
    assert torch.equal(chosen, chosen.sort().values)
    assert torch.equal(chosen, representative_rows(images, 3, 0))


def test_equal_images_are_not_chosen_twice() -> None:
    images = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    images[0] = 255
    assert len(set(representative_rows(images, 4, 0).tolist())) == 4


def test_more_than_there_are_is_all() -> None:
    assert representative_rows(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), 5, 0).tolist() == [0, 1, 2]
