"""Puts rows of different lengths into one batch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora.data.batching.packing import SIDES
from qlora.data.batching.row_encoder import IGNORED
from qlora.data.batching.shared_prompts import NOWHERE, join_sides
from qlora.objectives.protocol import REFERENCE, SHARED_ROWS, TRUTH


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads the rows of a batch on the right, to the longest of them."""

    pad_token_id: int
    width: int = 0
    """Every batch is at least so wide; equal shapes let compiled code be used again."""
    most_cells: int = 0
    """Where answers share prompts, the rows of a batch have at least that many cells, and `width` tokens."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Returns input_ids, attention_mask and labels, each int64 [rows, width]; padding has the label -100.

        Packs (rows with `position_ids`) give `position_ids` in place of the mask: a model of transformers reads the
        borders inside a pack from the positions, and only where there is no mask. Padding is one more row of the
        pack, with positions of its own from 0. Where answers share prompts, `SHARED_ROWS` say which token stands where;
        there is a cell of padding at least, which is the first one of each token of padding.
        """
        ids, labels = [row["input_ids"] for row in rows], [row["labels"] for row in rows]
        lengths = np.array([len(row) for row in ids])
        shares = SHARED_ROWS[0] in rows[0]
        size = max(lengths.max() + 1, self.most_cells) if shares else max(lengths.max(), self.width)
        cells = np.arange(size)[None, :]
        inside = cells < lengths[:, None]
        batch = {"input_ids": _fill(ids, inside, self.pad_token_id), "labels": _fill(labels, inside, IGNORED)}
        if "position_ids" in rows[0]:
            batch["position_ids"] = _fill([row["position_ids"] for row in rows], inside, cells - lengths[:, None])
            if shares:
                batch |= self._shared_rows(rows, inside)
            if REFERENCE in rows[0]:
                batch[REFERENCE] = _side_by_side([row[REFERENCE] for row in rows])
        else:
            batch["attention_mask"] = torch.from_numpy(inside.astype(np.int64))
        return batch

    def _shared_rows(self, rows: Sequence[Mapping[str, Any]], inside: np.ndarray) -> dict[str, Tensor]:
        token_of, first, second = ([row[name] for row in rows] for name in SHARED_ROWS)
        tokens = np.array([len(row) for row in first])
        width = max(tokens.max(), self.width)
        is_token = np.arange(width)[None, :] < tokens[:, None]
        padding = inside.sum(1, keepdims=True)  # the first cell behind all rows
        filled = (_fill(token_of, inside, width - 1), _fill(first, is_token, padding), _fill(second, is_token, NOWHERE))
        return dict(zip(SHARED_ROWS, filled, strict=True))


@dataclass(frozen=True, slots=True)
class SidesCollator:
    """Lays the answers of rows of preference side by side, and pads all to the longest row of the batch.

    The sides of a pair are its chosen and its rejected row. Those of a labelled answer are its row, and its prompt with
    the answer of the row before it in the batch (the last one for the first), as KTO needs them.
    """

    pad_token_id: int
    max_length: int | None = None
    """The most tokens of a row of two others' prompt and answer; its end is cut. None: no limit."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Returns input_ids, attention_mask and labels, each int64 [rows, 2, width], and `desirable`, bool [rows]."""
        is_pair = "rejected_ids" in rows[0]
        others = [_rejected(row) if is_pair else _mismatch(row, rows[index - 1]) for index, row in enumerate(rows)]
        sides = [side for row, other in zip(rows, others, strict=True) for side in (row, other)]
        if not is_pair:
            sides = [{name: side[name][: self.max_length] for name in ("input_ids", "labels")} for side in sides]
        batch = Collator(self.pad_token_id)(sides)
        batch = {name: value.unflatten(0, (len(rows), 2)) for name, value in batch.items()}
        if REFERENCE in rows[0]:
            batch[REFERENCE] = _side_by_side([row[REFERENCE] for row in rows])
        if "desirable" in rows[0]:
            batch["desirable"] = torch.tensor([bool(row["desirable"]) for row in rows])
        return batch


@dataclass(frozen=True, slots=True)
class WholeTextsCollator:
    """Pads whole texts, and lays beside them what a head is to say of each."""

    pad_token_id: int
    classes: tuple[str, ...] = ()
    """The classes in the order of the head's outputs; empty: it says numbers."""
    width: int = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Returns input_ids, attention_mask and labels, each int64 [rows, width], and the truth of each row.

        That is the number of its class, int64 [rows], or its numbers, float32 [rows, numbers].
        """
        batch = Collator(self.pad_token_id, width=self.width)(rows)
        if self.classes:
            batch[TRUTH] = torch.tensor([self.classes.index(row["label"]) for row in rows])
        else:
            batch[TRUTH] = torch.tensor([list(row["values"]) for row in rows], dtype=torch.float32)
        return batch


@dataclass(frozen=True, slots=True)
class PartnersCollator:
    """Lays the texts of rows side by side, a text and its partners, and what is true of them beside."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Returns input_ids, attention_mask and labels, each int64 [rows, texts, width], and the truth of each row.

        That is the score of a pair, float32 [rows, 1]; without scores a number for the text of each partner, int64
        [rows, partners], by which equal texts are known.
        """
        texts = [_labelled(row, ids) for row in rows for ids in (row["input_ids"], *row["partners"])]
        batch = Collator(self.pad_token_id)(texts)
        batch = {name: value.unflatten(0, (len(rows), -1)) for name, value in batch.items()}
        if len(rows[0]["values"]):
            batch[TRUTH] = torch.tensor([list(row["values"]) for row in rows], dtype=torch.float32)
        else:
            batch[TRUTH] = torch.tensor([[_number_of(ids) for ids in row["partners"]] for row in rows])
        return batch


def _labelled(row: Mapping[str, Any], ids: Sequence[int]) -> dict[str, Any]:
    """Returns a text whose last token has a label, if its row has one."""
    has_label = any(label != IGNORED for label in row["labels"])
    return {"input_ids": ids, "labels": [*[IGNORED] * (len(ids) - 1), ids[-1] if has_label else IGNORED]}


def _number_of(ids: Sequence[int]) -> int:
    digest = hashlib.blake2b(np.asarray(ids, dtype="<i4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True, slots=True)
class SharedPromptsCollator:
    """Lays the two rows of each pair out as a pack of its own, in which they share their prompt."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Returns the batch of these packs, as `Collator` does."""
        return Collator(self.pad_token_id)([_pack_of(row) for row in rows])


def _pack_of(row: Mapping[str, Any]) -> dict[str, np.ndarray]:
    ids, labels = ([np.asarray(row[names[index]]) for names in SIDES] for index in (0, 1))
    saved = {REFERENCE: row[REFERENCE]} if REFERENCE in row else {}
    return join_sides(ids, labels, [row["shared"]]) | saved


def _side_by_side(values: Sequence[np.ndarray]) -> torch.Tensor:
    """Returns the log-probabilities of the sides of rows or packs, float32 [rows, sides], with 0 behind the last."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in values], batch_first=True)


def _rejected(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"input_ids": row["rejected_ids"], "labels": row["rejected_labels"]}


def _mismatch(row: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row's prompt with the answer of another row."""
    here, there = row["answer_start"], other["answer_start"]
    return {name: [*row[name][:here], *other[name][there:]] for name in ("input_ids", "labels")}


def token_mask(batch: Mapping[str, Tensor], pad_token_id: int) -> Tensor:
    """Returns which cells of a batch hold a token rather than padding: bool [rows, width].

    A batch of packs has no mask: there, padding is the end of a row that is all `pad_token_id` with the label -100.
    An end token that a tokenizer also pads with stays a token, as it has a label.
    """
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    told = (batch["input_ids"] != pad_token_id) | (batch["labels"] != IGNORED)
    return told.flip(-1).cumsum(-1).flip(-1) > 0


def count_work(
    batch: Mapping[str, Tensor], pad_token_id: int, windows: Sequence[int | None] = (None,)
) -> tuple[int, ...]:
    """Counts the tokens of a batch on the CPU, and the pairs of tokens between which causal attention looks.

    A row of n tokens has n (n + 1) / 2 pairs, each token with itself included; padding counts for nothing. Of each of
    `windows` only the pairs count in which a token looks back at no more tokens than that; None: all.
    """
    inside = token_mask(batch, pad_token_id).numpy()
    positions = batch["position_ids"].numpy() + 1 if "position_ids" in batch else inside.cumsum(-1)
    seen = positions[inside]
    pairs = (seen if window is None else np.minimum(seen, window) for window in windows)
    return int(inside.sum()), *(int(count.sum()) for count in pairs)


def _fill(rows: Sequence[Sequence[int]], inside: np.ndarray, padding: int | np.ndarray) -> Tensor:
    """Writes the rows one after the other into the cells of `inside`, over `padding` [rows, width] or a number."""
    batch = np.array(np.broadcast_to(padding, inside.shape), dtype=np.int64)
    batch[inside] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    return torch.from_numpy(batch)
