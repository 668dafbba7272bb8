import atexit
import gc
import os
import shutil
import tempfile

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files with long tests come first, so that no process has one left when the others have no more to do."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()
