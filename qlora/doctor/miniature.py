"""One small decoder layer of the model's architecture: if it fails here, the full model would fail too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel, set_seed

from qlora import adapters
from qlora.config.registries.objectives import Head, RowKind
from qlora.config.schema import ArchitectureConfig, Config, LoraInit, Weights
from qlora.config.schema.head import planned_outputs
from qlora.experts.layout import find_experts
from qlora.models import loading
from qlora.models.model_config import build_model_config
from qlora.models.random_weights import RandomWeights
from qlora.models.tokenizer import load_tokenizer
from qlora.objectives import build_objective
from qlora.objectives.answers import AnswerLoss
from qlora.objectives.head_loss import HeadLoss
from qlora.objectives.protocol import TRUTH
from qlora.quantization.method import find_method, method_of
from qlora.runtime.device import Placement
from qlora.step.fast_step import FastStep

ROWS, TOKENS, HEADS, HEAD_WIDTH = 2, 24, 4, 32
SMALL_MIXTURE: dict[str, Any] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 64),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), HEAD_WIDTH),
    "first_k_dense_replace": 0,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
"""The sizes of a small mixture whose first layer has experts."""
SMALL_OPTIONS: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "global_head_dim"), HEAD_WIDTH),
    "mamba_n_heads": 2 * HEADS,
    "mamba_d_state": 16,
    "shared_intermediate_size": 64,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 1600,
    "num_kv_shared_layers": 0,
    "num_global_key_value_heads": 1,
    "top_k_experts": 2,
    "num_dense_layers": 0,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_num_shared_experts": 1,
    "moe_layer_start_index": 0,
}
"""The sizes of a small layer that stand in `model.architecture.options`."""


@dataclass(frozen=True)
class Trial:
    """What training one small layer showed."""

    parts: dict[str, str]
    """The parts of the fast step: `on`, or why not."""
    rounding: float | None
    """The relative error of the 4-bit weights: about 0.09 for NF4, 0.12 for FP4; None: they have more bits."""
    agreement: float
    """The cosine between the gradients before an evaluation and after it: 1 where nothing is wrong."""
    has_experts: bool
    """Whether the layer is one of a mixture of experts."""


def try_layer(config: Config, architecture: ArchitectureConfig, placement: Placement) -> Trial:
    """Trains one layer for a step as `config` says, before and after an evaluation; raises what that raises."""
    small = _shrink(architecture)
    tiny = replace(
        config.model,
        name="tiny",
        tokenizer=None,
        weights=Weights.random,
        architecture=small,
        new_tokens=[],
        device_map=None,
        max_memory=None,
    )
    tokenizer = load_tokenizer(tiny)
    weights = RandomWeights(build_model_config(tiny, tokenizer), placement=placement, seed=config.seed)
    base = loading.build_random_base(tiny, config.quantization, weights)
    rounding = None
    if find_method(config.quantization).largest_error(config.quantization) is not None:
        rounding = _rounding(base, weights)
    model = _with_adapter(config, base)
    base.config.use_cache = False  # as the trainer has it
    objective = build_objective(config.loss, config.head)
    reference = None
    if isinstance(objective, AnswerLoss) and objective.compares and isinstance(model, PeftModel):
        reference = adapters.reference_at_start(model, is_base=False)
    ids = _ids(placement)
    first = _gradient(model, {"input_ids": ids, "labels": ids}, placement)  # a step may evaluate as it is built
    step = FastStep(model, config.trainer, config.quantization, placement, None, objective, reference)
    model.eval()
    with torch.no_grad(), placement.autocast():
        model(input_ids=ids)
    after = _gradient(model, {"input_ids": ids, "labels": ids}, placement)
    with step:
        _gradient(model, _batch(ids, objective), placement)
    agreement = float(torch.nn.functional.cosine_similarity(first, after, dim=0))
    return Trial(step.parts, rounding, agreement, has_experts=bool(find_experts(base)))


def _shrink(architecture: ArchitectureConfig) -> ArchitectureConfig:
    grouped = architecture.num_key_value_heads not in (None, architecture.num_attention_heads)
    kind = architecture.model_type
    defaults = CONFIG_MAPPING[kind]() if kind in CONFIG_MAPPING else None
    mixture = {
        name: size
        for name, size in SMALL_MIXTURE.items()
        if _is_set(getattr(architecture, name), getattr(defaults, name, None))
    }
    said = {name: value for name, value in architecture.options.items() if not isinstance(value, list)}
    small = {
        name: size
        for name, size in SMALL_OPTIONS.items()
        if name in said or (hasattr(defaults, name) and _is_set(None, getattr(defaults, name)))
    }
    small = {name: size for name, size in small.items() if said.get(name) != 0}  # the model has none
    return replace(
        architecture,
        options={**said, **small},
        hidden_size=HEADS * HEAD_WIDTH,
        intermediate_size=None if architecture.intermediate_size is None else 2 * HEADS * HEAD_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2 if grouped else HEADS if architecture.num_key_value_heads else None,
        head_dim=HEAD_WIDTH if architecture.head_dim else None,
        vocab_size=1600,
        max_position_embeddings=512,
        **mixture,
    )


def _is_set(value: Any, default: Any) -> bool:
    """Returns whether a model has a size: by what is written, or else by its model type. A 0 says that it has none."""
    return default is not None if value is None else value != 0


def _with_adapter(config: Config, base: PreTrainedModel) -> PreTrainedModel | PeftModel:
    set_seed(config.seed)
    if not config.lora.enabled:
        return base.requires_grad_(True)
    lora = replace(config.lora, init=LoraInit.default, dropout=0.0)
    return adapters.add_lora(lora, base, tensors=_no_tensors, new_token_ids=[], batches=(), head=_head(config))


def _head(config: Config) -> adapters.HeadLayout | None:
    """Returns a head as the config's, with as many outputs as it names."""
    if not config.loss.has_head:
        return None
    if config.loss.head is Head.embed:
        return adapters.HeadLayout(Head.embed, 0, pooling="last")
    return adapters.HeadLayout(config.loss.head, planned_outputs(config.head, config.loss, config.data))


def _no_tensors() -> RandomWeights:
    raise AssertionError("only LoftQ reads them")


def _rounding(base: PreTrainedModel, weights: RandomWeights) -> float | None:
    method = method_of(base)
    for name, module in base.named_modules():
        if isinstance(module, method.layer_classes()):
            exact = weights.read(f"{name}.weight").float()
            rounded = method.dequantize(module).float().cpu()
            return float((rounded - exact).norm() / exact.norm())
    return None


def _ids(placement: Placement) -> Tensor:
    return torch.arange(10, 10 + ROWS * TOKENS, device=placement.device).view(ROWS, TOKENS)


def _batch(ids: Tensor, objective: Any) -> dict[str, Tensor]:
    """Returns a batch of what an objective trains on."""
    batch = {"input_ids": ids, "labels": ids}
    if isinstance(objective, AnswerLoss):  # two answers that begin alike
        batch = dict.fromkeys(batch, torch.stack([ids, torch.cat([ids[:, :2], ids[:, 2:] + 1], 1)], 1))
        if "desirable" in objective.columns:
            batch["desirable"] = torch.arange(len(ids), device=ids.device) % 2 == 0
    elif isinstance(objective, HeadLoss) and objective.rows is RowKind.texts:
        batch = dict.fromkeys(batch, torch.stack([ids, ids + 1], 1))
        batch[TRUTH] = torch.arange(len(ids), device=ids.device)[:, None]
    elif isinstance(objective, HeadLoss):
        truth = torch.arange(len(ids), device=ids.device) % 2
        batch[TRUTH] = truth if objective.rows is RowKind.classes else truth[:, None].float()
    return batch


def _gradient(model: torch.nn.Module, batch: dict[str, Tensor], placement: Placement) -> Tensor:
    """Returns the gradients of all trained weights as a vector; raises `ArithmeticError` for NaN, infinity or zero."""
    model.train()
    model.zero_grad(set_to_none=True)
    with placement.autocast():
        loss = model(**batch, attention_mask=torch.ones_like(batch["input_ids"])).loss
    loss.backward()
    vector = torch.cat([gradient.flatten().float() for gradient in _gradients(model)])  # one that is missing is zero
    if not (torch.isfinite(loss) and torch.isfinite(vector).all() and vector.any()):
        raise ArithmeticError(f"the loss is {loss.item():g} and the gradient's norm {vector.norm().item():g}")
    return vector


def _gradients(model: torch.nn.Module) -> Iterator[Tensor]:
    for parameter in model.parameters():
        if parameter.requires_grad:
            yield parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
