"""Trackers: what was logged can be read back from the files they write."""

import contextlib
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from wandb_files import wandb_config, wandb_history, wandb_records, wandb_start, wandb_summary

from qlora.config.registries.trackers import TRACKERS
from qlora.config.schema import TrackingConfig, WandbMode
from qlora.errors import UserError
from qlora.runtime.sweep_job import VARIABLE, SweepJob
from qlora.training.trackers import NoTracker, TrackedRun, Tracker, build_tracker
from qlora.training.trackers.base import Sent
from qlora.training.trackers.callback import TrackerCallback
from qlora.training.trackers.wandb import RUN_ID_FILE

ROWS = [
    {"prompt": "What | is\nit?", "reference": "tea", "prediction": "tea", "match": "yes"},
    {"prompt": "Why?", "reference": "so", "prediction": "no", "match": "no"},
]
RUN_CONFIG = {"seed": 3, "lora": {"r": 16, "target_modules": ["q_proj"]}, "data": {"name": "alpaca"}}
SWEEP = SweepJob("ranks", ["lora.r=16", "data=alpaca"])
needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
needs_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="no tensorboard")


def tracker_for(
    folder: Path,
    backend: str,
    *,
    sweep: SweepJob | None = None,
    resumes: bool = True,
    **options: Any,
) -> Tracker:
    run = TrackedRun("my-run", folder, RUN_CONFIG, sweep=sweep, resumes=resumes)
    return build_tracker(TrackingConfig(backend=backend, **options), run)


def offline(folder: Path, **options: Any) -> Tracker:
    return tracker_for(folder, "wandb", mode=WandbMode.offline, **options)


@pytest.fixture(scope="module")
def wandb_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("wandb-run")
    tracker = offline(folder, project="p", group="g", tags=["one", "two"], log_adapter=True, resumes=False)
    tracker.log({"train/loss": 1.5}, step=10)
    tracker.log({"eval/loss": 1.25, "eval/exact_match": 0.5}, step=10)
    tracker.log({"eval/exact_match": 0.4}, step=5)  # an earlier step's, measured later
    tracker.log_predictions(ROWS, step=10)
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    tracker.log_adapter(adapter)
    tracker.finish("finished", {"eval_loss": 1.25})
    return folder


@needs_wandb
def test_an_offline_run_ends_with_the_command_that_sends_it_and_a_job_of_a_sweep_does_not(tmp_path: Path) -> None:
    tracker = offline(tmp_path / "my run")
    tracker.finish("finished", {})
    [(label, command)] = tracker.closing_lines()
    assert (label, command) == ("sync", f"WANDB_RESUME=allow wandb sync '{tmp_path}/my run'/wandb/offline-run-*")
    assert [path.name[:12] for path in (tmp_path / "my run" / "wandb").glob("offline-run-*")] == ["offline-run-"]
    job = offline(tmp_path / "job", sweep=SWEEP)
    job.finish("finished", {})
    assert job.closing_lines() == []
    assert NoTracker().closing_lines() == []


@needs_wandb
def test_a_wandb_run_holds_name_project_group_tags_and_the_whole_config(wandb_run: Path) -> None:
    run = wandb_start(wandb_run)
    assert (run.display_name, run.project, run.run_group) == ("my-run", "p", "g")
    assert sorted(run.tags) == ["one", "two"]
    config = wandb_config(run)
    assert config["seed"] == 3
    assert config["lora"] == {"r": 16, "target_modules": ["q_proj"]}
    assert "sweep" not in config


@needs_wandb
def test_wandb_keeps_every_value_with_its_step_even_when_steps_go_back(wandb_run: Path) -> None:
    rows = wandb_history(wandb_records(wandb_run))
    assert [(row["train/loss"], row["global_step"]) for row in rows if "train/loss" in row] == [(1.5, 10)]
    actual = [(row["eval/exact_match"], row["global_step"]) for row in rows if "eval/exact_match" in row]
    assert actual == [(0.5, 10), (0.4, 5)]


@needs_wandb
def test_a_job_of_a_sweep_is_grouped_tagged_and_named_by_what_varies(tmp_path: Path) -> None:
    offline(tmp_path / "job", sweep=SWEEP, tags=["mine"]).finish("finished", {})
    run = wandb_start(tmp_path / "job")
    assert (run.display_name, run.run_group, sorted(run.tags)) == ("lora.r=16 data=alpaca", "ranks", ["mine", "ranks"])
    assert wandb_config(run)["sweep"] == {"lora.r": 16, "data": "alpaca"}  # a number, and the name of a group's option
    long = SweepJob("s" * 200, ["lora.r=16"] * 20)
    offline(tmp_path / "long", sweep=long, group="own").finish("finished", {})
    run = wandb_start(tmp_path / "long")
    assert (run.run_group, list(run.tags), len(run.display_name)) == ("own", ["s" * 64], 128)


AGENT_JOB = """
from pathlib import Path
from qlora.config.schema import TrackingConfig, WandbMode
from qlora.training.trackers import TrackedRun, build_tracker
config = TrackingConfig(backend="wandb", mode=WandbMode.offline, project="ours", entity="us")
build_tracker(config, TrackedRun("job", Path(), {"lora": {"r": 16}})).finish("finished", {"eval_loss": 1.25})
"""


@needs_wandb
def test_an_agent_s_run_keeps_the_id_the_sweep_and_the_values_that_the_agent_chose(tmp_path: Path) -> None:
    chosen = tmp_path / "chosen.yaml"
    chosen.write_text("wandb_version: 1\nlora.r:\n  value: 16\n")
    told = {"SWEEP_ID": "s1", "RUN_ID": "r1", "PROJECT": "theirs", "ENTITY": "them", "SWEEP_PARAM_PATH": str(chosen)}
    done = subprocess.run(
        [sys.executable, "-c", AGENT_JOB],
        cwd=tmp_path,
        env={**os.environ, **{f"WANDB_{name}": value for name, value in told.items()}},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    run = wandb_start(tmp_path)
    assert (run.run_id, run.sweep_id, run.project, run.entity) == ("r1", "s1", "theirs", "them")
    assert wandb_config(run)["lora.r"] == 16
    assert wandb_summary(wandb_records(tmp_path))["eval_loss"] == 1.25
    assert not (tmp_path / RUN_ID_FILE).exists()


def test_the_parent_names_the_sweep_to_a_job_and_the_job_finds_its_own_values(monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["lora.r=16", "+callbacks.x=1", "trainer.max_steps=4"]
    assert SweepJob.from_environment(args) is None
    told = SweepJob.environment("ranks", ["lora.r", "+callbacks.x=2"])
    monkeypatch.setenv(VARIABLE, told[VARIABLE])
    actual = SweepJob.from_environment(args)
    assert actual == SweepJob("ranks", ["lora.r=16", "+callbacks.x=1"])
    assert actual.label == "lora.r=16 callbacks.x=1"
    assert actual.values({"lora.r": 16}) == {"lora.r": 16, "callbacks.x": "1"}


@needs_wandb
def test_a_resumed_run_sends_no_metric_twice_and_its_rows_continue(tmp_path: Path) -> None:
    first = offline(tmp_path)
    for step in (1, 2, 3):
        first.log({"train/loss": 1 / step}, step)
    first.log_predictions(ROWS, 2)
    first.finish("failed", {})
    second = offline(tmp_path)  # from a checkpoint of step 1; the evaluation of step 3 was not reached before
    for step in (2, 3, 4):
        second.log({"train/loss": 1 / step}, step)
        second.log_predictions(ROWS, step)
    second.log({"eval/loss": 0.5}, 3)
    second.finish("finished", {})
    rows = wandb_history(wandb_records(tmp_path, ends=2))
    assert [row["global_step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
    assert [row["global_step"] for row in rows if "predictions/nrows" in row] == [2, 3, 4]
    assert [row["global_step"] for row in rows if "eval/loss" in row] == [3]
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    assert len(Sent(tmp_path, "wandb").rows) == len(rows)


KILLED_JOB = """
import os, signal, sys, time
from pathlib import Path
from qlora.config.schema import TrackingConfig, WandbMode
from qlora.training.trackers import TrackedRun, build_tracker
config = TrackingConfig(backend=sys.argv[1], mode=WandbMode.offline)
tracker = build_tracker(config, TrackedRun("job", Path(), {"seed": 3}))
for step in range(1, 401):
    tracker.log({"train/loss": 1 / step}, step)
time.sleep(1)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.full
@pytest.mark.parametrize("backend", ["wandb", "tensorboard"])
def test_what_a_killed_run_had_not_written_is_sent_again(backend: str, tmp_path: Path) -> None:
    pytest.importorskip(backend)
    command = [sys.executable, "-c", KILLED_JOB, backend]
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGKILL, "", "")
    again = tracker_for(tmp_path, backend, mode=WandbMode.offline)
    history = [{"loss": 1 / step, "step": step} for step in range(1, 401)]
    state = SimpleNamespace(log_history=history, num_input_tokens_seen=0, is_world_process_zero=True)
    TrackerCallback(again).on_train_begin(None, state, None)
    again.finish("finished", {})
    if backend == "wandb":
        rows = wandb_history(wandb_records(tmp_path))
        assert [row["_step"] for row in rows] == list(range(400))
        steps = [row["global_step"] for row in rows]
    else:
        steps = [event.step for event in read_events(tmp_path).Scalars("train/loss")]
    assert steps == list(range(1, 401))


def test_a_line_that_was_cut_off_costs_that_line_only(tmp_path: Path) -> None:
    sent = Sent(tmp_path, "wandb")
    sent.begin("first")
    sent.add(["a"], 1)
    file = tmp_path / "wandb_sent.jsonl"
    file.write_text(file.read_text() + '\n{"step": 2, "na')
    sent = Sent(tmp_path, "wandb")
    assert (sent.rows, sent.last_start) == ([(1, ["a"])], ("first", 0))
    sent.add(["b"], 3)
    sent = Sent(tmp_path, "wandb")
    assert sent.rows == [(1, ["a"]), (3, ["b"])]
    assert (sent.has("b", 2), sent.has("b", 4), sent.has("a", 1)) == (True, False, True)
    sent.keep(1)
    assert Sent(tmp_path, "wandb").rows == [(1, ["a"])]
    assert not sent.has("b", 2)


@needs_wandb
def test_what_does_not_resume_is_sent_each_time(tmp_path: Path) -> None:
    for _ in range(2):
        tracker = offline(tmp_path, resumes=False)
        tracker.log({"eval/loss": 0.5}, 0)
        tracker.finish("finished", {})
    rows = wandb_history(wandb_records(tmp_path, ends=2))
    assert [(row["eval/loss"], row["_step"]) for row in rows] == [(0.5, 0), (0.5, 1)]


@needs_wandb
def test_wandb_draws_every_metric_over_the_optimizer_step(wandb_run: Path) -> None:
    metrics = [record.metric for record in wandb_records(wandb_run) if record.WhichOneof("record_type") == "metric"]
    assert any(metric.glob_name == "*" and metric.step_metric == "global_step" for metric in metrics)


@needs_wandb
def test_wandb_predictions_are_a_table(wandb_run: Path) -> None:
    (path,) = wandb_run.glob("wandb/offline-run-*/files/media/table/*.table.json")
    table = json.loads(path.read_text())
    assert table["columns"] == ["step", "prompt", "reference", "prediction", "match"]
    assert table["data"][1] == [10, "Why?", "so", "no", "no"]


@needs_wandb
def test_wandb_summary_and_exit_code_tell_how_it_ended(wandb_run: Path) -> None:
    records = wandb_records(wandb_run)
    summary = wandb_summary(records)
    assert summary["eval_loss"] == 1.25
    assert summary["status"] == "finished"
    assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [0]


@needs_wandb
def test_the_adapter_is_an_artifact_when_asked_for(wandb_run: Path) -> None:
    records = wandb_records(wandb_run)
    logged = [
        r.request.log_artifact.artifact for r in records if r.request.WhichOneof("request_type") == "log_artifact"
    ]
    logged += [record.artifact for record in records if record.WhichOneof("record_type") == "artifact"]
    (adapter,) = [artifact for artifact in logged if artifact.type == "adapter"]
    assert [entry.path for entry in adapter.manifest.contents] == ["adapter_config.json"]


@needs_wandb
def test_a_failed_run_resumes_under_its_id_prints_nothing_and_draws_no_random_number(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    random.seed(0)
    torch.manual_seed(0)
    previous = random.getstate(), torch.get_rng_state()
    stdout = sys.stdout
    tracker = offline(tmp_path)
    assert sys.stdout is stdout
    tracker.log({"train/loss": 1.0}, step=1)
    tracker.log_adapter(tmp_path)  # not asked for
    tracker.finish("failed", {})
    tracker.finish("failed", {})
    first = (tmp_path / RUN_ID_FILE).read_text()
    offline(tmp_path).finish("finished", {})
    assert (tmp_path / RUN_ID_FILE).read_text() == first
    assert random.getstate() == previous[0]
    assert torch.equal(torch.get_rng_state(), previous[1])
    records = wandb_records(tmp_path, ends=2)
    runs = [record.run.run_id for record in records if record.WhichOneof("record_type") == "run"]
    assert set(runs) == {first}
    exits = [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"]
    assert sorted(exits) == [0, 1]
    assert not any(record.WhichOneof("record_type") == "artifact" for record in records)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


@needs_wandb
@pytest.mark.parametrize(("key", "part"), [(None, "nobody is logged in"), ("short", "the wandb login is unusable")])
def test_wandb_online_without_a_login_names_the_ways_out(
    key: str | None, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    with pytest.raises(UserError) as error:
        tracker_for(tmp_path / "run", "wandb")
    for way in (part, "wandb login", "WANDB_API_KEY", "tracking.mode=offline"):
        assert way in str(error.value)


@needs_wandb
def test_the_environment_may_take_an_online_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker_for(tmp_path, "wandb").finish("finished", {})
    assert wandb_records(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [("WANDB_DISABLED", "true"), ("WANDB_DISABLED", "1"), ("WANDB_MODE", "disabled"), ("", "")]
)
def test_a_disabled_tracker_is_none_and_needs_no_package(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    if name:
        monkeypatch.setenv(name, value)
    backends = ["wandb"] if name else ["none", *TRACKERS]
    for backend in backends:
        mode = WandbMode.offline if name else WandbMode.disabled
        assert isinstance(tracker_for(tmp_path, backend, mode=mode), NoTracker)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("backend", "module"),
    [
        *(("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard.writer")),
        *(("mlflow", "mlflow"), ("trackio", "trackio")),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(
    backend: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"tracking={backend} needs .* pip install 'qlora\[{backend}\]'"):
        tracker_for(tmp_path, backend, mode=WandbMode.offline)


def test_no_backend_and_later_processes_track_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(tracker_for(tmp_path, "none"), NoTracker)
    monkeypatch.setenv("RANK", "1")
    assert isinstance(offline(tmp_path), NoTracker)
    assert list(tmp_path.iterdir()) == []


def read_events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


@needs_tensorboard
def test_tensorboard_events_can_be_read_back(tmp_path: Path) -> None:
    tracker = tracker_for(tmp_path, "tensorboard")
    tracker.log({"train/loss": 1.5}, step=10)
    tracker.log({"train/loss": 1.0}, step=20)
    tracker.log_predictions(ROWS, step=20)
    tracker.log_adapter(tmp_path)
    tracker.finish("finished", {"eval_loss": 1.25})
    events = read_events(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 1.5), (20, 1.0)]
    texts = {tag: events.Tensors(tag)[0] for tag in events.Tags()["tensors"]}
    content = {tag: event.tensor_proto.string_val[0].decode() for tag, event in texts.items()}
    assert '"r": 16' in content["config/text_summary"]
    assert "| What \\| is<br>it? | tea | tea | yes |" in content["predictions/text_summary"]
    assert '"eval_loss": 1.25' in content["summary/text_summary"]


@pytest.mark.full
@needs_tensorboard
def test_a_resumed_run_writes_no_scalar_twice(tmp_path: Path) -> None:
    for steps in ((1, 2, 3), (2, 3, 4)):
        tracker = tracker_for(tmp_path, "tensorboard")
        for step in steps:
            tracker.log({"train/loss": 1 / step}, step)
        tracker.finish("failed" if 1 in steps else "finished", {})
        time.sleep(1.1)  # event files are named by the second
    assert [event.step for event in read_events(tmp_path).Scalars("train/loss")] == [1, 2, 3, 4]


@needs_tensorboard
@pytest.mark.parametrize(
    ("sweep", "expected"),
    [(SWEEP, {"lora.r": 16.0, "data": "alpaca"}), (None, {"lora.r": 16.0, "data.name": "alpaca", "seed": 3.0})],
)
def test_a_run_is_a_line_of_tensorboard_s_hparams_page(
    tmp_path: Path, sweep: SweepJob | None, expected: dict[str, Any]
) -> None:
    from google.protobuf.json_format import MessageToDict
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    tracker = tracker_for(tmp_path, "tensorboard", sweep=sweep)
    tracker.log({"train/loss": 1.5}, step=10)
    tracker.finish("finished", {"eval_loss": 1.25, "eval_mmlu_val_accuracy_physics": 0.5})
    assert {path.parent for path in tmp_path.rglob("*tfevents*")} == {tmp_path / "tensorboard"}  # no run of its own
    events = read_events(tmp_path)
    actual = {tag: HParamsPluginData.FromString(text) for tag, text in events.PluginTagToContent("hparams").items()}
    start = MessageToDict(actual["_hparams_/session_start_info"].session_start_info)
    assert start["hparams"] == expected
    experiment = actual["_hparams_/experiment"].experiment
    assert [metric.name.tag for metric in experiment.metric_infos] == ["hparam/eval_loss"]
    assert [(event.step, event.value) for event in events.Scalars("hparam/eval_loss")] == [(10, 1.25)]
    assert actual["_hparams_/session_end_info"].session_end_info.status == 1  # success


@needs_tensorboard
def test_a_failed_run_is_no_line_of_tensorboard_s_hparams_page(tmp_path: Path) -> None:
    tracker_for(tmp_path, "tensorboard").finish("failed", {"eval_loss": 1.25})
    with pytest.raises(KeyError):
        read_events(tmp_path).PluginTagToContent("hparams")


class Recorder(Tracker):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int]] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((metrics, step))


def test_what_the_trainer_logs_gets_its_place() -> None:
    recorder = Recorder()
    callback = TrackerCallback(recorder)
    state = SimpleNamespace(global_step=0, num_input_tokens_seen=100, is_world_process_zero=True, log_history=[])
    callback.on_train_begin(None, state, None)
    state.global_step = 10
    logs = {"loss": 1.5, "grad_norm": 0.5, "learning_rate": 2e-4, "epoch": 0.1, "num_input_tokens_seen": 300}
    logs |= {"train_tokens_per_second": 7.0, "train_mfu": 0.4, "train_data_wait": 0.1, "peak_memory_gb": 2.5}
    callback.on_log(None, state, None, logs={**logs, "train_runtime": 3.0})
    callback.on_log(
        None, state, None, logs={"eval_loss": 0.0, "eval_exact_match": 0.5, "eval_runtime": 9.0, "epoch": 1}
    )
    callback.on_log(None, state, None, logs={"base_eval_loss": 0.0})
    callback.on_log(None, state, None, logs={"train_runtime": 3.0, "train_loss": 1.0, "total_flos": 1.0})
    (train, step), (evaluation, _), (base, _) = recorder.logged
    assert step == 10
    assert train == {
        "train/loss": 1.5,
        "train/grad_norm": 0.5,
        "train/learning_rate": 2e-4,
        "train/epoch": 0.1,
        "train/tokens_seen": 300.0,
        "train/tokens_per_second": 7.0,
        "train/mfu": 0.4,
        "train/data_wait": 0.1,
        "train/peak_memory_gb": 2.5,
    }
    assert evaluation == {"eval/loss": 0.0, "eval/perplexity": 1.0, "eval/exact_match": 0.5}
    assert base == {"base/loss": 0.0, "base/perplexity": 1.0}


MLFLOW_JOB = """
import os
import sys
from pathlib import Path
from qlora.runtime.sweep_job import SweepJob
from qlora.config.schema import TrackingConfig
from qlora.training.trackers import TrackedRun, build_tracker
name, *starts = sys.argv[1:]
folder = Path(name)
folder.mkdir(exist_ok=True)
plain = {"seed": 3, "lora": {"r": 16}, "trusted": ["x" * 7000]}
run = TrackedRun(name, folder, plain, SweepJob("ranks", [f"lora.r={name}", "data=alpaca"]))
uri = os.environ.get("SERVER")
config = TrackingConfig(backend="mlflow", project="p", tags=["mine"], log_adapter=True, uri=uri)
for steps in starts:
    tracker = build_tracker(config, run)
    for step in map(int, steps):
        tracker.log({"train/loss": 1 / step, "eval/odd, name": 2.0}, step)
        tracker.log_predictions([{"prompt": "Why?", "reference": "so", "prediction": "no", "match": "no"}], step)
    if "4" not in steps:
        tracker.finish("failed", {})
(folder / "adapter").mkdir(exist_ok=True)
(folder / "adapter" / "adapter_config.json").write_text("{}")
tracker.log_adapter(folder / "adapter")
tracker.finish("finished", {"eval_loss": 1.25})
"""


@pytest.fixture(scope="module")
def mlflow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two jobs that begin at the same time where there is no database yet; one of them fails and resumes."""
    for package in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("mlflow")

    def start(*args: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", MLFLOW_JOB, *args]
        return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    for process in (start("8", "123", "234"), start("16", "4")):
        output, _ = process.communicate(timeout=120)
        assert (process.returncode, output) == (0, "")
    return folder


@pytest.mark.full
def test_mlflow_runs_of_a_sweep_can_be_read_back(mlflow_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(mlflow_folder)
    client = MlflowClient(tracking_uri="sqlite:///outputs/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("p")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"ranks", "lora.r=8 data=alpaca", "lora.r=16 data=alpaca"}
    run, parent = runs["lora.r=8 data=alpaca"], runs.pop("ranks").info.run_id
    assert {job.data.tags["mlflow.parentRunId"] for job in runs.values()} == {parent}
    assert run.info.status == "FINISHED"
    long = "7,004 characters, in the artifact params/trusted.txt"
    assert run.data.params == {"seed": "3", "lora.r": "16", "data": "alpaca", "trusted": long}
    [text] = (mlflow_folder / "outputs/mlflow/artifacts").glob(f"{run.info.run_id}/artifacts/params/trusted.txt")
    assert text.read_text() == f"['{'x' * 7000}']"
    assert {key: run.data.tags[key] for key in ("group", "mine", "ranks", "status")} == {
        "group": "ranks", "mine": "true", "ranks": "true", "status": "finished",
    }  # fmt: skip
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((item.step, item.value) for item in losses) == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    assert run.data.metrics["eval_loss"] == 1.25
    assert run.data.metrics["eval/odd_ name"] == 2.0
    assert [item.path for item in client.list_artifacts(run.info.run_id, "adapter")] == ["adapter/adapter_config.json"]
    [table] = (mlflow_folder / "outputs/mlflow/artifacts").glob(f"{run.info.run_id}/artifacts/predictions.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["step", "prompt", "reference", "prediction", "match"]
    assert [row[0] for row in content["data"]] == [1, 2, 3, 4]


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[str]:
    """The address of a server of its own; `QLORA_TEST_MLFLOW` is a Python that has the whole package."""
    pytest.importorskip("mlflow")
    python = os.environ.get("QLORA_TEST_MLFLOW", sys.executable)
    if subprocess.run([python, "-c", "import flask, mlflow.server"], capture_output=True).returncode != 0:
        pytest.skip("the package mlflow with its server is not installed (mlflow-skinny has none)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", str(tmp_path)]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
    try:
        end = time.monotonic() + 240
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.full
def test_a_job_resumes_in_its_run_on_a_server_below_the_run_of_its_sweep(tmp_path: Path, mlflow_server: str) -> None:
    from mlflow import MlflowClient

    environment = os.environ | {"SERVER": mlflow_server}
    folder = tmp_path / "ranks"
    folder.mkdir()
    for starts in (["123"], ["234"]):
        command = [sys.executable, "-c", MLFLOW_JOB, "8", *starts]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    client = MlflowClient(tracking_uri=mlflow_server)
    experiment = client.get_experiment_by_name("p")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"ranks", "lora.r=8 data=alpaca"}
    job = runs["lora.r=8 data=alpaca"]
    assert job.data.tags["mlflow.parentRunId"] == runs["ranks"].info.run_id
    assert [item.path for item in client.list_artifacts(job.info.run_id, "params")] == ["params/trusted.txt"]
    assert [entry.step for entry in client.get_metric_history(job.info.run_id, "train/loss")] == [1, 2, 3, 4]


def test_a_run_that_is_gone_from_mlflow_begins_anew(mlflow_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(mlflow_folder)
    folder = mlflow_folder / "gone"
    folder.mkdir()
    (folder / "mlflow_run_id.txt").write_text("0" * 32)
    Sent(folder, "mlflow").add(["train/loss"], 5)
    tracker = tracker_for(folder, "mlflow", project="q")
    tracker.log({"train/loss": 1.0}, 5)
    tracker.finish("finished", {})
    client = MlflowClient(tracking_uri="sqlite:///outputs/mlflow/mlflow.db")
    run = client.get_run((folder / "mlflow_run_id.txt").read_text())
    assert (run.info.run_name, run.data.metrics["train/loss"]) == ("my-run", 1.0)


def test_an_address_that_mlflow_cannot_use_is_named(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    with pytest.raises(
        UserError, match=r"tracking=mlflow: bad://place cannot be used .*name another database or server with"
    ):
        tracker_for(tmp_path, "mlflow", uri="bad://place")


def test_trackio_runs_of_a_sweep_can_be_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    for steps in ((1, 2, 3), (2, 3, 4)):
        tracker = tracker_for(tmp_path, "trackio", sweep=SWEEP, project="p")
        for step in steps:
            tracker.log({"train/loss": 1 / step}, step)
            tracker.log_predictions(ROWS, step)
        tracker.finish("finished", {"eval_loss": 1.25})
    name = "lora.r=16 data=alpaca (ranks)"
    assert SQLiteStorage.get_runs("p") == [name]
    rows = SQLiteStorage.get_logs("p", name)
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "predictions" in row] == [1, 2, 3, 4]
    assert [(row["eval_loss"], row["status"]) for row in rows if "status" in row][-1] == (1.25, "finished")
    config = SQLiteStorage.get_run_config("p", name)
    assert config is not None
    assert {key: config[key] for key in ("lora.r", "data")} == {"lora.r": 16, "data": "alpaca"}
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
