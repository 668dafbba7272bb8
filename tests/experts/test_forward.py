"""Mixtures of experts compute what transformers' own forward does, with and without adapters on the experts."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora.experts.forward import ExpertAdapter, run_experts, use_experts
from qlora.experts.layout import ExpertsLayout, find_experts
from qlora.upstream.transformers_experts import experts_implementation, set_experts_implementation
from tests.models.bases import build

KINDS = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "granitemoe", "olmoe")
OTHERS = {"nemotron_h": "NemotronHExperts", "muse_spark": "MuseSparkExperts", "aria": "AriaExperts"}
"""Without a gate, with a norm behind each expert, and transposed without biases."""
SHAPE = {
    "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "hidden_size": 32, "moe_hidden_size": 32,
    "moe_latent_size": 16, "moe_intermediate_size": 24, "intermediate_size": 24, "mlp_hidden_act": "relu2",
    "hidden_act": "silu", "post_norm_eps": 1e-6, "_experts_implementation": "eager",
}  # fmt: skip
TOKENS = 24


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def experts_of(model: PreTrainedModel) -> nn.Module:
    return next(iter(find_experts(model).values()))


def randomise(model: nn.Module) -> None:
    """Biases and the weights of some bases begin with zeros."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)


def route(layout: ExpertsLayout, tokens: int = TOKENS, k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, experts and routing weights; the last expert gets no token."""
    torch.manual_seed(2)
    hidden = torch.randn(tokens, layout.hidden, requires_grad=True)
    index = torch.rand(tokens, layout.count - 1).topk(k).indices
    return hidden, index, torch.rand(tokens, k).requires_grad_()


def run(experts: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """The output of the module itself, and the gradients of hidden states, routing weights and parameters."""
    hidden, index, weights = inputs
    output = experts(hidden, index, weights)
    torch.manual_seed(3)
    leaves = [hidden, weights, *(parameter for parameter in experts.parameters() if parameter.requires_grad)]
    return [output, *torch.autograd.grad(output, leaves, torch.randn_like(output))]


@pytest.fixture(scope="module", params=[*KINDS, *OTHERS])
def experts(request: pytest.FixtureRequest) -> nn.Module:
    kind = request.param
    if kind in OTHERS:
        modelling = pytest.importorskip(f"transformers.models.{kind}.modeling_{kind}")
        module = getattr(modelling, OTHERS[kind])(SimpleNamespace(**SHAPE))
    else:
        module = experts_of(build(kind))
    randomise(module)
    return module


@pytest.fixture
def eager(experts: nn.Module) -> nn.Module:
    module = copy.deepcopy(experts)
    module.config = copy.deepcopy(module.config)
    set_experts_implementation(module, "eager")
    return module


@pytest.mark.parametrize("tokens", [TOKENS, 1])
@pytest.mark.parametrize("is_trained", [True, False], ids=["trained", "frozen"])
def test_outputs_and_gradients_are_those_of_the_eager_forward(
    experts: nn.Module, eager: nn.Module, is_trained: bool, tokens: int
) -> None:
    use_experts(experts)
    assert experts_implementation(experts) == "qlora"
    inputs = route(ExpertsLayout.of(experts), tokens)
    for module in (experts, eager):
        module.requires_grad_(is_trained)
    for actual, expected in zip(run(experts, *inputs), run(eager, *inputs), strict=True):
        close(actual, expected)


@pytest.mark.parametrize("is_enabled", [True, False])
def test_adapters_add_their_product_to_the_weights(experts: nn.Module, eager: nn.Module, is_enabled: bool) -> None:
    use_experts(experts)
    layout = ExpertsLayout.of(experts)
    experts.requires_grad_(False)
    adapters, merged = {}, {}
    for name, (rows, columns) in layout.projections.items():
        a = torch.randn(layout.count, 3, columns).mul(0.1).requires_grad_()
        b = torch.randn(layout.count, rows, 3).mul(0.1).requires_grad_()
        adapters[name] = ExpertAdapter(a, b, 1.5, is_enabled=lambda: is_enabled)
        delta = 1.5 * is_enabled * (b @ a)
        merged[name] = getattr(eager, name).detach() + (delta.transpose(1, 2) if layout.is_transposed else delta)
    experts.__dict__["expert_adapters"] = adapters
    hidden, index, weights = route(layout)
    try:
        outputs = [
            experts(hidden, index, weights),
            torch.func.functional_call(eager, merged, (hidden, index, weights)),
        ]
    finally:
        del experts.__dict__["expert_adapters"]
    leaves = [hidden, weights]
    if is_enabled:
        leaves += [tensor for adapter in adapters.values() for tensor in (adapter.a, adapter.b)]
    close(*outputs)
    upstream = torch.randn_like(outputs[0])
    grads = [torch.autograd.grad(output, leaves, upstream) for output in outputs]
    for actual, expected in zip(*grads, strict=True):
        close(actual, expected)


def test_dropout_masks_the_rows_of_an_adapter_alone_and_only_in_training() -> None:
    module: Any = experts_of(build("qwen3_moe"))
    layout = ExpertsLayout.of(module)
    module.requires_grad_(False)
    use_experts(module)
    hidden, index, weights = route(layout)
    plain = module(hidden, index, weights)
    rows, columns = layout.projections["down_proj"]
    a, b = torch.randn(layout.count, 2, columns), torch.randn(layout.count, rows, 2)
    module.expert_adapters = {"down_proj": ExpertAdapter(a, b, 1.0, dropout=1.0)}
    assert torch.equal(module.train()(hidden, index, weights), plain)
    assert not torch.equal(module.eval()(hidden, index, weights), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_computes_through_the_registered_forward(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind).eval()
    randomise(model)
    ids = torch.arange(5, 25)[None]
    for experts in find_experts(model).values():
        set_experts_implementation(experts, "eager")
    expected = model(ids).logits
    calls = []
    monkeypatch.setattr("qlora.experts.forward.run_experts", lambda *args: calls.append(1) or run_experts(*args))
    use_experts(model)
    logits = model(ids).logits
    assert len(calls) == len(find_experts(model)) > 0
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_autocast_computes_in_its_dtype_and_returns_that_of_the_hidden_states() -> None:
    module = experts_of(build("mixtral"))
    randomise(module)
    module.requires_grad_(False)
    use_experts(module)
    hidden, index, weights = route(ExpertsLayout.of(module))
    exact = module(hidden, index, weights)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = module(hidden, index, weights)
    assert rounded.dtype is torch.float32
    assert not torch.equal(rounded, exact)
    assert ((rounded - exact).norm() / exact.norm()).item() < 0.01
