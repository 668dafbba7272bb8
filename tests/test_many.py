"""Trainings in several processes: what one alone would have trained, in one folder that the first process writes.

Run as a script, this file is one of the processes.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from qlora.config.compose import compose
from qlora.errors import Stopped, UserError
from qlora.models.fingerprint import read_run_base
from qlora.run import Run
from qlora.runtime import distributed
from qlora.runtime.run_folder import RunFolder
from qlora.tasks import build_job, run_job
from qlora.training import checkpoint_writer
from qlora.training.trainer import QLoraTrainer
from tests.faults.runs import write_preferences
from tests.models.bases import write

ROOT = Path(__file__).parents[1]

COMMON = [
    *("quantization.compute_dtype=fp32", "lora.r=4", "lora.dropout=0.0", "trainer.logging_steps=1"),
    *("trainer.per_device_train_batch_size=3", "trainer.lr_scheduler_type=constant", "trainer.warmup_steps=0"),
    *("recipe=none", "trainer.optim=adamw_torch", "trainer.learning_rate=1e-3", "trainer.max_grad_norm=1.0"),
    *("trainer.max_steps=null", "trainer.num_train_epochs=2", "trainer.eval_steps=3", "trainer.save_steps=null"),
    *("trainer.gradient_checkpointing=false", "data.max_train_samples=26", "data.max_eval_samples=6"),
    *("generation.max_new_tokens=3", "evaluation.baseline=false", "evaluation.generate_samples=2"),
    *("task.evaluate=false", "task.predict=false"),
]

# Two processes with 2 micro-batches of 3 rows each, or one with 4: of 26 rows 2 are left for the last step of a pass,
# where the second process has none.
CASES = {
    "grouped": [],
    "packed": ["data.packing=true", "data.pack_length=96", "trainer.per_device_train_batch_size=1",
               "trainer.group_by_length=false", "trainer.dataloader_num_workers=1", "evaluation.baseline=true",
               "task.evaluate=true", "task.predict=true", "trainer.optim=paged_adamw_32bit"],
}  # fmt: skip
PAIRS = ["loss=dpo", "loss.sft_weight=0.2", "data=local", "data.eval_dataset_size=6", "trainer.eval_steps=null"]
DRAWN = ["model.weights=random", "trainer.num_train_epochs=null", "trainer.max_steps=3", "trainer.eval_steps=null"]
PICTURES = ["trainer.max_steps=3", "trainer.num_train_epochs=null", "trainer.eval_steps=null"]
SHARDED = ["trainer.parallel=fsdp", "trainer.gradient_checkpointing=true", "trainer.save_steps=3"]


def train(folder: Path, accumulated: int, *overrides: str) -> dict[str, Any]:
    chosen = [*COMMON, f"trainer.gradient_accumulation_steps={accumulated}", *overrides]
    return Run(compose(chosen), folder, overrides=chosen).execute()


def guard(folder: Path) -> None:
    """Makes whatever this process would write below `folder` an error."""

    def watch(event: str, args: tuple[Any, ...]) -> None:
        writes = event in ("os.mkdir", "os.rename", "os.remove") or (event == "open" and _writes(args))
        if writes and isinstance(args[0], str | Path) and str(args[0]).startswith(str(folder)):
            raise AssertionError(f"process {distributed.rank()}: {event} {args}")

    sys.addaudithook(watch)


def _writes(args: tuple[Any, ...]) -> bool:
    return any(letter in str(args[1] or "") for letter in "wax+") or bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR))


def launch(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Starts two processes by torchrun."""
    path = os.pathsep.join([str(ROOT), str(cwd), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *args],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def meet(*args: str, folders: tuple[Path, Path]) -> list[subprocess.CompletedProcess[str]]:
    """Starts one process by a torchrun in each folder, as on two machines, which find each other by rendezvous."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "-m", "qlora", *args]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for folder in folders
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    return [
        subprocess.CompletedProcess(command, process.returncode, output)
        for process, output in zip(started, outputs, strict=True)
    ]


def losses(folder: Path) -> np.ndarray:
    names = ("loss", "grad_norm", "num_input_tokens_seen", "learning_rate")
    history = json.loads((folder / "history.json").read_text())
    return np.array([[entry[name] for name in names] for entry in history if "loss" in entry], dtype=float)


def measured(folder: Path) -> list[float]:
    return [entry["eval_loss"] for entry in json.loads((folder / "history.json").read_text()) if "eval_loss" in entry]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the runs of two processes."""
    folder = tmp_path_factory.mktemp("together")
    write("gemma3", folder / "base")
    write_preferences(folder)
    done = launch(__file__, str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "output.txt").write_text(done.stdout)
    (folder / "errors.txt").write_text(done.stderr)
    return folder


class Alone:
    """The same runs of one process, each of which is trained when its folder is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __truediv__(self, name: str) -> Path:
        folder = self._folder / name
        if not folder.exists():
            pairs = [*PAIRS, f"data.path={write_preferences(self._folder)[0]}"]
            train(folder, 4, *{**CASES, "drawn": DRAWN, "pairs": pairs}[name])
        return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    return Alone(tmp_path_factory.mktemp("alone"))


@pytest.mark.full
@pytest.mark.parametrize(
    ("shared", "single"), [*zip(CASES, CASES, strict=True), ("sharded", "grouped"), ("pairs", "pairs")]
)
def test_two_processes_train_what_one_trains(together: Path, alone: Alone, shared: str, single: str) -> None:
    one, two = losses(alone / single), losses(together / shared)
    assert len(one) >= 4
    assert two == pytest.approx(one, rel=2e-5)
    assert measured(together / shared) == pytest.approx(measured(alone / single), rel=2e-5)
    expected, after = adapter(alone / single), adapter(together / shared)
    assert expected.keys() == after.keys()
    assert all(torch.allclose(expected[name], after[name], rtol=1e-3, atol=2e-5) for name in expected)


def test_a_drawn_base_is_sharded_too_with_fused_layers(together: Path, alone: Alone) -> None:
    one, two = losses(alone / "drawn"), losses(together / "drawn")
    assert len(one) == 3
    assert two == pytest.approx(one, rel=2e-5)
    assert read_run_base(RunFolder(together / "drawn")) == read_run_base(RunFolder(alone / "drawn"))


def test_two_processes_train_a_base_with_a_tower_for_pictures_that_gets_no_adapter(together: Path) -> None:
    assert len(losses(together / "pictures")) == 3
    weights = adapter(together / "pictures")
    assert len(weights) == 28
    assert all(".language_model." in name and value.any() for name, value in weights.items())


def test_a_bad_step_of_one_process_is_skipped_by_all(together: Path) -> None:
    metrics = json.loads((together / "spoiled" / "metrics.json").read_text())
    assert metrics["train_watchdog_nonfinite"] == metrics["train_watchdog_skipped"] == 1
    logged = [math.isnan(loss) for loss in losses(together / "spoiled")[:, 0]]
    assert logged == [False, True, False, False, False, False]
    told = (together / "errors.txt").read_text()
    assert "watchdog.nonfinite: step 2: the loss is not a number, but in no row of it alone" in told


def test_only_the_main_process_writes_and_reports_the_rows_of_a_step(together: Path) -> None:
    output = (together / "output.txt").read_text()
    assert output.count("3 x 2 accumulated x 2 processes = 12 rows a step") == 9  # all but the packed one
    assert output.count("1 x 2 accumulated x 2 processes = 4 packs a step") == 1
    states = {path.name for path in (together / "sharded" / "checkpoints" / "checkpoint-6").glob("rng_state*")}
    assert states == {"rng_state_0.pth", "rng_state_1.pth"}


def test_a_checkpoint_of_two_processes_is_refused_by_one(
    together: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(together / "sharded", tmp_path / "sharded")
    (folder / "result.json").unlink()
    options = ["trainer.gradient_checkpointing=true", "trainer.save_steps=3"]
    refusal = r"written by 2 processes, and this run has 1.*start 2 again.*same rows if trainer\.gradient_acc\w+=4$"
    with pytest.raises(UserError, match=refusal):
        train(folder, 2, *options)
    train(folder, 2, *options, "resume=force")
    assert "written by 2 processes, and this run has 1: its steps hold other rows" in caplog.text
    assert (folder / "result.json").is_file()


@pytest.mark.full
def test_one_process_continues_with_the_steps_of_two_where_it_accumulates_twice_as_much(
    together: Path, alone: Alone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(together / "sharded", tmp_path / "sharded")
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
    train(folder, 4, "trainer.gradient_checkpointing=true", "trainer.save_steps=3", "resume=force")
    assert "and this run has 1: its steps hold the same rows, but dropout draws other masks" in caplog.text
    assert losses(folder) == pytest.approx(losses(alone / "grouped"), rel=2e-5)


def test_a_replay_takes_as_many_processes(together: Path, tmp_path: Path) -> None:
    metrics = json.loads((together / "replayed" / "replay.json").read_text())["metrics"]
    assert metrics["replay_near"] == metrics["replay_differs"] == 0
    with pytest.raises(UserError, match="it was trained by 2 processes, and this is 1"):
        run_job(build_job(compose(["task=replay", f"run={together / 'grouped'}"]), tmp_path))


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_the_disk_may_fill_up_when_they_resume(together: Path) -> None:
    output = (together / "output.txt").read_text()
    assert "SIGTERM: stopping after this step and saving" in (together / "errors.txt").read_text()
    assert (together / "stopped" / "checkpoints" / "checkpoint-2").is_dir()
    assert output.count("resuming from checkpoint-2") == 1
    assert output.count("the run waits up to") == output.count("there is space again: resuming") == 1
    assert np.array_equal(losses(together / "stopped"), losses(together / "grouped"))
    expected, after = adapter(together / "grouped"), adapter(together / "stopped")
    assert all(torch.equal(expected[name], after[name]) for name in expected)


FALL = """
import os
import signal
from transformers import TrainerCallback

class Fall(TrainerCallback):
    def __init__(self, killed):
        self.killed = killed

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            if self.killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ArithmeticError("the second process falls")
"""


@pytest.mark.full
@pytest.mark.parametrize(
    "killed",
    [
        pytest.param(False, marks=pytest.mark.slow, id="fails"),
        pytest.param(True, marks=pytest.mark.full, id="is killed"),
    ],
)
def test_a_process_that_fails_ends_all_by_its_own_words_and_torchrun_starts_them_again_where_they_were(
    tmp_path: Path, alone: Alone, killed: bool
) -> None:
    (tmp_path / "fall.py").write_text(FALL)
    chosen = [*COMMON, "trainer.gradient_accumulation_steps=2", "trainer.save_steps=3"]
    done = launch(
        "--max-restarts",
        "1",
        "-m",
        "qlora",
        *chosen,
        "+callbacks.fall._target_=fall.Fall",
        f"+callbacks.fall.killed={killed}",
        "trusted=[fall]",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("process ")]
    if killed:  # torchrun may end the other one before it can tell anything
        assert "failed (exitcode: -9) local_rank: 1" in done.stderr
    else:
        assert told[0].startswith("process 1 of 2: Traceback")
        assert "ArithmeticError: the second process falls" in done.stderr
    assert "resuming from checkpoint-3" in done.stdout
    (folder,) = (tmp_path / "outputs" / "runs").iterdir()  # of both processes and both starts, though it has no name
    assert json.loads((folder / "result.json").read_text())["status"] == "finished"
    assert losses(folder) == pytest.approx(losses(alone / "grouped"), rel=2e-5)
    assert (folder / "train.log").read_text().count("resuming from") == 1


@pytest.mark.full
def test_machines_that_met_train_in_the_folder_that_they_share(tmp_path: Path, alone: Alone) -> None:
    overrides = [*COMMON, "trainer.gradient_accumulation_steps=2", "name=wide"]
    assert [done.returncode for done in meet(*overrides, folders=(tmp_path, tmp_path))] == [0, 0]
    folder = tmp_path / "outputs" / "runs" / "wide"
    assert losses(folder) == pytest.approx(losses(alone / "grouped"), rel=2e-5)


@pytest.mark.full
def test_folders_that_not_all_machines_see_are_refused(tmp_path: Path) -> None:
    folders = (tmp_path / "a", tmp_path / "b")
    for folder in folders:
        folder.mkdir()
    ended = meet(*COMMON, "name=local", folders=folders)
    assert all(done.returncode != 0 for done in ended)
    told = "".join(done.stdout for done in ended)  # the launcher that ends first may take the other with it
    assert "and not visible to all processes on" in told
    assert "name a folder on a disk that all machines share, with hydra.run.dir=FOLDER" in told
    assert "qlora/cli.py" not in told, "a mistake of the user's has no traceback"
    assert not list(tmp_path.glob("*/outputs/runs/local/*"))


def spoil(compute_loss: Any) -> Any:
    """Makes the losses of the second process' second step no numbers."""

    def spoiled(self: QLoraTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        bad = distributed.rank() == 1 and self.state.global_step == 1
        return compute_loss(self, *args, **kwargs) * (float("nan") if bad else 1)

    return spoiled


class Signal(TrainerCallback):
    """Sends a signal to the second process in its second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if distributed.rank() == 1 and state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def fill_disk_once(finalize: Any) -> Any:
    """Makes the first checkpoint that is written meet a full disk."""
    calls = iter([True])

    def fail(*args: Any) -> None:
        if next(calls, False):
            raise OSError(errno.ENOSPC, "No space left on device")
        finalize(*args)

    return fail


def main(folder: Path) -> None:
    distributed.init_process_group()
    if not distributed.is_main_process():
        guard(folder)
    for name, overrides in CASES.items():
        train(folder / name, 2, *overrides)
    train(folder / "pairs", 2, *PAIRS, f"data.path={folder / 'pairs.jsonl'}")
    train(folder / "sharded", 2, *SHARDED)
    train(folder / "drawn", 2, *DRAWN, "trainer.parallel=fsdp", "trainer.fused_linear=true")
    train(folder / "pictures", 2, *PICTURES, f"model.name={folder / 'base'}")
    run_job(build_job(compose(["task=replay", f"run={folder / 'grouped'}"]), folder / "replayed"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QLoraTrainer, "compute_loss", spoil(QLoraTrainer.compute_loss))
        train(folder / "spoiled", 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlora.training.callbacks.build_callbacks", lambda *_: [Signal()])
        with pytest.raises(Stopped, match=r"step 2 is saved in .*\n  torchrun --nproc-per-node 2 -m qlora quant"):
            train(folder / "stopped", 2, "trainer.save_steps=3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_writer, "finalize", fill_disk_once(checkpoint_writer.finalize))
        train(folder / "stopped", 2, "trainer.save_steps=3")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
