"""A base that transformers cannot train, or that learns something else, is refused before it is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qlora.config.compose import compose
from qlora.errors import UserError
from qlora.models.first_pass import try_training
from qlora.runtime.device import Placement
from qlora.training.device_checks import check_checkpointing

FP32 = Placement(torch.device("cpu"), torch.float32, torch.float32)
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 200}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": SMALL | {"intermediate_size": 64, "attention_dropout": 0.5},
    "git": SMALL | {"intermediate_size": 64, "is_decoder": True},
    "cpmant": {"hidden_size": 64, "num_attention_heads": 4, "dim_head": 16, "dim_ff": 64, "num_hidden_layers": 2,
               "vocab_size": 200, "prompt_length": 4},
}  # fmt: skip


def build(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPES[kind])
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    model.get_input_embeddings().weight.data.normal_()
    return model


def test_a_base_that_trains_passes_and_is_left_as_it_was() -> None:
    model = build("llama").eval()
    state, weights = torch.get_rng_state(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try_training(model, "model.name=x", FP32)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_whose_code_fails_is_refused() -> None:
    message = (
        r"model\.name=x: transformers \S+ cannot train this git \(RuntimeError: .*in-place.*\); choose another base"
    )
    with pytest.raises(UserError, match=message):
        try_training(build("git"), "model.name=x", FP32)


def test_one_that_computes_another_loss_than_that_of_the_next_tokens_is_refused() -> None:
    message = r"the cpmant of transformers computes another loss \(\S+\) than that of the next tokens"
    with pytest.raises(UserError, match=message):
        try_training(build("cpmant"), "model.name=x", FP32)


def test_activations_are_recomputed_only_where_the_base_can() -> None:
    check_checkpointing(compose(["trainer.gradient_checkpointing=true"]).trainer, build("llama"))
    check_checkpointing(compose(["trainer.gradient_checkpointing=false"]).trainer, build("cpmant"))
    with pytest.raises(
        UserError, match=r"gradient_checkpointing=true: the cpmant .*set trainer\.gradient_checkpointing=f"
    ):
        check_checkpointing(compose(["trainer.gradient_checkpointing=true"]).trainer, build("cpmant"))
