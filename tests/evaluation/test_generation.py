"""Generation: batches change nothing, every option reaches transformers, and a model's own defaults stay out."""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers import GenerationConfig as HFGenerationConfig

from qlora.config.compose import compose
from qlora.config.foreign_names import ORIGINAL_FLAGS
from qlora.config.schema import GenerationConfig
from qlora.demo.instructions import eval_rows
from qlora.errors import UserError
from qlora.evaluation.generation import (
    Answer,
    AnswerReader,
    build_settings,
    end_token_ids,
    generate,
    left_pad,
    own_settings_aside,
    plan_batches,
    prompt_lengths,
    spelled_ends,
)
from qlora.models.model_files import locate
from qlora.models.tokenizer import load_tokenizer, pad_token_id

CPU = torch.device("cpu")
SHARED = Path(__file__).parents[3] / "shared" / "data"
PROMPTS = [[1, 5, 9], [1, 7], [1, *range(20, 32)], [1, 40, 41, 42, 43], [1, 3]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(compose([]).model)


@pytest.fixture
def model() -> LlamaForCausalLM:
    """A Llama whose random weights are wide enough to say different things to different prompts."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=1600,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def settings(**fields: object) -> GenerationConfig:
    return GenerationConfig(**({"max_new_tokens": 8} | fields))  # type: ignore[arg-type]


def answers(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]] = PROMPTS, **fields: object
) -> list[Answer]:
    return generate(settings(**fields), model, tokenizer, prompts=prompts, pad_token_id=0, device=CPU)


def greedy(model: LlamaForCausalLM, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding by hand: no cache, no padding, no transformers."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_batches_answer_as_each_prompt_alone_and_in_the_order_given(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    alone = [answers(model, tokenizer, [prompt])[0] for prompt in PROMPTS]
    assert len({answer.text for answer in alone}) == len(PROMPTS)
    for size in (2, 3, 5):
        assert answers(model, tokenizer, PROMPTS[:size]) == alone[:size]


@pytest.mark.full
@pytest.mark.parametrize("name", ["tiny", "stories260K", "TinyStories-656K"])
def test_a_trained_model_answers_a_batch_of_real_prompts_as_each_alone(name: str) -> None:
    folder = locate(name) if name == "tiny" else SHARED / "models" / name
    if not Path(folder).is_dir():
        pytest.skip("no shared/data beside the checkout")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if name == "tiny":
        texts = [f"{row['instruction']} {row['input']}\nAnswer: " for row in list(eval_rows())[:12]]
    else:
        stories = (SHARED / "tinystories.jsonl").read_text(encoding="utf-8").splitlines()[:12]
        texts = [json.loads(line)["text"][: 10 + 17 * number] for number, line in enumerate(stories)]
    prompts = [[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
    assert len({len(prompt) for prompt in prompts}) > 3
    config, pad = settings(max_new_tokens=24), pad_token_id(tokenizer)
    together = generate(config, model, tokenizer, prompts=prompts, pad_token_id=pad, device=CPU)
    ends = end_token_ids(model, tokenizer)
    for prompt, answer in zip(prompts, together, strict=True):
        [alone] = generate(config, model, tokenizer, prompts=[prompt], pad_token_id=pad, device=CPU)
        by_hand = greedy(model, prompt, 24)
        length = next((index for index, token in enumerate(by_hand) if token in ends), 24)
        assert answer == alone
        assert (answer.tokens, answer.finish) == (length, "length" if length == 24 else "stop")
        assert answer.text == tokenizer.decode(by_hand[:length], skip_special_tokens=True).strip()


def test_the_default_search_takes_the_likeliest_token(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    expected = [tokenizer.decode(greedy(model, prompt, 8), skip_special_tokens=True).strip() for prompt in PROMPTS]
    assert [answer.text for answer in answers(model, tokenizer)] == expected


def test_padding_stands_on_the_left_and_is_masked() -> None:
    inputs = left_pad([[5, 6, 7], [8]], 0, CPU)
    assert inputs["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    batch = left_pad([[1, 2], [3], []], 0, CPU)
    assert batch["input_ids"].tolist() == [[1, 2], [0, 3], [0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1], [0, 0]]


def test_left_padding_of_equal_lengths_changes_nothing() -> None:
    assert left_pad([[1, 2], [3, 4]], 0, CPU)["input_ids"].tolist() == [[1, 2], [3, 4]]


def test_an_answer_stops_at_any_of_several_end_tokens(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    first, second = greedy(model, PROMPTS[0], 8), greedy(model, PROMPTS[1], 8)
    model.generation_config.eos_token_id = [first[2], second[4]]
    assert end_token_ids(model, tokenizer) == sorted({2, first[2], second[4]})
    ends = end_token_ids(model, tokenizer)
    for answer, tokens in zip(answers(model, tokenizer, PROMPTS[:2]), (first, second), strict=True):
        length = next(index for index, token in enumerate(tokens) if token in ends)
        assert answer == Answer(tokenizer.decode(tokens[:length], skip_special_tokens=True).strip(), length, "stop")


def test_an_answer_that_never_ends_is_cut_and_says_so(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert {(answer.tokens, answer.finish) for answer in answers(model, tokenizer, max_new_tokens=5)} == {(5, "length")}


def test_a_short_answer_is_not_lengthened_by_the_padding_of_its_batch(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    model.generation_config.eos_token_id = greedy(model, PROMPTS[0], 1)[0]
    actual = answers(model, tokenizer)
    assert actual[0] == Answer("", 0, "stop")
    assert {answer.finish for answer in actual[1:]} == {"length"}


def test_the_end_waits_for_min_new_tokens(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    model.generation_config.eos_token_id = greedy(model, PROMPTS[0], 1)[0]
    assert answers(model, tokenizer, PROMPTS[:1], min_new_tokens=4)[0].tokens >= 4


OWN_DEFAULTS = {
    "do_sample": True, "temperature": 9.0, "top_k": 3, "top_p": 0.2, "repetition_penalty": 5.0, "num_beams": 3,
    "no_repeat_ngram_size": 1, "min_new_tokens": 6, "max_length": 4, "penalty_alpha": 0.6, "min_p": 0.5,
    "num_return_sequences": 1, "suppress_tokens": list(range(700)), "max_new_tokens": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_DEFAULTS)
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
def test_a_models_own_defaults_do_not_leak(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str, adapted: bool
) -> None:
    expected = answers(model, tokenizer, PROMPTS[:2])
    setattr(model.generation_config, name, OWN_DEFAULTS[name])
    of_model = model.generation_config
    tested = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM")).eval() if adapted else model
    assert answers(tested, tokenizer, PROMPTS[:2]) == expected
    assert model.generation_config is of_model
    assert tested.generation_config is of_model


def test_a_models_own_defaults_come_back_after_a_failure(model: LlamaForCausalLM) -> None:
    of_model = model.generation_config
    with pytest.raises(KeyboardInterrupt), own_settings_aside(model):
        raise KeyboardInterrupt
    assert model.generation_config is of_model


# A value apart from the default for every option, and what the search needs beside it to read the option at all.
CHANGED: dict[str, tuple[object, dict[str, object]]] = {
    "max_new_tokens": (5, {}),
    "min_new_tokens": (3, {}),
    "do_sample": (True, {}),
    "num_beams": (4, {}),
    "num_beam_groups": (2, {"num_beams": 4}),
    "penalty_alpha": (0.6, {}),
    "use_cache": (False, {}),
    "temperature": (0.7, {"do_sample": True}),
    "top_k": (7, {"do_sample": True}),
    "top_p": (0.9, {"do_sample": True}),
    "typical_p": (0.8, {"do_sample": True}),
    "diversity_penalty": (0.5, {"num_beams": 4, "num_beam_groups": 2}),
    "repetition_penalty": (1.3, {}),
    "length_penalty": (2.0, {"num_beams": 4}),
    "no_repeat_ngram_size": (2, {}),
}


def test_every_option_is_tested_below() -> None:
    ours = {field.name for field in dataclasses.fields(GenerationConfig)}
    assert ours == {*CHANGED, "batch_size", "loop", "weights"}
    assert {flag for flag, key in ORIGINAL_FLAGS.items() if key.startswith("generation.")} == {*CHANGED}


UNREAD = {
    "temperature": ("0.7", "when sampling", "do_sample=true"),
    "top_k": ("5", "when sampling", "do_sample=true"),
    "top_p": ("0.9", "when sampling", "do_sample=true"),
    "typical_p": ("0.5", "when sampling", "do_sample=true"),
    "length_penalty": ("2.0", "by beam search", "num_beams=4"),
    "diversity_penalty": ("0.5", "by groups of beams", "num_beam_groups=2"),
}


@pytest.mark.matrix(3)
@pytest.mark.parametrize("name", UNREAD)
def test_an_option_that_the_search_does_not_read_is_refused_with_the_way_out(name: str) -> None:
    value, reader, remedy = UNREAD[name]
    beams = [] if name == "length_penalty" else ["generation.num_beams=4"]
    with pytest.raises(UserError) as error:
        compose([f"generation.{name}={value}", *beams])
    said = f"generation.{name}={float(value):g} is read {reader} only; set generation.{remedy} too, or leave it out"
    assert str(error.value).startswith(said)
    needed = [f"generation.{key}={value}" for key, value in CHANGED[name][1].items()]
    compose([f"generation.{name}={value}", *needed, "model.trust_remote_code=true"])


def test_contrastive_search_reads_top_k_and_no_other_option_of_sampling() -> None:
    contrastive = ["generation.penalty_alpha=0.6", "model.trust_remote_code=true"]
    compose([*contrastive, "generation.top_k=4"])
    with pytest.raises(UserError, match=r"generation\.top_p=0\.9 is read when sampling only"):
        compose([*contrastive, "generation.top_p=0.9"])


@pytest.mark.parametrize("name", CHANGED)
def test_an_option_reaches_transformers(name: str) -> None:
    value, needed = CHANGED[name]
    built = build_settings(settings(**(needed | {name: value})), pad_token_id=0, end_ids=[2, 3])
    assert isinstance(built, HFGenerationConfig)
    assert getattr(built, name) == value
    assert (built.pad_token_id, built.eos_token_id) == (0, [2, 3])


@pytest.mark.parametrize("fields", [{"repetition_penalty": 50.0}, {"no_repeat_ngram_size": 1}])
def test_a_repetition_is_avoided_when_asked(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, fields: dict[str, object]
) -> None:
    built = build_settings(settings(max_new_tokens=24, **fields), pad_token_id=0, end_ids=[2])
    ids = model.generate(input_ids=torch.tensor([PROMPTS[0]]), generation_config=built)[0].tolist()
    assert len(set(ids)) == len(ids)


def test_without_a_cache_the_answers_are_the_same(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    assert answers(model, tokenizer, use_cache=False) == answers(model, tokenizer)


def test_sampling_follows_the_seed(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    def draw(seed: int) -> list[Answer]:
        torch.manual_seed(seed)
        return answers(model, tokenizer, do_sample=True)

    assert draw(1) == draw(1) != draw(2)


def test_sampling_among_one_token_is_greedy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    assert answers(model, tokenizer, do_sample=True, top_k=1) == answers(model, tokenizer)


def test_beams_find_a_likelier_answer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    def likelihood(**fields: object) -> float:
        built = build_settings(settings(**fields), pad_token_id=0, end_ids=[])
        total = 0.0
        for prompt in PROMPTS:
            with own_settings_aside(model):
                ids = model.generate(input_ids=torch.tensor([prompt]), generation_config=built)
            with torch.no_grad():
                scores = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            total += float(scores.gather(1, ids[0, len(prompt) :, None]).sum())
        return total

    assert likelihood(num_beams=4) > likelihood()
    assert len(answers(model, tokenizer, num_beams=3)) == len(PROMPTS)


@pytest.mark.parametrize("name", ["greedy", "nucleus"])
def test_the_shipped_settings_raise_no_warning(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = compose([f"generation={name}", "generation.max_new_tokens=4"]).generation
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            generate(config, model, tokenizer, prompts=PROMPTS, pad_token_id=0, device=CPU)
    finally:
        library.removeHandler(caplog.handler)
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_batches_are_the_rows_by_falling_length() -> None:
    rows = Dataset.from_list([{"prompt_ids": prompt, "other": "x"} for prompt in PROMPTS])
    assert prompt_lengths(rows).tolist() == [3, 2, 13, 5, 2]
    assert prompt_lengths(rows.select([3, 0])).tolist() == [5, 3]
    batches = plan_batches(prompt_lengths(rows), 2)
    assert [batch.tolist() for batch in batches] == [[2, 3], [0, 1], [4]]
    assert plan_batches(np.empty(0, int), 2) == []


@pytest.mark.parametrize("ends", [True, False])
def test_no_answer_holds_the_text_of_its_end_token(tokenizer: PreTrainedTokenizerBase, ends: bool) -> None:
    spelled = tokenizer("is it brave</s> or not", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    end = tokenizer.eos_token_id
    assert end not in spelled, "ordinary tokens spell it"
    answer = AnswerReader(tokenizer, [end])([*spelled, *[end] * ends])
    assert (answer.text, answer.finish) == ("is it brave", "stop")


def test_an_ordinary_token_that_ends_answers_may_stand_in_one(tokenizer: PreTrainedTokenizerBase) -> None:
    word = tokenizer("brave", add_special_tokens=False)["input_ids"][0]
    assert spelled_ends([word, tokenizer.eos_token_id], tokenizer) == ["</s>"]
