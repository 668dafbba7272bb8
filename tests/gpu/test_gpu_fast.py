"""The fast step on a GPU: kernels equal to their twins, the step equal to the plain one, and fast."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from qlora.config.compose import compose
from qlora.objectives import build_objective
from qlora.quantization.bnb4.layers import set_compute_dtype
from qlora.run import Run
from qlora.runtime.device import Placement
from qlora.step.fast_step import FastStep
from qlora.step.kernels.attention import NEWER_FLASH, attend_varlen, flash_unsupported_reason
from qlora.step.part import Packs
from tests.step.test_fast import batch, build, learn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

GPU = Placement(torch.device("cuda"), torch.bfloat16, torch.bfloat16)
KINDS = [(quant_type, nested) for quant_type in ("nf4", "fp4") for nested in (True, False)]


@pytest.mark.parametrize(("quant_type", "nested"), KINDS)
def test_kernels_decode_to_the_bit(quant_type: str, nested: bool) -> None:
    from qlora.quantization.bnb4.decode_kernels import decode_columns, decode_rows
    from qlora.quantization.bnb4.quantized_weight import decode_plain, read_quantized_weight
    from tests.step.weights import weight

    saved = weight(1000, 4096, quant_type=quant_type, nested=nested, device="cuda")
    saved.quant_state.dtype = torch.bfloat16
    codes = read_quantized_weight(saved)
    assert codes is not None
    factor = torch.tensor([1000.0], device="cuda")
    rows, columns = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in ((1000, 4096), (4096, 1000)))
    decode_rows(codes, rows)
    decode_columns(codes, columns)
    assert torch.equal(rows, dequantize_4bit(saved.data, saved.quant_state))
    assert torch.equal(columns.t(), rows)
    small, turned = (item.to(torch.float8_e4m3fn) for item in (rows, columns))
    decode_rows(codes, small, factor)
    decode_columns(codes, turned, factor)
    expected = (decode_plain(codes, torch.float32) * factor).to(torch.float8_e4m3fn).float()
    assert torch.equal(small.float(), expected)
    assert torch.equal(turned.t().float(), expected)


@pytest.mark.parametrize("columns", [300, 4096, 11008, 22016])
def test_rows_are_scaled_as_by_the_twin(columns: int) -> None:
    from qlora.step.kernels.matmul_fp8 import scale_rows, scale_rows_plain

    x = torch.randn(64, columns, device="cuda").bfloat16()
    (actual, scale), (expected, exact) = scale_rows(x), scale_rows_plain(x)
    factor = torch.tensor([3.7], device="cuda")
    assert torch.equal(scale_rows(x, factor)[1], scale / factor)
    torch.testing.assert_close(scale, exact, rtol=1e-6, atol=0)
    assert (actual.float() != expected.float()).float().mean() < 1e-5  # a division on the edge of two numbers


def seconds(work: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        work()
    begin.record()
    for _ in range(20):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 20_000


def test_decoding_reaches_most_of_the_bandwidth_of_a_copy() -> None:
    from qlora.quantization.bnb4.decode_kernels import decode_rows
    from tests.step.weights import quantized_weight

    saved = quantized_weight(22016, 4096, device="cuda")
    out = torch.empty(22016, 4096, dtype=torch.bfloat16, device="cuda")
    source = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.numel() / seconds(lambda: target.copy_(source))
    decoded = out.numel() * 2.5 / seconds(lambda: decode_rows(saved, out))
    print(f"copy {copy / 1e12:.2f} TB/s, decoding {decoded / 1e12:.2f} TB/s: {decoded / copy:.0%}")
    assert decoded > 0.6 * copy


@pytest.mark.parametrize("name", NEWER_FLASH)
def test_a_newer_flash_attention_serves_windows_and_fewer_keys(name: str) -> None:
    def attend() -> list[torch.Tensor]:
        torch.manual_seed(0)
        shapes = [(300, 8, 128), (300, 2, 128), (300, 2, 128)]
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
        cu_seqlens = torch.tensor([0, 130, 300, 300], dtype=torch.int32, device="cuda")
        output = attend_varlen(q, k, v, cu_seqlens, 170, 0.1, window=64)
        return [output, *torch.autograd.grad(output.float().square().sum(), (q, k, v))]

    expected = attend()
    reason = flash_unsupported_reason(name, GPU.device)
    if reason is not None and reason.endswith(("is not installed", "does not serve this GPU", f"use {name.upper()}")):
        pytest.skip(reason)
    assert reason is None
    try:
        for local, other in zip(attend(), expected, strict=True):
            assert (local - other).norm() < 0.02 * other.norm()
    finally:
        torch.nn.attention.restore_flash_attention_impl()


CASES = {
    "llama": ("llama", {}, False),
    "llama-packs": ("llama", {}, True),
    "whole heads": ("llama", {"num_key_value_heads": 4}, False),
    "qwen2": ("qwen2", {"head_dim": None}, True),
    "qwen3": ("qwen3", {}, False),
    "window": ("mistral", {"sliding_window": 8}, False),
    "window-packs": ("mistral", {"sliding_window": 8}, True),
    "gemma": ("gemma", {}, True),
}
BATCHES = 16
"""Over which errors of rounding are taken: that of one batch, of 48 tokens, differs by its half from run to run."""


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("case", CASES)
def test_the_step_learns_as_the_plain_one(case: str, fp8: bool, compiled: bool) -> None:
    model_type, changes, packed = CASES[case]
    overrides = (f"trainer.compile={str(compiled).lower()}", "trainer.fused_attention=true")
    model, config = build(model_type, (*overrides, *(["quantization.compute=fp8"] if fp8 else [])), **changes)
    batches = [
        {name: tensor.cuda() for name, tensor in batch(packed=packed, seed=seed).items()} for seed in range(BATCHES)
    ]

    def learn_all() -> tuple[float, list[torch.Tensor]]:
        """Returns the mean loss, and the gradients of each batch."""
        actual = [learn(model, rows, num_items_in_batch=31) for rows in batches]
        gradients = [torch.cat([item[name].flatten() for name in sorted(item)]) for _, item in actual]
        return sum(loss for loss, _ in actual) / BATCHES, gradients

    model.to("cuda")
    exact_loss, exact = learn_all()
    model.to(torch.bfloat16)
    set_compute_dtype(model, torch.bfloat16)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    with GPU.autocast():
        plain_loss, plain = learn_all()
    torch._dynamo.reset()
    packs = Packs(24, 2, 14) if packed else None
    step = FastStep(model, config.trainer, config.quantization, GPU, packs, build_objective(config.loss))
    assert step.parts["fused_attention"] == step.parts["fused_linear"] == "on"
    step.checkpointed = 1
    with step, GPU.autocast():
        loss, local = learn_all()

    def error(gradients: list[torch.Tensor]) -> float:
        """Returns the mean of the batches' relative errors."""
        errors = [(local - true).norm() / true.norm() for local, true in zip(gradients, exact, strict=True)]
        return float(sum(errors)) / BATCHES

    print(f"loss {exact_loss:.4f}, plain {plain_loss:.4f}, fast {loss:.4f}")
    print(f"error of the gradients: plain {error(plain):.4f}, fast {error(local):.4f}")
    assert loss == pytest.approx(exact_loss, rel=0.02 if fp8 else 0.004)
    assert error(local) < (0.3 if fp8 else 1.3 * error(plain))


SHAPE = [
    *("model=llama-7b", "model.weights=random", "model.tokenizer=tiny", "data=demo", "lora.r=8", "lora.dropout=0"),
    *("model.architecture.num_hidden_layers=2", "model.architecture.vocab_size=2048", "trainer.max_steps=8"),
    *("trainer.per_device_train_batch_size=8", "trainer.gradient_accumulation_steps=1", "evaluation=loss"),
    *("data.max_eval_samples=16", "trainer.eval_steps=null", "task.predict=false"),
]


def test_runs_with_the_fast_step_end_where_the_plain_ones_do(tmp_path: Path) -> None:
    off = [f"trainer.{name}=false" for name in ("compile", "fused_linear", "fused_attention", "fused_loss")]
    losses = {
        name: Run(compose([*SHAPE, *chosen]), tmp_path / name).execute()["metrics"]["eval_loss"]
        for name, chosen in {"plain": off, "fast": [], "fp8": ["quantization.compute=fp8"]}.items()
    }
    print(losses)
    assert losses["fast"] == pytest.approx(losses["plain"], rel=0.01)
    assert losses["fp8"] == pytest.approx(losses["plain"], rel=0.03)
