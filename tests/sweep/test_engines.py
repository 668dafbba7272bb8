"""What the engines of clusters ask for, and what they refuse before anything is written."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from qlora.config.compose import compose, compose_dict
from qlora.errors import UserError
from qlora.sweep.engine_config import SlurmSettings
from qlora.sweep.engines import build_engine, check_engine
from qlora.sweep.job_processes import Task
from qlora.sweep.jobs import Job
from qlora.sweep.slurm_batch import prepare_job, script_text, submitted_name
from qlora.sweep.slurm_client import check_programs

FIXED = ("--nodes=1", "--ntasks=1", "--requeue", "--open-mode=append")


def test_a_missing_engine_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape("hydra/launcher=ray needs the package ray; install it with pip "
                                                    "install 'qlora[ray]'")):  # fmt: skip
        check_engine(["seed=0,1", "hydra/launcher=ray"])
    check_engine(["hydra/launcher=basic"])


def test_without_slurm_the_way_out_is_a_login_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    sentence = "hydra/launcher=slurm needs SLURM's sbatch, squeue, scontrol, scancel, which this machine lacks; start"
    with pytest.raises(UserError, match=re.escape(sentence)):
        check_programs()


def test_slurm_gets_one_array_whose_indices_lead_to_the_jobs(tmp_path: Path) -> None:
    settings = SlurmSettings(
        partition="main",
        account="lab",
        constraint="a100|h100",
        mem_gb=32,
        setup=["module load cuda"],
        additional_parameters={"mail_type": "END", "exclusive": True, "reservation": False},
    )
    batch = tmp_path / "my 100% sweep" / ".slurm" / "1"
    batch.mkdir(parents=True)
    jobs = [Job(batch.parents[1] / name, overrides=[f"seed={name}"]) for name in ("0", "1", "2")]
    for index, job in enumerate(jobs):
        prepare_job(batch, index, Task(job, ["true"], {}), settings)
    script = script_text(batch, 3, settings)
    lines = script.splitlines()
    options = {shlex.split(line.removeprefix("#SBATCH "))[0] for line in lines if line.startswith("#SBATCH")}
    folder = str(batch).replace("%", "%%")
    assert options >= {
        *("--array=0-2%16", "--gpus-per-node=1", "--cpus-per-task=8", "--time=1440", "--signal=B:USR1@120", *FIXED),
        *("--partition=main", "--account=lab", "--constraint=a100|h100", "--mem=32G", "--mail-type=END", "--exclusive"),
        *(f"--output={folder}/%a/stdout.log", f"--error={folder}/%a/stderr.log", "--job-name=my 100% sweep"),
    }
    assert not any(option.startswith(("--reservation", "--qos", "--dependency")) for option in options)
    assert lines[-2] == "module load cuda"
    assert lines[-1].startswith("exec ")
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert [(batch / str(index)).resolve() for index in range(3)] == [job.folder for job in jobs]
    assert submitted_name(jobs[0].folder) is None  # never submitted
    (batch / "id").write_text("77;cluster\n")
    assert [submitted_name(job.folder) for job in jobs] == ["77_0", "77_1", "77_2"]
    assert "--dependency=afterany:76" in script_text(batch, 3, settings, "76")


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["launcher=slurm", "timeout_min=0"], "hydra.launcher.timeout_min must be positive, got 0"),
        (["launcher=slurm", "array_parallelism=0"], "hydra.launcher.array_parallelism must be positive, got 0"),
        (["launcher=slurm", "max_num_timeout=-1"], "hydra.launcher.max_num_timeout must not be negative, got -1"),
        (["launcher=slurm", "timeout_min=2", "signal_delay_s=120"], "hydra.launcher.signal_delay_s must be less than "
         "the 120 seconds of hydra.launcher.timeout_min=2"),
        (["launcher=slurm", "additional_parameters.time=9"], "hydra.launcher.additional_parameters.time is settled by "
         "the sweep from hydra.launcher.timeout_min; leave it out"),
        (["launcher=slurm", "additional_parameters.open_mode=w"], "additional_parameters.open_mode is settled by the"),
        (["launcher=slurm", "additional_parameters.x=[1]"], "hydra.launcher.additional_parameters.x must be a plain"),
        (["launcher=slurm", 'partition="a\nb"'], "hydra.launcher.partition holds a line break"),
        (["launcher=ray", "ray.remote.num_gpus=-1"], "hydra.launcher.ray.remote.num_gpus must be a number that is not"),
        (["launcher=ray", "ray.remote.max_retries=3"], "hydra.launcher.ray.remote.max_retries must be 0: a job whose"),
        (["launcher=ray", "sweep.detach=true"], "sweep.detach=true needs an engine that keeps the jobs"),
        (["launcher=processes", "sweep.detach=true"], "sweep.detach=true needs an engine that keeps the jobs"),
    ],
)  # fmt: skip
def test_impossible_settings_are_one_sentence(args: list[str], sentence: str) -> None:
    launcher, *rest = args
    overrides = [
        f"hydra/{launcher}",
        *(word if word.startswith("sweep.") else f"hydra.launcher.{word}" for word in rest),
    ]
    config = compose([word for word in rest if word.startswith("sweep.")])
    with pytest.raises(UserError, match=re.escape(sentence)):
        build_engine(compose_dict(overrides).hydra.launcher, config)


def test_ray_takes_what_its_own_functions_take() -> None:
    args = ["address=auto", "num_cpus=2", "runtime_env={env_vars: {A: b}}"]
    composed = compose_dict(["hydra/launcher=ray", *(f"hydra.launcher.ray.init.{word}" for word in args)])
    given = OmegaConf.to_container(composed.hydra.launcher.ray.init)
    assert given == {"address": "auto", "num_cpus": 2, "runtime_env": {"env_vars": {"A": "b"}}}


def test_no_file_of_ours_shares_the_name_of_an_engine_so_that_hydra_warns_of_no_schema() -> None:
    ours = {Path(name).stem for name in ConfigStore.instance().repo["hydra"]["launcher"]}
    files = {path.stem for path in (Path(__file__).parents[2] / "conf" / "hydra").glob("launcher/*.yaml")}
    assert {"slurm", "ray", "processes"} <= ours
    assert not ours & files
