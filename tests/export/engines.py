"""llama.cpp in the test's process, and what transformers computes beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from qlora.config.schema import GgufType
from qlora.export.model_file import ModelFile, end_ids_of
from qlora.models.weight_files import Checkpoint, ModelNames

REAL = Path(__file__).parents[3] / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the folder of real models and tokenizers is not here")


def model_file(folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> ModelFile:
    config = AutoConfig.from_pretrained(folder)
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder)
    ends = end_ids_of(tokenizer, config.eos_token_id)
    return ModelFile(Checkpoint(folder), ModelNames(config), config, tokenizer, ends, folder.name)


def write(folder: Path, path: Path, kind: str = "f16", tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    model_file(folder, tokenizer).write(path, GgufType(kind), lambda count: None)
    return path


@contextlib.contextmanager
def llama_cpp(
    path: Path, tokenizer: PreTrainedTokenizerBase, vocabulary: int, lora: Path | None = None
) -> Iterator[Any]:
    pytest.importorskip("xllamacpp")
    from qlora.verify.llama_cpp_engine import LlamaCppEngine

    engine = LlamaCppEngine(path, tokenizer, lora=lora, top=20, vocabulary=vocabulary, context=512)
    try:
        yield engine
    finally:
        engine.close()


@torch.no_grad()
def divergence(model: torch.nn.Module, engine: Any, prompts: Sequence[Sequence[int]]) -> float:
    """Returns the mean KL divergence of the engine's next token from transformers', over all tokens."""
    total = 0.0
    for ids in prompts:
        expected = torch.log_softmax(model(input_ids=torch.tensor([list(ids)])).logits[0, -1].double(), -1)
        actual = torch.full_like(expected, -1e4)
        for token in engine.next_tokens(ids):
            actual[token.ids[0]] = token.logprob
        total += float((expected.exp() * (expected - actual)).sum())
    return total / len(prompts)


def raw_tokens(engine: Any, text: str) -> list[int]:
    asked = {"content": text, "add_special": True, "parse_special": True}
    return list(engine._post(f"{engine.root}/tokenize", asked)["tokens"])
