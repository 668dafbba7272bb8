"""LoftQ: starts an adapter as the best correction of its layer's quantization error (arXiv 2310.08659)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from qlora.models.weight_files import Tensors
from qlora.quantization.method import method_of
from qlora.upstream.torch_models import weight_of


@torch.no_grad()
def correct_quantization(model: PeftModel, original: Callable[[str], torch.Tensor]) -> None:
    """Sets each adapter to the best rank-r correction of its layer's quantization error.

    One step on the given quantized base, which stays as it is. `original` returns a layer's 16-bit weight by name.
    A rank above the smaller side of a matrix corrects it exactly; the rest of the adapter starts as any other.
    PEFT's own version runs on CUDA and XPU only, and forgets that the adapter's output is scaled.
    """
    method = method_of(model)
    for name, module in model.get_base_model().named_modules():
        if not (isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), method.layer_classes())):
            continue
        quantized = method.dequantize(module.get_base_layer()).float()
        error = original(f"{name}.weight").to(quantized) - quantized
        u, s, v = torch.linalg.svd(error, full_matrices=False)
        for adapter, rank in module.r.items():
            root, used = s[:rank].sqrt(), min(rank, len(s))
            a, b = weight_of(module.lora_A[adapter]), weight_of(module.lora_B[adapter])
            a[:used] = root[:, None] * v[:rank]
            b[:, :used] = u[:, :rank] * root / module.scaling[adapter]


def original_weights(tensors: Tensors, prefix: str) -> Callable[[str], torch.Tensor]:
    """Returns a function from a weight's name in the model to its tensor, whose own name may lack the prefix."""
    names = set(tensors)
    return lambda name: tensors.read(name if name in names else name.removeprefix(f"{prefix}."))
