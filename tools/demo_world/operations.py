"""List operations: what each one answers for a list of different words."""

from collections.abc import Callable
from random import Random
from typing import Final

from demo_world.world import LIST_WORDS, pick_distinct

OPERATIONS: Final[dict[str, Callable[[list[str]], str]]] = {
    "copy": lambda items: " ".join(items),
    "reverse": lambda items: " ".join(reversed(items)),
    "sort": lambda items: " ".join(sorted(items)),
    "first": lambda items: items[0],
    "second": lambda items: items[1],
    "third": lambda items: items[2],
    "last": lambda items: items[-1],
    "count": lambda items: str(len(items)),
    "upper": lambda items: " ".join(items).upper(),
    "comma": lambda items: ", ".join(items),
    "longest": lambda items: max(items, key=len),
    "shortest": lambda items: min(items, key=len),
    "without": lambda items: " ".join(items[1:]),
}
LONGEST_LIST: Final = 5


def draw_words(rng: Random, operation: str) -> list[str]:
    """Returns 2-5 different words for which `operation` has exactly one answer."""
    fewest = 3 if operation == "third" else 2
    while True:
        count = fewest + int(rng.random() * (LONGEST_LIST + 1 - fewest))
        items = pick_distinct(rng, LIST_WORDS, count)
        if operation in ("longest", "shortest"):
            lengths = [len(word) for word in items]
            target = max(lengths) if operation == "longest" else min(lengths)
            if lengths.count(target) > 1:
                continue
        return items
