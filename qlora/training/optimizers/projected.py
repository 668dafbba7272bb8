"""GaLore and APOLLO: the gradients of large matrices are projected to a low rank, in which the states are kept.

Their packages hold a projection as an object in an optimizer's state. A checkpoint holds tensors and numbers alone, so
it is saved as these, and every state is read back in the dtype in which it was saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from qlora.config.registries.optimizer_states import RANK, Trained, is_projected
from qlora.errors import ConfigError, RunError
from qlora.training.optimizers.matrices import find_matrices, split_groups

SAVED = ("ortho_matrix", "seed")
"""What a projection holds beside its group's settings."""
Built = tuple[type[torch.optim.Optimizer], dict[str, Any]]


def build_galore_adamw(args: TrainingArguments, model: nn.Module, given: dict[str, Any]) -> Built:
    """Returns the class of GaLore's AdamW, and its arguments."""
    from galore_torch import GaLoreAdamW

    return _galore(GaLoreAdamW, _adam(args) | {"no_deprecation_warning": True}, args, model, given)


def build_galore_adafactor(args: TrainingArguments, model: nn.Module, given: dict[str, Any]) -> Built:
    """Returns the class of GaLore's Adafactor, and its arguments."""
    from galore_torch import GaLoreAdafactor

    return _galore(GaLoreAdafactor, {"scale_parameter": False, "relative_step": False}, args, model, given)


def build_apollo_adamw(args: TrainingArguments, model: nn.Module, given: dict[str, Any]) -> Built:
    """Returns the class of APOLLO's AdamW, and its arguments."""
    from apollo_torch import APOLLOAdamW
    from apollo_torch.apollo import GaLoreProjector, GradientProjector

    projectors = {"random": GradientProjector, "svd": GaLoreProjector}
    settings = {"rank": RANK, "update_proj_gap": 200, "scale": 1.0, "proj": "random", "scale_type": "channel", **given}
    kind = projecting(APOLLOAdamW, projectors[settings["proj"]])
    return _with_settings(kind, _adam(args), args, model, {**settings, "proj_type": "std"})


def projecting(kind: type[torch.optim.Optimizer], projector: Callable[..., Any]) -> type[torch.optim.Optimizer]:
    """Returns the class of an optimizer that projects the gradients of `chosen` and whose state a checkpoint holds.

    `projector` makes one of its projections.
    """

    class Projected(kind):  # type: ignore[misc, valid-type]
        def __init__(
            self, params: Iterable[Any], *, chosen: Set[nn.Parameter], settings: dict[str, Any], **options: Any
        ) -> None:
            super().__init__(split_groups(params, chosen.__contains__, settings), **options)

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            try:
                return super().step(closure)
            except torch.linalg.LinAlgError as error:
                raise RunError(
                    "a gradient is NaN or infinite and cannot be projected; lower trainer.learning_rate, or set "
                    "watchdog.nonfinite=skip"
                ) from error

        def state_dict(self) -> dict[str, Any]:
            saved = super().state_dict()
            states = {
                index: {name: _plain(value) if name == "projector" else value for name, value in state.items()}
                for index, state in saved["state"].items()
            }
            return {**saved, "state": states}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            indices = [index for group in state_dict["param_groups"] for index in group["params"]]
            slots = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
            for index, (group, parameter) in zip(indices, slots, strict=True):
                for name, value in state_dict["state"].get(index, {}).items():
                    on_device = _move(value, parameter.device)
                    self.state[parameter][name] = (
                        _restore(projector, group, on_device) if name == "projector" else on_device
                    )

    return Projected


def _galore(
    kind: type[torch.optim.Optimizer], options: dict[str, Any], args: TrainingArguments, model: nn.Module,
    given: dict[str, Any],
) -> Built:  # fmt: skip
    from galore_torch.galore_projector import GaLoreProjector

    settings = {"rank": RANK, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std", **given}
    return _with_settings(projecting(kind, GaLoreProjector), options, args, model, settings)


def _adam(args: TrainingArguments) -> dict[str, Any]:
    return {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}


def _with_settings(
    kind: type[torch.optim.Optimizer], options: dict[str, Any], args: TrainingArguments, model: nn.Module,
    settings: dict[str, Any],
) -> Built:  # fmt: skip
    """Returns the class and its arguments; large matrices get the settings of a projection."""
    matrices, rank = find_matrices(model), settings["rank"]
    chosen = {parameter for parameter in matrices if is_projected(Trained(tuple(parameter.shape)), rank)}
    if not chosen:
        width = max((min(parameter.shape) for parameter in matrices if parameter.dim() == 2), default=0)
        raise ConfigError(
            f"trainer.optim={args.optim} projects matrices that are larger than its rank, {rank}, and the smaller side "
            f"of each matrix of this model has at most {width}; set trainer.optim_args.rank below that"
        )

    return kind, {"lr": args.learning_rate, "chosen": chosen, "settings": settings, **options}


def _plain(projector: Any) -> dict[str, Any]:
    return {name: vars(projector)[name] for name in SAVED if name in vars(projector)}


def _restore(projector: Callable[..., Any], group: dict[str, Any], saved: dict[str, Any]) -> Any:
    keys = ("update_proj_gap", "scale", "proj_type")
    restored = projector(group["rank"], **{key: group[key] for key in keys})
    vars(restored).update(saved)
    return restored


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _move(item, device) for name, item in value.items()}
    return [_move(item, device) for item in value] if isinstance(value, list) else value
