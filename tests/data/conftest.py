"""Tokenizers whose ids are known without them, and rows from files as the package loads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from qlora.config.schema import DataConfig
from qlora.data.cache import Cache
from qlora.data.ingest.sources import load_rows
from qlora.errors import UserError
from tests.data.byte_tokenizer import build_byte_tokenizer


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


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / ".cache")


@pytest.fixture
def load(cache: Cache) -> Callable[..., Dataset]:
    return lambda path, **arguments: load_rows(str(path), cache=cache, **arguments)


@pytest.fixture
def message(cache: Cache) -> Callable[..., str]:
    """Returns the sentence of the error, after which the cache must be as it was before."""

    def fail(path: Path | str, **arguments: Any) -> str:
        initial = sorted(cache.root.iterdir())
        with pytest.raises(UserError) as caught:
            load_rows(str(path), cache=cache, **arguments)
        assert sorted(cache.root.iterdir()) == initial
        return str(caught.value)

    return fail
