"""Memory, disk, rights and logins: what a run needs of the machine and of others."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from qlora.config.paths import cache_root
from qlora.config.schema import Config, Keep, TrackingConfig, TrainerConfig, Weights
from qlora.config.training_length import epoch_share
from qlora.doctor.findings import Finding, fail, fine, first_line, warn
from qlora.errors import UserError
from qlora.models.model_files import is_local, locate
from qlora.planning.memory_plan import Ledger
from qlora.planning.training_plan import Plan, build_plan
from qlora.runtime.disk_space import free_bytes
from qlora.text import format_bytes

MOST_CHECKPOINTS = 2
"""A run with `trainer.save_total_limit=null` is assumed to keep that many; the real number is not known."""
BEHIND_THE_CONFIG = (
    *("WANDB_MODE", "HF_ENDPOINT", "BNB_CUDA_VERSION", "PYTORCH_NO_CUDA_MEMORY_CACHING", "TORCHDYNAMO_DISABLE"),
    "CUDA_LAUNCH_BLOCKING",
)
"""Variables that the libraries read."""
HUB_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def check_memory(config: Config) -> Iterator[Finding]:
    """Compares what the training needs with what the device has, by the formulas of `task=plan`."""
    import torch

    from qlora.runtime.device import find_device

    device = find_device(config.device)
    here = replace(config, plan=replace(config.plan, device="h100"))  # any GPU: only what is needed is read
    try:
        planned: Plan | None = build_plan(here)
        unknown = ""
    except UserError as error:
        planned, unknown = None, first_line(error)
    free: float
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        there = f"{format_bytes(free)} of {format_bytes(whole)} of the GPU are free"
        needed = planned.memory.needed if planned else None
    else:
        free, there = _host_memory()
        # The formulas are those of a GPU; on the host the weights are what is certain.
        needed = (
            planned.memory.parts.get("weights", 0) + planned.memory.parts.get("embeddings and norms", 0)
            if planned
            else None
        )
    if needed is None:
        yield fine("memory", f"{there}; what the run needs is not known ({unknown})")
    elif needed > free:
        yield warn("memory", f"{there}, and the training needs about {format_bytes(needed)}",
                   "task=plan with the same overrides shows what to change")  # fmt: skip
    else:
        yield fine("memory", f"{there}; the training needs about {format_bytes(needed)}")


def _host_memory() -> tuple[float, str]:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if len(line.split()) > 1}
        free, whole = sizes["MemAvailable"], sizes["MemTotal"]
    except (OSError, KeyError, ValueError):
        return float("inf"), "how much memory is free is not known here"
    return float(free), f"{format_bytes(free)} of {format_bytes(whole)} of the host are free"


def check_disk(config: Config, folder: Path) -> Iterator[Finding]:
    """Compares what the run will write with the free space."""
    free = free_bytes(folder)
    try:
        setup = build_plan(replace(config, plan=replace(config.plan, device="h100")))
        needed = _written(config, setup)
    except UserError as error:
        yield fine(
            "disk", f"{format_bytes(free)} are free in {folder}; what is written is not known ({first_line(error)})"
        )
        return
    says = f"{format_bytes(free)} are free in {folder}; checkpoints and the result take about {format_bytes(needed)}"
    if needed > free:
        yield fail(
            "disk", says, "free some space, lower trainer.save_total_limit, or choose hydra.run.dir=FOLDER elsewhere"
        )
    else:
        yield fine("disk", says)


def _written(config: Config, plan: Plan) -> float:
    """Returns the bytes of the checkpoints that are kept and of the result: weights in 32 bits, and the states."""
    ledger = Ledger(plan.training.shape, plan.setup)
    weights = 4 * (ledger.trained_count if config.lora.enabled else plan.training.shape.parameters)
    states = sum(ledger.optimizer)
    return weights + _checkpoints(config.trainer) * (weights + states)


def _checkpoints(trainer: TrainerConfig) -> int:
    """Returns how many checkpoints are kept at a time; rows are not read here, so some shares of an epoch stay open."""
    every, limit = trainer.save_steps, trainer.save_total_limit or MOST_CHECKPOINTS
    if every is None:
        return 1 if trainer.keep is Keep.best else 0
    if isinstance(every, str) and trainer.num_train_epochs is not None:
        return min(limit, max(1, math.ceil(trainer.num_train_epochs / epoch_share(every))))
    if isinstance(every, int) and trainer.max_steps is not None:
        return min(limit, max(1, trainer.max_steps // every))
    return limit


def check_rights(config: Config, folder: Path) -> Iterator[Finding]:
    """Looks whether the run folder, the caches and the place for temporary files can be written."""
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        rows = cache_root(config.data.cache_dir)
    except UserError as error:
        says, _, fix = str(error).partition("; ")
        yield fail("home folder", says, fix)
        return
    folders = {
        "the run folder (hydra.run.dir)": folder,
        "the cache of rows (data.cache_dir)": rows,
        "the hub library's cache (HF_HOME)": Path(config.model.cache_dir or HF_HUB_CACHE),
        "temporary files (TMPDIR)": Path(tempfile.gettempdir()),
    }
    bad = [(what, path) for what, path in folders.items() if not _is_writable(path)]
    for what, path in bad:
        yield fail("write rights", f"{path} cannot be written: {what}", "fix its permissions, or choose another folder")
    if not bad:
        yield fine("write rights", "run folder, caches and temporary files")


def _is_writable(path: Path) -> bool:
    """Returns whether a folder can be written, or made where it is not there yet; leaves nothing behind."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        with tempfile.TemporaryFile(dir=path):
            return True
    except OSError:
        return False


def check_hub(config: Config) -> Iterator[Finding]:
    """Looks whether the base is here or can be fetched, and whether there is a login if it asks for one."""
    from huggingface_hub import get_token, try_to_load_from_cache
    from huggingface_hub.constants import is_offline_mode

    token, model = get_token(), config.model
    login = "an access token is set" if token else "no access token"
    path = locate(model.name) if model.weights is Weights.pretrained else ""
    if model.weights is Weights.random or is_local(path):
        yield fine("hub", f"{login}; the base is not from the hub")
    elif isinstance(
        try_to_load_from_cache(path, "config.json", revision=model.revision, cache_dir=model.cache_dir), str
    ):
        yield fine("hub", f"{login}; {model.name} is in the cache")
    elif is_offline_mode():
        yield fail("hub", f"{model.name} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it",
                   "unset HF_HUB_OFFLINE, or give a folder with model.name=FOLDER")  # fmt: skip
    elif model.gated and not token:
        yield fail("hub", f"{model.name} is gated, and there is no access token",
                   f"accept its licence on its hub page, then {HUB_LOGIN}")  # fmt: skip
    else:
        yield fine("hub", f"{login}; {model.name} will be fetched")
    if token and config.task.online:
        yield from _ask_hub()


def _ask_hub() -> Iterator[Finding]:
    from huggingface_hub import whoami

    try:
        yield fine("hub login", f"accepted: {whoami()['name']}")
    except Exception as error:  # of the network, or of the hub
        yield fail("hub login", f"not accepted: {first_line(error)}", HUB_LOGIN)


def check_tracking(config: Config) -> Iterator[Finding]:
    """Looks whether the packages and logins of the trackers are there."""
    for tracking in config.tracking.trackers or [config.tracking]:
        yield from _check_tracker(tracking, online=config.task.online)


def _check_tracker(tracking: TrackingConfig, *, online: bool) -> Iterator[Finding]:
    from qlora.training.trackers import tracker_class

    name = tracking.in_use
    try:
        tracker = tracker_class(tracking)
        yield fine("tracking", tracker.check_access(tracking))
    except UserError as error:
        yield fail("tracking", str(error), "or tracking=none")
        return
    try:
        if online and (account := tracker.account(tracking)) is not None:
            yield fine(f"{name} login", f"accepted: {account}")
    except Exception as error:  # of the network, or of the server
        yield fail(f"{name} login", f"not accepted: {first_line(error)}", f"{name} login --relogin")


def check_environment() -> Iterator[Finding]:
    """Names variables that change what a run does behind its config's back."""
    problems = {name: os.environ[name] for name in BEHIND_THE_CONFIG if os.environ.get(name)}
    if problems:
        parts = " ".join(f"{name}={value}" for name, value in problems.items())
        yield warn("environment", f"{parts} changes what a run does", "unset what you did not mean")
