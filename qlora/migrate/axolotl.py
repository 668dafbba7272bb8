"""The YAML of Axolotl."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlora.config.overrides import write_override
from qlora.errors import ConfigError
from qlora.migrate import hf_arguments, preferences, shared_rules
from qlora.migrate.axolotl_data import choose_data
from qlora.migrate.translation import Dialect, Lost, Move, OnlyIf, Part, Pick, Rule, Same, Settings
from qlora.migrate.vocabulary import AXOLOTL_KEYS

DEFAULTS: dict[str, Any] = {
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-5,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "num_epochs": 1.0,
    "optimizer": "adamw_torch_fused",
    "lr_scheduler": "cosine",
    "logging_steps": 1,  # up to 10 in a long training
    "save_strategy": "epoch",
    "save_total_limit": 4,
    "seed": 42,
    "gradient_checkpointing": False,
    "dataloader_num_workers": 0,
    "bf16": "auto",
    "lora_dropout": 0.0,
    "sequence_len": 512,
    "excess_length_strategy": "drop",
    "train_on_inputs": False,
    "val_set_size": 0.0,
}
"""Of the schema, and of the trainer where that leaves a key unset."""
FIXED = tuple(text for text in hf_arguments.FIXED if not text.startswith("data.on_too_long"))
WARMUP_SHARE, MOST_WARMUP = 0.03, 100
"""The warm-up of a config that names none: a fraction of all steps, and the most of them."""


def _model(settings: Settings) -> Iterator[Part]:
    if settings.take("process_reward_model"):
        raise ConfigError("from: process_reward_model=true scores steps of answers; loss=reward scores whole answers")
    if (method := settings.look("rl")) and str(method) not in METHODS:
        raise ConfigError(f"from: rl={method} {preferences.GENERATES}")
    base = str(settings.take("base_model", "unset"))
    yield from shared_rules.choose_model(base, "base_model")
    yield from shared_rules.choose_revision(settings.take("revision_of_model"))
    if (tokenizer := settings.take("tokenizer_config")) not in (None, base):
        yield write_override("model.tokenizer", tokenizer)


def _bits(settings: Settings) -> Iterator[Part]:
    adapter, four, eight = settings.take("adapter"), settings.take("load_in_4bit"), settings.take("load_in_8bit")
    if adapter not in (None, "lora", "qlora"):
        yield Lost("a LoRA adapter is trained in its place", "adapter")
    more = dict(settings.take("bnb_config_kwargs", {}))
    bits = 4 if four or adapter == "qlora" else 8 if eight else 16
    kind, double = more.pop("bnb_4bit_quant_type", "nf4"), more.pop("bnb_4bit_use_double_quant", True)
    if more:
        yield Lost(f"{', '.join(more)} cannot be set here", "bnb_config_kwargs")
    yield from shared_rules.choose_quantization(
        bits, kind, double=double, dtype=_dtype(settings), lora=adapter is not None
    )


def _dtype(settings: Settings) -> str:
    """Returns the precision of matmuls, as Axolotl resolves its five switches for it."""
    bf16, fp16 = settings.take("bf16"), settings.take("fp16")
    other_bf16, other_fp16 = settings.take("bfloat16"), settings.take("float16")
    settings.read.add("float32")
    if fp16 and bf16 in ("auto", False):
        return "fp16"
    if bf16 == "auto":
        return "auto"
    if bf16 or other_bf16:
        return "bf16"
    return "fp16" if fp16 or other_fp16 or settings.look("load_in_8bit") else "fp32"


def _lora(settings: Settings) -> Iterator[Part]:
    named, linear = settings.take("lora_target_modules"), settings.take("lora_target_linear")
    whole = settings.take("lora_modules_to_save")
    if settings.look("adapter") is None:
        return
    if linear and named not in (None, "all-linear", ["all-linear"]):
        yield Lost("all linear layers are adapted beside it (lora_target_linear)", "lora_target_modules")
    yield from shared_rules.choose_targets("all-linear" if linear else named or "all-linear")
    if not (linear or named):
        yield Lost("no module is named: all linear layers are adapted here", "lora_target_modules")
    for key, ours, unset in (("lora_r", "lora.r", 8), ("lora_alpha", "lora.alpha", 8)):
        value = settings.take(key)
        yield write_override(ours, unset if value is None else value)
        if value is None:
            yield Lost(f"Axolotl does not start without it: PEFT's {unset} is taken", key)
    for key, ours in (("lora_rank_pattern", "lora.rank_pattern"), ("lora_alpha_pattern", "lora.alpha_pattern")):
        yield from shared_rules.choose_pattern(settings.take(key), ours, key)
    if (layers := settings.take("peft_layers_to_transform")) is not None:
        yield write_override("lora.layers", layers)
    if (parameters := settings.take("lora_target_parameters")) is not None:
        yield from shared_rules.choose_parameters(parameters, settings.look("lora_r", 8), "lora_target_parameters")
    yield from shared_rules.choose_whole_modules(whole, "lora_modules_to_save")
    peft = settings.take("peft", {})
    if isinstance(peft, dict) and peft.get("loftq_config"):
        yield "lora.init=loftq"


def _length(settings: Settings) -> Iterator[Part]:
    steps = settings.take("max_steps")
    yield from shared_rules.choose_length(settings.take("num_epochs"), steps)
    warmup, ratio = settings.take("warmup_steps"), settings.take("warmup_ratio")
    if warmup is None and ratio is None:
        warmup = min(int(WARMUP_SHARE * steps), MOST_WARMUP) if steps else WARMUP_SHARE
        yield write_override("trainer.warmup_steps", 2 if warmup == 1 else warmup)
        if not steps:
            yield Lost(f"{MOST_WARMUP} steps at most there: set trainer.warmup_steps={MOST_WARMUP} where "
                       f"{WARMUP_SHARE:.0%} of all steps are more", "warmup_ratio")  # fmt: skip
    else:
        yield write_override("trainer.warmup_steps", warmup if warmup is not None else ratio)
    yield from shared_rules.choose_optimizer(str(settings.take("optimizer")), "optimizer")
    yield from shared_rules.choose_schedule(str(settings.take("lr_scheduler")), "lr_scheduler")
    for name in ("optim_args", "lr_scheduler_kwargs"):
        yield write_override(f"trainer.{name}", hf_arguments.read_mapping(settings.take(name)))
    yield write_override("trainer.per_device_eval_batch_size",
                         settings.take("eval_batch_size", settings.look("micro_batch_size")))  # fmt: skip


def _intervals(settings: Settings) -> Iterator[Part]:
    held_out = bool(settings.look("test_datasets")) or bool(settings.look("val_set_size"))
    older = settings.take("evaluation_strategy")
    strategies = {"save": settings.take("save_strategy"), "eval": settings.take("eval_strategy", older or "no")}
    length = {"epochs": settings.look("num_epochs"), "steps": settings.look("max_steps")}
    for kind, strategy in strategies.items():
        ours = f"trainer.{kind}_steps"
        steps, often = settings.take(f"{kind}_steps"), settings.take(f"{kind}s_per_epoch")
        if kind == "eval" and not held_out:
            yield f"{ours}=null"
        elif often:
            fraction = 1 / (float(often) * float(length["epochs"]))
            yield from shared_rules.every_share(ours, fraction, **length)
        elif steps and steps < 1:
            yield from shared_rules.every_share(ours, steps, **length)
        elif steps or strategy == "steps":
            yield from shared_rules.every(ours, steps=steps or 500)
        elif strategy == "epoch":
            ends_with_it = not length["steps"] and float(length["epochs"]) <= 1
            yield from shared_rules.every(ours, epochs=None if ends_with_it else 1)
        else:
            yield f"{ours}=null"
            if strategy != "no":
                yield Lost(f"no such strategy here: set {ours}=N", f"{kind}_strategy")
    patience = settings.take("early_stopping_patience")
    best = bool(settings.take("load_best_model_at_end") or patience) and held_out
    key = "load_best_model_at_end" if settings.get("load_best_model_at_end") else "early_stopping_patience"
    yield from shared_rules.keep(key, best=best, metric=settings.take("metric_for_best_model"))
    if patience:
        yield "callbacks=early-stopping"
        yield f"callbacks.early_stopping.patience={patience}"


METHODS = ("dpo", "ipo", "kto", "orpo", "simpo")
LOSS_KEYS = {
    "beta": "rl_beta", "loss_type": "dpo_loss_type", "loss_weights": "dpo_loss_weights", "rpo_alpha": "rpo_alpha",
    "label_smoothing": "dpo_label_smoothing", "cpo_alpha": "cpo_alpha", "simpo_gamma": "simpo_gamma",
    "desirable_weight": "kto_desirable_weight", "undesirable_weight": "kto_undesirable_weight",
    "center_rewards_coefficient": "center_rewards_coefficient", "precompute_ref_log_probs": "precompute_ref_log_probs",
}  # fmt: skip
"""The names of TRL, each with the one here."""
UNREAD_LOSS = {
    "dpo_norm_loss": "log-probabilities are divided by the length with loss.length_normalize alone",
    "dpo_use_weighting": "all pairs count alike (WPO)",
}


def _loss(settings: Settings) -> Iterator[Part]:
    """The loss over answers that `rl` or `reward_model` names."""
    method = "reward" if settings.take("reward_model") else settings.take("rl")
    values = {name: settings.take(key) for name, key in LOSS_KEYS.items()}
    more = settings.take("trl", {})
    alpha = settings.take("orpo_alpha")
    if method is None:
        for key in (*LOSS_KEYS.values(), *UNREAD_LOSS, "orpo_alpha"):
            settings.read.add(key)
            yield Same("it is read beside rl alone", key)
        return
    if isinstance(more, dict):
        values["beta"] = more.pop("beta", values["beta"])
        if more:
            yield Lost(f"{', '.join(more)}: {preferences.NOT_READ}", "trl")
    if values["beta"] is None and alpha is not None:
        values["beta"] = alpha
    if method == "simpo":
        values["beta"] = 0.1 if values["beta"] is None else values["beta"]
    if method not in ("dpo", "ipo"):
        values |= {"loss_type": None, "rpo_alpha": None, "label_smoothing": None}
    if method == "ipo":
        values |= {"loss_type": "ipo", "label_smoothing": None}
    yield from preferences.choose_loss(preferences.Answers(str(method), values, LOSS_KEYS))
    for key, why in UNREAD_LOSS.items():
        if settings.take(key):
            yield Lost(why, key)
    if method != "reward" and settings.look("lora_dropout"):
        yield Lost("TRL switches it off where it compares answers, and so does the command", "lora_dropout")
    yield from preferences.NO_DROPOUT
    settings.read.add("lora_dropout")
    if method == "kto" and settings.look("micro_batch_size") == 1:
        settings.read.add("micro_batch_size")
        yield "trainer.per_device_train_batch_size=2"
        yield Lost(preferences.LABEL_ROWS, "micro_batch_size")


def _attention(settings: Settings) -> Iterator[Part]:
    name = settings.take("attn_implementation")
    names = {"sdp_attention": "sdpa", "eager_attention": "eager", "flex_attention": "flex_attention"}
    for flag, option in names.items():
        name = option if settings.take(flag) else name
    if settings.take("flash_attention") or str(name).startswith("flash_attention"):
        # Flash attention only affects speed and needs a package; the fast step packs rows itself.
        return
    if name is not None:
        yield write_override("model.attn_implementation", name)


def _tracking(settings: Settings) -> Iterator[Part]:
    project, mode = settings.take("wandb_project"), settings.take("wandb_mode")
    names = ("wandb_entity", "wandb_name", "wandb_run_id", "wandb_log_model", "wandb_watch")
    entity, name, run_id, artifact, watch = (settings.take(name) for name in names)
    uses = {"wandb": bool(settings.take("use_wandb") or project) and mode != "disabled",
            **{tracker: bool(settings.take(f"use_{tracker}")) for tracker in ("mlflow", "tensorboard", "trackio")},
            "comet_ml": bool(settings.take("use_comet"))}  # fmt: skip
    yield from shared_rules.choose_trackers([tracker for tracker, used in uses.items() if used], "use_wandb")
    yield from shared_rules.choose_name(name or run_id)
    others = {"mlflow": "mlflow_experiment_name", "trackio": "trackio_project_name"}
    for tracker, key in others.items():
        other = settings.take(key)
        if other and uses[tracker] and not uses["wandb"]:
            yield write_override("tracking.project", other)
    if not uses["wandb"]:
        return
    if project:
        yield write_override("tracking.project", project)
    if entity:
        yield write_override("tracking.entity", entity)
    if mode == "offline":
        yield "tracking.mode=offline"
    if artifact and str(artifact).lower() != "false":
        yield "tracking.log_adapter=true"
    if watch and str(watch).lower() != "false":
        yield Lost("gradients are not sent to wandb", "wandb_watch")


RULES: dict[str, Rule] = {
    "micro_batch_size": Move("trainer.per_device_train_batch_size"),
    **{name: Move(f"trainer.{name}") for name in ("gradient_accumulation_steps", "learning_rate", "weight_decay",
       "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "logging_steps", "save_total_limit",
       "group_by_length", "dataloader_num_workers")},
    "gradient_checkpointing": Pick(
        {True: ("trainer.gradient_checkpointing=true",), False: ("trainer.gradient_checkpointing=false",),
         **dict.fromkeys(("true", "unsloth", "offload", "offload_disk"), ("trainer.gradient_checkpointing=true",))}
    ),
    "lora_dropout": Move("lora.dropout"),
    "peft_use_dora": Move("lora.use_dora"),
    "peft_use_rslora": Move("lora.use_rslora"),
    "loraplus_lr_ratio": Move("lora.loraplus_lr_ratio"),
    "peft_init_lora_weights": Move("lora.init", {True: "default", "true": "default", "gaussian": "gaussian",
                                                  "pissa": "pissa", "olora": "olora", "eva": "eva", "loftq": "loftq",
                                                  "orthogonal": "orthogonal"}),
    "peft_autocast_adapter_dtype": OnlyIf((True,), "the adapter has 32 bits; lora.dtype=bf16 stores it in 16"),
    "quantize_moe_experts": Pick({True: ("quantization.experts=same",), False: ("quantization.experts=none",)}),
    "experts_implementation": Same(shared_rules.EXPERT_KERNELS),
    "trust_remote_code": Move("model.trust_remote_code"),
    "excess_length_strategy": Move("data.on_too_long", {"drop": "drop", "truncate": "truncate", "raise": "error"}),
    "batch_size": Lost("a step has micro_batch_size x gradient_accumulation_steps rows there too: set these"),
    "dataset_processes": Move("data.num_proc"),
    "dataset_num_proc": Move("data.num_proc"),
    "seed": Move("seed"),
    "output_dir": Move("hydra.run.dir"),
    "mlflow_tracking_uri": Move("tracking.uri"),
    "resume_from_checkpoint": Lost(shared_rules.NO_RESUME),
    "overrides_of_model_config": Lost("set it in the model's own config.json"),
    "overrides_of_model_kwargs": Lost("set it in the model's own config.json"),
    "rope_scaling": Lost("set model.rope_scaling, e.g. {rope_type: yarn, factor: 4}"),
    "lora_model_dir": Lost("training begins with a fresh adapter; merge that one first (task=merge)"),
    **dict.fromkeys(("dpo_use_logits_to_keep", "dpo_padding_free", "dpo_use_liger_kernel",
                     "dpo_generate_during_eval", "rl_adapter_ref_model", "num_labels"), Same(shared_rules.SPEED)),
    "unpaired_dataset": Same("rows are read by their columns"),
    "ref_model": Lost(preferences.REFERENCE_MODEL),
    "lora_fan_in_fan_out": OnlyIf((False,), "PEFT finds it by itself"),
    "base_model_config": Same("the config in the model's own folder is taken"),
    "hub_model_id": Lost(shared_rules.PUSH),
    "cosine_min_lr_ratio": Lost(
        "set trainer.lr_scheduler_type=cosine_with_min_lr trainer.lr_scheduler_kwargs.min_lr_rate=SHARE"
    ),
    "neftune_noise_alpha": Lost(shared_rules.NO_NOISE),
    "noisy_embedding_alpha": Lost(shared_rules.NO_NOISE),
    "relora_steps": Lost("adapters are not restarted (ReLoRA)"),
    "relora": Lost("adapters are not restarted (ReLoRA)"),
    "unfrozen_parameters": Lost("all weights are trained, or an adapter"),
    "lisa_n_layers": Lost("all weights are trained, or an adapter"),
    "do_causal_lm_eval": Lost("see the metrics of evaluation="),
    "eval_table_size": Same("evaluation.show_predictions answers are shown and sent"),
    "processor_type": Lost(shared_rules.NO_MEDIA),
    "deepspeed": Lost(shared_rules.NO_DEEPSPEED),
    **dict.fromkeys(("fsdp", "fsdp_config"), Lost(shared_rules.SHARDED)),
    "local_rank": OnlyIf((0, -1), shared_rules.ONE_PROCESS),
    "device_map": Move("model.device_map", {name: name for name in ("auto", "balanced", "sequential")}),
    "gpu_memory_limit": Move("model.max_memory"),
    **dict.fromkeys(("sequence_parallel_degree", "context_parallel_size", "tensor_parallel_size", "dp_shard_size",
                     "dp_replicate_size"), OnlyIf((1,), shared_rules.ONE_DEVICE)),
    "torch_compile": Pick({True: ("trainer.compile=true",), False: (), "auto": ()}),
    "greater_is_better": OnlyIf((False,), "the best state is that of the lowest held-out loss"),
    "dataloader_drop_last": Lost("the last, smaller batch is trained too"),
    "auto_find_batch_size": Lost("batches are never cut by themselves; trainer.memory_budget=auto saves memory"),
    "shuffle_merged_datasets": OnlyIf((True,), "the order of rows is drawn from seed"),
    "streaming": OnlyIf((False,), shared_rules.STREAMING),
    "min_sample_len": Lost("leave short rows out with data.format=module:function"),
    "eval_sequence_len": Lost("held-out rows have the limits of those to train on"),
    "plugins": Same("they only add kernels, or keys that are listed by themselves"),
    "torch_compile_backend": Same(shared_rules.SPEED),
    "loss_watchdog_threshold": Lost("see watchdog.divergence"),
    "loraplus_lr_embedding": Same("embeddings have no adapter here"),
    **dict.fromkeys(("activation_offloading", "tiled_mlp", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel",
                     "lora_embedding_kernel", "unsloth_lora_mlp", "unsloth_lora_qkv", "unsloth_lora_o",
                     "unsloth_rms_norm", "unsloth_rope", "unsloth_cross_entropy_loss", "flash_attn_cross_entropy",
                     "flash_attn_rms_norm", "flash_attn_fuse_qkv", "flash_attn_fuse_mlp", "liger_rope",
                     "liger_rms_norm", "liger_glu_activation", "liger_fused_linear_cross_entropy", "liger_layer_norm",
                     "liger_cross_entropy", "cut_cross_entropy", "chunked_cross_entropy", "xformers_attention",
                     "flash_optimum", "sage_attention", "batch_flattening", "use_kernels", "layer_offloading",
                     "fused_attn_kernel", "tf32", "s2_attention"),
                    Same(shared_rules.SPEED)),
    **dict.fromkeys(
        ("accelerator_config", "auto_resume_from_checkpoints", "axolotl_config_path", "bf16_full_eval",
         "dataloader_pin_memory", "dataloader_prefetch_factor", "dataset_keep_in_memory", "dataset_prepared_path",
         "ddp", "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_timeout", "debug",
         "eval_max_new_tokens", "eval_sample_packing", "experimental_skip_move_to_device", "flash_attn",
         "fsdp_version", "gc_collect_steps", "gc_steps", "gradient_checkpointing_kwargs", "hf_use_auth_token",
         "hub_strategy", "include_tkps", "include_tokens_per_second", "is_falcon_derived_model",
         "is_llama_derived_model", "is_mistral_derived_model", "is_qwen_derived_model", "lora_on_cpu",
         "low_cpu_mem_usage", "merge_method", "model_type", "multipack_real_batches", "pad_to_multiple_of",
         "pad_to_sequence_len", "profiler_steps", "push_dataset_to_hub", "push_to_hub", "remove_unused_columns",
         "sample_packing_bin_size", "sample_packing_eff_est", "sample_packing_group_size", "save_first_step",
         "save_only_model", "save_safetensors", "shuffle_before_merging_datasets", "strict", "tokenizer_legacy",
         "tokenizer_save_jinja_files", "tokenizer_type", "tokenizer_use_fast", "torch_empty_cache_steps",
         "torchdistx_path", "total_num_tokens", "type_of_model", "use_tokenizer_chat_template"),
        Same(),
    ),
}  # fmt: skip
AXOLOTL = Dialect(
    name="Axolotl",
    version="0.18",
    model_key="base_model",
    keys=AXOLOTL_KEYS,
    defaults=DEFAULTS,
    fixed=FIXED,
    rules=RULES,
    joints=(_model, _bits, _lora, _length, _intervals, choose_data, _loss, _attention, _tracking),
)
