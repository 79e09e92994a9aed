"""Choosing between images with a tiny CLIP model of random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from finectl.metrics.choosing import ClipChooser
from finectl.metrics.clip_score import clip_score

NETWORK: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def test_the_image_with_the_largest_score_stays(tmp_path: Path) -> None:
    import open_clip

    torch.manual_seed(0)
    state = {name: tensor.contiguous() for name, tensor in open_clip.CLIP(**NETWORK).state_dict().items()}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": NETWORK}))
    save_file(state, tmp_path / "open_clip_model.safetensors")
    chooser = ClipChooser.of(str(tmp_path), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    candidates = [torch.randint(0, 256, (4, 3, 24, 24), dtype=torch.uint8, generator=generator) for _ in range(3)]
    scores = torch.stack([chooser.scores(images, "a red robot") for images in candidates])
    best = chooser.best(candidates, "a red robot")
    for column in range(4):
        assert torch.equal(best[column], candidates[int(scores[:, column].argmax())][column])
    assert len({int(row) for row in scores.argmax(dim=0)}) > 1
    text = chooser.features.encode_text(["a red robot"])
    prepared = chooser.features.prepare(candidates[0][0].permute(1, 2, 0).numpy())[None]
    image = chooser.features.forward(prepared, ("features",))["features"]
    assert abs(clip_score(image, text).value - max(100 * float(scores[0, 0]), 0)) < 1e-3
