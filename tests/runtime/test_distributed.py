"""What a process finds out of those it was launched with, and which launches are refused."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qlora import cli
from qlora.config.compose import compose
from qlora.errors import UserError
from qlora.run import Run
from qlora.runtime import distributed

TOLD = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", *distributed.OTHER_COUNTS)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in TOLD:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_process_alone_is_the_first_and_agrees_with_itself() -> None:
    distributed.init_process_group()
    assert (distributed.world_size(), distributed.rank(), distributed.is_main_process()) == (1, 0, True)
    assert distributed.broadcast("x") == "x"
    assert distributed.all_gather(1) == [1]
    assert distributed.all_reduce_max([True, False]) == [True, False]
    with distributed.local_main_process_first():
        distributed.check_same("tokens", "abc")


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 says that 2 processes train together, but RANK and LOCAL_RANK and "),
        ({"SLURM_STEP_NUM_TASKS": "2"}, r"2 processes of this command were launched \(SLURM_STEP_NUM_TASKS\), but they "
         r"know of only 1 \(WORLD_SIZE\), so each would train alone; start it with torchrun"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, r"4 processes of this command were launched \(OMPI_COMM_WORLD_SIZE\)"),
        ({"ACCELERATE_USE_FSDP": "true"}, r"asks for FSDP \(ACCELERATE_USE_FSDP\).* choose trainer.parallel=fsdp"),
    ],
)  # fmt: skip
def test_processes_that_do_not_know_of_each_other_are_refused(
    environment: pytest.MonkeyPatch, told: dict[str, str], message: str
) -> None:
    for name, value in told.items():
        environment.setenv(name, value)
    with pytest.raises(UserError, match=message):
        distributed.init_process_group()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["task=evaluate", "adapter=none"],
            "2 processes were launched .*, and only a training run uses several processes; start",
        ),
        (["-m", "seed=1,2"], "2 processes were launched .*, and a sweep starts a process for each of its jobs"),
        (["sweep=seeds"], "2 processes were launched .*, and a sweep starts a process for each of its jobs"),
    ],
)
def test_only_training_runs_use_several_processes(
    environment: pytest.MonkeyPatch, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    environment.setenv("WORLD_SIZE", "2")
    environment.setattr(sys, "argv", ["qlora", *args])
    with pytest.raises(SystemExit):
        cli.main()
    told = capsys.readouterr().err
    assert told.startswith("process 0 of 2: error: ")
    with pytest.raises(UserError, match=message):
        raise UserError(told)


@pytest.mark.parametrize(
    ("overrides", "processes", "message"),
    [
        (
            ["trainer.parallel=fsdp"],
            "1",
            "trainer.parallel=fsdp shards the base over several processes, and this is ",
        ),
        (
            ["model.device_map=auto"],
            "2",
            "model.device_map and model.max_memory spread one process over several",
        ),
    ],
)
def test_a_base_is_sharded_in_several_processes_and_spread_in_one(
    environment: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory,
    overrides: list[str], processes: str, message: str,
) -> None:  # fmt: skip
    environment.setenv("WORLD_SIZE", processes)
    with pytest.raises(UserError, match=message):
        Run(compose(overrides), tmp_path_factory.mktemp("run")).execute()


@pytest.mark.matrix(3)
@pytest.mark.parametrize(
    "other",
    ["lora=none quantization=none", "lora=dora", "lora=eva", "quantization=int8", "trainer.memory_budget=auto",
     "model.device_map=auto"],
)  # fmt: skip
def test_what_needs_a_whole_base_is_refused_beside_a_sharded_one(other: str) -> None:
    with pytest.raises(UserError, match=r"trainer.parallel=fsdp and .* exclude each other: .*; leave one of them out"):
        compose(["trainer.parallel=fsdp", *other.split()])


def test_a_lost_process_is_told_apart_from_other_errors(environment: pytest.MonkeyPatch) -> None:
    environment.setattr(distributed, "_group", object())
    assert distributed.is_loss_of_peer(RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:123"))
    assert not distributed.is_loss_of_peer(RuntimeError("shapes differ"))
    assert not distributed.is_loss_of_peer(ValueError("closed by peer"))


LOOK = """
import sys
from pathlib import Path
from qlora.runtime import distributed
from qlora.errors import UserError
distributed.APPEARS_SECONDS = 1.0
distributed.init_process_group()
distributed.check_shared(Path(sys.argv[1]))
try:
    distributed.check_shared(Path("run"))
except UserError as error:
    print(error)
distributed.destroy_process_group()
"""


@pytest.mark.full
def test_a_run_folder_that_another_machine_does_not_see_is_refused_in_all_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "shared").mkdir()
    processes = []
    for rank in ("0", "1"):  # each in a folder of its own, as on a machine of its own
        (tmp_path / rank).mkdir()
        told = {
            "WORLD_SIZE": "2",
            "RANK": rank,
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, "-c", LOOK, str(tmp_path / "shared")]
        processes.append(
            subprocess.Popen(command, cwd=tmp_path / rank, env=os.environ | told, stdout=subprocess.PIPE, text=True)
        )
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0
        assert output.startswith("run is written by the main process, on ")
        assert "name a folder on a disk that all machines share, with hydra.run.dir=FOLDER" in output
    assert not list((tmp_path / "shared").iterdir())
