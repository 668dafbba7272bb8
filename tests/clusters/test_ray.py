"""Jobs on a real Ray of two nodes: the cluster is joined, a lost node costs its job, folders must be shared."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora.errors import UserError
from qlora.sweep.engine_config import RayParts, RaySettings
from qlora.sweep.job_processes import Task
from qlora.sweep.jobs import Job, Status, read_job
from qlora.sweep.sweep_folder import read_sweep
from tests.clusters.tasks import starts, task
from tests.clusters.test_slurm import documented, sweep

pytest.importorskip("ray", reason="needs the extra ray")
from ray.cluster_utils import Cluster

from qlora.sweep.ray_jobs import run_on_ray

WAIT = 120.0
"""Seconds that something may take on a slow machine."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head and a second node, each with one CPU; Ray takes signals over, which are given back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_health_check_period_ms": "500"}
    running = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False})
    try:
        yield running
    finally:
        running.shutdown()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def settings(cluster: Cluster, **remote: Any) -> RaySettings:
    return RaySettings(ray=RayParts(init={"address": cluster.address}, remote={"num_gpus": 0, **remote}))


def run(
    tasks: list[Task],
    settings: RaySettings,
    *,
    on_start: Callable[[Job], None] = lambda job: None,
    on_wait: Callable[[list[Job]], None] = lambda jobs: None,
) -> dict[str, Job]:
    ended: dict[str, Job] = {}
    waiting = iter(tasks)
    run_on_ray(
        settings,
        None,
        lambda: next(waiting, None),
        on_start=on_start,
        on_end=lambda job: ended.update({job.name: job}),
        on_wait=on_wait,
    )
    return ended


@pytest.mark.full
def test_every_kind_of_end_is_told_and_a_lost_node_costs_its_job_only(
    tmp_path: Path, cluster: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    node = cluster.add_node(num_cpus=1, num_gpus=0)
    ends = {
        "one": "wait(folder.parent / 'go')",
        "two": "wait(folder.parent / 'go')",
        "raises": "raise ValueError('no such thing')",
        "killed": "os.kill(os.getpid(), signal.SIGKILL)",
        "fine": "pass",
    }
    lost = False

    def lose(running: list[Job]) -> None:
        nonlocal lost
        if not lost and all(starts(tmp_path / name) for name in ("one", "two")):
            cluster.remove_node(node, allow_graceful=False)
            lost = True
        if lost and any(read_job(tmp_path / name).status is Status.interrupted for name in ("one", "two")):
            (tmp_path / "go").touch()

    capfd.readouterr()
    ended = run([task(tmp_path / name, what) for name, what in ends.items()], settings(cluster), on_wait=lose)
    output, errors = capfd.readouterr()
    assert {line.partition(" on ")[0] for line in output.splitlines()} == {"runs"}, output
    assert errors == ""
    both = sorted([ended["one"], ended["two"]], key=lambda job: job.status is Status.interrupted)
    assert [job.status for job in both] == [Status.finished, Status.interrupted]
    assert "was lost" in (both[1].reason or "")
    assert (ended["raises"].status, ended["raises"].reason) == (Status.failed, "ValueError: no such thing")
    assert (ended["killed"].status, ended["killed"].reason) == (
        Status.failed,
        "killed (SIGKILL): the system does so when memory runs out",
    )
    assert ended["fine"].status is Status.finished
    assert (tmp_path / "fine" / "stdout.log").read_text() == "says fine\n"
    assert [starts(tmp_path / name) for name in ends] == [1] * len(ends)


@pytest.mark.full
def test_an_interruption_ends_the_running_job_in_order_and_leaves_the_others_queued(
    tmp_path: Path, cluster: Cluster
) -> None:
    def interrupt(running: list[Job]) -> None:
        if starts(tmp_path / "one"):
            raise KeyboardInterrupt

    tasks = [task(tmp_path / "one", "time.sleep(600)"), task(tmp_path / "two")]
    with pytest.raises(KeyboardInterrupt):
        run(tasks, settings(cluster), on_wait=interrupt)
    assert [read_job(tmp_path / name).status for name in ("one", "two")] == [Status.interrupted, Status.queued]
    assert starts(tmp_path / "two") == 0
    assert (tmp_path / "one" / "stopped").exists()


@pytest.mark.full
def test_a_ray_of_the_command_alone_is_started_beside_a_cluster_that_runs(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    local = RayParts(init={"address": None, "resources": {"own": 1}}, remote={"num_gpus": 0, "resources": {"own": 1}})
    ended = run([task(tmp_path / "job")], RaySettings(ray=local))
    assert ended["job"].status is Status.finished


def test_a_cluster_that_is_no_longer_there_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    begun = time.monotonic()
    with pytest.raises(UserError, match="Ray cannot be reached or started"):
        run([task(tmp_path / "job")], RaySettings(ray=RayParts(init={"address": "auto"})))
    assert time.monotonic() - begun < 5


@pytest.mark.full
def test_what_the_cluster_cannot_do_is_one_sentence_before_a_job_starts(tmp_path: Path, cluster: Cluster) -> None:
    refused = {
        "num_gpus=1 for jobs": (settings(cluster, num_gpus=1), "hydra.launcher.ray.remote.num_gpus=0 for jobs on CPUs"),
        "none of the": (settings(cluster, num_cpus=64), r"asks for CPU=64 on one node.*\(at most 1 CPU\)"),
        "unknown": (settings(cluster, nonsense=1), "hydra.launcher.ray.remote="),
        "reached": (
            RaySettings(ray=RayParts(init={"address": "127.0.0.1:1"})),
            r"Ray cannot be reached or started \(nothing answers at 127.0.0.1:1: Connection refused\)",
        ),
        "argument": (RaySettings(ray=RayParts(init={"adress": "auto"})), "Ray cannot be reached or started"),
    }
    for choice, sentence in refused.values():
        with pytest.raises(UserError, match=sentence):
            run([task(tmp_path / "job")], choice)
    assert starts(tmp_path / "job") == 0


@pytest.mark.full
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="hides a folder by a mount as root")
def test_a_node_that_does_not_see_the_folder_is_named_before_a_job_starts(tmp_path: Path, cluster: Cluster) -> None:
    ray = Path(sys.executable).with_name("ray")
    program = [str(ray)] if ray.exists() else [sys.executable, "-m", "ray.scripts.scripts"]
    hidden = f'mount -t tmpfs none "$1" && shift && exec "$@" start --address={cluster.address} --num-cpus=1 --block'
    start = ["unshare", "--mount", "sh", "-c", hidden, "sh", str(tmp_path), *program]
    node = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, text=True)
    try:
        _wait_for_nodes(cluster, 2, node)
        with pytest.raises(UserError, match=r"is not visible on .*: a sweep on several nodes needs a folder that all"):
            run([task(tmp_path / "job")], settings(cluster))
        assert starts(tmp_path / "job") == 0
    finally:
        os.killpg(node.pid, 15)
        node.communicate(timeout=60)


def _wait_for_nodes(cluster: Cluster, count: int, node: subprocess.Popen[str]) -> None:
    from ray._raylet import GcsClient

    client = GcsClient(address=cluster.address)
    end = time.monotonic() + WAIT
    while sum(info.state == 0 for info in client.get_all_node_info().values()) < count:
        if node.poll() is not None:
            pytest.skip(f"no mount can be made here: {node.communicate()[0][-300:]}")
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.full
def test_the_documented_command_trains_on_the_cluster_that_runs(tmp_path: Path, cluster: Cluster) -> None:
    overrides = [*documented("ray"), "hydra.launcher.ray.remote.num_gpus=0"]
    overrides += ["trainer.max_steps=2", "trainer.gradient_accumulation_steps=1"]
    done = sweep(tmp_path, overrides, {"RAY_ADDRESS": cluster.address})
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "report       outputs/sweeps/ranks/report.html"
    jobs = read_sweep(tmp_path / "outputs" / "sweeps" / "ranks").jobs.values()
    assert [(job.status, job.overrides) for job in jobs] == [
        (Status.finished, ["lora.r=8"]),
        (Status.finished, ["lora.r=16"]),
    ]
