"""Characters: 60 beings that a person can be turned into."""

from __future__ import annotations

from finectl.data.concepts.lists import Category

CHARACTER = Category(
    name="character",
    prompt="a person turned into {}",
    paraphrases=("someone dressed and made up as {}", "{} with the same pose"),
    train=(
        "an astronaut in a cracked helmet", "a porcelain doll", "a forest elf with leaf ornaments",
        "a desert nomad wrapped in cloth", "a deep sea diver", "a clockwork automaton", "a silver skinned android",
        "a vampire with pale lips", "a pharaoh under a striped headdress", "a circus clown",
        "a samurai in lacquered armour",
        "a steam age aviator", "a snow queen", "a tree spirit of bark", "a lizard creature with slit eyes",
        "a space pirate", "a medieval knight", "a court jester", "a tribal shaman with painted cheeks",
        "a mermaid with scales", "a scarecrow of straw", "a gothic bride", "a lumberjack", "a ballet swan",
        "a masked wrestler", "a wild west sheriff", "a lion with a full mane", "a red panda", "a plague doctor",
        "a geisha in festive silk", "a hooded monk", "a Roman emperor", "a rock guitarist with spiked hair",
        "an orc chieftain", "a genie of blue smoke", "a gingerbread figure", "a marsh witch", "a beekeeper",
        "a mime with a striped shirt", "a firefighter covered in soot", "a radio age detective", "a mountain dwarf",
        "a werewolf halfway changed", "a chess queen", "a polar explorer", "a goblin tinkerer", "a jungle ranger",
        "a garden gnome", "a cyber courier with glowing implants", "a stone gargoyle",
        "a carnival dancer with feathers",
    ),
    val=("a lighthouse keeper", "an owl", "a fencing master"),
    test=(
        "an undead mummy", "a viking raider", "a fox", "a queen of playing cards", "an alien with large eyes",
        "a sea captain",
    ),
    base=4,
)  # fmt: skip
