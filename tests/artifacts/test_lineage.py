"""Lineage: what a model's own chain cost, what it shares with others, and what has to be kept for it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from support import TINY_DATA, run_cli

from finectl.artifacts.lineage import Ancestry, ancestor_cost, model_chain, stored_bytes, total_cost, trace
from finectl.artifacts.store import Workspace, open_artifact

NOTHING = {"steps": 0, "wall_s": 0, "samples": 0, "flops": 0}


def lineage(chain: Any, path: Path) -> Ancestry:
    return trace(Workspace(chain.root), open_artifact(path))


def cost(path: Path) -> dict[str, Any]:
    return open_artifact(path).manifest.cost


def test_the_cost_of_a_chain_is_that_of_its_models(chain: Any) -> None:
    links = model_chain(lineage(chain, chain.model))
    assert [link.path for link in links] == [chain.init, chain.model]
    total = total_cost(links)
    for key in ("steps", "samples", "flops"):
        assert total[key] == cost(chain.init)[key] + cost(chain.model)[key] > 0, key
    assert abs(total["wall_s"] - cost(chain.init)["wall_s"] - cost(chain.model)["wall_s"]) <= 0.05
    assert total_cost([]) == NOTHING


def test_operations_are_unknown_when_one_that_was_trained_does_not_say(chain: Any) -> None:
    links = model_chain(lineage(chain, chain.model))

    def changed(index: int, **values: Any) -> list[Any]:
        copies = list(links)
        old = {key: value for key, value in links[index].manifest.cost.items() if key != "flops"}
        copies[index] = replace(links[index], manifest=replace(links[index].manifest, cost={**old, **values}))
        return copies

    assert total_cost(changed(0))["flops"] is None and total_cost(changed(1))["flops"] is None
    assert total_cost(changed(0))["steps"] == total_cost(links)["steps"]
    assert total_cost(changed(1, flops=None))["flops"] is None
    untrained = dict.fromkeys(("steps", "samples"), 0)
    assert total_cost(changed(0, **untrained))["flops"] == cost(chain.model)["flops"]


def test_what_is_kept_and_shared_is_the_learngene_and_what_made_it(chain: Any) -> None:
    for path in (chain.model, chain.init):
        found = lineage(chain, path)
        assert stored_bytes(found) == sum(file.stat().st_size for file in chain.learngene.glob("*.safetensors")) > 0
        shared = ancestor_cost(found)
        assert shared is not None
        assert {key: shared[key] for key in ("steps", "samples", "flops")} == {
            key: cost(chain.condensed)[key] for key in ("steps", "samples", "flops")
        }
        assert shared["wall_s"] > 0
    from_nothing = lineage(chain, chain.condensed)
    assert stored_bytes(from_nothing) == 0 and ancestor_cost(from_nothing) == NOTHING


def test_what_is_gone_is_unknown(chain: Any) -> None:
    whole = stored_bytes(lineage(chain, chain.model))
    shutil.rmtree(chain.condensed)
    assert stored_bytes(lineage(chain, chain.model)) == whole and ancestor_cost(lineage(chain, chain.model)) is None
    shutil.rmtree(chain.learngene)
    assert stored_bytes(lineage(chain, chain.model)) is None and ancestor_cost(lineage(chain, chain.model)) is None
    shutil.rmtree(chain.init)
    assert [link.path for link in model_chain(lineage(chain, chain.model))] == [chain.model]
    assert stored_bytes(lineage(chain, chain.model)) is None


def test_the_control_takes_nothing_from_its_input(chain: Any) -> None:
    for source in (chain.learngene, chain.model):
        control = run_cli("init", source, "--method", "he", "--depth", 2, "--seed", 3).path
        found = lineage(chain, control)
        assert [link.path for link in model_chain(found)] == [control], "the input gave its shapes alone"
        assert stored_bytes(found) == 0 and ancestor_cost(found) == NOTHING
        assert total_cost(model_chain(found))["flops"] == 0


def test_earlier_updates_are_not_what_a_model_is_made_from(chain: Any) -> None:
    condensed = run_cli("condense", "--depth", 2, *TINY_DATA, "--keep-every", 1, "--seed", 5).path
    assert (condensed / "checkpoints").is_dir()
    dense = lineage(chain, chain.model)
    fake = replace(dense, parents=(lineage(chain, condensed),))
    assert stored_bytes(fake) == (condensed / "ema.safetensors").stat().st_size


def test_a_dense_ancestor_counts_as_shared(chain: Any) -> None:
    condensed = run_cli(
        "condense", "--from", chain.model, "--rank", 8, "--cp-iterations", 1, "--cp-weighting", "none",
        "--distill-steps", 2, "--batch-size", 8,
    ).path  # fmt: skip
    learngene = run_cli("extract", condensed).path
    init = run_cli("init", learngene, "--depth", 2, "--tune-steps", 0).path
    found = lineage(chain, init)
    shared = ancestor_cost(found)
    assert shared is not None and cost(condensed)["flops"] > 0
    everything = (condensed, chain.model, chain.init, chain.condensed)
    assert shared["steps"] == sum(cost(path)["steps"] for path in everything)
    assert shared["flops"] == sum(cost(path)["flops"] for path in everything)
    assert total_cost(model_chain(found))["flops"] == 0


def test_a_model_begins_where_it_is_initialised_from_a_dense_one(chain: Any) -> None:
    made = run_cli("init", chain.model, "--method", "weight-selection", "--depth", 2).path
    found = lineage(chain, made)
    assert [link.path for link in model_chain(found)] == [made] and total_cost(model_chain(found))["steps"] == 0
    shared = ancestor_cost(found)
    everything = (chain.model, chain.init, chain.condensed)
    assert shared is not None and shared["steps"] == sum(cost(path)["steps"] for path in everything)
    assert stored_bytes(found) == (chain.model / "ema.safetensors").stat().st_size, "one of its two sets of weights"
