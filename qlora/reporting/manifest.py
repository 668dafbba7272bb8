"""Records what a run was made of: config, versions, code, machine, command and time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

from qlora.errors import Pruned, Stopped, UserError
from qlora.runtime import distributed
from qlora.runtime.atomic_files import write_text
from qlora.runtime.run_folder import config_digest
from qlora.runtime.saved_run import read_manifest
from qlora.secrets import hide_all, hide_in_diff

PACKAGES = {
    **{name: name for name in ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "omegaconf")},
    "hydra": "hydra-core",
    "qlora": "qlora",
}
MAX_DIFF = 200_000
"""Characters; of a longer diff the rest is left out."""
MAX_LIST = 200
"""Files that are named."""
CODE = Path(__file__).parent.parent  # the package


def build_manifest(
    config: dict[str, Any],
    *,
    overrides: Sequence[str] = (),
    data: dict[str, Any],
    model: dict[str, Any],
    seeds: Mapping[str, int] | None = None,
    preset: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns what is needed to explain or repeat a run, ready for `write_json`; no secret is left in it.

    `config` is the resolved config; `data` and `model` are metadata that the caller knows, e.g. row counts and hashes;
    `preset` has the values that the options of the groups set for keys that the run sets otherwise, if they are known.
    """
    manifest = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "working_directory": str(Path.cwd()),
        "overrides": list(overrides),
        "config": config,
        "config_hash": config_digest(config),
        "preset": None if preset is None else dict(preset),
        "seeds": dict(seeds or {}),
        "data": data,
        "model": model,
        "versions": versions(),
        "packages": packages(),
        "code": {**code_state(), "sha256": code_digest()},
        "project": project_state(with_diff=bool((config.get("manifest") or {}).get("diff"))),
        "hardware": hardware(),
        "processes": distributed.world_size(),
        "platform": platform.platform(),
    }
    hidden = hide_all(plain(manifest))
    assert isinstance(hidden, dict)
    return hidden


@contextlib.contextmanager
def keep_manifest(
    path: Path, manifest: dict[str, Any], *, peak_memory_gb: Callable[[], float], energy: Callable[[], float | None]
) -> Iterator[None]:
    """Writes a manifest, and when the block ends how it did, how long it took and what it needed.

    `energy` counts joules. A resumed run keeps its earlier starts in `starts`.
    """
    earlier = (read_manifest(path) or {}).get("starts", [])
    manifest = {**manifest, "starts": [*earlier, {"started": manifest["started"], "status": "running"}]}
    write_json(path, manifest)
    began, joules, status = time.perf_counter(), energy(), "failed"
    try:
        yield
        status = "finished"
    except (KeyboardInterrupt, Stopped, Pruned) as error:
        status = "pruned" if isinstance(error, Pruned) else "interrupted"
        raise
    finally:
        after = energy()
        used = None if joules is None or after is None else (after - joules) / 3600
        manifest["starts"][-1] |= {
            "status": status,
            "wall_seconds": round(time.perf_counter() - began, 3),
            "peak_memory_gb": peak_memory_gb(),
            "gpu_energy_wh": used,
            "gpu_energy": "measured by the driver, all processes on the GPUs" if used is not None else "not told here",
        }
        # The error that ended the run matters more than a disk that is full now, too.
        with contextlib.nullcontext() if status == "finished" else contextlib.suppress(UserError, OSError):
            write_json(path, manifest)


@functools.cache
def packages() -> dict[str, str]:
    """Returns the version of every installed package."""
    installed = dict(filter(None, map(_name_and_version, metadata.distributions())))
    return dict(sorted(installed.items(), key=lambda item: item[0].lower()))


def _name_and_version(package: metadata.Distribution) -> tuple[str, str] | None:
    """Reads the first lines alone: `package.metadata` parses the whole text, which takes a second for all packages."""
    text = package.read_text("METADATA") or package.read_text("PKG-INFO") or ""
    headers = dict(re.findall(r"^(Name|Version): *(.*?) *$", text.partition("\n\n")[0], re.MULTILINE))
    return (headers["Name"], headers["Version"]) if headers.keys() == {"Name", "Version"} else None


def write_json(path: Path, obj: Any) -> None:
    """Writes `obj` as JSON, atomically; raises `ResourceError` if the folder cannot be written."""
    write_text(path, json.dumps(plain(obj), indent=2, ensure_ascii=False) + "\n")


def plain(obj: Any) -> Any:
    """Returns `obj` in JSON's own types; a number that JSON lacks (nan, infinity) becomes its name."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        obj = dataclasses.asdict(obj)
    if isinstance(obj, Enum):
        return plain(obj.value)
    if isinstance(obj, dict):
        return {str(plain(key)): plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple | set | frozenset):
        return [plain(value) for value in (sorted(obj, key=str) if isinstance(obj, set | frozenset) else obj)]
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else str(obj)
    if obj is None or isinstance(obj, str | int):
        return obj
    return plain(obj.item()) if getattr(obj, "ndim", None) == 0 else str(obj)  # a number of numpy's or torch's


def command_line() -> str:
    """Returns the command that started this process, as one would type it."""
    script, *arguments = sys.argv or [""]
    if Path(script) == CODE / "__main__.py":
        return shlex.join(["python", "-m", "qlora", *arguments])
    return shlex.join([Path(script).name, *arguments])


def versions() -> dict[str, str | None]:
    """Returns the versions of Python and of the packages that determine a result; None for a missing one."""
    result: dict[str, str | None] = {"python": platform.python_version()}
    for label, package in PACKAGES.items():
        try:
            result[label] = metadata.version(package)
        except metadata.PackageNotFoundError:
            result[label] = None
    if result["qlora"] is None:
        from qlora import __version__

        result["qlora"] = __version__
    return result


def code_digest() -> str:
    """Returns 16 hex digits of the SHA-256 of this package's Python files."""
    digest = hashlib.sha256()
    for path in sorted(CODE.rglob("*.py")):
        digest.update(path.relative_to(CODE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def code_state() -> dict[str, Any]:
    """Returns the git commit of this package's own repository and whether files were changed; None if there is none.

    A package that is merely installed inside somebody's repository does not count.
    """
    if _git("ls-files", "--error-unmatch", str(CODE / "__init__.py")) is None:
        return {"commit": None, "dirty": None}
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": _git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def project_state(*, with_diff: bool = False) -> dict[str, Any]:
    """Returns the commit and the changes of the repository that the run was started in; None if there is none.

    The changes are the names of files with the lines that they gained and lost (None for a binary file), and the
    SHA-256 of `git diff HEAD`; `with_diff` adds that itself without what may be secret in it.
    """
    here = Path.cwd()
    compare = ("diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames")  # runs no program
    commit, diff = _git("rev-parse", "HEAD", folder=here), _git(*compare, folder=here)
    if diff is None:
        return {"commit": commit, "changes": None, "diff_sha256": None, "untracked": None}
    untracked = (_git("ls-files", "--others", "--exclude-standard", "-z", folder=here) or "").split("\0")
    state: dict[str, Any] = {
        "commit": commit,
        "changes": _count_lines(_git(*compare, "--numstat", "-z", folder=here) or ""),
        "diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
        "untracked": [name for name in untracked if name][:MAX_LIST],
    }
    if with_diff:
        safe_diff = hide_in_diff(diff)
        state["diff"] = safe_diff[:MAX_DIFF]
        state |= {"diff_left_out": len(safe_diff) - MAX_DIFF} if len(safe_diff) > MAX_DIFF else {}
    return state


def _count_lines(numstat: str) -> list[dict[str, Any]]:
    """Returns what `git diff --numstat -z` prints, file by file."""
    changes = []
    for record in filter(None, numstat.split("\0")):
        added, removed, name = record.split("\t", 2)
        counts = [int(count) if count.isdecimal() else None for count in (added, removed)]
        changes.append({"file": name, "added": counts[0], "removed": counts[1]})
    return changes[:MAX_LIST]


def _git(*arguments: str, folder: Path | None = None) -> str | None:
    return _output("git", "-C", str(folder or CODE), *arguments)


def _output(*command: str) -> str | None:
    """Returns what a program prints; None if it is missing, slow or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def hardware() -> dict[str, Any]:
    """Returns processor, cores, memory and GPUs."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        gpus.append({"name": properties.name, "memory_gb": _gb(properties.total_memory), "capability": capability})
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpus else None
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": _memory(),
        "gpus": gpus,
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda or torch.version.hip,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> float | None:
    try:
        return _gb(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # not a Unix system
        return None


def _gb(size: int) -> float:
    return round(size / 1e9, 1)
