"""A tracker whose server or whose process is gone in the middle of a run: the run continues and says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.upstream.wandb import count_rows

JOB = '''
import json, logging, os, signal, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from qlora.config.schema import TrackingConfig
from qlora.training.trackers import TrackedRun, build_tracker
from qlora.training.trackers import wandb as module

class Answers(BaseHTTPRequestHandler):
    """What wandb's server says to a new run."""
    def do_POST(self):
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode(errors="replace")
        project = {"id": "p", "name": "qlora", "entity": {"id": "e", "name": "me"}}
        name = json.loads(asked)["variables"]["name"] if "upsertBucket" in asked else None
        bucket = {"id": "b", "name": name, "displayName": name, "config": "{}", "project": project}
        made = {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}} if "upsertBucket" in asked else {}
        raw = json.dumps(made).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)
    do_GET = do_PUT = do_POST
    def log_message(self, *args):
        pass

logging.basicConfig(format="%(message)s")
server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{server.server_address[1]}"
module.FINISH_SECONDS = 2.0
tracker = build_tracker(TrackingConfig(backend="wandb"), TrackedRun("job", Path("run"), {"seed": 1}))
tracker.log({"train/loss": 3.0}, 1)
time.sleep(0.5)
if sys.argv[1] == "server":
    server.shutdown()
    server.server_close()
else:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        stat = path.with_name("stat").read_text().rpartition(")")[2].split() if path.exists() else [0, 0]
        if int(stat[1]) == os.getpid() and b"wandb-core" in path.read_bytes():
            os.kill(int(path.parent.name), signal.SIGKILL)
    time.sleep(0.5)
for step in range(2, 5):
    tracker.log({"train/loss": 3.0 / step}, step)
tracker.finish("finished", {"eval_loss": 1.0})
print("ended", flush=True)
'''


@pytest.mark.full
@pytest.mark.parametrize("what", ["server", pytest.param("process", marks=pytest.mark.full)])
def test_a_tracker_that_is_gone_does_not_end_the_run(tmp_path: Path, what: str) -> None:
    pytest.importorskip("wandb")
    (tmp_path / "run").mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("WANDB_SERVICE", "WANDB_MODE")}
    done = subprocess.run(
        [sys.executable, "-c", JOB, what],
        cwd=tmp_path,
        env=environment | {"WANDB_API_KEY": "a" * 40},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "ended\n"), done.stderr
    [folder] = tmp_path.glob("run/wandb/run-*")
    assert "tracking=wandb: not everything was sent (" in done.stderr
    assert done.stderr.endswith(f"); training continues, and `wandb sync {folder}` sends what was logged so far\n")
    assert len(done.stderr.splitlines()) == 1
    if what == "server":
        [file] = folder.glob("*.wandb")
        assert count_rows(file) == 4
