"""A run that is interrupted, wherever and however, ends as one that was not: losses and adapter to the bit."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
from wandb_files import wandb_history, wandb_records

from qlora import cli
from qlora.config import compose
from qlora.errors import Stopped, UserError
from qlora.sweep.launcher import command
from qlora.training.checkpoints import find_checkpoints, step_of
from qlora.training.trackers.wandb import RUN_ID_FILE
from tests.faults.runs import at_step, kinds, outcome, run, send, write_rows


def interrupt() -> None:
    raise KeyboardInterrupt


def nothing() -> None:
    pass


@pytest.mark.matrix(1)
@pytest.mark.parametrize(
    ("kind", "stops"),
    [
        ("plain", [1, 5, 7]),
        ("grouped", [99]),
        ("workers", [7]),
        ("packed", [3, 7]),
        ("mixed", [6]),
        ("pairs", [3, 5]),
        ("packed pairs", [5]),
        ("labelled", [5]),
    ],
)
def test_an_interrupted_run_ends_with_the_bits_of_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, stops: list[int]
) -> None:
    check_interrupted(tmp_path, monkeypatch, kinds(tmp_path)[kind], stops)


def test_an_interrupted_run_on_a_stream_ends_with_the_bits_of_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_interrupted(tmp_path, monkeypatch, kinds(tmp_path)["streamed"], [3, 7])
    card = (tmp_path / "cut" / "README.md").read_text()
    assert "streamed, shuffled among 4, a with probability 0.6, b with probability 0.4" in card
    stream = json.loads((tmp_path / "cut" / "result.json").read_text())["stream"]
    assert stream["rows"] > 0


def check_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], stops: list[int]) -> None:
    run(tmp_path / "calm", *overrides)
    for number, step in enumerate(stops):
        hard = number % 2 == 0  # cut off, and what came after the last checkpoint is done again; or asked to end
        at_step(monkeypatch, step, interrupt if hard else send(signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt if hard else Stopped):
            run(tmp_path / "cut", *overrides)
        saved = [step_of(path) for path in find_checkpoints(tmp_path / "cut" / "checkpoints")]
        assert max(saved, default=0) == (min((step - 1) // 2 * 2, 8) if hard else step)
        assert not (tmp_path / "cut" / "result.json").exists()
    at_step(monkeypatch, 0, nothing)
    run(tmp_path / "cut", *overrides)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "calm")


@pytest.mark.full
def test_a_training_that_a_callback_ended_is_not_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = "{_target_: qlora.training.callbacks.EarlyStopping, patience: 1, min_delta: 9}"
    overrides = [f"+callbacks.stop={stop}", "trainer.eval_steps=2"]
    run(tmp_path / "calm", *overrides)
    monkeypatch.setattr("qlora.tasks.train.save_trained", lambda session, model: interrupt())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", *overrides)
    monkeypatch.undo()
    run(tmp_path / "cut", *overrides)
    assert max(entry["step"] for entry in outcome(tmp_path / "cut")["history"]) == 4
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "calm")


@pytest.fixture
def cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was interrupted after its third step, with rows of its own file."""
    write_rows(tmp_path / "rows.jsonl", 24)
    at_step(monkeypatch, 3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", *own_rows(tmp_path))
    at_step(monkeypatch, 0, nothing)
    return tmp_path / "cut"


def own_rows(folder: Path) -> list[str]:
    return [
        "data=local",
        f"data.path={folder}/rows.jsonl",
        "data.eval_dataset_size=4",
        "trainer.max_steps=4",
        "data.max_train_samples=null",
    ]


@pytest.mark.full
def test_changed_rows_are_refused_and_named_and_force_resumes(cut: Path, caplog: pytest.LogCaptureFixture) -> None:
    overrides, rows = own_rows(cut.parent), cut.parent / "rows.jsonl"
    original = rows.read_text()
    rows.write_text(original.replace("row 3?", "row three?"))
    with pytest.raises(UserError) as error:
        run(cut, *overrides)
    text = str(error.value)
    assert text.startswith(f"the rows of data.path={rows} are not those with which the run in {cut} began; changed:\n")
    assert "\n  fingerprint: '" in text
    assert "resume=force resumes with the new rows, resume=never starts in a new folder" in text
    rows.write_text(original + original.splitlines()[0] + "\n")
    with pytest.raises(UserError, match=r"train_rows: 20 -> 21\n"):
        run(cut, *overrides)
    (cut / "baseline.json").write_text("{}")
    run(cut, *overrides, "resume=force")
    assert "resume=force: the rows of data.path=" in caplog.text
    assert not (cut / "baseline.json").exists()
    assert json.loads((cut / "history.json").read_text())[0]["step"] == 1, "it resumed"
    run(cut, *overrides)  # the new rows are the run's own now


@pytest.mark.full
def test_a_changed_config_is_refused_and_force_resumes_also_from_the_end(
    cut: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = own_rows(cut.parent)
    with pytest.raises(UserError, match=r"changed:\n  trainer.max_steps: 4 -> 6\n.*resume=force resumes"):
        run(cut, *overrides, "trainer.max_steps=6")
    run(cut, *overrides)
    capsys.readouterr()
    run(cut, *overrides, "trainer.max_steps=6", "resume=force")
    assert "resume=force: resuming with another config; changed:\n  trainer.max_steps: 4 -> 6" in caplog.text
    assert "resuming from checkpoint-4" in capsys.readouterr().out
    assert max(entry["step"] for entry in outcome(cut)["history"]) == 6
    with pytest.raises(UserError, match=r"checkpoint-6 does not fit what the config makes of the model.*=never"):
        run(cut, *overrides, "trainer.max_steps=6", "lora.r=8", "resume=force")


@pytest.mark.full
def test_a_config_that_is_gone_is_known_by_its_hash(cut: Path) -> None:
    (cut / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"checkpoint-2 was written with another config, and .*config.yaml, which"):
        run(cut, *own_rows(cut.parent), "seed=1")
    run(cut, *own_rows(cut.parent))


@pytest.mark.full
def test_never_leaves_a_run_alone(cut: Path) -> None:
    initial = {path: path.stat().st_mtime_ns for path in cut.rglob("*")}
    with pytest.raises(UserError, match="holds a run, which resume=never does not touch; choose another folder"):
        run(cut, *own_rows(cut.parent), "resume=never")
    assert {path: path.stat().st_mtime_ns for path in cut.rglob("*")} == initial


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["name=mine"], "hydra.run.dir=outputs/runs/mine-3"),
        (["name=new"], "hydra.run.dir=outputs/runs/new"),
        (['hydra.run.dir="it\'s"'], r"hydra.run.dir='it\'s-2'"),
        (["-m", "name=grid", "seed=0,1"], "hydra.sweep.dir=outputs/sweeps/grid-2"),
    ],
)
def test_never_chooses_a_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("outputs/runs/mine", "outputs/runs/mine-2", "outputs/sweeps/grid", "it's"):
        (tmp_path / folder).mkdir(parents=True)
    seen: list[str] = []
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    for name in ("_run_once", "_run_sweep"):
        monkeypatch.setattr(f"qlora.tasks.start.{name}", lambda command, added: seen.extend(added))
    monkeypatch.setattr(sys, "argv", ["qlora", *overrides, "resume=never"])
    cli.main()
    assert [word for word in seen if word.startswith("hydra.")][-1] == expected
    assert compose.compose_dict([word for word in [*overrides, *seen] if word != "-m" and "," not in word])


def test_the_jobs_of_a_sweep_are_not_told_to_begin_in_folders_of_their_own() -> None:
    overrides = ["seed=1", "resume=never"]
    args = command(compose.compose_dict(overrides), Path("outputs/sweeps/grid-2/seed=1"), overrides)
    assert "seed=1" in args
    assert not [word for word in args if word.startswith("resume=")]


@pytest.mark.full
def test_a_run_s_ids_in_trackers_are_in_its_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    overrides = ["tracking=wandb", "tracking.mode=offline"]
    for step, act in ((3, interrupt), (7, send(signal.SIGTERM))):
        at_step(monkeypatch, step, act)
        with pytest.raises((KeyboardInterrupt, Stopped)):
            run(tmp_path / "cut", *overrides)
        if step == 3:
            identity = (tmp_path / "cut" / RUN_ID_FILE).read_text()
            (tmp_path / "cut" / RUN_ID_FILE).unlink()
    at_step(monkeypatch, 0, nothing)
    run(tmp_path / "cut", *overrides)
    records = wandb_records(tmp_path / "cut", ends=3)
    assert {record.run.run_id for record in records if record.WhichOneof("record_type") == "run"} == {identity}
    rows = wandb_history(records)
    assert [row["global_step"] for row in rows if "train/loss" in row] == [1, 3, 6]
    assert [row["global_step"] for row in rows if "eval/loss" in row] == [4, 8]
    assert [row["_step"] for row in rows] == list(range(len(rows)))
