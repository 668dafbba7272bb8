"""The arguments of transformers' trainer, which qlora.py, LLaMA-Factory, TRL and ms-swift hand on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from qlora.config.overrides import write_override
from qlora.migrate import shared_rules
from qlora.migrate.translation import Lost, Move, OnlyIf, Part, Pick, Rule, Same, Settings, read_number

VERSION = "5.23"
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-5,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "optim": "adamw_torch_fused",  # with torch 2.8 and later
    "gradient_checkpointing": False,
    "logging_steps": 500,
    "eval_strategy": "no",
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": None,
    "seed": 42,
    "report_to": "none",
    "dataloader_num_workers": 0,
}
"""What `TrainingArguments` of this version does."""
FIXED = (
    *("recipe=none", "evaluation=loss", "task.predict=false", "callbacks=none", "loss=sft"),
    *("trainer.group_by_length=false", "trainer.memory_budget=null", "data.source_max_len=null"),
    *("data.target_max_len=null", "data.packing=false", "data.train_on=assistant"),
    *("data.on_too_long=truncate", "data.eval_dataset_size=1"),
)
"""What no tool that trains with transformers does, as overrides."""


def schedule(settings: Settings) -> Iterator[Part]:
    """The length, the warm-up, the optimizer, and when is measured and saved."""
    yield from shared_rules.choose_length(settings.take("num_train_epochs"), settings.take("max_steps"))
    ratio, steps = settings.take("warmup_ratio"), settings.take("warmup_steps")
    yield write_override("trainer.warmup_steps", steps or ratio or 0)
    yield from shared_rules.choose_optimizer(str(settings.take("optim")), "optim")
    yield from shared_rules.choose_schedule(str(settings.take("lr_scheduler_type")), "lr_scheduler_type")
    for name in ("optim_args", "lr_scheduler_kwargs"):
        yield write_override(f"trainer.{name}", read_mapping(settings.take(name)))
    yield write_override("trainer.save_total_limit", settings.take("save_total_limit"))
    for kind, strategy in (("eval", evaluates(settings)), ("save", str(settings.take("save_strategy")))):
        yield from every(kind, strategy, settings, settings.look("logging_steps"))
    best, metric = settings.take("load_best_model_at_end"), settings.look("metric_for_best_model")
    yield from shared_rules.keep("load_best_model_at_end", best=bool(best), metric=metric)
    yield from shared_rules.choose_trackers(settings.take("report_to"), "report_to")
    yield from shared_rules.choose_name(settings.take("run_name"))
    if settings.take("train_sampling_strategy", "random") == "sequential":
        yield Lost("the order of rows is drawn from seed", "train_sampling_strategy")
    elif settings.look("train_sampling_strategy") == "group_by_length" or settings.look("group_by_length"):
        yield "trainer.group_by_length=true"
    settings.read.add("group_by_length")


def evaluates(settings: Settings) -> str:
    """Returns when is measured during training: `no`, `steps` or `epoch`."""
    default = settings.take("eval_strategy")
    return str(default if "eval_strategy" in settings else settings.take("evaluation_strategy", default))


def every(kind: str, strategy: str, settings: Settings, unset: Any) -> Iterator[Part]:
    """Yields how often is measured or saved, `unset` where no number says; below 1 it is a share of all steps."""
    key, ours = f"{kind}_steps", f"trainer.{kind}_steps"
    number = settings.take(key, unset)
    if strategy == "epoch":
        yield from shared_rules.every(ours, epochs=1)
    elif strategy == "steps" and number < 1:
        length = {"epochs": settings.look("num_train_epochs"), "steps": settings.look("max_steps")}
        yield from shared_rules.every_share(ours, number, **length)
    else:
        yield from shared_rules.every(ours, steps=number if strategy == "steps" else None)
        if strategy not in ("steps", "no"):
            yield Lost(f"no such {kind}_strategy here: set {ours}=N", f"{kind}_strategy")


def read_mapping(value: Any) -> Any:
    """Returns a mapping that may be written as JSON, or as `a=1,b=2`."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        return json.loads(value)
    pairs = (pair.partition("=")[::2] for pair in value.replace(" ", "").split(",") if pair)
    return {name: json.loads(text.lower()) if text.lower() in ("true", "false") else read_number(text)
            for name, text in pairs}  # fmt: skip


MOVED = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "learning_rate"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "logging_steps"),
    *("dataloader_num_workers", "gradient_checkpointing"),
)
RULES: dict[str, Rule] = {
    **{name: Move(f"trainer.{name}") for name in MOVED},
    "seed": Move("seed"),
    "data_seed": Move("data.split_seed"),
    "output_dir": Move("hydra.run.dir"),
    "project": Move("tracking.project"),
    "full_determinism": Pick({True: ("trainer.deterministic=true",), False: ()}),
    "use_cpu": Pick({True: ("device=cpu",), False: ()}),
    "no_cuda": Pick({True: ("device=cpu",), False: ()}),
    "torch_compile": Pick({True: ("trainer.compile=true",), False: ()}),
    "resume_from_checkpoint": Lost(shared_rules.NO_RESUME),
    "neftune_noise_alpha": Lost(shared_rules.NO_NOISE),
    "label_smoothing_factor": Lost("the loss has no label smoothing here"),
    "average_tokens_across_devices": OnlyIf((True,), "gradients are averaged over all tokens of a step here"),
    "auto_find_batch_size": Lost("batches are never cut by themselves; trainer.memory_budget=auto saves memory"),
    "dataloader_drop_last": Lost("the last, smaller batch is trained too"),
    "eval_delay": Lost("measuring begins at once"),
    "greater_is_better": OnlyIf((False,), "the best state is that of the lowest held-out loss"),
    "metric_for_best_model": OnlyIf(("loss", "eval_loss"), "the best state is that of the lowest held-out loss"),
    "optim_target_modules": OnlyIf(
        ("all-linear", "all_linear"), "every matrix is projected but embeddings and the output matrix"
    ),
    "deepspeed": Lost(shared_rules.NO_DEEPSPEED),
    **dict.fromkeys(("fsdp", "fsdp_config"), Lost(shared_rules.SHARDED)),
    "parallelism_config": Lost(shared_rules.ONE_DEVICE),
    "local_rank": OnlyIf((0, -1), shared_rules.ONE_PROCESS),
    **dict.fromkeys(("push_to_hub", "hub_model_id", "push_to_hub_model_id"), Lost(shared_rules.PUSH)),
    **dict.fromkeys(("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
                    Lost("set by the environment of Trackio here")),
    **dict.fromkeys(("hub_token", "push_to_hub_token", "use_auth_token"), Same(shared_rules.REMOTE)),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config", "tf32", "torch_compile_backend", "torch_compile_mode",
                     "torchdynamo", "activation_checkpointing", "activation_checkpointing_kwargs"),
                    Same(shared_rules.SPEED)),
    **dict.fromkeys(
        ("accelerator_config", "batch_eval_metrics", "bf16_full_eval", "dataloader_in_order",
         "dataloader_multiprocessing_context", "dataloader_persistent_workers", "dataloader_pin_memory",
         "dataloader_prefetch_factor", "ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb",
         "ddp_find_unused_parameters", "ddp_static_graph", "ddp_timeout", "debug", "disable_tqdm", "dispatch_batches",
         "do_eval", "do_train", "enable_jit_checkpoint", "eval_accumulation_steps", "eval_do_concat_batches",
         "eval_on_start", "eval_use_gather_object", "fp16_backend", "fp16_full_eval", "fp16_opt_level",
         "generation_config", "generation_max_length", "generation_num_beams", "gradient_checkpointing_kwargs",
         "half_precision_backend", "hub_always_push", "hub_private_repo", "hub_revision", "hub_strategy",
         "ignore_data_skip", "include_for_metrics", "include_inputs_for_metrics", "include_num_input_tokens_seen",
         "include_tokens_per_second", "jit_mode_eval", "label_names", "length_column_name", "log_level",
         "log_level_replica", "log_on_each_node", "logging_dir", "logging_first_step", "logging_nan_inf_filter",
         "logging_strategy", "low_cpu_mem_usage", "overwrite_output_dir", "past_index", "predict_with_generate",
         "prediction_loss_only", "ray_scope", "remove_unused_columns", "restore_callback_states_from_checkpoint",
         "save_on_each_node", "save_only_model", "save_safetensors", "skip_memory_metrics", "sortish_sampler",
         "split_batches", "torch_empty_cache_steps", "tpu_num_cores", "use_cache", "use_ipex",
         "use_legacy_prediction_loop", "use_mps_device", "xpu_backend"),
        Same(),
    ),
}  # fmt: skip
"""Those that no joint reads."""
