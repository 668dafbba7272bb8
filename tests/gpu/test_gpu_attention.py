"""Attention with soft caps and sinks on a GPU: kernels equal to their twin, runs equal to the model's own attention."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qlora.config.compose import compose
from qlora.run import Run
from qlora.step.kernels.attention import attend_flex, attend_plain, attend_varlen, build_block_mask
from tests.models.bases import write

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTHS = [300, 1, 129, 70, 524]


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("heads", "width"), [(4, 64), (8, 128), (4, 256)])
@pytest.mark.parametrize(("softcap", "has_sinks"), [(20.0, False), (None, True), (20.0, True), (None, False)])
def test_flex_attention_computes_as_its_twin(
    window: int | None, heads: int, width: int, softcap: float | None, has_sinks: bool
) -> None:
    torch.manual_seed(0)
    total, scale = sum(LENGTHS), width**-0.5
    cu_seqlens = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    shapes = [(total, heads, width), (total, 2, width), (total, 2, width)]
    inputs = [(2 * torch.randn(shape, device="cuda")).bfloat16().requires_grad_() for shape in shapes]
    sinks = torch.randn(heads, device="cuda") if has_sinks else None
    chosen = {"softcap": softcap, "sinks": sinks}
    upstream = torch.randn(total, heads, width, device="cuda")

    mask = build_block_mask(cu_seqlens, total, window)
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in inputs)
    actual = [attend_flex(q, k, v, mask, scale, **chosen)[0].transpose(0, 1)]
    actual += torch.autograd.grad((actual[0].float() * upstream).sum(), inputs)
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    expected = [attend_plain(*exact, cu_seqlens, scale, window=window, **chosen)]
    expected += torch.autograd.grad((expected[0] * upstream).sum(), exact)
    for ours, theirs in zip(actual, expected, strict=True):
        assert float((ours.float() - theirs).norm()) < 0.01 * float(theirs.norm())
    if softcap is None and not has_sinks:
        flash = attend_varlen(*inputs, cu_seqlens, max(LENGTHS), scale, window)
        assert float((flash.float() - expected[0]).norm()) < 0.01 * float(expected[0].norm())


QUICK = [
    *("lora.r=8", "lora.dropout=0.0", "recipe=none", "data=demo", "model.tokenizer=tiny", "evaluation=loss"),
    *("trainer.max_steps=12", "trainer.eval_steps=null", "trainer.save_steps=null", "trainer.warmup_steps=0"),
    *("trainer.per_device_train_batch_size=8", "trainer.gradient_accumulation_steps=2", "trainer.logging_steps=1"),
    *("trainer.learning_rate=3e-3", "trainer.lr_scheduler_type=constant", "task.predict=false"),
    *("data.max_eval_samples=32", "evaluation.baseline=false"),
]
KINDS = {
    "gemma2": {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0, "sliding_window": 16, "head_dim": 64},
    "gpt_oss": {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "sliding_window": 16},
}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_what_the_models_own_attention_and_loss_teach(
    kind: str, packing: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write(kind, tmp_path / "base", **KINDS[kind])
    parts = ("compile", "fused_linear", "fused_attention", "fused_loss", "fused_experts")
    overrides = [f"model.name={base}", f"data.packing={str(packing).lower()}"]
    plain = [*(f"trainer.{part}=false" for part in parts), "model.attn_implementation=eager"]
    losses = {}
    for name, chosen in {"fast": [], "plain": plain}.items():
        if name == "plain" and packing and kind == "gpt_oss":  # its own attention lets packed rows see each other
            pytest.skip("the model's own attention cannot pack")
        Run(compose([*QUICK, *overrides, *chosen]), tmp_path / name).execute()
        history = json.loads((tmp_path / name / "history.json").read_text())
        screen = " ".join(capsys.readouterr().out.split())
        assert ("fused_attention, fused_loss" in screen) is (name == "fast")
        losses[name] = [entry["loss"] for entry in history if "loss" in entry]
    assert losses["plain"][-1] < 0.97 * losses["plain"][0]
    assert losses["fast"] == pytest.approx(losses["plain"], rel=0.02)
    assert losses["fast"][0] == pytest.approx(losses["plain"][0], rel=3e-3)
