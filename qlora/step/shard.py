"""Spreads the frozen base over the processes of a training: each keeps a part of every layer, in its own bits."""

from __future__ import annotations

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from qlora.errors import ConfigError
from qlora.step.fast_step import find_layers


def shard_base(model: PeftModel, device: torch.device, processes: int) -> None:
    """Moves a model to `device`, of its decoder layers one part of `processes` each; trained weights stay whole.

    A layer is put together when it is called, forward and backward, and let go behind that (torch's FSDP2). All
    processes must call the model equally often.
    """
    base = model.get_base_model()
    layers = find_layers(base)
    if not layers:
        raise ConfigError(
            f"trainer.parallel=fsdp: {base.config.model_type} has no list of decoder layers to share out; choose "
            "trainer.parallel=ddp, or model.device_map=auto in one process"
        )
    mesh = init_device_mesh(device.type, (processes,))
    for layer in layers:
        layer.to(device)
        _store_as_floats(layer)
        trained = {parameter for parameter in layer.parameters() if parameter.requires_grad}
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    model.to(device)
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    body = base.base_model
    fully_shard(body, mesh=mesh, ignored_params={each for each in body.parameters() if each not in inside})
    for layer in layers:  # torch makes the place for a whole layer once; in inference mode it could not train there
        assert isinstance(layer, FSDPModule)
        layer.unshard()
        layer.reshard()
        _keep_quantization(layer)
    base.hf_device_map = {"": device}


def _store_as_floats(layer: torch.nn.Module) -> None:
    """Lets 4-bit weights, whose bytes stay as they are, pass for floating point numbers: torch 2.11 shards no other.

    In 32 bits, for on a GPU torch copies 16-bit numbers by way of 32 bits, which changes those that are no numbers: one
    pair of bytes in 260 came out as another.
    """
    for module in layer.modules():
        if isinstance(module, Linear4bit):
            packed = module.weight.data
            module.weight.data = packed.view(-1).view(torch.float32).view(-1, *packed.shape[1:])


def _keep_quantization(layer: torch.nn.Module) -> None:
    """Lets a part of a 4-bit weight tell how the whole one is quantized."""
    for module in layer.modules():
        if isinstance(module, Linear4bit):
            module.weight.quant_state = module.quant_state
