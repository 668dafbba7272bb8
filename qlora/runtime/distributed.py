"""The processes that were launched together: how many they are, which of them this one is, and what they agree on.

`torchrun` and `accelerate launch` tell each process in its environment. The first one, of rank 0, leads: it alone
writes. What is said between processes here goes over the CPU and waits as long as it takes.
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

from qlora.errors import ConfigError
from qlora.secrets import hide

T = TypeVar("T")

STEP_TIMEOUT = timedelta(minutes=30)
"""How long an operation of a training step may take, until the process that is waited for counts as lost."""
WAIT_TIMEOUT = timedelta(days=7)
"""How long one process may work while the others wait: long evaluations, large data sets, a full disk."""

HOW = "start it with torchrun --nproc-per-node N -m qlora ..., or accelerate launch -m qlora ..."

# What tells a process of other launchers how many of it there are.
OTHER_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")

_group: Any = None  # the processes' group for what may take long
_store: Any = None  # what all processes, and those of earlier starts, can read and write
_starts = 1


def size() -> int:
    """Returns how many processes were launched together."""
    return max(_number("WORLD_SIZE"), 1)


def rank() -> int:
    """Returns the number of this process among all of them, from 0."""
    return max(_number("RANK"), 0)


def local_rank() -> int:
    """Returns the number of this process among those of its machine, from 0."""
    return max(_number("LOCAL_RANK"), 0)


def is_main_process() -> bool:
    """Returns whether this process leads: rank 0, or the only one."""
    return rank() == 0 and local_rank() == 0


def _number(name: str) -> int:
    return int(os.environ.get(name) or 0)


def join() -> None:
    """Forms the group of all processes; does nothing for a process alone.

    Raises `ConfigError` where fewer processes know of each other than were launched, or where they do not meet.
    """
    global _group, _store, _starts
    _check_environment()
    if size() == 1:
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
        store = _meet(_store)
        distributed.init_process_group(backend, store=store, rank=rank(), world_size=size(), timeout=STEP_TIMEOUT)
        _group = distributed.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
        _starts = broadcast(_store.add("start/count", 1) if rank() == 0 else 0)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"the {size()} processes of this run do not find each other: {reason}; {HOW}") from error


def _open_store() -> Any:
    from torch import distributed

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return distributed.TCPStore(address, port, is_master=rank() == 0 and not of_launcher, timeout=STEP_TIMEOUT)


def _meet(store: Any) -> Any:
    """Returns a part of the store that no earlier start has written to.

    torchrun keeps its store when it starts processes again, and gloo would wait for the addresses of those that are
    gone. Its count of restarts is another on each machine. So the first process names the start, and another believes
    a name when its own word is in the answer.
    """
    from torch import distributed

    own = uuid.uuid4().hex
    if rank() == 0:
        store.set("start/name", own)
        words = [store.get(f"start/{own}/{number}") for number in range(1, size())]
        store.set(f"start/{own}/met", b" ".join(words))
        return distributed.PrefixStore(own, store)
    while True:
        name = store.get("start/name").decode()
        store.set(f"start/{name}/{rank()}", own)
        try:
            store.wait([f"start/{name}/met"], timedelta(seconds=1))
        except distributed.DistStoreError:  # the name of a start that failed
            continue
        if own in store.get(f"start/{name}/met").decode().split():
            return distributed.PrefixStore(name, store)
        time.sleep(0.1)


def _check_environment() -> None:
    for name in OTHER_COUNTS:
        if _number(name) > size():
            raise ConfigError(
                f"{_number(name)} processes of this command were launched ({name}), but they know of {size()} only "
                f"(WORLD_SIZE), so each would train on its own; {HOW} (on several machines: one torchrun on each)"
            )
    if size() > 1 and (missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
                                   if not os.environ.get(name)]):  # fmt: skip
        raise ConfigError(
            f"WORLD_SIZE={size()} says that {size()} processes train together, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set; {HOW}, or unset WORLD_SIZE"
        )
    for name, instead in (("FSDP", "choose trainer.parallel=fsdp"), ("DEEPSPEED", "DeepSpeed is not supported")):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true"):
            raise ConfigError(
                f"accelerate's own config asks for {name} (ACCELERATE_USE_{name}), which would take the model out of "
                f"this run's hands; {instead}, and launch with accelerate launch --multi_gpu -m qlora ..."
            )


def command() -> list[str]:
    """Returns the words that start this program in as many processes."""
    if size() == 1:
        return ["qlora"]
    here = _number("LOCAL_WORLD_SIZE") or size()
    machines = ["--nnodes", str(size() // here)] if here < size() else []
    return ["torchrun", *machines, "--nproc-per-node", str(here), "-m", "qlora"]


def leave() -> None:
    """Ends the group, when all is done."""
    global _group
    if _group is not None:
        from torch import distributed

        _group = None
        distributed.destroy_process_group()


def agree_on_start(what: str, word: str) -> str:
    """Returns the word of the process that asks first; after a restart by torchrun, what it was at first."""
    return word if _store is None else str(_store.compare_set(f"start/{what}", "", word).decode())


def is_restart() -> bool:
    """Returns whether torchrun has started these processes again, after some of them had met before."""
    return _starts > 1


def broadcast(value: T) -> T:
    """Returns the value of the first process, in all of them."""
    if _group is None:
        return value
    from torch import distributed

    box = [value]
    distributed.broadcast_object_list(box, src=0, group=_group)
    return box[0]


def all_gather(value: T) -> list[T]:
    """Returns the values of all processes, by rank, in all of them."""
    if _group is None:
        return [value]
    from torch import distributed

    found: list[Any] = [None] * size()
    distributed.all_gather_object(found, value, group=_group)
    return found


def all_reduce_max(numbers: Sequence[int]) -> list[int]:
    """Returns the largest of all processes for each number, 0 to 255."""
    if _group is None:
        return list(numbers)
    import torch
    from torch import distributed

    largest = torch.tensor(numbers, dtype=torch.uint8)
    distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=_group)
    return largest.tolist()


def barrier() -> None:
    """Returns when all processes have come here."""
    all_gather(None)


def check_same(what: str, value: object) -> None:
    """Raises `ConfigError` unless `value` is the same in all processes."""
    if len(values := set(all_gather(value))) > 1:
        shown = ", ".join(sorted(map(str, values)))
        raise ConfigError(f"the processes of this run do not have the same {what}: {shown}; all must see equal files")


APPEARS_SECONDS = 10.0
"""A shared disk may take so long to show one machine what another has written."""


def check_shared(folder: Path) -> None:
    """Raises `ConfigError`, in all processes, unless all of them see the folder that the first one writes to."""
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
        raise ConfigError(
            f"{folder} is written by the first process, on {seen[0][0]}, and not seen by all processes on "
            f"{', '.join(blind)}: all of them read its checkpoints; give a folder on a disk that all machines share, "
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
    """Lets one process of each machine run the block first, and the others when that has ended."""
    if local_rank() > 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()


def is_loss_of_peer(error: BaseException) -> bool:
    """Returns whether an error says no more than that another process is gone, whose own message tells why."""
    if _group is None or not isinstance(error, RuntimeError):
        return False
    text = str(error)
    return any(words in text for words in ("closed by peer", "reset by peer", "Connection refused", "Broken pipe",
                                           "remote process exited"))  # fmt: skip


def tell_launcher(error: BaseException, *, in_full: bool) -> None:
    """Leaves an error where torchrun looks for it, so that its summary tells the first one; without secrets.

    With its traceback `in_full`, else in its own words alone.
    """
    if isinstance(error, Exception) and (place := os.environ.get("TORCHELASTIC_ERROR_FILE")):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
        record = json.loads(Path(place).read_text(encoding="utf-8"))
        if not in_full:
            record["message"]["extraInfo"]["py_callstack"] = str(error)
        Path(place).write_text(hide(json.dumps(record)), encoding="utf-8")
