"""Pairs that stand for all, by CLIP's features."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finectl.data.subset import representative_rows
from finectl.errors import InputError, UsageError
from finectl.metrics.representatives import clip_features, representative_pairs, subset_clip_digest

CPU = torch.device("cpu")


class Pictures:
    """Twelve training images of noise, and one for validation before them."""

    images = torch.randint(0, 256, (13, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def rows(self, split: str) -> torch.Tensor:
        assert split == "train"
        return torch.arange(1, 13)

    def source_rows(self, rows: torch.Tensor) -> torch.Tensor:
        return self.images[rows]


def tiny_clip(folder: Path) -> Path:
    """Write a CLIP model of random weights as open_clip does."""
    open_clip = pytest.importorskip("open_clip")
    network = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": network, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    state = {name: value.contiguous() for name, value in open_clip.CLIP(**network).state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def chosen(count: int, clip: Path | None) -> list[int]:
    given = None if clip is None else str(clip)
    return representative_pairs(Pictures(), count, 0, given, CPU).tolist()  # type: ignore[arg-type]


def test_clip_chooses_by_its_own_features(tmp_path: Path) -> None:
    clip = tiny_clip(tmp_path / "clip")
    features = clip_features(Pictures.images[1:], str(clip), CPU)
    assert features.shape[0] == 12
    torch.testing.assert_close(features.norm(dim=1), torch.ones(12, dtype=torch.float64))
    wanted = representative_rows(Pictures.images[1:], 4, 0, features) + 1
    assert chosen(4, clip) == wanted.tolist() != chosen(4, None)
    assert chosen(0, clip) == chosen(12, clip) == list(range(1, 13))


def test_a_model_for_nothing_and_one_that_is_not_there_are_refused(tmp_path: Path) -> None:
    assert subset_clip_digest(0, None) == subset_clip_digest(4, None) == ""
    with pytest.raises(UsageError, match="--subset-clip"):
        subset_clip_digest(0, "somewhere")
    with pytest.raises(InputError):
        subset_clip_digest(4, str(tmp_path / "nothing"))
