"""Answers that share their prompt on a GPU: the gradients are as near to exact ones as with each row by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora import adapters
from qlora.config.schema import Config
from qlora.data.batching.collate import SharedPromptsCollator, SidesCollator
from qlora.objectives.protocol import REFERENCE
from qlora.quantization.bnb4.layers import set_compute_dtype
from qlora.runtime.device import Placement
from qlora.step.fast_step import FastStep
from tests.objectives.test_answer_losses import objective
from tests.objectives.test_shared_prompts import PAIRS, pair
from tests.objectives.test_shared_prompts import learn as learn_inside
from tests.step.test_fast import build

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

GPU = Placement(torch.device("cuda"), torch.bfloat16, torch.bfloat16)
FP32 = Placement(torch.device("cuda"), torch.float32, torch.float32)
ROWS = [*PAIRS[:3], pair(150, 40, 70, seed=5)]
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"sliding_window": 32, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
}


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("kind", CASES)
def test_shared_prompts_learn_what_rows_by_themselves_teach(kind: str, compiled: bool) -> None:
    overrides = (f"trainer.compile={str(compiled).lower()}", "trainer.fused_attention=true")
    model, config = build(kind, overrides, **CASES[kind])
    _, plain = build(kind, ("trainer.fused_attention=false", "trainer.fused_linear=false"), **CASES[kind])
    model.to("cuda")

    def learn(settings: Config, placement: Placement, collate: Callable[[Any], dict[str, Tensor]]) -> Tensor:
        torch._dynamo.reset()
        step = FastStep(model, settings.trainer, settings.quantization, placement, None, objective("loss=simpo"))
        assert step.shares_prompts == (settings is config)
        with placement.autocast():
            batch = {name: value.to(model.device) for name, value in collate(ROWS).items()}
            return learn_inside(model, step, batch).float()

    exact = learn(plain, FP32, SidesCollator(0))
    model.to(torch.bfloat16)
    set_compute_dtype(model, torch.bfloat16)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    apart, shared = learn(config, GPU, SidesCollator(0)), learn(config, GPU, SharedPromptsCollator(0))
    errors = [float((actual - exact).norm() / exact.norm()) for actual in (apart, shared)]
    print(f"error of the gradients: apart {errors[0]:.4f}, shared {errors[1]:.4f}")
    assert float(shared[0]) == pytest.approx(float(exact[0]), rel=0.004)
    assert errors[1] < max(1.3 * errors[0], 0.02)


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_a_reference_that_was_read_before_gives_the_loss_and_the_gradients_of_one_in_the_step(compiled: bool) -> None:
    overrides = (f"trainer.compile={str(compiled).lower()}", "trainer.fused_attention=true")
    model, config = build("llama", overrides)
    model.to("cuda", torch.bfloat16)
    set_compute_dtype(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    reference = adapters.reference_at_start(model, is_base=True)
    loss = objective("loss=dpo")
    step = FastStep(model, config.trainer, config.quantization, GPU, None, loss, reference)
    batch = {name: value.to("cuda") for name, value in SharedPromptsCollator(0)(ROWS).items()}
    with GPU.autocast():
        with torch.no_grad(), step.reading_reference(), step:
            saved = model(**batch).logits
        in_step = learn_inside(model, step, batch).float()
        cached = learn_inside(model, step, {**batch, REFERENCE: saved}).float()
    assert saved.shape == (len(ROWS), 2)
    assert float((cached - in_step).norm()) <= 1e-3 * float(in_step.norm())
