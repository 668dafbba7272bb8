"""The pairs of the embedded world as runs read them, and what two chained runs make of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qlora.config.compose import compose
from qlora.config.registries.objectives import SHIPPED, RowKind
from qlora.data.pipeline import build_data
from qlora.errors import ConfigError
from qlora.models.model_files import EMBEDDED
from qlora.run import Run

LOSSES = [name for name, shipped in SHIPPED.items() if shipped.rows in (RowKind.pairs, RowKind.labelled)]


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


@pytest.mark.parametrize("loss", ["dpo", "kto", "reward"])
def test_the_embedded_instructions_name_the_embedded_pairs(loss: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^data=demo holds one answer a row, and this loss learns from good answers against bad ones; choose "
        r"data=demo-preferences to try it, or rows of your own \(data=FILE\)$",
    ):
        Run(compose([f"loss={loss}", "trainer.per_device_train_batch_size=2"]), tmp_path).session.data  # noqa: B018


def test_recipes_of_preferences_follow_one_another_and_compare_by_held_out_pairs() -> None:
    first, second = (compose([f"experiment=zephyr-7b-{loss}"]) for loss in ("sft", "dpo"))
    assert (first.loss.name, second.loss.name, second.lora.start) == ("sft", "dpo", first.name)
    assert (first.model.name, first.data.template) == (second.model.name, second.data.template)
    assert second.kept_metric == second.objective == "eval_reward_accuracy"
    sweep = compose(["sweep=dpo-beta", "data=demo-preferences"])
    assert (sweep.loss.name, sweep.objective) == ("dpo", "eval_reward_accuracy")
