import atexit
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
# The test processes already use every core; thread pools of their own would only compete.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Rows and tokens of the tests are kept for this session only; its processes share them.
if "QLORA_TEST_CACHE" not in os.environ:
    os.environ["QLORA_TEST_CACHE"] = tempfile.mkdtemp(prefix="qlora-tests-")
    atexit.register(shutil.rmtree, os.environ["QLORA_TEST_CACHE"], ignore_errors=True)
os.environ["QLORA_CACHE"] = os.environ["QLORA_TEST_CACHE"]
