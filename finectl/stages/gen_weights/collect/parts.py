"""Parts of a collection that were made before, and what of them is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from finectl.adapters import parts
from finectl.artifacts.files import sha256_json
from finectl.artifacts.job import Job
from finectl.data.concepts import Concept
from finectl.stages.gen_weights.collect.config import VERSION, Config


def collection_of(job: Job[Config]) -> str:
    """Return the hash of all that decides the weights of a concept: equal in all parts of a collection."""
    config = asdict(job.config)
    for name in ("pairs", "roles", "only", "shard", "subset_clip"):
        del config[name]
    return sha256_json([VERSION, config, *(parent.manifest.digest for parent in job.parents)])


def take_parts(job: Job[Config], concepts: Sequence[Concept]) -> int:
    """Link the weights of concepts that other parts of this collection hold, and return how many."""
    return parts.take_parts(job, collection_of(job), [concept.name for concept in concepts])
