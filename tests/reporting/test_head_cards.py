"""The model card of a head says what it is, what it is compared with, and how plain libraries load it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from qlora.config.compose import compose
from qlora.reporting.model_card import write_model_card

CARDS = {
    "classify": ("A classifier of texts: a LoRA adapter and a head", "most frequent class", "id2label[int("),
    "regress": ("A regression of texts: a LoRA adapter and a head", "| mean |", "logits[0].tolist()"),
    "embed": ("A model of embeddings: a LoRA adapter for", "untuned base", "SentenceTransformer("),
}


@pytest.mark.parametrize("head", CARDS)
def test_a_card_says_what_a_head_is_and_how_it_is_used(head: str, tmp_path: Path) -> None:
    config = compose(["data=local", "data.path=rows.jsonl", "evaluation=loss", f"head={head}"])
    folder = tmp_path / "adapter"
    folder.mkdir()
    result = {"metrics": {"eval_loss": 0.5, "base_eval_loss": 1.0}, "paths": {"adapter": str(folder)}}
    card = write_model_card(folder, config=config, result=result, base_model="tiny", command="qlora").read_text()
    for text in CARDS[head]:
        assert text in card
    assert f"the loss is that of `loss={head}`" in card
    code = card.split("```python\n")[1].split("```")[0]
    ast.parse(code)
    assert "AutoModelForCausalLM" not in code
