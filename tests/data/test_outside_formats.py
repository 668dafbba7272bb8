"""A data format and a chat template that come from outside of the package: named in a config, or installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from qlora.config.registries import installed
from qlora.config.schema import DataConfig
from qlora.data.pipeline import build_data
from qlora.errors import ConfigError, DataError

MODULE = '''
def render(row):
    """A move is the answer to the moves before it."""
    return {"input": f"{row['moves']} ->", "output": row["best"]}

TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token + '\\\\n' }}{% endfor %}"
NUMBER = 5
'''
POINTS = """
[qlora.formats]
chess = chess_rows:render

[qlora.chat_templates]
chess-talk = chess_rows:TEMPLATE
chess-number = chess_rows:NUMBER
"""
ROWS = [{"moves": "e4", "best": "e5"}, {"moves": "d4", "best": "d5"}]
CHATS = [{"messages": [{"role": "user", "content": "e4?"}, {"role": "assistant", "content": "e5"}]}] * 2


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed package that registers a format and a template."""
    folder = tmp_path / "site"
    about = folder / "chess_rows-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: chess-rows\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(POINTS)
    (folder / "chess_rows.py").write_text(MODULE)
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    installed._read.cache_clear()
    yield
    installed._read.cache_clear()


def answers(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> set[str]:
    """Returns the texts that the loss counts."""
    train = build_data(config, tokenizer).train
    assert train is not None
    return {tokenizer.decode([label for label in row["labels"] if label > 2]) for row in train}


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("name", ["chess_rows:render", "chess"])
def test_a_format_is_a_function_by_its_path_or_by_the_name_that_a_package_gives_it(
    name: str, tokenizer: PreTrainedTokenizerFast, make_config: Callable[..., DataConfig]
) -> None:
    assert answers(make_config(ROWS, format=name), tokenizer) <= {"e5", "d5"}


@pytest.mark.usefixtures("package")
def test_a_template_is_the_text_that_a_package_gives_a_name(
    tokenizer: PreTrainedTokenizerFast, make_config: Callable[..., DataConfig]
) -> None:
    config = make_config(CHATS, template="chess-talk", source_max_len=None, target_max_len=None)
    assert answers(config, tokenizer) == {"e5"}
    assert build_data(config, tokenizer).template.name == "chess-talk"


@pytest.mark.usefixtures("package")
def test_a_template_that_is_no_text_is_refused_with_its_place(
    tokenizer: PreTrainedTokenizerFast, make_config: Callable[..., DataConfig]
) -> None:
    with pytest.raises(DataError, match=r"^data.template=chess-number: chess_rows:NUMBER is of type int; it must be"):
        build_data(make_config(CHATS, template="chess-number"), tokenizer)


@pytest.mark.usefixtures("package")
def test_a_misspelled_name_is_refused_with_the_installed_ones() -> None:
    values: dict[str, Any] = {"name": "toy", "path": "toy.json"}
    with pytest.raises(ConfigError, match=r"format='ches' is unknown \(did you mean chess\?\).*, chess, or module"):
        DataConfig(**values, format="ches")
    with pytest.raises(ConfigError, match=r"data.template='chess-tak' is unknown \(did you mean chess-talk\?\)"):
        DataConfig(**values, template="chess-tak")


def test_a_name_of_no_package_is_unknown() -> None:
    with pytest.raises(ConfigError, match=r"data\.format='chess' is unknown"):
        DataConfig(name="toy", path="toy.json", format="chess")
