"""The wordings of the instructions; a bar separates an instruction from its input."""

from typing import Final

FACTS: Final[dict[str, tuple[str, ...]]] = {
    "town": (
        "Where does {n} live?",
        "In which town does {n} live?",
        "What is the home town of {n}?",
        "Name the town where {n} lives.",
    ),
    "job": (
        "What is the job of {n}?",
        "What does {n} do for work?",
        "Which job does {n} have?",
        "Name the job of {n}.",
    ),
    "pet": (
        "What pet does {n} have?",
        "Which pet lives with {n}?",
        "What kind of pet does {n} have?",
        "Name the pet of {n}.",
    ),
    "food": (
        "What is the favourite food of {n}?",
        "Which food does {n} like best?",
        "What does {n} like to eat?",
        "Name the favourite food of {n}.",
    ),
    "instrument": (
        "What instrument does {n} play?",
        "Which instrument does {n} play?",
        "What does {n} play?",
        "Name the instrument of {n}.",
    ),
}
LISTS: Final[dict[str, tuple[str, ...]]] = {
    "reverse": (
        "Write these words in reverse order.",
        "Reverse the order of the words.",
        "Put the list in reverse order.",
        "Write the words backwards.",
    ),
    "sort": (
        "Sort these words in alphabetical order.",
        "Put the words in alphabetical order.",
        "Sort the list from a to z.",
        "Write these words in alphabetical order.",
    ),
    "first": (
        "What is the first word?",
        "Which word comes first in the list?",
        "Write only the first word.",
        "Give the first word of the list.",
    ),
    "second": (
        "What is the second word?",
        "Which word comes second in the list?",
        "Write only the second word.",
        "Give the second word of the list.",
    ),
    "last": (
        "What is the last word?",
        "Which word comes last in the list?",
        "Write only the last word.",
        "Give the last word of the list.",
    ),
    "count": (
        "How many words are there?",
        "How many words are in the list?",
        "Count the words.",
        "Give the number of words in the list.",
    ),
    "upper": (
        "Write these words in capital letters.",
        "Put the words in capital letters.",
        "Give the list in capital letters.",
        "Change the words to capital letters.",
    ),
    "comma": (
        "Join the words with commas.",
        "Put a comma between the words.",
        "Write these words with commas between them.",
        "Give the list with commas.",
    ),
    "longest": (
        "What is the longest word?",
        "Which word in the list is the longest?",
        "Find the longest word.",
        "Give the longest word of the list.",
    ),
    "without": (
        "Remove the first word.",
        "Write the words without the first word.",
        "Leave out the first word of the list.",
        "Drop the first word from the list.",
    ),
}
ANTONYM: Final = (
    "What is the opposite of {w}?",
    "Which word is the opposite of {w}?",
    "Give the opposite of this word.|{w}",
    "Write a word that means the opposite.|{w}",
)
CATEGORY: Final = (
    "What category does this word belong to?|{w}",
    "Name the category of this word.|{w}",
    "What kind of thing is this?|{w}",
    "Which category fits the word {w}?",
)
NEXT: Final = (
    "Which {c} comes after {w}?",
    "What is the {c} after {w}?",
    "Name the {c} that follows {w}.",
    "What {c} comes right after {w}?",
)
PREVIOUS: Final = (
    "Which {c} comes before {w}?",
    "What is the {c} before {w}?",
    "Name the {c} that comes before {w}.",
    "What {c} comes just before {w}?",
)
ADD: Final = (
    "What is {a} plus {b}?",
    "What is the sum of {a} and {b}?",
    "How much is {a} plus {b}?",
    "Add {a} and {b}.",
)
SUBTRACT: Final = (
    "What is {a} minus {b}?",
    "How much is {a} minus {b}?",
    "Subtract {b} from {a}.",
    "Take {b} away from {a}.",
)
