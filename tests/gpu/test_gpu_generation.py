"""Answers on a GPU: kernels equal to their twins, captured steps equal to the model's own, whatever is switched."""

from __future__ import annotations

import contextlib
import gc
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from qlora.adapters import adapter_off
from qlora.config.compose import compose
from qlora.config.schema import GenerationConfig
from qlora.evaluation.measure import evaluation_mode
from qlora.generation import slot_model
from qlora.generation.answering import Slots, answer_batches
from qlora.generation.elementwise import GATES, NORM_KINDS, normalise_plainly, rotate_plainly
from qlora.generation.engine import Engine
from qlora.generation.sampling import Sampler
from qlora.generation.slot_model import SlotModel
from qlora.generation.slots import Kind, Pass, attend_plainly
from qlora.run import Run
from qlora.step.kernels.attention import attend_plain
from tests.generation.test_slots import KINDS, prompts, randomised
from tests.models.bases import build

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

GPU = torch.device("cuda", 0)
DENSE = ["llama", "qwen2", "gemma2"]
KINDS_OF_EXPERTS = {"qwen3_moe", "gpt_oss", "olmoe"}
BF16 = 0.05
"""How far logits in bf16 may be from others that round elsewhere, of their norm."""
NARROW = [
    *("model=llama-7b", "model.weights=random", "model.tokenizer=tiny", "data=demo", "recipe=none", "lora.r=8"),
    *("lora.dropout=0", "model.architecture.num_hidden_layers=2", "model.architecture.hidden_size=512"),
    *("model.architecture.intermediate_size=1024", "model.architecture.num_attention_heads=8"),
    *("model.architecture.num_key_value_heads=4", "model.architecture.vocab_size=2048"),
]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What qlora warned of, and not transformers of the toy models' settings."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("qlora")]


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize(
    ("dtype", "heads", "shared", "width", "splits", "options"),
    [
        (torch.bfloat16, 4, 4, 128, 1, {}),
        (torch.bfloat16, 8, 2, 64, 8, {"window": 70}),
        (torch.bfloat16, 6, 2, 80, 8, {"sinks": True, "softcap": 3.0}),
        (torch.bfloat16, 32, 1, 256, None, {}),
        (torch.float32, 4, 2, 64, 1, {"sinks": True, "window": 5}),
    ],
)  # a few, for each is compiled
def test_attention_over_slots_computes_as_its_twin(
    dtype: torch.dtype, heads: int, shared: int, width: int, splits: int | None, options: dict[str, Any]
) -> None:
    from qlora.generation.kernels.attention import attend_decoding
    from qlora.generation.kernels.prompts import attend_rows

    torch.manual_seed(0)
    positions = torch.tensor([0, 1, 63, 64, 130, 699], device=GPU)
    rows, scale = len(positions), width**-0.5
    keys, values = (torch.randn(rows + 1, shared, 700, width, device=GPU).to(dtype) for _ in range(2))
    joint = torch.randn(rows, 1, heads + 2 * shared, width, device=GPU).to(dtype)
    query, key, value = (part.transpose(1, 2) for part in joint.split([heads, shared, shared], dim=2))
    written, written_values = keys.clone(), values.clone()
    index = torch.arange(rows, device=GPU)
    written[index, :, positions], written_values[index, :, positions] = key[:, :, 0], value[:, :, 0]
    chosen = options | {"sinks": torch.randn(heads, device=GPU) if options.get("sinks") else None}
    step = Pass(index, positions, max_length=700)
    kind = Kind(scale, chosen.get("window"), chosen.get("softcap"), chosen["sinks"])
    expected = attend_plainly(query.float(), written[:rows].float(), written_values[:rows].float(), step, kind)
    bound = 1e-5 if dtype is torch.float32 else 0.01
    actual = attend_decoding(query, (key, value), keys, values, positions, scale, splits=splits, **chosen)
    assert torch.equal(keys, written)
    assert torch.equal(values, written_values)
    assert distance(actual, expected) < bound
    cu_seqlens = torch.tensor([0, 1, 131, 136, 200], dtype=torch.int32, device=GPU)
    q, k, v = torch.randn(200, heads + 2 * shared, width, device=GPU).to(dtype).split([heads, shared, shared], dim=1)
    actual = attend_rows(q, k, v, cu_seqlens, 130, scale, **chosen)
    expected = attend_plain(q.float(), k.float(), v.float(), cu_seqlens, scale, **chosen)
    assert distance(actual, expected) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_positions_and_gates_round_as_their_twins(dtype: torch.dtype) -> None:
    from qlora.generation.kernels import elementwise

    torch.manual_seed(0)
    for width, rows in ((4096, 5), (128, 96), (80, 3)):
        joint = torch.randn(rows, 1, 7, width, device=GPU).to(dtype)
        weight = torch.randn(width, device=GPU).to(dtype)
        for kind in NORM_KINDS:
            for x in (joint[:, :, 2:6], joint[:, :, 0]):
                actual = elementwise.normalise(x, weight, 1e-5, **kind)
                assert distance(actual, normalise_plainly(x, weight, 1e-5, **kind)) < 1e-3
        q, k = (part.transpose(1, 2) for part in joint.split([5, 2], dim=2))
        angles = [torch.randn(rows, 1, width, device=GPU).to(dtype) for _ in range(2)]
        for actual, expected in zip(elementwise.rotate(q, k, *angles), rotate_plainly(q, k, *angles), strict=True):
            assert distance(actual, expected) < 1e-6
    gate, up = torch.randn(3, 2 * 11008, device=GPU).to(dtype).split(11008, dim=-1)
    for name, plain in GATES.items():
        assert distance(elementwise.multiply_gate(gate, up, gelu=name == "gelu"), plain(gate) * up) < 1e-3


def slots_of(dtype: torch.dtype, **options: Any) -> Slots:
    def autocast() -> Any:
        return contextlib.nullcontext() if dtype is torch.float32 else torch.autocast("cuda", dtype)

    return Slots(GenerationConfig(**options), GPU, dtype, autocast)


def answers(slots: Slots, model: Any, asked: list[list[int]], ends: list[int], *, seed: int = 0) -> list[list[int]]:
    batches = [(0, list(range(len(asked))), asked)]
    length = 20 + slots.config.new_tokens
    ((_, given, _),) = answer_batches(slots, model, batches, end_ids=ends, seed=seed, length=length)
    return given


def alone(model: Any, prompt: list[int], tokens: int, ends: list[int]) -> list[int]:
    ids = torch.tensor([prompt], device=GPU)
    with torch.inference_mode():
        chosen = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
            eos_token_id=ends, pad_token_id=0,
        )  # fmt: skip
    return chosen[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", DENSE)
def test_greedy_answers_in_float32_are_those_of_each_row_alone(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = randomised(build(kind, **KINDS[kind])).to(GPU).eval()
    slots, ends = slots_of(torch.float32, max_new_tokens=12, batch_size=5), list(range(2, 200))
    asked = prompts(24)
    with caplog.at_level(logging.WARNING):
        assert slots.unsupported_reason(model) is None  # loop=auto
        given = answers(slots, model, asked, ends)
    assert given == [alone(model, prompt, 12, ends) for prompt in asked]
    assert len({len(answer) for answer in given}) > 2
    assert not said(caplog)  # so that all steps were captured


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3_moe", "gpt_oss", "olmoe"])
def test_logits_in_bf16_are_the_models_own_but_for_rounding(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = randomised(build(kind, **KINDS[kind])).to(GPU, torch.bfloat16).eval()
    slots = slots_of(torch.bfloat16)
    rows = [[5, 900, 31, 8, 1200, 6, 7], [77, 4, 3]]
    read = SlotModel(model, slots=3, length=12)
    with caplog.at_level(logging.WARNING), slots.serving(model), torch.inference_mode(), slots.autocast():
        logits = [read.read([row[:-2] for row in rows])]
        for back in (2, 1):
            last = torch.tensor([row[-back] for row in rows], device=GPU)
            logits.append(read.decode(last, [len(row) - back for row in rows]).clone())
    with torch.inference_mode(), slots.autocast():
        expected = [
            torch.cat([model(torch.tensor([row[: len(row) - back]], device=GPU)).logits[:, -1] for row in rows])
            for back in (2, 1, 0)
        ]
    pairs = zip(torch.cat(logits), torch.cat(expected), strict=True)
    apart = sorted(distance(*pair) for pair in pairs)
    # Rounding may send a token to another expert, and then its logits are others.
    assert apart[len(apart) // 2 if KINDS_OF_EXPERTS & {kind} else -1] < BF16
    assert not said(caplog)


@pytest.mark.parametrize("sampled", [False, True])
def test_answers_follow_from_the_row_alone_whatever_is_beside_it(sampled: bool) -> None:
    model = randomised(build("llama")).to(GPU).eval()
    options: dict[str, Any] = {"do_sample": True, "temperature": 3.0, "top_k": 20, "top_p": 0.9} if sampled else {}
    asked = prompts(10)
    given = [
        answers(
            slots_of(torch.float32, max_new_tokens=8, min_new_tokens=3, batch_size=size, **options), model, asked, [2]
        )
        for size in (1, 3, 10)
    ]
    assert given[0] == given[1] == given[2]
    assert all(len(answer) >= 3 for answer in given[0])


def test_adapters_are_switched_between_steps_and_off() -> None:
    base = randomised(build("qwen2")).to(GPU)
    config = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "lora_alpha": 8}
    model = get_peft_model(base, LoraConfig(r=4, **config)).eval()
    model.add_adapter("other", LoraConfig(r=3, **config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.to(GPU)
    slots, asked = slots_of(torch.float32, max_new_tokens=8, batch_size=4), prompts(4)
    chosen = ["default", "other", None, "default"]

    def switched(name: str | None) -> Any:
        if name is None:
            return adapter_off(model)
        model.set_adapter(name, inference_mode=True)
        return contextlib.nullcontext()

    with slots.serving(model), torch.inference_mode():
        engine = Engine(model, Sampler(slots.config, [2]), slots=4, length=30)
        given = []
        for name in chosen:
            requests = [engine.add(index, prompt) for index, prompt in enumerate(asked)]
            with switched(name):
                assert len([*engine.answers()]) == 4
            given.append([request.answer for request in requests])
    expected = []
    for name in chosen:
        with switched(name):
            expected.append([alone(model, prompt, 8, [2]) for prompt in asked])
    assert given == expected
    assert expected[0] != expected[1] != expected[2]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A base in 4 bits with an adapter none of whose matrices is zero, and its placement."""
    session = Run(compose(NARROW), tmp_path_factory.mktemp("run")).session
    model = session.add_adapter(session.load_base())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model, session.placement


@pytest.mark.parametrize("weights", ["4bit", "16bit"])
def test_a_base_in_4_bits_computes_with_its_adapter_as_peft_does(packed: tuple[Any, Any], weights: str) -> None:
    model, placement = packed
    config = compose([f"generation.weights={weights}"]).generation
    slots = Slots(config, GPU, placement.compute_dtype, placement.autocast)
    rows = [[5, 900, 31, 8, 1200, 6, 7], [77, 4, 3], [8, 9]]
    with evaluation_mode(model):
        assert slots.unsupported_reason(model) is None
        with slots.serving(model), torch.inference_mode(), placement.autocast():
            read = SlotModel(model, slots=3, length=12)
            logits = [read.read([row[:-1] for row in rows])]
            last = torch.tensor([row[-1] for row in rows], device=GPU)
            logits.append(read.decode(last, [len(row) - 1 for row in rows]).clone())
        with torch.inference_mode(), placement.autocast():
            expected = [
                torch.cat([model(torch.tensor([row[: len(row) - back]], device=GPU)).logits[:, -1] for row in rows])
                for back in (1, 0)
            ]
            with adapter_off(model):
                bare = model(torch.tensor([rows[0]], device=GPU)).logits[:, -1]
    assert max(distance(*pair) for pair in zip(logits, expected, strict=True)) < BF16
    assert distance(bare, expected[1][:1]) > 2 * BF16
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_what_serving_has_built_is_freed_with_it(packed: tuple[Any, Any]) -> None:
    model, placement = packed
    slots = Slots(GenerationConfig(max_new_tokens=6, batch_size=4), GPU, placement.compute_dtype, placement.autocast)
    with evaluation_mode(model):
        held = []
        for _ in range(3):
            answers(slots, model, prompts(6), [2])
            gc.collect()
            torch.cuda.empty_cache()
            held.append(torch.cuda.memory_allocated())
    assert held[1] == held[2]
    assert not slot_model._graphs


def test_a_step_that_asks_the_host_runs_without_a_graph_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = randomised(build("llama")).to(GPU).eval()
    slots, asked = slots_of(torch.float32, max_new_tokens=6, batch_size=3), prompts(5)
    expected = answers(slots, model, asked, [2])
    original = type(model).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(model, *args, **kwargs)
        assert float(output.logits.sum()) != torch.inf
        return output

    model.forward = forward
    with caplog.at_level(logging.WARNING):
        assert answers(slots, model, asked, [2]) == expected
    (record,) = caplog.records
    assert record.message.startswith("decode steps run without a CUDA graph, which is slower: ")


def test_a_run_answers_by_slots(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    few = ["trainer.max_steps=2", "data.max_eval_samples=16", "generation.max_new_tokens=5", "trainer.eval_steps=null"]
    with caplog.at_level(logging.INFO):
        Run(compose([*NARROW, *few]), tmp_path / "run").execute()
    assert (tmp_path / "run" / "predictions.jsonl").exists()
    assert not [record for record in caplog.records if "transformers' own loop" in record.message]
