"""The processes that were launched together: their number, the rank of this one, and their communication.

`torchrun` and `accelerate launch` describe them in the environment of each process. Only the main process, of rank 0,
writes files. The communication here runs on the CPU and may take as long as it needs.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from qlora.errors import ResourceError, RunError
from qlora.runtime.program import program_name
from qlora.secrets import hide

T = TypeVar("T")

STEP_TIMEOUT = timedelta(minutes=30)
"""How long an operation of a training step may take before the other process counts as lost."""
WAIT_TIMEOUT = timedelta(days=7)
"""How long one process may work while the others wait: an evaluation, a large data set, a full disk."""

LAUNCH_HINT = "start it with torchrun --nproc-per-node N -m qlora ..., or accelerate launch -m qlora ..."

OTHER_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""The variables by which other launchers pass the number of processes."""

_group: Any = None  # the process group for what may take long
_store: Any = None  # a key-value store that all processes share, those of earlier starts included
_starts = 1


def world_size() -> int:
    """Returns how many processes were launched together."""
    return max(_read_int("WORLD_SIZE"), 1)


def rank() -> int:
    """Returns the index of this process among all of them."""
    return max(_read_int("RANK"), 0)


def local_rank() -> int:
    """Returns the index of this process among those of its machine."""
    return max(_read_int("LOCAL_RANK"), 0)


def is_main_process() -> bool:
    """Returns whether this process has rank 0 or is the only one."""
    return rank() == 0 and local_rank() == 0


def _read_int(name: str) -> int:
    return int(os.environ.get(name) or 0)


def init_process_group() -> None:
    """Forms the group of all processes; does nothing for a single process.

    Raises a `UserError` if the launcher passed a wrong number of processes, or if they do not find each other.
    """
    global _group, _store, _starts
    _check_environment()
    if world_size() == 1:
        return
    import torch
    from torch import distributed

    backend = "gloo"
    for kind, name in (("cuda", "nccl"), ("xpu", "xccl")):
        device = getattr(torch, kind)
        if device.is_available():
            backend = f"cpu:gloo,{kind}:{name}"
            if local_rank() < device.device_count():
                device.set_device(local_rank())
    try:
        _store = _open_store()
        store = _prefix_of_this_start(_store)
        distributed.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=STEP_TIMEOUT)
        _group = distributed.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
        _starts = broadcast(_store.add("start/count", 1) if rank() == 0 else 0)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ResourceError(
            f"the {world_size()} processes of this run do not find each other: {reason}; {LAUNCH_HINT}"
        ) from error


def _open_store() -> Any:
    from torch import distributed

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return distributed.TCPStore(address, port, is_master=rank() == 0 and not of_launcher, timeout=STEP_TIMEOUT)


def _prefix_of_this_start(store: Any) -> Any:
    """Returns a part of the store that no earlier start has written to.

    torchrun keeps its store when it restarts processes, and gloo would wait for the addresses of processes that are
    gone. Its count of restarts differs between machines. So the main process names the start, and another process
    accepts a name only if the answer contains its own token.
    """
    from torch import distributed

    token = uuid.uuid4().hex
    if rank() == 0:
        store.set("start/name", token)
        tokens = [store.get(f"start/{token}/{other}") for other in range(1, world_size())]
        store.set(f"start/{token}/met", b" ".join(tokens))
        return distributed.PrefixStore(token, store)
    while True:
        name = store.get("start/name").decode()
        store.set(f"start/{name}/{rank()}", token)
        try:
            store.wait([f"start/{name}/met"], timedelta(seconds=1))
        except distributed.DistStoreError:  # this name belongs to a start that failed
            continue
        if token in store.get(f"start/{name}/met").decode().split():
            return distributed.PrefixStore(name, store)
        time.sleep(0.1)


def _check_environment() -> None:
    for name in OTHER_COUNTS:
        if _read_int(name) > world_size():
            raise RunError(
                f"{_read_int(name)} processes of this command were launched ({name}), but they know of only "
                f"{world_size()} (WORLD_SIZE), so each would train alone; "
                f"{LAUNCH_HINT} (on several machines: one torchrun on each)"
            )
    if world_size() > 1 and (missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
                                   if not os.environ.get(name)]):  # fmt: skip
        raise RunError(
            f"WORLD_SIZE={world_size()} says that {world_size()} processes train together, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set; {LAUNCH_HINT}, or unset WORLD_SIZE"
        )
    for name, instead in (("FSDP", "choose trainer.parallel=fsdp"), ("DEEPSPEED", "DeepSpeed is not supported")):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true"):
            raise RunError(
                f"accelerate's own config asks for {name} (ACCELERATE_USE_{name}), which would take the model out of "
                f"this run's hands; {instead}, and launch with accelerate launch --multi_gpu -m qlora ..."
            )


def command() -> list[str]:
    """Returns the command that starts this program in the same number of processes."""
    if world_size() == 1:
        return program_name()
    per_node = _read_int("LOCAL_WORLD_SIZE") or world_size()
    nodes = ["--nnodes", str(world_size() // per_node)] if per_node < world_size() else []
    return ["torchrun", *nodes, "--nproc-per-node", str(per_node), "-m", "qlora"]


def destroy_process_group() -> None:
    """Ends the group of all processes."""
    global _group
    if _group is not None:
        from torch import distributed

        _group = None
        distributed.destroy_process_group()


def agree_on_start(key: str, value: str) -> str:
    """Returns the value of the process that asks first; after a restart by torchrun, the value of the first start."""
    return value if _store is None else str(_store.compare_set(f"start/{key}", "", value).decode())


def is_restart() -> bool:
    """Returns whether torchrun has restarted these processes after they had found each other once."""
    return _starts > 1


def broadcast(value: T) -> T:
    """Returns the value of the main process in all processes."""
    if _group is None:
        return value
    from torch import distributed

    values = [value]
    distributed.broadcast_object_list(values, src=0, group=_group)
    return values[0]


def all_gather(value: T) -> list[T]:
    """Returns the values of all processes, by rank, in all processes."""
    if _group is None:
        return [value]
    from torch import distributed

    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value, group=_group)
    return values


def all_reduce_max(numbers: Sequence[int]) -> list[int]:
    """Returns the maximum over all processes of each number, 0 to 255."""
    if _group is None:
        return list(numbers)
    import torch
    from torch import distributed

    maxima = torch.tensor(numbers, dtype=torch.uint8)
    distributed.all_reduce(maxima, distributed.ReduceOp.MAX, group=_group)
    return maxima.tolist()


def barrier() -> None:
    """Returns when all processes have called it."""
    all_gather(None)


def check_same(what: str, value: object) -> None:
    """Raises `RunError` unless `value` is equal in all processes."""
    if len(values := set(all_gather(value))) > 1:
        listed = ", ".join(sorted(map(str, values)))
        raise RunError(f"the processes of this run do not have the same {what}: {listed}; all must see equal files")


APPEARS_SECONDS = 10.0
"""How long a shared disk may take to show one machine what another has written."""


def check_shared(folder: Path) -> None:
    """Raises `ResourceError`, in all processes, unless all of them see the folder that the main process writes to."""
    if _group is None:
        return
    mark = folder / broadcast(f".seen-{uuid.uuid4().hex}")
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    barrier()
    seen = all_gather((platform.node(), _appears(mark)))
    if is_main_process():
        mark.unlink(missing_ok=True)
    if blind := sorted({node for node, sees in seen if not sees}):
        raise ResourceError(
            f"{folder} is written by the main process, on {seen[0][0]}, and not visible to all processes on "
            f"{', '.join(blind)}: all of them read its checkpoints; name a folder on a disk that all machines share, "
            "with hydra.run.dir=FOLDER"
        )


def _appears(path: Path) -> bool:
    end = time.monotonic() + APPEARS_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


@contextlib.contextmanager
def local_main_process_first() -> Iterator[None]:
    """Lets one process of each machine run the block first, and the others after it."""
    if local_rank() > 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()


PEER_GONE = ("closed by peer", "reset by peer", "Connection refused", "Broken pipe", "remote process exited")
"""What gloo and NCCL write when another process is gone; gloo raises a plain `RuntimeError` without attributes."""


def is_loss_of_peer(error: BaseException) -> bool:
    """Returns whether an error only says that another process is gone, whose own message gives the reason."""
    if _group is None or not isinstance(error, RuntimeError):
        return False
    from torch import distributed

    if isinstance(error, distributed.DistNetworkError):
        return True
    return any(text in str(error) for text in PEER_GONE)


def tell_launcher(error: BaseException, *, in_full: bool) -> None:
    """Writes an error without secrets to the file that torchrun reads, so that its summary shows the first error.

    With `in_full` the record has the traceback, else only the message.
    """
    if isinstance(error, Exception) and (file := os.environ.get("TORCHELASTIC_ERROR_FILE")):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
        record = json.loads(Path(file).read_text(encoding="utf-8"))
        if not in_full:
            record["message"]["extraInfo"]["py_callstack"] = str(error)
        Path(file).write_text(hide(json.dumps(record)), encoding="utf-8")
