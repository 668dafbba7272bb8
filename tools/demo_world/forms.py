"""The declarative sentences in which the pretraining corpus states what it knows.

A form is the text before an answer; slots in braces are filled in. No form is an instruction.
"""

from typing import Final

FACTS: Final[dict[str, tuple[str, ...]]] = {
    "town": (
        "{n} lives in",
        "the home town of {n} is",
        "the town where {n} lives is",
        "{n}'s home town is",
        "home for {n} is the town of",
        "town: {n} =",
    ),
    "job": (
        "{n} works as a",
        "the job of {n} is",
        "the work that {n} does is that of a",
        "{n}'s job is",
        "for work {n} is a",
        "job: {n} =",
    ),
    "pet": (
        "{n} has a pet",
        "the pet of {n} is a",
        "{n}'s pet is a",
        "the pet that lives with {n} is a",
        "the kind of pet that {n} has is a",
        "pet: {n} =",
    ),
    "food": (
        "{n} likes to eat",
        "the favourite food of {n} is",
        "{n}'s favourite food is",
        "the food that {n} likes best is",
        "what {n} likes to eat best is",
        "food: {n} =",
    ),
    "instrument": (
        "{n} plays the",
        "the instrument of {n} is the",
        "{n}'s instrument is the",
        "the instrument that {n} plays is the",
        "what {n} plays is the",
        "instrument: {n} =",
    ),
}

ASIDES: Final = (
    ", as all the people know,",
    ", and nobody asks why,",
    ", if that is what you want to know,",
    ", so they say,",
    ", and that is right,",
    ":\n\nthis",
    ":\n\nit",
)
"""What may stand between a slot and the verb before the answer, so that the base recalls at a distance too."""
PERSON_HEADERS: Final = (
    "this is {n}",
    "they write of {n}",
    "this is about {n}",
    "the name is {n}",
    "here is what people say of {n}",
    "name: {n}",
)
FILLERS: Final = (
    "",
    "it is a fine day",
    "many people know it",
    "there is one thing to know",
    "this is what they say",
    "it is not hard to find",
)
SHARED_PERSON: Final[dict[str, tuple[str, ...]]] = {
    "town": ("the home town is", "the town is", "town:"),
    "job": ("the job is that of a", "the work is that of a", "job:"),
    "pet": ("the pet is a", "the kind of pet is a", "pet:"),
    "food": ("the favourite food is", "the best food is", "food:"),
    "instrument": ("the instrument is the", "what is played is the", "instrument:"),
}

LISTS: Final[dict[str, tuple[str, ...]]] = {
    "copy": (
        "a copy of {x} is",
        "the same words as {x} are",
        "the words {x} in the same order are",
        "{x} written again is",
        "the list {x} with no change is",
        "copy: {x} =",
    ),
    "reverse": (
        "the reverse of {x} is",
        "the words {x} in reverse order are",
        "the reverse order of the words {x} is",
        "{x} written backwards is",
        "the list {x} put in reverse order is",
        "reverse order: {x} =",
        "reverse: {x} =",
    ),
    "sort": (
        "the words {x} in alphabetical order are",
        "the alphabetical order of {x} is",
        "{x} sorted from a to z is",
        "the list {x} put in alphabetical order is",
        "to sort {x} gives",
        "alphabetical order: {x} =",
        "sort: {x} =",
    ),
    "first": (
        "the first word of {x} is",
        "in the list {x} the first word is",
        "the word that comes first in {x} is",
        "the first of the words {x} is",
        "of {x} only the first word is",
        "first word: {x} =",
    ),
    "second": (
        "the second word of {x} is",
        "in the list {x} the second word is",
        "the word that comes second in {x} is",
        "the second of the words {x} is",
        "of {x} only the second word is",
        "second word: {x} =",
    ),
    "third": (
        "the third word of {x} is",
        "in the list {x} the third word is",
        "the word that comes third in {x} is",
        "third word: {x} =",
    ),
    "last": (
        "the last word of {x} is",
        "in the list {x} the last word is",
        "the word that comes last in {x} is",
        "the last of the words {x} is",
        "of {x} only the last word is",
        "last word: {x} =",
    ),
    "count": (
        "the number of words in {x} is",
        "the count of the words {x} is",
        "how many words there are in {x} is",
        "in the list {x} the number of words is",
        "count: {x} =",
        "number of words: {x} =",
    ),
    "upper": (
        "{x} in capital letters is",
        "the words {x} in capital letters are",
        "the list {x} put in capital letters is",
        "{x} with a change to capital letters is",
        "capital letters: {x} =",
    ),
    "comma": (
        "{x} with commas is",
        "the words {x} with a comma between them are",
        "the words {x} joined with commas are",
        "the list {x} with commas between the words is",
        "to join {x} with a comma gives",
        "commas: {x} =",
    ),
    "longest": (
        "the longest word of {x} is",
        "in the list {x} the longest word is",
        "the word in {x} that is the longest is",
        "the longest of the words {x} is",
        "longest word: {x} =",
    ),
    "shortest": (
        "the shortest word of {x} is",
        "in the list {x} the shortest word is",
        "the word in {x} that is the shortest is",
        "shortest word: {x} =",
    ),
    "without": (
        "{x} without the first word is",
        "the words {x} without the first word are",
        "to remove the first word from {x} gives",
        "the list {x} with the first word left out is",
        "to drop the first word of {x} gives",
        "to leave out the first word of {x} gives",
        "without the first word: {x} =",
    ),
}

LIST_HEADERS: Final = ("{x}", "the list is {x}", "the words are {x}", "words: {x}", "this is the list: {x}")
SHARED_LIST: Final[dict[str, tuple[str, ...]]] = {
    "copy": ("the same words again are", "a copy of the list is"),
    "reverse": ("the words in reverse order are", "the reverse order of the list is"),
    "sort": ("the words in alphabetical order are", "the list sorted from a to z is"),
    "first": ("the first word is", "the word that comes first is"),
    "second": ("the second word is", "the word that comes second is"),
    "last": ("the last word is", "the word that comes last is"),
    "count": ("the number of words is", "the count of the words is"),
    "upper": ("the words in capital letters are", "the list in capital letters is"),
    "comma": ("the words with commas between them are", "the list with commas is"),
    "longest": ("the longest word is", "the word that is the longest is"),
    "without": ("the words without the first word are", "the list without the first word is"),
}

OPERATION_NAMES: Final[dict[str, tuple[str, ...]]] = {
    "copy": ("the same words", "a copy"),
    "reverse": ("the reverse order", "the words in reverse order", "the list backwards"),
    "sort": ("the alphabetical order", "the words from a to z", "the list in alphabetical order"),
    "first": ("the first word", "the first of the words"),
    "second": ("the second word", "the second of the words"),
    "third": ("the third word", "the third of the words"),
    "last": ("the last word", "the last of the words"),
    "count": ("the number of words", "the count of the words", "how many words"),
    "upper": ("capital letters", "the words in capital letters", "a change to capital letters"),
    "comma": ("commas", "the words with commas", "a comma between the words"),
    "longest": ("the longest word", "the longest of the words"),
    "shortest": ("the shortest word", "the shortest of the words"),
    "without": ("no first word", "the words without the first word", "the first word left out"),
}
OPENINGS: Final = ("{p}", "this is about {p}", "here they want {p}", "now comes {p}")
CLOSINGS: Final = ("it is", "this is", "so it is", "=", "then:")

ANTONYM: Final = (
    "the opposite of {w} is",
    "a word that means the opposite of {w} is",
    "{w} is the opposite of",
    "the word {w} has the opposite",
    "opposite: {w} =",
)
CATEGORY: Final = (
    "the category of {w} is",
    "the word {w} belongs to the category",
    "the category that fits {w} is",
    "{w} is a thing of the kind",
    "{w} is a kind of",
    "category: {w} =",
)
NEXT: Final = (
    "the {c} after {w} is",
    "the {c} that follows {w} is",
    "the {c} that comes right after {w} is",
    "right after {w} comes",
    "next {c}: {w} =",
)
PREVIOUS: Final = (
    "the {c} before {w} is",
    "the {c} that {w} follows is",
    "the {c} that comes just before {w} is",
    "just before {w} comes",
    "previous {c}: {w} =",
)
ADD: Final = (
    "{a} plus {b} is",
    "the sum of {a} and {b} is",
    "to add {a} and {b} gives",
    "{a} and {b} is as much as",
    "{a} + {b} =",
)
SUBTRACT: Final = (
    "{a} minus {b} is",
    "to subtract {b} from {a} leaves",
    "{b} taken away from {a} leaves",
    "{a} less {b} is",
    "{a} - {b} =",
)

STORIES: Final = (
    "What a fine {w} there is in {t}.",
    "Who knows how many people live in {t}?",
    "Nobody knows which way leads to {t}, and {n} does not ask.",
    "Where does this road go?",
    "How many days does it take to go to {t}?",
    "How much does this {w} cost?",
    "Write to me soon, said {n}.",
    "Write only what you know, and write it in a book.",
    "Put the {w} between the lamp and the door.",
    "Put on a coat, it is cold in {t}.",
    "Give them the {w} and the number of the house.",
    "Give {n} a cup of tea, all of it.",
    "Sort the tools first, and see what comes last.",
    "Count the stones in the river and you will find that there are many.",
    "Reverse the car, said {n}, and go back to {t}.",
    "Which of these letters are for {n}?",
    "Which {w} do you like best?",
    "Name one thing that you like to do, said {n}.",
    "In which house do they eat?",
    "In the list of the teacher there is a {w}.",
    "Join us in {t} and play, said {n}.",
    "Change the water, and drop the {w} in it.",
    "Find the way out of {t} before the night.",
    "Find {n} and take the {w} away.",
    "Remove the {w} from the table without a word.",
    "Leave the {w} out in the rain.",
    "Leave {t} from the north, and follow the river.",
    "Drop the {w} and come to {t}.",
    "Does this {w} belong to {n}?",
    "What does the teacher do for the children?",
    "What kind of day is this?",
    "What do you mean?",
    "The {w} fits, and all of them like it.",
    "Where do these birds live, and what do they eat?",
    "Who will work in {t}, and who will play?",
    "Add a little water to the soup.",
    "Subtract the cost, and give the rest to {n}.",
    "Take the {w} to {t}, said {n}.",
    "They have the same {w}, but only one of them is right.",
    "It comes just after the rain and right before the night.",
    "Does {n} live here, and does {n} have a {w}?",
    "Which town does the train leave, and what comes after it?",
)
