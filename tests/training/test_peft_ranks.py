"""Few trained parameters in two processes, shared and sharded: the same run as in one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import Pair, assert_agree
from support import run_cli, whole

RUN = (
    "--data", "digits#5,6,7,8,9", "--method", "full", "--steps", 4, "--batch-size", 8, "--eval-every", 2,
    # Of larger steps, Adam turns rounding in gradients of nearly 0 into steps that are seen.
    "--lr", 1e-5,
)  # fmt: skip
CASES = {
    "lora fsdp checkpointing": ("lora", ("--fsdp", "--grad-checkpointing")),
    "lora": ("lora", ()),
    "difffit fsdp": ("difffit", ("--fsdp",)),
    "vpt fsdp": ("vpt", ("--fsdp", "--accumulate", 2)),
}


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """Two processes that run one command after another."""
    both = Pair()
    yield both
    both.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = ("--workspace", tmp_path_factory.mktemp("peft-ranks"))
    start = run_cli("init", "--method", "he", "--model", "dit-nano", "--depth", 2, *place).path
    return run_cli("train", start, "--steps", 3, "--lr", 1e-2, "--batch-size", 8, "--eval-every", 0, *place).path


@pytest.mark.parametrize("case", CASES)
def test_two_processes_and_one_are_the_same_run(case: str, pair: Pair, model: Path, workspace: Path) -> None:
    method, execution = CASES[case]
    command = ("finetune", model, *RUN, "--peft", method)
    lead, follow = pair(*command, *execution, workspace=workspace)
    assert (follow.code, follow.out, follow.err) == (0, "", "")
    alone = run_cli(*command, "--workspace", workspace.with_name("alone")).path
    assert lead.path.name == alone.name
    assert_agree(whole(lead.path).path, alone)
    assert (lead.path / "adapter").is_dir()
