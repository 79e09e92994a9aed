"""Prompts: the concepts of a collection, what each is called, and which of them no training may see.

Concepts of several categories are listed, duplicates left out, joined across categories, and said in other words.

Reference: Gong et al., ECCV 2024, arXiv 2407.11966, sections 4.1 and 5.1.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finectl.artifacts.files import sha256_json, write_atomic
from finectl.artifacts.job import Job, Outcome, Plan, Stage
from finectl.artifacts.store import Artifact
from finectl.data.concepts import FILE, ROLES, Concept, slug, write_concepts
from finectl.data.concepts.combine import combine, read_set, require_reserved_apart, without_duplicates
from finectl.data.concepts.paraphrase import read_paraphrases, usable, with_paraphrases
from finectl.data.concepts.paraphraser import Paraphraser, find_paraphraser, paraphraser_digest

WRITTEN = "paraphrases.jsonl"
SHOWN_NAMES = 3


@dataclass(frozen=True)
class Config:
    """The options of `finectl gen-weights prompts`."""

    set: str
    combinations: int
    paraphrases: str | None
    paraphraser: str | None
    paraphrase_count: int
    seed: int
    concepts_digest: str = ""
    paraphraser_digest: str = ""


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """List the concepts.

    Raises:
        UsageError: there is no such set, or there are not so many combinations.
        InputError: a file or the language model cannot be read, or a reserved concept leaks into training.
    """
    concepts, left_out = concepts_of(config)
    named = [part.strip() for part in config.set.split(",")]
    model = find_paraphraser(config.paraphraser) if config.paraphraser else None
    resolved = replace(
        config,
        set=",".join(os.path.abspath(name) if name.endswith(".jsonl") else name for name in named),
        paraphrases=os.path.abspath(config.paraphrases) if config.paraphrases else None,
        concepts_digest=sha256_json([concept.__dict__ for concept in concepts]),
        paraphraser_digest=paraphraser_digest(model) if model else "",
    )
    roles = counts_of(concepts)
    notes = (f"{left_out} concepts say the same as another one and are left out",) if left_out else ()
    short = "-".join(slug(Path(name).stem) for name in named[:SHOWN_NAMES])
    return Plan(
        resolved,
        slug=f"{short}-{len(concepts)}",
        summary={**roles, "paraphrases": sum(len(concept.paraphrases) for concept in concepts)},
        notes=notes,
    )


def concepts_of(config: Config) -> tuple[tuple[Concept, ...], int]:
    """Return the concepts, without what a language model is to add, and how many were left out as duplicates."""
    listed = [concept for name in config.set.split(",") for concept in read_set(name.strip())]
    distinct = without_duplicates(listed)
    left_out = len(listed) - len(distinct)
    require_reserved_apart(distinct)
    concepts = (*distinct, *combine(distinct, config.combinations, config.seed)) if config.combinations else distinct
    require_reserved_apart(concepts)
    more = read_paraphrases(Path(config.paraphrases).expanduser(), concepts) if config.paraphrases else {}
    return with_paraphrases(concepts, more), left_out


def counts_of(concepts: Sequence[Concept]) -> dict[str, Any]:
    """Return how many concepts there are, of each role and for the base."""
    roles = Counter(concept.role for concept in concepts)
    joined = sum("+" in concept.category for concept in concepts)
    counts = {role: roles[role] for role in ROLES if roles[role]}
    return {"concepts": len(concepts), **counts, "of_base": sum(c.base for c in concepts), "combinations": joined}


def run(job: Job[Config]) -> Outcome:
    """Write the concepts."""
    concepts, _ = concepts_of(job.config)
    if job.config.paraphraser:
        concepts = paraphrased(job, concepts)
    write_concepts(job.directory / FILE, concepts)
    metrics = {**counts_of(concepts), "paraphrases": sum(len(concept.paraphrases) for concept in concepts)}
    return Outcome(metrics=metrics)


def paraphrased(job: Job[Config], concepts: tuple[Concept, ...]) -> tuple[Concept, ...]:
    """Let the language model say every concept in other words; what it wrote stays when the run stops."""
    from finectl.training.device import resolve_device

    config = job.config
    state = job.state / WRITTEN
    done: dict[str, list[str]] = json.loads(state.read_text(encoding="utf-8")) if state.exists() else {}
    model = Paraphraser(find_paraphraser(config.paraphraser or ""), resolve_device(job.execution.device))

    def save() -> None:
        job.state.mkdir(exist_ok=True)
        write_atomic(state, json.dumps(done).encode())

    with job.console.progress("paraphrasing", len(concepts), unit="concept", done=len(done)) as progress:
        for number, concept in enumerate(concepts):
            if concept.name in done:
                continue
            job.stop_if_requested(save)
            written = model.write(concept.prompt, config.paraphrase_count, config.seed * len(concepts) + number)
            done[concept.name] = list(usable(written, concept, concepts))
            progress.advance(1)
    return with_paraphrases(concepts, done)


STAGE = Stage(
    name="gen-weights-prompts",
    version=1,
    makes="prompts",
    config=Config,
    reads=lambda config: None,
    plan=plan,
    run=run,
    locations=("paraphrases", "paraphraser"),
)
