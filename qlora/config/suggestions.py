"""What an unknown key, option or flag was meant to be, names from other tools included."""

from __future__ import annotations

from collections.abc import Sequence

from qlora.config.fields import config_keys
from qlora.config.options import group_names
from qlora.errors import ConfigError, did_you_mean, mean, suggest

# Hydra's flags that a user meets.
FLAGS = (
    *("--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun", "--info"),
    *("--shell-completion", "--config-dir", "--config-name", "--experimental-rerun"),
)

# The flags of the original qlora.py, and ours: an option (`lora.r`) or a choice (`lora=none`).
ORIGINAL_FLAGS = {
    "model_name_or_path": "model.name",
    "trust_remote_code": "model.trust_remote_code",
    "cache_dir": "model.cache_dir",
    "max_memory_MB": "model.max_memory",
    "bits": "quantization.bits",
    "quant_type": "quantization.quant_type",
    "double_quant": "quantization.double_quant",
    "bf16": "quantization.compute_dtype=bf16",
    "fp16": "quantization.compute_dtype=fp16",
    "full_finetune": "lora=none",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "dataset": "data",
    "dataset_format": "data.format",
    "source_max_len": "data.source_max_len",
    "target_max_len": "data.target_max_len",
    "train_on_source": "data.train_on_source",
    "eval_dataset_size": "data.eval_dataset_size",
    "max_train_samples": "data.max_train_samples",
    "max_eval_samples": "data.max_eval_samples",
    "data_seed": "data.split_seed",
    "do_train": "task.train",
    "do_eval": "task.evaluate",
    "do_predict": "task.predict",
    "predict_with_generate": "task.predict",
    "adam8bit": "trainer.optim=paged_adamw_8bit",
    "optim": "trainer.optim",
    "max_steps": "trainer.max_steps",
    "num_train_epochs": "trainer.num_train_epochs",
    "per_device_train_batch_size": "trainer.per_device_train_batch_size",
    "per_device_eval_batch_size": "trainer.per_device_eval_batch_size",
    "gradient_accumulation_steps": "trainer.gradient_accumulation_steps",
    "learning_rate": "trainer.learning_rate",
    "lr_scheduler_type": "trainer.lr_scheduler_type",
    "warmup_ratio": "trainer.warmup_steps",
    "weight_decay": "trainer.weight_decay",
    "adam_beta2": "trainer.adam_beta2",
    "max_grad_norm": "trainer.max_grad_norm",
    "gradient_checkpointing": "trainer.gradient_checkpointing",
    "group_by_length": "trainer.group_by_length",
    "logging_steps": "trainer.logging_steps",
    "eval_steps": "trainer.eval_steps",
    "save_steps": "trainer.save_steps",
    "save_total_limit": "trainer.save_total_limit",
    "dataloader_num_workers": "trainer.dataloader_num_workers",
    "max_new_tokens": "generation.max_new_tokens",
    "min_new_tokens": "generation.min_new_tokens",
    "do_sample": "generation.do_sample",
    "num_beams": "generation.num_beams",
    "num_beam_groups": "generation.num_beam_groups",
    "penalty_alpha": "generation.penalty_alpha",
    "use_cache": "generation.use_cache",
    "temperature": "generation.temperature",
    "top_k": "generation.top_k",
    "top_p": "generation.top_p",
    "typical_p": "generation.typical_p",
    "diversity_penalty": "generation.diversity_penalty",
    "repetition_penalty": "generation.repetition_penalty",
    "length_penalty": "generation.length_penalty",
    "no_repeat_ngram_size": "generation.no_repeat_ngram_size",
    "output_dir": "hydra.run.dir",
    "run_name": "name",
    "report_to": "tracking",
    "seed": "seed",
}

# Names of the original, of PEFT and of transformers, and ours.
FOREIGN_NAMES = {
    **{flag: ours for flag, ours in ORIGINAL_FLAGS.items() if flag != ours},
    "lora.rank": "lora.r",
    "lora.lora_r": "lora.r",
    "lora.lora_alpha": "lora.alpha",
    "lora.lora_dropout": "lora.dropout",
    "lora.modules": "lora.target_modules",
    "lora_modules": "lora.target_modules",
    "quantization.dtype": "quantization.compute_dtype",
    "data.dataset": "data.path",
    "lr": "trainer.learning_rate",
    "trainer.lr": "trainer.learning_rate",
    "trainer.steps": "trainer.max_steps",
    "trainer.epochs": "trainer.num_train_epochs",
    "trainer.batch_size": "trainer.per_device_train_batch_size",
    "trainer.warmup_ratio": "trainer.warmup_steps",
    "trainer.bf16": "quantization.compute_dtype=bf16",
    "trainer.fp16": "quantization.compute_dtype=fp16",
    "trainer.seed": "seed",
    "trainer.report_to": "tracking",
    "trainer.output_dir": "hydra.run.dir",
}


def unknown_key(key: str, where: str = "") -> ConfigError:
    """Returns the error for a key that does not exist, with the nearest that do."""
    group = key.split(".")[0]
    page = f"qlora --help {group}" if group in group_names() else "qlora --help"
    return ConfigError(f"unknown key {key!r}{where}{mean(nearest_keys(key))}; see `{page}`")


def unknown_flag(flag: str) -> ConfigError:
    """Returns the error for an unknown flag, e.g. one of the original script."""
    name = flag.lstrip("-").split("=")[0].replace("-", "_")
    near = [*suggest(flag.split("=")[0], FLAGS), *([ORIGINAL_FLAGS[name]] if name in ORIGINAL_FLAGS else [])]
    near = near or nearest_keys(name)
    return ConfigError(
        f"unknown flag {flag.split('=')[0]}{mean(near)}; options are written KEY=VALUE without dashes, "
        "see `qlora --help`"
    )


def unknown_option(group: str, choice: str, options: Sequence[str], where: str = "") -> ConfigError:
    """Returns the error for an option that a group does not have."""
    return ConfigError(
        f"{group}={choice}{where}: {group} has no such option{did_you_mean(choice, options)}; "
        f"choose one of {', '.join(sorted(options))}"
    )


def nearest_keys(key: str) -> list[str]:
    """Returns what `key` was meant to be: a foreign name's translation, else the nearest names level by level."""
    if key in FOREIGN_NAMES:
        return [FOREIGN_NAMES[key]]
    keys = [*config_keys(), *group_names()]
    matches = [""]
    for word in key.split("."):
        matches = [near for prefix in matches for near in _nearest_children(prefix, word, keys)]
    if matches:
        return matches[:3]
    last = key.rpartition(".")[2]
    if same := [name for name in keys if name.rpartition(".")[2] == last]:
        return same[:3]
    names = {name.rpartition(".")[2]: name for name in reversed(keys)} | FOREIGN_NAMES
    return list(dict.fromkeys(names[name] for name in suggest(last, names)))


def _nearest_children(prefix: str, word: str, keys: list[str]) -> list[str]:
    """Returns the keys right below `prefix` that are `word`, or nearest to it; foreign names count as ours."""
    children = {name.rpartition(".")[2]: name for name in keys if name.rpartition(".")[0] == prefix}
    if word in children:
        return [children[word]]
    for name, ours in FOREIGN_NAMES.items():
        if name.rpartition(".")[0] == prefix and prefix:
            children.setdefault(name.rpartition(".")[2], ours)
    return list(dict.fromkeys(children[name] for name in suggest(word, children)))
