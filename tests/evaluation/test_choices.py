"""The likelihood of an answer is that of its tokens, one forward pass each, however prompts are batched and shared."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerBase,
)

from qlora.config.compose import compose
from qlora.evaluation import choices
from qlora.evaluation.choices import ChoiceEncoder, ChoiceReader, Prompt, build_groups, measure_choices
from qlora.models.model_files import EMBEDDED
from qlora.models.tokenizer import load_tokenizer

REAL = Path(__file__).parents[3] / "shared" / "data"
CPU = torch.device("cpu")
LETTERS = ("A", "B", "C", "D")
ANSWERS = ("red", "the red cheese", "the red", "count to seven and stop")
TOKENIZERS = {
    "embedded": EMBEDDED["tiny"],
    **{name: REAL / "tokenizers" / name for name in ("llama", "gpt2", "pythia")},
    **{name: REAL / "models" / name for name in ("stories260K", "TinyStories-656K")},
}
SOLVED = "Which word is a colour?\nA. red\nB. dog\nC. cup\nD. ten\nAnswer: A\n\nWhich is an animal?\nAnswer:"


def real_tokenizer(name: str) -> PreTrainedTokenizerBase:
    if not TOKENIZERS[name].is_dir():
        pytest.skip("no shared/data beside the checkout")
    return AutoTokenizer.from_pretrained(TOKENIZERS[name])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(compose([]).model)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 1600, "initializer_range": 0.3, "max_position_embeddings": 512,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def prompts_that_begin_alike(tokenizer: PreTrainedTokenizerBase, answers: tuple[str, ...] = ANSWERS) -> list[Prompt]:
    """Twelve prompts with two long beginnings, and three without."""
    beginnings = [f"{word} " * 70 for word in ("red", "dog")]
    texts = [f"{beginnings[number % 2]}and {'then ' * number}what?\nAnswer:" for number in range(12)]
    return ChoiceEncoder(tokenizer, answers).encode([*texts, *("One word:", "Two words\n", "Say it: ")])


def measure(model: Any, prompts: list[Prompt], batch_size: int = 4) -> torch.Tensor:
    shape = (len(prompts), len(prompts[0].answers))
    return measure_choices(ChoiceReader(model, 0, CPU), build_groups(prompts), shape=shape, batch_size=batch_size)


def by_hand(model: Any, prompts: list[Prompt]) -> torch.Tensor:
    """One row and one answer at a time, every token, all logits."""
    table = []
    for ids, answers in prompts:
        line = []
        for answer in answers:
            tokens = torch.tensor([*ids.tolist(), *answer])
            with torch.no_grad():
                scores = model(input_ids=tokens[None]).logits[0].log_softmax(-1)
            line.append(sum(scores[len(ids) - 1 + index, token].item() for index, token in enumerate(answer)))
        table.append(line)
    return torch.tensor(table, dtype=torch.float64)


# Tokens


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompt_and_answer_are_tokenized_as_one_text(name: str) -> None:
    tokenizer = real_tokenizer(name)
    texts = [SOLVED, "Answer:", "### Response:\n", "Answer: ", "One line, and nothing else", "a\n\n\nAnswer:"]
    for prompt, text in zip(ChoiceEncoder(tokenizer, LETTERS).encode(texts), texts, strict=True):
        for letter, answer in zip(LETTERS, prompt.answers, strict=True):
            whole = text + letter if text[-1].isspace() else f"{text} {letter}"
            bos = [tokenizer.bos_token_id]
            assert [*prompt.ids.tolist(), *answer] == bos + tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert len({answer[0] for answer in prompt.answers}) > 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", [["▁A"], ["▁B"], ["▁C"], ["▁D"]]),
        ("gpt2", [["ĠA"], ["ĠB"], ["ĠC"], ["ĠD"]]),
        ("pythia", [["ĠA"], ["ĠB"], ["ĠC"], ["ĠD"]]),
        ("embedded", [["ĠA"], ["ĠB"], ["ĠC"], ["ĠD"]]),
        ("stories260K", [["▁", "A"], ["▁B"], ["▁", "C"], ["▁", "D"]]),
        ("TinyStories-656K", [["A"], ["B"], ["C"], ["D"]]),  # behind ":▁", one token, which all four share
    ],
)
def test_the_tokens_of_a_letter_are_those_of_each_tokenizer(name: str, expected: list[list[str]]) -> None:
    tokenizer = real_tokenizer(name)
    [prompt] = ChoiceEncoder(tokenizer, LETTERS).encode([SOLVED])
    assert [tokenizer.convert_ids_to_tokens(list(answer)) for answer in prompt.answers] == expected


def test_llama_s_letters_are_those_that_the_original_looked_up() -> None:
    tokenizer = real_tokenizer("llama")
    [prompt] = ChoiceEncoder(tokenizer, LETTERS).encode([SOLVED])
    original = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in LETTERS]
    assert prompt.answers == tuple((token,) for token in original)


class Merging:
    """A tokenizer whose tokens are characters, but for ": ", which is one."""

    bos_token_id = None

    def __call__(self, texts: list[str], **options: Any) -> dict[str, Any]:
        return {"input_ids": [[ord(letter) for letter in text.replace(": ", "¤")] for text in texts]}


def test_a_token_that_reaches_from_the_prompt_into_all_answers_belongs_to_the_prompt() -> None:
    [prompt] = ChoiceEncoder(Merging(), LETTERS).encode(["Q\nn:"])
    assert prompt.ids.tolist() == [ord(letter) for letter in "Q\nn¤"]
    assert prompt.answers == tuple((ord(letter),) for letter in LETTERS)


# Likelihoods


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_answers_of_many_tokens_have_the_sum_of_their_tokens_likelihoods(tokenizer: Any, batch_size: int) -> None:
    prompts, model = prompts_that_begin_alike(tokenizer), llama()
    assert {len(answer) for answer in prompts[0].answers} >= {1, 2, 3}
    torch.testing.assert_close(measure(model, prompts, batch_size), by_hand(model, prompts), atol=1e-4, rtol=1e-5)


def test_one_forward_pass_reads_all_letters_of_a_prompt(tokenizer: Any) -> None:
    prompts = ChoiceEncoder(tokenizer, LETTERS).encode([SOLVED, "Answer:"])
    assert [len(group.rows) for group in build_groups(prompts)] == [2]
    stories = ChoiceEncoder(real_tokenizer("stories260K"), LETTERS).encode([SOLVED])
    [group] = build_groups(stories)
    assert len(group.rows) == 1  # "▁" is read once for "▁A", "▁C" and "▁D", and "▁B" is looked up before it


def test_rows_with_a_common_prefix_are_grouped_and_no_token_that_reveals_an_answer_is_shared(tokenizer: Any) -> None:
    prompts = prompts_that_begin_alike(tokenizer)
    groups = build_groups(prompts)
    assert [group.shared >= choices.SHARED_TOKENS for group in groups] == [False, True, True]
    assert sorted({row.prompt for group in groups for row in group.rows}) == list(range(len(prompts)))
    for group in groups[1:]:
        assert len({row.ids[: group.shared].tobytes() for row in group.rows}) == 1
        assert all(index >= group.shared for row in group.rows for _, index, _ in row.targets)
        lengths = [len(row.ids) for row in group.rows]
        assert lengths == sorted(lengths, reverse=True)


def test_equal_prompts_share_all_but_the_last_token(tokenizer: Any) -> None:
    prompts = ChoiceEncoder(tokenizer, LETTERS).encode(["red " * 80 + "\nAnswer:"] * 5)
    [group] = build_groups(prompts)
    assert group.shared == len(prompts[0].ids) - 1
    model = llama()
    torch.testing.assert_close(measure(model, prompts), by_hand(model, prompts), atol=1e-4, rtol=1e-5)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=1600, initializer_range=0.3)).eval()


def mistral(window: int) -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**llama().config.to_diff_dict() | {
        "sliding_window": window, "model_type": "mistral", "architectures": None})).eval()  # fmt: skip


def mamba() -> MambaForCausalLM:
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=1600, state_size=4)).eval()


@pytest.mark.parametrize(
    ("build", "can_share"),
    [
        (gpt2, True),  # places are learned, and must continue after the beginning
        (lambda: mistral(4096), True),
        (lambda: mistral(16), False),  # it has forgotten the first tokens by then
        (mamba, False),
    ],
    ids=["gpt2", "mistral", "short window", "mamba"],
)
def test_every_kind_of_memory_gives_the_same_likelihoods(tokenizer: Any, build: Any, can_share: bool) -> None:
    prompts, model = prompts_that_begin_alike(tokenizer, LETTERS), build()
    with torch.inference_mode():
        assert (ChoiceReader(model, 0, CPU).remember(prompts[0].ids[:64]) is not None) == can_share
    torch.testing.assert_close(measure(model, prompts), by_hand(model, prompts), atol=1e-4, rtol=1e-5)


def test_a_model_that_cannot_leave_out_logits_or_remember_is_measured_all_the_same(tokenizer: Any) -> None:
    prompts, model = prompts_that_begin_alike(tokenizer), llama()

    class Plain(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, use_cache: bool = False) -> Any:
            return SimpleNamespace(logits=model(input_ids=input_ids, attention_mask=attention_mask).logits)

    assert not ChoiceReader(Plain(), 0, CPU).can_choose
    torch.testing.assert_close(measure(Plain(), prompts), measure(model, prompts), atol=1e-4, rtol=1e-5)


def test_only_the_logits_that_tell_an_answer_are_computed(tokenizer: Any) -> None:
    prompts, model = prompts_that_begin_alike(tokenizer, LETTERS), llama()
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:2]))
    measure(model, prompts, batch_size=3)
    assert all(positions <= rows for rows, positions in seen)


def test_a_shared_beginning_is_read_once_and_nothing_of_the_rows_is_kept(tokenizer: Any) -> None:
    prompts, model = prompts_that_begin_alike(tokenizer, LETTERS)[:12], llama()
    read = []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))
    measure(model, prompts)
    assert sum(read) < 0.4 * sum(len(prompt.ids) for prompt in prompts)
    with torch.inference_mode():
        reader = ChoiceReader(model, 0, CPU)
        cache = reader.remember(prompts[0].ids[:64])
        [row] = [row for group in build_groups(prompts[:1]) for row in group.rows]
        once, twice = (reader.read([row], 64, cache)[2] for _ in range(2))
    assert cache is not None
    assert cache.get_seq_length() == 64
    assert torch.equal(once, twice)
