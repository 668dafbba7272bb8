"""The wordings of the instructions; a bar separates an instruction from its input."""

from typing import Final

FACTS: Final[dict[str, tuple[str, ...]]] = {
    "town": (
        "Where does {n} live?",
        "Name the town where {n} lives.",
    ),
    "job": (
        "What is the job of {n}?",
        "Name the job of {n}.",
    ),
    "pet": (
        "What pet does {n} have?",
        "Name the pet of {n}.",
    ),
    "food": (
        "What is the favourite food of {n}?",
        "Name the favourite food of {n}.",
    ),
    "instrument": (
        "What instrument does {n} play?",
        "Name the instrument of {n}.",
    ),
}
LISTS: Final[dict[str, tuple[str, ...]]] = {
    "reverse": (
        "Write these words in reverse order.",
        "Write the words backwards.",
    ),
    "sort": (
        "Sort these words in alphabetical order.",
        "Write these words in alphabetical order.",
    ),
    "first": (
        "What is the first word?",
        "Give the first word of the list.",
    ),
    "second": (
        "What is the second word?",
        "Give the second word of the list.",
    ),
    "last": (
        "What is the last word?",
        "Give the last word of the list.",
    ),
    "count": (
        "How many words are there?",
        "Give the number of words in the list.",
    ),
    "upper": (
        "Write these words in capital letters.",
        "Change the words to capital letters.",
    ),
    "comma": (
        "Join the words with commas.",
        "Give the list with commas.",
    ),
    "longest": (
        "What is the longest word?",
        "Give the longest word of the list.",
    ),
    "without": (
        "Remove the first word.",
        "Drop the first word from the list.",
    ),
}
ANTONYM: Final = (
    "What is the opposite of {w}?",
    "Give the opposite of this word.|{w}",
)
CATEGORY: Final = (
    "What category does this word belong to?|{w}",
    "Name the category of this word.|{w}",
)
NEXT: Final = (
    "Which {c} comes after {w}?",
    "What is the {c} after {w}?",
)
PREVIOUS: Final = (
    "Which {c} comes before {w}?",
    "What is the {c} before {w}?",
)
ADD: Final = (
    "What is {a} plus {b}?",
    "Add {a} and {b}.",
)
SUBTRACT: Final = (
    "What is {a} minus {b}?",
    "Subtract {b} from {a}.",
)
