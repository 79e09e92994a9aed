"""The concepts of the categories art, character and facial: the finished tables of this package."""

from __future__ import annotations

from dataclasses import dataclass

from finectl.data.concepts import Concept, slug


@dataclass(frozen=True)
class Category:
    """A list of concepts that differ in one thing.

    Args:
        name: The category.
        prompt: The prompt, with {} for the thing.
        paraphrases: Others, in the same form.
        train: What training may see; the first `base` of them are the base GAN's, too.
        val: What is looked at during training.
        test: What is reserved.
        base: How many are the base's.
    """

    name: str
    prompt: str
    paraphrases: tuple[str, ...]
    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    base: int

    def concepts(self) -> tuple[Concept, ...]:
        """Return the concepts, those for training first."""
        rows = [("train", thing, place < self.base) for place, thing in enumerate(self.train)]
        rows += [("val", thing, False) for thing in self.val] + [("test", thing, False) for thing in self.test]
        return tuple(
            Concept(
                name=f"{self.name}-{slug(thing)}",
                prompt=self.prompt.format(thing),
                paraphrases=tuple(form.format(thing) for form in self.paraphrases),
                atoms=(f"{self.name}-{slug(thing)}",),
                role=role,
                base=base,
                category=self.name,
            )
            for role, thing, base in rows
        )
