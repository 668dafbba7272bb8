"""The likelihood that a model gives each of several short answers to a prompt, in one forward pass if possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from qlora.evaluation.kept_logits import takes_logits_to_keep

Answers = tuple[tuple[int, ...], ...]
"""The tokens of each answer from where the answers differ."""


SHARED_TOKENS, SHARED_ROWS = 64, 4
"""A common beginning of at least this many tokens and rows gets its own forward pass."""
MAX_GROWTH = 4
"""A batch may have this many times the requested rows after a shared beginning made its rows short."""


class Prompt(NamedTuple):
    """A prompt with its answers, in tokens."""

    ids: np.ndarray
    """int32: the common beginning of the prompt with each of its answers, `<bos>` included."""
    answers: Answers

    @property
    def rest(self) -> int:
        """The most tokens that a forward pass needs after `ids`."""
        return max(map(len, self.answers)) - 1


@dataclass(frozen=True)
class ChoiceEncoder:
    """Tokenizes prompts together with their answers, because a token may span the end of the prompt."""

    tokenizer: PreTrainedTokenizerBase
    choices: Sequence[str]
    """The texts of the answers; a blank precedes them unless the prompt ends in one."""
    _known: dict[str, Answers] = field(default_factory=dict)

    @property
    def bos(self) -> list[int]:
        """The token that begins every prompt; empty where the tokenizer has none."""
        return [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]

    def encode(self, prompts: Sequence[str]) -> list[Prompt]:
        """Returns the encoded prompts, in order; no prompt may be empty."""
        wholes = self._ids([_join(prompt, self.choices[0]) for prompt in prompts])
        encoded = []
        for prompt, whole in zip(prompts, wholes, strict=True):
            # The last line usually determines the tokens at the end of a text; otherwise the whole text is tokenized.
            answers = self._answers(prompt[prompt.rstrip().rfind("\n") + 1 :])
            if tuple(whole[-len(answers[0]) :]) != answers[0]:
                answers = self._answers(prompt)
            encoded.append(Prompt(np.array(self.bos + whole[: len(whole) - len(answers[0])], np.int32), answers))
        return encoded

    def _answers(self, prompt: str) -> Answers:
        if prompt not in self._known:
            wholes = self._ids([_join(prompt, choice) for choice in self.choices])
            columns = enumerate(zip(*wholes, strict=False))
            shared = next(index for index, tokens in columns if len(set(tokens)) > 1)
            self._known[prompt] = tuple(tuple(whole[shared:]) for whole in wholes)
        return self._known[prompt]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # In a question "</s>" is four characters, not the end token.
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
    """The input of a forward pass for one prompt, and the logits that are looked up in its output."""

    prompt: int
    ids: np.ndarray
    targets: tuple[tuple[int, int, int], ...]
    """(answer, position, token): the likelihood of the token after that position counts towards the answer."""


class Group(NamedTuple):
    """Rows with a common beginning, which a model reads once."""

    shared: int
    """The tokens of that beginning; 0: it is too short to be read separately."""
    rows: list[Row]


def build_groups(prompts: Sequence[Prompt]) -> list[Group]:
    """Returns all rows in groups, in each the longest row first, so that batches need little padding."""
    rows = [row for index, prompt in enumerate(prompts) for row in _rows_of(index, prompt)]
    rows.sort(
        key=lambda row: row.ids.astype(">i4").tobytes()
    )  # by their tokens, so that equal beginnings are neighbours
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
    result = [Group(0, rest)] * bool(rest) + worth
    return [Group(group.shared, sorted(group.rows, key=lambda row: -len(row.ids))) for group in result]


def _rows_of(index: int, prompt: Prompt) -> list[Row]:
    """Returns a row for each distinct beginning of the answers, without the last token, which no pass needs."""
    targets: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
    longest_first = sorted(range(len(prompt.answers)), key=lambda answer: -len(prompt.answers[answer]))
    for answer in longest_first:
        tokens = prompt.answers[answer]
        beginning = tokens[:-1]
        row = next((other for other in targets if other[: len(beginning)] == beginning), beginning)
        positions = [(answer, len(prompt.ids) - 1 + offset, token) for offset, token in enumerate(tokens)]
        targets.setdefault(row, []).extend(positions)
    return [
        Row(index, np.concatenate([prompt.ids, np.array(row, np.int32)]), tuple(positions))
        for row, positions in targets.items()
    ]


def _shared(group: Group, row: Row) -> int:
    """Returns how many tokens a group would have in common with one more row."""
    length = min(group.shared, _readable(row))
    differ = np.flatnonzero(group.rows[-1].ids[:length] != row.ids[:length])
    return int(differ[0]) if len(differ) else length


def _readable(row: Row) -> int:
    """Returns how many tokens can be read ahead of a row: those before the first whose logits are needed."""
    return min(position for _, position, _ in row.targets)


class SharedLayer(DynamicLayer):
    """The keys and values of a shared beginning in one layer; those of the rows that continue it are not kept."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the keys and values of each row from its first token."""
        rows = key_states.shape[0]
        assert self.keys is not None
        assert self.values is not None
        keys, values = (kept.expand(rows, -1, -1, -1) for kept in (self.keys, self.values))
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


@dataclass(frozen=True)
class ChoiceReader:
    """Runs rows through a model and looks up the likelihoods of the answers."""

    model: torch.nn.Module
    pad_token_id: int
    device: torch.device

    @cached_property
    def can_choose(self) -> bool:
        """Whether the model can leave out logits that are not needed."""
        return takes_logits_to_keep(self.model)

    def remember(self, ids: np.ndarray) -> DynamicCache | None:
        """Reads a shared beginning; None for a model that cannot continue it (recurrent, or with a short window)."""
        inputs = torch.from_numpy(ids).long()[None].to(self.device)
        options = {"logits_to_keep": 1} if self.can_choose else {}
        cache: Any = getattr(self.model(input_ids=inputs, use_cache=True, **options), "past_key_values", None)
        layers: list[Any] = cache.layers if type(cache) is DynamicCache else []
        plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
        if not layers or not plain or any(layer.get_mask_sizes(0) != (len(ids), 0) for layer in layers):
            return None
        cache.layers = [SharedLayer(layer.keys, layer.values) for layer in layers]
        return cache

    def read(self, rows: Sequence[Row], first: int, cache: DynamicCache | None) -> tuple[torch.Tensor, ...]:
        """Reads rows from their token `first`, padded on the right, where no token attends to the padding.

        Returns the prompt, the answer and the log-likelihood in nats of each token that counts, on the CPU.
        """
        ids = pad_sequence([torch.from_numpy(row.ids[first:]).long() for row in rows], True, self.pad_token_id)
        lengths = torch.tensor([len(row.ids) for row in rows])
        mask = (torch.arange(first + ids.shape[1]) < lengths[:, None]).long()
        targets = [(line, row.prompt, *target) for line, row in enumerate(rows) for target in row.targets]
        lines, prompts, answers, positions, tokens = torch.tensor(targets).T
        positions = positions - first
        options: dict[str, Any] = {"use_cache": False} if cache is None else {"past_key_values": cache}
        if self.can_choose:
            kept, positions = positions.unique(return_inverse=True)
            options["logits_to_keep"] = kept.to(self.device)
        logits = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), **options).logits
        scores = logits[lines.to(logits.device), positions.to(logits.device)].float().log_softmax(-1)
        return prompts, answers, scores.gather(-1, tokens[:, None].to(scores.device))[:, 0].double().cpu()


@torch.inference_mode()
def measure_choices(
    reader: ChoiceReader,
    groups: Sequence[Group],
    *,
    shape: tuple[int, int],
    batch_size: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> torch.Tensor:
    """Returns the log-likelihood of each answer in nats: float64 of `shape` (prompts, answers), on the CPU.

    A batch has `batch_size` rows, or more if their beginning has been read already. The caller sets autocast and
    evaluation mode; `on_progress` receives the number of finished rows.
    """
    likelihoods = torch.zeros(shape, dtype=torch.float64)
    done = 0
    for shared, rows in groups:
        cache = reader.remember(rows[0].ids[:shared]) if shared else None
        first = shared if cache is not None else 0
        # As many tokens as in a batch of whole rows.
        length = len(rows[0].ids)
        size = batch_size * min(length // (length - first), MAX_GROWTH)
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            prompts, answers, scores = reader.read(batch, first, cache)
            likelihoods.index_put_((prompts, answers), scores, accumulate=True)
            done += len(batch)
            on_progress(done)
    return likelihoods
