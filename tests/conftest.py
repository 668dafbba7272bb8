"""Settings of all tests: no hub, and one thread a process, since the tests themselves run side by side."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
