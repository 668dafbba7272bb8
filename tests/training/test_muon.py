"""Muon: which parameters it takes as matrices, and that its updates are those of torch's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from qlora.adapters.experts import attach_experts
from qlora.errors import UserError
from qlora.training.optimizers.matrices import as_matrices, find_matrices
from qlora.training.optimizers.muon import Muon, build

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
ARGUMENTS: Any = SimpleNamespace(adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, learning_rate=1e-3)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS))


def mixture() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **HEADS, **sizes))


def fill(parameters: list[nn.Parameter], step: int) -> None:
    torch.manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)


@pytest.mark.parametrize("rule", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_matrices_move_as_by_torch_s_muon_and_all_else_as_by_adamw(rule: str, nesterov: bool) -> None:
    torch.manual_seed(0)
    shapes = [(8, 16), (8, 16), (16, 8), (12, 12), (16,), (5, 3)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    matrices = dict.fromkeys(ours[:4], 1)
    muon = Muon([{"params": ours, "weight_decay": 0.1}], 0.01, matrices=matrices, nesterov=nesterov, adjust_lr_fn=rule)
    others = [
        torch.optim.Muon(theirs[:4], 0.01, 0.1, nesterov=nesterov, adjust_lr_fn=rule),
        torch.optim.AdamW(theirs[4:], 0.01, weight_decay=0.1),
    ]
    for step in range(3):
        fill(ours, step)
        fill(theirs, step)
        for optimizer in (muon, *others):
            optimizer.step()
    for mine, reference in zip(ours[:4], theirs[:4], strict=True):
        moved = (reference - mine).norm() / 0.01
        assert moved < 0.02 * reference.numel() ** 0.5, "only the rounding of bf16 products differs"
    for mine, reference in zip(ours[4:], theirs[4:], strict=True):
        assert torch.equal(mine, reference)


def test_each_expert_s_matrix_is_made_orthogonal_by_itself() -> None:
    stacked = nn.Parameter(torch.zeros(3, 8, 16))
    below = nn.Parameter(torch.zeros(3 * 8, 16))
    alone = [nn.Parameter(torch.zeros(8, 16)) for _ in range(3)]
    torch.manual_seed(0)
    gradient = torch.randn(3, 8, 16) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    stacked.grad, below.grad = gradient.clone(), gradient.reshape(24, 16)
    for parameter, matrix in zip(alone, gradient, strict=True):
        parameter.grad = matrix.clone()
    for parameters, count in (([stacked], 3), ([below], 3), (alone, 1)):
        Muon([{"params": parameters}], 0.01, matrices=dict.fromkeys(parameters, count)).step()
    assert torch.equal(stacked, torch.stack(list(alone)))
    assert torch.equal(below.view(3, 8, 16), stacked)


def test_the_matrices_of_an_adapter_are_lora_s_and_those_of_each_expert() -> None:
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets, use_dora=False)
    model = get_peft_model(mixture(), config)
    attach_experts(model, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    matrices = find_matrices(model)
    counts = {names[parameter]: count for parameter, count in matrices.items()}
    assert counts.keys() == {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {count for name, count in counts.items() if "experts" in name} == {4}
    assert {count for name, count in counts.items() if "q_proj" in name} == {1}
    shapes = {
        tuple(as_matrices(weight, count).shape[1:]) for weight, count in find_matrices(model).items() if count > 1
    }
    assert shapes == {(2, 16), (16, 2), (2, 8)}, "[rank, in] and [out, rank] of an expert"


def test_the_vectors_of_an_adapter_are_no_matrices() -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[weight].rpartition(".lora_")[2][0] for weight in find_matrices(model)} == {"A", "B"}


@pytest.mark.parametrize("make", [llama, mixture])
def test_the_matrices_of_a_whole_model_are_all_but_embeddings_and_the_head(make: Any) -> None:
    model = make()
    names = {parameter: name for name, parameter in model.named_parameters()}
    counts = {names[parameter]: count for parameter, count in find_matrices(model).items()}
    left = {name for name, weight in model.named_parameters() if weight.dim() > 1} - counts.keys()
    assert left == {"model.embed_tokens.weight", "lm_head.weight"}
    assert {count for name, count in counts.items() if "experts" in name} <= {4}


def test_an_adapter_without_matrices_is_refused() -> None:
    targets = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    model = get_peft_model(llama(), IA3Config(**targets))
    with pytest.raises(UserError) as error:
        build(ARGUMENTS, model, {})
    assert str(error.value) == (
        "trainer.optim=muon trains matrices, and this adapter has none; choose another, e.g. trainer.optim=adamw_torch"
    )
