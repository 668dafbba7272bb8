"""What the start screen says of a run, by label."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora.config.schema import Config
from qlora.config.schema.adapter_kind import describe_adapter
from qlora.config.training_length import TrainingLength
from qlora.quantization.method import find_method
from qlora.runtime import distributed
from qlora.text import format_count, format_percent, plural

if TYPE_CHECKING:  # which import torch
    from qlora.adapters import ParameterCount
    from qlora.data.data_report import DataReport


def model_lines(config: Config, count: ParameterCount, beside_text: int, unquantized: str | None) -> dict[str, str]:
    """Returns the lines on the base: its size, its quantization, and the precision of its weights.

    `beside_text` is the number of parameters that are not used for text; `unquantized` says what is not quantized.
    """
    base = find_method(config.quantization).describe(config.quantization)
    dtypes = sorted(count.by_dtype.items(), key=lambda item: -item[1])
    return {
        "model": f"{config.model.name}: {count.describe_base()}"
        + (f", {format_count(beside_text, ' M')} of them not for text" if beside_text else ""),
        "base": f"{base}; {unquantized}" if unquantized else base,
        "weights": ", ".join(f"{format_count(parameters, ' M')} in {dtype}" for dtype, parameters in dtypes),
    }


def evaluation_lines(config: Config, report: DataReport | None) -> dict[str, str]:
    """Returns the line on what is measured: the held-out rows of `report`, else the test of `evaluation=`."""
    if report is not None:
        return {"data": f"{report.name}: {report.eval_rows:,} held-out rows"}
    tasks = ": ".join([config.evaluation.name.value.replace("_", "-"), *config.evaluation.tasks[:1]])
    return {"evaluation": ", ".join([tasks, *config.evaluation.tasks[1:]])}


def training_lines(
    config: Config,
    report: DataReport,
    count: ParameterCount,
    *,
    left_out: str | None,
    rows_a_step: int,
    length: TrainingLength,
    keeps: str,
    limit: str,
    head: str = "",
) -> dict[str, str]:
    """Returns the lines on what is trained, on which rows, in which steps, and what is kept of it.

    `left_out` names the layers that `lora.target_modules=all-linear` gives no adapter, `limit` how long a row may be,
    `head` what the head says; empty: there is none.
    """
    lora, trainer, processes = config.lora, config.trainer, distributed.world_size()
    adapter = describe_adapter(lora) if lora.enabled else "all weights"
    adapter += f", whole {', '.join(lora.modules_to_save)}" if lora.modules_to_save else ""
    adapter += f", {experts}" if (experts := count.describe_experts()) else ""
    full = format_percent(report.packed_share or 0)
    rows = (
        f"a stream, its first {report.train_rows:,} rows" if report.streamed else f"{report.train_rows:,} rows to train"
    )
    return {
        "data": f"{report.name}: {rows} ({report.train_tokens:,} tokens, "
        f"{report.trained_tokens:,} with loss), {report.describe_held_out()}",
        "limit": limit,
        **({"template": report.template} if report.template else {}),
        **({"packing": f"{plural(report.packs, 'pack')}, {full} full"} if report.packs else {}),
        "training": f"{adapter}: {count}",
        **({"head": head} if head else {}),
        **({"left out": left_out} if left_out else {}),
        "batch": f"{trainer.per_device_train_batch_size} x {trainer.gradient_accumulation_steps} accumulated x "
        f"{_describe_processes(processes, trainer.context_parallel)} = {rows_a_step} {length.unit} a step",
        "steps": f"{length}, {trainer.optim}, learning rate {trainer.learning_rate:g} ({trainer.lr_scheduler_type})",
        **({} if report.streamed else {"tokens": length.describe_tokens(report.train_tokens)}),
        "keeps": keeps,
    }


def _describe_processes(count: int, sharing: int) -> str:
    if sharing > 1:
        return f"{plural(count // sharing, 'group')} of {sharing} processes that share a row"
    return f"{count} process{'es' if count > 1 else ''}"
