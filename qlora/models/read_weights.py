"""Finds linear layers whose weight a model's code reads by itself, where it does not call the layer.

Kernels of Mamba take the weight of its output projection, and Gemma 3n clamps those of its alternating updates. Packed
bits in that place would be wrong, and so would an adapter, which only a call reaches.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from qlora.config.schema import QuantizationConfig
from qlora.quantization.method import QuantizationMethod
from qlora.runtime.device import Placement

DESCRIBES = frozenset({"dtype", "shape", "type"})
"""What of a weight is read that packed bits have, too, but other than the weight; an adapter changes none of it."""
HARMLESS = frozenset({"device"})
READ = re.compile(r"\bself\.\w+\.weight\b")
NEVER = "pretraining_tp"
"""A setting of BLOOM for checking its training; code under it reads weights."""


def describe_quantization(
    method: QuantizationMethod, quantization: QuantizationConfig, placement: Placement, empty: PreTrainedModel
) -> Any | None:
    """Returns transformers' description of a quantized base; layers that `weights_read` finds are left as they are.

    `empty` is the base before it is quantized, on the meta device. None: it is loaded unquantized.
    """
    description = method.library_config(quantization, placement)
    if description is not None and hasattr(description, "llm_int8_skip_modules") and (read := weights_read(empty)):
        description.llm_int8_skip_modules = sorted({*read, *get_keys_to_not_convert(empty)})
    return description


def weights_read(model: nn.Module) -> dict[str, bool]:
    """Returns the linear layers whose weight is read, by name: whether it is computed with, or only described."""
    layers: dict[str, bool] = {}
    for name, module in model.named_modules():
        for attribute, is_computed in _reads(type(module)).items():
            if isinstance(module._modules.get(attribute), nn.Linear | Conv1D):
                layers[f"{name}.{attribute}".lstrip(".")] = is_computed
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {name: computed for name, computed in layers.items() if model.get_submodule(name) is not output}


def _reads(kind: type[nn.Module]) -> dict[str, bool]:
    """Returns the attributes whose `weight` the methods of a class read."""
    reads: dict[str, bool] = {}
    for base in kind.__mro__:
        for attribute, is_computed in _reads_in(base.__module__).get(base.__name__, {}).items():
            reads[attribute] = reads.get(attribute, False) or is_computed
    return reads


@cache
def _reads_in(module: str) -> dict[str, dict[str, bool]]:
    """Returns the same for each class of a module; the layers of torch and bitsandbytes call layers alone."""
    if module.partition(".")[0] in ("torch", "builtins", "bitsandbytes"):
        return {}
    try:
        source = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return {}
    if not READ.search(source):
        return {}
    classes: dict[str, dict[str, bool]] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            reads = classes[node.name] = {}
            for attribute, what in _weights_in(node):
                if what not in HARMLESS:
                    reads[attribute] = reads.get(attribute, False) or what not in DESCRIBES
    return classes


def _weights_in(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yields each `self.NAME.weight` that a method reads but to initialise it, and of what: an attribute, or ""."""
    if isinstance(node, ast.FunctionDef) and node.name.lstrip("_").startswith(("init", "reset")):
        return
    if isinstance(node, ast.If) and NEVER in ast.dump(node.test):
        return
    what = node.attr if isinstance(node, ast.Attribute) else ""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Attribute(attr="weight", value=ast.Attribute(attr=name, value=ast.Name(id="self"))):
                yield name, what
            case _:
                yield from _weights_in(child)
