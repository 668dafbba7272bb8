"""Each fast part of the step against its plain twin, and the twin against the library or a formula."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from qlora.objectives.linear_cross_entropy import entropy_and_gradient, linear_cross_entropy
from qlora.objectives.protocol import CHUNK
from qlora.quantization.bnb4.quantized_weight import (
    E4M3_MAX,
    QuantizedWeight,
    can_join,
    decode_absmax,
    decode_plain,
    join,
    read_quantized_weight,
)
from qlora.step.kernels import attention, fused_linear
from qlora.step.kernels.attention import attend_batch, fastest_attention
from qlora.step.kernels.dequantize import join_tensors, register, registered, unread
from qlora.step.kernels.fused_linear import GroupedLinear
from qlora.step.kernels.matmul_fp8 import scale_rows
from tests.step.weights import quantized_weight, weight

KINDS = [(quant_type, nested) for quant_type in ("nf4", "fp4") for nested in (True, False)]


@pytest.mark.parametrize(("quant_type", "nested"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_twin_decodes_as_bitsandbytes(quant_type: str, nested: bool, dtype: torch.dtype) -> None:
    parameter = weight(96, 192, quant_type=quant_type, nested=nested)
    parameter.quant_state.dtype = dtype
    quantized = read_quantized_weight(parameter)
    assert quantized is not None
    assert torch.equal(decode_plain(quantized, dtype), dequantize_4bit(parameter.data, parameter.quant_state))


def test_the_kernels_decode_as_their_twins(request: pytest.FixtureRequest) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.step.interpret"]
    done = subprocess.run(command, cwd=request.config.rootpath, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, steps in json.loads(done.stdout).items():
        # The interpreter cuts to bf16 where a GPU rounds; tests/gpu compares to the bit.
        assert steps <= (1 if "bfloat16" in name else 0), name


@pytest.mark.parametrize("nested", [True, False])
def test_joint_weights_are_the_same_and_stored_once(nested: bool) -> None:
    parameters = [weight(rows, 256, nested=nested, seed=rows) for rows in (64, 128, 64)]
    dense = [dequantize_4bit(parameter.data, parameter.quant_state) for parameter in parameters]
    joint = join(parameters)
    assert torch.equal(decode_plain(joint, torch.float32), torch.cat(dense))
    for parameter, expected in zip(parameters, dense, strict=True):
        assert torch.equal(dequantize_4bit(parameter.data, parameter.quant_state), expected)
        assert parameter.data.untyped_storage().data_ptr() == joint.packed.untyped_storage().data_ptr()
    again = join(parameters)
    assert (again.packed.data_ptr(), again.absmax.data_ptr()) == (joint.packed.data_ptr(), joint.absmax.data_ptr())
    assert torch.equal(decode_plain(again, torch.float32), torch.cat(dense))
    other = join(parameters[1:])  # a part of what lies there
    assert torch.equal(decode_plain(other, torch.float32), torch.cat(dense[1:]))


def test_a_weight_is_found_by_its_packed_bytes_as_long_as_a_step_holds_it() -> None:
    packed = (parameter := weight(64, 256, nested=True, seed=0)).view(-1)
    held = register(packed, join([parameter]))
    assert join_tensors([packed.detach()], 64, 256) is held
    again = register(packed, join([parameter]))  # of a second step with the same model
    del held
    gc.collect()
    assert join_tensors([packed], 64, 256) is again
    del again
    gc.collect()
    part = register(packed[: 16 * 128], again := quantized_weight(16, 256))  # which begins at the same byte
    assert registered(packed[: 16 * 128]) is part is again
    with pytest.raises(KeyError):
        registered(packed)


def test_weights_of_other_kinds_are_not_joined() -> None:
    assert can_join([quantized_weight(64, 256), quantized_weight(128, 256)])
    assert not can_join([quantized_weight(64, 256), quantized_weight(64, 128)])
    assert not can_join([quantized_weight(64, 256), quantized_weight(64, 256, nested=False)])
    assert not can_join([quantized_weight(64, 256), quantized_weight(64, 256, quant_type="fp4")])
    assert not can_join(
        [quantized_weight(32, 64), quantized_weight(64, 256)]
    )  # a group of absmax values would span two weights


def test_other_layouts_are_left_alone() -> None:
    assert read_quantized_weight(torch.zeros(2, 2)) is None
    assert read_quantized_weight(weight(64, 96)) is None  # a block of 64 would span two rows


class Case:
    """Three layers with one input, and the same by plain matrices."""

    def __init__(self, dtype: torch.dtype, rows: tuple[int, ...] = (64, 128, 64)) -> None:
        generator = torch.Generator().manual_seed(1)
        saved = [weight(count, 256, seed=count) for count in rows]
        self.rows, self.codes = list(rows), join(saved)
        self.dense = decode_plain(self.codes, torch.float32)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

        self.inputs = [draw(50, 256), draw(24, 256), *(draw(rows, 8) for rows in self.rows)]
        self.upstream = torch.randn(50, sum(rows), generator=generator)

    def fused(self, weight_scale: torch.Tensor | None = None) -> torch.Tensor:
        x, a, *b = self.inputs
        scales = None
        if weight_scale is not None:
            amax = [a.detach().abs().amax(), torch.cat(b).detach().abs().amax()]
            scales = torch.stack([weight_scale[0], *(value.float() for value in amax)])
        return torch.cat(GroupedLinear.apply(x, None, a, scales, self.rows, *b, *self.codes.tensors()), 1)

    def plain(self) -> torch.Tensor:
        x, a, *b = self.inputs
        halves = (x @ a.t()).split(8, 1)
        adapter = torch.cat([half @ matrix.t() for half, matrix in zip(halves, b, strict=True)], 1)
        return x @ self.dense.to(x.dtype).t() + adapter

    def gradients(self, output: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad((output.float() * self.upstream).sum(), self.inputs))


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_grouped_layers_compute_as_plain_matrices(dtype: torch.dtype, bound: float) -> None:
    case = Case(dtype)
    actual, expected = case.fused(), case.plain()
    assert distance(actual, expected) < bound
    for gradient, other in zip(case.gradients(actual), case.gradients(expected), strict=True):
        assert distance(gradient, other) < bound


def test_matrices_that_are_dequantized_in_chunks_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case, rows, dequantize = Case(torch.float32, (320, 128, 320)), [], fused_linear.dequantize

    def note(codes: QuantizedWeight, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows.append(codes.rows)
        return dequantize(codes, *args, **kwargs)

    monkeypatch.setattr(fused_linear, "dequantize", note)
    expected = case.fused()
    whole = case.gradients(expected)
    assert rows == [768, 768]
    rows.clear()
    monkeypatch.setattr("qlora.step.kernels.dequantize.CHUNK_BYTES", 300 * 256 * 4)
    actual = case.fused()
    assert distance(actual, expected) < 1e-6
    for gradient, other in zip(case.gradients(actual), whole, strict=True):
        assert distance(gradient, other) < 1e-6
    assert rows == [256] * 6  # the second lies in two layers


def test_grouped_layers_keep_no_dequantized_weight() -> None:
    case, kept = Case(torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        case.fused()
    assert max(tensor.numel() for tensor in kept if tensor.dtype is torch.float32) <= 50 * 256


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-4, 1.0, 1e4])
@pytest.mark.parametrize("which", ["a", "b"])
def test_8_bit_matmuls_are_near_whatever_the_sizes_of_the_adapter(which: str, size: float) -> None:
    case = Case(torch.bfloat16)
    weight_scale = (E4M3_MAX / (decode_absmax(case.codes).max() * case.codes.codebook.abs().max())).view(1)
    with torch.no_grad():
        for matrix in case.inputs[2:] if which == "b" else case.inputs[1:2]:
            matrix *= size
    actual, expected = case.fused(weight_scale), case.plain()
    assert 1e-3 < distance(actual, expected) < 0.06
    gradients, exact = case.gradients(actual), case.gradients(expected)
    assert 1e-3 < distance(gradients[0], exact[0]) < 0.06  # of the input
    for gradient, other in zip(gradients[1:], exact[1:], strict=True):  # of the adapter's matrices: matmuls in 16 bits
        assert distance(gradient, other) < 6e-3 or not other.any()


def test_8_bit_matmuls_add_what_the_adapter_alone_gives() -> None:
    case = Case(torch.bfloat16)
    with torch.no_grad():
        case.inputs[1].mul_(100)
    weight_scale = torch.full((1,), 100.0)
    frozen, case.dense = case.dense, torch.zeros_like(case.dense)
    expected = case.plain()
    case.dense = frozen
    base = case.inputs[0].float() @ frozen.t()
    assert expected.norm() > 100 * base.norm()
    assert distance(case.fused(weight_scale), expected) < 6e-3  # as exact as in 16 bits


@pytest.mark.parametrize("weight_scale", [None, torch.full((1,), 100.0)], ids=["bf16", "fp8"])
def test_a_matmul_that_nothing_reads_is_left_out_and_its_gradients_are_the_same(
    weight_scale: torch.Tensor | None,
) -> None:
    case = Case(torch.bfloat16)
    with unread(case.codes.packed):
        actual = case.fused(weight_scale)
    assert actual.isnan().all()
    expected = case.fused(weight_scale)
    assert not expected.isnan().any()
    for gradient, other in zip(case.gradients(actual), case.gradients(expected), strict=True):
        assert torch.equal(gradient, other)


def test_rows_are_scaled_to_the_range_of_8_bits() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [1e-3, 3e-3, 2e-3]])
    scaled, scale = scale_rows(x)
    assert scaled.float().abs().amax(1).tolist() == [448.0, 0.0, 448.0]
    torch.testing.assert_close(scaled.float() * scale, x, rtol=0.07, atol=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_in_chunks_is_the_cross_entropy(compiled: bool) -> None:
    torch.manual_seed(0)
    hidden, output = torch.randn(CHUNK + 70, 16, requires_grad=True), torch.randn(90, 16)
    targets = torch.randint(0, 90, (CHUNK + 70,))
    targets[::3] = -100
    chunk_loss = torch.compile(entropy_and_gradient) if compiled else entropy_and_gradient
    actual = linear_cross_entropy(hidden, output, targets, chunk_loss) / 7
    expected = torch.nn.functional.cross_entropy(hidden @ output.t(), targets, reduction="sum") / 7
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    gradient, other = (torch.autograd.grad(loss, hidden)[0] for loss in (actual, expected))
    torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)
    assert not gradient[::3].any()


def test_a_loss_without_targets_is_zero_and_no_nan() -> None:
    hidden = torch.randn(5, 4, requires_grad=True)
    actual = linear_cross_entropy(hidden, torch.randn(9, 4), torch.full((5,), -100), entropy_and_gradient)
    assert actual.item() == 0
    assert not torch.autograd.grad(actual, hidden)[0].any()


def test_attention_over_a_batch_is_causal_with_grouped_heads() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 10, 8), torch.randn(2, 2, 10, 8), torch.randn(2, 2, 10, 8)
    with fastest_attention():
        actual = attend_batch(q, k, v, 0.3)
    dequantize = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.3
    dequantize = dequantize.masked_fill(torch.ones(10, 10).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(actual, dequantize @ v.repeat_interleave(2, 1))


class FakeFlash:
    """A GPU on which newer FlashAttentions can be switched on; each shifts what torch's own gives by a share of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, installed: dict[str, float | Exception], major: int) -> None:
        self.active: str | None = None
        shift: dict[str | None, float | Exception] = {None: 0.0, **installed}

        def attend(device: torch.device) -> list[torch.Tensor]:
            actual = shift[self.active]
            if isinstance(actual, Exception):
                raise actual
            return [torch.ones(3) * (1 + actual)]

        modules = [module for title, module, _ in attention.NEWER_FLASH.values() if title in installed]
        for name, value in {
            "list_flash_attention_impls": lambda: ["FA3", "FA4"],
            "activate_flash_attention_impl": lambda title: setattr(self, "active", title),
            "restore_flash_attention_impl": lambda: setattr(self, "active", None),
            "current_flash_attention_impl": lambda: self.active,
        }.items():
            monkeypatch.setattr(torch.nn.attention, name, value, raising=False)
        self.interface = SimpleNamespace(_flash_attn_fwd=lambda *args: ("output", "sums", *args))
        monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", self.interface)
        monkeypatch.setattr(attention, "_is_installed", modules.__contains__)
        monkeypatch.setattr(attention, "_try_attention", attend)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))


@pytest.mark.parametrize(
    ("installed", "major", "name", "reason"),
    [
        ({"FA3": 0.001}, 9, "fa3", None),
        ({"FA4": 0.001}, 10, "fa4", None),
        ({}, 9, "fa3", "FA3 is not installed"),
        ({"FA3": 0.001}, 10, "fa3", "FA3 does not serve this GPU"),
        ({"FA3": 0.5}, 9, "fa3", "FA3 gives other numbers than torch's own attention, 50% apart"),
        ({"FA4": RuntimeError("no\ncompiler")}, 9, "fa4", "FA4 does not run here (no compiler)"),
    ],
)
def test_a_newer_flash_attention_serves_where_it_agrees_with_torch_s_own(
    installed: dict[str, float | Exception], major: int, name: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash = FakeFlash(monkeypatch, installed, major)
    assert attention.flash_unsupported_reason(name, torch.device("cpu")) == reason
    assert flash.active == (name.upper() if reason is None else None)


def test_what_later_flash_attentions_return_more_does_not_reach_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    flash = FakeFlash(monkeypatch, {"FA4": 0.0}, 9)
    flash.interface._flash_attn_fwd.compile_cache = compiled = {"a": 1}
    for _ in range(2):
        assert attention.flash_unsupported_reason("fa4", torch.device("cpu")) is None
        assert flash.interface._flash_attn_fwd("more", None) == ("output", "sums")
        assert flash.interface._flash_attn_fwd.compile_cache is compiled
