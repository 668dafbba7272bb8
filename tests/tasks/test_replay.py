"""`task=replay`: the same seed gives the same bits on a CPU, and what is not the same is found and named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.config.arguments import read_arguments
from qlora.config.command import ComposedCommand
from qlora.config.compose import compose, compose_dict
from qlora.config.conversion import to_config
from qlora.config.saved_config import config_to_dict, read_config, restore_config
from qlora.config.schema import Config
from qlora.errors import Stopped, UserError
from qlora.run import Run
from qlora.runtime.determinism import WORKSPACE, deterministic
from qlora.runtime.run_folder import RunFolder, config_digest
from qlora.tasks import build_job, compare_runs, needs_of, run_job, train
from qlora.tasks.compare_runs import Verdict
from qlora.tasks.protocol import TaskJob
from qlora.tasks.start import Command, join

QUICK = [
    *("lora.r=4", "trainer.max_steps=3", "trainer.per_device_train_batch_size=4", "trainer.logging_steps=1"),
    *("trainer.eval_steps=null", "trainer.lr_scheduler_kwargs.num_decay_steps=1", "trainer.warmup_steps=1"),
    *("data.max_eval_samples=8", "data.max_train_samples=32", "generation.max_new_tokens=4", "device=cpu"),
    *("trainer.deterministic=true", "name=first"),
]


FILE = Path("run/config.yaml")


def replay(config: Config, folder: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    return run_job(build_job(config, folder, overrides)).to_dict()


Pair = tuple[Path, Path, dict[str, Any]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A training, its replay, and what that said."""
    folder = tmp_path_factory.mktemp("replay")
    Run(compose(QUICK), folder / "first", QUICK).train()
    said = replay(compose(["task=replay", f"run={folder}/first"]), folder / "second")
    return folder / "first", folder / "second", said


def verdicts(first: Path, second: Path) -> dict[str, Verdict]:
    return {
        comparison.what: comparison.verdict for comparison in compare_runs.compare(RunFolder(first), RunFolder(second))
    }


def test_the_same_seed_gives_the_same_bits(pair: Pair) -> None:
    first, second, said = pair
    assert said["metrics"] == {"replay_same": 8, "replay_near": 0, "replay_differs": 0}
    assert set(verdicts(first, second).values()) == {Verdict.same}
    assert json.loads((second / "replay.json").read_text())["comparisons"] == said["comparisons"]
    a, b = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (first, second))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_manifest_holds_all_that_is_needed_to_repeat_a_run(pair: Pair) -> None:
    first, second, _ = pair
    manifest, again = (json.loads((folder / "manifest.json").read_text()) for folder in (first, second))
    assert manifest["overrides"] == QUICK
    assert manifest["config_hash"] == config_digest(config_to_dict(compose(QUICK)))
    assert manifest["seeds"] == {"seed": 0, "data.split_seed": 42}
    assert manifest["packages"]["torch"] == metadata.version("torch")
    assert manifest["model"]["fingerprint"] == again["model"]["fingerprint"]
    assert len(manifest["model"]["fingerprint"]) == 64
    [start] = manifest["starts"]
    assert start["status"] == "finished"
    assert start["wall_seconds"] > 0
    assert start["peak_memory_gb"] > 0
    if not torch.cuda.is_available():
        assert (start["gpu_energy_wh"], start["gpu_energy"]) == (None, "not told here")


def edit(file: Path, change: Callable[[Any], None]) -> None:
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


def test_every_kind_of_difference_is_found(pair: Pair, tmp_path: Path) -> None:
    first, second, _ = pair

    def changed(change: Callable[[Path], None]) -> dict[str, Verdict]:
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(second, folder)
        change(folder)
        return {what: verdict for what, verdict in verdicts(first, folder).items() if verdict is not Verdict.same}

    def one_bit(folder: Path) -> None:
        file = folder / "adapter" / "adapter_model.safetensors"
        tensors = load_file(file)
        name = min(tensors)
        tensors[name].view(torch.int32).view(-1)[0] ^= 1
        save_file(tensors, file)

    assert changed(one_bit) == {"adapter": Verdict.differs}
    loss = {"losses": Verdict.differs}
    assert changed(lambda folder: edit(folder / "history.json", lambda rows: rows[0].update(loss=1.0))) == loss
    assert changed(lambda folder: edit(folder / "history.json", lambda rows: rows.pop())) == loss
    assert changed(lambda folder: edit(folder / "history.json", lambda rows: rows[0].update(tokens_per_second=9))) == {}
    metric = changed(lambda folder: edit(folder / "result.json", lambda tree: tree["metrics"].update(eval_loss=1e9)))
    assert metric == {"metrics": Verdict.differs, "held-out loss": Verdict.differs}
    rows = changed(
        lambda folder: edit(folder / "manifest.json", lambda tree: tree["data"].update(fingerprint="0" * 16))
    )
    assert rows == {"rows": Verdict.differs}
    seed = changed(lambda folder: edit(folder / "manifest.json", lambda tree: tree["config"].update(seed=1)))
    assert seed == {"config": Verdict.differs}
    assert changed(lambda folder: (folder / "predictions.jsonl").write_text("")) == {"answers": Verdict.differs}


def test_other_bits_are_accepted_of_another_machine_only(pair: Pair, tmp_path: Path) -> None:
    first, second, _ = pair
    shutil.copytree(second, tmp_path / "other")
    edit(tmp_path / "other" / "manifest.json", lambda tree: tree["hardware"].update(cpu="another"))
    edit(tmp_path / "other" / "history.json", lambda rows: rows[0].update(loss=1.0))
    result = verdicts(first, tmp_path / "other")
    assert result["machine"] is result["losses"] is Verdict.near
    assert result["adapter"] is Verdict.same


def test_what_differs_ends_in_an_error_that_names_it(pair: Pair, tmp_path: Path) -> None:
    first, second, _ = pair
    shutil.copytree(first, tmp_path / "first")
    shutil.copytree(second, tmp_path / "second")
    edit(tmp_path / "first" / "history.json", lambda rows: rows[0].update(loss=1.0))
    with pytest.raises(UserError, match=r"task=replay: losses: not what .* \(first at step 1: loss was 1\.0"):
        replay(compose(["task=replay", f"run={tmp_path}/first"]), tmp_path / "second")


def test_a_folder_without_a_finished_training_is_refused(tmp_path: Path, pair: Pair) -> None:
    with pytest.raises(UserError, match="holds no finished training"):
        replay(compose(["task=replay", f"run={tmp_path}"]), tmp_path / "again")
    with pytest.raises(UserError, match="in its own folder"):
        replay(compose(["task=replay", f"run={pair[0]}"]), pair[0])


def test_a_stored_config_is_restored_whole(pair: Pair) -> None:
    saved = read_config(pair[0] / "config.yaml")
    assert saved is not None
    assert restore_config(saved, FILE) == compose(QUICK)
    mixed = compose(["data=mix", "data.mix.a=a.jsonl", "data.mix.b.path=b.jsonl", "data.mix.b.weight=2"])
    assert restore_config(config_to_dict(mixed), FILE) == mixed
    with pytest.raises(UserError, match=r"unknown key 'lora\.rank'"):
        restore_config({**saved, "lora": {**saved["lora"], "rank": 3}}, FILE)


def test_deterministic_algorithms_are_taken_inside_the_run_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)
    config = compose(["trainer.deterministic=true", "trainer.memory_budget=null"]).trainer
    with deterministic(config):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic
        assert torch._inductor.config.deterministic
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch._inductor.config.deterministic
    with deterministic(compose([]).trainer):
        assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_without_a_deterministic_form_is_one_sentence() -> None:
    config = compose(["trainer.deterministic=true"]).trainer
    with (
        pytest.raises(UserError, match=r"trainer.deterministic=true: put_ does not have a deterministic"),
        deterministic(config),
    ):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    with pytest.raises(RuntimeError, match="other"), deterministic(config):
        raise RuntimeError("other")


def test_a_cuda_that_is_at_work_already_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UserError, match=WORKSPACE), deterministic(compose(["trainer.deterministic=true"]).trainer):
        pass
    with pytest.raises(UserError, match=r"trainer.memory_budget"):
        compose(["trainer.deterministic=true", "trainer.memory_budget=auto"])


@pytest.mark.parametrize("chosen", ["trainer.deterministic=true", "task=replay"])
def test_the_workspace_is_chosen_before_anything_can_start_cuda(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)
    composed = compose_dict([chosen, "run=x"] if chosen == "task=replay" else [chosen])
    config = to_config(composed)
    checked = ComposedCommand(composed, composed, config)
    join(Command(read_arguments([chosen]), checked, needs_of(config)))
    assert os.environ.pop(WORKSPACE) == ":4096:8"


def test_an_interrupted_replay_says_how_to_resume_the_replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(training: train.Training) -> None:
        raise Stopped("stopped")

    monkeypatch.setattr(train.Training, "lead", stop)
    config, folder = compose(QUICK), RunFolder(tmp_path / "second")
    command = ["task=replay", f"run={tmp_path}/first", "resume=auto"]
    with pytest.raises(Stopped) as stopped:
        train.run(TaskJob(config, folder, ["lora.r=4"], None, train.needs(config), command=command))
    assert str(stopped.value).endswith(f"qlora task=replay run={tmp_path}/first hydra.run.dir={tmp_path}/second")


@pytest.mark.parametrize(
    "typed", ["model.name=other", "model=llama-7b", "+data.columns.output=x", "seed=3", "device=cpu"]
)
def test_a_key_that_a_replay_would_not_read_is_refused(tmp_path: Path, typed: str) -> None:
    with pytest.raises(UserError) as error:
        replay(compose(["task=replay", "run=first"]), tmp_path, ["task=replay", "run=first", "name=x", typed])
    assert str(error.value) == (
        f"{typed} would not be read: task=replay trains with the saved config of run=first; leave it out, or train "
        "without task=replay (a replay reads name, tracking, resume, base alone)"
    )


@pytest.mark.parametrize("name", ["config.yaml", "manifest.json", "result.json"])
def test_a_damaged_file_of_the_training_is_named(pair: Pair, tmp_path: Path, name: str) -> None:
    shutil.copytree(pair[0], tmp_path / "first")
    (tmp_path / "first" / name).write_text('{"half')
    with pytest.raises(UserError, match=f"first/{name} is damaged"):
        replay(compose(["task=replay", f"run={tmp_path}/first"]), tmp_path / "second")
    assert not (tmp_path / "second").exists()
