"""Private names of PEFT that adapters need, and typed views of an adapted model; `tests/upstream` checks them."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterable, Iterator
from types import MethodType
from typing import Any, cast

import torch
from peft import AdaLoraModel, LoraConfig, PeftModel, PeftType
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner, _check_lora_target_modules_mamba
from peft.utils import transformers_weight_conversion
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
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


def rename_experts(config: LoraConfig, model: PreTrainedModel) -> None:
    """Makes the config of an adapter from before transformers 5 name the tensors that hold a layer's experts today."""
    convert_peft_config_for_transformers(config, model, None)


@contextlib.contextmanager
def names_kept() -> Iterator[None]:
    """Makes PEFT adapt in the block what a config names, also where it takes the name of a linear layer for experts.

    It also reports the ranks of tensors as ignored, which it does not ignore (peft 0.21); that is kept from the user.
    """
    converting = transformers_weight_conversion.convert_peft_config_for_transformers
    transformers_weight_conversion.convert_peft_config_for_transformers = _keep
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match any")
            yield
    finally:
        transformers_weight_conversion.convert_peft_config_for_transformers = converting


def _keep(peft_config: Any, model: Any, conversions: Any) -> None:
    pass


class ExpertB(nn.Module):
    """The B matrices of all experts of a layer, as grouped matmuls read them: `weight` is [experts, out, r].

    In a `state_dict`, and so in files, they are PEFT's one matrix [out, r * experts], its expert index the fastest.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    @classmethod
    def from_peft(cls, weight: Tensor, count: int) -> ExpertB:
        """Takes PEFT's matrix for a number of experts."""
        reordered = cls(_from_peft(weight.detach(), count))
        reordered.weight.requires_grad_(weight.requires_grad)
        return reordered

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        weight = self.weight.detach().cpu()  # reordering takes a second copy, which the device may have no room for
        destination[f"{prefix}weight"] = weight.permute(1, 2, 0).reshape(weight.shape[1], -1)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        """Loads PEFT's matrix; one that is missing is an error even where gaps are allowed."""
        name = f"{prefix}weight"
        if name not in state_dict:
            missing.append(name)
            errors.append(f"{name} is missing")
            return
        count, outputs, rank = self.weight.shape
        saved, needed = state_dict[name].shape, (outputs, rank * count)
        if saved != needed:
            errors.append(f"{name} is {_by(saved)}, and {_by(needed)} is needed for {count} experts")
            return
        with torch.no_grad():
            self.weight.copy_(_from_peft(state_dict[name].to(self.weight.device), count))


def _from_peft(weight: Tensor, count: int) -> Tensor:
    """Returns PEFT's B matrix [out, r * experts] as [experts, out, r]."""
    return weight.view(len(weight), -1, count).permute(2, 0, 1).contiguous()


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


class ExpertsWrapper(ParamWrapper):
    """PEFT's wrapper of a tensor of experts, which holds the adapter; what computes the experts reads it from here.

    PEFT's own forward pass would add the adapter to a copy of all weights.
    """

    num_experts: int
    parameter_name: str

    @staticmethod
    def adopt(wrapper: ParamWrapper) -> ExpertsWrapper:
        """Makes PEFT's wrapper of a tensor [experts, ...] one of this class."""
        wrapper.__class__ = ExpertsWrapper
        adopted = cast(ExpertsWrapper, wrapper)
        for adapter in adopted.lora_B:
            adopted._reorder(adapter)
        return adopted

    def _reorder(self, adapter: str) -> None:
        if not isinstance(matrix := self.lora_B[adapter], ExpertB):
            self.lora_B[adapter] = ExpertB.from_peft(cast(Tensor, matrix.weight), self.num_experts)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds a further adapter."""
        super().update_layer(adapter_name, *args, **kwargs)
        self._reorder(adapter_name)

    @property
    def active(self) -> str | None:
        """The name of the adapter that takes part in the forward pass; None: none does."""
        if self.disable_adapters or self.merged:
            return None
        names = [name for name in self.active_adapters if name in self.lora_A]
        assert len(names) <= 1, f"several adapters are active on experts at a time: {names}"
        return names[0] if names else None

    def matrices(self, adapter: str) -> tuple[Tensor, Tensor, float]:
        """Returns A [experts, r, in], B [experts, out, r] and what their product is scaled by."""
        a = cast(Tensor, self.lora_A[adapter].weight)
        b = cast(Tensor, self.lora_B[adapter].weight)
        return a.view(self.num_experts, -1, a.shape[-1]), b, self.scaling[adapter]

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        """Returns what the adapter adds to the tensor, in the tensor's own order."""
        a, b, scaling = self.matrices(adapter_name)
        delta = scaling * (b @ a)
        is_transposed = not self._did_swap_in_out_features
        return (delta.transpose(1, 2) if is_transposed else delta).to(self.get_param().dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Calls the wrapped experts, which read the adapter by themselves."""
        output: Tensor = self.base_layer(x, *args, **kwargs)
        return output


ExpertsWrapper.__name__ = ParamWrapper.__name__  # by which PEFT knows a wrapper that takes a further adapter


def base_of(model: PeftModel) -> PreTrainedModel:
    """Returns the model that an adapter was attached to; PEFT takes any module, this project a transformers model."""
    return cast(PreTrainedModel, model.get_base_model())


def lora_config(model: PeftModel, adapter: str = "default") -> LoraConfig:
    """Returns the config of a LoRA adapter; PEFT declares the base class of all methods' configs."""
    return cast(LoraConfig, model.peft_config[adapter])


def rank_of(config: LoraConfig, name: str) -> int:
    """Returns the rank that a config gives to the layer or parameter of this name."""
    ranks = config.rank_pattern or {}
    rank: int = ranks.get(get_pattern_key(list(ranks), name), config.r)
    return rank


def without_penalty(model: Any) -> PeftModel:
    """Returns a model of which PEFT's AdaLoRA leaves the loss alone; `qlora.adapters.rank_schedule` adds the penalty.

    PEFT adds it to the loss of evaluations too, and fails there where the adapter is not trained. On a 4-bit base it
    also trains the numbers of ranks, by which it divides (peft 0.21).
    """
    if isinstance(model.base_model, AdaLoraModel):
        vars(model.base_model)["forward"] = MethodType(BaseTuner.forward, model.base_model)
        for name, parameter in model.named_parameters():
            if ".ranknum." in name:
                parameter.requires_grad_(False)
    return cast(PeftModel, model)


def has_plain_lora(model: nn.Module) -> bool:
    """Returns whether a model's adapter, if it has one, is LoRA or a variant of it."""
    return not isinstance(model, PeftModel) or model.peft_config["default"].peft_type == PeftType.LORA


def is_of_adapter(name: str, model: PeftModel) -> bool:
    """Returns whether a parameter or saved tensor of this name belongs to the adapter, and not to the base.

    Copies of modules that train whole belong to it, by their names in the model.

    The random matrices of VeRA and the ranks of AdaLoRA have names without the prefix of their kind.
    """
    prefix = str(model.base_model.prefix)
    return (
        prefix in name
        or ".modules_to_save." in name
        or ".ranknum." in f".{name}"
        or bool(re.search(r"(^|\.)vera_[AB](\.|$)", name))
    )
