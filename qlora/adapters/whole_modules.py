"""Modules that train whole beside an adapter, as copies that PEFT saves with it (`modules_to_save`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora.config.schema import LoraConfig, LoraDtype
from qlora.errors import ConfigError
from qlora.models.decoder import linear_modules
from qlora.models.whole_modules import find_whole_modules, tied_modules
from qlora.models.whole_names import KEY, choose_whole
from qlora.quantization.method import method_of


def find_modules_to_save(config: LoraConfig, model: PreTrainedModel, targets: Sequence[str]) -> list[str] | None:
    """Returns the full names of the modules that train whole beside adapters on `targets`; None: there are none.

    Raises `ConfigError` for what the model does not have, and for modules that cannot train whole.
    """
    if not config.modules_to_save:
        return None
    modules, quantized = find_whole_modules(model), method_of(model).layer_classes()
    chosen = choose_whole(
        config.modules_to_save,
        modules,
        tied=tied_modules(model),
        quantized={name for name, module in modules.items() if isinstance(module, quantized)},
        adapted={name for name in linear_modules(model) if name in targets or name.rpartition(".")[2] in targets},
    )
    beside = {name for name, _ in model.named_modules() if name.endswith(tuple(chosen))} - {*chosen}
    if beside:
        raise ConfigError(
            f"{KEY}: PEFT takes {min(beside)} for {chosen[0]}, because its name ends so; leave that module out"
        )
    return chosen


def prepare_whole(model: PeftModel, dtype: LoraDtype) -> None:
    """Stores the modules of `lora.modules_to_save` as `dtype` says; what they return has the dtype of the base's."""
    config: Any = model.peft_config["default"]
    names = config.modules_to_save or []
    for name, wrapper in model.get_base_model().named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and name in names:
            trained = wrapper.modules_to_save["default"]
            returned = next(wrapper.original_module.parameters()).dtype
            trained.to(torch.float32 if dtype is LoraDtype.fp32 else torch.bfloat16)
            if next(trained.parameters()).dtype is not returned:
                trained.register_forward_hook(_returns(returned))


def _returns(dtype: torch.dtype) -> Any:
    def cast(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.to(dtype)

    return cast
