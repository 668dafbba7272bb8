"""Rows of preference: two answers to one prompt, of which one is chosen, or an answer that is labelled good or bad.

After tokenizing, such a row has the columns of any other for its answer (the chosen one of a pair), so that measuring
and answering read it as they read all rows, and besides:

| kind of row | column | holds |
|---|---|---|
| `pairs`, `labelled` | `answer_start` int32 | the tokens of the prompt, after cutting: the index of the first token of the answer. In a pair both sides have the same tokens before it. Only tokens from there on have labels |
| `pairs` | `rejected_ids`, `rejected_labels` list of int32 | the other side as `input_ids` and `labels` are the chosen one: the whole row, prompt included |
| `labelled` | `desirable` bool | whether the answer is a good one |

`length` and `trained` count both sides of a pair; `source`, `target`, `stops` and the columns of held-out rows are those
of the chosen side, `cut_source` and `cut_target` hold where either side was cut. The prompts of both sides are cut alike,
and both answers to the same length. Pairs whose sides are equal, token for token, are dropped and counted (`Counts.equal`).
"""  # noqa: E501 - a table

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from qlora.config.registries.objectives import RowKind
from qlora.config.schema import Pairs
from qlora.data.chat.conversations import Conversation, Message
from qlora.data.formats import scores
from qlora.data.formats.cells import Row, without
from qlora.data.formats.labels import LABELS, label_columns, read_label
from qlora.data.formats.prompts import PROMPTS, AnyExample, Example, Labelled, Pair, Segment, sides
from qlora.data.formats.renderers import Format, cell_of, chosen
from qlora.errors import DataError
from qlora.text import listed

ANSWER_COLUMNS = ("chosen", "rejected")
SIDE_WORDS = {
    "chosen": {"chosen", "accepted", "preferred", "better", "winner", "good", "positive", "pos", "win"},
    "rejected": {"rejected", "reject", "dispreferred", "worse", "loser", "bad", "negative", "neg", "lose"},
}
"""Words in the names of columns that hold the better answers, and the worse ones."""
WORD = re.compile(r"[A-Za-z][a-z]*")
NO_ANSWER = re.compile("score|rating|reward|rank|model|id$", re.IGNORECASE)
"""What columns of such names hold beside the answers."""
LAST_WORD = re.compile(r"\s*\S*\Z")


def of_kind(kind: RowKind, name: str, layout: Format, pairs: Pairs) -> Format:
    """Returns a format that renders rows as examples of a kind; `name` is its own.

    Raises `DataError` for a format whose rows hold no pair, where pairs are needed.
    """
    if kind is RowKind.tokens:
        return layout
    if name == scores.NAME:
        render = functools.partial(_scored_pairs, pairs=pairs)
        return replace(layout, render=render if kind is RowKind.pairs else functools.partial(_apart, render=render))
    if kind is RowKind.labelled:
        return replace(layout, render=functools.partial(_labelled, render=layout.render, name=name))
    if name != "chosen":
        raise DataError(
            f"its rows are read as {name}, which hold one answer each, and this loss compares two; give rows with the "
            "columns chosen and rejected (data.columns.rejected=COLUMN reads one of another name), or choose loss=sft"
        )
    return replace(layout, render=_pairs)


def check_columns(kind: RowKind, columns: Iterable[str], name: str) -> None:
    """Raises `DataError` where no column can hold what rows of a kind need beside an answer; `name` is their format."""
    columns = list(columns)
    if name == scores.NAME:
        return
    missing = [side for side in ANSWER_COLUMNS if side not in columns]
    if kind is RowKind.pairs and (missing == ["chosen"] or "rejected" in missing):
        other = "loss=kto, which reads labels" if label_columns(columns, LABELS) else "loss=sft"
        settings = _name_sides(columns)
        side, whose = ("chosen", "of the better ones") if missing == ["chosen"] else ("rejected", "of the worse ones")
        named = f"columns of both with {settings}" if " " in settings else f"column {whose} with {settings}"
        raise DataError(
            f"it has the columns {listed(columns)} and no {side}, and this loss compares two answers; name the "
            f"{named}, or choose {other}"
        )
    if kind is RowKind.labelled and not (set(ANSWER_COLUMNS) <= set(columns) or label_columns(columns, LABELS)):
        raise DataError(
            f"it has the columns {listed(columns)} and no label, and this loss needs answers that are labelled good or "
            "bad; name the column with data.columns.label=COLUMN (true or false), or choose loss=sft"
        )


def describe_kind(kind: RowKind, name: str, labels: Sequence[str], pairs: Pairs) -> list[str]:
    """Says what is compared in rows of a kind; `name` is their format, and `labels` are their columns of labels."""
    if name == scores.NAME:
        if kind is RowKind.tokens:
            return ["the answer with the best score is trained"]
        taken = "every two answers of a row" if pairs is Pairs.all else "the best answer of a row and the worst"
        return [f"{taken} by their scores" if kind is RowKind.pairs else f"{taken} by their scores, as good and bad"]
    if kind is RowKind.labelled:
        return [f"{labels[0]} says which answers are good" if labels else "chosen answers are good, rejected ones bad"]
    return ["chosen against rejected"] if kind is RowKind.pairs else []


def _name_sides(columns: Sequence[str]) -> str:
    """Returns the settings that name the columns of both answers, where their names say so."""
    names = {side: _named_after(side, columns) for side in ANSWER_COLUMNS if side not in columns}
    last = list(names)[-1]
    settings = [f"data.columns.{side}={name or 'COLUMN'}" for side, name in names.items() if name or side == last]
    return " ".join(settings)


def _named_after(side: str, columns: Sequence[str]) -> str | None:
    """Returns the one column whose name says that it holds the answers of a side; None: there is none."""
    parts = {column: {word.lower() for word in WORD.findall(column)} for column in columns}
    named = [column for column in columns if parts[column] & SIDE_WORDS[side] and not NO_ANSWER.search(column)]
    return named[0] if len(named) == 1 else None


def _labelled(row: Row, *, render: Callable[[Row], Sequence[AnyExample]], name: str) -> list[Labelled | Pair]:
    """Renders an answer with its label; the two answers of a pair are a good one and a bad one."""
    columns = label_columns(row, LABELS)
    if not columns and name == "chosen" and row.get("rejected"):
        return _apart(row, render=_pairs)
    labels = {label for column in columns if (label := read_label(row.get(column), column, asked=True)) is not None}
    if len(labels) != 1:
        what = "its labels contradict each other" if labels else "it holds no label"
        raise DataError(f"{what}; label the answer true or false in one of the columns {' and '.join(LABELS)}")
    desirable = labels.pop()
    examples = [side for example in render(without(row, columns)) for side in sides(example)]
    return [Labelled(_last_only(example), desirable) for example in examples]


def _apart(row: Row, *, render: Callable[[Row], Sequence[Pair]]) -> list[Labelled | Pair]:
    """Renders the answers of pairs as a good and a bad one; a pair that is to be dropped stays one, to be counted."""
    rendered: list[Labelled | Pair] = []
    for pair in render(row):
        dropped = pair.unordered or pair.is_equal
        rendered += [pair] if dropped else [Labelled(pair.chosen, True), Labelled(pair.rejected, False)]
    return rendered


def _scored_pairs(row: Row, *, pairs: Pairs) -> list[Pair]:
    """Renders pairs of the answers in a row by their scores."""
    return [replace(pair, unordered=is_tie) for two, is_tie in scores.as_pairs(row, pairs) for pair in _pairs(two)]


def _last_only(example: Example) -> Example:
    """Returns an example of which the last answer alone is labelled: what stands before it is its prompt."""
    if not isinstance(example, Conversation):
        return [*(segment._replace(trained=False) for segment in example[:-1]), *example[-1:]]
    answers = [index for index, message in enumerate(example.messages) if message["role"] == "assistant"]
    return _unweighted(example, answers[-1]) if answers else example


def _pairs(row: Row) -> list[Pair]:
    """Renders both answers of a row as the format `chosen` renders the first, and says whether scores contradict."""
    return [replace(pair, unordered=scores.is_out_of_order(row)) for pair in _unscored_pairs(row)]


def _unscored_pairs(row: Row) -> list[Pair]:
    better, worse = chosen(row), chosen(row, "rejected")
    if not better or not worse:
        return []
    first, second = better[0], worse[0]
    if isinstance(first, Conversation) and isinstance(second, Conversation):
        return [_pair_of_chats(first, second)]
    if isinstance(first, Conversation) or isinstance(second, Conversation):
        raise DataError("one of the columns chosen and rejected holds turns and the other one text; write both alike")
    first, second = _last_only(first), _last_only(second)
    assert not isinstance(first, Conversation)
    assert not isinstance(second, Conversation)
    if _prompt(first) and _prompt(first) == _prompt(second):
        return [Pair(first, second)]
    if first == second:
        return [Pair(first, second)]
    texts = ["".join(segment.text for segment in side) for side in (first, second)]
    start = _shared_text(*texts, prompt=cell_of(row, "chosen", "prompt"))
    system = first[0].system
    better_text, worse_text = ([Segment(text[:start], False, system), Segment(text[start:], True)] for text in texts)
    return [Pair(better_text, worse_text)]


def _prompt(example: Sequence[Segment]) -> str:
    return "".join(segment.whole for segment in example if not segment.trained)


def _pair_of_chats(first: Conversation, second: Conversation) -> Pair:
    """Returns the pair of two chats that part at an answer; what stands before it has no loss."""
    both = first.messages, second.messages
    shared = next((index for index, (a, b) in enumerate(zip(*both, strict=False)) if a != b), min(map(len, both)))
    for messages in both if shared < max(map(len, both)) else ():
        role = messages[shared]["role"] if shared < len(messages) else None
        if shared == 0 or role != "assistant":
            what = f"is of the role {role}" if role else "is missing"
            raise DataError(
                f"chosen and rejected share no prompt: they part at turn {shared + 1}, which {what} in one of them; "
                "give both the turns of the prompt and then their own answer, or leave such rows out"
            )
    shared = min(shared, *(_last_answer(messages) for messages in both))  # of equal sides, which are dropped later
    return Pair(_unweighted(first, shared), _unweighted(second, shared))


def _last_answer(messages: Sequence[Message]) -> int:
    return max((index for index, message in enumerate(messages) if message["role"] == "assistant"), default=0)


def _unweighted(chat: Conversation, first: int) -> Conversation:
    """Returns a chat whose answers before message number `first` have no loss."""

    def weighted(index: int, message: Message) -> Message:
        return message | {"weight": 0} if index < first and message["role"] == "assistant" else message

    return replace(chat, messages=[weighted(index, message) for index, message in enumerate(chat.messages)])


def _shared_text(first: str, second: str, *, prompt: str) -> int:
    """Returns how many characters of two texts are their prompt: `prompt`, or what they share up to an answer's mark.

    Without a mark that this project knows, the prompt ends with the last whole word that both begin with.
    """
    if prompt and first.startswith(prompt) and second.startswith(prompt):
        return len(prompt)
    length = next((index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    common = first[: min(len(first), len(second)) if length is None else length]
    marks = [prompt_words.behind for prompt_words in PROMPTS if prompt_words.in_text and prompt_words.behind in common]
    if marks:
        return max(common.rindex(mark) + len(mark) for mark in marks)
    if len(common) < min(len(first), len(second)):
        common = LAST_WORD.sub("", common)
    if not common.strip():
        raise DataError(
            "chosen and rejected share no prompt: the texts begin with different words; put the prompt into the column "
            "prompt (data.columns.prompt=COLUMN), or at the beginning of both texts"
        )
    return len(common)
