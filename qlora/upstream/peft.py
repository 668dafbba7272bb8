"""Private names of PEFT that adapters need, and typed views of an adapted model; `tests/upstream` checks them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import PreTrainedModel


def calls_layer(name: str, model: PreTrainedModel) -> bool:
    """Returns whether PEFT adapts the layers of this last name: Mamba's kernels read some weights without the layer.

    PEFT raises for them when it adapts a model; `all-linear` leaves them out before.
    """
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name)
    except ValueError:
        return False
    return True


def names_of_experts(names: Iterable[str], model: PreTrainedModel) -> set[str]:
    """Returns the last parts of names that PEFT takes for experts that were linear layers once.

    It adapts the tensor of all experts then, without dropout or DoRA, and also when it loads the adapter (peft 0.21).
    """
    taken = set()
    for name in names:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # one of several that are joined in the experts' tensor
            taken.add(name)
        if name not in (config.target_modules or ()):
            taken.add(name)
    return taken


def base_of(model: PeftModel) -> PreTrainedModel:
    """Returns the model that an adapter was attached to; PEFT takes any module, this project a transformers model."""
    return cast(PreTrainedModel, model.get_base_model())


def lora_config(model: PeftModel, adapter: str = "default") -> LoraConfig:
    """Returns the config of a LoRA adapter; PEFT declares the base class of all methods' configs."""
    return cast(LoraConfig, model.peft_config[adapter])
