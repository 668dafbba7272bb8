"""Turns examples into token ids and labels, within the lengths of the config."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import NamedTuple

from transformers import BatchEncoding, PreTrainedTokenizerBase

from qlora.config.schema import DataConfig, OnTooLong, TrainOn
from qlora.data.chat.chat_mask import ChatWriter, Written
from qlora.data.chat.conversations import Conversation, Message
from qlora.data.chat.templates import Template
from qlora.data.formats.prompts import AnyExample, Example, Labelled, Pair, Segment, WholeText, sides
from qlora.errors import ConfigError, DataError
from qlora.upstream.transformers import decode, token_name

IGNORED = -100
"""The label that PyTorch's cross entropy leaves out."""
_TRAILING_BLANKS = re.compile(r"\S*\s+\Z")


class Turn(NamedTuple):
    """An answer that a row trains, for evaluation to ask for."""

    start: int
    """Index of its first token in the row."""
    prompt: str
    """The text before it."""
    reference: str | None
    """Its own text, without an end token; None: the row asks, and holds no answer."""
    asked: Written | None = None
    """What a server sends for it; None: the text before it."""


class Side(NamedTuple):
    """The rejected side of a pair: the whole row, with the tokens of the chosen side's prompt."""

    input_ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        """Tokens that the loss counts."""
        return len(self.labels) - self.labels.count(IGNORED)


class Encoded(NamedTuple):
    """One row in tokens."""

    input_ids: list[int]
    labels: list[int]
    """The tokens that the loss counts, `IGNORED` elsewhere and at index 0, which no token predicts."""
    source: int
    """Tokens before the first answer, `<bos>` included, before anything was cut."""
    target: int
    """Tokens from there on, before anything was cut."""
    turns: list[Turn]
    cut_source: bool = False
    cut_target: bool = False
    lost_thoughts: int = 0
    """Trained turns whose thought the template left out."""
    lost_messages: int = 0
    """Messages of others than the assistant that it left out."""
    answer_start: int = 0
    """Index of the first token of the answer, once the row is cut."""
    rejected: Side | None = None
    """The other answer of a pair."""
    desirable: bool | None = None
    """Whether a labelled answer is a good one."""
    label: str | None = None
    """The class of a whole text."""
    values: tuple[float, ...] = ()
    """The numbers of a whole text."""
    partners: tuple[list[int], ...] = ()
    """The texts beside a whole text: the first one belongs to it, the others do not."""

    @property
    def trained(self) -> int:
        """Tokens that the loss counts, in both sides of a pair."""
        count = len(self.labels) - self.labels.count(IGNORED)
        return count + (self.rejected.trained if self.rejected is not None else 0)

    @property
    def length(self) -> int:
        """Tokens of the row, of both sides of a pair."""
        others = len(self.rejected.input_ids) if self.rejected is not None else sum(map(len, self.partners))
        return len(self.input_ids) + others

    @property
    def lacks_loss(self) -> bool:
        """Whether nothing in the row, or in one side of it, is trained."""
        rejected = 0 if self.rejected is None else self.rejected.trained
        return self.trained == rejected or (self.rejected is not None and not rejected)

    @property
    def is_equal_pair(self) -> bool:
        """Whether both sides of a pair hold the same tokens."""
        return self.rejected is not None and self.rejected.input_ids == self.input_ids

    @property
    def last_trained(self) -> int:
        """The last token that the loss counts; `IGNORED` if there is none."""
        return next((label for label in reversed(self.labels) if label != IGNORED), IGNORED)


@dataclass(frozen=True, slots=True)
class Limits:
    """The longest row that is kept whole, in tokens; None: no limit."""

    source_max_len: int | None = None
    target_max_len: int | None = None
    max_length: int | None = None
    on_too_long: OnTooLong = OnTooLong.truncate

    def room(self, lead: int, rest: int) -> tuple[int, int]:
        """Returns how many tokens are kept before the first answer (from its end) and from there on."""
        kept_lead = lead if self.source_max_len is None else min(lead, self.source_max_len)
        kept_rest = rest if self.target_max_len is None else min(rest, self.target_max_len)
        if self.max_length is not None and kept_lead + kept_rest > self.max_length:
            kept_rest = min(kept_rest, max(self.max_length - kept_lead, self.max_length // 2))
            kept_lead = min(kept_lead, self.max_length - kept_rest)
        return kept_lead, kept_rest


@dataclass(frozen=True)
class RowEncoder:
    """A tokenizer with the lengths, the labels and the chat template that a config asks for."""

    base: PreTrainedTokenizerBase
    bos: list[int]
    """The token that begins every row; empty where the tokenizer has none."""
    eos: int
    limits: Limits
    train_on: TrainOn = TrainOn.assistant
    template: Template | None = None
    """How conversations are written; only they need one."""

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer or a turn; the one of the chat template may be no special token."""
        ends: set[int | None] = {self.eos, *self.base.all_special_ids}
        ends |= set() if self.template is None else {self.writer.end_id}
        return frozenset(token for token in ends if token is not None)

    def stops(self, row: Encoded) -> bool:
        """Tells whether a row teaches to stop: its last trained token is an end token, but for blanks behind it."""
        trained = (label for label in reversed(row.labels) if label != IGNORED)
        last = next((label for label in trained if label in self.end_ids or decode(self.base, [label]).strip()), None)
        return last in self.end_ids

    def encode(self, examples: Sequence[AnyExample]) -> list[Encoded]:
        """Encodes examples in order; raises `DataError` for a pair whose sides do not have the same prompt."""
        if any(isinstance(example, WholeText) for example in examples):
            return [self._encode_whole_text(example) for example in examples if isinstance(example, WholeText)]
        parts = [side for example in examples for side in sides(example)]
        segments = [part for part in parts if not isinstance(part, Conversation)]
        chats = [self.writer.write(part) for part in parts if isinstance(part, Conversation)]
        encoded_segments, encoded_chats = iter(self._encode_segments(segments)), iter(self._encode_chats(chats))
        encoded = iter([next(encoded_chats if isinstance(part, Conversation) else encoded_segments) for part in parts])
        return [self._finish(example, [next(encoded) for _ in sides(example)]) for example in examples]

    def _finish(self, example: AnyExample, rows: list[Encoded]) -> Encoded:
        if isinstance(example, Pair):
            return self._fit_pair(*rows)
        row = self._fit(rows[0])
        return row._replace(desirable=example.desirable) if isinstance(example, Labelled) else row

    def _encode_whole_text(self, example: WholeText) -> Encoded:
        """Encodes a text as the tokenizer's own call does, so that a plain model reads what was trained.

        What it spells becomes no special token. Its end is cut. Padding at its end, which some tokenizers write, is
        left out: transformers reads the last token that is none.
        """
        (ids, *partners), cuts = zip(*map(self._call_ids, (example.text, *example.partners)), strict=True)
        while not partners and len(ids) > 1 and ids[-1] == self.base.pad_token_id:
            ids = ids[:-1]
        labels = [*[IGNORED] * (len(ids) - 1), *ids[-1:]]
        turns = [Turn(len(ids), example.text, None)]
        return Encoded(ids, labels, len(ids), sum(map(len, partners)), turns, cut_target=any(cuts),
                       label=example.label, values=example.values, partners=tuple(partners))  # fmt: skip

    def _call_ids(self, text: str) -> tuple[list[int], bool]:
        """Returns the ids of a text within the limit, and whether that cuts it."""
        call: Callable[..., BatchEncoding] = partial(self.base.__call__, text, split_special_tokens=True, verbose=False)
        ids, limit = list(call()["input_ids"]), self.limits.max_length
        if limit is None or len(ids) <= limit:
            return ids, False
        return list(call(truncation=True, max_length=limit)["input_ids"]), True

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Returns the ids of a conversation up to where the model answers, as a row that ends in the answer has them.

        What a message spells becomes no special token. Raises `ConfigError` for roles that the template cannot write.
        """
        return self._ask(Conversation(list(messages), None))[1]

    def encode_text(self, text: str, *, begins: bool = True) -> list[int]:
        """Returns the ids of a text as a row without a template begins, uncut; `begins` puts the begin token first."""
        return [*(self.bos if begins else []), *self._ids([text], plain=True)[0]]

    def encode_question(self, example: Example) -> Encoded:
        """Encodes an example up to where the model answers; raises `DataError` as `encode` does."""
        if isinstance(example, Conversation):
            text, ids = self._ask(example)
        else:
            text = "".join(segment.whole + (str(self.base.eos_token) if segment.ends else "") for segment in example)
            ids = list(self.bos)
            said = self._ids([segment.whole for segment in example], plain=True)
            for segment, chunk in zip(example, said, strict=True):
                ids += [*chunk, self.eos] if segment.ends else chunk
        return self._fit(Encoded(ids, [IGNORED] * len(ids), len(ids), 0, [Turn(len(ids), text, None)]))

    def encode_asked(self, row: Encoded) -> list[int]:
        """Returns the ids that ask for the last turn of a row, as far as the lengths allow."""
        turn = row.turns[-1]
        if turn.asked is None:
            return row.input_ids[: turn.start]
        ids = self._encode_whole(turn.asked)
        first = 1 if self.bos and ids[:1] == self.bos else 0
        cut = row.source - row.turns[0].start
        return [*ids[:first], *ids[first + cut :]]

    def read_back(self, example: Example, limit: int) -> tuple[str, str]:
        """Returns the text of an example and what its tokens decode to, the first `limit` characters of both."""
        if isinstance(example, Conversation):
            written = self.writer.write(example)
            if len(written.text) <= limit:
                ids = self._encode_whole(written)
                return written.text, decode(self.base, ids, clean_up_tokenization_spaces=False)
            text = written.text[:limit]
        else:
            text = "".join(segment.whole for segment in example)[:limit]
        return text, self.read_text(text)

    def read_text(self, text: str) -> str:
        """Returns what the tokens of a text decode to."""
        return decode(self.base, self._ids([text], plain=True)[0], clean_up_tokenization_spaces=False)

    @cached_property
    def writer(self) -> ChatWriter:
        """What writes conversations."""
        assert self.template is not None, "the pipeline chooses a template before it meets conversations"
        return ChatWriter(self.base, self.template, self.train_on)

    # Segments: each is tokenized on its own, as in the original script

    def _encode_segments(self, rows: Sequence[Sequence[Segment]]) -> list[Encoded]:
        # Each text once: short answers and the words of templates come again and again.
        texts = list(dict.fromkeys(segment.whole for row in rows for segment in row))
        segment_ids = dict(zip(texts, self._ids(texts, plain=True), strict=True))
        return [self._join(row, [segment_ids[segment.whole] for segment in row]) for row in rows]

    def _ids(self, texts: list[str], *, plain: bool) -> list[list[int]]:
        """Returns the ids of each text; in a `plain` one, "</s>" is the four characters and not the end token."""
        return self._batch(texts, plain=plain)["input_ids"] if texts else []

    def _batch(self, texts: list[str], *, plain: bool) -> BatchEncoding:
        # verbose=False: what is longer than model_max_length is cut below, no need to warn.
        return self.base(
            texts,
            add_special_tokens=False,
            split_special_tokens=plain,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )

    def _join(self, row: Sequence[Segment], segment_ids: list[list[int]]) -> Encoded:
        flags = [segment.trained for segment in row]
        kept = _trained_flags(flags, self.train_on)
        ids, labels = list(self.bos), [IGNORED] * len(self.bos)
        turns: list[Turn] = []
        prompt, answering = "", False
        for segment, chunk, trained in zip(row, segment_ids, kept, strict=True):
            if segment.trained and not answering:
                turns.append(Turn(len(ids), prompt, ""))
                answering = True
            if answering:
                turns[-1] = turns[-1]._replace(reference=(turns[-1].reference or "") + segment.whole)
            chunk = [*chunk, self.eos] if segment.ends else chunk
            prompt += segment.whole + (str(self.base.eos_token) if segment.ends else "")
            answering = answering and not segment.ends
            ids += chunk
            labels += chunk if trained else [IGNORED] * len(chunk)
        lead = turns[0].start if turns else len(ids)
        if any(flags):  # a row without any trained text teaches nothing, not even to stop
            ids.append(self.eos)
            labels.append(self.eos)
        turns = [turn._replace(reference=(turn.reference or "").strip()) for turn in turns] or [Turn(lead, prompt, "")]
        return Encoded(ids, labels, lead, len(ids) - lead, turns)

    # Conversations: the whole text is tokenized at once, as an inference server does it; what stands before an answer
    # has the tokens that it has without the answer

    def _ask(self, question: Conversation) -> tuple[str, list[int]]:
        """Returns what stands before an answer to a conversation, as text and as ids."""
        messages = [*question.messages, {"role": "assistant", "content": "a"}]
        try:
            row = self._encode_chats([self._last_writer.write(replace(question, messages=messages))])[0]
        except ConfigError:  # no row can be trained with this template: a server asks so
            written = self.writer.ask(question.messages, question.tools)
            return written.text, self._encode_whole(written)
        return row.turns[-1].prompt, self.encode_asked(row)

    @cached_property
    def _last_writer(self) -> ChatWriter:
        return replace(self.writer, train_on=TrainOn.last)

    def _encode_chats(self, chats: list[Written]) -> list[Encoded]:
        if not chats:
            return []
        batch = self._batch([chat.text for chat in chats], plain=False)
        return [self._label(chat, batch, index) for index, chat in enumerate(chats)]

    def _encode_whole(self, chat: Written) -> list[int]:
        cuts = self._cuts(chat)
        return self._in_chunks(chat, [], cuts)[0] if cuts else self._ids([chat.text], plain=False)[0]

    def _label(self, chat: Written, batch: BatchEncoding, index: int) -> Encoded:
        ids = batch["input_ids"][index]
        offsets = sorted({offset for span in (*chat.trained, *(turn.span for turn in chat.turns)) for offset in span})
        at = self._token_starts(batch, index, offsets, chat.text)
        cuts = {offset for offset in offsets if offset not in at} | self._cuts(chat)
        cuts |= {turn.span.start for turn in chat.turns if not self._is_sent_alike(chat.text, turn.span.start)}
        if cuts:
            ids, at = self._in_chunks(chat, offsets, cuts)
        labels = [IGNORED] * len(ids)
        for start, end in chat.trained:
            labels[at[start] : at[end]] = ids[at[start] : at[end]]
        turns = [Turn(at[turn.span.start], chat.text[: turn.span.start], turn.reference) for turn in chat.turns]
        if chat.asked is not None:
            turns[-1] = turns[-1]._replace(prompt=chat.asked.text, asked=chat.asked)
        if chat.turns and not chat.ends:
            ids, labels = [*ids, self.eos], [*labels, self.eos]
        turns = turns or [Turn(len(ids), chat.text, "")]
        source = turns[0].start
        row = Encoded(list(ids), labels, source, len(ids) - source, turns)
        return row._replace(lost_thoughts=chat.lost_thoughts, lost_messages=chat.lost_messages)

    def _is_sent_alike(self, text: str, start: int) -> bool:
        """Tells whether the tokens before an answer are those of a prompt, behind which nothing stands.

        They can differ in white space alone: some tokenizers strip it from the end of a text, others join it there.
        """
        blanks = _TRAILING_BLANKS.search(text, max(start - 32, 0), start)
        if blanks is None or start >= len(text):
            return True
        key = blanks[0], text[start]
        if key not in self._sent_alike:
            if len(self._sent_alike) >= 4096:
                self._sent_alike.clear()
            batch = self._batch([blanks[0], "".join(key)], plain=True)
            prompt, whole = batch["input_ids"]
            at = self._token_starts(batch, 1, [len(blanks[0])], "".join(key))
            self._sent_alike[key] = whole[: at.get(len(blanks[0]), 0)] == prompt
        return self._sent_alike[key]

    @cached_property
    def _sent_alike(self) -> dict[tuple[str, str], bool]:
        return {}

    def _cuts(self, chat: Written) -> set[int]:
        """Returns where to cut a text so that no message's characters become a token of the template's."""
        # Splitting special tokens does not split those added without that flag.
        whole = (span.start + 1 for span in chat.raw if chat.text[span.start : span.end] in self._plain_tokens)
        return {index for span in chat.raw for index in span}.union(whole)

    @cached_property
    def _plain_tokens(self) -> frozenset[str]:
        return frozenset(str(token) for token in self.base.added_tokens_decoder.values() if not token.special)

    def _in_chunks(self, chat: Written, offsets: list[int], cuts: set[int]) -> tuple[list[int], dict[int, int]]:
        """Tokenizes a text in chunks, and in smaller ones as long as a token reaches across one of the offsets."""
        cut_points = sorted({0, len(chat.text), *cuts})
        ids: list[int] = []
        at = {0: 0}
        for start, end in pairwise(cut_points):
            inside = [offset for offset in offsets if start < offset < end]
            chunk, tokens_at = self._encode_chunk(chat, start, end, inside)
            if len(tokens_at) < len(inside):
                return self._in_chunks(chat, offsets, {*cuts, *inside} - set(tokens_at))
            at |= {offset: len(ids) + index for offset, index in tokens_at.items()}
            ids += chunk
            at[end] = len(ids)
        return ids, at

    def _encode_chunk(
        self, chat: Written, start: int, end: int, offsets: list[int]
    ) -> tuple[list[int], dict[int, int]]:
        """Tokenizes a chunk as it stands in its text: after other text the tokenizer puts no blank before it."""
        plain = any(span.start <= start < span.end for span in chat.raw)
        for previous, known in (("\n", self._line), ("", [])) if start and self._line else (("", []),):
            text = previous + chat.text[start:end]
            batch = self._batch([text], plain=plain)
            ids = batch["input_ids"][0]
            if ids[: len(known)] == known:
                break
        shift = start - len(previous)
        inside = [offset - shift for offset in offsets]
        tokens_at = self._token_starts(batch, 0, inside, text)
        return ids[len(known) :], {offset + shift: index - len(known) for offset, index in tokens_at.items()}

    def _token_starts(self, batch: BatchEncoding, row: int, offsets: list[int], text: str) -> dict[int, int]:
        """Returns the index of the token that begins at each character offset; offsets inside a token are left out."""
        if not self._has_offsets:
            return {}
        ids = batch["input_ids"][row]
        tokens_at = {}
        for offset in offsets:
            if offset in (0, len(text)):
                tokens_at[offset] = 0 if offset == 0 else len(ids)
                continue
            previous, behind = batch.char_to_token(row, offset - 1), batch.char_to_token(row, offset)
            if previous is None:
                continue
            if behind is not None and behind != previous:
                # A token may hold the last byte of one character and the first of the next.
                if text[offset - 1].isascii() or _start(batch, row, behind) >= offset:
                    tokens_at[offset] = behind
            elif text[offset].isspace():
                # Some tokens swallow the blanks behind them, and some tokenizers count blanks to no token.
                said = text[_start(batch, row, previous) : offset]
                if token_name(self.base, ids[previous]).endswith(said):
                    tokens_at[offset] = previous + 1
        return tokens_at

    @cached_property
    def _has_offsets(self) -> bool:
        """Whether tokens tell their characters: not where those that no token knows are dropped and shift the rest."""
        with_unknown, without = self._ids(["a\ue0a0a", "aa"], plain=True)
        return self.base.is_fast and with_unknown != without

    @cached_property
    def _line(self) -> list[int]:
        """The ids of a line feed, where a tokenizer puts a blank before all that it is given; else empty."""
        line, word, both = self._ids(["\n", "a", "\na"], plain=True)
        return line if both[: len(line)] == line and both[len(line) :] != word else []

    # Lengths

    def _fit(self, row: Encoded) -> Encoded:
        """Cuts a prompt's beginning and an answer's end to the limits; a cut answer loses its end token."""
        return self._cut(row, *self.limits.room(row.source, row.target))

    def _fit_pair(self, chosen: Encoded, rejected: Encoded) -> Encoded:
        """Cuts both sides of a pair alike, and joins them."""
        start = chosen.source
        if rejected.source != start or chosen.input_ids[:start] != rejected.input_ids[:start]:
            raise DataError(
                "chosen and rejected have the same prompt, but the chat template writes it in other tokens before one "
                "answer than before the other; choose another data.template"
            )
        room = self.limits.room(start, max(chosen.target, rejected.target))
        kept, other = self._cut(chosen, *room), self._cut(rejected, *room)
        return kept._replace(
            rejected=Side(other.input_ids, other.labels),
            cut_target=kept.cut_target or other.cut_target,
            lost_thoughts=kept.lost_thoughts + other.lost_thoughts,
        )

    def _cut(self, row: Encoded, kept_lead: int, kept_rest: int) -> Encoded:
        """Leaves `kept_lead` tokens of the prompt, its last ones, and at most `kept_rest` from the answer on."""
        lead = row.source
        first = 1 if self.bos and row.input_ids[:1] == self.bos and kept_lead > 0 else 0
        gone = lead - kept_lead
        ids = [*row.input_ids[:first], *row.input_ids[first + gone : lead + kept_rest]]
        labels = [*row.labels[:first], *row.labels[first + gone : lead + kept_rest]]
        labels[:1] = [IGNORED] * len(labels[:1])
        turns = [turn._replace(start=turn.start - gone) for turn in row.turns if turn.start - gone <= len(ids)]
        return row._replace(
            input_ids=ids,
            labels=labels,
            turns=turns,
            cut_source=gone > 0,
            cut_target=kept_rest < row.target,
            answer_start=kept_lead,
        )


def build_encoder(config: DataConfig, base: PreTrainedTokenizerBase, template: Template | None = None) -> RowEncoder:
    """Sets a tokenizer's lengths and labels; raises `DataError` where it has no end token to teach."""
    if base.eos_token_id is None:
        raise DataError(
            f"the tokenizer {base.name_or_path!r} has no end token, so no answer could learn to stop; set eos_token "
            "in its tokenizer_config.json"
        )
    limits = Limits(config.source_max_len, config.target_max_len, config.max_length, config.on_too_long)
    bos = [] if base.bos_token_id is None else [base.bos_token_id]
    return RowEncoder(base, bos, base.eos_token_id, limits, config.train_on, template)


def _trained_flags(flags: list[bool], train_on: TrainOn) -> list[bool]:
    """Returns which segments the loss counts, of those that are `flags`."""
    if train_on is TrainOn.all:
        return [True] * len(flags)
    if train_on is TrainOn.last and any(flags):
        last = len(flags) - 1 - flags[::-1].index(True)
        return [index == last for index in range(len(flags))]
    return flags


def _start(batch: BatchEncoding, row: int, token: int) -> int:
    """Returns the first character of a token that `char_to_token` found."""
    span = batch.token_to_chars(row, token)
    assert span is not None
    return span.start
