"""A tokenizer whose ids are known without it: <pad> 0, <s> 1, </s> 2, and byte b is 3 + b."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from qlora.schema import DataConfig


def build_byte_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    core = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    core.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", model_max_length=32, **special)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_byte_tokenizer(bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def tokenizer_without_bos() -> PreTrainedTokenizerFast:
    return build_byte_tokenizer(eos_token="</s>")


@pytest.fixture(scope="session")
def tokenizer_without_eos() -> PreTrainedTokenizerFast:
    return build_byte_tokenizer(bos_token="<s>")


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., DataConfig]:
    """Writes rows to a file and returns a config for it."""

    def make(rows: list[dict[str, Any]], **changes: Any) -> DataConfig:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {"name": "toy", "path": str(path), "eval_dataset_size": 1}
        return DataConfig(**(values | changes))

    return make
