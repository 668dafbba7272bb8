"""The notebook in `examples/` runs from top to bottom, and says what it does."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import qlora

ROOT = Path(__file__).parent.parent
NOTEBOOK = json.loads((ROOT / "examples" / "first_run.ipynb").read_text(encoding="utf-8"))
SHORT = ("trainer.max_steps=2", "trainer.lr_scheduler_kwargs.num_decay_steps=1", "trainer.warmup_steps=0")
LESS = ("data.max_train_samples=16", "data.max_eval_samples=4", "lora.r=2", "generation.max_new_tokens=4")


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Runs the code of a cell as a notebook does, and returns the value of its last line."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if isinstance(last, ast.Expr) else None


def test_the_notebook_runs_and_its_last_cells_hold_what_they_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train = qlora.train
    monkeypatch.setattr(qlora, "train", lambda *overrides: train(*_without(overrides), *SHORT, *LESS))
    names: dict[str, Any] = {}
    values = [run_cell("".join(cell["source"]), names) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert values[-1] is True  # the finished run is returned again
    page, adapter = values[-2]
    assert page.is_file()
    assert (adapter / "adapter_config.json").is_file()
    assert all(isinstance(answer, str) for answer in values[-4:-2])


def _without(overrides: tuple[str, ...]) -> list[str]:
    shorter = {text.partition("=")[0] for text in (*SHORT, *LESS)}
    return [text for text in overrides if text.partition("=")[0] not in shorter]
