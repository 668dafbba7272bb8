"""The arguments of the original `qlora.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlora.config.foreign_names import ORIGINAL_FLAGS
from qlora.config.options import group_names
from qlora.config.overrides import write_override
from qlora.migrate import hf_arguments, shared_rules
from qlora.migrate.translation import Dialect, Lost, Move, Part, Pick, Rule, Same, Settings
from qlora.migrate.vocabulary import QLORA_KEYS, TRAINING_ARGUMENTS

SETS = ("alpaca", "alpaca-clean", "chip2", "self-instruct", "hh-rlhf", "longform", "oasst1", "vicuna",
        "unnatural-instructions")  # fmt: skip
FORMATS = {
    "alpaca": "alpaca",
    "alpaca-clean": "alpaca",
    "chip2": "human-bot",
    "self-instruct": "prompt-completion",
    "hh-rlhf": "chosen",
    "oasst1": "text",
    "input-output": "input-output",
}
DEFAULTS: dict[str, Any] = {
    **hf_arguments.DEFAULTS,
    "model_name_or_path": "EleutherAI/pythia-12b",
    "dataset": "alpaca",
    "eval_dataset_size": 1024,
    "source_max_len": 1024,
    "target_max_len": 256,
    "mmlu_split": "eval",
    "mmlu_dataset": "mmlu-fs",
    "mmlu_source_max_len": 2048,
    "double_quant": True,
    "quant_type": "nf4",
    "bits": 4,
    "lora_r": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "max_memory_MB": 80000,
    "optim": "paged_adamw_32bit",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 16,
    "max_steps": 10000,
    "learning_rate": 2e-4,
    "max_grad_norm": 0.3,
    "gradient_checkpointing": True,
    "do_train": True,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.03,
    "logging_steps": 10,
    "group_by_length": True,
    "save_steps": 250,
    "save_total_limit": 40,
    "max_new_tokens": 256,
}
"""Of qlora.py at 7f4e95a, the last commit."""
SAMPLING = ("temperature", "top_p", "top_k", "typical_p")


def _model(settings: Settings) -> Iterator[Part]:
    yield from shared_rules.choose_model(str(settings.take("model_name_or_path")), "model_name_or_path")


def _bits(settings: Settings) -> Iterator[Part]:
    full, bits = bool(settings.take("full_finetune")), int(settings.take("bits"))
    fp16, bf16 = bool(settings.take("fp16")), bool(settings.take("bf16"))
    dtype = "fp16" if fp16 else "bf16" if bf16 else "fp32"
    if bits >= 16 and fp16:
        bits = 32  # the weights stay in 32 bits under fp16's autocast
    double, quant_type = settings.take("double_quant") is not False, str(settings.take("quant_type"))
    yield from shared_rules.choose_quantization(bits, quant_type, double=double, dtype=dtype, lora=not full)
    if bf16 and not full:
        yield "lora.dtype=bf16"
    if dtype == "fp32":
        yield Lost("without it the original computes in 32 bits, and so does this command; "
                   "quantization.compute_dtype=auto is faster", "bf16")  # fmt: skip


def _optimizer(settings: Settings) -> Iterator[Part]:
    if settings.take("adam8bit"):  # which the original read nowhere
        yield "trainer.optim=paged_adamw_8bit"


def _data(settings: Settings) -> Iterator[Part]:
    name, form = str(settings.take("dataset")), settings.take("dataset_format")
    if name in SETS:
        yield f"data={name}"
        if form not in (None, name) and FORMATS.get(str(form)) != FORMATS.get(name):
            yield Lost(f"data={name} has its own format", "dataset_format")
    else:
        yield "data=local"
        yield write_override("data.path", name)
        yield f"data.format={FORMATS.get(str(form), 'input-output')}"
        if form not in (None, *FORMATS):
            yield Lost("no such form here: input-output is taken", "dataset_format")
    yield write_override("data.source_max_len", settings.take("source_max_len"))
    yield write_override("data.target_max_len", settings.take("target_max_len"))
    yield "data.max_length=null"
    size = settings.take("eval_dataset_size")
    measures = settings.look("do_eval") or settings.look("do_predict") or settings.look("do_train") is False
    yield from shared_rules.hold_out(size if measures else 0)


def _task(settings: Settings) -> Iterator[Part]:
    trains = settings.take("do_train") is not False
    evaluates, predicts = bool(settings.take("do_eval")), bool(settings.take("do_predict"))
    settings.read.add("predict_with_generate")
    if trains:
        yield write_override("task.evaluate", evaluates)
        yield write_override("task.predict", predicts)
        return
    yield "task=predict" if predicts else "task=evaluate"
    yield "adapter=none"
    if not (evaluates or predicts):
        yield Lost("nothing is trained, measured or predicted; the base is measured here", "do_train")
    yield Lost("the original takes the last checkpoint in it, if there is one: give adapter=FOLDER", "output_dir")


def _mmlu(settings: Settings) -> Iterator[Part]:
    names = ("mmlu_split", "mmlu_dataset", "max_mmlu_samples", "mmlu_source_max_len")
    split, dataset, samples, source_max_len = (settings.take(name) for name in names)
    if not settings.take("do_mmlu_eval"):
        return
    yield "evaluation=mmlu"
    yield f"evaluation.split={'test' if split == 'test' else 'val'}"
    yield f"evaluation.shots={0 if dataset == 'mmlu-zs' else 5}"
    yield write_override("evaluation.max_samples", samples)
    yield write_override("evaluation.source_max_len", source_max_len)


def _sampling(settings: Settings) -> Iterator[Part]:
    """What is read when sampling only; the original took it without a word."""
    for name in SAMPLING:
        value = settings.take(name)
        if value is not None and settings.look("do_sample"):
            yield write_override(f"generation.{name}", value)
        elif value is not None:
            yield Lost("it is read when sampling only (--do_sample)", name)


MOVES: dict[str, Rule] = {
    flag: Move(ours) for flag, ours in ORIGINAL_FLAGS.items() if "=" not in ours and ours not in group_names()
}
RULES: dict[str, Rule] = hf_arguments.RULES | MOVES | {
    "max_memory_MB": Pick({80000: ()}, "give it with its unit, e.g. model.max_memory=40GiB"),
    "lora_modules": Pick({"all": ("lora.target_modules=all-linear",)}, "name the modules in lora.target_modules=[...]"),
    "use_auth": Same(shared_rules.REMOTE),
}  # fmt: skip
QLORA = Dialect(
    name="qlora.py",
    version="7f4e95a",
    model_key="model_name_or_path",
    keys=TRAINING_ARGUMENTS | QLORA_KEYS,
    defaults=DEFAULTS,
    fixed=(*hf_arguments.FIXED, "lora.target_modules=all-linear"),
    rules=RULES,
    joints=(_model, _bits, hf_arguments.schedule, _optimizer, _data, _task, _mmlu, _sampling),
)
