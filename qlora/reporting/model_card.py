"""Writes the model card: what was trained, how well it does, how to load it, how to repeat it."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora.config.registries.objectives import SHIPPED, Head
from qlora.config.registries.rope_scaling import ROPE_TYPES, TYPE
from qlora.config.schema import ComputeDtype, Config, DataConfig, LoraInit, TrainerConfig, Weights
from qlora.config.schema.adapter_kind import describe_adapter, describe_choice
from qlora.quantization.method import find_method
from qlora.reporting.escape import markdown_block, markdown_code, markdown_table, markdown_text
from qlora.reporting.kept import kept_lines
from qlora.reporting.manifest import versions
from qlora.reporting.rendering import previous_model
from qlora.runtime.atomic_files import write_text
from qlora.text import format_metric, format_range, is_detail, plural, quoted

DTYPES = {ComputeDtype.bf16: "bfloat16", ComputeDtype.fp16: "float16", ComputeDtype.fp32: "float32"}
HEADS = {
    Head.classify: "A classifier of texts",
    Head.regress: "A regression of texts",
    Head.embed: "A model of embeddings",
}
REWARD = "num_labels=1, "
"""What `from_pretrained` is told of a reward model."""
SEEN = "seen from the folder of this card"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# Licences that the hub knows by an id of its own; others are declared as `other`.
HUB_LICENSES = (
    *("mit", "apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "gpl-3.0", "openrail"),
    *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "gemma", "bigscience-openrail-m"),
)

WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
"""The schedules that do not read `trainer.warmup_steps`."""
WARM_UP_THEMSELVES = ("schedule_free_adamw", "schedule_free_sgd")
"""The optimizers that read it under a constant schedule."""


def write_model_card(
    folder: Path,
    *,
    config: Config,
    result: dict[str, Any],
    base_model: str,
    command: str,
    compute_dtype: str | None = None,
    example_prompt: str | None = None,
    unquantized: str | None = None,
    experts: str = "",
    mixture: str = "",
    license: str | None = None,
) -> Path:
    """Writes `README.md` into `folder` and returns its path.

    `result` holds `metrics` (`eval_loss`, `base_eval_loss` ...) and `paths`; `command` is what started the run;
    `compute_dtype` the dtype that `auto` became, e.g. `bfloat16`; `example_prompt` a prompt as the model saw it;
    `unquantized` says which share of the decoder's weights has more bits than the rest, `experts` what is trained on
    routed experts; `mixture` says the size of a base that is a mixture of experts; `license` is the base's, where the
    config names none.
    """
    parts = [
        f"# {markdown_text(config.name or folder.resolve().name)}",
        _introduction(config, base_model, unquantized),
        "## Results",
        _results(config, result),
        "## Use",
        _initialise_again(config, folder, result.get("paths", {}), command)
        if config.lora.enabled and config.model.weights is Weights.random
        else _use(config, folder, result.get("paths", {}), base_model, compute_dtype, example_prompt),
        "## Training",
        markdown_table(
            ("setting", "value"), _settings(config, compute_dtype, unquantized, experts, mixture) + kept_lines(result)
        ),
        "## Reproduce",
        markdown_block(command, "bash"),
        "Versions: " + ", ".join(f"{name} {version}" for name, version in versions().items() if version) + ".",
        "## Limits",
        _limits(config),
    ]
    path = folder / "README.md"
    write_text(
        path,
        f"---\n{_front_matter(config, base_model, config.model.license or license)}\n---\n\n"
        + "\n\n".join(parts)
        + "\n",
    )
    return path


def card_on_hub(card: str, repo: str) -> str:
    """Returns a card whose example loads the model from `repo` instead of the folder of the card."""
    return re.sub(rf'^folder = ".*"  # {SEEN}$', f'folder = "{repo}"', card, flags=re.MULTILINE)


def _front_matter(config: Config, base_model: str, license: str | None) -> str:
    from huggingface_hub import ModelCardData

    license_id = (license or "").lower()
    known = license_id in HUB_LICENSES
    data_id = config.data.path or ""
    front_matter: dict[str, Any] = {
        "base_model": base_model
        if HUB_ID.fullmatch(base_model) and config.model.weights is Weights.pretrained
        else None,
        "library_name": "peft" if config.lora.enabled else "transformers",
        "pipeline_tag": _pipeline(config),
        "license": license_id if known else "other" if license_id else None,
        "license_name": re.sub(r"[^a-z0-9.]+", "-", license_id).strip("-") if license_id and not known else None,
        "datasets": [data_id] if HUB_ID.fullmatch(data_id) and not Path(data_id).exists() else None,
        "tags": [
            "qlora",
            *([config.lora.kind] if config.lora.enabled else []),
            find_method(config.quantization).width(config.quantization),
        ],
    }
    return ModelCardData(**{key: value for key, value in front_matter.items() if value is not None}).to_yaml().strip()


def _pipeline(config: Config) -> str:
    """Returns what the hub calls that which the model is for."""
    if not config.loss.has_head:
        return "text-generation"
    return "sentence-similarity" if config.loss.head is Head.embed else "text-classification"


def _introduction(config: Config, base_model: str, unquantized: str | None) -> str:
    is_id = HUB_ID.fullmatch(base_model)
    link = f"[{base_model}](https://huggingface.co/{base_model})" if is_id else markdown_code(base_model)
    if config.model.weights is Weights.random:
        link = f"random weights in the shape of {link}"
    path = f" ({markdown_code(config.data.path)})" if config.data.path else ""
    by = "" if config.loss.name == "sft" else f" by {markdown_code(f'loss={config.loss.name}')}"
    data = f"trained on {markdown_code(config.data.name)}{path}{by}"
    if config.lora.enabled:
        precision = _base_precision(config, unquantized)
        named = "A reward model" if config.loss.is_preference else HEADS.get(config.loss.head, "")
        kind = describe_adapter(config.lora).partition(" ")[0]
        article = "An" if kind[0] in "AEIO" else "A"
        parts = "a LoRA adapter" if config.loss.head is Head.embed else "a LoRA adapter and a head"
        what = f"{named}: {parts}" if config.loss.has_head else f"{article} {kind} adapter"
        return f"{what} for {link}, {data} with the base weights frozen in {precision}."
    return f"All weights of {link}, {data}."


def _base_precision(config: Config, unquantized: str | None) -> str:
    quantization, but = config.quantization, f", but {unquantized}" if unquantized else ""
    return f"{find_method(quantization).describe_precision(quantization)}{but}"


def _results(config: Config, result: dict[str, Any]) -> str:
    metrics, intervals = result.get("metrics", {}), result.get("intervals", {})
    names = [key.removeprefix("eval_") for key in metrics if key.startswith("eval_") and not is_detail(key)]
    if not names:
        return "Nothing was measured on held-out rows."
    rows: list[tuple[str, ...]] = []
    for name in names:
        values = (metrics.get(f"base_eval_{name}"), metrics[f"eval_{name}"])
        interval = intervals.get(f"eval_{name}")
        certain = format_range(name, *interval) if interval else ""
        rows.append((name.replace("_", " "), *(format_metric(name, value) for value in values), certain))
    baseline = SHIPPED[config.loss.name].constant.removeprefix("the ") if config.loss.reads_whole_texts else ""
    previous = baseline or previous_model(config.loss.name, config.lora.start)
    head: tuple[str, ...] = ("held-out metric", previous, "this model", "95 % interval")
    if not any(row[-1] for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    table = markdown_table(head, rows)
    name = f"that of {markdown_code(f'loss={config.loss.name}')}"
    unit = name if config.loss.reads_whole_texts else "in nats per answer token"
    note = f"Measured on held-out rows of {markdown_code(config.data.name)}; the loss is {unit}."
    return f"{table}\n\n{note}"


def _dtype(config: Config, compute_dtype: str | None) -> str:
    return compute_dtype or DTYPES.get(config.quantization.compute_dtype, "bfloat16")


def _initialise_again(config: Config, folder: Path, paths: dict[str, str], command: str) -> str:
    """Returns the command that initialises the base again; it is saved nowhere."""
    adapter = _relative(paths.get("adapter"), folder)
    text = f"The base was initialised at random from seed {config.seed} and is saved nowhere; this creates it again:"
    again = f"{command} task=chat {shlex.quote(f'adapter={quoted(adapter)}')}  # {SEEN}"
    return f"{text}\n\n{markdown_block(again, 'bash')}"


def _use(
    config: Config, folder: Path, paths: dict[str, str], base: str, compute_dtype: str | None, prompt: str | None
) -> str:
    """Returns Python that loads the model with transformers and PEFT alone, quantized as in training."""
    if config.loss.head is Head.embed:
        return _use_embeddings(config, folder, paths, prompt)
    dtype, method = f"torch.{_dtype(config, compute_dtype)}", find_method(config.quantization)
    adapter = _relative(paths.get("adapter" if config.lora.enabled else "model"), folder)
    kind = "AutoModelForSequenceClassification" if config.loss.has_head else "AutoModelForCausalLM"
    names = [
        *(["AutoConfig"] if config.loss.reads_whole_texts or config.model.rope_scaling is not None else []),
        kind,
        "AutoTokenizer",
        *([method.library_class] if method.library_class else []),
    ]
    embedded = config.lora.enabled and base == "tiny"
    lines = [*(["import importlib.resources", ""] if embedded else []), "import torch"]
    lines += [*(["from peft import PeftModel"] if config.lora.enabled else [])]
    lines += [
        *method.library_imports,
        f"from transformers import {', '.join(names)}",
        "",
    ]
    lines += [f"folder = {_literal(adapter)}  # {SEEN}"]
    lines += ["tokenizer = AutoTokenizer.from_pretrained(folder)"]
    labels = "config=AutoConfig.from_pretrained(folder), " if config.loss.reads_whole_texts else REWARD
    options = f'{labels if config.loss.has_head else ""}dtype={dtype}, device_map="auto"'
    if method.library_class:
        arguments = method.library_arguments(config.quantization, dtype)
        lines += [f"quantization = {method.library_class}(", *(f"    {argument}," for argument in arguments), ")"]
        options += ", quantization_config=quantization"
    if config.lora.enabled:
        if config.model.revision:
            options += f", revision={_literal(config.model.revision)}"
        # A head over whole texts lies beside a config of the model, which says it.
        scaling = None if config.loss.reads_whole_texts else config.model.rope_scaling
        if scaling is not None:
            options = "config=config, " + options.removeprefix(REWARD)
        lines += [
            *_base_lines(base),
            *_scaling_lines(scaling, has_head=config.loss.has_head),
            f"model = {kind}.from_pretrained(base, {options})",
        ]
        lines += method.quantizing_code(config.quantization, dtype)
        if config.model.new_tokens:
            lines.append("if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:")
            lines.append("    model.resize_token_embeddings(len(tokenizer))")
        lines += ["model = PeftModel.from_pretrained(model, folder).eval()"]
    else:
        lines += [f"model = AutoModelForCausalLM.from_pretrained(folder, {options}).eval()"]
    text = repr(prompt) if prompt is not None else '"..."  # in the form of the training rows'
    lines += ["", f"prompt = {text}", 'inputs = tokenizer(prompt, return_tensors="pt").to(model.device)']
    if config.loss.has_head:
        lines[-2] = f"text = {text}" + ("  # and an answer behind it" if config.loss.is_preference else "")
        lines[-1] = lines[-1].replace("prompt", "text")
        if config.loss.head is Head.classify:
            said = "print(model.config.id2label[int(model(**inputs).logits.argmax())])"
            return markdown_block("\n".join([*lines, said]), "python")
        if config.loss.reads_whole_texts:
            said = "print(model(**inputs).logits[0].tolist())"
            return markdown_block("\n".join([*lines, said]), "python")
        return markdown_block("\n".join([*lines, "print(float(model(**inputs).logits))  # the reward"]), "python")
    lines += [f"output = model.generate(**inputs, max_new_tokens={config.generation.new_tokens})"]
    lines += ['print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))']
    return markdown_block("\n".join(lines), "python")


def _use_embeddings(config: Config, folder: Path, paths: dict[str, str], prompt: str | None) -> str:
    """Returns Python that makes vectors with sentence-transformers, which loads the unquantized base."""
    adapter = _relative(paths.get("adapter"), folder)
    texts = "[...]" if prompt is None else f"[{prompt!r}]"
    lines = ["from sentence_transformers import SentenceTransformer", ""]
    lines += [f"model = SentenceTransformer({_literal(adapter)})  # {SEEN}", f"print(model.encode({texts}).shape)"]
    return markdown_block("\n".join(lines), "python")


def _literal(text: str) -> str:
    """Returns a text in Python's quotes."""
    return json.dumps(text, ensure_ascii=False)


def _relative(path: str | None, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix() if path else "."


def _base_lines(base: str) -> list[str]:
    if base == "tiny":
        embedded = 'str(importlib.resources.files("qlora") / "demo" / "model")'
        return [f"base = {embedded}  # the model that qlora embeds"]
    return [f"base = {_literal(base)}"]


def _scaling_lines(scaling: Mapping[str, Any] | None, *, has_head: bool) -> list[str]:
    """Returns Python that stretches the rotary positions of the base as they were in training."""
    if scaling is None:
        return []
    kept = ROPE_TYPES[scaling[TYPE]].reads
    return [
        "config = AutoConfig.from_pretrained(base)",
        "rope = config.get_text_config().rope_parameters",
        'rope = rope.get("full_attention", rope)',
        f"scaling = {{name: rope[name] for name in {kept!r} if name in rope}} | {dict(scaling)!r}",
        "rope.clear()",
        "rope.update(scaling)",
        *(["config.num_labels = 1"] if has_head else []),
    ]


def _settings(
    config: Config, compute_dtype: str | None, unquantized: str | None, experts: str, mixture: str
) -> list[tuple[str, str]]:
    trainer, lora = config.trainer, config.lora
    precision = _base_precision(config, unquantized)
    rows = [("base weights", f"{precision}, computing in {_dtype(config, compute_dtype)}")]
    if (scaling := config.model.rope_scaling) is not None:
        rows.append(("rotary positions", ", ".join(f"{name} {value}" for name, value in scaling.items())))
    if mixture:
        rows.insert(0, ("base", mixture))
    if lora.enabled:
        name, _, sizes = describe_adapter(lora).partition(" ")
        reads_dropout = lora.other_kind is None or "dropout" in lora.other_kind.fields
        dropout = f"dropout={lora.dropout:g}" if reads_dropout else ""
        rows.append((name, ", ".join(filter(None, [sizes, dropout, f"on {describe_choice(lora)}"]))))
        if lora.modules_to_save:
            rows.append(("trained whole", ", ".join(lora.modules_to_save)))
        if experts:
            rows.append(("LoRA on routed experts", experts))
        if lora.start is not None:
            rows.append(("trained further from", lora.start))
        extras = [("rsLoRA", lora.use_rslora), ("DoRA", lora.use_dora)]
        extras.append((f"LoRA+ ratio {lora.loraplus_lr_ratio}", lora.loraplus_lr_ratio is not None))
        extras.append((f"drawn by {lora.init.value}", lora.init is not LoraInit.default))
        extras.append(("LoRA-FA", lora.freeze_a))
        if patterns := {**{f"r of {name}": rank for name, rank in lora.rank_pattern.items()},
                        **{f"alpha of {name}": alpha for name, alpha in lora.alpha_pattern.items()}}:  # fmt: skip
            rows.append(("sizes of their own", ", ".join(f"{name} = {value:g}" for name, value in patterns.items())))
        if any(used for _, used in extras):
            rows.append(("LoRA variant", ", ".join(name for name, used in extras if used)))
    length = plural(trainer.max_steps, "step") if trainer.max_steps else plural(trainer.num_train_epochs, "epoch")
    micro, accumulated = trainer.per_device_train_batch_size, trainer.gradient_accumulation_steps
    whole = config.data.train_on_source or config.data.format in ("text", "chosen")
    if config.data.streaming:
        sets = [f"{name} with probability {probability:g}"
                for name, probability in zip(config.data.mix, config.data.probabilities, strict=False)]  # fmt: skip
        rows.append(("rows", ", ".join([f"streamed, shuffled among {config.data.shuffle_buffer:,}", *sets])))
    rows += [
        ("length", length),
        ("batch", f"{plural(micro, 'row')} x {accumulated} accumulated, on each device"),
        ("optimizer", f"{trainer.optim}, beta2 {trainer.adam_beta2:g}, weight decay {trainer.weight_decay:g}"),
        ("learning rate", f"{trainer.learning_rate:g}, {trainer.lr_scheduler_type}{_warmup(trainer)}"),
        ("gradient norm", f"at most {trainer.max_grad_norm:g}" if trainer.max_grad_norm else "not clipped"),
        ("tokens a row", _row_limits(config.data)),
        ("loss on", "the whole text" if whole else "the answer"),
        ("seed", f"{config.seed} (rows are split by {config.data.split_seed})"),
    ]
    return rows


def _warmup(trainer: TrainerConfig) -> str:
    """Returns the warm-up as far as the schedule has one; below 1 it is a share of all steps."""
    steps = trainer.warmup_steps
    warms_up = trainer.lr_scheduler_type not in WITHOUT_WARMUP or trainer.optim in WARM_UP_THEMSELVES
    if not (steps and warms_up):
        return ""
    return (
        f", warm-up over {f'{steps:.3%}'.rstrip('%').rstrip('0').rstrip('.')} % of the steps"
        if steps < 1
        else (f", warm-up over {plural(steps, 'step')}")
    )


def _row_limits(data: DataConfig) -> str:
    limits = {"prompt": data.source_max_len, "answer": data.target_max_len, "row": data.max_length}
    return ", ".join(f"{name} up to {limit:,}" for name, limit in limits.items() if limit is not None) or "no limit"


def _limits(config: Config) -> str:
    lines = [
        "- One training with one seed: small differences between such runs are chance. Repeat it with other seeds "
        "before you compare.",
        f"- Measured only on rows like those of {markdown_code(config.data.name)}; nothing is known about other tasks.",
        "- Nobody examined the answers for safety, bias or truth; those of the base model remain.",
        "- The licence of the base model and the terms of the data apply to this model as well.",
    ]
    if config.model.name == "tiny":
        lines.append("- The embedded base is a toy of an invented world and knows nothing of the real one.")
    if config.lora.enabled and find_method(config.quantization).is_quantized:
        lines.append("- The numbers hold for the quantized base; on unquantized weights the adapter may do a bit "
                     "better or worse.")  # fmt: skip
    return "\n".join(lines)
