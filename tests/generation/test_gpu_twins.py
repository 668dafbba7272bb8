"""What answers on a GPU, as far as a CPU computes it too: steps asked for ahead, packed weights, experts, memory."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlora.config.compose import compose
from qlora.config.schema import GenerationConfig
from qlora.errors import ResourceError
from qlora.experts.layout import ExpertsLayout, find_experts
from qlora.generation import answering
from qlora.generation.answering import Slots, answer_batches
from qlora.generation.elementwise import fused_elementwise
from qlora.generation.engine import Engine
from qlora.generation.experts import decoded_expert_bytes, served_experts
from qlora.generation.graphs import bucket
from qlora.generation.linears import decoded_linears, packed_linears
from qlora.generation.sampling import Sampler
from qlora.generation.slot_model import SlotModel, serving
from qlora.upstream.transformers_experts import experts_implementation
from tests.generation.test_slots import adapted, alone, answers, distance, prompts, randomised
from tests.models.bases import build, write
from tests.step.test_fast_experts import WIDTHS, attach

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 77, 900, 31, 8]])


@pytest.mark.parametrize("sampled", [False, True])
def test_a_host_that_is_a_step_ahead_gets_the_same_answers(sampled: bool) -> None:
    model, ends = randomised(build("llama")).eval(), list(range(2, 200))
    options: dict[str, Any] = {"do_sample": True, "temperature": 3.0, "min_new_tokens": 2} if sampled else {}
    config = GenerationConfig(max_new_tokens=12, batch_size=5, **options)
    asked = prompts(40)
    engine = Engine(model, Sampler(config, ends), slots=5, length=32)
    engine.ahead = 1
    requests = [engine.add(index, prompt, row=index, likeliest=index % 3 or None) for index, prompt in enumerate(asked)]
    with torch.inference_mode(), serving(model):
        assert len([*engine.answers()]) == 40
    assert [request.answer for request in requests] == answers(model, asked, config, ends=ends)
    assert all(len(request.scores) == (len(request.answer) if request.likeliest else 0) for request in requests)
    assert len({len(request.answer) for request in requests}) > 2


def test_a_row_that_is_cancelled_while_its_token_is_on_its_way_gets_no_more() -> None:
    model = randomised(build("llama")).eval()
    engine = Engine(model, Sampler(GenerationConfig(max_new_tokens=9), []), slots=2, length=30)
    engine.ahead = 1
    asked = prompts(3)
    requests = [engine.add(index, prompt) for index, prompt in enumerate(asked)]
    with torch.inference_mode(), serving(model):
        for _ in range(3):
            engine.step()
        told = len(requests[0].answer)
        engine.cancel(requests[0])
        assert {request.key for request in engine.answers()} == {1, 2}
    assert len(requests[0].answer) == told
    assert [request.answer for request in requests[1:]] == [alone(model, prompt, 9, [-1]) for prompt in asked[1:]]


def test_prompts_that_do_not_fit_together_are_read_by_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = randomised(build("llama")).eval(), prompts(12)
    read, tried = SlotModel.read, list[int]()

    def read_few(self: SlotModel, given: list[list[int]], *, first: int = 0) -> torch.Tensor:
        tried.append(sum(len(prompt) for prompt in given))
        if tried[-1] > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(self, given, first=first)

    monkeypatch.setattr(SlotModel, "read", read_few)
    given = answers(model, asked, GenerationConfig(max_new_tokens=4, batch_size=12))
    assert given == [alone(model, prompt, 4) for prompt in asked]
    assert tried[0] > 40 >= tried[-1]


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "down_proj"], ["k_proj"]])
def test_packed_weights_and_their_adapters_compute_what_peft_does(targets: Any) -> None:
    model = adapted("qwen2", target_modules=targets)
    packed = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.inference_mode():
        expected = model(input_ids=IDS).logits
        with packed_linears(model, torch.float32):
            actual = model(input_ids=IDS).logits
            with model.disable_adapter():
                base = model(input_ids=IDS).logits
        with model.disable_adapter():
            plain = model(input_ids=IDS).logits
    assert distance(actual, expected) < 1e-5
    assert distance(base, plain) < 1e-5
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, packed[name])
        assert not parameter.is_inference()


@pytest.mark.parametrize("form", [decoded_linears, packed_linears])
def test_weights_and_biases_are_held_once_and_stay_fit_for_training(form: Any) -> None:
    from peft import LoraConfig, get_peft_model

    base = randomised(build("qwen2"))
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "k_proj", "v_proj"]))
    model.eval()
    layers = [module for name, module in base.named_modules() if name.endswith("_proj.base_layer")]
    bias = layers[0].bias
    with torch.inference_mode(), form(model, torch.float32):
        assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 2  # one a layer of the model
        first = model(input_ids=IDS).logits
        kept = bias.clone()
        bias.copy_(kept + 1)  # as the untuned biases take the place of trained ones
        moved = model(input_ids=IDS).logits
        bias.copy_(kept)
    assert distance(moved, first) > 1e-4
    assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == len(layers)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    assert torch.equal(model(input_ids=IDS).logits, get_own(model))


def get_own(model: nn.Module) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_experts_compute_by_the_kernels_with_the_adapter_that_is_on(kind: str, tmp_path: Path) -> None:
    model = attach(write(kind, tmp_path / "base", **WIDTHS), "quantization=nf4", "lora.dropout=0.1").eval()
    experts = find_experts(model)
    with torch.inference_mode():
        expected = model(input_ids=IDS).logits
        with model.disable_adapter():
            plain = model(input_ids=IDS).logits
        for decoded in (True, False):
            with served_experts(model, torch.float32, decoded=decoded):
                assert {experts_implementation(module) for module in experts.values()} == {"qlora_fast"}
                actual = model(input_ids=IDS).logits
                with model.disable_adapter():
                    base = model(input_ids=IDS).logits
            assert distance(actual, expected) < 1e-5
            assert distance(base, plain) < 1e-5
        assert torch.equal(model(input_ids=IDS).logits, expected)
    assert distance(plain, expected) > 1e-4
    layouts = [ExpertsLayout.of(module) for module in experts.values()]
    sizes = [rows * columns * layout.count for layout in layouts for rows, columns in layout.projections.values()]
    assert decoded_expert_bytes(model, torch.bfloat16) == 2 * sum(sizes)


def test_a_batch_that_does_not_fit_is_made_smaller_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = randomised(build("llama")).eval()
    settings = model.config
    token = 2 * 4 * settings.num_hidden_layers * settings.num_key_value_heads * settings.head_dim
    config = GenerationConfig(
        max_new_tokens=7, batch_size=4, weights=compose(["generation.weights=4bit"]).generation.weights
    )
    slots = Slots(config, CPU, torch.float32, contextlib.nullcontext)
    asked = prompts(6)
    monkeypatch.setattr(answering, "free_bytes", lambda device: int(2.5 * 27 * token / answering.SHARE))
    with caplog.at_level(logging.WARNING):
        batches = [(0, list(range(6)), asked)]
        ((_, given, _),) = answer_batches(slots, model, batches, end_ids=[2], seed=0, length=27)
    assert given == [alone(model, prompt, 7) for prompt in asked]
    (record,) = caplog.records
    assert record.message.startswith(
        "2 rows are answered together, not generation.batch_size=4: keys and values of 27 "
    )
    monkeypatch.setattr(answering, "free_bytes", lambda device: token)
    with pytest.raises(ResourceError, match=r"generation: keys and values .* set a smaller generation\.max_new_tokens"):
        next(answer_batches(slots, model, batches, end_ids=[2], seed=0, length=27))


def test_a_step_computes_as_many_rows_as_its_bucket_but_no_more_than_slots() -> None:
    assert [bucket(rows, 100) for rows in (1, 3, 8, 17, 65, 97, 100)] == [1, 4, 8, 24, 96, 100, 100]
    assert [bucket(rows, 1000) for rows in (256, 257, 513)] == [256, 512, 768]


def test_what_a_twin_does_not_compute_to_the_bit_stays_the_models_own() -> None:
    model = randomised(build("llama")).eval()
    layer = model.model.layers[0]

    class OtherRMSNorm(type(layer.input_layernorm)):  # type: ignore[misc]
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden) * 1.001

    layer.input_layernorm.__class__ = OtherRMSNorm
    layer.mlp.act_fn = nn.ReLU()
    with torch.inference_mode(), fused_elementwise(model):
        assert "forward" not in layer.input_layernorm.__dict__
        assert "forward" not in layer.mlp.__dict__
        assert "forward" in layer.post_attention_layernorm.__dict__
