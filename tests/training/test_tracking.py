"""Trackers: what was logged can be read back from the files they write."""

import importlib.util
import json
import random
import struct
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora.errors import ConfigError
from qlora.schema import TrackingBackend, TrackingConfig, WandbMode
from qlora.training.tracking import RUN_ID_FILE, NoTracker, Tracker, TrackerCallback, build_tracker

ROWS = [
    {"prompt": "What | is\nit?", "reference": "tea", "prediction": "tea", "match": "yes"},
    {"prompt": "Why?", "reference": "so", "prediction": "no", "match": "no"},
]
RUN_CONFIG = {"seed": 3, "lora": {"r": 16, "target_modules": ["q_proj"]}}
needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
needs_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="no tensorboard")


def tracker_for(folder: Path, backend: TrackingBackend, **options: Any) -> Tracker:
    config = TrackingConfig(backend=backend, **options)
    return build_tracker(config, name="my-run", run_config=RUN_CONFIG, output_dir=folder)


def offline(folder: Path, **options: Any) -> Tracker:
    return tracker_for(folder, TrackingBackend.wandb, mode=WandbMode.offline, **options)


def wandb_records(folder: Path) -> list[Any]:
    """Reads the records of a finished offline run; wandb's own process may still be writing the last of them."""
    deadline = time.monotonic() + 60
    while True:
        records = read_records(folder)
        ended = any(record.WhichOneof("record_type") == "exit" for record in records)
        if ended or time.monotonic() > deadline:
            return records
        time.sleep(0.2)


def read_records(folder: Path) -> list[Any]:
    """Reads LevelDB's log format (blocks of 32 KiB) after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        raw, place, buffer = path.read_bytes(), 7, b""
        while place + 7 <= len(raw):
            if (rest := 32768 - place % 32768) < 7:
                place += rest
                continue
            size, kind = struct.unpack("<HB", raw[place + 4 : place + 7])
            buffer += raw[place + 7 : place + 7 + size]
            place += 7 + size
            if kind in (1, 4):  # whole, or the last piece
                records.append(Record.FromString(buffer))
                buffer = b""
    return records


def wandb_history(records: list[Any]) -> list[dict[str, Any]]:
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def wandb_summary(records: list[Any]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for record in records:
        for item in record.summary.update:
            summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return summary


@pytest.fixture(scope="module")
def wandb_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("wandb-run")
    tracker = offline(folder, project="p", group="g", tags=["one", "two"], log_adapter=True)
    tracker.log({"train/loss": 1.5}, step=10)
    tracker.log({"eval/loss": 1.25, "eval/exact_match": 0.5}, step=10)
    tracker.log({"train/loss": 1.4}, step=5)  # a resumed run goes back
    tracker.log_predictions(ROWS, step=10)
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    tracker.log_adapter(adapter)
    tracker.finish("finished", {"eval_loss": 1.25})
    return folder


@needs_wandb
def test_a_wandb_run_holds_name_project_group_tags_and_the_whole_config(wandb_run: Path) -> None:
    run = next(record.run for record in wandb_records(wandb_run) if record.WhichOneof("record_type") == "run")
    assert (run.display_name, run.project, run.run_group) == ("my-run", "p", "g")
    assert sorted(run.tags) == ["one", "two"]
    config = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in run.config.update}
    assert config["seed"] == 3
    assert config["lora"] == {"r": 16, "target_modules": ["q_proj"]}


@needs_wandb
def test_wandb_keeps_every_value_with_its_step_even_when_steps_go_back(wandb_run: Path) -> None:
    rows = wandb_history(wandb_records(wandb_run))
    assert [(row["train/loss"], row["global_step"]) for row in rows if "train/loss" in row] == [(1.5, 10), (1.4, 5)]
    assert [row["eval/exact_match"] for row in rows if "eval/exact_match" in row] == [0.5]


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
def test_a_failed_run_goes_on_under_its_id_prints_nothing_and_draws_no_random_number(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    random.seed(0)
    torch.manual_seed(0)
    before = random.getstate(), torch.get_rng_state()
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
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    records = wandb_records(tmp_path)
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
    with pytest.raises(ConfigError) as error:
        tracker_for(tmp_path / "run", TrackingBackend.wandb)
    for way in (part, "wandb login", "WANDB_API_KEY", "tracking.mode=offline"):
        assert way in str(error.value)


@needs_wandb
def test_the_environment_may_take_an_online_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker_for(tmp_path, TrackingBackend.wandb).finish("finished", {})
    assert wandb_records(tmp_path)


@pytest.mark.parametrize(("backend", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard.writer")])
def test_a_missing_package_is_named_with_its_remedy(
    backend: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"tracking={backend} needs .* pip install 'qlora\[{backend}\]'"):
        tracker_for(tmp_path, TrackingBackend(backend), mode=WandbMode.offline)


def test_no_backend_and_later_processes_track_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(tracker_for(tmp_path, TrackingBackend.none), NoTracker)
    monkeypatch.setenv("RANK", "1")
    assert isinstance(offline(tmp_path), NoTracker)
    assert list(tmp_path.iterdir()) == []


@needs_tensorboard
def test_tensorboard_events_can_be_read_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = tracker_for(tmp_path, TrackingBackend.tensorboard)
    tracker.log({"train/loss": 1.5}, step=10)
    tracker.log({"train/loss": 1.0}, step=20)
    tracker.log_predictions(ROWS, step=20)
    tracker.log_adapter(tmp_path)
    tracker.finish("finished", {"eval_loss": 1.25})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 1.5), (20, 1.0)]
    texts = {tag: events.Tensors(tag)[0] for tag in events.Tags()["tensors"]}
    content = {tag: event.tensor_proto.string_val[0].decode() for tag, event in texts.items()}
    assert '"r": 16' in content["config/text_summary"]
    assert "| What \\| is<br>it? | tea | tea | yes |" in content["predictions/text_summary"]
    assert '"eval_loss": 1.25' in content["summary/text_summary"]


class Recorder(Tracker):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int]] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((metrics, step))


def test_what_the_trainer_logs_gets_its_place() -> None:
    recorder = Recorder()
    callback = TrackerCallback(recorder)
    state = SimpleNamespace(global_step=0, num_input_tokens_seen=100, is_world_process_zero=True)
    callback.on_train_begin(None, state, None)
    callback.on_step_begin(None, state, None)
    callback.on_step_end(None, state, None)
    state.global_step = 10
    logs = {"loss": 1.5, "grad_norm": 0.5, "learning_rate": 2e-4, "epoch": 0.1, "num_input_tokens_seen": 300}
    callback.on_log(None, state, None, logs={**logs, "train_runtime": 3.0, "train_tokens_per_second": 7.0})
    callback.on_log(
        None, state, None, logs={"eval_loss": 0.0, "eval_exact_match": 0.5, "eval_runtime": 9.0, "epoch": 1}
    )
    callback.on_log(None, state, None, logs={"base_eval_loss": 0.0})
    callback.on_log(None, state, None, logs={"train_runtime": 3.0, "train_loss": 1.0, "total_flos": 1.0})
    (train, step), (evaluation, _), (base, _) = recorder.logged
    assert step == 10
    assert train.pop("train/tokens_per_second") > 0
    train.pop("train/gpu_memory_gb", None)
    assert train == {
        "train/loss": 1.5,
        "train/grad_norm": 0.5,
        "train/learning_rate": 2e-4,
        "train/epoch": 0.1,
        "train/tokens_seen": 300.0,
    }
    assert evaluation == {"eval/loss": 0.0, "eval/perplexity": 1.0, "eval/exact_match": 0.5}
    assert base == {"base/loss": 0.0, "base/perplexity": 1.0}
