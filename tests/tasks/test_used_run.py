"""Tasks that use a finished run by its folder alone, and what they say of what they used."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from qlora.config.compose import compose
from qlora.config.saved_config import read_config
from qlora.errors import UserError
from qlora.models.fingerprint import adapter_digest
from qlora.reporting.summary import next_commands
from qlora.run import Run

TRAINED = [
    *("lora.r=4", "quantization=fp32", "trainer.max_steps=2", "trainer.eval_steps=null", "seed=5"),
    *("trainer.warmup_steps=1", "trainer.lr_scheduler_kwargs.num_decay_steps=1", "data.max_train_samples=32"),
    *("data.max_eval_samples=6", "generation.max_new_tokens=4", "evaluation.show_predictions=2"),
]


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    return Run(compose(list(overrides)), folder, list(overrides)).execute()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training run, which no test writes to."""
    folder = tmp_path_factory.mktemp("used") / "runs" / "mine"
    run(folder, *TRAINED)
    return folder


@pytest.mark.full
def test_an_evaluation_by_the_folder_alone_measures_what_the_training_did(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(tmp_path / "again", "task=evaluate", f"adapter={trained}")
    previous = json.loads((trained / "result.json").read_text())
    assert result["metrics"]["eval_loss"] == previous["metrics"]["eval_loss"]
    assert result["metrics"]["base_eval_loss"] == previous["metrics"]["base_eval_loss"]
    assert "differs" not in capsys.readouterr().out
    used = result["measured"]
    assert used["base"]["name"] == "tiny"
    assert used["base"] == previous["measured"]["base"]
    assert used["adapter"]["digest"] == adapter_digest(trained / "adapter") == previous["measured"]["adapter"]["digest"]
    assert (used["bits"], used["data"]["rows"], used["evaluation"]["metrics"]) == (32, 6, ["exact_match"])
    assert used["differs"] == {}
    saved = read_config(tmp_path / "again" / "config.yaml")
    assert saved is not None
    assert (saved["task"]["name"], saved["lora"]["r"], saved["seed"]) == ("evaluate", 4, 5)


def test_what_differs_from_the_training_stands_in_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["generation.max_new_tokens=2", "data.max_eval_samples=2", "evaluation.baseline=false"]
    result = run(tmp_path / "other", "task=evaluate", f"adapter={trained}", *args)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  differs")]
    for text in ("data.max_eval_samples=2 (was 6)", "generation.max_new_tokens=2 (was 4)",
                 "evaluation.baseline=false (was true)"):  # fmt: skip
        assert text in line
    assert result["measured"]["differs"]["generation.max_new_tokens"] == [2, 4]


@pytest.mark.full
def test_a_task_in_the_folder_of_its_training_leaves_the_training_s_config(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    previous = (folder / "config.yaml").read_bytes()
    run(folder, "task=predict", f"adapter={folder}", "data.max_eval_samples=2")
    assert (folder / "config.yaml").read_bytes() == previous


def test_questions_without_answers_are_answered_and_nothing_is_measured(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "questions.jsonl").write_text('{"question": "What is the opposite of brave?"}\n')
    args = ["task=predict", f"adapter={trained}", f"data.eval_path={tmp_path}/questions.jsonl"]
    result = run(tmp_path / "answers", *args)
    [row] = [json.loads(line) for line in Path(result["paths"]["predictions"]).read_text().splitlines()]
    assert (row["reference"], result["unanswered"]) == (None, 1)
    assert row["prediction"]
    assert not [name for name in result["metrics"] if name.startswith("eval_")]
    printed = capsys.readouterr().out
    assert "1 of 1 row holds no answer to compare with: nothing is measured" in printed
    assert "expected" not in printed


@pytest.mark.full
def test_rows_with_answers_are_measured_beside_questions(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": "What is the opposite of brave?", "output": answer} for answer in ("timid", "")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(tmp_path / "answers", "task=predict", f"adapter={trained}", f"data.eval_path={tmp_path}/rows.jsonl")
    assert result["metrics"]["eval_exact_match"] in (0.0, 1.0)
    said = "1 of 2 rows holds no answer to compare with: the metrics are those of the other 1"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("task", ["chat", "evaluate", "predict", "merge"])
def test_without_an_adapter_the_newest_finished_run_is_offered(trained: Path, task: str, tmp_path: Path) -> None:
    runs = tmp_path / "outputs" / "runs"
    for age, name in enumerate(("new", "old")):
        shutil.copytree(trained, runs / name)
        os.utime(runs / name / "result.json", (1e9 - age, 1e9 - age))
    (runs / "broken").mkdir()
    (runs / "broken" / "result.json").write_text("{")
    with pytest.raises(UserError) as error:
        run(runs / "time", f"task={task}")
    base = "" if task == "merge" else ", or adapter=none for the untuned base"
    assert str(error.value) == (
        f"adapter is not set; the newest finished run is {runs}/new: write qlora {task} {runs}/new{base}"
    )


def test_where_no_run_has_finished_an_adapter_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^adapter is not set; write qlora evaluate FOLDER with that of an adapter"):
        run(tmp_path / "runs" / "time", "task=evaluate")


def test_a_base_that_is_named_and_no_adapter_means_the_base(tmp_path: Path) -> None:
    questions = [{"subject": "args", "input": "Question: a\nA. b\nB. c\nC. d\nD. e\nAnswer:", "output": "A"}]
    (tmp_path / "mmlu.json").write_text(json.dumps(questions))
    args = ["task=evaluate", "evaluation=mmlu", f"evaluation.path={tmp_path}/mmlu.json", "model.name=tiny"]
    for _ in range(2):  # the folder holds the first evaluation then
        result = run(tmp_path / "base", *args)
        assert result["measured"]["adapter"] is None
        assert result["measured"]["data"]["fingerprint"]
        assert "eval_mmlu_val_accuracy" in result["metrics"]


def test_a_base_that_is_named_does_not_stand_for_a_training_that_did_not_end(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match="holds no adapter"):
        run(folder, "task=evaluate", "model.name=tiny")


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("running", "holds no adapter yet: its training run has not ended; give adapter="),
        ("interrupted", "yet: its training run was interrupted, and resumes when its command is started again; give"),
        ("failed", "yet: its training run failed, and resumes when its command is started again; give"),
        ("finished", "holds no adapter; give adapter="),
    ],
)
def test_an_adapter_of_a_run_that_has_not_finished_says_so(tmp_path: Path, status: str, said: str) -> None:
    folder = tmp_path / "unfinished"
    folder.mkdir()
    (folder / "status.json").write_text(json.dumps({"status": status, "overrides": []}))
    with pytest.raises(UserError) as error:
        run(tmp_path / "evaluated", "task=evaluate", f"adapter={folder}")
    assert said in str(error.value)


def test_what_comes_next_is_one_short_line_a_task(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained.parent.parent)
    overrides = [*TRAINED, "trusted=[mine]", "name=mine", "data=local"]
    assert next_commands("train", None, trained, overrides) == [
        *(f"qlora {task} runs/mine 'trusted=[mine]'" for task in ("chat", "evaluate", "merge")),
        "qlora board",
    ]
    assert next_commands("evaluate", str(trained), Path("out"), []) == [
        f"qlora {task} runs/mine" for task in ("chat", "predict", "merge")
    ]


def test_an_adapter_without_its_run_is_used_with_the_base_and_the_options_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    args = ["model=mine", "data.eval_path=a", "quantization=none", "evaluation=loss"]
    [chat] = [line for line in next_commands("evaluate", str(tmp_path / "plain"), tmp_path, args,
                                             options=["--config-dir", "my conf"]) if "chat" in line]  # fmt: skip
    adapter = tmp_path / "plain"
    assert chat == f"qlora chat {adapter} model=mine quantization=none --config-dir 'my conf'"
