"""The YAML of Axolotl."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from qlora.config.overrides import write_override
from qlora.errors import ConfigError
from qlora.migrate import shared_rules
from qlora.migrate.translation import UNSET, Dialect, Lost, Move, OnlyIf, Part, Pick, Rule, Same, Settings

FORMATS = {
    "alpaca": "alpaca",
    "completion": "text",
    "sharegpt": "conversations",
    "input_output": "segments",
    "oasst": "text",
    "alpaca_chat.load_qa": "question-answer",
    "context_qa": "auto",
    "gpteacher": "alpaca",
}


def _model(settings: Settings) -> Iterator[Part]:
    if (rl := settings.take("rl")) is not None or settings.get("reward_model"):
        raise ConfigError(
            f"from: rl={rl or 'reward_model'} trains by preferences or rewards; here models are trained on answers "
            "alone"
        )
    yield from shared_rules.choose_model(str(settings.take("base_model", "unset")), "base_model")
    if (tokenizer := settings.take("tokenizer_config")) is not None:
        yield write_override("model.tokenizer", tokenizer)


def _bits(settings: Settings) -> Iterator[Part]:
    adapter, four, eight = settings.take("adapter"), settings.take("load_in_4bit"), settings.take("load_in_8bit")
    if adapter not in (None, "lora", "qlora"):
        yield Lost("a LoRA adapter is trained in its place", "adapter")
    more = settings.take("bnb_config_kwargs", {})
    is_bf16 = any(settings.get(name) for name in ("bf16", "fp16", "bfloat16", "float16"))
    bits = 4 if four or adapter == "qlora" else 8 if eight else 16 if is_bf16 else 32
    kind, double = more.get("bnb_4bit_quant_type", "nf4"), more.get("bnb_4bit_use_double_quant", True)
    yield from shared_rules.choose_quantization(bits, kind, double, lora=adapter is not None)
    for name, ours in (("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "fp16"), ("float16", "fp16")):
        value = settings.take(name)
        if value and value != "auto" and bits != 32:
            yield f"quantization.compute_dtype={ours}"


def _lora(settings: Settings) -> Iterator[Part]:
    named, linear = settings.take("lora_target_modules"), settings.take("lora_target_linear")
    if isinstance(named, str):
        named = [named]
    if linear and named:
        yield Lost("all linear layers are meant beside it (lora_target_linear)", "lora_target_modules")
    if linear or named == ["all-linear"]:
        yield "lora.target_modules=all-linear"
    elif named:
        yield write_override("lora.target_modules", named)
    if settings.take("lora_modules_to_save"):
        yield Lost(
            "whole matrices are not trained beside an adapter; the rows of model.new_tokens are", "lora_modules_to_save"
        )
    peft = settings.take("peft", {})
    if isinstance(peft, dict) and peft.get("loftq_config"):
        yield "lora.init=loftq"


def _data(settings: Settings) -> Iterator[Part]:
    sets = settings.take("datasets", [])
    if settings.take("pretraining_dataset") and not sets:
        rows = settings.get("pretraining_dataset")
        sets = rows if isinstance(rows, list) else [{"path": rows}]
        sets = [
            {"path": entry, "type": "completion"} if isinstance(entry, str) else {**entry, "type": "completion"}
            for entry in sets
        ]
    if not sets:
        yield Lost("no rows are named: give data.path=FILE", "datasets")
        sets = [{"path": "rows.jsonl", "type": "alpaca"}]
    parts, template = [], settings.take("chat_template")
    for number, entry in enumerate(sets):
        part, notes = _part(entry if isinstance(entry, dict) else {"path": str(entry)}, number)
        yield from notes
        parts.append(part)
        if isinstance(entry, dict):
            template = template or entry.get("chat_template")
    yield from shared_rules.mix(parts)
    if template in shared_rules.TEMPLATES:
        yield f"data.template={shared_rules.TEMPLATES[template]}"
    elif template is not None:
        yield Lost(
            "no such template here: the tokenizer's own is taken; a Jinja file goes to data.template", "chat_template"
        )
    if settings.take("chat_template_jinja"):
        yield Lost("put it into a file, and name that in data.template=FILE.jinja", "chat_template_jinja")
    yield write_override("data.max_length", int(settings.take("sequence_len", 512)))
    if settings.take("sample_packing"):
        yield "data.packing=true"
        yield "trainer.group_by_length=false"
        settings.read.add("group_by_length")
    tests = settings.take("test_datasets")
    size = settings.take("val_set_size", 0)
    if tests:
        yield write_override("data.eval_path", tests[0].get("path") if isinstance(tests, list) else tests)
    else:
        yield from shared_rules.hold_out(float(size) if size and float(size) < 1 else size, "val_set_size")


def _part(entry: dict[str, Any], number: int) -> tuple[dict[str, Any], list[Part]]:
    """Returns an entry of `datasets` with our field names, and what of it was lost."""
    key, kind = f"datasets[{number}]", entry.get("type", "alpaca")
    notes: list[Part] = []
    files = entry.get("data_files")
    if isinstance(files, list):
        notes += (
            [Lost(f"only {files[0]} of {len(files)} files is taken", f"{key}.data_files")] if len(files) > 1 else []
        )
        files = files[0]
    local = entry.get("ds_type") and entry.get("path") in ("json", "csv", "parquet", "text", "arrow")
    part: dict[str, Any] = {"path": files if local and files else entry.get("path")}
    if files and not local:
        part["data_files"] = files
    for theirs, ours in (("name", "subset"), ("split", "split")):
        if entry.get(theirs) and not (theirs == "split" and entry[theirs] == "train"):
            part[ours] = entry[theirs]
    if isinstance(kind, dict):
        columns = {
            "instruction": kind.get("field_instruction"),
            "input": kind.get("field_input"),
            "output": kind.get("field_output"),
        }
        part["format"] = "alpaca"
        if columns := {role: column for role, column in columns.items() if column and column != role}:
            part["columns"] = columns
        notes.append(Lost("words of your own around a row need a function: data.format=module:function", f"{key}.type"))
    elif kind == "chat_template" or str(kind).startswith("chat_template"):
        mapping = entry.get("message_property_mappings") or {}
        sharegpt = (mapping.get("role") or entry.get("message_field_role")) == "from"
        part["format"] = "conversations" if sharegpt else "messages"
        column = entry.get("field_messages", "messages")
        if column != part["format"]:
            part["columns"] = {part["format"]: column}
    else:
        name = str(kind).split(":")[0]
        part["format"] = FORMATS.get(name, FORMATS.get(name.split(".")[0], "auto"))
        if name not in FORMATS and name.split(".")[0] not in FORMATS:
            notes.append(Lost(f"the form {kind!r} is not known here: it is recognised by the columns", f"{key}.type"))
        if part["format"] == "text" and entry.get("field") not in (None, "text"):
            part["columns"] = {"text": entry["field"]}
    for name in ("shards", "shards_idx", "preprocess_shards", "roles", "roles_to_train", "trust_remote_code"):
        if entry.get(name) not in (*UNSET, False, ["assistant"]):
            notes.append(Lost("there is no such option here", f"{key}.{name}"))
    return part, notes


def _steps(settings: Settings) -> Iterator[Part]:
    for name, key in (("evals_per_epoch", "eval"), ("saves_per_epoch", "save")):
        steps, often = settings.take(f"{key}_steps"), settings.take(name)
        settings.take(f"{key}_strategy"), settings.take("evaluation_strategy")
        ours = f"trainer.{key}_steps"
        given = isinstance(steps, int | float) and steps >= 1
        yield write_override(ours, int(steps) if given else None)
        if (often or steps) and not given:
            yield Lost(shared_rules.NO_STEPS.format(key=ours), name if often else f"{key}_steps")
    yield from shared_rules.choose_length(settings.take("num_epochs", 1), settings.take("max_steps"))
    yield from shared_rules.choose_warmup(settings)
    yield from shared_rules.choose_optimizer(str(settings.take("optimizer", "adamw_torch_fused")), "optimizer")
    yield from shared_rules.choose_schedule(str(settings.take("lr_scheduler", "cosine")), "lr_scheduler")


def _attention(settings: Settings) -> Iterator[Part]:
    name = settings.take("attn_implementation")
    names = {"sdp_attention": "sdpa", "eager_attention": "eager", "flex_attention": "flex_attention"}
    for flag, option in names.items():
        name = option if settings.take(flag) else name
    if settings.take("flash_attention") or name == "flash_attention_2":
        # Flash attention only affects speed and needs a package; the fast step packs rows itself.
        return
    if name is not None:
        yield write_override("model.attn_implementation", name)


def _tracking(settings: Settings) -> Iterator[Part]:
    project, mode = settings.take("wandb_project"), settings.take("wandb_mode")
    names = ("wandb_entity", "wandb_name", "wandb_run_id", "wandb_log_model", "wandb_watch")
    entity, name, run_id, artifact, watch = (settings.take(name) for name in names)
    if name or run_id:
        yield write_override("name", re.sub(r"[/\\]", "-", str(name or run_id)))
    if project is None or mode == "disabled":
        return
    yield "tracking=wandb"
    yield write_override("tracking.project", project)
    if entity:
        yield write_override("tracking.entity", entity)
    if mode == "offline":
        yield "tracking.mode=offline"
    if artifact:
        yield "tracking.log_adapter=true"
    if watch:
        yield Lost("gradients are not sent to wandb", "wandb_watch")


def _stopping(settings: Settings) -> Iterator[Part]:
    patience = settings.take("early_stopping_patience")
    if patience:
        yield "callbacks=early-stopping"
        yield f"callbacks.early_stopping.patience={patience}"


RULES: dict[str, Rule] = {
    "micro_batch_size": Move("trainer.per_device_train_batch_size"),
    "eval_batch_size": Move("trainer.per_device_eval_batch_size"),
    **{name: Move(f"trainer.{name}") for name in ("gradient_accumulation_steps", "learning_rate", "weight_decay",
       "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "logging_steps", "save_total_limit",
       "group_by_length", "dataloader_num_workers")},
    "gradient_checkpointing": Pick(
        {True: ("trainer.gradient_checkpointing=true",), False: ("trainer.gradient_checkpointing=false",),
         "true": ("trainer.gradient_checkpointing=true",), "unsloth": ("trainer.gradient_checkpointing=true",),
         "offload": ("trainer.gradient_checkpointing=true",)}
    ),
    "lora_r": Move("lora.r"),
    "lora_alpha": Move("lora.alpha"),
    "lora_dropout": Move("lora.dropout"),
    "peft_use_dora": Move("lora.use_dora"),
    "peft_use_rslora": Move("lora.use_rslora"),
    "loraplus_lr_ratio": Move("lora.loraplus_lr_ratio"),
    "peft_init_lora_weights": Move("lora.init", {True: "default", "gaussian": "gaussian", "pissa": "pissa",
                                                  "olora": "olora", "eva": "eva", "loftq": "loftq"}),
    "trust_remote_code": Move("model.trust_remote_code"),
    "revision_of_model": Move("model.revision"),
    "tokens": Move("model.new_tokens"),
    "train_on_inputs": Pick({True: ("data.train_on=all",), False: ()}),
    "dataset_processes": Move("data.num_proc"),
    "seed": Move("seed"),
    "output_dir": Move("hydra.run.dir"),
    "lora_model_dir": Lost("training begins with a fresh adapter; merge that one first (task=merge)"),
    "lora_fan_in_fan_out": OnlyIf((False,), "PEFT finds it by itself"),
    "special_tokens": Same("the base's own are kept; padding needs none"),
    "use_tensorboard": Pick({True: ("tracking=tensorboard",), False: ()}),
    "use_mlflow": Pick({True: ("tracking=mlflow",), False: ()}),
    "mlflow_experiment_name": Move("tracking.project"),
    "mlflow_tracking_uri": Move("tracking.uri"),
    "hub_model_id": Lost("upload a finished run with task=push repo=OWNER/NAME"),
    "lr_scheduler_kwargs": Move("trainer.lr_scheduler_kwargs"),
    "cosine_min_lr_ratio": Lost(
        "set trainer.lr_scheduler_type=cosine_with_min_lr trainer.lr_scheduler_kwargs.min_lr_rate=SHARE"
    ),
    "neftune_noise_alpha": Lost("no noise is added to embeddings here"),
    "noisy_embedding_alpha": Lost("no noise is added to embeddings here"),
    "relora_steps": Lost("adapters are not restarted (ReLoRA)"),
    "unfrozen_parameters": Lost("all weights are trained, or an adapter"),
    "lisa_n_layers": Lost("all weights are trained, or an adapter"),
    "lora_on_cpu": Same(),
    "do_causal_lm_eval": Lost("see the metrics of evaluation="),
    "eval_table_size": Same("evaluation.show_predictions answers are shown and sent"),
    "processor_type": Lost("only text is trained here"),
    "multipack_real_batches": Same(),
    "deepspeed": Lost("DeepSpeed is not used here"),
    "fsdp": Lost(shared_rules.SHARDED),
    "fsdp_config": Lost(shared_rules.SHARDED),
    "fsdp_version": Same(),
    "local_rank": OnlyIf((0, -1), shared_rules.ONE_PROCESS),
    "device_map": Move("model.device_map"),
    "gpu_memory_limit": Move("model.max_memory"),
    "sequence_parallel_degree": OnlyIf((1,), "a row stays on one device"),
    "context_parallel_size": OnlyIf((1,), "a row stays on one device"),
    "tensor_parallel_size": OnlyIf((1,), "a layer stays on one device"),
    "torch_compile": Pick({True: ("trainer.compile=true",), False: (), "auto": ()}),
    "tf32": Same("4-bit products compute in quantization.compute_dtype"),
    "shuffle_merged_datasets": OnlyIf((True,), "the order of rows is drawn from seed"),
    "min_sample_len": Lost("leave short rows out with data.format=module:function"),
    "excess_length_strategy": Move("data.on_too_long", {"drop": "drop", "truncate": "truncate", "raise": "error"}),
    **dict.fromkeys(("plugins", "activation_offloading", "tiled_mlp", "unsloth_lora_mlp", "unsloth_lora_qkv",
                     "unsloth_lora_o", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel",
                     "flash_attn_cross_entropy",
                     "flash_attn_rms_norm", "flash_attn_fuse_qkv", "flash_attn_fuse_mlp", "liger_rope",
                     "liger_rms_norm", "liger_glu_activation", "liger_fused_linear_cross_entropy", "liger_layer_norm",
                     "cut_cross_entropy", "xformers_attention", "flash_optimum", "lora_embedding_kernel"),
                    Same(shared_rules.SPEED)),
    **dict.fromkeys(
        (*shared_rules.WITHOUT_EFFECT,
         "model_type", "tokenizer_type", "base_model_config", "strict", "dataset_prepared_path", "pad_to_sequence_len",
         "eval_sample_packing", "gradient_checkpointing_kwargs", "resume_from_checkpoint", "debug",
         "sample_packing_eff_est",
         "auto_resume_from_checkpoints", "is_llama_derived_model", "is_falcon_derived_model",
         "is_mistral_derived_model",
         "tokenizer_use_fast", "tokenizer_legacy", "save_safetensors", "total_num_tokens",
         "save_first_step", "hub_strategy", "push_dataset_to_hub", "push_to_hub", "bf16_full_eval",
         "dataloader_prefetch_factor", "torchdistx_path", "flash_attn",
         "ddp", "eval_max_new_tokens", "use_wandb", "__folder__", "wandb_log_model",
         "include_tokens_per_second", "overrides_of_model_config", "use_tokenizer_chat_template",
         "experimental_skip_move_to_device", "hf_use_auth_token", "shuffle_before_merging_datasets"),
        Same(),
    ),
}  # fmt: skip
AXOLOTL = Dialect(
    "Axolotl",
    (
        *(
            "trainer.per_device_train_batch_size=1",
            "trainer.gradient_accumulation_steps=1",
            "trainer.max_grad_norm=1.0",
        ),
        *(
            "trainer.gradient_checkpointing=false",
            "trainer.group_by_length=false",
            "trainer.logging_steps=1",
            "seed=42",
        ),
        *("trainer.save_total_limit=null", "lora.dropout=0.0", "evaluation=loss", "data.source_max_len=null"),
        "data.target_max_len=null",
    ),
    RULES,
    (_model, _bits, _lora, _data, _steps, _attention, _tracking, _stopping),
)
