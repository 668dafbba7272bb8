"""The YAML of LLaMA-Factory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora.config.overrides import write_override
from qlora.errors import ConfigError, DataError
from qlora.migrate import shared_rules
from qlora.migrate.translation import Dialect, Lost, Move, OnlyIf, Part, Pick, Rule, Same, Settings

STAGES = {"sft": (), "pt": ("data.format=text", "data.train_on=all")}
CHAT = "qlora.data.formats.as_chat:from_alpaca"
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}


def _model(settings: Settings) -> Iterator[Part]:
    if (stage := str(settings.take("stage", "sft"))) not in STAGES:
        raise ConfigError(
            f"from: stage={stage} trains by preferences or rewards; here models are trained on answers alone (sft, pt)"
        )
    yield from shared_rules.choose_model(str(settings.take("model_name_or_path", "unset")), "model_name_or_path")


def _bits(settings: Settings) -> Iterator[Part]:
    kind = str(settings.take("finetuning_type", "lora"))
    if kind not in ("lora", "full"):
        yield Lost("an adapter is trained in its place: here are LoRA and all weights (lora=none)", "finetuning_type")
    bits = settings.take("quantization_bit")
    if bits not in (None, 4, 8):
        yield Lost("bitsandbytes has 4 and 8 bits; 4 are taken", "quantization_bit")
    method = settings.take("quantization_method", "bitsandbytes")
    if method not in ("bitsandbytes", "bnb"):
        yield Lost("bases are quantized by bitsandbytes here", "quantization_method")
    double = settings.get("double_quantization", True) is not False
    settings.read.add("double_quantization")
    number = 16 if bits is None else 8 if bits == 8 else 4
    is_fp32 = number == 16 and not any(settings.get(name) for name in ("bf16", "fp16", "pure_bf16"))
    kind_of = str(settings.take("quantization_type", "nf4"))
    yield from shared_rules.choose_quantization(32 if is_fp32 else number, kind_of, double, lora=kind != "full")
    for name, ours in (("bf16", "bf16"), ("pure_bf16", "bf16"), ("fp16", "fp16")):
        if settings.take(name) and not is_fp32:
            yield f"quantization.compute_dtype={ours}"


def _lora(settings: Settings) -> Iterator[Part]:
    r = int(settings.take("lora_rank", 8))
    yield f"lora.r={r}"
    yield write_override("lora.alpha", settings.take("lora_alpha", 2 * r))
    target = settings.take("lora_target", "all")
    names = target if isinstance(target, list) else [name.strip() for name in str(target).split(",")]
    yield write_override("lora.target_modules", "all-linear" if names == ["all"] else names)
    if settings.take("pissa_init"):
        if settings.get("quantization_bit"):
            yield Lost("needs 16-bit weights here too; lora.init=loftq or eva start well on 4-bit ones", "pissa_init")
        else:
            yield "lora.init=pissa"


def _data(settings: Settings) -> Iterator[Part]:
    names = settings.take("dataset", [])
    names = names if isinstance(names, list) else [name.strip() for name in str(names).split(",") if name.strip()]
    if not names:
        yield Lost("no rows are named: give data.path=FILE", "dataset")
        names = ["rows"]
    folder = Path(str(settings.take("dataset_dir", "data")))
    known = _registry(folder, settings)
    parts, missing = [], []
    for name in names:
        parts.append(_part(name, known.get(name), folder))
        missing += [] if name in known else [name]
    yield from shared_rules.mix(parts)
    if missing:
        yield Lost(f"{', '.join(missing)} stand in no {folder}/dataset_info.json here: give their files", "dataset")
    template = settings.take("template")
    if template in shared_rules.TEMPLATES:
        yield f"data.template={shared_rules.TEMPLATES[template]}"
    elif template is not None:
        yield Lost("no such template here: the tokenizer's own is used (data.template=auto)", "template")
    yield write_override("data.max_length", int(settings.take("cutoff_len", 2048)))
    if settings.take("packing") or settings.take("neat_packing"):
        yield "data.packing=true"
        yield "trainer.group_by_length=false"


def _registry(folder: Path, settings: Settings) -> dict[str, Any]:
    """Returns `dataset_info.json`, from below the working directory or beside the YAML."""
    for parent in (folder, Path(str(settings.get("__folder__", "."))) / folder):
        file = parent / "dataset_info.json"
        if file.is_file():
            try:
                sets = json.loads(file.read_text(encoding="utf-8-sig"))
            except ValueError as error:
                raise DataError(f"from: {file} is not valid JSON ({error})") from error
            return {
                name: {**entry, "__folder__": str(parent)} for name, entry in sets.items() if isinstance(entry, dict)
            }
    return {}


def _part(name: str, entry: dict[str, Any] | None, folder: Path) -> dict[str, Any]:
    entry = entry or {}
    path = entry.get("hf_hub_url") or str(
        Path(entry.get("__folder__", folder)) / entry.get("file_name", f"{name}.json")
    )
    part: dict[str, Any] = {"path": path}
    for theirs, ours in (("subset", "subset"), ("split", "split")):
        if entry.get(theirs):
            part[ours] = entry[theirs]
    if entry.get("formatting") == "sharegpt":
        openai = (entry.get("tags") or {}).get("role_tag") == "role"
        part["format"] = "messages" if openai else "conversations"
        column = (entry.get("columns") or {}).get("messages")
        if column and column != part["format"]:
            part["columns"] = {part["format"]: column}
        return part
    part["format"] = CHAT
    columns = {COLUMNS.get(role, role): column for role, column in (entry.get("columns") or {}).items() if column}
    if columns := {role: column for role, column in columns.items() if role != column}:
        part["columns"] = columns
    return part


def _stage(settings: Settings) -> Iterator[Part]:
    yield from STAGES.get(str(settings.get("stage", "sft")), ())


def _schedule(settings: Settings) -> Iterator[Part]:
    strategy = str(settings.take("eval_strategy") or settings.take("evaluation_strategy", "no"))
    settings.read |= {"eval_strategy", "evaluation_strategy"}
    size, eval_set = settings.take("val_size", 0), settings.take("eval_dataset")
    steps = settings.take("eval_steps", settings.get("logging_steps", 500)) if strategy == "steps" else None
    yield write_override("trainer.eval_steps", steps)
    if strategy == "epoch":
        yield Lost(shared_rules.NO_STEPS.format(key="trainer.eval_steps"), "eval_strategy")
    if eval_set:
        yield Lost("give its file: data.eval_path=FILE", "eval_dataset")
    yield from shared_rules.hold_out(size, "val_size")
    saves = str(settings.take("save_strategy", "steps"))
    yield write_override("trainer.save_steps", int(settings.take("save_steps", 500)) if saves == "steps" else None)
    if saves == "epoch":
        yield Lost(shared_rules.NO_STEPS.format(key="trainer.save_steps"), "save_strategy")
    yield from shared_rules.choose_length(settings.take("num_train_epochs", 3), settings.take("max_steps", -1))
    yield from shared_rules.choose_warmup(settings)


def _optimizer(settings: Settings) -> Iterator[Part]:
    name = str(settings.take("optim", "adamw_torch"))
    for flag in ("use_galore", "use_apollo", "use_badam", "use_muon", "use_adam_mini"):
        if settings.take(flag):
            yield Lost("needs settings that trainer.optim has not; adamw_torch is taken", flag)
    yield from shared_rules.choose_optimizer(name, "optim")
    yield from shared_rules.choose_schedule(str(settings.take("lr_scheduler_type", "linear")), "lr_scheduler_type")


def _task(settings: Settings) -> Iterator[Part]:
    trains, predicts = settings.take("do_train"), settings.take("do_predict")
    settings.read |= {"do_eval", "predict_with_generate"}
    adapter = settings.take("adapter_name_or_path")
    if trains or not predicts:
        if adapter:
            yield Lost(
                "training begins with a fresh adapter; merge it first (task=merge), and train on that",
                "adapter_name_or_path",
            )
        return
    yield "task=predict"
    yield write_override("adapter", adapter or "none")


SAME_NAMES = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "learning_rate"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "logging_steps", "save_total_limit"),
    *("dataloader_num_workers", "lr_scheduler_kwargs"),
)
RULES: dict[str, Rule] = {
    **{name: Move(f"trainer.{name}") for name in SAME_NAMES},
    **{name: Move(f"generation.{name}") for name in ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k")},
    "trust_remote_code": Move("model.trust_remote_code"),
    "model_revision": Move("model.revision"),
    "cache_dir": Move("model.cache_dir"),
    "flash_attn": Pick(
        {"auto": (), "disabled": ("model.attn_implementation=eager",), "sdpa": ("model.attn_implementation=sdpa",),
         "fa2": ("model.attn_implementation=flash_attention_2",)}
    ),
    "lora_dropout": Move("lora.dropout"),
    "use_rslora": Move("lora.use_rslora"),
    "use_dora": Move("lora.use_dora"),
    "loraplus_lr_ratio": Move("lora.loraplus_lr_ratio"),
    "new_special_tokens": Lost("give them as a list: model.new_tokens=[...]"),
    "train_on_prompt": Pick({True: ("data.train_on=all",), False: ()}),
    "mask_history": Pick({True: ("data.train_on=last",), False: ()}),
    "max_samples": Move("data.max_train_samples"),
    "preprocessing_num_workers": Move("data.num_proc"),
    "group_by_length": Move("trainer.group_by_length"),
    "disable_gradient_checkpointing": Pick({True: ("trainer.gradient_checkpointing=false",), False: ()}),
    "gradient_checkpointing": Move("trainer.gradient_checkpointing"),
    "seed": Move("seed"),
    "data_seed": Move("data.split_seed"),
    "run_name": Move("name"),
    "output_dir": Move("hydra.run.dir"),
    "report_to": Move("tracking", shared_rules.TRACKERS),
    "mix_strategy": OnlyIf(("concat",), "sets are joined row by row; give each a weight in data.mix.NAME.weight"),
    "interleave_probs": Lost("give each set a weight in data.mix.NAME.weight: 2 shows its rows twice in a pass"),
    "streaming": OnlyIf((False,), "rows are kept in a cache on disk and need not fit into memory"),
    "enable_liger_kernel": Same(shared_rules.SPEED),
    "use_unsloth": Same(shared_rules.SPEED),
    "use_unsloth_gc": Same(shared_rules.SPEED),
    "deepspeed": Lost("DeepSpeed is not used here"),
    "rope_scaling": Lost("set it in the model's own config.json"),
    "resize_vocab": Same("the embedding grows for model.new_tokens by itself"),
    "upcast_layernorm": Same("norms compute in 32 bits under autocast"),
    "neftune_noise_alpha": Lost("no noise is added to embeddings here"),
    "resume_from_checkpoint": Same("a run resumes in its folder by itself"),
    "hub_model_id": Lost("upload a finished run with task=push repo=OWNER/NAME"),
    "push_to_hub": Lost("upload a finished run with task=push repo=OWNER/NAME"),
    "hub_private_repo": Same("task.private is true unless it is set"),
    **dict.fromkeys(("hf_hub_token", "ms_hub_token"), Same(shared_rules.REMOTE)),
    **dict.fromkeys(("image_max_pixels", "video_max_pixels", "freeze_vision_tower"), Lost("only text is trained here")),
    **dict.fromkeys(("tokenized_path", "eval_num_beams", "additional_target", "freeze_trainable_layers"),
                    Lost("there is no such option here")),
    **dict.fromkeys(
        (*shared_rules.WITHOUT_EFFECT,
         "overwrite_cache", "overwrite_output_dir", "plot_loss", "save_only_model", "pissa_iter", "pissa_convert",
         "quantization_device_map", "logging_dir", "use_fast_tokenizer",
         "include_num_input_tokens_seen", "log_level", "__folder__", "per_device_predict_batch_size"),
        Same(),
    ),
}  # fmt: skip
FACTORY = Dialect(
    "LLaMA-Factory",
    (
        *("trainer.per_device_train_batch_size=8", "trainer.gradient_accumulation_steps=1"),
        "trainer.learning_rate=5e-5",
        *("trainer.max_grad_norm=1.0", "trainer.group_by_length=false", "trainer.logging_steps=500", "seed=42"),
        *("trainer.save_total_limit=null", "lora.dropout=0.0", "evaluation=loss", "data.source_max_len=null"),
        *("data.target_max_len=null", "trainer.gradient_checkpointing=true"),
    ),
    RULES,
    (_model, _bits, _lora, _data, _stage, _schedule, _optimizer, _task),
    {prefix: Lost("there is no such option here") for prefix in ("galore_", "apollo_", "badam_", "freeze_", "ray_",
     "fp8", "oft_", "pref_", "swanlab_", "kt_", "vllm_", "infer_")},
)  # fmt: skip
