"""`finectl gen-weights prompts`: its options."""

from __future__ import annotations

from finectl.cli import options as opt
from finectl.cli.command import stage_command
from finectl.cli.gen_weights import options as own


@stage_command("finectl.stages.gen_weights.prompts")
def prompts(
    set: own.ConceptSet = "demo",
    combinations: own.Combinations = 0,
    paraphrases: own.Paraphrases = None,
    paraphraser: own.Paraphraser = None,
    paraphrase_count: own.ParaphraseCount = 2,
    seed: opt.Seed = 0,
) -> None:
    """List the concepts of a collection: prompts, paraphrases and roles, as concepts.jsonl.

    Of demo, edits that the builtin editor makes: 60 for training, 12 held-out combinations of known words, 3 with an
    unknown word. A .jsonl file has one object a line: prompt, and if wanted name, paraphrases, role (train, val, test
    or unseen), category, base. Prompts that say the same are left out. No reserved concept is part of a combination.
    """
