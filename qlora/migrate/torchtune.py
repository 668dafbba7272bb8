"""The YAML of torchtune."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from qlora.config.overrides import write_override
from qlora.errors import ConfigError
from qlora.migrate import hf_arguments, shared_rules
from qlora.migrate.torchtune_data import COMPONENT, choose_data
from qlora.migrate.translation import Dialect, Lost, Move, OnlyIf, Part, Pick, Rule, Same, Settings
from qlora.migrate.vocabulary import keys

MODULES = {"output_proj": "o_proj"}
MLP = ["gate_proj", "up_proj", "down_proj"]
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
SCHEDULES = {"get_cosine_schedule_with_warmup": "cosine"}
DEFAULTS: dict[str, Any] = {
    "model.lora_rank": 8,
    "model.lora_alpha": 16,
    "model.lora_dropout": 0.0,
    "model.lora_attn_modules": ["q_proj", "v_proj"],
    "batch_size": 1,
    "gradient_accumulation_steps": 1,
    "epochs": 1,
    "dtype": "bf16",
    "optimizer.lr": 1e-3,
    "optimizer.eps": 1e-8,
    "optimizer.betas": [0.9, 0.999],
    "lr_scheduler.num_warmup_steps": 0,
    "clip_grad_norm": 0,
    "enable_activation_checkpointing": False,
    "log_every_n_steps": 1,
    "shuffle": True,
}
"""Of its recipes, builders and optimizers, at 0.7."""
KEYS = keys(
    """
    ac_mode ac_option batch_size checkpointer clear_cache clip_grad_norm collate_fn compile cudnn_deterministic_mode
    custom_sharded_layers data_parallel_replicate_dim data_parallel_shard_dim dataset dataset_val device dtype
    enable_activation_checkpointing enable_activation_offloading enable_async_checkpointing enable_fp8_training
    epochs epochs_to_keep fp8_recipe_name fsdp_cpu_offload fsdp_reshard_after_forward fsdp_sharding_strategy
    gradient_accumulation_steps keep_last_n_checkpoints log_every_n_steps log_level log_peak_memory_stats loss
    low_cpu_ram lr_scheduler max_steps_per_epoch memory_efficient_fsdp_wrap metric_logger model optimizer
    optimizer_in_bwd output_dir profiler resume_from_checkpoint run_val_every_n_steps save_adapter_weights_only
    save_every_n_steps seed shuffle tensor_parallel_dim tensor_parallel_plan tokenizer batch_size_val
    """
)
"""The keys of the first level that its finetuning recipes read."""


def _model(settings: Settings) -> Iterator[Part]:
    component = str(settings.take(f"model.{COMPONENT}", ""))
    others = ("policy_model", f"teacher_model.{COMPONENT}", f"ref_checkpointer.{COMPONENT}", "policy_model._component_")
    if any(key in settings for key in others):
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
    yield from shared_rules.choose_model(str(PurePosixPath(str(folder))), "checkpointer.checkpoint_dir")


def _bits(settings: Settings) -> Iterator[Part]:
    name = str(settings.look(f"model.{COMPONENT}", "")).rpartition(".")[2]
    dtype = "fp32" if str(settings.take("dtype")) == "fp32" else "fp16" if settings.look("dtype") == "fp16" else "bf16"
    lora = name.startswith(("lora_", "qlora_", "dora_", "qdora_"))
    quantized = name.startswith(("qlora_", "qdora_")) or bool(settings.take("model.quantize_base"))
    yield from shared_rules.choose_quantization(4 if quantized else 16, dtype=dtype, lora=lora)
    modules = [MODULES.get(name, name) for name in settings.take("model.lora_attn_modules")]
    modules += MLP if settings.take("model.apply_lora_to_mlp") else []
    every = set(modules) == {"q_proj", "k_proj", "v_proj", "o_proj", *MLP}
    if not lora:
        return
    yield write_override("lora.target_modules", "all-linear" if every else modules)
    if settings.take("model.apply_lora_to_output"):
        yield Lost("the output layer has no adapter here", "model.apply_lora_to_output")
    if name.startswith(("dora_", "qdora_")) or settings.take("model.use_dora"):
        yield "lora.use_dora=true"
    if dtype == "bf16":
        yield "lora.dtype=bf16"


def _optimizer(settings: Settings) -> Iterator[Part]:
    name = str(settings.take(f"optimizer.{COMPONENT}"))
    fused = settings.take("optimizer.fused")
    if name in OPTIMIZERS:
        ours = OPTIMIZERS[name]
        yield f"trainer.optim={'adamw_torch_fused' if fused and ours == 'adamw_torch' else ours}"
    else:
        yield "trainer.optim=adamw_torch"
        yield Lost("no such optimizer here: adamw_torch is taken; see trainer.optim", f"optimizer.{COMPONENT}")
    decay = settings.take("optimizer.weight_decay")
    yield write_override("trainer.weight_decay", (0.01 if "Adam" in name else 0.0) if decay is None else decay)
    first, second = settings.take("optimizer.betas")
    yield f"trainer.adam_beta1={first}"
    yield f"trainer.adam_beta2={second}"
    schedule = str(settings.take(f"lr_scheduler.{COMPONENT}", "")).rpartition(".")[2]
    cycles = settings.take("lr_scheduler.num_cycles")
    if schedule in SCHEDULES:
        yield f"trainer.lr_scheduler_type={SCHEDULES[schedule]}"
        if cycles is not None:
            yield write_override("trainer.lr_scheduler_kwargs", {"num_cycles": cycles})
    else:
        yield "trainer.lr_scheduler_type=constant"
        if schedule:
            yield Lost("no such schedule here: a constant rate is taken; see trainer.lr_scheduler_type",
                       f"lr_scheduler.{COMPONENT}")  # fmt: skip
    yield write_override("trainer.warmup_steps", settings.take("lr_scheduler.num_warmup_steps"))
    yield write_override("trainer.max_grad_norm", settings.take("clip_grad_norm"))


def _steps(settings: Settings) -> Iterator[Part]:
    epochs, most = settings.take("epochs"), settings.take("max_steps_per_epoch")
    steps = int(most) * int(epochs) if isinstance(most, int) else None
    yield from shared_rules.choose_length(epochs, steps)
    saves = settings.take("save_every_n_steps")
    if saves is None and isinstance(most, int):
        saves = most
    if saves is not None:
        yield from shared_rules.every("trainer.save_steps", steps=saves)
    else:
        yield from shared_rules.every("trainer.save_steps", epochs=1 if epochs and epochs > 1 else None)
    yield "trainer.save_total_limit=null"
    yield from shared_rules.keep("epochs", best=False)


def _logger(settings: Settings) -> Iterator[Part]:
    name = str(settings.take(f"metric_logger.{COMPONENT}", "")).rpartition(".")[2]
    loggers = {"WandBLogger": "wandb", "TensorBoardLogger": "tensorboard", "MLFlowLogger": "mlflow"}
    project = settings.take("metric_logger.project")
    yield f"tracking={loggers.get(name, 'none')}"
    if name in loggers and project and name != "TensorBoardLogger":
        yield write_override("tracking.project", project)
    if name not in (*loggers, "DiskLogger", "StdoutLogger", ""):
        yield Lost("no such tracker here", f"metric_logger.{COMPONENT}")


RULES: dict[str, Rule] = {
    "batch_size": Move("trainer.per_device_train_batch_size"),
    "batch_size_val": Move("trainer.per_device_eval_batch_size"),
    "gradient_accumulation_steps": Move("trainer.gradient_accumulation_steps"),
    "optimizer.lr": Move("trainer.learning_rate"),
    "optimizer.eps": Move("trainer.adam_epsilon"),
    "optimizer.momentum": Lost("set trainer.optim_args.momentum"),
    "model.lora_rank": Move("lora.r"),
    "model.lora_alpha": Move("lora.alpha"),
    "model.lora_dropout": Move("lora.dropout"),
    "seed": Move("seed"),
    "output_dir": Move("hydra.run.dir"),
    "device": Move("device", {"cuda": "auto", "cpu": "cpu", "xpu": "xpu"}),
    "compile": Pick({True: ("trainer.compile=true",), False: ()}),
    "enable_activation_checkpointing": Move("trainer.gradient_checkpointing"),
    "enable_activation_offloading": Same(shared_rules.SPEED),
    "log_every_n_steps": Move("trainer.logging_steps"),
    "resume_from_checkpoint": Lost(shared_rules.NO_RESUME),
    "checkpointer.recipe_checkpoint": Lost(shared_rules.NO_RESUME),
    "checkpointer.adapter_checkpoint": Lost("training begins with a fresh adapter"),
    "checkpointer.revision": Move("model.revision"),
    "optimizer_in_bwd": OnlyIf((False,), "gradients are kept until the optimizer's step"),
    "shuffle": OnlyIf((True,), "rows are always drawn in random order"),
    "tensor_parallel_dim": OnlyIf((1,), shared_rules.ONE_DEVICE),
    "fsdp_cpu_offload": OnlyIf((False,), shared_rules.SHARDED),
    "profiler.enabled": Pick({True: ("trainer.profile=true",), False: ()}),
    "save_adapter_weights_only": Same("a checkpoint holds the adapter alone"),
    "enable_fp8_training": OnlyIf((False,), "set quantization.compute=fp8 with a base of 4 bits"),
    "collate_fn": Lost("batches are collated by the trainer"),
    **dict.fromkeys(("data_parallel_shard_dim", "data_parallel_replicate_dim"), Lost(shared_rules.SHARDED)),
    **dict.fromkeys(("log_peak_memory_stats", "log_level", "low_cpu_ram", "fsdp_reshard_after_forward",
                     "ac_mode", "ac_option", "enable_async_checkpointing", "fsdp_sharding_strategy",
                     "memory_efficient_fsdp_wrap", "custom_sharded_layers",
                     "cudnn_deterministic_mode", "clear_cache", "keep_last_n_checkpoints", "epochs_to_keep"), Same()),
}  # fmt: skip
TORCHTUNE = Dialect(
    name="torchtune",
    version="0.7",
    model_key=f"model.{COMPONENT}",
    keys=KEYS,
    defaults=DEFAULTS,
    fixed=hf_arguments.FIXED,
    rules=RULES,
    joints=(_model, _bits, _optimizer, _steps, choose_data, _logger),
    prefixes={
        "profiler.": Same(),
        "checkpointer.": Same("weights are found in the folder"),
        "metric_logger.": Same(),
        "tokenizer.": Same("the base's own tokenizer is taken, with its files"),
        "loss.": Same(shared_rules.SPEED),
        "dataset.": Lost("there is no such option here"),
        "dataset_val.": Lost("there is no such option here"),
        "model.": Lost("there is no such option here"),
        "optimizer.": Lost("there is no such option here"),
        "lr_scheduler.": Lost("there is no such option here"),
    },
)
