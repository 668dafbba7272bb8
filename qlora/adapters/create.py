"""Attaches a fresh LoRA adapter to a base."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft import EvaConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import cast_adapter_dtype
from transformers import PreTrainedModel

from qlora.adapters.biases import copy_biases, keep_biases
from qlora.adapters.experts import attach_experts, set_dropout
from qlora.adapters.head import HeadLayout, attach_head, start_head
from qlora.adapters.kinds import add_other_kind
from qlora.adapters.loftq import correct_quantization, original_weights
from qlora.adapters.per_expert import check_per_expert
from qlora.adapters.targets import find_targets, last_name, move_taken
from qlora.adapters.whole_modules import find_modules_to_save, prepare_whole
from qlora.config.schema import LoraBias, LoraConfig, LoraDtype, LoraInit
from qlora.errors import ConfigError
from qlora.models.weight_files import Tensors
from qlora.upstream.peft import base_of, lora_config, names_kept

log = logging.getLogger(__name__)

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
"""What `lora=attention` adapts."""
# LoftQ as PEFT computes it would replace the base weights; `correct_quantization` leaves them alone.
PEFT_INIT: dict[LoraInit, Any] = {
    LoraInit.default: True,
    LoraInit.gaussian: "gaussian",
    LoraInit.orthogonal: "orthogonal",
    LoraInit.pissa: "pissa",
    LoraInit.olora: "olora",
    LoraInit.loftq: True,
    LoraInit.eva: "eva",
}
REWRITES_BASE = (LoraInit.pissa, LoraInit.olora)


def add_lora(
    config: LoraConfig,
    model: PreTrainedModel,
    *,
    tensors: Callable[[], Tensors],
    new_token_ids: list[int],
    batches: Iterable[dict[str, torch.Tensor]],
    head: HeadLayout | None = None,
) -> PeftModel:
    """Attaches a fresh adapter; its weights come from torch's current seed and are stored in `config.dtype`.

    With `head` one is trained and saved with it. `tensors` opens the 16-bit weights (read by LoftQ),
    `batches` yields training batches (read by EVA).
    Raises `ConfigError` for targets that match nothing.
    """
    if config.other_kind is not None:
        return add_other_kind(config, model)
    targets = find_targets(config, model)
    alpha: Any = config.alpha  # PEFT declares an integer, and divides any number by the rank
    bias: Any = config.bias.value
    alphas: Any = targets.alphas(config)
    whole = find_modules_to_save(config, model, targets.modules)
    has_matrix = head is not None and head.outputs > 0
    if head is not None and has_matrix:
        attach_head(model, head.outputs)
    peft_config = PeftLoraConfig(
        task_type=_task_type(head),
        r=config.r,
        lora_alpha=alpha,
        lora_dropout=0.0 if targets.parameters else config.dropout,
        bias=bias,
        target_modules=targets.modules,
        target_parameters=targets.parameters or None,
        rank_pattern={**targets.rank_pattern, **targets.ranks},
        alpha_pattern=alphas,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=PEFT_INIT[config.init],
        eva_config=EvaConfig() if config.init is LoraInit.eva else None,
        trainable_token_indices=_rows_to_train(model, new_token_ids, whole or []),
        modules_to_save=whole,
    )
    try:
        with names_kept():
            adapted = get_peft_model(model, peft_config, low_cpu_mem_usage=config.init is LoraInit.eva)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(
            f"lora.target_modules={config.target_modules}: PEFT cannot adapt this {model.config.model_type} "
            f"({str(error).strip().splitlines()[0].rstrip('.')}); name other layers in lora.target_modules, or use "
            "lora=all-linear"
        ) from error
    prepare_whole(adapted, config.dtype)
    if has_matrix:
        start_head(adapted)
    if config.init is LoraInit.loftq:
        correct_quantization(adapted, original_weights(tensors(), model.base_model_prefix))
    elif config.init is LoraInit.eva:
        _start_from_data(adapted, batches)
        cast_adapter_dtype(adapted.base_model, "default")  # EVA leaves the base's dtype behind
    if config.bias is not LoraBias.none:
        biases = [pair for pair in copy_biases(adapted) if pair[0].requires_grad]
        if not biases:
            log.warning("lora.bias=%s: the layers it selects have no biases, so none is trained", config.bias.value)
        keep_biases(adapted, biases)
    store_in(config.dtype, adapted)
    freeze_a(config, adapted)
    complete_adapter(adapted, config.dropout)
    if config.per_expert:
        check_per_expert(adapted)
    return adapted


def _task_type(head: HeadLayout | None) -> str:
    """Returns what PEFT calls that which the model is for."""
    if head is None:
        return "CAUSAL_LM"
    return "SEQ_CLS" if head.outputs else "FEATURE_EXTRACTION"


def complete_adapter(model: PeftModel, dropout: float) -> None:
    """Makes what PEFT attached an adapter of this project: experts read it, and plain PEFT can load it.

    `dropout` is that of training, which PEFT refuses beside adapters on tensors of experts.
    """
    base, config = base_of(model), lora_config(model)
    attach_experts(model, dropout)
    move_taken(config, base)
    if config.target_parameters:
        config.lora_dropout = 0.0
        set_dropout(model, dropout)
    if getattr(base.config, "output_router_logits", False):  # it would add the routers' own loss, and these are frozen
        base.config.output_router_logits = False


def store_in(dtype: LoraDtype, model: PeftModel) -> None:
    """Stores the matrices of an adapter, which PEFT makes in 32 bits, as `dtype` says."""
    if dtype is LoraDtype.bf16:
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.bfloat16()


def freeze_a(config: LoraConfig, model: PeftModel) -> None:
    """Keeps the A matrices as they are, where `config` asks for that (LoRA-FA)."""
    if config.freeze_a:
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)


def _start_from_data(model: PeftModel, batches: Iterable[dict[str, torch.Tensor]]) -> None:
    """Lets PEFT start an adapter from the inputs of its layers (EVA), which must be [rows, tokens, features]."""
    _check_rank_for_data(model)
    try:
        initialize_lora_eva_weights(model, dataloader=batches, show_progress_bar=False)
    except (ValueError, IndexError) as error:
        base = model.get_base_model()
        adapted = {last_name(name) for name, module in base.named_modules() if isinstance(module, LoraLayer)}
        elsewhere = "lora=attention lora.init=eva, or " if adapted > ATTENTION else ""
        raise ConfigError(
            f"lora.init=eva: PEFT cannot start from what some layers of this {model.config.model_type} read "
            f"({str(error).strip().splitlines()[0]}); use {elsewhere}lora=all-linear lora.init=default"
        ) from error


def _check_rank_for_data(model: PeftModel) -> None:
    """Raises `ConfigError` where EVA would look for more directions than a layer reads features."""
    config = lora_config(model)
    assert config.eva_config is not None
    layers: dict[str, Any] = {
        name: module for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)
    }
    name = min(layers, key=lambda name: layers[name].in_features)
    features, directions = layers[name].in_features, round(config.r * config.eva_config.rho)
    if directions > features:
        raise ConfigError(
            f"lora.r={config.r}: lora.init=eva looks for {directions} directions in what a layer reads, and {name} "
            f"reads {features} features; set lora.r={int(features / config.eva_config.rho)} or less, or use "
            "lora=all-linear lora.init=default"
        )


def _rows_to_train(model: PreTrainedModel, new_token_ids: list[int], whole: list[str]) -> dict[str, list[int]] | None:
    """Returns the rows of new tokens by matrix: of the embedding and, where it is a matrix of its own, the output.

    A matrix that trains whole is not among them.
    """
    if not new_token_ids:
        return None
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    matrices = [embedding] if output is None or output.weight is embedding.weight else [embedding, output]
    names = [name for name, module in model.named_modules() if any(module is matrix for matrix in matrices)]
    return {name: sorted(set(new_token_ids)) for name in names if name not in whole} or None
