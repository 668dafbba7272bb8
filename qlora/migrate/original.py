"""The command line of the original `qlora.py`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from string import Template
from typing import Any

from qlora.config.options import group_names
from qlora.config.overrides import write_override
from qlora.config.suggestions import ORIGINAL_FLAGS
from qlora.errors import DataError
from qlora.migrate import shared_rules
from qlora.migrate.translation import Dialect, Lost, Move, OnlyIf, Part, Pick, Rule, Same, Settings

SETS = {
    **{name: name for name in ("alpaca", "alpaca-clean", "chip2", "self-instruct", "hh-rlhf", "longform", "oasst1")},
    "unnatural-instructions": "unnatural-instructions",
    "vicuna": "vicuna",
}
FORMATS = {
    "alpaca": "alpaca",
    "alpaca-clean": "alpaca",
    "chip2": "human-bot",
    "self-instruct": "prompt-completion",
    "hh-rlhf": "chosen",
    "oasst1": "text",
    "input-output": "input-output",
}
PROGRAM = "qlora.py"


def read_command(text: str) -> dict[str, Any]:
    """Returns the flags of the first command in a script that starts qlora.py; raises `DataError` without one."""
    lines = text.replace("\\\r\n", "\n").replace("\\\n", " ").splitlines()
    variables: dict[str, str] = {}
    for line in lines:
        try:
            args = shlex.split(Template(line).safe_substitute(variables), comments=True)
        except ValueError as error:
            if PROGRAM in line:
                raise DataError(f"from: the command cannot be read ({error}): {line.strip()[:80]}") from None
            continue
        if len(args) == 1 and args[0].partition("=")[0].isidentifier() and "=" in args[0]:
            name, _, value = args[0].partition("=")
            variables[name] = value
        starts = [index for index, word in enumerate(args) if word.rpartition("/")[2] == PROGRAM]
        if starts:
            return _flags(args[starts[0] + 1 :])
        if args and args[0].startswith("--"):
            return _flags(args)
    raise DataError(f"from: no line starts {PROGRAM}; give the command, or a script that contains it")


def _flags(args: list[str]) -> dict[str, Any]:
    flags: dict[str, Any] = {}
    name = None
    for word in args:
        if word.lstrip("–—").startswith("--") or word[:1] in "–—":
            name, has_value, value = word.lstrip("-–—").partition("=")
            flags[name := name.replace("-", "_")] = _typed(value) if has_value else True
        elif word in (";", "&&", "|", "&", ">", ">>", "2>&1"):
            break
        elif name is not None:
            previous = flags[name]
            flags[name] = _typed(word) if previous is True else f"{previous} {word}"
    return flags


def _typed(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.lower() == "none":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _model(settings: Settings) -> Iterator[Part]:
    yield from shared_rules.choose_model(
        str(settings.take("model_name_or_path", "EleutherAI/pythia-12b")), "model_name_or_path"
    )


def _bits(settings: Settings) -> Iterator[Part]:
    full, bits = bool(settings.take("full_finetune")), int(settings.take("bits", 4))
    double = settings.get("double_quant", True) is not False
    settings.read.add("double_quant")
    yield from shared_rules.choose_quantization(bits, str(settings.take("quant_type", "nf4")), double, lora=not full)
    for name in ("bf16", "fp16"):
        if settings.take(name) and bits != 32:
            yield f"quantization.compute_dtype={name}"


def _data(settings: Settings) -> Iterator[Part]:
    name, form = str(settings.take("dataset", "alpaca")), settings.take("dataset_format")
    if name in SETS:
        yield f"data={SETS[name]}"
        return
    yield from ("data=local", "trainer=paper")
    yield write_override("data.path", name)
    yield from ("data.source_max_len=1024", "data.target_max_len=256", "data.max_length=null")
    if not settings.get("eval_dataset_size"):
        yield "data.eval_dataset_size=1024"
    if form in FORMATS:
        yield f"data.format={FORMATS[form]}"
    elif form:
        yield Lost("no such form here; the columns are recognised by data.format=auto", "dataset_format")


def _task(settings: Settings) -> Iterator[Part]:
    trains = settings.get("do_train", True) is not False
    evaluates, predicts = bool(settings.take("do_eval")), bool(settings.take("do_predict"))
    settings.read |= {"do_train", "predict_with_generate"}
    if trains:
        yield write_override("task.evaluate", evaluates)
        yield write_override("task.predict", predicts)
        return
    yield "task=predict" if predicts else "task=evaluate"
    yield "adapter=none"
    if not (evaluates or predicts):
        yield Lost("nothing is trained, measured or predicted; the base is measured here", "do_train")
    yield Lost("the original takes the last checkpoint in it, if there is one: give adapter=FOLDER", "output_dir")


def _schedule(settings: Settings) -> Iterator[Part]:
    strategy = str(settings.take("evaluation_strategy") or settings.take("eval_strategy", "no"))
    steps = settings.take("eval_steps")
    yield write_override(
        "trainer.eval_steps", (steps or settings.get("logging_steps", 10)) if strategy == "steps" else None
    )
    if strategy == "epoch":
        yield Lost(shared_rules.NO_STEPS.format(key="trainer.eval_steps"), "evaluation_strategy")
    saves = str(settings.take("save_strategy", "steps"))
    yield write_override("trainer.save_steps", settings.take("save_steps", 250) if saves == "steps" else None)
    if saves == "epoch":
        yield Lost(shared_rules.NO_STEPS.format(key="trainer.save_steps"), "save_strategy")
    epochs, steps = settings.take("num_train_epochs", 3), settings.take("max_steps", 10000)
    yield from shared_rules.choose_length(epochs, steps)


def _mmlu(settings: Settings) -> Iterator[Part]:
    names = ("mmlu_split", "mmlu_dataset", "max_mmlu_samples", "mmlu_source_max_len")
    values = {name: settings.take(name) for name in names}
    if not settings.take("do_mmlu_eval"):
        yield "evaluation=loss"
        return
    yield "evaluation=mmlu"
    yield f"evaluation.split={'test' if values['mmlu_split'] == 'test' else 'val'}"
    yield f"evaluation.shots={5 if values['mmlu_dataset'] == 'mmlu-fs' else 0}"
    if values["max_mmlu_samples"]:
        yield f"evaluation.max_samples={values['max_mmlu_samples']}"
    if values["mmlu_source_max_len"]:
        yield f"evaluation.source_max_len={values['mmlu_source_max_len']}"


def _optimizer(settings: Settings) -> Iterator[Part]:
    name = "paged_adamw_8bit" if settings.take("adam8bit") else str(settings.take("optim", "paged_adamw_32bit"))
    yield from shared_rules.choose_optimizer(name, "optim")
    yield from shared_rules.choose_schedule(str(settings.take("lr_scheduler_type", "constant")), "lr_scheduler_type")
    yield from shared_rules.choose_warmup(settings, 0.03)


def _sampling(settings: Settings) -> Iterator[Part]:
    """What is read when sampling only; the original took it without a word."""
    for name in ("temperature", "top_p", "top_k", "typical_p"):
        value = settings.take(name)
        if value is not None and settings.get("do_sample"):
            yield write_override(f"generation.{name}", value)
        elif value is not None:
            yield Lost("it is read when sampling only (--do_sample)", name)


MOVES: dict[str, Rule] = {
    flag: Move(ours) for flag, ours in ORIGINAL_FLAGS.items() if "=" not in ours and ours not in group_names()
}
RULES: dict[str, Rule] = MOVES | {
    "max_memory_MB": Pick({80000: ()}, "give it with its unit, e.g. model.max_memory=40GiB"),
    "lora_modules": Pick({"all": ("lora.target_modules=all-linear",)}, "name the modules in lora.target_modules=[...]"),
    "report_to": Move("tracking", shared_rules.TRACKERS),
    "use_auth": Same(shared_rules.REMOTE),
    "use_auth_token": Same(shared_rules.REMOTE),
    "logging_strategy": Pick({"steps": ()}, "lines are logged every trainer.logging_steps"),
    "remove_unused_columns": Same(),
    "overwrite_output_dir": Same("a run resumes in its folder, or refuses another config"),
    "ddp_find_unused_parameters": Same(),
    "local_rank": OnlyIf((-1, 0), shared_rules.ONE_PROCESS),
    "deepspeed": Lost("DeepSpeed is not used here"),
    "fsdp": Lost(shared_rules.SHARDED),
    "metric_for_best_model": Lost("the last state is kept; callbacks=early-stopping ends a training"),
    "load_best_model_at_end": Lost("the last state is kept; callbacks=early-stopping ends a training"),
    "push_to_hub": Lost("upload a finished run with task=push repo=OWNER/NAME"),
}
QLORA = Dialect(
    "qlora.py",
    ("recipe=none", "lora.dropout=0.0", "seed=42", "trainer.group_by_length=true"),
    RULES,
    (_model, _bits, _data, _task, _schedule, _mmlu, _optimizer, _sampling),
)
