"""The trained matrices of a model, for optimizers that take a matrix as a whole and not number by number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from qlora.upstream.peft import ExpertsWrapper
from qlora.upstream.transformers_experts import is_experts

Matrices = Mapping[nn.Parameter, int]
"""Parameters that are matrices, or the matrices of experts one below the other, and how many of them."""


def find_matrices(model: nn.Module) -> Matrices:
    """Returns the trained matrices: those of LoRA, else those of all layers but embeddings and the output matrix."""
    candidates = _of_adapter(model) if isinstance(model, PeftModel) else _of_model(model)
    return {parameter: count for parameter, count in candidates if parameter.requires_grad}


def as_matrices(tensor: Tensor, count: int) -> Tensor:
    """Returns a view of a parameter's tensor as [matrices, rows, columns]."""
    return tensor.view(count, -1, tensor.shape[-1])


def split_groups(
    groups: Iterable[Any], is_chosen: Callable[[nn.Parameter], bool], settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Returns an optimizer's groups, each in two: the chosen parameters, which get `settings`, and the others."""
    split: list[dict[str, Any]] = []
    for group in groups:
        chosen = [parameter for parameter in group["params"] if is_chosen(parameter)]
        others = [parameter for parameter in group["params"] if not is_chosen(parameter)]
        split += [{**group, "params": chosen, **settings}] if chosen else []
        split += [{**group, "params": others}] if others else []
    return split


def _of_adapter(model: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    for module in model.modules():
        if not isinstance(module, LoraLayer) or (
            isinstance(module, ParamWrapper) and not isinstance(module, ExpertsWrapper)
        ):
            continue
        count = module.num_experts if isinstance(module, ExpertsWrapper) else 1
        for matrix in (*module.lora_A.values(), *module.lora_B.values()):
            weight = getattr(matrix, "weight", matrix)
            if isinstance(weight, nn.Parameter) and (weight.dim() == 2 or isinstance(module, ExpertsWrapper)):
                yield weight, count


def _of_model(model: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    embeddings = {
        module.weight for module in model.modules() if isinstance(module, nn.Embedding) or module is head
    }  # a tied matrix is both
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "weight" and parameter.dim() == 2 and parameter not in embeddings:
                yield parameter, 1
            elif is_experts(module) and parameter.dim() == 3:
                yield parameter, parameter.shape[0]
