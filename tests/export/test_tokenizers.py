"""llama.cpp splits texts as the tokenizer of the training did, or the file is not written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qlora.config.compose import compose
from qlora.errors import DataError
from qlora.export.pre_tokenizers import KNOWN, find_pre_tokenizer
from qlora.export.vocabulary import read_vocabulary
from qlora.models.tokenizer import load_tokenizer
from tests.export.engines import REAL, llama_cpp, needs_real, raw_tokens, write

pytest.importorskip("gguf")

STRANGE = [
    "Hello world", " leading", "trailing  ", "two  blanks   three", "tabs\tand\nlines\n\n\nmore", "don't WE'LL I'M",
    "12345 3.14 2024-01-01", "a_b/c\\d",
    "naïve café Łódź", "日本語のテキスト", "🙂🙂 emoji", "if (x) {\n    return y;\n}\r\n",
    "'s 'tis x's", "\n", " ", "Ünïcödé straße", "…—–", "ｆｕｌｌ width", "привет, мир", "x=1;y=2", "¼ ½ ⅔ ²",
]  # fmt: skip


def texts(count: int = 60) -> list[str]:
    rows = [json.loads(line) for line in (REAL / "guanaco_text.jsonl").read_text().splitlines()[:count]]
    return [*STRANGE, *(row["text"][:400] for row in rows)]


def tiny(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, vocab_size=len(tokenizer),
        max_position_embeddings=512, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def changed(folder: Path, edit: Any) -> PreTrainedTokenizerFast:
    """Returns the tokenizer of a folder after a change of its tokenizer.json."""
    data = json.loads((folder / "tokenizer.json").read_text())
    edit(data)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), bos_token="<|endoftext|>",
                                   eos_token="<|endoftext|>")  # fmt: skip


def byte_level(name: str) -> PreTrainedTokenizerFast:
    """Returns GPT-2's merges behind a pre-tokenizer of another name."""
    known = KNOWN[name]

    def edit(data: dict[str, Any]) -> None:
        data["model"]["ignore_merges"] = known.ignores_merges
        last = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": known.pattern is None,
        }
        first = {"type": "Split", "pattern": {"Regex": known.pattern}, "behavior": "Isolated", "invert": False}
        digits = {"type": "Digits", "individual_digits": True}
        steps = [first] if known.pattern is not None else [digits] if known.splits_digits else []
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, last]} if steps else last

    return changed(REAL / "tokenizers" / "gpt2", edit)


@needs_real
@pytest.mark.matrix(3)
@pytest.mark.parametrize("name", KNOWN)
def test_every_known_pre_tokenizer_splits_in_llama_cpp_as_here(tmp_path: Path, name: str) -> None:
    tokenizer = byte_level(name)
    path = write(tiny(tmp_path / "model", tokenizer), tmp_path / "model.gguf", tokenizer=tokenizer)
    assert read_vocabulary(tokenizer, len(tokenizer), "x").pre == name
    with llama_cpp(path, tokenizer, 1) as engine:
        for text in texts():
            assert raw_tokens(engine, text) == tokenizer(text)["input_ids"], text


@needs_real
@pytest.mark.parametrize("folder", ["models/stories260K", "tokenizers/llama"])
def test_sentencepiece_by_scores_splits_in_llama_cpp_as_here(tmp_path: Path, folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(REAL / folder)
    vocabulary = read_vocabulary(tokenizer, len(tokenizer), "x")
    assert (vocabulary.model, vocabulary.adds_bos, vocabulary.space_prefix) == ("llama", True, True)
    path = write(tiny(tmp_path / "model", tokenizer), tmp_path / "model.gguf", tokenizer=tokenizer)
    with llama_cpp(path, tokenizer, 1) as engine:
        for text in texts():
            if not text.startswith(" "):  # before which transformers puts no space, and llama.cpp one more
                assert raw_tokens(engine, text) == tokenizer(text)["input_ids"], text


def without_prefix(data: dict[str, Any]) -> None:
    """Makes a tokenizer one like Gemma's, which puts no space before a text."""
    data["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    data["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }


def by_merges(data: dict[str, Any]) -> None:
    """Takes out merges, so that no scores give the order of the rest."""
    without_prefix(data)
    data["model"]["merges"] = [merge for index, merge in enumerate(data["model"]["merges"]) if index % 40 != 3]


@needs_real
@pytest.mark.parametrize(("edit", "model"), [(without_prefix, "llama"), (by_merges, "gemma4")])
def test_sentencepiece_without_a_prefix_splits_in_llama_cpp_as_here(tmp_path: Path, edit: Any, model: str) -> None:
    data = json.loads((REAL / "tokenizers" / "llama" / "tokenizer.json").read_text())
    edit(data)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), bos_token="<s>",
                                        eos_token="</s>", unk_token="<unk>")  # fmt: skip
    vocabulary = read_vocabulary(tokenizer, len(tokenizer), "x")
    assert (vocabulary.model, vocabulary.space_prefix, vocabulary.adds_bos) == (model, False, True)
    path = write(tiny(tmp_path / "model", tokenizer), tmp_path / "model.gguf", tokenizer=tokenizer)
    with llama_cpp(path, tokenizer, 1) as engine:
        for text in texts():
            assert raw_tokens(engine, text) == tokenizer(text)["input_ids"], text


def test_a_text_before_which_the_embedded_tokenizer_writes_a_space_is_written_by_the_template() -> None:
    segments = read_vocabulary(load_tokenizer(compose([]).model), 1600, "x").segments
    assert segments is not None
    assert segments.apply(" a\nb ") == " a\n b"
    assert segments.apply("  ") == ""


@needs_real
def test_a_pre_tokenizer_that_llama_cpp_does_not_know_is_refused() -> None:
    def edit(data: dict[str, Any]) -> None:
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": r"\d+|\D+"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}  # fmt: skip

    assert "llama.cpp knows no pre-tokenizer that splits texts as this tokenizer does" in refusal("gpt2", edit)


@needs_real
def test_what_a_gguf_file_cannot_say_of_a_tokenizer_is_refused() -> None:
    def lowercase(data: dict[str, Any]) -> None:
        data["normalizer"] = {"type": "Lowercase"}

    def strips(data: dict[str, Any]) -> None:
        data["added_tokens"][0]["rstrip"] = True

    assert "llama.cpp does not change texts before it splits them" in refusal("gpt2", lowercase)
    assert "has rstrip=true, which a GGUF file cannot say" in refusal("gpt2", strips)
    tokenizer = AutoTokenizer.from_pretrained(REAL / "models" / "TinyStories-656K")
    with pytest.raises(DataError, match="cannot merge in the order of this tokenizer, which no scores give"):
        read_vocabulary(tokenizer, 2048, "x")


def refusal(name: str, edit: Any) -> str:
    tokenizer = changed(REAL / "tokenizers" / name, edit)
    with pytest.raises(DataError) as error:
        read_vocabulary(tokenizer, len(tokenizer), "export.format=gguf")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_pre_tokenizer_is_known_by_all_that_it_does() -> None:
    last = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    assert find_pre_tokenizer(last, False) == "gpt-2"
    assert find_pre_tokenizer(last | {"add_prefix_space": True}, False) is None
    assert find_pre_tokenizer(last, True) is None
    assert find_pre_tokenizer(None, False) is None


def test_more_ends_than_a_file_can_name_are_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    from tests.export.engines import model_file

    tokenizer = load_tokenizer(compose([]).model)
    file = model_file(tiny(tmp_path / "model", tokenizer), tokenizer)
    with pytest.raises(DataError, match="4 tokens end an answer of this model, and a GGUF file can name 3"):
        replace(file, end_ids=[2, 3, 4, 5]).check()
