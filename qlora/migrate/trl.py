"""The YAML and the arguments of TRL's `trl sft`; `trl_preferences` has its losses over answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlora.config.overrides import write_override
from qlora.migrate import hf_arguments, shared_rules
from qlora.migrate.translation import Dialect, Lost, Move, OnlyIf, Part, Rule, Same, Settings
from qlora.migrate.vocabulary import TRAINING_ARGUMENTS, TRL_KEYS, TRL_PREFERENCE_KEYS

DEFAULTS: dict[str, Any] = {
    **hf_arguments.DEFAULTS,
    "learning_rate": 2e-5,
    "logging_steps": 10,
    "gradient_checkpointing": True,
    "dtype": "float32",
    "use_peft": False,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "bnb_4bit_quant_type": "nf4",
    "use_bnb_nested_quant": False,
    "dataset_train_split": "train",
    "dataset_test_split": "test",
    "dataset_text_field": "text",
    "max_length": 1024,
    "truncation_mode": "keep_start",
    "packing": False,
    "packing_strategy": "bfd",
    "assistant_only_loss": False,
}
"""Of 1.10; `bf16` is true unless it or `fp16` is set."""
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "auto": "auto", "torch.bfloat16": "bf16"}
ENTRY_KEYS = ("path", "name", "split", "data_files", "data_dir", "columns", "fraction")
FILE_TYPES = ("json", "csv", "parquet", "text")


def choose_base(settings: Settings) -> Iterator[Part]:
    """Yields the base model."""
    yield from shared_rules.choose_model(str(settings.take("model_name_or_path", "unset")), "model_name_or_path")
    yield from shared_rules.choose_revision(settings.take("model_revision"))


def choose_bits(settings: Settings) -> Iterator[Part]:
    """Yields the bits of the base, its precision and that of the adapter."""
    lora = bool(settings.take("use_peft"))
    four, eight = bool(settings.take("load_in_4bit")), bool(settings.take("load_in_8bit"))
    fp16, bf16 = settings.take("fp16"), settings.take("bf16")
    bf16 = not fp16 if bf16 is None else bf16
    mixed = "bf16" if bf16 else "fp16" if fp16 else None
    saved = DTYPES.get(str(settings.take("torch_dtype") or settings.take("dtype")), "auto")
    settings.read.add("dtype")
    if (four or eight) and not lora:
        yield Lost("4 and 8 bits are not trained whole: set use_peft, or lora=none quantization=none here", "use_peft")
        lora = True
    bits = 4 if four else 8 if eight else 32 if saved == "fp32" else 16
    double, kind = bool(settings.take("use_bnb_nested_quant")), str(settings.take("bnb_4bit_quant_type"))
    yield from shared_rules.choose_quantization(bits, kind, double=double, dtype=mixed or saved, lora=lora)
    if four or eight:
        yield "lora.dtype=bf16"


def choose_lora(settings: Settings) -> Iterator[Part]:
    """Yields the layers that get an adapter."""
    named, parameters = settings.take("lora_target_modules"), settings.take("lora_target_parameters")
    whole = settings.take("lora_modules_to_save")
    if not settings.look("use_peft"):
        return
    if named is None:
        yield from shared_rules.default_targets(str(settings.look("model_name_or_path", "")))
    else:
        yield from shared_rules.choose_targets(named, ("all-linear",))
    if parameters is not None:
        yield from shared_rules.choose_parameters(parameters, settings.look("lora_r"), "lora_target_parameters")
    yield from shared_rules.choose_whole_modules(whole, "lora_modules_to_save")


def read_sets(settings: Settings) -> tuple[list[dict[str, Any]], list[Part]]:
    """Returns the sets to train on, as fields of `data.mix`, and what of them was lost."""
    entries, name = settings.take("datasets"), settings.take("dataset_name")
    subset, split = settings.take("dataset_config"), settings.take("dataset_train_split")
    notes = list[Part]()
    if entries:
        parts = []
        for number, entry in enumerate(entries):
            part, more = _part(entry, f"datasets[{number}]")
            parts.append(part)
            notes += more
    else:
        named = {"path": name if name is not None else "rows.jsonl", "subset": subset, "split": split}
        parts = [
            {key: value for key, value in named.items() if value is not None and (key, value) != ("split", "train")}
        ]
        if name is None:
            notes.append(Lost("no rows are named: give data.path=FILE", "dataset_name"))
    return parts, notes


def _data(settings: Settings) -> Iterator[Part]:
    parts, notes = read_sets(settings)
    yield from notes
    text = str(settings.take("dataset_text_field"))
    for part in parts:
        part["format"] = "text" if text != "text" else "auto"
        if text != "text":
            part["columns"] = {"text": text}
    yield from shared_rules.mix(parts)
    yield from choose_length(settings)
    yield from _packing(settings)
    yield from _loss(settings)
    yield from choose_template(settings)
    yield from hold_out(settings, parts)


def _part(entry: dict[str, Any], key: str) -> tuple[dict[str, Any], list[Part]]:
    """Returns an entry of `datasets` with our field names, and what of it was lost."""
    files, path, notes = entry.get("data_files"), entry.get("path"), list[Part]()
    listed = files if isinstance(files, list) else [files]
    part: dict[str, Any] = {"path": listed[0] if files and path in FILE_TYPES else path}
    if files and path not in FILE_TYPES:
        part["data_files"] = listed[0]
    if len(listed) > 1 or isinstance(files, dict):
        notes.append(Lost(f"{listed[0]} alone is taken", f"{key}.data_files"))
    for theirs, ours in (("name", "subset"), ("split", "split")):
        if entry.get(theirs) and (theirs, entry[theirs]) != ("split", "train"):
            part[ours] = entry[theirs]
    for name in entry:
        if name not in ENTRY_KEYS:
            notes.append(Lost("an entry has no such key", f"{key}.{name}"))
    if entry.get("fraction") is not None:
        notes.append(Lost("give the set a weight in data.mix.NAME.weight", f"{key}.fraction"))
    if entry.get("columns"):
        notes.append(Lost("all columns are read that the format of the rows has", f"{key}.columns"))
    if entry.get("data_dir"):
        notes.append(Lost("name the file in data_files", f"{key}.data_dir"))
    return part, notes


def choose_length(settings: Settings) -> Iterator[Part]:
    """Yields the longest row, and how a longer one is cut."""
    length = settings.take("max_seq_length") or settings.take("max_length")
    settings.read.add("max_length")
    explicit = "max_length" in settings and settings["max_length"] is None
    yield write_override("data.max_length", None if explicit else length)
    if settings.take("truncation_mode") == "keep_end":
        yield Lost("a row that is too long loses the beginning of its prompt, then the end of its answer",
                   "truncation_mode")  # fmt: skip


def _packing(settings: Settings) -> Iterator[Part]:
    strategy = str(settings.take("packing_strategy"))
    if settings.take("packing"):
        yield "data.packing=true"
        if strategy != "bfd":
            yield Lost("a row stays whole in one pack, and is cut at max_length", "packing_strategy")
    if settings.take("eval_packing") not in (None, False):
        yield Same("held-out rows are measured one by one, which gives the same loss", "eval_packing")


def _loss(settings: Settings) -> Iterator[Part]:
    """What is trained: everything, but for prompts beside a completion, unless the file says more."""
    assistant, completion = settings.take("assistant_only_loss"), settings.take("completion_only_loss")
    if assistant:
        yield "data.train_on=assistant"
    elif completion is False:
        yield "data.train_on=all"
    elif completion:
        yield "data.train_on=assistant"
    else:
        yield "data.train_on=all"
        yield Lost("texts and chats are trained as a whole, as there; rows of prompt and completion train the "
                   "completion there: set data.train_on=assistant for them", "completion_only_loss")  # fmt: skip


def choose_template(settings: Settings) -> Iterator[Part]:
    """Yields the chat template."""
    path = settings.take("chat_template_path")
    if path is not None and str(path).endswith((".jinja", ".j2")):
        yield write_override("data.template", str(path))
        return
    yield "data.template=auto"
    if path is not None:
        yield Lost("another tokenizer's template: save it as a file and name that in data.template=FILE.jinja",
                   "chat_template_path")  # fmt: skip
    if (end := settings.take("eos_token")) is not None:
        yield Lost(f"the end of a turn is found in the chat template; for {end} choose a template that writes it, such "
                   "as data.template=chatml", "eos_token")  # fmt: skip


def hold_out(settings: Settings, parts: list[dict[str, Any]]) -> Iterator[Part]:
    """Yields the rows to measure on."""
    size, split = settings.take("test_split_size"), settings.take("dataset_test_split")
    if hf_arguments.evaluates(settings) == "no":
        yield from shared_rules.hold_out(0)
    elif size is not None:
        yield from shared_rules.hold_out(size)
    elif len(parts) == 1 and not settings.look("datasets"):
        yield write_override("data.eval_split", split)
    else:
        yield from shared_rules.hold_out(0)


RULES: dict[str, Rule] = hf_arguments.RULES | {
    "lora_r": Move("lora.r"),
    "lora_alpha": Move("lora.alpha"),
    "lora_dropout": Move("lora.dropout"),
    "use_rslora": Move("lora.use_rslora"),
    "use_dora": Move("lora.use_dora"),
    "lora_task_type": OnlyIf(("CAUSAL_LM",), "language models are trained here"),
    "attn_implementation": Move("model.attn_implementation"),
    "trust_remote_code": Move("model.trust_remote_code"),
    "dataset_num_proc": Move("data.num_proc"),
    "loss_type": OnlyIf(("nll", "chunked_nll"), "the loss is the negative log-likelihood"),
    "model_init_kwargs": Lost("set the keys of model= in their place"),
    "dataset_kwargs": Lost("rows are prepared by data.format"),
    "router_aux_loss_coef": OnlyIf((0, 0.001), shared_rules.BALANCE),
    "dataset_streaming": Same(shared_rules.STREAMING),
    "streaming": Same(shared_rules.STREAMING),
    "shuffle_dataset": Same("the order of rows is drawn from seed"),
    "pad_token": Same("padding is masked, whatever it is"),
    **dict.fromkeys(("padding_free", "pad_to_multiple_of", "activation_offloading", "use_liger",
                     "bnb_4bit_quant_storage"), Same(shared_rules.SPEED)),
    **dict.fromkeys(("ignore_bias_buffers", "dataset_batch_size", "num_of_sequences"), Same()),
}  # fmt: skip
TRL = Dialect(
    name="TRL",
    version="1.10",
    model_key="model_name_or_path",
    keys=TRAINING_ARGUMENTS | TRL_KEYS | TRL_PREFERENCE_KEYS,
    defaults=DEFAULTS,
    fixed=hf_arguments.FIXED,
    rules=RULES,
    joints=(choose_base, choose_bits, choose_lora, hf_arguments.schedule, _data),
)
