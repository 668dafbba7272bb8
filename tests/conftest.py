"""What every test process needs: an offline hub, one cache of rows, Ctrl-C, a clean log, and no process left behind."""

import atexit
import gc
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.warm import end_template, keep_frozen, unfreeze, warm_starts

os.environ["HF_HUB_OFFLINE"] = "1"
# The test processes already use every core; thread pools of their own would only compete.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Rows and tokens of the tests are kept for this session only; its processes share them.
if "QLORA_TEST_CACHE" not in os.environ:
    os.environ["QLORA_TEST_CACHE"] = tempfile.mkdtemp(prefix="qlora-tests-")
    atexit.register(shutil.rmtree, os.environ["QLORA_TEST_CACHE"], ignore_errors=True)
os.environ["QLORA_CACHE"] = os.environ["QLORA_TEST_CACHE"]

# A shell ignores SIGINT for what it starts in the background, and every process below inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

FORKS = os.environ.get("QLORA_TEST_COLD") != "1"
"""Whether commands that tests start are forked."""
warm_starts(FORKS)

# What is imported until the tests begin stays: no collection looks through its half a million objects.
gc.disable()


@pytest.fixture(autouse=True)
def log_left_as_it_was() -> Iterator[None]:
    """A command that a test runs in this process sets up Python's log; the next test finds it as if there were none."""
    root, package = logging.getLogger(), logging.getLogger("qlora")
    handlers, levels = list(root.handlers), (root.level, package.level)
    yield
    for handler in set(root.handlers) - set(handlers):
        if not type(handler).__module__.startswith("_pytest."):
            root.removeHandler(handler)
            handler.close()
    root.setLevel(levels[0])
    package.setLevel(levels[1])


@pytest.fixture(autouse=True, scope="session")
def whole_lines() -> Iterator[None]:
    """Tests read sentences whole; those of a screen set the width of a terminal."""
    os.environ["COLUMNS"] = "1000"
    yield
    del os.environ["COLUMNS"]


@pytest.fixture(autouse=True)
def start_of_commands(request: pytest.FixtureRequest) -> Iterator[None]:
    """Forks the commands that a test starts from a process that has imported everything, unless it is marked `cold`."""
    warm_starts(FORKS and request.node.get_closest_marker("cold") is None)
    yield
    warm_starts(FORKS)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 64 x 2 with random weights, without a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=1600,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.hookimpl(tryfirst=True)  # before `full` is left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files with long tests come first, so that no process has one left when the others have no more to do."""
    _thin_matrices(items)
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


def _thin_matrices(items: list[pytest.Item]) -> None:
    """Marks the cases of a `matrix` that do not run by default as `full`."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("matrix") is not None:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for matrix in cases.values():
        mark = matrix[0].get_closest_marker("matrix")
        assert mark is not None
        step = max(len(matrix) - 1, 1) / max(mark.args[0] - 1, 1)
        kept = {round(index * step) for index in range(mark.args[0])}
        for index, item in enumerate(matrix):
            if index not in kept:
                item.add_marker(pytest.mark.full)


def pytest_collection_finish() -> None:
    keep_frozen()
    gc.enable()
    atexit.register(unfreeze)


SERVERS = ("multiprocessing.forkserver", "multiprocessing.resource_tracker", "compile_worker")
"""What Python and torch start once for a process, and what ends with it."""
SECONDS_TO_END = 10


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails the session where a process that a test has started is still there."""
    end_template()
    if sys.platform != "linux" or hasattr(session.config, "workerinput"):
        return
    end = time.monotonic() + SECONDS_TO_END
    while (left := _processes_of_tests()) and time.monotonic() < end:
        time.sleep(0.1)
    if left:
        listed = "\n  ".join(f"{pid}: {command}" for pid, command in left.items())
        print(f"\nthe tests left these processes behind:\n  {listed}", file=sys.stderr)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _processes_of_tests() -> dict[int, str]:
    """Returns the commands of the processes that inherited this session's cache folder, whoever their parent is."""
    mark = f"QLORA_TEST_CACHE={os.environ['QLORA_TEST_CACHE']}".encode()
    commands: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_of_tests = mark in (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # it ended, or belongs to another user
            continue
        if is_of_tests and int(folder.name) != os.getpid() and not any(server in command for server in SERVERS):
            commands[int(folder.name)] = command[:200]
    return commands
