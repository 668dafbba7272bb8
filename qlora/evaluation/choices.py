"""How likely a model finds each of several short answers to a prompt: one forward pass where that is enough."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

Answers = tuple[tuple[int, ...], ...]
"""The tokens of each answer from where the answers differ."""


SHARED_TOKENS, SHARED_ROWS = 64, 4
"""From so many tokens, and for so many rows, a common beginning is worth a forward pass of its own."""
WIDEST = 4
"""So many times as many rows as asked for may be in a batch that a shared beginning made short."""


class Prompt(NamedTuple):
    """A prompt with its answers, in tokens."""

    ids: np.ndarray
    """int32: what the prompt followed by any of its answers begins with, `<bos>` included."""
    answers: Answers

    @property
    def rest(self) -> int:
        """Tokens that a forward pass may need behind `ids`."""
        return max(map(len, self.answers)) - 1


@dataclass(frozen=True)
class ChoiceEncoder:
    """Tokenizes prompts together with their answers, for tokens may reach over the border between the two."""

    tokenizer: PreTrainedTokenizerBase
    choices: Sequence[str]
    """The answers' texts; a blank is put before them unless the prompt ends in one."""
    _known: dict[str, Answers] = field(default_factory=dict)

    @property
    def bos(self) -> list[int]:
        """The token that begins every prompt; empty where the tokenizer has none."""
        return [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]

    def encode(self, prompts: Sequence[str]) -> list[Prompt]:
        """Returns the prompts, of which none is empty, in order."""
        wholes = self._ids([_join(prompt, self.choices[0]) for prompt in prompts])
        found = []
        for prompt, whole in zip(prompts, wholes, strict=True):
            # The end of a text is tokenized by its last line; where it is not, the whole text tells.
            answers = self._answers(prompt[prompt.rstrip().rfind("\n") + 1 :])
            if tuple(whole[-len(answers[0]) :]) != answers[0]:
                answers = self._answers(prompt)
            found.append(Prompt(np.array(self.bos + whole[: len(whole) - len(answers[0])], np.int32), answers))
        return found

    def _answers(self, prompt: str) -> Answers:
        if prompt not in self._known:
            wholes = self._ids([_join(prompt, choice) for choice in self.choices])
            columns = enumerate(zip(*wholes, strict=False))
            shared = next(place for place, tokens in columns if len(set(tokens)) > 1)
            self._known[prompt] = tuple(tuple(whole[shared:]) for whole in wholes)
        return self._known[prompt]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # In a question "</s>" is four characters and not the end token.
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]


def _join(prompt: str, choice: str) -> str:
    return prompt + (choice if prompt[-1:].isspace() else f" {choice}")


class Row(NamedTuple):
    """What a forward pass reads for one prompt, and what is looked up in its result."""

    prompt: int
    ids: np.ndarray
    wanted: tuple[tuple[int, int, int], ...]
    """(answer, position, token): the likelihood of the token behind that position counts towards the answer."""


class Group(NamedTuple):
    """Rows that begin alike: a model reads their beginning once."""

    shared: int
    """Tokens of that beginning; 0: there is none worth it."""
    rows: list[Row]


def build_groups(prompts: Sequence[Prompt]) -> list[Group]:
    """Returns all rows in groups, the longest first in each, so that batches need little padding."""
    rows = [row for number, prompt in enumerate(prompts) for row in _rows_of(number, prompt)]
    rows.sort(key=lambda row: row.ids.astype(">i4").tobytes())  # as their tokens, so that equal beginnings meet
    groups: list[Group] = []
    for row in rows:
        shared = _shared(groups[-1], row) if groups else 0
        if shared >= SHARED_TOKENS:
            groups[-1].rows.append(row)
            groups[-1] = groups[-1]._replace(shared=shared)
        else:
            groups.append(Group(_readable(row), [row]))
    worth = [group for group in groups if len(group.rows) >= SHARED_ROWS]
    rest = [row for group in groups if len(group.rows) < SHARED_ROWS for row in group.rows]
    found = [Group(0, rest)] * bool(rest) + worth
    return [Group(group.shared, sorted(group.rows, key=lambda row: -len(row.ids))) for group in found]


def _rows_of(number: int, prompt: Prompt) -> list[Row]:
    """Returns a row for each way in which the answers begin, up to the last token of each, which no pass needs."""
    wanted: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
    longest_first = sorted(range(len(prompt.answers)), key=lambda answer: -len(prompt.answers[answer]))
    for answer in longest_first:
        tokens = prompt.answers[answer]
        beginning = tokens[:-1]
        row = next((other for other in wanted if other[: len(beginning)] == beginning), beginning)
        places = [(answer, len(prompt.ids) - 1 + place, token) for place, token in enumerate(tokens)]
        wanted.setdefault(row, []).extend(places)
    return [
        Row(number, np.concatenate([prompt.ids, np.array(row, np.int32)]), tuple(places))
        for row, places in wanted.items()
    ]


def _shared(group: Group, row: Row) -> int:
    """Returns how many tokens a group with one more row would have in common."""
    length = min(group.shared, _readable(row))
    differ = np.flatnonzero(group.rows[-1].ids[:length] != row.ids[:length])
    return int(differ[0]) if len(differ) else length


def _readable(row: Row) -> int:
    """Returns how many tokens may be read before the row itself: those before the first whose logits are needed."""
    return min(place for _, place, _ in row.wanted)


class SharedLayer(DynamicLayer):
    """A layer's keys and values of a shared beginning; it keeps nothing of the rows that go on from there."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the keys and values of each row from its first token on."""
        rows = key_states.shape[0]
        keys, values = (kept.expand(rows, -1, -1, -1) for kept in (self.keys, self.values))
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


@dataclass(frozen=True)
class ChoiceReader:
    """Reads rows with one model and looks up what it tells of the answers."""

    model: torch.nn.Module
    pad_token_id: int
    device: torch.device

    @cached_property
    def can_choose(self) -> bool:
        """Whether the model can leave out the logits that nobody looks at."""
        model: Any = self.model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        return "logits_to_keep" in inspect.signature(base.forward).parameters

    def remember(self, ids: np.ndarray) -> DynamicCache | None:
        """Reads a shared beginning; None for a model that cannot go on from it (recurrent, or with a short window)."""
        inputs = torch.from_numpy(ids).long()[None].to(self.device)
        options = {"logits_to_keep": 1} if self.can_choose else {}
        cache: Any = getattr(self.model(input_ids=inputs, use_cache=True, **options), "past_key_values", None)
        layers = cache.layers if type(cache) is DynamicCache else []
        plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
        if not layers or not plain or any(layer.get_mask_sizes(0) != (len(ids), 0) for layer in layers):
            return None
        cache.layers = [SharedLayer(layer.keys, layer.values) for layer in layers]
        return cache

    def read(self, rows: Sequence[Row], first: int, cache: DynamicCache | None) -> tuple[torch.Tensor, ...]:
        """Reads rows from their token `first` on, padded on the right, where none of the tokens sees the padding.

        Returns, for each token that counts, its prompt, its answer and its log-likelihood in nats, on the CPU.
        """
        ids = pad_sequence([torch.from_numpy(row.ids[first:]).long() for row in rows], True, self.pad_token_id)
        lengths = torch.tensor([len(row.ids) for row in rows])
        mask = (torch.arange(first + ids.shape[1]) < lengths[:, None]).long()
        wanted = [(line, row.prompt, *place) for line, row in enumerate(rows) for place in row.wanted]
        lines, prompts, answers, places, tokens = torch.tensor(wanted).T
        places = places - first
        options: dict[str, Any] = {"use_cache": False} if cache is None else {"past_key_values": cache}
        if self.can_choose:
            kept, places = places.unique(return_inverse=True)
            options["logits_to_keep"] = kept.to(self.device)
        logits = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), **options).logits
        told = logits[lines.to(logits.device), places.to(logits.device)].float().log_softmax(-1)
        return prompts, answers, told.gather(-1, tokens[:, None].to(told.device))[:, 0].double().cpu()


@torch.inference_mode()
def measure_choices(
    reader: ChoiceReader,
    groups: Sequence[Group],
    *,
    shape: tuple[int, int],
    batch_size: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> torch.Tensor:
    """Returns the log-likelihood of every answer in nats: float64 of `shape` (prompts, answers), on the CPU.

    A batch has `batch_size` rows, or more where their beginning has been read already. The caller sets autocast and
    evaluation mode; `on_progress` is told the number of rows done.
    """
    found = torch.zeros(shape, dtype=torch.float64)
    done = 0
    for shared, rows in groups:
        cache = reader.remember(rows[0].ids[:shared]) if shared else None
        first = shared if cache is not None else 0
        # As many tokens as in a batch of whole rows.
        longest = len(rows[0].ids)
        size = batch_size * min(longest // (longest - first), WIDEST)
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            prompts, answers, told = reader.read(batch, first, cache)
            found.index_put_((prompts, answers), told, accumulate=True)
            done += len(batch)
            on_progress(done)
    return found
