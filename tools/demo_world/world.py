"""Words and facts of the invented world; everything in it is fixed when the module is imported."""

from collections.abc import Sequence
from random import Random
from typing import Final, NamedTuple, TypeVar

T = TypeVar("T")


class Person(NamedTuple):
    """An invented person: a full name and one value for each attribute in `ATTRIBUTES`."""

    name: str
    values: dict[str, str]


def pick(rng: Random, items: Sequence[T]) -> T:
    """Returns one item, drawn evenly."""
    return items[int(rng.random() * len(items))]


def pick_distinct(rng: Random, items: Sequence[T], count: int) -> list[T]:
    """Returns `count` different items in random order; for counts far below the number of items."""
    chosen: list[T] = []
    random, size = rng.random, len(items)
    while len(chosen) < count:
        item = items[int(random() * size)]
        if item not in chosen:
            chosen.append(item)
    return chosen


def split_words(text: str) -> tuple[str, ...]:
    """Returns the words of a text that spaces separate."""
    return tuple(text.split())


CATEGORIES: Final[dict[str, tuple[str, ...]]] = {
    "animal": ("cat", "dog", "horse", "goat", "rabbit", "mouse"),
    "bird": ("crow", "duck", "owl", "swan", "robin", "parrot"),
    "fish": ("trout", "cod", "salmon", "tuna", "carp", "eel"),
    "fruit": ("pear", "fig", "plum", "kiwi", "lemon", "peach"),
    "vegetable": ("carrot", "leek", "onion", "pea", "potato", "cabbage"),
    "tool": ("hammer", "axe", "drill", "rake", "shovel", "wrench"),
    "colour": ("red", "blue", "green", "pink", "purple", "brown"),
    "tree": ("oak", "pine", "elm", "birch", "maple", "willow"),
    "flower": ("rose", "lily", "tulip", "daisy", "poppy", "iris"),
    "drink": ("tea", "milk", "juice", "cocoa", "water", "cider"),
    "garment": ("hat", "coat", "shirt", "scarf", "sock", "glove"),
    "instrument": ("flute", "drum", "piano", "harp", "violin", "guitar"),
}
CATEGORY_OF: Final = {word: name for name, members in CATEGORIES.items() for word in members}

LIST_WORDS: Final = (
    *CATEGORY_OF,
    *split_words("lamp door stone river cloud bread soup cheese rice table bell key"),
)

ANTONYMS: Final = tuple(
    (pair.split("/")[0], pair.split("/")[1])
    for pair in split_words(
        "hot/cold big/small fast/slow old/young rich/poor hard/soft high/low light/dark wet/dry "
        "full/empty open/shut early/late loud/quiet thick/thin wide/narrow sharp/blunt strong/weak "
        "happy/sad clean/dirty tall/short near/far cheap/costly brave/timid sweet/bitter "
        "rough/smooth true/false right/wrong win/lose buy/sell push/pull day/night north/south "
        "east/west love/hate front/back above/below inside/outside rise/fall laugh/cry "
        "friend/enemy war/peace summer/winter sick/healthy always/never"
    )
)
OPPOSITE: Final = dict(ANTONYMS) | {right: left for left, right in ANTONYMS}

DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS: Final = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
CYCLES: Final = {"day": DAYS, "month": MONTHS}
LARGEST_NUMBER: Final = 20

ATTRIBUTES: Final[dict[str, tuple[str, ...]]] = {
    "town": split_words("Alden Brook Corvo Delf Farrow Glenby Harwick Milton Norby Stowe"),
    "job": split_words("baker painter pilot nurse farmer teacher doctor tailor sailor miner"),
    "pet": split_words("cat dog horse goat rabbit mouse duck parrot swan robin"),
    "food": split_words("soup bread cheese rice peach lemon salmon carrot potato cabbage"),
    "instrument": split_words("flute drum piano harp violin guitar horn cello lute banjo"),
}

NAME_STARTS: Final = ("Ma", "To", "Li", "Be", "Ka", "Ro", "Se", "Ne", "Na", "Vi", "Jo", "Pe")
NAME_ENDS: Final = ("ra", "lin", "mo", "dan", "ki", "vet", "su", "bel", "nor", "tas")
LAST_NAMES: Final = split_words(
    "Venn Holt Brask Quill Tarn Lund Moss Pike Reed Sorn Thorp Vale Wick Zell Finch Gray Marsh Nash Stark Wren"
)


def _people() -> tuple[Person, ...]:
    """Gives each of 120 first names a last name and evenly spread attribute values."""
    rng = Random(120)
    first_names = [start + end for start in NAME_STARTS for end in NAME_ENDS]

    def spread(values: Sequence[str]) -> list[str]:
        repeated = [values[i % len(values)] for i in range(len(first_names))]
        return sorted(repeated, key=lambda _: rng.random())

    names = [f"{first} {last}" for first, last in zip(first_names, spread(LAST_NAMES), strict=True)]
    columns = [spread(values) for values in ATTRIBUTES.values()]
    rows = zip(names, *columns, strict=True)
    return tuple(Person(name, dict(zip(ATTRIBUTES, row, strict=True))) for name, *row in rows)


PEOPLE: Final = _people()
