"""The defaults of one's own rows: how long, how many are held out, and what a run says of it before it starts."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qlora.config.compose import compose
from qlora.config.schema import Keep
from qlora.config.training_length import training_length
from qlora.errors import ConfigError, DataError
from qlora.run import Run
from tests.faults.runs import write_rows

LOCAL = ["data=local", "data.path=rows.jsonl"]
SHORT = ["trainer.max_steps=2", "trainer.gradient_accumulation_steps=1", "lora.r=2", "evaluation.baseline=false"]


def test_own_rows_are_trained_three_epochs_and_the_best_step_is_kept() -> None:
    trainer, data = (config := compose(LOCAL)).trainer, config.data
    assert (trainer.max_steps, trainer.num_train_epochs, trainer.warmup_steps) == (None, 3, 0.03)
    assert (trainer.lr_scheduler_type, trainer.eval_steps, trainer.keep) == ("cosine", "0.5ep", Keep.best)
    assert (data.source_max_len, data.target_max_len, data.max_length) == (None, None, 2048)
    assert config.evaluation.metrics == []
    assert compose(["data=mix", "data.mix.a=rows.jsonl"]).trainer == trainer


def test_an_option_of_the_user_s_own_has_the_defaults_of_local(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("name: mine\npath: rows.jsonl\n")
    mine, local = compose(["data=mine"], tmp_path), compose(LOCAL)
    assert (mine.trainer, mine.evaluation) == (local.trainer, local.evaluation)
    assert (mine.data.target_max_len, mine.data.max_length, mine.data.eval_dataset_size) == (None, 2048, None)


@pytest.mark.matrix(1)
@pytest.mark.parametrize("overrides", [LOCAL, ["data=alpaca"], ["model=llama-7b", "data=oasst1"], []])
def test_the_length_that_is_typed_makes_a_default_of_the_other_give_way(overrides: list[str], tmp_path: Path) -> None:
    epochs = compose([*overrides, "trainer.num_train_epochs=2"]).trainer
    steps = compose([*overrides, "trainer.max_steps=1e3"]).trainer
    assert (epochs.num_train_epochs, epochs.max_steps) == (2, None)
    assert (steps.num_train_epochs, steps.max_steps) == (None, 1000)
    with pytest.raises(ConfigError, match=r"trainer.max_steps=5 and trainer.num_train_epochs=2.0: set exactly one"):
        compose([*overrides, "trainer.num_train_epochs=2", "trainer.max_steps=5"])
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ntrainer: {num_train_epochs: 2}\n")
    assert compose([*overrides, "experiment=mine"], tmp_path).trainer.max_steps is None


def test_the_numbers_of_the_paper_stay_with_its_data() -> None:
    paper, local = (compose(["model=llama-33b", *data]) for data in (["data=alpaca"], LOCAL))
    assert (paper.trainer.max_steps, paper.trainer.gradient_accumulation_steps, paper.data.target_max_len) == (
        5000,
        32,
        128,
    )
    assert (local.trainer.max_steps, local.trainer.gradient_accumulation_steps, local.data.target_max_len) == (
        None,
        16,
        None,
    )
    assert paper.trainer.learning_rate == local.trainer.learning_rate == 1e-4
    assert paper.trainer.keep is Keep.last


@pytest.mark.matrix(4)
@pytest.mark.parametrize(
    ("rows", "held_out"), [(1, 0), (3, 0), (4, 1), (60, 15), (80, 20), (150, 20), (300, 30), (52_002, 1000)]
)
def test_a_tenth_is_held_out_at_least_20_at_most_1000_and_never_over_a_quarter(rows: int, held_out: int) -> None:
    assert compose(LOCAL).data.held_out_count(rows) == held_out


def test_steps_follow_from_rows_and_epochs_and_many_epochs_are_warned_of() -> None:
    length = training_length(compose(LOCAL).trainer, 270)
    assert str(length) == "270 rows, 17 steps an epoch, 3 epochs = 51 steps"
    assert (length.eval_steps, length.warning) == (9, None)
    many = training_length(compose([*LOCAL, "trainer.max_steps=400"]).trainer, 270)
    assert str(many) == "270 rows, 17 steps an epoch, 23.53 epochs = 400 steps"
    assert many.warning is not None
    assert many.warning.startswith("400 steps are 24 passes over the same 270 rows, which are learnt by heart")


@pytest.mark.matrix(4)
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "0ep", "-1ep", "ep", "0.5 epochs", "true", "[1]"])
def test_an_interval_is_steps_or_a_share_of_an_epoch(value: str) -> None:
    said = (
        r"trainer.save_steps must be a positive whole number of steps, a share of an epoch such as 0.5ep, or null, got"
    )
    with pytest.raises(ConfigError, match=said):
        compose([f"trainer.save_steps={value}"])


@pytest.mark.full
def test_a_run_that_holds_out_nothing_says_so_and_keeps_the_last_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 24)
    overrides = ["data=local", f"data.path={rows}", "data.eval_dataset_size=0", *SHORT]
    with caplog.at_level(logging.INFO):
        result = Run(compose(overrides), tmp_path / "run", overrides=overrides).execute()
    assert "local: none of 24 rows are held out (data.eval_dataset_size=0: nothing is measured" in caplog.text
    assert "the last step (no rows are held out to compare steps by)" in capsys.readouterr().out
    assert "eval_loss" not in result["metrics"]
    assert load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert "Nothing was measured on held-out rows" in (tmp_path / "run" / "README.md").read_text()
    with pytest.raises(
        ConfigError, match=r"task=evaluate measures held-out rows, and data.eval_dataset_size=0 holds out"
    ):
        compose([*overrides, "task=evaluate", f"adapter={tmp_path / 'run'}"])


def test_a_file_of_three_rows_is_previewed_trained_and_not_measured(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 3)
    chosen = ["data=local", f"data.path={rows}"]
    preview = Run(compose([*chosen, "task=preview"]), tmp_path / "look").execute()
    assert (preview["metrics"]["train_rows"], preview["metrics"]["eval_rows"]) == (3, 0)
    assert "kept" not in Run(compose([*chosen, *SHORT]), tmp_path / "run").execute()
    with pytest.raises(
        DataError, match=r"no row is held out, so there is nothing to measure; name rows with data.eval_path"
    ):
        Run(compose([*chosen, "task=evaluate", f"adapter={tmp_path / 'run'}"]), tmp_path / "measured").execute()


def test_the_default_length_of_answers_and_rows_shrinks_to_the_context_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": "word " * 190, "output": "a"}) + "\n" for _ in range(24)))
    context = "model.architecture.max_position_embeddings=256"
    chosen = ["data=local", f"data.path={rows}", "model.weights=random", context, *SHORT]
    with caplog.at_level(logging.INFO):
        session = Run(compose(chosen), tmp_path / "run").session
        measurer = session.measurer
    assert measurer.generation.max_new_tokens is not None
    assert 0 < measurer.generation.max_new_tokens < 256
    assert session.row_limit == "256 tokens a row (what tiny reads; data.max_length)"
    assert session.data.report.max_length <= 256
    assert (
        f"answers have up to {measurer.generation.max_new_tokens} tokens instead of 256: the longest prompt"
        in caplog.text
    )
    with pytest.raises(ConfigError, match=r"generation.max_new_tokens=200 on top of the longest prompt's \d+ tokens"):
        _ = Run(compose([*chosen, "generation.max_new_tokens=200"]), tmp_path / "run").session.measurer


def test_the_plan_counts_the_rows_of_local_files(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 300)
    from qlora.tasks.plan import _count_rows, build_plan

    config = compose(["data=local", f"data.path={rows}", f"data.cache_dir={tmp_path}", "task=plan", "plan.device=h100"])
    plan = build_plan(config, _count_rows(config.data))
    assert str(plan.length) == "270 rows, 17 steps an epoch, 3 epochs = 51 steps"
    assert plan.steps == 51
