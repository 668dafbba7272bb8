"""The optimizer of LoRA-FA."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft.optimizers.lorafa
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from torch import nn

from qlora.config.compose import compose
from qlora.config.registries.optimizer_states import Trained, of_lorafa
from qlora.errors import UserError
from qlora.training.optimizers.lorafa import LoraFa, build, find_partners
from tests.training.test_optimizers import add_frozen_a, check_exact, settings

ARGUMENTS: Any = SimpleNamespace(adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-12, learning_rate=1e-2)


def adapted() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(
        nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 6)),
        LoraConfig(r=3, lora_alpha=5, target_modules=["0", "1"], init_lora_weights=False, rank_pattern={"1": 2}),
    )


def fill(model: nn.Module, step: int) -> None:
    torch.manual_seed(step)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)


def test_b_moves_as_by_peft_s_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.optimizers.lorafa, "is_bf16_available", lambda: False)
    ours, theirs = adapted(), adapted()
    reference: Any = create_lorafa_optimizer(theirs, r=3, lora_alpha=5, lr=1e-2)
    reference.param_groups[0]["eps"] = 1e-12
    for name, weight in ours.named_parameters():
        weight.requires_grad_("lora_B" in name)
    kind, options = build(ARGUMENTS, ours, {})
    optimizer = kind([weight for weight in ours.parameters() if weight.requires_grad], weight_decay=0.0, **options)
    for step in range(3):
        fill(ours, step)
        fill(theirs, step)
        optimizer.step()
        reference.step()
    for (name, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(mine, other, msg=name, atol=1e-6, rtol=1e-4)


def test_the_product_s_step_is_the_nearest_to_the_gradient_of_the_weight() -> None:
    model = adapted()
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_B" in name)
    x = torch.randn(5, 12)
    model(x).square().sum().backward()
    ((b, (a, scaling)), *_) = find_partners(model).items()
    optimizer = LoraFa([b], 1e-2, partners={b: (a, scaling)})
    assert b.grad is not None
    plain = b.grad.clone()
    step = (plain @ optimizer._inverse(b)) @ a * scaling  # of the weight, were the learning rate 1
    # The gradient of B is that of the weight times A^T and the scaling; so their projections on A are equal.
    torch.testing.assert_close(step @ a.T * scaling, plain, atol=1e-3, rtol=1e-3)


def test_a_run_that_was_cut_in_two_ends_in_the_same_weights(tmp_path: Path) -> None:
    trainer = check_exact(tmp_path, settings(optim="lorafa"), adapt=add_frozen_a)
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, LoraFa)
    assert len(optimizer._inverses) == len(optimizer.partners) > 0
    kept = sum(tensor.numel() for state in optimizer.state.values() for tensor in state.values() if tensor.dim())
    kept += sum(inverse.numel() for inverse in optimizer._inverses.values())
    assert kept == sum(of_lorafa(Trained((2, math.prod(b.shape) // 2)), {}) for b in optimizer.partners)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["lora=all-linear"],
            "^trainer.optim=lorafa changes the gradients of B by an A that stays as it is; set lora=l",
        ),
        (["lora=none", "quantization=fp32"], "set lora=lora-fa .lora.freeze_a=true., or choose another"),
        (["lora=lora-fa", "trainer.parallel=fsdp", "quantization=none"], "^trainer.parallel=fsdp and trainer.optim=lo"),
    ],
)
def test_other_adapters_are_refused_when_the_config_is_composed(overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        compose(["trainer.optim=lorafa", *overrides])


def test_an_adapter_whose_a_trains_is_refused() -> None:
    with pytest.raises(UserError, match=r"^trainer.optim=lorafa trains B beside an A that is frozen, and this ada"):
        build(ARGUMENTS, adapted(), {})
