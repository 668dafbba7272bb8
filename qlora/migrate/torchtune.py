"""The YAML of torchtune."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from qlora.config.overrides import write_override
from qlora.errors import ConfigError
from qlora.migrate import shared_rules
from qlora.migrate.translation import Dialect, Lost, Move, OnlyIf, Part, Pick, Rule, Same, Settings

COMPONENT = "_component_"
MODULES = {"output_proj": "o_proj"}
MLP = ["gate_proj", "up_proj", "down_proj"]
SETS: dict[str, dict[str, Any]] = {
    "alpaca_dataset": {"path": "tatsu-lab/alpaca", "format": "alpaca"},
    "alpaca_cleaned_dataset": {"path": "yahma/alpaca-cleaned", "format": "alpaca"},
    "slimorca_dataset": {"path": "Open-Orca/SlimOrca-Dedup", "format": "conversations"},
    "grammar_dataset": {"path": "liweili/c4_200m", "format": "input-output"},
    "samsum_dataset": {"path": "Samsung/samsum", "format": "input-output",
                       "columns": {"input": "dialogue", "output": "summary"}},
    "instruct_dataset": {"format": "input-output"},
    "chat_dataset": {"format": "conversations"},
    "text_completion_dataset": {"format": "text"},
    "wikitext_dataset": {"path": "EleutherAI/wikitext_document_level", "format": "text", "columns": {"text": "page"}},
    "cnn_dailymail_articles_dataset": {"path": "ccdv/cnn_dailymail", "format": "text", "columns": {"text": "article"}},
}  # fmt: skip
"""By their builders, with what those load."""
TRAINED_WHOLE = ("alpaca_dataset", "alpaca_cleaned_dataset")
"""Whose `train_on_input` is true unless it is set."""
OPTIMIZERS = {
    "torch.optim.AdamW": "adamw_torch",
    "torch.optim.SGD": "sgd",
    "bitsandbytes.optim.PagedAdamW": "paged_adamw_32bit",
    "bitsandbytes.optim.PagedAdamW8bit": "paged_adamw_8bit",
    "bitsandbytes.optim.AdamW": "paged_adamw_32bit",
    "bitsandbytes.optim.AdamW8bit": "adamw_8bit",
    "torchao.prototype.low_bit_optim.AdamW8bit": "adamw_torch_8bit",
    "torchao.optim.AdamW8bit": "adamw_torch_8bit",
}
SCHEDULES = {"get_cosine_schedule_with_warmup": "cosine", "get_rex_scheduler": None}


def _model(settings: Settings) -> Iterator[Part]:
    component = str(settings.take(f"model.{COMPONENT}", ""))
    if (
        "policy_model" in settings
        or "teacher_model._component_" in settings
        or f"ref_checkpointer.{COMPONENT}" in settings
    ):
        raise ConfigError(
            "from: it trains by preferences, rewards or a teacher; here models are trained on answers alone"
        )
    if f"optimizer.{COMPONENT}" not in settings:
        raise ConfigError(
            "from: this torchtune config trains nothing (it has no optimizer); give one of a finetune recipe"
        )
    folder = settings.take("checkpointer.checkpoint_dir")
    if folder is None:
        yield Lost("no folder of weights is named: give model.name=FOLDER", "checkpointer.checkpoint_dir")
        folder = component.rpartition(".")[2] or "unset"
    yield "recipe=none"
    yield write_override("model.name", str(PurePosixPath(str(folder))))


def _bits(settings: Settings) -> Iterator[Part]:
    name = str(settings.get(f"model.{COMPONENT}", "")).rpartition(".")[2]
    is_fp32 = str(settings.take("dtype", "bf16")) == "fp32"
    lora = name.startswith(("lora_", "qlora_", "dora_", "qdora_"))
    quantized = name.startswith(("qlora_", "qdora_")) or bool(settings.take("model.quantize_base"))
    yield from shared_rules.choose_quantization(4 if quantized else 32 if is_fp32 else 16, "nf4", True, lora=lora)
    if not is_fp32:
        yield "quantization.compute_dtype=bf16"
    if not lora:
        return
    modules = [MODULES.get(name, name) for name in settings.take("model.lora_attn_modules", ["q_proj", "v_proj"])]
    modules += MLP if settings.take("model.apply_lora_to_mlp") else []
    every = set(modules) == {"q_proj", "k_proj", "v_proj", "o_proj", *MLP}
    yield write_override("lora.target_modules", "all-linear" if every else modules)
    if settings.take("model.apply_lora_to_output"):
        yield Lost("the output layer has no adapter here", "model.apply_lora_to_output")
    if name.startswith(("dora_", "qdora_")) or settings.take("model.use_dora"):
        yield "lora.use_dora=true"


def _data(settings: Settings) -> Iterator[Part]:
    parts, whole = [], False
    for prefix in _sets(settings):
        name = str(settings.take(f"{prefix}.{COMPONENT}", "")).rpartition(".")[2]
        part, notes = _part(prefix, name, settings)
        yield from notes
        parts.append(part)
        whole |= bool(settings.take(f"{prefix}.train_on_input", name in TRAINED_WHOLE))
        if settings.take(f"{prefix}.packed"):
            yield "data.packing=true"
            yield "trainer.group_by_length=false"
    if not parts:
        yield Lost("no rows are named: give data.path=FILE", "dataset")
        parts = [{"path": "rows.jsonl"}]
    yield from shared_rules.mix(parts)
    if whole:
        yield "data.train_on=all"
    length = settings.take("tokenizer.max_seq_len")
    yield write_override("data.max_length", length)
    if length is None and any(settings.get(f"{prefix}.packed") for prefix in _sets(settings)):
        yield "data.max_length=2048"
        yield Lost("packs need a length: 2048 is taken", "tokenizer.max_seq_len")
    yield from shared_rules.hold_out(0, "dataset_val")


def _sets(settings: Settings) -> list[str]:
    """Returns the beginnings of the keys of all data sets: `dataset`, or `dataset.0`, `dataset.1` ..."""
    if f"dataset.{COMPONENT}" in settings:
        return ["dataset"]
    numbers = {match[1] for key in settings if (match := re.match(r"dataset\.(\d+)\.", key))}
    return [f"dataset.{number}" for number in sorted(numbers, key=int)]


def _part(prefix: str, name: str, settings: Settings) -> tuple[dict[str, Any], list[Part]]:
    part: dict[str, Any] = dict(SETS.get(name, {"format": "auto"}))
    notes: list[Part] = []
    source, files = settings.take(f"{prefix}.source"), settings.take(f"{prefix}.data_files")
    files = files[0] if isinstance(files, list) else files
    local = source in ("json", "csv", "parquet", "text")
    part["path"] = (files if local else source) or part.get("path") or "rows.jsonl"
    if name not in SETS:
        notes.append(
            Lost(
                "no such builder here: its rows are recognised by their columns; give data.path=FILE",
                f"{prefix}.{COMPONENT}",
            )
        )
    elif source is None and part["path"] == "rows.jsonl":
        notes.append(Lost("no rows are named: give data.path=FILE", f"{prefix}.source"))
    if files and not local:
        part["data_files"] = files
    for theirs, ours in (("split", "split"), ("name", "subset")):
        value = settings.take(f"{prefix}.{theirs}")
        if value and value != "train":
            part[ours] = value
            if re.search(r"[\[:%]", str(value)):
                notes.append(
                    Lost("a part of a split: take fewer rows with data.max_train_samples", f"{prefix}.{theirs}")
                )
                part[ours] = str(value).partition("[")[0]
    if settings.take(f"{prefix}.conversation_style") == "openai":
        part["format"] = "messages"
    columns: dict[str, str] = dict(part.get("columns", {}))
    for key in [key for key in settings if key.startswith(f"{prefix}.column_map.")]:
        ours = key.rpartition(".")[2]
        columns[ours] = str(settings.take(key))
    if (column := settings.take(f"{prefix}.conversation_column")) is not None:
        columns[part["format"]] = str(column)
    if (column := settings.take(f"{prefix}.column")) is not None:
        columns["text"] = str(column)
    if columns := {role: column for role, column in columns.items() if role != column}:
        part["columns"] = columns
    elif "columns" in part:
        del part["columns"]
    return part, notes


def _optimizer(settings: Settings) -> Iterator[Part]:
    name = str(settings.take(f"optimizer.{COMPONENT}"))
    fused = settings.take("optimizer.fused")
    if name in OPTIMIZERS:
        ours = OPTIMIZERS[name]
        yield f"trainer.optim={'adamw_torch_fused' if fused and ours == 'adamw_torch' else ours}"
    else:
        yield Lost("no such optimizer here; see trainer.optim", f"optimizer.{COMPONENT}")
    yield write_override(
        "trainer.weight_decay", settings.take("optimizer.weight_decay", 0.01 if "Adam" in name else 0.0)
    )
    betas = settings.take("optimizer.betas")
    if isinstance(betas, list) and len(betas) == 2:
        yield f"trainer.adam_beta1={betas[0]}"
        yield f"trainer.adam_beta2={betas[1]}"
    schedule = str(settings.take(f"lr_scheduler.{COMPONENT}", "")).rpartition(".")[2]
    if schedule == "":
        yield "trainer.lr_scheduler_type=constant"
    elif (ours_schedule := SCHEDULES.get(schedule)) is not None:
        yield f"trainer.lr_scheduler_type={ours_schedule}"
    else:
        yield Lost("no such schedule here; see trainer.lr_scheduler_type", f"lr_scheduler.{COMPONENT}")
    yield write_override("trainer.warmup_steps", settings.take("lr_scheduler.num_warmup_steps", 0))
    yield write_override("trainer.max_grad_norm", settings.take("clip_grad_norm", 0))


def _steps(settings: Settings) -> Iterator[Part]:
    epochs, most = settings.take("epochs", 1), settings.take("max_steps_per_epoch")
    steps = int(most) * int(epochs) if isinstance(most, int) else None
    yield from shared_rules.choose_length(epochs, steps)
    yield "trainer.save_steps=null"
    if epochs and epochs > 1:
        yield Lost("a checkpoint after each epoch: set trainer.save_steps=N", "epochs")


def _logger(settings: Settings) -> Iterator[Part]:
    name = str(settings.take(f"metric_logger.{COMPONENT}", "")).rpartition(".")[2]
    loggers = {"WandBLogger": "wandb", "TensorBoardLogger": "tensorboard", "MLFlowLogger": "mlflow"}
    project = settings.take("metric_logger.project")
    if name in loggers:
        yield f"tracking={loggers[name]}"
        if project and name != "TensorBoardLogger":
            yield write_override("tracking.project", project)
    if (folder := settings.take("output_dir")) is not None:
        yield write_override("hydra.run.dir", folder)


RULES: dict[str, Rule] = {
    "batch_size": Move("trainer.per_device_train_batch_size"),
    "gradient_accumulation_steps": Move("trainer.gradient_accumulation_steps"),
    "optimizer.lr": Move("trainer.learning_rate"),
    "optimizer.eps": Move("trainer.adam_epsilon"),
    "optimizer.momentum": Lost("SGD has none here"),
    "model.lora_rank": Move("lora.r"),
    "model.lora_alpha": Move("lora.alpha"),
    "model.lora_dropout": Move("lora.dropout"),
    "seed": Move("seed"),
    "device": Move("device", {"cuda": "auto", "cpu": "cpu", "xpu": "xpu"}),
    "compile": Pick({True: ("trainer.compile=true",), False: ()}),
    "enable_activation_checkpointing": Move("trainer.gradient_checkpointing"),
    "enable_activation_offloading": OnlyIf((False,), "trainer.memory_budget=auto decides what is computed again"),
    "log_every_n_steps": Move("trainer.logging_steps"),
    "resume_from_checkpoint": Same("a run resumes in its folder by itself"),
    "checkpointer.revision": Move("model.revision"),
    "tokenizer.prompt_template": Lost("see data.format and data.template"),
    "optimizer_in_bwd": OnlyIf((False,), "gradients are kept until the optimizer's step"),
    "shuffle": OnlyIf((True,), "rows are always drawn in random order"),
    "tensor_parallel_dim": OnlyIf((1,), "a layer stays on one device"),
    "custom_sharded_layers": Same(),
    "fsdp_cpu_offload": OnlyIf((False,), shared_rules.SHARDED),
    "profiler.enabled": Pick({True: ("trainer.profile=true",), False: ()}),
    "run_val_every_n_steps": Move("trainer.eval_steps"),
    "save_adapter_weights_only": Same("a checkpoint holds the adapter alone"),
    **dict.fromkeys(("log_peak_memory_stats", "log_level", "low_cpu_ram", "fsdp_reshard_after_forward", "__folder__",
                     "ac_mode", "ac_option", "enable_async_checkpointing", "fsdp_sharding_strategy",
                     "memory_efficient_fsdp_wrap",
                     "cudnn_deterministic_mode", "clear_cache", "keep_last_n_checkpoints", "epochs_to_keep"), Same()),
}  # fmt: skip
TORCHTUNE = Dialect(
    "torchtune",
    (
        *(
            "trainer.gradient_accumulation_steps=1",
            "trainer.group_by_length=false",
            "lora.dropout=0.0",
            "evaluation=loss",
        ),
        *("data.source_max_len=null", "data.target_max_len=null", "trainer.gradient_checkpointing=false"),
        "trainer.logging_steps=1",
    ),
    RULES,
    (_model, _bits, _data, _optimizer, _steps, _logger),
    {
        "profiler.": Same(),
        "checkpointer.": Same("weights are found in the folder"),
        "metric_logger.": Same(),
        "tokenizer.": Same("the base's own tokenizer is taken, with its files"),
        "loss.": Same(shared_rules.SPEED),
        "dataset.": Lost("there is no such option here"),
        "dataset_val.": Lost("give rows to measure on with data.eval_path or data.eval_dataset_size"),
        "model.": Lost("there is no such option here"),
    },
)
