"""Starts and stops a SLURM of two nodes on this machine, in a folder of its own; needs root, `slurm-wlm` and `munge`.

python tests/clusters/slurm_cluster.py start FOLDER   # prints the line that lets SLURM's commands find the cluster
python tests/clusters/slurm_cluster.py stop FOLDER
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo")
NODES = ("n1", "n2")
PATIENCE = 60.0
"""Seconds that a daemon may take."""

CONFIG = """\
ClusterName=qlora
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SlurmdParameters=config_overrides
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ReturnToService=2
KillWait=10
SlurmctldTimeout=30
SlurmdTimeout=300
MessageTimeout=30
MinJobAge=300
GresTypes=gpu
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
PartitionName=first Nodes=n1 MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Returns why no SLURM can be started here, in one sentence; None: it can."""
    missing = [name for name in PROGRAMS if _find(name) is None]
    if missing:
        return f"SLURM cannot run here: {', '.join(missing)} are missing (apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "SLURM cannot run here: its daemons need root"
    return None


def start(folder: Path) -> dict[str, str]:
    """Starts the daemons with all their files below `folder`, and returns the environment of SLURM's commands."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state").mkdir(exist_ok=True)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    ports = _free_ports(1 + len(NODES))
    for name in NODES:
        (folder / f"spool-{name}").mkdir(exist_ok=True)
        (folder / f"gpu-{name}").touch()
    config = folder / "slurm.conf"
    config.write_text(
        CONFIG.format(
            host=socket.gethostname(),
            controller=ports[0],
            folder=folder,
            nodes="\n".join(
                f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs=8 "
                f"RealMemory=1000 Gres=gpu:1 Feature=a100 State=UNKNOWN"
                for name, port in zip(NODES, ports[1:], strict=True)
            ),
        )
    )
    (folder / "gres.conf").write_text(
        "".join(f"NodeName={name} Name=gpu File={folder / f'gpu-{name}'}\n" for name in NODES)
    )
    environment = {"SLURM_CONF": str(config)}
    start_munge(folder)
    _run(environment, "slurmctld", "-c")
    for name in NODES:
        start_node(folder, name)
    _wait(lambda: _states(environment) == ["idle"] * len(NODES), folder, "its nodes are not idle")
    return environment


def start_munge(folder: Path) -> None:
    """Starts the daemon that vouches for who speaks."""
    options = {
        "key-file": "munge.key",
        "socket": "munge.socket",
        "pid-file": "munge.pid",
        "log-file": "munge.log",
        "seed-file": "munge.seed",
    }
    _run({}, "munged", "--force", *(f"--{option}={folder / name}" for option, name in options.items()))


def start_node(folder: Path, name: str) -> None:
    """Starts the daemon of one node."""
    _run({"SLURM_CONF": str(folder / "slurm.conf")}, "slurmd", "-N", name)


def stop(folder: Path) -> None:
    """Ends what runs on the cluster of a folder, and its daemons."""
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}
    with contextlib.suppress(subprocess.SubprocessError, RuntimeError):
        _run(environment, "scancel", "--user=root", "--signal=KILL", "--full")
        _wait(lambda: not _run(environment, "squeue", "--noheader", "--states=R,CG"), folder, "jobs are left")
    for name in (*(f"slurmd-{node}.pid" for node in NODES), "slurmctld.pid", "munge.pid"):
        with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
            os.kill(int((folder / name).read_text()), signal.SIGKILL)


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _run(environment: dict[str, str], program: str, *args: str) -> str:
    path = _find(program)
    assert path is not None
    done = subprocess.run(
        [path, *args], env=os.environ | environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, [program, *args], done.stdout, done.stderr)
    return done.stdout


def _states(environment: dict[str, str]) -> list[str]:
    try:
        return _run(environment, "sinfo", "--noheader", "--Node", "--partition=main", "--format=%T").split()
    except subprocess.CalledProcessError:
        return []


def _wait(condition: Callable[[], bool], folder: Path, complaint: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"SLURM did not start in {folder}: {complaint}; its logs there tell why")
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]


if __name__ == "__main__":
    command, folder = sys.argv[1], Path(sys.argv[2]).absolute()
    if command == "start":
        reason = why_not()
        if reason is not None:
            sys.exit(reason)
        print(f"export SLURM_CONF={start(folder)['SLURM_CONF']}")
    else:
        stop(folder)
