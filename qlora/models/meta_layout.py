"""The layers of a model as transformers builds it, read from the meta device, where weights take no memory.

The result is JSON: plans keep it in a file, so that torch is imported once for a model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from qlora.errors import DataError, UserError, describe_fault, did_you_mean
from qlora.experts.layout import ExpertsLayout, find_experts
from qlora.models.causal import check_is_causal
from qlora.models.decoder import EXPERTS, ROUTER, read_decoder
from qlora.models.experts_per_token import KEYS, experts_per_token
from qlora.models.layer_layout import read_layer
from qlora.models.model_config import check_settings
from qlora.models.read_weights import weights_read
from qlora.models.whole_modules import find_whole_modules, tied_modules
from qlora.upstream.peft import calls_layer

LEFT_OUT = ("model_type", "architectures", "auto_map", "quantization_config", "dtype", "torch_dtype")
"""Settings that say nothing of sizes."""
INDEX = re.compile(r"\.(\d+)\.")


def read_layout(settings: Mapping[str, Any], where: str, options: Collection[str] | None = None) -> dict[str, Any]:
    """Returns the layout of the model that settings describe; `where` names them in errors.

    Raises `DataError` where transformers builds no causal model from them. `options`: they are those of
    `model.architecture`, with these in its options, and one that the model type does not have raises `ConfigError`.
    """
    kind = str(settings.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise DataError(
            f"{where}: transformers does not know the model type {kind!r}{did_you_mean(kind, CONFIG_MAPPING)}, so its "
            "size is unknown; install a version of transformers that has it, or choose another model"
        )
    given = {name: value for name, value in settings.items() if name not in LEFT_OUT}
    given["pad_token_id"] = 0  # those of defaults may lie outside of a small vocabulary
    try:
        config = AutoConfig.for_model(kind, **given)
        check_is_causal(config, where)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except UserError:
        raise
    except Exception as error:  # whatever a model's own code raises for sizes that do not fit each other
        raise DataError(
            f"{where}: transformers builds no {kind} of these settings ({describe_fault(error)}); correct them"
        ) from error
    if options is not None:
        described = {name: value for name, value in settings.items() if name not in (*LEFT_OUT, "rope_theta")}
        check_settings(config, described, options)
    try:
        return _layout(model, where)
    except UserError:
        raise
    except Exception as error:  # a config like no other model's
        raise DataError(
            f"{where}: task=plan cannot read the layers of {kind} ({describe_fault(error)}); train it without a plan"
        ) from error


def _layout(model: Any, where: str) -> dict[str, Any]:
    config = model.config.get_text_config()
    matrices = read_decoder(model).matrices
    experts = find_experts(model)
    unread = any(matrix.kind == EXPERTS and matrix.name.rpartition(".")[0] not in experts for matrix in matrices)
    if unread and any(config.to_dict().get(key) for key in KEYS):  # others have such tensors in recurrences
        raise DataError(
            f"{where}: {config.model_type} computes its experts by code of its own, which task=plan does not count; "
            "choose a mixture that computes them as transformers' other models do, such as Qwen, Mixtral or gpt-oss"
        )
    routers = {matrix.name.removesuffix(".weight") for matrix in matrices if matrix.kind == ROUTER}
    linears = _linears(model, routers)
    count = max(1 + max((index for *_, index in linears if index is not None), default=0), config.num_hidden_layers)
    layers: list[list[Any]] = [[] for _ in range(count)]
    for linear, index in linears:
        layers[index or 0].append(linear)
    modules = _modules_by_layer(model, count)
    described = [read_layer(config, index, modules[index], layers[index]) for index in range(count)]
    units = [ExpertsLayout.of(module) for module in experts.values()]
    embedding = model.get_input_embeddings().weight
    vocabulary, hidden = map(int, embedding.shape)
    heads = _number(config, "num_attention_heads", 1)
    total = sum(weight.numel() for weight in model.parameters())
    return {
        "model_type": config.model_type,
        "hidden": hidden,
        "vocabulary": vocabulary,
        "tied": model.get_output_embeddings().weight is embedding,
        "heads": heads,
        "key_value_heads": _number(config, "num_key_value_heads", heads),
        "head_dim": _number(config, "head_dim", 0) or hidden // heads,
        "intermediate": _number(config, "intermediate_size", 0),
        "context": _number(config, "max_position_embeddings", 2048),
        "capped": bool(getattr(config, "attn_logit_softcapping", None)),
        "capped_logits": bool(getattr(config, "final_logit_softcapping", None)),
        "sinks": any(name.endswith(".sinks") for name, _ in model.named_parameters()),
        "layer_norm": any(isinstance(module, nn.LayerNorm) for module in model.modules()),
        "parameters": total,
        "layers": described,
        "experts": _experts(experts, units, config, where) if units else None,
        "whole": {
            name: [list(parameter.shape) for parameter in module.parameters(recurse=False)]
            for name, module in find_whole_modules(model).items()
        },
        "tied_modules": tied_modules(model),
        "output": next(name for name, module in model.named_modules() if module is model.get_output_embeddings()),
    }


def _linears(model: Any, routers: set[str]) -> list[tuple[dict[str, Any], int | None]]:
    """Returns the linear layers but for the output layer, each with the decoder layer that it lies in."""
    output, linears, seen = model.get_output_embeddings(), [], set()
    read = weights_read(model)
    left_out = (*read, *get_keys_to_not_convert(model))
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or module is output or module.weight in seen:
            continue
        seen.add(module.weight)  # some layers share a matrix (Zamba 2)
        is_turned = isinstance(module, Conv1D)
        rows, columns = module.weight.shape
        index = INDEX.search(name)
        linear = {
            "name": name[index.end() :] if index else name,
            "path": f"{name[: index.start(1)]}{{}}{name[index.end(1) :]}" if index else name,
            "inputs": int(rows if is_turned else columns),
            "outputs": int(columns if is_turned else rows),
            "bias": module.bias is not None,
            "is_adapted": name not in routers and not read.get(name) and calls_layer(name.rpartition(".")[2], model),
            "is_quantized": name not in left_out,
        }
        linears.append((linear, int(index[1]) if index else None))
    return linears


def _modules_by_layer(model: Any, count: int) -> list[dict[str, nn.Module]]:
    """Returns the modules of each decoder layer by their names below it."""
    layers: list[dict[str, nn.Module]] = [{} for _ in range(count)]
    for name, module in model.named_modules():
        if (index := INDEX.search(f"{name}.")) and int(index[1]) < count and (inner := name[index.end() :]):
            layers[int(index[1])][inner] = module
    return layers


def _experts(experts: Mapping[str, nn.Module], units: list[ExpertsLayout], config: Any, where: str) -> dict[str, Any]:
    sizes = Counter((unit.count, unit.hidden, unit.intermediate, unit.has_gate) for unit in units)
    if len(sizes) > 1:
        raise DataError(
            f"{where}: the experts of {config.model_type} differ from layer to layer, which task=plan does not count"
        )
    (count, hidden, intermediate, has_gate), _ = sizes.popitem()
    matches = [match for name in experts if (match := INDEX.search(f"{name}."))]
    first = next(iter(experts))
    return {
        "count": count,
        "per_token": min(experts_per_token(config.to_dict()), count),
        "hidden": hidden,
        "intermediate": intermediate,
        "has_gate": has_gate,
        "is_biased": units[0].has_bias,
        "module": first[match.end() :] if (match := INDEX.search(first)) else first,
        "layers": sorted(int(match[1]) for match in matches),
    }


def _number(config: Any, name: str, otherwise: int) -> int:
    """Returns a size of a config; of several, for each layer its own, the largest."""
    try:
        value = getattr(config, name, None)
    except AttributeError:
        value = None
    except Exception:  # a setting that layers have a value of their own for (Gemma 4)
        value = config.to_dict().get(name)
    if isinstance(value, list | tuple):
        value = max((item for item in value if isinstance(item, int)), default=None)
    return value if isinstance(value, int) and value > 0 else otherwise
