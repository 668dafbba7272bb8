"""Names that people know from other tools, and what they are called here."""

from __future__ import annotations

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
"""The flags of the original qlora.py, and ours: an option (`lora.r`) or a choice (`lora=none`)."""

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
    **dict.fromkeys(("rank", "r", "lora_rank"), "lora.r"),
    "alpha": "lora.alpha",
    **dict.fromkeys(("target_modules", "lora_target", "lora_target_modules"), "lora.target_modules"),
    "dropout": "lora.dropout",
    "use_dora": "lora=dora",
    "use_rslora": "lora=rslora",
    **dict.fromkeys(("epochs", "num_epochs", "n_epochs", "epoch"), "trainer.num_train_epochs"),
    **dict.fromkeys(("steps", "max_train_steps", "num_steps", "iterations", "max_iters"), "trainer.max_steps"),
    **dict.fromkeys(
        ("batch_size", "bs", "train_batch_size", "micro_batch_size", "per_device_batch_size", "batch"),
        "trainer.per_device_train_batch_size",
    ),
    "eval_batch_size": "trainer.per_device_eval_batch_size",
    **dict.fromkeys(
        ("grad_accum", "gradient_accumulation", "grad_accumulation_steps", "accumulation_steps"),
        "trainer.gradient_accumulation_steps",
    ),
    **dict.fromkeys(("warmup", "warmup_steps", "num_warmup_steps"), "trainer.warmup_steps"),
    **dict.fromkeys(("scheduler", "lr_scheduler"), "trainer.lr_scheduler_type"),
    **dict.fromkeys(("optimizer", "optimiser"), "trainer.optim"),
    **dict.fromkeys(("wd", "trainer.wd"), "trainer.weight_decay"),
    **dict.fromkeys(("grad_clip", "clip_grad_norm", "gradient_clipping"), "trainer.max_grad_norm"),
    **dict.fromkeys(("load_in_4bit", "use_4bit"), "quantization=nf4"),
    **dict.fromkeys(("load_in_8bit", "use_8bit"), "quantization=int8"),
    "bnb_4bit_quant_type": "quantization.quant_type",
    "bnb_4bit_compute_dtype": "quantization.compute_dtype",
    "bnb_4bit_use_double_quant": "quantization.double_quant",
    **dict.fromkeys(("dtype", "torch_dtype", "precision"), "quantization.compute_dtype"),
    **dict.fromkeys(("model_name", "model_id", "model_path", "base_model", "pretrained_model_name_or_path"), "model"),
    "tokenizer": "model.tokenizer",
    **dict.fromkeys(("attn_implementation", "attention"), "model.attn_implementation"),
    **dict.fromkeys(
        ("datasets", "data_path", "dataset_name", "dataset_path", "train_file", "train_data", "train_path"), "data"
    ),
    **dict.fromkeys(("streaming", "dataset_streaming", "data.stream"), "data.streaming"),
    **dict.fromkeys(("buffer_size", "shuffle_buffer_size", "data.buffer_size"), "data.shuffle_buffer"),
    **dict.fromkeys(("stopping_strategy", "mix_strategy", "data.stopping_strategy"), "data.stop"),
    **dict.fromkeys(("interleave_probs", "data.probability"), "data.mix"),
    "rope_scaling": "model.rope_scaling",
    **dict.fromkeys(
        ("context_parallel_size", "sequence_parallel_size", "context_parallel"), "trainer.context_parallel"
    ),
    "cuda_graphs": "trainer.cuda_graphs",
    **dict.fromkeys(("modules_to_save", "lora_modules_to_save", "additional_target"), "lora.modules_to_save"),
    **dict.fromkeys(("val_file", "validation_file", "eval_file", "eval_data", "val_data"), "data.eval_path"),
    **dict.fromkeys(("val_size", "val_set_size", "test_size", "eval_size"), "data.eval_dataset_size"),
    **dict.fromkeys(
        (
            "max_seq_length",
            "max_seq_len",
            "max_length",
            "seq_len",
            "sequence_len",
            "seq_length",
            "cutoff_len",
            "model_max_length",
            "block_size",
            "context_length",
        ),
        "data.max_length",
    ),
    **dict.fromkeys(("packing", "sample_packing"), "data.packing"),
    **dict.fromkeys(("template", "chat_template"), "data.template"),
    "format": "data.format",
    **dict.fromkeys(("train_on_inputs", "train_on_prompt"), "data.train_on_source"),
    **dict.fromkeys(("output", "out", "out_dir", "save_dir", "outdir", "dir"), "hydra.run.dir"),
    **dict.fromkeys(("checkpoint", "ckpt", "adapter_path", "lora_path", "adapter_name_or_path"), "adapter"),
    **dict.fromkeys(("resume_from_checkpoint", "resume_from"), "resume=auto"),
    **dict.fromkeys(("wandb_project", "project"), "tracking.project"),
    **dict.fromkeys(("wandb", "use_wandb"), "tracking=wandb"),
    **dict.fromkeys(("tracker", "logger", "log_with"), "tracking"),
    **dict.fromkeys(("hub_model_id", "repo_id"), "repo"),
    "fsdp": "trainer.parallel=fsdp",
    "push_to_hub": "task=push",
    **dict.fromkeys(("eval", "eval_task", "benchmark"), "evaluation"),
    **dict.fromkeys(("metric", "metrics"), "evaluation.metrics"),
    "cfg": "experiment",
    "config": "experiment",
    "random_seed": "seed",
    **dict.fromkeys(
        ("rl", "rlhf_type", "loss_type", "loss.loss_type", "loss.type", "pref_loss", "objective.name"), "loss"
    ),
    **dict.fromkeys(("beta", "rl_beta", "pref_beta", "dpo_beta", "kto_beta", "orpo_alpha", "loss.alpha"), "loss.beta"),
    **dict.fromkeys(("simpo_gamma", "loss.simpo_gamma", "loss.margin"), "loss.gamma"),
    **dict.fromkeys(
        ("rpo_alpha", "cpo_alpha", "pref_ftx", "loss.rpo_alpha", "loss.cpo_alpha", "loss.pref_ftx"), "loss.sft_weight"
    ),
    **dict.fromkeys(("dpo_label_smoothing", "loss.smoothing"), "loss.label_smoothing"),
    **dict.fromkeys(("kto_desirable_weight", "kto_chosen_weight"), "loss.desirable_weight"),
    **dict.fromkeys(("kto_undesirable_weight", "kto_rejected_weight"), "loss.undesirable_weight"),
    **dict.fromkeys(("center_rewards_coefficient", "loss.center_rewards_coefficient"), "loss.center_rewards"),
    **dict.fromkeys(("ref_model", "loss.ref", "loss.ref_model"), "loss.reference"),
    "reference_free": "loss.reference=none",
}
"""Names of the original, of PEFT, transformers and other trainers, and ours: a key, or a choice."""

FOREIGN_OPTIONS = {
    "task": {
        **dict.fromkeys(
            ("finetune", "fine-tune", "fine_tune", "fit", "training", "sft", "run", "start", "go"), "task=train"
        ),
        **dict.fromkeys(("inference", "infer", "generate", "answer"), "task=predict or task=chat"),
        **dict.fromkeys(("talk", "interactive", "ask", "cli", "repl"), "task=chat"),
        **dict.fromkeys(("eval", "test", "validate", "benchmark", "measure", "evaluation"), "task=evaluate"),
        **dict.fromkeys(("merge_and_unload", "save", "fuse"), "task=merge"),
        **dict.fromkeys(("gguf", "convert", "quantize", "convert_hf_to_gguf"), "task=export"),
        **dict.fromkeys(("certify", "parity", "prove"), "task=verify"),
        **dict.fromkeys(("ui", "gui", "web", "dashboard", "webui", "monitor", "tensorboard"), "task=board"),
        **dict.fromkeys(("api", "server", "endpoint", "host"), "task=serve"),
        **dict.fromkeys(("upload", "publish", "push_to_hub"), "task=push"),
        **dict.fromkeys(("estimate", "memory", "dry-run", "dryrun"), "task=plan"),
        **dict.fromkeys(("show", "inspect", "tokens", "view"), "task=preview"),
        **dict.fromkeys(("compare", "leaderboard", "list", "ls", "results", "runs"), "task=report"),
        **dict.fromkeys(("check", "diagnose", "env", "info"), "task=doctor"),
        **dict.fromkeys(("import", "translate"), "task=migrate"),
        **dict.fromkeys(("repeat", "reproduce", "rerun"), "task=replay"),
        **{name: f"task=train loss={name}" for name in ("dpo", "ipo", "orpo", "simpo", "kto", "reward")},
        **dict.fromkeys(("rm", "reward-model"), "task=train loss=reward"),
        **dict.fromkeys(("rlhf", "align", "preferences"), "task=train loss=dpo"),
    },
    "loss": {
        **dict.fromkeys(("preference", "preferences", "rlhf", "cdpo", "sigmoid", "pairs"), "loss=dpo"),
        **dict.fromkeys(("cpo",), "loss=dpo loss.reference=none loss.sft_weight=1"),
        **dict.fromkeys(("rm", "reward-model", "reward_model", "bradley-terry"), "loss=reward"),
        **dict.fromkeys(("cross-entropy", "cross_entropy", "ce", "nll", "causal_lm", "none"), "loss=sft"),
    },
    "quantization": {
        **dict.fromkeys(
            ("4bit", "4-bit", "4", "int4", "nf-4", "bnb", "bnb4", "qlora", "q4", "load_in_4bit", "true", "double"),
            "quantization=nf4",
        ),
        **dict.fromkeys(("8bit", "8-bit", "8", "int-8", "bnb8", "q8", "llm.int8", "load_in_8bit"), "quantization=int8"),
        **dict.fromkeys(
            ("16bit", "16-bit", "16", "bf16", "fp16", "float16", "bfloat16", "half", "off", "no", "false", "lora"),
            "quantization=none",
        ),
        **dict.fromkeys(("32bit", "32-bit", "32", "float32", "full"), "quantization=fp32"),
    },
    "lora": {
        **dict.fromkeys(("full", "off", "false", "no", "full-finetune"), "lora=none"),
        **dict.fromkeys(("all", "default", "lora", "qlora", "true", "on", "linear"), "lora=all-linear"),
        **dict.fromkeys(("qv", "attn", "qkv", "q_proj"), "lora=attention"),
        **dict.fromkeys(("lora+", "lora-plus"), "lora=loraplus"),
    },
    "tracking": {
        **dict.fromkeys(("off", "disabled", "false", "no", "null"), "tracking=none"),
        **dict.fromkeys(("tb", "tensorboardx"), "tracking=tensorboard"),
        **dict.fromkeys(("weights-and-biases", "wandb-offline", "w&b"), "tracking=wandb"),
    },
    "data": {
        **dict.fromkeys(("guanaco", "openassistant", "oasst", "openassistant-guanaco"), "data=oasst1"),
        **dict.fromkeys(("own", "custom", "file", "json", "jsonl", "csv", "mine"), "data=local data.path=FILE"),
        **dict.fromkeys(("hh", "anthropic"), "data=hh-rlhf"),
        **dict.fromkeys(("preferences", "preference", "demo_preferences", "demo-pairs"), "data=demo-preferences"),
        **dict.fromkeys(("sharegpt", "conversations"), "data=local data.path=FILE data.format=conversations"),
        **dict.fromkeys(("chatml", "openai", "messages", "chat"), "data=local data.path=FILE data.format=messages"),
    },
    "evaluation": {
        **dict.fromkeys(("perplexity", "ppl", "none", "off"), "evaluation=loss"),
        **dict.fromkeys(("em", "accuracy", "exact_match"), "evaluation=exact-match"),
        **dict.fromkeys(("lm_eval", "harness", "lm-evaluation-harness"), "evaluation=lm-eval"),
    },
    "generation": {
        **dict.fromkeys(("sample", "sampling", "top-p", "random"), "generation=nucleus"),
        **dict.fromkeys(("beam", "beams", "beam-search"), "generation.num_beams=4"),
    },
}
"""Options of a group that other tools or people call otherwise, and what to write."""

SERVE = (
    "qlora serve RUN answers here; qlora merge RUN makes a folder for vLLM or SGLang, qlora export RUN a file for "
    "llama.cpp and Ollama (docs/ship.md)"
)
RESUME = "the command of a run resumes it, with its name=NAME or hydra.run.dir=FOLDER"
SWEEP = "-m varies keys: -m lora.r=8,16, or sweep=lora-rank"
FOREIGN_TASKS = {
    **dict.fromkeys(("resume", "continue", "restart"), RESUME),
    **dict.fromkeys(("tune", "search", "hpo", "grid"), SWEEP),
    **dict.fromkeys(("deploy", "vllm", "ollama"), SERVE),
}
"""Tasks that none here does, and what does instead."""

RUN_FOLDER = "hydra.run.dir"
"""What resumes the run of a folder."""

FOREIGN_REMEDIES = {
    **dict.fromkeys(
        ("gpu", "gpus", "gpu_id", "gpu_ids", "cuda_visible_devices", "device_ids"),
        "put CUDA_VISIBLE_DEVICES=0 before the command",
    ),
    **dict.fromkeys(
        ("num_gpus", "n_gpus", "n_gpu", "nproc_per_node", "num_processes", "world_size", "devices"),
        "start it with torchrun --nproc-per-node=2 -m qlora (docs/multi_gpu.md)",
    ),
    **dict.fromkeys(
        ("deepspeed", "zero", "zero_stage", "ds_config"),
        "several GPUs share a model by trainer.parallel=fsdp (docs/multi_gpu.md)",
    ),
    **dict.fromkeys(("verbose", "debug", "v", "vv"), "add hydra.verbose=true to see what libraries say"),
    **dict.fromkeys(("dry_run", "dryrun", "print_config", "show_config"), "add --cfg job to see the config alone"),
}
"""Names of other tools that no key stands for, and what does it here."""

FOREIGN_VALUES = {
    "data.format": {
        **dict.fromkeys(("sharegpt", "share-gpt", "vicuna", "from-value"), "data.format=conversations"),
        **dict.fromkeys(
            ("chatml", "openai", "chat", "chat_template", "message", "conversation", "oai", "ultrachat", "trl"),
            "data.format=messages",
        ),
        **dict.fromkeys(("instruction", "instruct", "dolly", "instructions", "alpaca_chat"), "data.format=alpaca"),
        **dict.fromkeys(("completion", "raw", "pretrain", "corpus", "plain"), "data.format=text"),
        **dict.fromkeys(("json", "jsonl", "csv", "tsv", "parquet", "default", "none"), "data.format=auto"),
        **dict.fromkeys(("qa", "q&a"), "data.format=question-answer"),
        **dict.fromkeys(("prompt", "prompt_completion"), "data.format=prompt-completion"),
        **dict.fromkeys(("input_output",), "data.format=input-output"),
        **dict.fromkeys(("dpo", "preference", "rlhf"), "data.format=chosen"),
        **dict.fromkeys(("segment",), "data.format=segments"),
    },
    "data.template": {
        **dict.fromkeys(("llama3", "llama-3.1", "llama3.1"), "data.template=llama-3"),
        **dict.fromkeys(("llama2",), "data.template=llama-2"),
        **dict.fromkeys(("qwen2", "qwen2.5", "qwen3"), "data.template=qwen"),
        **dict.fromkeys(("default", "tokenizer", "none"), "data.template=auto"),
        **dict.fromkeys(("phi3", "phi"), "data.template=phi-3"),
    },
    "device": {
        **dict.fromkeys(("gpu", "0", "cuda:0", "nvidia", "rocm", "hip", "true"), "device=cuda"),
        **dict.fromkeys(("mps", "metal", "none", "tpu"), "device=cpu"),
        **dict.fromkeys(("default", "best"), "device=auto"),
    },
    **{
        key: {
            **dict.fromkeys(("bfloat16", "torch.bfloat16"), f"{key}=bf16"),
            **dict.fromkeys(("float16", "torch.float16", "half"), f"{key}=fp16"),
            **dict.fromkeys(("float32", "torch.float32", "float"), f"{key}=fp32"),
        }
        for key in ("quantization.compute_dtype", "merge.dtype")
    },
    "resume": {
        **dict.fromkeys(("true", "yes", "on", "latest", "last", "checkpoint"), "resume=auto"),
        **dict.fromkeys(("false", "no", "off", "none"), "resume=never"),
        **dict.fromkeys(("always", "overwrite"), "resume=force"),
    },
    "trainer.optim": {
        **dict.fromkeys(("adam", "adamw", "adamw_hf", "adam_torch", "adamw_32bit"), "trainer.optim=adamw_torch"),
        **dict.fromkeys(("paged_adamw", "paged_adam", "adamw_paged"), "trainer.optim=paged_adamw_32bit"),
        **dict.fromkeys(("adam8bit", "adam_8bit", "adamw8bit", "8bit"), "trainer.optim=adamw_8bit"),
        **dict.fromkeys(("lion", "lion_pytorch"), "trainer.optim=lion_32bit"),
        **dict.fromkeys(("galore",), "trainer.optim=galore_adamw"),
        **dict.fromkeys(("apollo",), "trainer.optim=apollo_adamw"),
        **dict.fromkeys(("schedule_free", "schedulefree", "adamw_schedule_free"), "trainer.optim=schedule_free_adamw"),
    },
    "trainer.lr_scheduler_type": {
        **dict.fromkeys(("cosine_annealing", "cosine-annealing", "cos"), "trainer.lr_scheduler_type=cosine"),
        **dict.fromkeys(("none", "off", "fixed"), "trainer.lr_scheduler_type=constant"),
    },
    "tracking.mode": {**dict.fromkeys(("off", "none", "false", "no"), "tracking=none")},
}
"""Values of a key that other tools call otherwise, and what to write."""


def known_value(key: str, value: str) -> str | None:
    """Returns what to write for a value that other tools call otherwise; None: it is not known here."""
    if key == "resume" and "/" in value:
        return f"{RUN_FOLDER}={value}"
    return FOREIGN_VALUES.get(key, {}).get(value.lower())
