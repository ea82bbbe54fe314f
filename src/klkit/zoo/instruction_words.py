"""The words of the instruction language."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


OPPOSITES = tuple(
    tuple(pair.split("/"))
    for pair in _words(
        "hot/cold big/small fast/slow old/young high/low wet/dry hard/soft light/dark rich/poor full/empty open/closed "
        "early/late strong/weak happy/sad loud/quiet clean/dirty thick/thin wide/narrow deep/shallow sharp/blunt "
        "sweet/sour near/far up/down left/right day/night win/lose buy/sell push/pull start/finish love/hate laugh/cry "
        "rise/fall true/false brave/afraid rough/smooth tight/loose cheap/costly kind/cruel rare/common first/last"
    )
)

CATEGORIES = {
    name: _words(members)
    for name, members in {
        "animals": "fox cow lion bear horse wolf mouse tiger goat rabbit",
        "birds": "crow swan owl eagle robin heron finch gull stork wren",
        "fruits": "banana apple cherry plum pear grape lemon mango fig peach",
        "vegetables": "carrot onion bean leek pea beet turnip pepper radish cabbage",
        "tools": "hammer saw drill spade rake chisel pliers axe wrench file",
        "instruments": "violin piano flute drum harp cello trumpet guitar organ banjo",
        "cities": "paris rome cairo lima oslo delhi tokyo quito dakar athens",
        "trees": "oak pine birch maple willow cedar elm beech larch ash",
        "metals": "iron gold tin zinc lead silver copper nickel cobalt steel",
        "drinks": "tea milk water coffee juice cider cocoa soda broth lemonade",
        "clothes": "coat hat scarf shirt glove boot belt skirt sock jacket",
        "fish": "trout salmon cod tuna carp pike eel perch bass sole",
        "games": "chess poker tennis golf darts rugby bowls hockey cricket judo",
    }.items()
}

COLOURED = ("birds", "fruits", "vegetables", "clothes")
DESCRIBED = ("tools", "instruments", "trees", "metals")
COLOURS = _words("red green blue yellow brown black white orange purple pink grey crimson violet olive")
LARGEST = 49
"""Of the two numbers that are added."""

LOOKS = _words(
    "plain pretty shiny dull odd elegant ancient modern tiny huge bright pale curved straight broken round striped "
    "worn slim polished foreign dusty splendid ugly rusty"
)
FEELS = _words(
    "useful heavy popular precious solid simple noble fragile famous handy noisy secret royal holy lost dear welcome "
    "dangerous warm honest boring magic borrowed humble forgotten"
)

STORY = {
    "opening": ("one morning", "one evening", "last winter", "long ago", "every summer", "at noon"),
    "deed": (
        "walked to the market", "slept in a garden", "found a letter", "crossed the bridge", "climbed a tower",
        "lost a key", "danced near the river", "opened a shop", "painted a wall", "counted the stars",
        "built a boat", "followed a stranger", "won a race", "wrote a song",
    ),
    "turn": ("then it met", "later it heard", "there it saw", "soon it followed"),
    "ending": (
        "and they sang", "and went home", "but nobody knew", "and had dinner", "but it rained", "and smiled",
        "and told a joke", "but time ran out",
    ),
}  # fmt: skip
