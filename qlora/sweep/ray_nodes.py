"""The nodes of a Ray cluster: which of them can run a job, and whether each sees the sweep's folder."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qlora.errors import ResourceError
from qlora.sweep.engine_config import RaySettings
from qlora.text import shorten

POLL_SECONDS = 0.5
CHECK_SECONDS = 300.0
"""A node that does not answer within this time is lost."""
LOST_SECONDS = 30.0
"""By default Ray considers a node lost 15 seconds after its daemon was killed."""


def unshared(folder: Path, host: str) -> str:
    """Returns the message for a node that does not see a folder."""
    return (
        f"{folder} is not visible on {host}: a sweep on several nodes needs a folder that all of them share; start the "
        "command in one, or name one with hydra.sweep.dir=FOLDER"
    )


def _is_seen(folder: str, token: str) -> bool:
    return (Path(folder) / token).is_file()


def check_nodes(settings: RaySettings, folder: Path) -> None:
    """Raises `ResourceError` if no node can run a job, or if a node does not see the sweep's folder."""
    needed = _resources(settings.ray.remote)
    token = f".shared-{uuid.uuid4().hex}"
    look = ray.remote(num_cpus=0, max_retries=0)(_is_seen)
    (folder / token).touch()
    try:
        asked = []
        for node in _able_nodes(needed):
            strategy = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            asked.append((node, look.options(scheduling_strategy=strategy).remote(str(folder), token)))
        end = time.monotonic() + CHECK_SECONDS
        for node, reference in asked:
            if not _answer(node, reference, max(end - time.monotonic(), 0)):
                raise ResourceError(unshared(folder, node["NodeManagerHostname"]))
    finally:
        (folder / token).unlink(missing_ok=True)
    _able_nodes(needed)  # nodes that were lost meanwhile do not count


def _able_nodes(needed: Mapping[str, float]) -> list[dict[str, Any]]:
    """Returns the nodes with the resources for a job; raises `ResourceError` if there are none."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    able = [node for node in nodes if all(node["Resources"].get(name, 0) >= value for name, value in needed.items())]
    if able:
        return able
    listed = ", ".join(f"{name}={value:g}" for name, value in needed.items())
    maxima = {name: max((node["Resources"].get(name, 0) for node in nodes), default=0) for name in needed}
    best = ", ".join(f"{value:g} {name}" for name, value in maxima.items())
    hint = "; hydra.launcher.ray.remote.num_gpus=0 for jobs on CPUs" if needed.get("GPU") else ""
    raise ResourceError(
        f"hydra.launcher.ray.remote asks for {listed} on one node, and none of the {len(nodes)} nodes has them all "
        f"(at most {best}){hint}"
    )


def _answer(node: Mapping[str, Any], reference: Any, seconds: float) -> bool:
    """Returns whether a node sees the sweep's folder, or is lost and will get no job; raises `ResourceError`."""
    host = node["NodeManagerHostname"]
    try:
        is_seen: bool = ray.get(reference, timeout=seconds)
    except GetTimeoutError as error:
        raise ResourceError(
            f"{host} of the Ray cluster does not answer within {CHECK_SECONDS:.0f} s; `ray status` shows the nodes"
        ) from error
    except RayTaskError as error:
        raise ResourceError(
            f"{host} of the Ray cluster cannot run qlora ({_last_line(error)}); install the same version on each node"
        ) from error
    except RayError as error:
        if not _is_lost(node["NodeID"]):
            raise ResourceError(
                f"{host} of the Ray cluster starts no process ({_last_line(error)}); the logs of Ray on it, below "
                "/tmp/ray/session_latest/logs, say why"
            ) from error
        return True
    return is_seen


def _is_lost(node_id: str) -> bool:
    """Returns whether a node that returned an error is lost, which Ray may notice with a delay."""
    end = time.monotonic() + LOST_SECONDS
    while any(node["Alive"] for node in ray.nodes() if node["NodeID"] == node_id):
        if time.monotonic() > end:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _last_line(error: RayError) -> str:
    return shorten((str(error).strip() or type(error).__name__).splitlines()[-1], 300)


def _resources(remote: Mapping[str, Any]) -> dict[str, float]:
    standard = {"CPU": remote.get("num_cpus", 1), "GPU": remote.get("num_gpus", 0), "memory": remote.get("memory", 0)}
    return {name: float(value) for name, value in {**standard, **(remote.get("resources") or {})}.items() if value}
