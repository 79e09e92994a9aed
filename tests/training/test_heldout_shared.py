"""A held-out loss that several processes measure: the same numbers, bit for bit, in all of them as in one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest import mock

import heldout_rank
import pytest
import torch
from ranks import DEADLINE_S, SIZE, free_port, launcher_environment
from support import child_environment

from finectl.artifacts.tensors import load_tensors
from finectl.world import World


@pytest.mark.parametrize("draws", [1, 5])
def test_two_processes_measure_what_one_does(draws: int, tmp_path: Path) -> None:
    alone = heldout_rank.measure(draws)
    port = free_port()
    paths = [tmp_path / f"{rank}.safetensors" for rank in range(SIZE)]
    both = [
        subprocess.Popen(
            [sys.executable, heldout_rank.__file__, str(path), str(draws)],
            stderr=subprocess.PIPE, text=True, env=child_environment(**launcher_environment(rank, port)),
        )
        for rank, path in enumerate(paths)
    ]  # fmt: skip
    try:
        for process in both:
            _, err = process.communicate(timeout=DEADLINE_S)
            assert process.returncode == 0, err
    finally:
        for process in both:
            process.kill()
            process.wait()
    for path in paths:
        found = load_tensors(path)
        assert torch.equal(found["losses"], alone.losses) and found["losses"].dtype == torch.float32
        assert torch.equal(found["timesteps"], alone.timesteps)
    assert float(alone.losses.min()) > 0


def test_a_process_does_its_share_only() -> None:
    """Draws 1 and 3 of five are those of the second of two."""
    with mock.patch("finectl.metrics.heldout_loss.total", lambda world, values: values.double()):
        share = heldout_rank.measure(5, World(rank=1, size=2)).losses
    alone = heldout_rank.measure(5).losses
    assert [bool(row.any()) for row in share] == [False, True, False, True, False]
    assert torch.equal(share[1::2], alone[1::2])
