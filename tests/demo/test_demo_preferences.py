"""The pairs of the embedded world as runs read them, and what two chained runs make of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qlora.config.compose import compose
from qlora.config.registries.objectives import SHIPPED, RowKind
from qlora.data.pipeline import build_data
from qlora.models.model_files import EMBEDDED
from qlora.run import Run

LOSSES = [name for name, shipped in SHIPPED.items() if shipped.rows is not RowKind.tokens]


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_over_answers_reads_the_embedded_pairs(name: str) -> None:
    config = compose([f"loss={name}", "data=demo-preferences"])
    assert (config.trainer.per_device_train_batch_size, config.evaluation.metrics) == (16, ["exact_match"])
    data = build_data(config.data, AutoTokenizer.from_pretrained(EMBEDDED["tiny"]), kind=config.loss.rows)
    assert data.train is not None
    assert data.eval is not None
    sides = 2 if config.loss.rows is RowKind.labelled else 1
    assert (len(data.train), len(data.eval)) == (384 * sides, 96 * sides)
    assert data.report.lost_rows == data.report.eval_lost_rows == data.report.cut_targets == 0


@pytest.mark.full
def test_dpo_after_the_default_run_tells_the_embedded_pairs_apart_and_answers_better(tmp_path: Path) -> None:
    Run(compose(["device=cpu"]), tmp_path / "first").execute()
    overrides = ["loss=dpo", "data=demo-preferences", f"lora.start={tmp_path / 'first'}", "device=cpu"]
    result = Run(compose(overrides), tmp_path / "dpo", overrides=overrides).execute()
    metrics = result["metrics"]
    assert metrics["base_eval_reward_accuracy"] == 0.5
    assert metrics["eval_reward_accuracy"] >= 0.9
    assert result["intervals"]["eval_exact_match"][0] > metrics["base_eval_exact_match"]
