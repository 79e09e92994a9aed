"""Art styles: 60 ways in which a picture can be made."""

from __future__ import annotations

from finectl.data.concepts.lists import Category

ART = Category(
    name="art",
    prompt="a portrait made as {}",
    paraphrases=("the picture redone as {}", "{}, showing the same person"),
    train=(
        "loose ink wash on rice paper", "thick oil paint with visible knife strokes", "a charcoal study on rough paper",
        "a stained glass window", "flat gouache shapes", "a linocut in two inks", "a low polygon render",
        "chalk on a slate board", "a fresco on cracked plaster", "needlework on linen", "a marble bust",
        "cut paper layers", "a bronze cast with green patina", "a glazed ceramic tile", "a copperplate engraving",
        "pastel dust on grey card", "eight bit pixel graphics", "a blueprint with white lines",
        "a neon tube sign at night", "a woven tapestry", "cross hatching in ballpoint pen", "a faded daguerreotype",
        "a pop print with loud dots", "a cubist study of angles", "pointillist specks of pure colour",
        "an art deco travel advertisement", "a medieval manuscript miniature", "a Byzantine gold ground icon",
        "a woodblock print with flat waves", "a carved oak panel", "spray paint through a stencil",
        "a chalk drawing on pavement", "wax crayon on brown paper", "a silhouette cut from black card",
        "an infrared photograph", "a cyanotype on cotton", "a clay animation figure", "felted wool",
        "origami of folded foil", "a graffiti mural on brick", "a comic panel with heavy outlines",
        "a soft airbrush cover from a paperback", "sumptuous baroque chiaroscuro", "an etching with plate tone",
        "a fauvist canvas of wild hues", "a rococo miniature on ivory", "a constructivist collage", "a wire sculpture",
        "a holographic foil sticker", "an X ray plate", "a children's book illustration",
    ),
    val=("a sand drawing on a beach", "an enamel badge", "a double exposure on film"),
    test=(
        "impasto swirls under a night sky", "a mosaic of small stones", "batik dye on silk",
        "a diluted aquarelle with bleeding edges", "a scratchboard drawing", "a papier mache mask",
    ),
    base=4,
)  # fmt: skip
