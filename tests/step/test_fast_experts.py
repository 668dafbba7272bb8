"""The experts of the fast step: each operator against its formula, and a mixture's loss and gradients as without it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch._dynamo.utils import counters

from qlora.adapters import add_lora
from qlora.config.compose import compose
from qlora.experts.layout import find_experts
from qlora.objectives import build_objective
from qlora.runtime.device import Placement
from qlora.step.fast_step import FastStep
from qlora.step.kernels.experts import FrozenExperts, apply_experts
from qlora.step.kernels.grouped import SortWeights, route_tokens
from qlora.step.part import ON
from qlora.training.routing import RoutingMeter
from qlora.upstream.transformers_experts import experts_implementation
from tests.models.bases import choose, load, write

CPU = Placement(torch.device("cpu"), torch.float32, torch.float32)
EXPERTS, HIDDEN, WIDTH, TOKENS, PICKS, RANK = 6, 64, 32, 21, 2, 4
WIDTHS = {"intermediate_size": 64, "moe_intermediate_size": 64}
KINDS = ("qwen3_moe", "mixtral", "gpt_oss", "olmoe", "granitemoe")
OFF = [f"trainer.{part}=false" for part in ("compile", "fused_linear", "fused_attention", "fused_loss")]


def test_rows_are_sorted_by_expert_and_keep_their_order() -> None:
    index = torch.tensor([[2, 0], [0, 2], [3, 0]])
    order, source, positions, offsets = route_tokens(index, 5)
    assert order.tolist() == [1, 2, 5, 0, 3, 4]
    assert source.tolist() == [0, 1, 2, 0, 1, 2]
    assert positions.tolist() == [[3, 0], [1, 4], [5, 2]]
    assert offsets.tolist() == [3, 3, 5, 6, 6]


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_sorted_rows_give_the_sum_and_the_gradients_of_single_tokens(rate: float) -> None:
    torch.manual_seed(0)
    first, down = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN) / 8, torch.randn(EXPERTS, HIDDEN, WIDTH) / 8
    shapes = [(TOKENS, HIDDEN), (TOKENS, EXPERTS - 1), (EXPERTS, RANK, HIDDEN), (EXPERTS, 2 * WIDTH, RANK),
              (EXPERTS, RANK, WIDTH), (EXPERTS, HIDDEN, RANK)]  # fmt: skip
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]  # the last expert gets no token
    keep = (torch.rand(TOKENS, HIDDEN) >= rate) / (1 - rate)
    gradient = torch.randn(TOKENS, HIDDEN)

    def fast(x: Tensor, scores: Tensor, a: Tensor, b: Tensor, a_down: Tensor, b_down: Tensor) -> Tensor:
        weights, index = scores.softmax(-1).topk(PICKS)
        routing = route_tokens(index, EXPERTS)
        read = x * keep if rate else None
        weight = FrozenExperts([first], 2 * WIDTH, HIDDEN)
        gate, up = apply_experts(x, read, a, b, routing, weight, weight.tensors, gathers=True).chunk(2, -1)
        rows = gate.sigmoid() * up * SortWeights.apply(weights, routing.order, routing.positions)
        weight = FrozenExperts([down], HIDDEN, WIDTH)
        return apply_experts(rows, None, a_down, b_down, routing, weight, weight.tensors, gathers=False)

    def plain(x: Tensor, scores: Tensor, a: Tensor, b: Tensor, a_down: Tensor, b_down: Tensor) -> Tensor:
        weights, index = scores.softmax(-1).topk(PICKS)
        total = torch.zeros(TOKENS, HIDDEN)
        for pick in range(PICKS):
            w, w_down = first[index[:, pick]], down[index[:, pick]]
            low = a[index[:, pick]] @ (x * keep)[:, :, None]
            gate, up = (w @ x[:, :, None] + b[index[:, pick]] @ low)[..., 0].chunk(2, -1)
            rows = (gate.sigmoid() * up)[:, :, None]
            output = w_down @ rows + b_down[index[:, pick]] @ (a_down[index[:, pick]] @ rows)
            total = total + output[..., 0] * weights[:, pick, None]
        return total

    results = [[f(*leaves), *torch.autograd.grad(f(*leaves), leaves, gradient)] for f in (fast, plain)]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))


def test_the_kernels_compute_as_their_twins(request: pytest.FixtureRequest) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.step.interpret_experts"]
    done = subprocess.run(command, cwd=request.config.rootpath, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout)
    assert len(differences) > 20
    assert {name: value for name, value in differences.items() if value > 1e-5} == {}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {kind: write(kind, root / kind, **WIDTHS) for kind in KINDS}


def attach(folder: Path, *overrides: str) -> PeftModel:
    """Returns a mixture with adapters on its experts, none of whose matrices is zero."""
    config = choose(folder, "lora.r=6", *overrides)
    bits = [text for text in overrides if text.startswith("quantization")]
    base = load(folder, *bits, "quantization.compute_dtype=fp32")
    torch.manual_seed(3)
    model = add_lora(config.lora, base, tensors=list, new_token_ids=[], batches=[])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.config.use_cache = False
    return model.train()


def learn(model: PeftModel, *overrides: str, tokens: int = 32) -> tuple[dict[str, Tensor], FastStep]:
    """Returns the loss and the gradients of two micro-batches inside a step, and the step."""
    config = compose([*OFF, *overrides])
    step = FastStep(model, config.trainer, config.quantization, CPU, None, build_objective(config.loss))
    model.zero_grad()
    if step.checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    losses = []
    for seed in (0, 1):
        ids = torch.randint(3, 1500, (1, tokens), generator=torch.Generator().manual_seed(seed)).view(
            -1, min(tokens, 16)
        )
        with step:
            loss: Any = model(input_ids=ids, labels=ids, num_items_in_batch=60).loss
            loss.backward()
        losses.append(loss.detach())
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"loss": torch.stack(losses), **{name: grad.clone() for name, grad in gradients.items()}}, step


def check_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert any("experts" in name and "lora_A" in name for name in actual)
    assert all(float(tensor.abs().max()) > 0 for name, tensor in expected.items() if "lora_" in name)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=1e-4, atol=1e-5 * max(float(tensor.abs().max()), 1e-3), msg=name
        )


@pytest.mark.matrix(1)
@pytest.mark.parametrize("bits", ["quantization=nf4", "quantization=fp32"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_learns_what_it_learns_without_the_part(folders: dict[str, Path], kind: str, bits: str) -> None:
    model = attach(folders[kind], bits, "lora.dropout=0")
    expected, _ = learn(model, "trainer.fused_experts=false")
    actual, step = learn(model, "trainer.fused_experts=true", "trainer.gradient_checkpointing=false")
    assert step.parts["fused_experts"] == ON
    check_equal(actual, expected)
    assert {experts_implementation(experts) for experts in find_experts(model).values()} == {"qlora"}


@pytest.mark.full
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_compiled_and_checkpointed_layers_learn_the_same(folders: dict[str, Path], kind: str) -> None:
    model = attach(folders[kind], "quantization=nf4", "lora.dropout=0")
    expected, _ = learn(model, "trainer.fused_experts=false", "trainer.gradient_checkpointing=false")
    RoutingMeter(model.get_base_model())
    counters.clear()
    fast = (
        "trainer.compile=true",
        "trainer.fused_experts=true",
        "trainer.fused_linear=true",
        "trainer.fused_loss=true",
    )
    actual, step = learn(model, *fast, "trainer.gradient_checkpointing=true")
    assert step.checkpointed == 2
    check_equal(actual, expected)
    assert not counters["graph_break"]
    # One for the loss, and at most one for all layers of a kind: gpt-oss has two, whose windows are in their masks.
    assert counters["stats"]["unique_graphs"] <= {"qwen3_moe": 2, "gpt_oss": 3}[kind]


@pytest.mark.full
def test_the_matmul_that_ends_a_layer_is_not_computed_again(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora.step.kernels import experts as kernels

    calls: list[bool] = []
    decode = kernels.decode_experts
    monkeypatch.setattr(kernels, "decode_experts", lambda *a, **k: (calls.append(k["transposed"]), decode(*a, **k))[1])
    model = attach(folders["qwen3_moe"], "quantization=nf4", "lora.dropout=0")
    learn(model, "trainer.fused_experts=true", "trainer.gradient_checkpointing=true")
    # For each of two micro-batches and two layers: gate and up, down; again gate and up; both backwards.
    assert calls.count(False) == 2 * 2 * 3
    assert calls.count(True) == 2 * 2 * 2


@pytest.mark.full
def test_dropout_leaves_out_inputs_of_the_adapters_and_differs_from_step_to_step(folders: dict[str, Path]) -> None:
    model = attach(folders["qwen3_moe"], "quantization=nf4", "lora.dropout=0.3")
    torch.manual_seed(0)
    first, _ = learn(model, "trainer.fused_experts=true")
    torch.manual_seed(0)
    again, _ = learn(model, "trainer.fused_experts=true")
    other, _ = learn(model, "trainer.fused_experts=true")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["loss"], other["loss"])


@pytest.mark.full
def test_8_bit_matmuls_come_close_and_keep_to_the_adapters(folders: dict[str, Path]) -> None:
    model = attach(folders["qwen3_moe"], "quantization=nf4", "lora.dropout=0")
    expected, _ = learn(model, "trainer.fused_experts=false")
    fp8 = ("trainer.fused_linear=true", "trainer.fused_experts=true", "quantization.compute=fp8")
    actual, step = learn(model, *fp8)
    assert step.parts["fp8"] == ON
    assert not torch.equal(actual["loss"], expected["loss"])
    torch.testing.assert_close(actual["loss"], expected["loss"], rtol=2e-2, atol=0)
    for name in (name for name in expected if "experts" in name):
        cosine = torch.nn.functional.cosine_similarity(actual[name].flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.98, name


@pytest.mark.parametrize("bits", ["native", "fp8"])
def test_of_few_tokens_only_the_experts_that_have_rows_are_decoded(
    tmp_path: Path, bits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora.step.kernels import experts as kernels

    decoded: list[int] = []
    decode = kernels.decode_experts

    def note(tensors: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        weight = decode(tensors, *args, **kwargs)
        if kernels.is_quantized(tensors):
            decoded.append(len(weight))
        return weight

    monkeypatch.setattr(kernels, "decode_experts", note)
    model = attach(write("qwen3_moe", tmp_path, **WIDTHS, num_experts=16), "quantization=nf4", "lora.dropout=0")
    fast = ("trainer.fused_experts=true", "trainer.fused_linear=true", f"quantization.compute={bits}")
    few, _ = learn(model, *fast, tokens=3)
    assert set(decoded) == {6}  # rows
    learn(model, *fast, tokens=8)
    assert set(decoded) == {6, 16}
    enter = FastStep.__enter__
    monkeypatch.setattr(FastStep, "__enter__", lambda step: (step.keep(2), enter(step))[1])  # all are decoded, once
    check_equal(few, learn(model, *fast, tokens=3)[0])


def test_what_the_part_cannot_compute_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    _, step = learn(attach(write("deepseek_v3", tmp_path), "quantization=nf4"), "trainer.fused_experts=auto")
    assert step.parts["fused_experts"] == "the widths of the experts are no multiples of 64"
    _, step = learn(attach(folders["mixtral"], "quantization=nf4"), "trainer.fused_experts=auto")
    assert step.parts["fused_experts"] == "auto switches it on with CUDA only"
