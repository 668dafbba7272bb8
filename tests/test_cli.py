"""The command line as a user types it: runs, sweeps, resumes and stops with one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig

from qlora import cli
from qlora.config.arguments import read_arguments
from qlora.config.command import compose_command
from qlora.runtime.environment import ALLOCATOR
from qlora.tasks import needs_of
from qlora.tasks.start import Command, join

QUICK = [
    *("lora.r=4", "trainer.max_steps=2", "trainer.per_device_train_batch_size=2", "trainer.eval_steps=null"),
    *("trainer.lr_scheduler_kwargs.num_decay_steps=1", "trainer.warmup_steps=0", "trainer.logging_steps=1"),
    *("data.max_eval_samples=4", "data.max_train_samples=16", "generation.max_new_tokens=4"),
]


def qlora(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m qlora` in `folder`."""
    return subprocess.run(
        [sys.executable, "-m", "qlora", *arguments],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.cold
@pytest.mark.slow
def test_a_named_run_goes_to_its_folder_and_shows_before_and_after(tmp_path: Path) -> None:
    done = qlora(tmp_path, "name=mine", *QUICK)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs" / "runs" / "mine"
    assert json.loads((folder / "result.json").read_text())["status"] == "finished"
    for text in (
        "nf4 + double quantization",
        "LoRA r=4",
        "held out",
        "before",
        "after",
        "exact match",
        "qlora chat outputs/runs/mine",
    ):
        assert text in done.stdout
    assert done.stderr == ""
    again = qlora(tmp_path, "name=mine", *QUICK)
    assert "finished already" in again.stdout
    assert "step 1/2" in (folder / "train.log").read_text()


@pytest.mark.full
def test_a_sweep_records_every_job(tmp_path: Path) -> None:
    done = qlora(tmp_path, "-m", "name=grid", "lora.r=2,4", "quantization=nf4,none", *QUICK[1:])
    assert done.returncode == 0, done.stderr
    sweep = tmp_path / "outputs" / "sweeps" / "grid"
    jobs = json.loads((sweep / "sweep.json").read_text())["jobs"]
    assert [job["status"] for job in jobs] == ["finished"] * 4
    assert {tuple(job["overrides"]) for job in jobs} == {
        (f"lora.r={r}", f"quantization={name}") for r in (2, 4) for name in ("nf4", "none")
    }
    for job in jobs:
        saved = json.loads((sweep / job["job"] / "result.json").read_text())
        assert job["objective"] == saved["metrics"]["eval_loss"]


@pytest.mark.matrix(1)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_flag_may_stand_between_overrides(tmp_path: Path, index: int) -> None:
    overrides = ["lora.r=8,16", "hydra.launcher.gpus_per_job=2"]
    overrides.insert(index, "-m")
    done = qlora(tmp_path, *overrides, CUDA_VISIBLE_DEVICES="")
    assert done.stderr == "error: hydra.launcher.gpus_per_job=2, but no GPU is visible here; leave it out\n"
    printed = qlora(tmp_path, "lora.r=8", "--cfg", "job", "--package", "lora", "seed=1")
    assert "r: 8" in printed.stdout, printed.stderr


@pytest.mark.full
@pytest.mark.slow
def test_a_failed_job_is_recorded_and_the_others_continue(tmp_path: Path) -> None:
    modules = "lora.target_modules=[q_proj],[nope],[v_proj]"
    done = qlora(tmp_path, "-m", "name=part", modules, "evaluation=loss", *QUICK)
    assert done.returncode == 1
    jobs = json.loads((tmp_path / "outputs" / "sweeps" / "part" / "sweep.json").read_text())["jobs"]
    assert [job["status"] for job in jobs] == ["finished", "failed", "finished"]
    assert "['nope'] match no linear layer" in jobs[1]["reason"]
    assert done.stdout.count("['nope'] match no linear layer") == 2  # when it failed, and at the end
    assert 'File "' not in done.stdout + done.stderr  # a line of a traceback


def test_a_bad_value_anywhere_in_a_sweep_stops_it_before_the_first_job(tmp_path: Path) -> None:
    done = qlora(tmp_path, "-m", "lora.r=8,16,-1", *QUICK[1:])
    assert done.returncode == 1
    assert done.stderr.startswith("error: lora.r must be positive, got -1")
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("arguments", [["lora.rnak=3"], ["+lora.rnak=3"], ["++lora.rnak=3"]])
def test_a_typo_ends_in_one_line_and_leaves_nothing(tmp_path: Path, arguments: list[str]) -> None:
    done = qlora(tmp_path, *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: unknown key 'lora.rnak' (did you mean lora.r?)")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "outputs").exists()


def test_a_flag_of_the_original_script_is_answered_with_our_key(tmp_path: Path) -> None:
    done = qlora(tmp_path, "--lora_r", "8")
    assert done.returncode == 1
    assert "lora.r" in done.stderr


def test_a_mistake_found_in_the_job_is_one_line_too(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    done = qlora(tmp_path, "data=local", "data.path=row.jsonl")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "did you mean" in done.stderr
    assert "rows.jsonl" in done.stderr
    assert not (tmp_path / "outputs").exists()
    full = qlora(tmp_path, "data=local", "data.path=row.jsonl", HYDRA_FULL_ERROR="1")
    assert "Traceback" in full.stderr


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = qlora(tmp_path, f"hydra.run.dir={tmp_path}/file/run")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "cannot be written (Not a directory); choose another folder with hydra.run.dir=FOLDER" in done.stderr


@pytest.mark.parametrize(
    ("overrides", "variables", "expected"),
    [
        (["trainer.memory_budget=48GB"], {}, "expandable_segments:True"),
        (["trainer.memory_budget=auto"], {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, None),
        ([], {}, None),
    ],
)
def test_with_a_memory_budget_freed_pages_serve_again_unless_the_user_has_settled_that(
    overrides: list[str], variables: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ALLOCATOR:
        monkeypatch.setenv(name, "")  # so that it is taken back
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    composed = compose_command(overrides)
    join(Command(read_arguments(overrides), composed, needs_of(composed.config)))
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected


@pytest.mark.parametrize("given", [None, "0"])
def test_the_command_line_leaves_the_environment_as_it_was(
    given: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", given or "")
    if given is None:
        monkeypatch.delenv("HYDRA_FULL_ERROR")
    monkeypatch.setattr(sys, "argv", ["qlora", "lora.rr=8"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: unknown key 'lora.rr'")
    assert os.environ.get("HYDRA_FULL_ERROR") == given


@pytest.mark.matrix(4)
@pytest.mark.parametrize(
    ("command", "count"),
    [
        ("--cfg job --resolve", 1),
        ("--cfg hydra", 1),
        ("--cfg all sweep=lora-rank", 1),
        ("--info all", 1),
        ("--cfg job lora.r=8,16 -m", 1),
        ("--cfg job lora=dora,attention -m", 3),  # an option of a group changes what is composed
        ("task=plan plan.device=a6000", 1),
        ("task=wandb-sweep sweep=lora-rank seed=0,1", 1),
    ],
)
def test_a_config_is_composed_once(
    command: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    compositions = _count_compositions(monkeypatch)
    monkeypatch.chdir(tmp_path)
    cli.run(command.split())
    assert len(compositions) == count, compositions


def test_a_sweep_composes_its_base_alone_unless_a_group_varies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compositions = _count_compositions(monkeypatch)
    monkeypatch.chdir(tmp_path)
    started: list[str] = []
    monkeypatch.setattr("qlora.sweep.grid.run_queue", lambda config, queue, run: started.extend(queue.names))
    args = ["task=report", "runs=x", "lora.r=8,16", "seed=0,1", "-m"]
    monkeypatch.setattr("sys.argv", ["qlora", *args])
    cli.run(args)
    assert len(started) == 4
    assert len(compositions) == 1, compositions


def _count_compositions(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Returns the overrides of each composition from now on."""
    compositions: list[list[str]] = []
    compose = ConfigLoaderImpl._load_configuration_impl

    def counting(self: ConfigLoaderImpl, config_name: str, overrides: list[str], *args: object) -> DictConfig:
        compositions.append(overrides)
        return compose(self, config_name, overrides, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", counting)
    return compositions
