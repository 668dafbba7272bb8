"""Answers by slots: the tokens that transformers' own loop gives a row alone, whatever else is answered beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qlora.config.compose import compose
from qlora.config.schema import GenerationConfig
from qlora.errors import ConfigError
from qlora.generation.answering import Slots, answer_batches
from qlora.generation.engine import Engine
from qlora.generation.linears import decoded_bytes, decoded_linears
from qlora.generation.sampling import Sampler
from qlora.generation.slot_model import SlotModel, differs_reason, serving, unsupported_reason
from qlora.upstream.bitsandbytes import disable_repacking
from tests.models.bases import SHAPES, build

END = 2
CPU = torch.device("cpu")
KINDS = {
    "llama": {}, "qwen2": {}, "qwen3_moe": {}, "gemma2": {"attn_logit_softcapping": 2.0, "sliding_window": 5},
    "gpt_oss": {"sliding_window": 5}, "granitemoe": {}, "olmoe": {},
}  # fmt: skip


@pytest.fixture(scope="module", params=list(KINDS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return randomised(build(request.param, **KINDS[request.param])).eval()


def randomised(model: Any) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 1)
    return model


def prompts(count: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, 1590, generator.integers(1, 20)).tolist() for _ in range(count)]


def answers(model: nn.Module, asked: list[list[int]], config: GenerationConfig, *, decoded: bool = False,
            seed: int = 0, ends: Sequence[int] = (END,)) -> list[list[int]]:  # fmt: skip
    engine = Engine(model, Sampler(config, list(ends), seed), slots=config.rows, length=20 + config.new_tokens)
    requests = [engine.add(index, prompt, row=index) for index, prompt in enumerate(asked)]
    linears = decoded_linears(model, torch.float32) if decoded else contextlib.nullcontext()
    with linears, torch.inference_mode(), serving(model):
        done = [request.key for request in engine.answers()]
    assert sorted(done) == list(range(len(asked)))
    return [request.answer for request in requests]


def alone(model: Any, prompt: list[int], tokens: int, ends: Sequence[int] = (END,)) -> list[int]:
    ids = torch.tensor([prompt])
    chosen = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                            eos_token_id=list(ends), pad_token_id=0)  # fmt: skip
    return chosen[0, len(prompt) :].tolist()


def test_each_answer_is_that_of_its_row_alone(model: PreTrainedModel) -> None:
    asked = prompts(12)
    config = GenerationConfig(max_new_tokens=9, batch_size=4)
    assert unsupported_reason(model, config) is None
    assert answers(model, asked, config) == [alone(model, prompt, 9) for prompt in asked]


def test_the_logits_over_slots_are_the_models_own(model: PreTrainedModel) -> None:
    previous = model.config._attn_implementation
    with torch.inference_mode():
        assert differs_reason(model, torch.float32) is None
    assert model.config._attn_implementation == previous


def test_rows_that_end_make_room_and_the_others_go_on() -> None:
    model = randomised(build("llama")).eval()
    ends = list(range(2, 200))  # so that some answers end early
    asked = prompts(40)
    got = answers(model, asked, GenerationConfig(max_new_tokens=12, batch_size=5), ends=ends)
    assert got == [alone(model, prompt, 12, ends) for prompt in asked]
    assert len({len(answer) for answer in got}) > 2


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_what_is_sampled_follows_from_the_row_alone(slots: int) -> None:
    model = randomised(build("llama")).eval()
    asked = prompts(8)

    def sampled(config: GenerationConfig, seed: int = 0) -> list[list[int]]:
        return answers(model, asked, config, seed=seed)

    options = {"max_new_tokens": 6, "do_sample": True, "temperature": 3.0, "top_k": 20, "top_p": 0.9}
    expected = sampled(GenerationConfig(batch_size=8, **options))
    assert sampled(GenerationConfig(batch_size=slots, **options)) == expected
    assert sampled(GenerationConfig(batch_size=slots, **options), seed=1) != expected


def test_sampled_tokens_have_the_probabilities_of_the_model() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 3.0]]).expand(20000, -1)
    config = GenerationConfig(do_sample=True, top_k=3, max_new_tokens=1)
    sampler = Sampler(config, [])
    chosen = sampler.choose(logits, [0] * 20000, [sampler.uniforms(row) for row in range(20000)])
    shares = torch.bincount(chosen, minlength=5) / 20000
    expected = torch.tensor([-torch.inf, 1.0, 2.0, -torch.inf, 3.0]).softmax(0)
    torch.testing.assert_close(shares, expected, atol=0.01, rtol=0)


def test_the_shortest_answer_is_kept_to() -> None:
    model = randomised(build("llama")).eval()
    output = model.get_output_embeddings().weight
    output.data[END] = output.data.abs().amax(0) * 5
    config = GenerationConfig(max_new_tokens=8, min_new_tokens=5)
    got = answers(model, prompts(6), config)
    assert all(END not in answer[:5] and len(answer) >= 5 for answer in got)


def adapted(kind: str, **options: Any) -> Any:
    import bitsandbytes as bnb

    base = randomised(build(kind))
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            parent, _, child = name.rpartition(".")
            packed = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=module.bias is not None,
                                       compute_dtype=torch.float32, quant_type="nf4")  # fmt: skip
            packed.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
            packed.bias = module.bias
            setattr(base.get_submodule(parent), child, packed)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **options)
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    disable_repacking(model)
    return model.eval()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "down_proj"], ["k_proj"]])
def test_decoded_weights_and_their_adapters_compute_what_peft_does(targets: Any) -> None:
    model = adapted("qwen2", target_modules=targets)
    ids = torch.tensor([[5, 77, 900, 31, 8]])
    with torch.inference_mode():
        expected, forwards = model(input_ids=ids).logits, {name: "forward" in module.__dict__
                                                           for name, module in model.named_modules()}  # fmt: skip
        with decoded_linears(model, torch.float32):
            assert sum("forward" in module.__dict__ for module in model.modules()) == 14
            actual = model(input_ids=ids).logits
            with model.disable_adapter():
                base = model(input_ids=ids).logits
        with model.disable_adapter():
            plain = model(input_ids=ids).logits
    assert distance(actual, expected) < 1e-5
    assert distance(base, plain) < 1e-5
    assert distance(plain, expected) > 1e-3
    assert {name: "forward" in module.__dict__ for name, module in model.named_modules()} == forwards
    assert decoded_bytes(model, torch.float32) == 4 * sum(
        layer.in_features * layer.out_features
        for name, layer in model.named_modules()
        if name.endswith(("_proj", "_proj.base_layer"))
        if isinstance(layer, nn.Linear)
    )


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}])
def test_adapters_of_another_kind_stay_pefts(options: dict[str, Any]) -> None:
    model = adapted("llama", target_modules="all-linear", **options)
    asked = prompts(3)
    got = answers(model, asked, GenerationConfig(max_new_tokens=5), decoded=True)
    assert got == [alone(model, prompt, 5) for prompt in asked]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("qwen3_next", {}, "qwen3_next has layers of another kind (linear_attention)"),
        ("falcon", {}, "falcon computes its attention in a way of its own"),
        ("mamba", {}, "mamba has layers of another kind (linear_attention)"),
    ],
)
def test_models_that_slots_do_not_serve_say_why(kind: str, changes: dict[str, Any], message: str) -> None:
    model = build(kind, **changes).eval()
    slots = Slots(GenerationConfig(), CPU, torch.float32, compose_autocast)
    assert slots.unsupported_reason(model) == message
    config = compose(["generation.loop=slots"]).generation
    with pytest.raises(ConfigError, match=r"generation\.loop=slots cannot answer with this model: .*=auto"):
        Slots(config, CPU, torch.float32, compose_autocast).unsupported_reason(model)


def compose_autocast() -> Any:
    import contextlib

    return contextlib.nullcontext()


@pytest.mark.parametrize("option", ["num_beams=2", "repetition_penalty=1.2", "no_repeat_ngram_size=3"])
def test_searches_that_slots_do_not_compute_are_left_to_transformers(option: str) -> None:
    config = compose([f"generation.{option}"]).generation
    reason = Slots(config, CPU, torch.float32, compose_autocast).unsupported_reason(build("llama").eval())
    assert reason is not None
    assert reason.startswith(f"generation.{option.split('=')[0]}=")


def test_a_model_whose_logits_differ_over_slots_is_left_to_transformers() -> None:
    model = randomised(build("llama")).eval()

    def forward(*args: Any, slot_pass: Any = None, **kwargs: Any) -> Any:
        output = type(model).forward(model, *args, slot_pass=slot_pass, **kwargs)
        output.logits = output.logits + (slot_pass is not None)
        return output

    model.forward = forward
    with torch.inference_mode():
        reason = differs_reason(model, torch.float32)
    assert reason is not None
    assert "away from its own" in reason


def test_a_model_is_tried_once_for_all_evaluations_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tried = randomised(build("llama")).eval(), list[Any]()
    monkeypatch.setattr("qlora.generation.answering.differs_reason", lambda *arguments: tried.append(arguments))
    for config in (GenerationConfig(), GenerationConfig(), GenerationConfig(max_new_tokens=3)):
        assert Slots(config, CPU, torch.float32, compose_autocast).unsupported_reason(model) is None
    assert len(tried) == 2


def test_batches_are_given_whole_with_their_answers_in_order() -> None:
    model = randomised(build("llama")).eval()
    config = GenerationConfig(max_new_tokens=7, batch_size=4)
    asked = prompts(13)
    batches = [
        (number, list(rows), [asked[row] for row in rows]) for number, rows in enumerate(np.array_split(range(13), 4))
    ]
    slots = Slots(config, CPU, torch.float32, compose_autocast)
    got = {number: answer for number, answer, _ in
           answer_batches(slots, model, batches, end_ids=[END], seed=0, length=27)}  # fmt: skip
    assert [answer for number in range(4) for answer in got[number]] == [alone(model, prompt, 7) for prompt in asked]


def test_rows_of_a_batch_that_ask_the_same_are_answered_each() -> None:
    model = randomised(build("llama")).eval()
    slots = Slots(GenerationConfig(batch_size=3, max_new_tokens=4), CPU, torch.float32, compose_autocast)
    prompt = prompts(1)[0]
    batches = [(0, [0, 1, 2], [prompt, prompt, prompt])]
    ((_, given, _),) = answer_batches(slots, model, batches, end_ids=[END], seed=0, length=40)
    assert given[0] == given[1] == given[2] != []


def test_a_request_that_is_cancelled_frees_its_slot() -> None:
    model = randomised(build("llama")).eval()
    config = GenerationConfig(max_new_tokens=20, batch_size=2)
    asked = prompts(4)
    engine = Engine(model, Sampler(config, []), slots=2, length=40)
    requests = [engine.add(index, prompt) for index, prompt in enumerate(asked)]
    with torch.inference_mode(), serving(model):
        engine.step()
        engine.step()
        engine.cancel(requests[0])
        engine.cancel(requests[3])
        done = [request.key for request in engine.answers()]
    assert sorted(done) == [1, 2]
    assert len(requests[0].answer) == 2
    assert not requests[3].answer
    expected = model.generate(input_ids=torch.tensor([asked[1]]), max_new_tokens=20, do_sample=False, eos_token_id=None,
                              pad_token_id=0)  # fmt: skip
    assert requests[1].answer == expected[0, len(asked[1]) :].tolist()


def test_a_slot_model_reads_a_prompt_behind_rows_that_go_on() -> None:
    config = AutoConfig.for_model("llama", **SHAPES["llama"])
    model = randomised(AutoModelForCausalLM.from_config(config)).eval()
    slots = SlotModel(model, slots=3, length=16)
    with torch.inference_mode(), serving(model):
        slots.read([[5, 6, 7]])
        late = slots.read([[8, 9]], first=1)
        both = slots.decode(torch.tensor([10, 11]), [3, 2])
    with torch.inference_mode():
        expected = [model(input_ids=torch.tensor([row])).logits[0, -1] for row in ([8, 9], [5, 6, 7, 10], [8, 9, 11])]
    torch.testing.assert_close(torch.stack([late[0], both[0], both[1]]), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_each_row_is_chosen_by_its_own_sampler_and_scored_before_it() -> None:
    model = randomised(build("llama")).eval()
    asked, likely = prompts(4), GenerationConfig(max_new_tokens=6, batch_size=4)
    hot = GenerationConfig(max_new_tokens=5, do_sample=True, temperature=3.0, top_k=0)
    samplers = [Sampler(hot, [], 3), None, Sampler(hot, [], 4), Sampler(replace(hot, top_k=1), [], 5)]
    engine = Engine(model, Sampler(likely, [END]), slots=4, length=30)
    requests = [engine.add(index, prompt, sampler=sampler, likeliest=2 if index < 2 else None)
                for index, (prompt, sampler) in enumerate(zip(asked, samplers, strict=True))]  # fmt: skip
    with torch.inference_mode(), serving(model):
        assert len([*engine.answers()]) == 4
    sampled, greedy, other, forced = (request.answer for request in requests)
    assert sampled == answers(model, asked[:1], hot, seed=3, ends=[])[0]
    assert other == answers(model, [asked[2]], hot, seed=4, ends=[])[0]
    assert greedy == alone(model, asked[1], 6)
    assert forced == alone(model, asked[3], 5, ends=[-1])
    assert not requests[2].scores
    for request in requests[:2]:
        ids = torch.tensor([[*request.prompt, *request.answer]])
        with torch.inference_mode():
            logprobs = model(ids).logits[0, len(request.prompt) - 1 : -1].log_softmax(-1)
        for row, token, score in zip(logprobs, request.answer, request.scores, strict=True):
            assert score.logprob == pytest.approx(float(row[token]), abs=1e-3)
            assert [token for token, _ in score.likeliest] == row.topk(2).indices.tolist()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_of_several_adapters_the_active_one_is_added(targets: Any) -> None:
    model = adapted("qwen2", target_modules="all-linear")
    model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=8, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B.other" in name:
            parameter.data.normal_(0, 0.2)
    ids = torch.tensor([[5, 77, 900, 31, 8]])

    def outputs() -> list[Tensor]:
        told = []
        for name in ("default", "other", "default"):
            model.set_adapter(name, inference_mode=True)
            told.append(model(input_ids=ids).logits)
        with model.disable_adapter():
            return [*told, model(input_ids=ids).logits]

    with torch.inference_mode():
        expected = outputs()
        with decoded_linears(model.eval(), torch.float32):
            actual = outputs()
    assert all(distance(*pair) < 1e-5 for pair in zip(actual, expected, strict=True))
    assert distance(expected[0], expected[1]) > 1e-3
