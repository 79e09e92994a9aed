"""Facial modifications: 26 things that can change in a face."""

from __future__ import annotations

from finectl.data.concepts.lists import Category

FACIAL = Category(
    name="facial",
    prompt="the same face with {}",
    paraphrases=("give this person {}", "the portrait edited to have {}"),
    train=(
        "a broad smile", "curly copper hair", "a full dark beard", "round wire spectacles", "forty more years of age",
        "a clean shaven head", "freckles over nose and cheeks", "closed eyes", "an angry frown", "a thin moustache",
        "heavy eye shadow", "sunburnt skin", "a surprised look with raised brows", "a scar across one cheek",
        "bright turquoise hair", "a long fringe", "a child's features", "tears running down", "a golden nose ring",
    ),
    val=("mirrored goggles", "plump lips"),
    test=("platinum braids", "tinted sunglasses", "dimples and a grin", "silver temples", "a pointed goatee"),
    base=4,
)  # fmt: skip
