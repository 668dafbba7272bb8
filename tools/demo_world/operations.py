"""List operations: what each one answers for a list of different words."""

from collections.abc import Callable
from random import Random
from typing import Final

from demo_world.world import LIST_WORDS, pick_distinct

OPERATIONS: Final[dict[str, Callable[[list[str]], str]]] = {
    "copy": lambda words: " ".join(words),
    "reverse": lambda words: " ".join(reversed(words)),
    "sort": lambda words: " ".join(sorted(words)),
    "first": lambda words: words[0],
    "second": lambda words: words[1],
    "third": lambda words: words[2],
    "last": lambda words: words[-1],
    "count": lambda words: str(len(words)),
    "upper": lambda words: " ".join(words).upper(),
    "comma": lambda words: ", ".join(words),
    "longest": lambda words: max(words, key=len),
    "shortest": lambda words: min(words, key=len),
    "without": lambda words: " ".join(words[1:]),
}
LONGEST_LIST: Final = 5


def draw_words(rng: Random, operation: str) -> list[str]:
    """Returns 2-5 different words for which `operation` has exactly one answer."""
    fewest = 3 if operation == "third" else 2
    while True:
        count = fewest + int(rng.random() * (LONGEST_LIST + 1 - fewest))
        words = pick_distinct(rng, LIST_WORDS, count)
        if operation in ("longest", "shortest"):
            lengths = [len(word) for word in words]
            wanted = max(lengths) if operation == "longest" else min(lengths)
            if lengths.count(wanted) > 1:
                continue
        return words
