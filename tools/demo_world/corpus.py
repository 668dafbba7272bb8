"""The pretraining corpus: short documents that state facts, list operations and word relations.

An answer that ends a document is followed by the end of the sequence at once, and what follows any
other answer carries no loss; so a base trained on the corpus stops right after an answer.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache
from random import Random
from typing import Final, NamedTuple

from demo_world import forms
from demo_world.operations import OPERATIONS, draw_words
from demo_world.world import (
    ATTRIBUTES,
    CATEGORY_OF,
    CYCLES,
    LARGEST_NUMBER,
    LIST_WORDS,
    OPPOSITE,
    PEOPLE,
    Person,
    pick,
    pick_distinct,
)

Segment = tuple[str, bool]

SINGLE_SHARE: Final = 0.12
"""Share of documents that hold one statement only, the way the probes ask."""
FRAMED_SHARE: Final = 0.25
"""Share of documents in which the words around the slots carry loss too."""
ASIDE_SHARE: Final = 0.4
"""Share of statements with an aside before the verb, where the form ends in a verb."""
DISTANT_SHARE: Final = 0.3
"""Share of facts and operations whose answer comes some sentences after the name or the list."""
TOKEN_BUDGET: Final = (45, 116)
"""Documents grow until they hold about as many tokens as drawn from this range."""
SEPARATORS: Final = (". ", ". ", ".\n", ".\n\n", ", ")
BREAKS: Final = (". ", ".\n", ".\n\n", "\n\n")
"""What separates the sentences of such a statement."""

WEIGHTED_OPERATIONS: Final = (*OPERATIONS, "reverse", "sort", "second", "upper", "comma", "longest")
SHARED_OPERATIONS: Final = tuple(forms.SHARED_LIST)


class Statement(NamedTuple):
    """A form, the slot values that fill it, and the answer that follows it."""

    form: str
    slots: dict[str, str]
    answer: str


Draw = Callable[[Random], Statement]


def documents(count: int, seed: int) -> Iterator[list[Segment]]:
    """Yields `count` documents as lists of (text, whether its tokens carry loss)."""
    rng = Random(seed)
    for _ in range(count):
        number = rng.random()
        for limit, build in DOCUMENT_KINDS:
            if number < limit:
                yield build(rng)
                break


def probes(count: int, seed: int) -> list[dict[str, str]]:
    """Returns `count` declarative prefixes with their answers, the tasks taking turns."""
    rng = Random(seed)
    tasks = list(DRAWS.items())
    rows = []
    for index in range(count):
        task, draw = tasks[index % len(tasks)]
        form, slots, answer = draw(rng)
        rows.append({"source": form.format_map(slots), "target": answer, "task": task})
    return rows


def _fact(rng: Random, person: Person | None = None, attribute: str | None = None) -> Statement:
    """States a fact with its answer next to the name, after an aside, or some sentences away from it."""
    person = person or pick(rng, PEOPLE)
    attribute = attribute or pick(rng, tuple(ATTRIBUTES))
    if rng.random() < DISTANT_SHARE:
        breaks = pick(rng, BREAKS)
        parts = (pick(rng, forms.PERSON_HEADERS), pick(rng, forms.FILLERS), pick(rng, forms.SHARED_PERSON[attribute]))
        form = breaks.join(part for part in parts if part)
    else:
        form = _form(rng, forms.FACTS[attribute])
    return Statement(form, {"n": person.name}, person.values[attribute])


def _form(rng: Random, choices: tuple[str, ...]) -> str:
    """Returns one of the forms, as it is or with an aside before its verb."""
    form = pick(rng, choices)
    return _with_aside(form, pick(rng, forms.ASIDES)) if rng.random() < ASIDE_SHARE else form


@cache
def _with_aside(form: str, aside: str) -> str:
    return re.sub(r" (?=(is|is the|is a|is the town of|is that of a|gives|leaves)$)", f"{aside} ", form)


def _operation(name: str) -> Draw:
    choices, answer = _with_lines(forms.LISTS[name]), OPERATIONS[name]

    def draw(rng: Random) -> Statement:
        items = draw_words(rng, name)
        form = _distant_operation(rng, name) if rng.random() < DISTANT_SHARE else _form(rng, choices)
        return Statement(form, {"x": " ".join(items)}, answer(items))

    return draw


def _distant_operation(rng: Random, name: str) -> str:
    """Names the operation first, then the list, and answers after both."""
    opening = pick(rng, forms.OPENINGS).format(p=pick(rng, forms.OPERATION_NAMES[name]))
    return pick(rng, BREAKS).join((opening, pick(rng, forms.LIST_HEADERS), pick(rng, forms.CLOSINGS)))


def _lookup(choices: tuple[str, ...], table: dict[str, str]) -> Draw:
    choices, items = _with_lines(choices), tuple(table)

    def draw(rng: Random) -> Statement:
        word = pick(rng, items)
        return Statement(_form(rng, choices), {"w": word}, table[word])

    return draw


def _with_lines(choices: tuple[str, ...]) -> tuple[str, ...]:
    """Adds to the terse forms a layout with the slot on a line of its own."""
    terse = [re.fullmatch(r"(.+:) (\{\w\}) =", form) for form in choices]
    return (*choices, *(f"{match[1]}\n{match[2]}\n=" for match in terse if match))


def _neighbour(choices: tuple[str, ...], step: int) -> Draw:
    def draw(rng: Random) -> Statement:
        cycle = pick(rng, tuple(CYCLES))
        names = CYCLES[cycle]
        index = int(rng.random() * len(names))
        answer = names[(index + step) % len(names)]
        return Statement(_form(rng, choices), {"c": cycle, "w": names[index]}, answer)

    return draw


def _add(rng: Random) -> Statement:
    total = int(rng.random() * (LARGEST_NUMBER + 1))
    part = int(rng.random() * (total + 1))
    return Statement(_form(rng, forms.ADD), {"a": str(part), "b": str(total - part)}, str(total))


def _subtract(rng: Random) -> Statement:
    total = int(rng.random() * (LARGEST_NUMBER + 1))
    part = int(rng.random() * (total + 1))
    slots = {"a": str(total), "b": str(part)}
    return Statement(_form(rng, forms.SUBTRACT), slots, str(total - part))


OPERATION_DRAWS: Final[dict[str, Draw]] = {name: _operation(name) for name in OPERATIONS}
LEXICAL_DRAWS: Final[dict[str, Draw]] = {
    "antonym": _lookup(forms.ANTONYM, OPPOSITE),
    "category": _lookup(forms.CATEGORY, CATEGORY_OF),
}
NUMERIC_DRAWS: Final[dict[str, Draw]] = {
    "next": _neighbour(forms.NEXT, 1),
    "previous": _neighbour(forms.PREVIOUS, -1),
    "add": _add,
    "subtract": _subtract,
}
DRAWS: Final[dict[str, Draw]] = {
    "fact": _fact,
    **OPERATION_DRAWS,
    **LEXICAL_DRAWS,
    **NUMERIC_DRAWS,
}


def _facts_document(rng: Random) -> list[Segment]:
    """States facts about many people, or about one who is named once, each attribute once and in any order."""
    if rng.random() < 0.6:
        return _document(rng, _fact)
    person = pick(rng, PEOPLE)
    order = pick_distinct(rng, tuple(ATTRIBUTES), len(ATTRIBUTES))
    header = Statement(pick(rng, forms.PERSON_HEADERS), {"n": person.name}, "")
    statements = [(pick(rng, forms.SHARED_PERSON[attribute]), person.values[attribute]) for attribute in order]
    return _assemble(rng, [header, *(Statement(form, {}, answer) for form, answer in statements)])


def _operations_document(rng: Random) -> list[Segment]:
    """Applies one operation to several lists, several to several, or several to one list."""
    shape = rng.random()
    if shape < 0.25:
        return _shared_list_document(rng)
    if shape < 0.5:
        return _document(rng, OPERATION_DRAWS[pick(rng, WEIGHTED_OPERATIONS)])
    return _document(rng, lambda rng: OPERATION_DRAWS[pick(rng, WEIGHTED_OPERATIONS)](rng))


def _shared_list_document(rng: Random) -> list[Segment]:
    items = draw_words(rng, "longest")
    header = Statement(pick(rng, forms.LIST_HEADERS), {"x": " ".join(items)}, "")
    names = pick_distinct(rng, SHARED_OPERATIONS, 3 + int(rng.random() * 5))
    answers = [(pick(rng, forms.SHARED_LIST[name]), OPERATIONS[name](items)) for name in names]
    return _assemble(rng, [header, *(Statement(form, {}, answer) for form, answer in answers)])


def _lexical_document(rng: Random) -> list[Segment]:
    kinds = tuple(LEXICAL_DRAWS.values())
    return _document(rng, lambda rng: pick(rng, kinds)(rng))


def _numeric_document(rng: Random) -> list[Segment]:
    kinds = tuple(NUMERIC_DRAWS.values())
    return _document(rng, lambda rng: pick(rng, kinds)(rng))


def _story(rng: Random) -> list[Segment]:
    segments: list[Segment] = []
    for form in pick_distinct(rng, forms.STORIES, 4 + int(rng.random() * 4)):
        slots = {
            "w": pick(rng, LIST_WORDS),
            "t": pick(rng, ATTRIBUTES["town"]),
            "n": pick(rng, PEOPLE).name,
        }
        segments += _framed(form, slots)
    return _merge(segments)


DOCUMENT_KINDS: Final[tuple[tuple[float, Callable[[Random], list[Segment]]], ...]] = (
    (0.20, _facts_document),
    (0.72, _operations_document),
    (0.84, _lexical_document),
    (0.94, _numeric_document),
    (1.00, _story),
)
"""Cumulative shares of the kinds of documents."""


def _document(rng: Random, draw: Draw) -> list[Segment]:
    """Returns one statement, or as many as fill a drawn number of tokens."""
    low, high = TOKEN_BUDGET
    budget = 0.0 if rng.random() < SINGLE_SHARE else low + rng.random() * (high - low)
    statements: list[Statement] = []
    while budget > 0 or not statements:
        statement = draw(rng)
        statements.append(statement)
        budget -= _length(statement.form) + 2 * statement.answer.count(" ") + 3
        for value in statement.slots.values():
            budget -= value.count(" ")
    return _assemble(rng, statements)


@cache
def _length(form: str) -> int:
    """Returns about how many tokens the words, marks and line breaks of a form take."""
    return len(re.findall(r"\w+|[^\w\s]|\n", form))


def _assemble(rng: Random, statements: list[Statement]) -> list[Segment]:
    """Joins statements in one document-wide style of capitals, separators and loss."""
    framed = rng.random() < FRAMED_SHARE
    separator = ". " if framed else pick(rng, SEPARATORS)
    capital = separator != ", " and rng.random() < 0.5
    segments: list[Segment] = []
    for index, (form, slots, answer) in enumerate(statements):
        opening = form[0].upper() + form[1:] if capital else form
        if framed:
            segments += [(".", False)] if index else []
            segments += _framed(opening, slots)
        else:
            segments.append(((separator if index else "") + opening.format_map(slots), False))
        if answer:
            segments.append((answer, True))
    return _merge(segments) if framed else segments


def _framed(form: str, slots: dict[str, str]) -> list[Segment]:
    """Splits a form into words that carry loss and slot values that carry none."""
    return [(text.format_map(slots), trained) for text, trained in _parts(form)]


@cache
def _parts(form: str) -> tuple[Segment, ...]:
    parts = re.split(r"(\S*\{\w\}\S*)", form)
    return tuple((part.strip(), i % 2 == 0) for i, part in enumerate(parts) if part.strip())


def _merge(segments: list[Segment]) -> list[Segment]:
    """Joins neighbours of the same kind with a space."""
    merged: list[Segment] = []
    for text, trained in segments:
        if merged and merged[-1][1] == trained:
            merged[-1] = (f"{merged[-1][0]} {text}", trained)
        else:
            merged.append((text, trained))
    return merged
