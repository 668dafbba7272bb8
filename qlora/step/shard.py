"""Shards the frozen base over the processes of a training run: each keeps a part of every layer, still quantized."""

from __future__ import annotations

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from qlora.errors import ConfigError
from qlora.experts.layout import Placeholder
from qlora.quantization.bnb4.expert_unit import QuantizedUnit
from qlora.step.layers import find_layers
from qlora.upstream.bitsandbytes import set_quant_state
from qlora.upstream.peft import base_of
from qlora.upstream.transformers import set_device_map


def shard_base(model: PeftModel, device: torch.device, processes: int) -> None:
    """Moves a model to `device`, with one of `processes` parts of each decoder layer; trained weights stay whole.

    A layer is gathered when it is called, forward and backward, and released after that (torch's FSDP2). All processes
    must call the model equally often.
    """
    base = base_of(model)
    layers = find_layers(base)
    if not layers:
        raise ConfigError(
            f"trainer.parallel=fsdp: {base.config.model_type} has no list of decoder layers to shard; choose "
            "trainer.parallel=ddp, or model.device_map=auto in one process"
        )
    mesh = init_device_mesh(device.type, (processes,))
    for layer in layers:
        layer.to(device)
        _store_as_floats(layer)
        whole = {weight for weight in layer.parameters() if weight.requires_grad or isinstance(weight, Placeholder)}
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    model.to(device)
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    body: torch.nn.Module = base.base_model
    fully_shard(body, mesh=mesh, ignored_params={other for other in body.parameters() if other not in inside})
    for layer in layers:  # torch allocates the whole layer once; allocated in inference mode it could not train
        assert isinstance(layer, FSDPModule)
        layer.unshard()
        layer.reshard()
        _keep_quantization(layer)
    set_device_map(base, {"": device})


def _store_as_floats(layer: torch.nn.Module) -> None:
    """Views 4-bit weights, whose bytes stay as they are, as floating point numbers: torch 2.11 shards no others.

    The numbers have 32 bits, because on a GPU torch copies 16-bit numbers by way of 32 bits. That changes NaNs: one
    pair of bytes in 260 was changed.
    """
    for module in layer.modules():
        if isinstance(module, Linear4bit):
            packed = module.weight.data
            module.weight.data = packed.view(-1).view(torch.float32).view(-1, *packed.shape[1:])
        elif isinstance(module, QuantizedUnit):
            module.as_parameter()


def _keep_quantization(layer: torch.nn.Module) -> None:
    """Gives each part of a 4-bit weight the quantization state of the whole weight."""
    for module in layer.modules():
        if isinstance(module, Linear4bit):
            set_quant_state(module.weight, module.quant_state)
