"""The YAML and the arguments of LLaMA-Factory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlora.config.overrides import write_override
from qlora.errors import ConfigError
from qlora.migrate import hf_arguments, preferences, shared_rules
from qlora.migrate.llama_factory_data import choose_data
from qlora.migrate.translation import Dialect, Lost, Move, OnlyIf, Part, Pick, Rule, Same, Settings
from qlora.migrate.vocabulary import FACTORY_KEYS, TRAINING_ARGUMENTS

STAGES = {"sft": None, "pt": None, "dpo": "dpo", "kto": "kto", "rm": "reward"}
"""What is trained, each with its method where it is a loss over answers."""
DEFAULTS: dict[str, Any] = {
    **hf_arguments.DEFAULTS,
    "stage": "sft",
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "lora_dropout": 0.0,
    "quantization_method": "bnb",
    "quantization_type": "nf4",
    "double_quantization": True,
    "cutoff_len": 2048,
    "val_size": 0.0,
    "dataset_dir": "data",
    "mix_strategy": "concat",
    "enable_thinking": True,
    "gradient_checkpointing": True,
    "pref_beta": 0.1,
    "pref_ftx": 0.0,
    "pref_loss": "sigmoid",
    "kto_chosen_weight": 1.0,
    "kto_rejected_weight": 1.0,
    "simpo_gamma": 0.5,
}
"""Of 0.9.6; it turns gradient checkpointing on by itself."""
ANSWERS: dict[str, Any] = {"do_sample": True, "temperature": 0.95, "top_p": 0.7, "top_k": 50, "max_new_tokens": 1024}
"""How a model answers where `do_predict` asks it to."""


def _model(settings: Settings) -> Iterator[Part]:
    if (stage := str(settings.take("stage"))) not in STAGES:
        raise ConfigError(f"from: stage={stage} {preferences.GENERATES}")
    if settings.look("export_dir") and not (settings.look("dataset") or settings.look("do_train")):
        raise ConfigError("from: export_dir merges an adapter, and trains nothing; here task=merge adapter=FOLDER does")
    yield from shared_rules.choose_model(str(settings.take("model_name_or_path", "unset")), "model_name_or_path")
    yield from shared_rules.choose_revision(settings.take("model_revision"))


def _bits(settings: Settings) -> Iterator[Part]:
    kind = str(settings.take("finetuning_type"))
    if kind not in ("lora", "oft", "full"):
        yield Lost("an adapter is trained in its place: here are LoRA and all weights (lora=none)", "finetuning_type")
    bits = settings.take("quantization_bit")
    if bits not in (None, 4, 8):
        yield Lost("bitsandbytes has 4 and 8 bits; 4 are taken", "quantization_bit")
    if settings.take("quantization_method") not in ("bitsandbytes", "bnb"):
        yield Lost("bases are quantized by bitsandbytes here", "quantization_method")
    bf16, pure, fp16 = (bool(settings.take(name)) for name in ("bf16", "pure_bf16", "fp16"))
    dtype = "bf16" if bf16 or pure else "fp16" if fp16 else "auto"
    number = 16 if bits is None else 8 if bits == 8 else 4
    if kind == "full" and not pure:
        number = 32  # the weights to train are stored in 32 bits, and matmuls have those of autocast
    double = settings.take("double_quantization") is not False
    yield from shared_rules.choose_quantization(
        number, str(settings.take("quantization_type")), double=double, dtype=dtype, lora=kind != "full"
    )
    if pure and kind != "full":
        yield "lora.dtype=bf16"


def _lora(settings: Settings) -> Iterator[Part]:
    whole = settings.take("additional_target")
    if settings.look("finetuning_type") != "full":
        yield from shared_rules.choose_whole_modules(whole, "additional_target")
    if settings.look("finetuning_type") == "oft":
        yield from _oft(settings)
        return
    r = int(settings.take("lora_rank"))
    yield f"lora.r={r}"
    yield write_override("lora.alpha", settings.take("lora_alpha") or 2 * r)
    yield from shared_rules.choose_targets(settings.take("lora_target"))
    if settings.take("pissa_init"):
        if settings.look("quantization_bit"):
            yield Lost("needs 16-bit weights here too; lora.init=loftq or eva start well on 4-bit ones", "pissa_init")
        else:
            yield "lora.init=pissa"


def _oft(settings: Settings) -> Iterator[Part]:
    settings.read |= {"lora_rank", "lora_alpha", "lora_target", "lora_dropout", "oft_rank"}
    yield "lora=oft"
    yield write_override("lora.options.oft_block_size", settings.take("oft_block_size") or 32)
    if settings.look("oft_rank"):
        yield Lost("the size of blocks is set here, not their number: set lora.options.oft_block_size", "oft_rank")
    if dropout := settings.take("module_dropout"):
        yield write_override("lora.options.module_dropout", float(dropout))
    yield from shared_rules.choose_targets(settings.take("oft_target") or "all")


def _optimizer(settings: Settings) -> Iterator[Part]:
    for flag in ("use_badam", "use_adam_mini"):
        if settings.take(flag):
            yield Lost("there is no such optimizer here; the one of optim is taken", flag)
    if settings.take("use_muon"):
        yield "trainer.optim=muon"
    for name in ("galore", "apollo"):
        if settings.take(f"use_{name}"):
            yield from _projection(settings, name)
    if settings.take("disable_gradient_checkpointing"):
        yield "trainer.gradient_checkpointing=false"
        settings.read.add("gradient_checkpointing")
    if "data_seed" not in settings:
        yield write_override("data.split_seed", settings.look("seed"))
    if (steps := settings.take("early_stopping_steps")) is not None:
        yield "callbacks=early-stopping"
        yield f"callbacks.early_stopping.patience={steps}"


PROJECTED = {
    "galore": {"rank": 16, "update_interval": 200, "scale": 2.0, "proj_type": "std"},
    "apollo": {"rank": 16, "update_interval": 200, "scale": 32.0, "proj": "random", "scale_type": "channel"},
}
"""What GaLore and APOLLO take, with its defaults."""


def _projection(settings: Settings, name: str) -> Iterator[Part]:
    values = {
        {"update_interval": "update_proj_gap"}.get(key, key): settings.take(f"{name}_{key}", default)
        for key, default in PROJECTED[name].items()
    }
    optim = str(settings.look("optim"))
    if name == "galore" and optim.startswith(("adamw", "adafactor")) and "8bit" in optim:
        yield Lost("GaLore's states are in the dtype of the weights here", "optim")
    yield from shared_rules.choose_projection(
        "galore_adafactor" if name == "galore" and optim == "adafactor" else f"{name}_adamw", values
    )
    if settings.take(f"{name}_target", "all") != "all":
        yield Lost("every matrix is projected but embeddings and the output matrix", f"{name}_target")
    if settings.take(f"{name}_layerwise"):
        yield Lost(shared_rules.LAYERWISE, f"{name}_layerwise")
    if name == "apollo":
        if settings.take("apollo_proj_type", "std") != "std":
            yield Lost("the shorter side of a matrix is projected", "apollo_proj_type")
        if settings.take("apollo_scale_front"):
            yield Lost("gradients are scaled after their growth is limited", "apollo_scale_front")


PAIR_LOSSES = {"sigmoid": "dpo", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}
LOSS_KEYS = {
    "beta": "pref_beta", "label_smoothing": "dpo_label_smoothing", "loss_type": "pref_loss", "rpo_alpha": "pref_ftx",
    "desirable_weight": "kto_chosen_weight", "undesirable_weight": "kto_rejected_weight", "cpo_alpha": "pref_ftx",
    "simpo_gamma": "simpo_gamma",
}  # fmt: skip
"""The names of TRL, each with the one here."""


def _loss(settings: Settings) -> Iterator[Part]:
    """The loss over answers of the stages dpo, kto and rm."""
    method = STAGES[str(settings.look("stage"))]
    if method is None:
        for key in (*LOSS_KEYS.values(), "pref_bco_weight", "ld_alpha"):
            settings.take(key)
            yield Same("it is read by the stages dpo and kto alone", key)
        return
    kind, ftx = str(settings.take("pref_loss")), float(settings.take("pref_ftx"))
    values = {name: settings.take(key) for name, key in LOSS_KEYS.items() if name != "loss_type"}
    if method == "dpo":
        method = PAIR_LOSSES.get(kind, "dpo")
        if kind not in PAIR_LOSSES:
            yield Lost(f"{kind} is not here: loss=dpo is trained in its place", "pref_loss")
    yield from preferences.choose_loss(preferences.Answers(method, values, LOSS_KEYS))
    if method == "orpo":
        yield Lost("the likelihood is that of the chosen answer there, here that of its prompt too, as ORPO's authors "
                   "have it", "pref_loss")  # fmt: skip
    if ftx and method in ("orpo", "kto", "reward"):
        yield Lost(f"loss={method} adds no cross entropy of chosen answers here", "pref_ftx")
    if settings.take("pref_bco_weight"):
        yield Lost(preferences.NOT_READ, "pref_bco_weight")
    if settings.take("ld_alpha") is not None:
        yield Lost("all tokens of an answer count alike", "ld_alpha")
    for key in ("ref_model", "ref_model_adapters", "ref_model_quantization_bit"):
        if settings.take(key) is not None:
            yield Lost(preferences.REFERENCE_MODEL, key)
    if method != "reward":
        if settings.take("lora_dropout"):
            yield Lost("dropout is off there where answers are compared, and so it is in the command", "lora_dropout")
        yield from preferences.NO_DROPOUT
    if method == "kto" and settings.look("per_device_train_batch_size") == 1:
        settings.read.add("per_device_train_batch_size")
        yield "trainer.per_device_train_batch_size=2"
        yield Lost(preferences.LABEL_ROWS, "per_device_train_batch_size")


def _start(settings: Settings) -> Iterator[Part]:
    """The adapter that a loss over answers trains further; its reference is the base there."""
    adapter, loss = settings.look("adapter_name_or_path"), str(settings.look("pref_loss"))
    yield write_override("lora.start", adapter)
    if str(settings.look("stage")) == "kto" or loss not in ("orpo", "simpo"):
        yield "loss.reference=base"


def _task(settings: Settings) -> Iterator[Part]:
    trains, predicts = settings.take("do_train"), settings.take("do_predict")
    adapter = settings.take("adapter_name_or_path")
    answers = {name: settings.take(name) for name in ANSWERS}
    if trains or not predicts:
        is_one = isinstance(adapter, str) and "," not in adapter and not settings.look("create_new_adapter")
        if is_one and STAGES[str(settings.look("stage"))] in ("dpo", "kto"):
            yield from _start(settings)
        elif adapter:
            yield Lost(
                "training begins with a fresh adapter; merge it first (task=merge), and train on that",
                "adapter_name_or_path",
            )
        return
    yield "task=predict"
    yield write_override("adapter", adapter or "none")
    for name, value in answers.items():
        yield write_override(f"generation.{name}", ANSWERS[name] if value is None else value)


RULES: dict[str, Rule] = hf_arguments.RULES | {
    "trust_remote_code": Move("model.trust_remote_code"),
    "cache_dir": Move("model.cache_dir"),
    "flash_attn": Pick(
        {"auto": (), "disabled": ("model.attn_implementation=eager",), "sdpa": ("model.attn_implementation=sdpa",),
         "fa2": ("model.attn_implementation=flash_attention_2",)}
    ),
    "lora_dropout": Move("lora.dropout"),
    "use_rslora": Move("lora.use_rslora"),
    "use_dora": Move("lora.use_dora"),
    "loraplus_lr_ratio": Move("lora.loraplus_lr_ratio"),
    "loraplus_lr_embedding": Same("embeddings have no adapter here"),
    "moe_aux_loss_coef": OnlyIf((0,), shared_rules.BALANCE),
    "new_special_tokens": Lost("give them as a list: model.new_tokens=[...]"),
    "add_tokens": Lost("give them as a list: model.new_tokens=[...]"),
    "add_special_tokens": Lost("give them as a list: model.new_tokens=[...]"),
    "preprocessing_num_workers": Move("data.num_proc"),
    "mix_strategy": OnlyIf(("concat",), "sets are joined row by row; give each a weight in data.mix.NAME.weight"),
    "interleave_probs": Lost(shared_rules.WEIGHTS),
    "streaming": OnlyIf((False,), shared_rules.STREAMING),
    "eval_on_each_dataset": Lost("held-out rows are measured together"),
    "disable_shuffling": Lost("the order of rows is drawn from seed"),
    "compute_accuracy": Lost("see the metrics of evaluation="),
    "rope_scaling": Lost("set model.rope_scaling, e.g. {rope_type: yarn, factor: 4}"),
    "resize_vocab": Same("the embedding grows for model.new_tokens by itself"),
    "upcast_layernorm": Same("norms compute in 32 bits under autocast"),
    "create_new_adapter": Lost("training begins with a fresh adapter"),
    "use_llama_pro": Lost("no layers are added here"),
    "quantization_device_map": Same(),
    "freeze_vision_tower": Same("only text is trained here"),
    "freeze_multi_modal_projector": Same("only text is trained here"),
    **dict.fromkeys(("tokenized_path", "eval_num_beams", "shift_attn", "mixture_of_depths", "use_dft_loss",
                     "use_asft_loss", "use_eaft_loss", "reward_model", "ref_model", "train_from_scratch"),
                    Lost("there is no such option here")),
    **dict.fromkeys(("hf_hub_token", "ms_hub_token", "om_hub_token"), Same(shared_rules.REMOTE)),
    **dict.fromkeys(("image_max_pixels", "image_min_pixels", "video_max_pixels", "video_min_pixels", "media_dir"),
                    Same(shared_rules.NO_MEDIA)),
    **dict.fromkeys(("enable_liger_kernel", "use_unsloth", "use_unsloth_gc", "use_reentrant_gc"),
                    Same(shared_rules.SPEED)),
    **dict.fromkeys(
        ("buffer_size", "data_shared_file_system", "ignore_pad_token_for_loss", "infer_backend",
         "include_effective_tokens_per_second", "low_cpu_mem_usage", "max_length", "offload_folder", "overwrite_cache",
         "per_device_predict_batch_size", "pissa_convert", "pissa_iter", "plot_loss", "preprocessing_batch_size",
         "print_param_status", "skip_special_tokens", "use_fast_tokenizer", "use_kv_cache", "repetition_penalty",
         "num_beams", "length_penalty", "export_dir", "export_size", "export_device", "export_legacy_format"),
        Same(),
    ),
}  # fmt: skip
FACTORY = Dialect(
    name="LLaMA-Factory",
    version="0.9.6",
    model_key="model_name_or_path",
    keys=TRAINING_ARGUMENTS | FACTORY_KEYS,
    defaults=DEFAULTS,
    fixed=hf_arguments.FIXED,
    rules=RULES,
    joints=(_model, _bits, _lora, hf_arguments.schedule, _optimizer, choose_data, _loss, _task),
    prefixes={prefix: Lost("there is no such option here") for prefix in ("galore_", "apollo_", "badam_", "freeze_",
              "ray_", "fp8", "oft_", "pref_", "swanlab_", "kt_", "vllm_", "infer_", "sglang_", "profiler_")},
)  # fmt: skip
