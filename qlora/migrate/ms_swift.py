"""The arguments of ms-swift's `swift sft`, `swift pt` and `swift rlhf`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora.config.overrides import write_override
from qlora.errors import ConfigError
from qlora.migrate import hf_arguments, preferences, shared_rules
from qlora.migrate.translation import Dialect, Lost, Move, OnlyIf, Part, Rule, Same, Settings
from qlora.migrate.vocabulary import SWIFT_KEYS, TRAINING_ARGUMENTS

CHAT = "qlora.data.formats.as_chat:from_any"
DEFAULTS: dict[str, Any] = {
    **hf_arguments.DEFAULTS,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "lr_scheduler_type": "cosine",
    "logging_steps": 5,
    "gradient_checkpointing": True,
    "report_to": "tensorboard",
    "tuner_type": "lora",
    "lora_rank": 8,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_bias": "none",
    "target_modules": "all-linear",
    "init_weights": "true",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "split_dataset_ratio": 0.0,
    "data_seed": 42,
    "truncation_strategy": "delete",
    "loss_scale": "default",
    "packing": False,
    "freeze_vit": True,
    "freeze_aligner": True,
}
"""Of 4.6; the batch of a step has 16 rows, and the learning rate goes by `tuner_type`."""
STEP_ROWS = 16
LEARNING_RATES = {"lora": 1e-4, "full": 1e-5}
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "bf16": "bf16", "fp16": "fp16", "fp32": "fp32"}
TOO_LONG = {"delete": "drop", "raise": "error", "left": "truncate", "right": "truncate"}
LOSSES = {"default": "assistant", "last_round": "last", "all": "all"}
TEMPLATES = {
    "chatml": "chatml",
    "qwen": "qwen",
    "qwen2_5": "qwen",
    "llama3": "llama-3",
    "gemma": "gemma",
    "qwen3": "auto",
}
INITS = {"true": "default", "gaussian": "gaussian", "pissa": "pissa", "olora": "olora", "loftq": "loftq"}
FILES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet")
HUB = "ids are of ModelScope there; the hub of Hugging Face is asked here"


GALORE: dict[str, Any] = {"rank": 128, "update_proj_gap": 50, "scale": 1.0, "proj_type": "std"}
"""What GaLore takes, with its defaults."""


def _model(settings: Settings) -> Iterator[Part]:
    if (method := settings.look("rlhf_type")) not in (None, *METHODS):
        raise ConfigError(f"from: rlhf_type={method} {preferences.GENERATES}")
    name = settings.take("model") or settings.take("model_id_or_path") or settings.take("model_id")
    yield from shared_rules.choose_model(str(name or "unset"), "model")
    yield from shared_rules.choose_revision(settings.take("model_revision"))
    sets = [str(item).partition("#")[0] for item in _listed(settings.look("dataset"))]
    of_a_hub = [item for item in (str(name or ""), *sets) if re.fullmatch(r"(ms::)?[\w-]+/[\w.-]+(:[\w/-]+)?", item)]
    if not settings.take("use_hf") and any(not item.endswith(FILES) for item in of_a_hub):
        yield Lost(HUB, "use_hf")


def _tuner(settings: Settings) -> str:
    """Returns the kind of training, under its names in several versions."""
    return str(settings.take("train_type") or settings.take("sft_type") or settings.take("tuner_type"))


def _bits(settings: Settings) -> Iterator[Part]:
    tuner = _tuner(settings)
    settings.read.add("tuner_type")
    if tuner in ("vera", "ia3"):
        yield from _other_kind(settings, tuner)
    elif tuner not in LEARNING_RATES:
        yield Lost("a LoRA adapter is trained in its place: here are LoRA and all weights (lora=none)", "tuner_type")
    method, bits = settings.take("quant_method"), settings.take("quant_bits") or settings.take("quantization_bit")
    number = 16
    if method == "bnb" and bits in (4, 8):
        number = int(bits)
    elif method is None and bits is not None:
        yield Lost("it is read beside quant_method only, and the base has 16 bits without it: for "
                   f"{bits} bits set quantization={'int8' if bits == 8 else 'nf4'}", "quant_bits")  # fmt: skip
    elif method is not None:
        yield Lost("bases are quantized by bitsandbytes here, to 4 or 8 bits", "quant_method")
    dtype = DTYPES.get(str(settings.take("torch_dtype") or settings.take("dtype")), "auto")
    if settings.take("bf16"):
        dtype = "bf16"
    elif settings.take("fp16"):
        dtype = "fp16"
    compute = settings.take("bnb_4bit_compute_dtype")
    if number == 4 and compute is not None:
        dtype = DTYPES.get(str(compute), "auto")
    double = settings.take("bnb_4bit_use_double_quant") is not False
    kind = str(settings.take("bnb_4bit_quant_type"))
    yield from shared_rules.choose_quantization(number, kind, double=double, dtype=dtype, lora=tuner != "full")
    yield from shared_rules.choose_targets(settings.take("target_modules"), ("all-linear",))
    if tuner != "full":
        yield from shared_rules.choose_whole_modules(settings.take("modules_to_save"), "modules_to_save")
    if (parameters := settings.take("target_parameters")) is not None and tuner != "full":
        yield from shared_rules.choose_parameters(parameters, settings.look("lora_rank"), "target_parameters")
    rate = settings.take("learning_rate") if "learning_rate" in settings else LEARNING_RATES.get(tuner, 1e-4)
    settings.read.add("learning_rate")
    yield write_override("trainer.learning_rate", rate)


def _other_kind(settings: Settings, tuner: str) -> Iterator[Part]:
    """Yields the adapter of a kind beside LoRA."""
    settings.read |= {"lora_rank", "lora_alpha", "lora_dropout", "lora_bias", "init_weights"}
    yield f"lora={tuner}"
    if tuner == "vera":
        yield write_override("lora.r", settings.take("vera_rank") or 256)
        yield write_override("lora.dropout", settings.take("vera_dropout") or 0.0)
        for key in ("d_initial", "projection_prng_key"):
            if (value := settings.take(f"vera_{key}")) is not None:
                yield write_override(f"lora.options.{key}", value)


def _optimizer(settings: Settings) -> Iterator[Part]:
    name = settings.take("optimizer")
    if name == "muon":
        yield "trainer.optim=muon"
    elif name not in (None, "default", "galore"):
        yield Lost("there is no such optimizer here; the one of optim is taken", "optimizer")
    if not (settings.take("use_galore") or name == "galore"):
        return
    values = {key: settings.take(f"galore_{key}", default) for key, default in GALORE.items()}
    is_adafactor = settings.look("optim") == "adafactor"
    yield from shared_rules.choose_projection("galore_adafactor" if is_adafactor else "galore_adamw", values)
    for key in ("target_modules", "with_embedding", "quantization"):
        if settings.take(f"galore_{key}"):
            yield Lost(
                "every matrix is projected but embeddings and the output matrix, without rounding", f"galore_{key}"
            )


def _steps(settings: Settings) -> Iterator[Part]:
    given = settings.take("gradient_accumulation_steps") if "gradient_accumulation_steps" in settings else None
    settings.read.add("gradient_accumulation_steps")
    rows = int(settings.look("per_device_train_batch_size"))
    yield write_override("trainer.gradient_accumulation_steps", given or max(math.ceil(STEP_ROWS / rows), 1))
    if settings.take("max_epochs") is not None:
        yield Lost("the length is that of num_train_epochs or max_steps", "max_epochs")
    if (stop := settings.take("early_stop_interval")) is not None:
        yield "callbacks=early-stopping"
        yield f"callbacks.early_stopping.patience={stop}"


def _data(settings: Settings) -> Iterator[Part]:
    parts, is_text = [], settings.take("use_chat_template") is False
    columns = hf_arguments.read_mapping(settings.take("columns")) or {}
    for name in _listed(settings.take("dataset")):
        part, notes = _part(str(name), columns, is_text=is_text)
        yield from notes
        parts.append(part)
    if not parts:
        yield Lost("no rows are named: give data.path=FILE", "dataset")
        parts = [{"path": "rows.jsonl", "format": CHAT}]
    yield from shared_rules.mix(parts)
    length = settings.take("max_length")
    yield write_override("data.max_length", length)
    yield from _long_rows(settings)
    if settings.take("packing"):
        yield "data.packing=true"
        yield write_override("data.pack_length", settings.take("packing_length"))
        if length is None and settings.look("packing_length") is None:
            yield "data.max_length=2048"
            yield Lost("packs need a length: 2048 is taken, the model's longest context there", "max_length")
    loss = str(settings.take("loss_scale")).removesuffix("+ignore_empty_think")
    if loss in LOSSES:
        yield f"data.train_on={LOSSES[loss]}"
    else:
        yield Lost("a token counts whole or not at all: the assistant's turns are trained", "loss_scale")
    yield from _template(settings)
    yield from _held_out(settings, parts, columns, is_text=is_text)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _part(name: str, columns: dict[str, Any], *, is_text: bool) -> tuple[dict[str, Any], list[Part]]:
    """Returns a set, written `hf::path:subset1/subset2#rows`, with our field names, and what of it was lost."""
    notes = list[Part]()
    path = name.removeprefix("hf::").removeprefix("ms::").removeprefix("HF::").removeprefix("MS::")
    path, _, count = path.partition("#") if not Path(name).exists() else (name, "", "")
    path, _, subsets = path.partition(":") if not Path(path).exists() else (path, "", "")
    part: dict[str, Any] = {"path": path, "format": "text" if is_text else CHAT}
    if subsets:
        part["subset"] = subsets.partition("/")[0]
        if "/" in subsets:
            notes.append(Lost(f"one subset of {subsets} is taken: name each as a set of its own", "dataset"))
    if count:
        part["max_samples"] = int(count)
        notes.append(Lost("rows are drawn at random there; here the first ones are taken", "dataset"))
    if columns:
        part["columns"] = {str(ours): str(theirs) for theirs, ours in columns.items()}
    return part, notes


def _long_rows(settings: Settings) -> Iterator[Part]:
    strategy = str(settings.take("truncation_strategy"))
    yield f"data.on_too_long={TOO_LONG.get(strategy, 'truncate')}"
    if strategy in ("left", "right", "split"):
        yield Lost("a row that is too long loses the beginning of its prompt, then the end of its answer",
                   "truncation_strategy")  # fmt: skip


def _template(settings: Settings) -> Iterator[Part]:
    name = settings.take("template") or settings.take("template_type")
    yield f"data.template={TEMPLATES.get(str(name), 'auto')}"
    if name is not None and name not in TEMPLATES:
        yield Lost("no such template here: the tokenizer's own is used (data.template=auto)", "template")
    if settings.take("system"):
        yield Lost("write it into the column system of the rows, or into a Jinja file (data.template)", "system")


def _held_out(
    settings: Settings, parts: list[dict[str, Any]], columns: dict[str, Any], *, is_text: bool
) -> Iterator[Part]:
    measured, fraction = _listed(settings.take("val_dataset")), settings.take("split_dataset_ratio")
    named = "eval_strategy" in settings or "evaluation_strategy" in settings
    strategy = hf_arguments.evaluates(settings) if named else str(settings.look("save_strategy"))
    if not measured:
        yield from shared_rules.hold_out(0 if strategy == "no" else fraction)
    else:
        held_out, notes = _part(str(measured[0]), columns, is_text=is_text)
        yield from notes
        yield from shared_rules.measure_on(held_out, parts, "val_dataset")
        if len(measured) > 1:
            yield Lost("one set is measured: join the others to it in a file", "val_dataset")
    if measured or fraction:
        yield from hf_arguments.every("eval", strategy, settings, settings.look("save_steps"))


METHODS = ("dpo", "kto", "orpo", "cpo", "simpo", "rm")
LOSS_KEYS = ("beta", "label_smoothing", "loss_type", "loss_weights", "rpo_alpha", "cpo_alpha", "simpo_gamma",
             "desirable_weight", "undesirable_weight", "center_rewards_coefficient")  # fmt: skip


def _loss(settings: Settings) -> Iterator[Part]:
    """The loss over answers of `swift rlhf`."""
    method = settings.take("rlhf_type")
    if method is None:
        return
    values = {name: settings.take(name) for name in LOSS_KEYS}
    if method in ("cpo", "simpo"):
        values["simpo_gamma"] = 1.0 if values["simpo_gamma"] is None else values["simpo_gamma"]
    elif method not in ("dpo", "kto"):
        values["loss_type"] = None
    yield from preferences.choose_loss(preferences.Answers(str(method), values))
    if method != "rm" and _tuner(settings) == "full":
        yield Lost(
            "the reference is a second model there: an adapter is trained here, or loss.reference=none", "ref_model"
        )
    for key in ("ref_model", "ref_model_type", "ref_model_revision"):
        if settings.take(key) is not None:
            yield Lost(preferences.REFERENCE_MODEL, key)
    adapters, references = _listed(settings.take("adapters")), _listed(settings.take("ref_adapters"))
    if adapters and method != "rm":
        yield write_override("lora.start", str(adapters[0]))
        if method in ("dpo", "kto"):
            yield f"loss.reference={'start' if references else 'base'}"
        if len(adapters) > 1:
            yield Lost("one adapter is trained further: merge the others first (task=merge)", "adapters")
    if references and references != adapters:
        yield Lost(preferences.REFERENCE_MODEL, "ref_adapters")
    if settings.take("ld_alpha") is not None:
        yield Lost("all tokens of an answer count alike", "ld_alpha")
    if method == "kto" and settings.look("per_device_train_batch_size") == 1:
        settings.read.add("per_device_train_batch_size")
        yield "trainer.per_device_train_batch_size=2"
        yield "trainer.gradient_accumulation_steps=8"
        yield Lost(preferences.LABEL_ROWS, "per_device_train_batch_size")


RULES: dict[str, Rule] = hf_arguments.RULES | {
    "lora_rank": Move("lora.r"),
    "lora_alpha": Move("lora.alpha"),
    "lora_dropout": Move("lora.dropout"),
    "lora_bias": Move("lora.bias", {"none": "none", "all": "all"}),
    "lora_dtype": Move("lora.dtype", {"float32": "fp32", "bfloat16": "bf16"}),
    "use_rslora": Move("lora.use_rslora"),
    "use_dora": Move("lora.use_dora"),
    "lorap_lr_ratio": Move("lora.loraplus_lr_ratio"),
    "init_weights": Move("lora.init", INITS),
    "router_aux_loss_coef": OnlyIf((0,), shared_rules.BALANCE),
    "experts_impl": Same(shared_rules.EXPERT_KERNELS),
    "target_regex": Lost("name it in lora.target_modules, which takes regular expressions"),
    "new_special_tokens": Move("model.new_tokens"),
    "attn_impl": Move("model.attn_implementation", {
        "sdpa": "sdpa", "eager": "eager", "flash_attn": "flash_attention_2", "flash_attention_2": "flash_attention_2"}),
    "device_map": Move("model.device_map", {name: name for name in ("auto", "balanced", "sequential")}),
    "dataset_num_proc": Move("data.num_proc"),
    "dataset_shuffle": OnlyIf((True,), "the order of rows is drawn from seed"),
    "train_dataloader_shuffle": OnlyIf((True,), "the order of rows is drawn from seed"),
    "streaming": Same(shared_rules.STREAMING),
    "adapters": Lost("training begins with a fresh adapter; merge that one first (task=merge)"),
    "resume_only_model": Lost(shared_rules.NO_RESUME),
    "model_name": Lost("names in the rows of swift/self-cognition are not filled in: write them into a file"),
    "model_author": Lost("names in the rows of swift/self-cognition are not filled in: write them into a file"),
    "task_type": OnlyIf(("causal_lm",), "language models are trained here"),
    "tuner_backend": Same(shared_rules.SPEED),
    "packing_strategy": Same("packs are filled best fit"),
    "rope_scaling": Lost("set model.rope_scaling, e.g. {rope_type: yarn, factor: 4}"),
    "sequence_parallel_size": OnlyIf((1,), shared_rules.ONE_DEVICE),
    "interleave_prob": Lost(shared_rules.WEIGHTS),
    "enable_thinking": Lost("the template decides whether empty thoughts are part of an answer"),
    "freeze_vit": Same("only text is trained here"),
    "freeze_aligner": Same("only text is trained here"),
    "model_type": Same("transformers finds it in the model's own folder"),
    "strict": Lost("a broken row stops the run"),
    "hub_token": Same(shared_rules.REMOTE),
    **dict.fromkeys(("padding_free", "use_flash_attn", "use_logits_to_keep"), Same(shared_rules.SPEED)),
    **dict.fromkeys(
        ("add_version", "check_model", "create_checkpoint_symlink", "disable_auto_column_mapping", "download_mode",
         "ignore_args_error", "lazy_tokenize", "load_args", "load_data_args", "load_from_cache_file", "logging_dir",
         "max_new_tokens", "max_pixels", "max_shard_size", "packing_num_proc", "padding_side", "safe_serialization",
         "shuffle_buffer_size", "stopping_strategy", "temperature", "template_backend", "val_dataset_shuffle",
         "vit_gradient_checkpointing", "eval_metric"),
        Same(),
    ),
}  # fmt: skip
SWIFT = Dialect(
    name="ms-swift",
    version="4.6",
    model_key="model",
    keys=TRAINING_ARGUMENTS | SWIFT_KEYS,
    defaults=DEFAULTS,
    fixed=hf_arguments.FIXED,
    rules=RULES,
    joints=(_model, _bits, hf_arguments.schedule, _optimizer, _steps, _data, _loss),
)
OF_COMMAND: dict[tuple[str, ...], dict[str, Any]] = {
    ("swift", "pt"): {"use_chat_template": False, "loss_scale": "all"},
    ("swift", "rlhf"): {"rlhf_type": "dpo"},
}
"""What a command sets where it is not given."""
