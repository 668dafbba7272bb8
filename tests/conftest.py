import atexit
import gc
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
# The test processes already use every core; thread pools of their own would only compete.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Rows and tokens of the tests are kept for this session only; its processes share them.
if "QLORA_TEST_CACHE" not in os.environ:
    os.environ["QLORA_TEST_CACHE"] = tempfile.mkdtemp(prefix="qlora-tests-")
    atexit.register(shutil.rmtree, os.environ["QLORA_TEST_CACHE"], ignore_errors=True)
os.environ["QLORA_CACHE"] = os.environ["QLORA_TEST_CACHE"]

# What is imported until the tests begin stays: no collection looks through its half a million objects.
gc.disable()


@pytest.fixture(autouse=True)
def log_left_as_it_was() -> Iterator[None]:
    """A command that a test runs in this process sets up Python's log; the next test finds it as if there were none."""
    root, own = logging.getLogger(), logging.getLogger("qlora")
    handlers, levels = list(root.handlers), (root.level, own.level)
    yield
    for handler in set(root.handlers) - set(handlers):
        if not type(handler).__module__.startswith("_pytest."):
            root.removeHandler(handler)
            handler.close()
    root.setLevel(levels[0])
    own.setLevel(levels[1])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files with long tests come first, so that no process has one left when the others have no more to do."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()
