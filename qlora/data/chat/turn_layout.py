"""Which characters of a written conversation each turn of the assistant takes.

The model is asked with a conversation and the generation prompt, and writes until the token that ends its turn. So a
turn begins where the prompt before it ends, and ends where the text stops to depend on what follows, the end token
included. Both borders are found in a copy of the conversation in which a mark stands for every text: the copy shows
where the template put each of them, and its layout serves all conversations of the same structure.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, NamedTuple

from qlora.data.chat.conversations import Message
from qlora.data.chat.message_form import MARK, MARKS, Piece

Special = re.Pattern[str] | None
"""Finds the tokens that only a template writes."""
Apply = Callable[[Sequence[Message], bool], str]
"""Writes messages, with the generation prompt or without."""

BARE: Final = re.compile(r"[\W_]+")
ESCAPE: Final = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)


class Span(NamedTuple):
    """Characters [start, end) of a text."""

    start: int
    end: int


class Text(NamedTuple):
    """A text that a mark stands for."""

    message: int
    piece: Piece
    text: str


@dataclass(frozen=True, slots=True)
class TurnBounds:
    """Finds where a turn begins and ends, by texts that agree up to there."""

    special: Special
    between: str = ""
    """What a template writes between a question and an answer; "" where that is more than a prompt."""
    behind: str = ""
    """What it writes behind an answer that ends a conversation."""
    lead: str | None = None
    """What a template without generation prompts writes between prompt and answer; None: it has such prompts."""
    last_only: str = ""
    """What a template writes behind the end token of the last turn only, such as Phi-3's end of text."""

    @property
    def header(self) -> str:
        """What no model writes: the header of an answer where no generation prompt writes it."""
        return "" if self.lead is None or self.lead.isspace() else self.lead

    def start(self, text: str, prompt: str, closed: Callable[[], str]) -> int | None:
        """Returns where a turn begins in `text`; None: unclear.

        `prompt` is the conversation before the turn with the generation prompt, `closed` without it. Where the text
        leaves the prompt, as an earlier turn without the thoughts that the prompt opens, the turn begins there.
        """
        agreed = common_length(text, prompt)
        if agreed == len(prompt):
            return agreed if self.lead is None else agreed + self._size_of_lead(text[agreed:], self.lead)
        start = self._whole_words(prompt, agreed)
        return start if start >= self.agreed_length(prompt, closed()) else None

    def end(self, text: str, alone: str, *, hands_over: bool) -> int | None:
        """Returns where a turn ends in `text`; None: unclear.

        `alone` is the same text of the conversation that ends with the turn. Both begin within the turn. A template
        without an end token hands over to another role with the token of that role, if one follows.
        """
        last = alone.removesuffix(self.last_only) if self.last_only else alone
        kept, agreed = last.rstrip(), self.agreed_length(text, last)
        if agreed >= len(kept):
            next_role = self._token_at(text, len(kept)) if hands_over and len(kept) == len(last) else 0
            return len(kept) + (0 if self.closes(kept) else next_role)
        common = last[:agreed].rstrip()
        if self.closes(common):
            return len(common)
        # Another token ends a turn that is not the last.
        size = self._token_at(text, agreed)
        return agreed + size if size and self._token_at(last, agreed) else None

    def agreed_length(self, first: str, second: str) -> int:
        """Returns how far two texts agree, up to a token of the template's that only one of them holds."""
        agreed = common_length(first, second)
        return min(self._outside_tokens(first, agreed), self._outside_tokens(second, agreed))

    def closes(self, text: str) -> bool:
        """Tells whether a text ends with a token of the template's."""
        return self.special is not None and any(match.end() == len(text) for match in self.special.finditer(text))

    def start_as_ever(self, text: str) -> int | None:
        """Returns where a turn begins in the text before its first word, if an answer to a question begins so too."""
        if not self.between or not text.endswith(self.between):
            return None
        lead = self.lead if self.lead is not None and self.lead.isspace() else ""
        return len(text) - len(lead)

    def _size_of_lead(self, text: str, lead: str) -> int:
        """Returns how much of a text no model writes: a header, or white space that does not open every answer."""
        if lead and text.startswith(lead):
            return len(self.header)
        return len(text) - len(text.lstrip())

    def _whole_words(self, text: str, limit: int) -> int:
        """Returns where the last token of a template's, or the last white space, ends at or before `limit`."""
        tokens = [match.end() for match in self.special.finditer(text)] if self.special else []
        spaces = [match.end() for match in re.finditer(r"\s", text[:limit])]
        return max((end for end in (*tokens, *spaces) if end <= limit), default=0)

    def _outside_tokens(self, text: str, position: int) -> int:
        """Returns a position, moved to the start of the token that it lies in."""
        tokens = self.special.finditer(text) if self.special else ()
        return next((match.start() for match in tokens if match.start() < position < match.end()), position)

    def _token_at(self, text: str, position: int) -> int:
        match = self.special.match(text, position) if self.special else None
        return len(match[0]) if match else 0


@dataclass(frozen=True, slots=True)
class Layout:
    """A conversation in which marks stand for texts, as its template writes it."""

    literals: list[str]
    """What stands before, between and behind the marks."""
    marks: list[int]
    """The marks in order, as indices of texts."""
    starts: list[int]
    """Where each literal begins."""
    spans: dict[int, Span | None]
    """The turns of the assistant by message; None: unclear."""
    exact: set[int]
    """The turns that follow their whole prompt."""
    lost: dict[int, set[Piece]]
    """What the template leaves out of each turn."""
    lost_messages: int
    """Messages of others than the assistant that it leaves out."""

    def fit(self, text: str, texts: Sequence[Text], special: Special) -> Fitted | None:
        """Returns the turns in the text of a conversation of this structure; None: it is written otherwise."""
        offsets: list[int] = []
        position = 0
        lost = {message: set(kinds) for message, kinds in self.lost.items()}
        for literal, following, index in zip(self.literals, self.literals[1:], self.marks, strict=False):
            if not text.startswith(literal, position):
                return None
            offsets.append(position)
            position += len(literal)
            content = texts[index]
            size = _exact_size(text, position, content.text, following)
            if size is None:
                size = _size_before(text, position, following, special)
                if size is None:
                    return None
                if content.message in lost and not holds(text[position : position + size], content.text):
                    lost[content.message].add(content.piece)
            position += size
        if text[position:] != self.literals[-1]:
            return None
        offsets.append(position)

        def moved(border: int) -> int:
            index = bisect_right(self.starts, border) - 1
            return border - self.starts[index] + offsets[index]

        spans = {message: span and Span(moved(span.start), moved(span.end)) for message, span in self.spans.items()}
        return Fitted(spans, lost)


class Fitted(NamedTuple):
    """The turns of the assistant in a text, by message."""

    spans: dict[int, Span | None]
    lost: dict[int, set[Piece]]
    """What the text lacks of each turn."""


def lay_out(
    marked: Sequence[Message], texts: Sequence[Text], turns: Sequence[int], apply: Apply, bounds: TurnBounds
) -> Layout:
    """Writes a conversation of marks and finds the turns of the assistant at the indices `turns`.

    Raises `ConfigError` where the template cannot write it.
    """
    whole = apply(marked, False)
    parts = MARKS.split(whole)
    literals, marks = parts[::2], [int(index) for index in parts[1::2]]
    if any(index >= len(texts) for index in marks):  # a name or a tool spells a mark, so that it is no copy of marks
        return Layout([whole], [], [0], dict.fromkeys(turns), set(), {message: set() for message in turns}, 0)
    sizes = [len(literal) + len(MARK.format(index)) for literal, index in zip(literals, marks, strict=False)]
    search = _Search(whole, marked, texts, apply, bounds)
    spans, exact = {}, set()
    for message in turns:
        spans[message], follows = search.find_turn(message)
        exact |= {message} if follows else set()
    lost = {message: search.find_lost(spans[message], message) for message in turns}
    unwritten = {text.message for index, text in enumerate(texts) if index not in marks} - set(turns)
    others = [message for message in unwritten if marked[message]["role"] != "assistant"]
    return Layout(literals, marks, [0, *accumulate(sizes)], spans, exact, lost, len(others))


@dataclass(frozen=True, slots=True)
class _Search:
    """Finds turns in a conversation of marks."""

    whole: str
    marked: Sequence[Message]
    texts: Sequence[Text]
    apply: Apply
    bounds: TurnBounds

    def find_turn(self, message: int) -> tuple[Span | None, bool]:
        """Returns the characters of a turn (None: unclear), and whether it follows its whole prompt."""
        alone = self.whole if message == len(self.marked) - 1 else self.apply(self.marked[: message + 1], False)
        # A text may come again behind its turn, as the name of a call before its result.
        order = [match[0] for match in MARKS.finditer(alone) if self._is_of(match, message) and match[0] in self.whole]
        prompt = self.apply(self.marked[:message], True)
        start = self._find_start(message, prompt, order)
        if start is None:
            return None, False
        end = self._find_end(message, alone, order, start)
        if end is None:
            return None, False
        others = [match for match in MARKS.finditer(self.whole, start, end) if not self._is_of(match, message)]
        exact = self.whole[:start] in (prompt, prompt + self.bounds.header)
        return (None if others else Span(start, end)), exact

    def find_lost(self, span: Span | None, message: int) -> set[Piece]:
        """Returns what the text of a turn lacks."""
        zone = self.whole[span.start : span.end] if span else self.whole
        return {
            text.piece
            for index, text in enumerate(self.texts)
            if text.message == message and MARK.format(index) not in zone
        }

    def _is_of(self, match: re.Match[str], message: int) -> bool:
        return self.texts[int(match[1])].message == message

    def _find_start(self, message: int, prompt: str, order: Sequence[str]) -> int | None:
        anchor = next((match[0] for match in reversed(list(MARKS.finditer(prompt)))), "")
        if anchor not in self.whole:  # a prompt alone shows the last text before it, as Mistral's shows the system text
            return self.bounds.start_as_ever(self.whole[: self.whole.index(order[0])]) if order else None
        first = self.whole.index(anchor) + len(anchor)
        start = self.bounds.start(
            self.whole[first:],
            _behind(prompt, anchor),
            lambda: _behind(self.apply(self.marked[:message], False), anchor),
        )
        return None if start is None else first + start

    def _find_end(self, message: int, alone: str, order: Sequence[str], start: int) -> int | None:
        following = self.marked[message + 1]["role"] if message + 1 < len(self.marked) else None
        hands_over = following not in (None, "assistant")
        if order:
            last = self.whole.index(order[-1]) + len(order[-1])
            rest = _behind(alone, order[-1])
        else:  # nothing is said: the turn is its end alone, maybe behind the blanks around an answer
            rest, last = self.bounds.behind if following else self.whole[start:], start
            if rest.strip():
                rest = rest.lstrip()
                last += len(self.whole[start:]) - len(self.whole[start:].lstrip())
        size = self.bounds.end(self.whole[last:], rest, hands_over=hands_over)
        return None if size is None else last + size


def _behind(text: str, mark: str) -> str:
    """Returns what stands behind the last `mark`, or the whole text if there is none."""
    return text.rpartition(mark)[2] if mark else text


def find_span(text: str, messages: Sequence[Message], message: int, apply: Apply, bounds: TurnBounds) -> Span | None:
    """Returns the characters of a turn by the conversation's beginnings alone; None: unclear.

    For templates that look into what messages say, so that a copy of marks is written otherwise.
    """
    start = bounds.start(text, apply(messages[:message], True), lambda: apply(messages[:message], False))
    alone = text if message == len(messages) - 1 else apply(messages[: message + 1], False)
    if start is None or alone[:start] != text[:start]:
        return None
    hands_over = message + 1 < len(messages) and messages[message + 1]["role"] != "assistant"
    size = bounds.end(text[start:], alone[start:], hands_over=hands_over)
    return Span(start, start + size) if size else None


def _exact_size(text: str, position: int, content: str, following: str) -> int | None:
    """Returns how many characters a content takes before `following`, if it is written as it is or trimmed."""
    return next((len(form) for form in _forms(content) if text.startswith(form + following, position)), None)


def _forms(content: str) -> Iterator[str]:
    """Yields the ways in which templates write a text, the most frequent first."""
    yield content
    trimmed = [content.strip(), content.rstrip(), content.lstrip()]
    trimmed += [content.strip("\n"), content.rstrip("\n"), content.lstrip("\n")]
    yield from trimmed
    for form in (content, *trimmed):
        yield json.dumps(form, ensure_ascii=False)[1:-1]


def _size_before(text: str, position: int, following: str, special: Special) -> int | None:
    """Returns how many characters stand before `following`; None: it cannot be told.

    No message can write a token of the template's, so a literal that holds one has one place only.
    """
    if special is None or not special.search(following):
        return None
    end = text.find(following, position)
    return None if end < 0 or special.search(text, position, end) else end - position


def holds(written: str, content: str) -> bool:
    """Tells whether what a template wrote says all of a content, in whatever case, spacing and escapes."""
    if "".join(content.split()).casefold() in "".join(written.split()).casefold():
        return True
    bare = BARE.sub("", content).casefold()
    return bool(bare) and bare in BARE.sub("", _without_escapes(written)).casefold()


def _without_escapes(text: str) -> str:
    """Returns a text with the escapes of JSON and Python read."""
    signs = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}

    def sign(match: re.Match[str]) -> str:
        return chr(int(match[1], 16)) if match[1] else signs.get(match[2], match[2])

    read = ESCAPE.sub(sign, text)
    return read.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def common_length(first: str, second: str) -> int:
    """Returns how many characters two texts have in common from their beginning."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[:middle] == second[:middle] else (low, middle - 1)
    return low
