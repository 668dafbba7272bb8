"""The modules of a model that can train whole beside an adapter."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from qlora.experts.layout import find_experts
from qlora.models.decoder import ROUTER, read_decoder
from qlora.upstream.torch_models import weight_of
from qlora.upstream.transformers_model import decoder_of


def find_whole_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Returns by name the modules of the decoder that hold parameters themselves, and the output layer.

    Experts and their routers are left out, and linear layers are among them. The base has no adapter yet.
    """
    decoder, output = decoder_of(model), model.get_output_embeddings()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    routers = {matrix.name.rpartition(".")[0] for matrix in read_decoder(model).matrices if matrix.kind == ROUTER}
    experts = find_experts(model)
    return {
        name: module
        for name, module in model.named_modules()
        if (module is output or f"{name}.".startswith(f"{prefix}." if prefix else ""))
        and next(module.parameters(recurse=False), None) is not None
        and name not in routers
        and not any(f"{name}.".startswith(f"{path}.") for path in experts)
    }


def tied_modules(model: PreTrainedModel) -> list[str]:
    """Returns the names of embedding and output layer where they are one matrix."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if output is None or weight_of(output) is not weight_of(embedding):
        return []
    return [name for name, module in model.named_modules() if module is embedding or module is output]
