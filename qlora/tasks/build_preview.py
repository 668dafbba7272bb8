"""What `task=preview` shows: the rows as they would be trained on, in numbers and token by token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora.config.registries.objectives import RowKind
from qlora.config.schema import Config, DataConfig
from qlora.config.training_length import training_length
from qlora.data.batching.packing import efficiency, pack
from qlora.data.batching.row_encoder import IGNORED
from qlora.data.batching.token_store import column
from qlora.data.data_report import DataReport, data_warnings, describe_unread
from qlora.data.pipeline import Data
from qlora.models.context import describe_limit, fit_rows, limit_warning
from qlora.models.embedded import embedded_warning
from qlora.reporting.preview import Preview, PreviewRow, PreviewToken
from qlora.text import format_percent, listed, plural
from qlora.upstream.transformers import decode


def build_preview(
    config: Config, data: Data, tokenizer: PreTrainedTokenizerBase, *, context: int | None = None
) -> Preview:
    """Collects what a person must see before a training run: summary, warnings, lengths and the first rows.

    `context` is what the model reads, in tokens; None: that is not known here.
    """
    assert data.train is not None
    limit = describe_limit(config.data, config.model.name, context)
    rows = fit_rows(config.data, context)
    report, trainer = data.report, config.trainer
    source = Path(config.data.path).name if config.data.path else ", ".join(config.data.mix)
    unit, is_stream = "packs" if data.packed else "rows", config.data.streaming
    length = training_length(trainer, len(data.packed or data.train), unit=unit, is_stream=is_stream)
    first, of = ("the first ", "in these") if is_stream else ("", "an epoch")
    lines = [
        ("format", f"{report.format} ({report.recognised})"),
        ("template", report.template or f"{data.template.name}, saved for chat and serving"),
        ("tokenizer", f"{tokenizer.name_or_path} (a vocabulary of {len(tokenizer):,})"),
        ("rows", f"{first}{report.train_rows:,} to train, {report.describe_held_out()}"),
        ("tokens", f"{report.train_tokens:,} {of}, {_part(report.trained_tokens, report.train_tokens)} with loss"),
        ("head", _classes(data, config)),
        (
            "end token",
            ""
            if config.loss.reads_whole_texts
            else f"trained in {_part(report.stopping_rows, report.train_rows)} of the rows",
        ),
        ("limit", limit),
        ("cut", _counted((report.cut_sources, "source"), (report.cut_targets, "target"))),
        (
            "dropped",
            _counted(
                (report.dropped_rows, "row", " with nothing to train"),
                (report.too_long_rows, "row", " too long"),
                (report.empty_rows, "row", " with empty answers"),
                (report.left_out_rows, "row", " left out by the format"),
                (report.equal_rows, "pair", " of equal sides"),
                (report.unordered_rows, "pair", " whose scores do not put the chosen side first"),
            ),
        ),
        ("not read", describe_unread(report)),
        (
            "packing",
            _packing(rows, data) if config.loss.rows is not RowKind.labelled and not config.loss.has_head else "",
        ),
        (
            "steps",
            f"{length.epoch_steps:,}{'' if is_stream else ' an epoch'}, of {trainer.per_device_train_batch_size} x "
            f"{trainer.gradient_accumulation_steps} {length.unit}",
        ),
        ("training", str(length)),
    ]
    limits = {
        "source": rows.source_max_len,
        "target": rows.target_max_len,
        "total": rows.max_length,
    }
    source_lengths, target_lengths = column(data.train, "source"), column(data.train, "target")
    return Preview(
        title=f"{source} as {report.format}",
        summary=[(label, value) for label, value in lines if value],
        warnings=[
            *_warnings(report, tokenizer, config, context),
            *([length.warning] if length.warning else []),
            *([str(data.lost)] if data.lost is not None else []),
            *([embedded] if (embedded := embedded_warning(config)) else []),
        ],
        rows=[
            side
            for row in data.train.select(range(min(config.task.rows, len(data.train))))
            for side in preview_rows(row, tokenizer)
        ],
        lengths={"source": source_lengths, "target": target_lengths, "total": source_lengths + target_lengths},
        limits={name: limit for name, limit in limits.items() if limit is not None},
    )


def _classes(data: Data, config: Config) -> str:
    """Says what a head learns: the classes with their rows, or numbers with their range; empty: there is no head."""
    if data.train is None or not config.loss.reads_whole_texts:
        return ""
    if data.labels:
        counts = Counter(data.train["label"])
        named = [name for name in config.head.labels or () if name not in data.labels]
        return listed([f"{name} ({counts[name]:,} rows)" for name in (*data.labels, *named)], 12)
    columns = list(zip(*data.train["values"], strict=True))
    if config.loss.rows is RowKind.texts:
        texts = len(data.train[0]["partners"]) + 1
        return f"{texts} texts a row" + "".join(f", scores from {min(c):g} to {max(c):g}" for c in columns)
    return "; ".join(f"numbers from {min(column):g} to {max(column):g}" for column in columns)


def _counted(*counts: tuple[int, str] | tuple[int, str, str]) -> str:
    """Returns counts with their nouns, those of zero left out."""
    return ", ".join(f"{plural(count, noun)}{''.join(more)}" for count, noun, *more in counts if count)


def _warnings(report: DataReport, tokenizer: PreTrainedTokenizerBase, config: Config, context: int | None) -> list[str]:
    rows = report.train_rows
    too_long = limit_warning(report.max_length, config.model.name, context)
    what, keys = "answers", "data.target_max_len or data.max_length"
    if config.loss.reads_whole_texts:
        what, keys = "texts", "data.max_length"
    stops = report.stopping_rows == rows or config.loss.reads_whole_texts
    lines = (
        (not stops, f"{_part(rows - report.stopping_rows, rows)} of the rows do not train an end "
                                      "token, so they do not teach to stop"),
        (report.cut_targets > rows // 10, f"{_part(report.cut_targets, rows)} of the {what} are cut; raise {keys}"),
        (context is None and report.max_length > tokenizer.model_max_length,
         f"the longest row has {report.max_length:,} tokens, and the tokenizer says that its model reads "
         f"{tokenizer.model_max_length:,}; data.max_length={tokenizer.model_max_length} cuts rows there"),
        (config.data.train_on.value == "all", "data.train_on=all: the prompts carry loss too"),
    )  # fmt: skip
    said = [*data_warnings(report, config.data), *(text for holds, text in lines if holds)]
    return [*said, *([too_long] if too_long else [])]


def _packing(config: DataConfig, data: Data) -> str:
    """Says how full the packs are, or how full they would be."""
    if data.packed is not None:
        return f"{plural(data.report.packs, 'pack')}, {format_percent(data.report.packed_share or 0)} full"
    budget = config.pack_length or config.longest_row
    lengths = data.lengths
    if budget is None or lengths.max() > budget:
        budget = int(lengths.max())
    packs = pack(lengths, budget)
    fill = efficiency(packs, lengths, budget)
    filled = f"{plural(len(packs), 'pack')} of {budget:,} tokens to {format_percent(fill)}"
    return f"off; data.packing=true would fill {filled}"


def preview_rows(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[PreviewRow]:
    """Returns a tokenized row as it is shown; a pair as two rows, its chosen side first."""
    if row.get("label") is not None:
        return [_noted(preview_row(row, tokenizer), f"labelled {row['label']}")]
    if "partners" in row:
        return _preview_texts(row, tokenizer)
    if "values" in row:
        return [_noted(preview_row(row, tokenizer), f"labelled {', '.join(f'{value:g}' for value in row['values'])}")]
    if "desirable" in row:
        return [_noted(preview_row(row, tokenizer), f"labelled {'good' if row['desirable'] else 'bad'}")]
    if "rejected_ids" not in row:
        return [preview_row(row, tokenizer)]
    rejected = row | {"input_ids": row["rejected_ids"], "labels": row["rejected_labels"]}
    return [_noted(preview_row(row, tokenizer), "chosen"), _noted(preview_row(rejected, tokenizer), "rejected")]


def _preview_texts(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[PreviewRow]:
    """Returns a text and its partners, each as it is shown."""
    score = f", score {row['values'][0]:g}" if row["values"] else ""
    notes = ["a text", f"beside it{score}" if score else "belongs to it"]
    notes += ["does not belong to it"] * (len(row["partners"]) - 1)
    sides = [row["input_ids"], *row["partners"]]
    cells = [row | {"input_ids": ids, "labels": [*[IGNORED] * (len(ids) - 1), ids[-1]]} for ids in sides]
    return [_noted(preview_row(cell, tokenizer), note) for cell, note in zip(cells, notes, strict=True)]


def _noted(row: PreviewRow, note: str) -> PreviewRow:
    return replace(row, notes=[note, *row.notes])


def preview_row(row: dict[str, object], tokenizer: PreTrainedTokenizerBase) -> PreviewRow:
    """Returns a tokenized row as it is shown."""
    ids, labels = row["input_ids"], row["labels"]
    assert isinstance(ids, list)
    assert isinstance(labels, list)
    assert isinstance(row["row"], int)
    texts = token_texts(ids, tokenizer)
    tokens = [PreviewToken(text, token, label != IGNORED)
              for text, token, label in zip(texts, ids, labels, strict=True)]  # fmt: skip
    notes = [note for flag, note in (("cut_source", "its source is cut at the beginning"),
                                     ("cut_target", "its target is cut at the end")) if row[flag]]  # fmt: skip
    return PreviewRow(row["row"], tokens, notes)


def token_texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the text that each token adds to the tokens before it; joined, they are the decoded row.

    A token alone decodes to less than it adds: SentencePiece drops a leading space, and bytes of one character are
    several tokens, of which the last one gets the character.
    """
    texts, start, printed, whole = [], 0, "", ""
    for end in range(1, len(ids) + 1):
        whole = decode(tokenizer, ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        texts.append(whole[len(printed) :] if whole.startswith(printed) and not whole.endswith("\ufffd") else "")
        if texts[-1] and end - start > 8:
            # Go on from the last token, so that long rows stay fast: what it decodes to behind nothing is known.
            start = end - 1
            printed = decode(tokenizer, ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        elif texts[-1]:
            printed = whole
    if ids and not texts[-1]:
        texts[-1] = whole[len(printed) :]  # a row may be cut inside a character
    return texts


def _part(part: int, whole: int) -> str:
    if 0 < part < whole:
        return format_percent(part / whole)
    return "all" if part and part == whole else "none"


def preview_metrics(data: Data) -> dict[str, float]:
    """Returns the numbers of the report, for `result.json`."""
    report = data.report
    names = (
        *("train_rows", "eval_rows", "train_tokens", "trained_tokens", "mean_length", "max_length", "cut_sources"),
        *("cut_targets", "dropped_rows", "too_long_rows", "left_out_rows", "empty_rows", "empty_answers"),
        *("equal_rows", "eval_equal_rows", "unordered_rows", "eval_unordered_rows"),
        *("stopping_rows", "eval_dropped_rows", "eval_too_long_rows", "eval_left_out_rows", "eval_empty_rows"),
    )
    metrics = {name: float(getattr(report, name)) for name in names}
    return metrics | ({"packed_share": report.packed_share} if report.packed_share is not None else {})
