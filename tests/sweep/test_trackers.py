"""A sweep in wandb, offline: its jobs, itself, its continuation, and a sweep that wandb's own agents run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb_files import wandb_config, wandb_history, wandb_records, wandb_start, wandb_summary

from qlora import cli
from qlora.config.schema import TrackingConfig, WandbMode
from qlora.errors import UserError
from qlora.reporting.parallel_axes import build_axis, plot_parallel
from qlora.runtime.atomic_files import write_text
from qlora.runtime.sweep_job import SweepJob
from qlora.sweep.jobs import Job, Status
from qlora.sweep.leaderboard import build_leaderboard
from qlora.sweep.summary_run import count_jobs, track_sweep, typed_table
from qlora.sweep.sweep_folder import Sweep, read_sweep
from qlora.training.trackers.wandb import sync_command

QUICK = [
    *("lora.r=4", "lora.dropout=0", "trainer.max_steps=4", "trainer.per_device_train_batch_size=4"),
    *("trainer.lr_scheduler_type=constant", "trainer.lr_scheduler_kwargs={}", "trainer.warmup_steps=0"),
    *("trainer.logging_steps=1", "trainer.eval_steps=4", "data.max_eval_samples=8", "data.max_train_samples=64"),
    *("evaluation=loss", "evaluation.baseline=false", "task.predict=false"),
]
OFFLINE = TrackingConfig(backend="wandb", mode=WandbMode.offline)
needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")

KILL_ONCE = '''
import os, signal
from pathlib import Path
from transformers import TrainerCallback

class KillOnce(TrainerCallback):
    """Kills the first job of all at its third step."""
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3 and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
'''


def start(folder: Path, command: list[str], **environment: str) -> tuple[int, str]:
    extra = {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]), "HF_HUB_OFFLINE": "1"}
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=inherited | extra | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Two jobs, the first of which is killed and resumes under the same command; with the output of the commands."""
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("tracked")
    (folder / "kill_once.py").write_text(KILL_ONCE)
    args = ["lora.alpha=8,16", "name=two", "trainer.save_steps=2", "callbacks.kill._target_=kill_once.KillOnce"]
    args.append("trusted=[kill_once]")
    command = [sys.executable, "-m", "qlora", "-m", *QUICK, *args, "tracking=wandb", "tracking.mode=offline"]
    printed = [start(folder, command) for _ in range(2)]
    assert [code for code, _ in printed] == [1, 0], printed
    return folder / "outputs" / "sweeps" / "two", [text for _, text in printed]


@pytest.mark.slow
def test_jobs_are_grouped_and_named_by_what_varies(tracked: tuple[Path, list[str]]) -> None:
    folder, _ = tracked
    for value in (8.0, 16.0):
        run = wandb_start(next(folder.glob(f"lora.alpha={value:g}-*")))
        assert (run.display_name, run.run_group, list(run.tags)) == (f"lora.alpha={value:g}", "two", ["two"])
        config = wandb_config(run)
        assert config["sweep"] == {"lora.alpha": value}
        assert config["lora"]["alpha"] == value


@pytest.mark.slow
def test_a_killed_job_resumes_in_its_run_and_sends_no_metric_twice(tracked: tuple[Path, list[str]]) -> None:
    folder, _ = tracked
    job = next(folder.glob("lora.alpha=8-*"))
    assert "resuming from checkpoint-2" in (job / "stdout.log").read_text()
    assert len(list(job.glob("wandb/offline-run-*"))) == 2
    records = wandb_records(job)
    runs = {record.run.run_id for record in records if record.WhichOneof("record_type") == "run"}
    assert runs == {(job / "wandb_run_id.txt").read_text()}
    rows = wandb_history(records)
    assert [row["global_step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
    assert [row["global_step"] for row in rows if "eval/loss" in row] == [4]
    assert [row["global_step"] for row in rows if "predictions/nrows" in row] == [4]
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    result = json.loads((job / "result.json").read_text())
    assert wandb_summary(records)["eval_loss"] == result["objective"]


@pytest.mark.slow
def test_a_run_shows_the_sweep_and_a_continued_sweep_updates_it(tracked: tuple[Path, list[str]]) -> None:
    folder, printed = tracked
    records = wandb_records(folder, ends=2)
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {(run.run_id, run.run_group, run.job_type) for run in runs} == {
        ((folder / "wandb_run_id.txt").read_text(), "two", "sweep")
    }
    rows = wandb_history(records)
    assert [(row["global_step"], row["leaderboard/nrows"]) for row in rows] == [(1, 1), (2, 2)]
    [table] = folder.glob(f"wandb/offline-run-*/files/{rows[1]['leaderboard/path']}")
    content = json.loads(table.read_text())
    assert content["columns"][:3] == ["place", "lora.alpha", "eval_loss"]
    losses = {line[1]: line[2] for line in content["data"]}
    results = [json.loads(path.read_text()) for path in folder.glob("*/result.json")]
    assert sorted(losses.values()) == sorted(result["objective"] for result in results)
    assert [line[2] for line in content["data"]] == sorted(losses.values())
    pages = list(folder.glob(f"wandb/offline-run-*/files/{rows[1]['report/path']}"))
    assert pages[0].read_bytes() == (folder / "report.html").read_bytes()
    assert list(folder.glob(f"wandb/offline-run-*/files/{rows[1]['parallel_coordinates/path']}"))
    summary = wandb_summary(records)
    assert (summary["jobs/finished"], summary["jobs/failed"]) == (2, 0)
    assert summary["best/eval_loss"] == min(losses.values())
    assert sync_command(Path("outputs/sweeps/two"), jobs=True) in printed[1]


@pytest.mark.slow
def test_one_command_sends_all_runs_of_an_offline_sweep(tracked: tuple[Path, list[str]]) -> None:
    folder, printed = tracked
    [line] = [line for line in printed[1].splitlines() if line.startswith("sync ")]
    variable, *command = line.removeprefix("sync").split()
    assert (variable, command[:2]) == ("WANDB_RESUME=allow", ["wandb", "sync"])
    root = folder.parent.parent.parent
    actual = {path for pattern in command[2:] for path in root.glob(pattern)}
    assert actual == set(folder.rglob("offline-run-*"))
    code, output = start(root, [sys.executable, "-m", "wandb", "sync", "--dry-run", *map(str, sorted(actual))])
    assert code == 0
    assert "Would sync 5 run(s)" in output  # a killed and two whole starts of the jobs, two of the sweep


@pytest.mark.full
@needs_wandb
def test_a_sweep_of_another_engine_gets_its_run_at_the_end_though_a_job_failed(tmp_path: Path) -> None:
    args = ["task=evaluate", "task.predict=false", "adapter=none,nowhere", "name=two", "hydra/launcher=basic"]
    small = ["data.max_eval_samples=4", "evaluation=loss", "tracking=wandb", "tracking.mode=offline"]
    code, printed = start(tmp_path, [sys.executable, "-m", "qlora", "-m", *args, *small])
    assert code == 1, printed
    folder = tmp_path / "outputs/sweeps/two"
    summary = wandb_summary(wandb_records(folder))
    assert (summary["jobs/finished"], summary["jobs/failed"]) == (1, 1)
    assert sync_command(Path("outputs/sweeps/two"), jobs=True) in printed


@pytest.mark.full
@needs_wandb
def test_a_sweep_that_brought_nothing_new_starts_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = fake_sweep(tmp_path, {"lora.r=8": 0.5, "lora.r=16": 0.4})
    for _ in range(2):
        track_sweep(sweep, OFFLINE)
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1
    assert capsys.readouterr().out.count("WANDB_RESUME=allow wandb sync") == 2


def test_other_trackers_get_no_run_of_the_sweep(tmp_path: Path) -> None:
    track_sweep(fake_sweep(tmp_path, {"lora.r=8": 0.5}), TrackingConfig(backend="tensorboard"))
    assert not list(tmp_path.glob("wandb*"))


def test_a_tracker_that_fails_costs_a_line_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    track_sweep(fake_sweep(tmp_path, {"lora.r=8": 0.5}), OFFLINE)
    assert "the sweep as a whole is not tracked: tracking=wandb needs the wandb package" in capsys.readouterr().out


def fake_sweep(folder: Path, losses: dict[str, float]) -> Sweep:
    sweep = Sweep(folder, "eval_loss")
    for number, (text, loss) in enumerate(losses.items()):
        job = Job(folder / f"job{number}", overrides=text.split(), status=Status.finished, objective=loss)
        job.metrics = {"eval_loss": loss}
        sweep.jobs[job.name] = job
    sweep.jobs["broken"] = Job(folder / "broken", overrides=["lora.r=0"], status=Status.failed, reason="no")
    return sweep


def test_the_table_has_numbers_in_columns_of_one_type(tmp_path: Path) -> None:
    losses = {"lora.r=8 data=alpaca trainer.learning_rate=1e-4 seed=0": 0.5,
              "lora.r=8 data=alpaca trainer.learning_rate=1e-4 seed=1": 0.7,
              "lora.r=16 data=7 trainer.learning_rate=2e-4 seed=0": 0.4}  # fmt: skip
    sweep = fake_sweep(tmp_path, losses)
    head, lines = typed_table(build_leaderboard(sweep))
    assert head == ["place", "lora.r", "data", "trainer.learning_rate", "seeds", "eval_loss", "eval_loss ±", "job"]
    assert lines[0] == [1, 16, "7", 2e-4, 1, 0.4, None, "job2"]
    assert lines[1][:6] == [2, 8, "alpaca", 1e-4, 2, pytest.approx(0.6)]
    assert count_jobs(sweep, build_leaderboard(sweep)) == {
        **{f"jobs/{status.value}": 0 for status in Status},
        "jobs/finished": 3,
        "jobs/failed": 1,
        "best/eval_loss": 0.4,
        "best/overrides": "lora.r=16 data=7 trainer.learning_rate=2e-4 seed=0",
    }


def test_axes_position_numbers_by_size_and_text_in_order(tmp_path: Path) -> None:
    assert build_axis([8, 16, 12]).positions == [0, 1, 0.5]
    decades = build_axis([1e-5, 1e-3, 1e-4])
    assert decades.positions == pytest.approx([0, 1, 0.5])
    assert [text for _, text in decades.ticks] == ["1e-05", "0.0001", "0.001"]
    assert build_axis(["b", "a", "b"]).ticks == [(0.25, "b"), (0.75, "a")]
    assert build_axis([3, 3]).positions == [0.5, 0.5]
    assert len(build_axis(range(100)).ticks) == 5
    plot_parallel({"lora.r": [8, 16], "data": ["a", "b"], "eval_loss": [0.5, 0.4]}, tmp_path / "p.png", maximizes=False)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


# A sweep that wandb's own agents run.


def described(*args: str) -> dict[str, Any]:
    """Writes the sweep that a command line describes, as the command line does, and reads it as wandb does."""
    cli.run(["task=wandb-sweep", *args])
    (file,) = Path.cwd().rglob("wandb-sweep.yaml")
    return yaml.safe_load(file.read_text())


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    ("word", "space"),
    [
        ("lora.r=8,16", {"values": [8, 16]}),
        ("seed=range(0,3)", {"values": [0, 1, 2]}),
        ("lora.dropout=choice(0.0,0.05)", {"values": [0.0, 0.05]}),
        ("quantization=nf4,fp4", {"values": ["nf4", "fp4"]}),
        ("lora.target_modules=[q_proj,k_proj],all-linear", {"values": ["[q_proj,k_proj]", "all-linear"]}),
        ("lora.use_dora=true,false", {"values": [True, False]}),
        ("trainer.eval_steps=10,null", {"values": [10, "null"]}),
        ("lora.dropout=interval(0.0,0.1)", {"distribution": "uniform", "min": 0.0, "max": 0.1}),
        (
            "trainer.learning_rate=tag(log,interval(1e-5,1e-3))",
            {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-3},
        ),
        ("lora.r=int(interval(4,64))", {"distribution": "int_uniform", "min": 4, "max": 64}),
        (
            "lora.r=tag(log,int(interval(4,64)))",
            {"distribution": "q_log_uniform_values", "min": 4, "max": 64, "q": 1},
        ),
    ],
)
def test_values_of_the_command_line_become_wandb_s(
    word: str, space: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = described(word)
    key = word.partition("=")[0]
    assert sweep["parameters"] == {key: space}
    assert sweep["method"] == ("grid" if "values" in space else "bayes")
    optuna = pytest.importorskip("wandb.sdk.sweeps.scheduler.optuna", exc_type=ImportError)
    optuna.search_space_from_sweep_config(sweep["parameters"])  # wandb's own reader


def test_a_description_names_metric_command_and_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["lora.r=8,16", "name=mine", "objective=eval_exact_match", "task.method=random", "tracking=wandb"]
    sweep = described(*args, "tracking.project=p", "tracking.entity=me", "hydra.launcher.n_jobs=2", "seed=3")
    assert {key: sweep[key] for key in ("name", "project", "entity", "method", "metric")} == {
        "name": "mine",
        "project": "p",
        "entity": "me",
        "method": "random",
        "metric": {"name": "eval_exact_match", "goal": "maximize"},
    }
    assert sweep["command"] == [
        *("${env}", 'QLORA_SWEEP={"sweep": "mine", "keys": ["lora.r"]}', "python", "-m", "qlora"),
        *("name=mine", "objective=eval_exact_match", "tracking=wandb", "tracking.project=p", "tracking.entity=me"),
        *("seed=3", "hydra.mode=RUN", "hydra.run.dir='outputs/sweeps/mine/${oc.env:WANDB_RUN_ID}'"),
        "${args_no_hyphens}",
    ]
    printed = capsys.readouterr().out
    assert "wandb sweep outputs/sweeps/mine/wandb-sweep.yaml" in printed
    assert "wandb agent me/p/ID" in printed


def test_a_named_sweep_can_be_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = described("sweep=lora-rank", "objective=null", "lora.alpha=interval(8.0,32.0)")
    assert sweep["parameters"]["lora.r"] == {"values": [8, 16, 32, 64, 128, 256]}
    assert (sweep["method"], sweep.get("metric")) == ("random", None)
    assert "sweep=lora-rank" in sweep["command"]


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["lora.r=8"], "there is nothing to vary; give a key several values"),
        (["lora.r=8,16", "tracking=tensorboard"], "tracking=tensorboard: the jobs of task=wandb-sweep report to wandb"),
        (["lora.r=8,16", "tracking=wandb", "tracking.mode=offline"], "the agents of task=wandb-sweep need wandb's"),
        (["lora.dropout=interval(0.0,0.1)", "task.method=grid"], "lora.dropout is an interval, which has no grid"),
        (["lora.r=8,16", "task.method=bayes", "objective=null"], "objective=null leaves no metric to go by"),
        (["lora.dropout=tag(log,interval(0.0,0.1))"], "a logarithmic scale needs bounds above 0, got 0"),
        (["lora.r=tag(log,choice(8,16))"], "a list of values has no scale"),
        (["lora.dropout=tag(odd,interval(0.0,0.1))"], "the tag 'odd' is unknown"),
        (["lora.r=8,0"], "lora.r must be positive, got 0"),
    ],
)
def test_a_sweep_that_wandb_cannot_run_is_refused(
    args: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        described(*args)
    assert sentence in str(error.value)
    assert not list(tmp_path.rglob("*.yaml"))


@pytest.mark.full
@needs_wandb
@pytest.mark.slow
def test_an_agent_s_job_trains_and_its_summary_holds_the_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for `wandb agent`: its own code turns the parameters into words, and no server is asked."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    monkeypatch.chdir(tmp_path)
    sweep = described(*QUICK, "trainer.max_steps=1", "lora.r=4,8", "quantization=nf4,fp4", "name=agents")
    chosen = {"lora.r": 8, "quantization": "fp4"}
    macros = create_sweep_command_args({"args": {key: {"value": value} for key, value in chosen.items()}})
    macros["env"] = ["/usr/bin/env"]
    command = [
        word
        for part in create_sweep_command(sweep["command"])
        for word in (macros[part[2:-1]] if part.startswith("${") and part.endswith("}") else [part])
    ]
    command[command.index("python")] = sys.executable
    write_text(tmp_path / "chosen.yaml", yaml.safe_dump({key: {"value": value} for key, value in chosen.items()}))
    told = {"MODE": "offline", "SWEEP_ID": "s1", "RUN_ID": "r1", "SWEEP_PARAM_PATH": str(tmp_path / "chosen.yaml")}
    code, output = start(tmp_path, command, **{f"WANDB_{name}": value for name, value in told.items()})
    assert code == 0, output
    folder = tmp_path / "outputs" / "sweeps" / "agents" / "r1"
    run = wandb_start(folder)
    assert (run.run_id, run.sweep_id, run.run_group, run.display_name) == (
        "r1", "s1", "agents", "lora.r=8 quantization=fp4"
    )  # fmt: skip
    assert wandb_config(run)["sweep"] == chosen
    assert wandb_config(run)["quantization"] == "fp4"
    assert wandb_config(run)["groups"]["quantization"]["quant_type"] == "fp4"
    assert "lora.r=4" not in sweep["command"]
    result = json.loads((folder / "result.json").read_text())
    metric = sweep["metric"]["name"]
    assert wandb_summary(wandb_records(folder))[metric] == result["objective"] is not None
    assert read_sweep(folder.parent).jobs["r1"].status is Status.finished


def test_a_job_without_a_sweep_belongs_to_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QLORA_SWEEP", raising=False)
    assert SweepJob.from_environment(["lora.r=8"]) is None
