"""One run in a process of its own: no network, no telemetry, no secret shown or stored, no file elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from promises import QUICK, ROOT, SECRETS, losses

from qlora.config.compose import compose
from qlora.run import Run
from qlora.secrets import HIDDEN
from qlora.training.arguments import build_arguments

CHILD = """
import os, socket, sys
from pathlib import Path

attempts = []

def refuse(*args, **kwargs):
    attempts.append(repr(args))
    raise OSError("the network is blocked")

connect = socket.socket.connect

def local_only(self, address):
    if self.family == socket.AF_UNIX or (isinstance(address, tuple) and address[0] in ("127.0.0.1", "::1")):
        return connect(self, address)  # wandb's own process
    return refuse(address)

socket.socket.connect, socket.getaddrinfo = local_only, refuse
sys.argv = ["qlora", *sys.argv[1:]]
from qlora.cli import main
code = 0
try:
    main()
except SystemExit as end:
    code = end.code or 0
import huggingface_hub.constants as hub, importlib.util
print("TELEMETRY", hub.HF_HUB_DISABLE_TELEMETRY, os.environ["DO_NOT_TRACK"], importlib.util.find_spec("kernels"))
print("ATTEMPTS", attempts)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run with the network blocked, secrets planted in the environment, a git repository with a secret around it."""
    folder = tmp_path_factory.mktemp("child")
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    (folder / "settings.py").write_text("x = 1\n")
    for args in (("init", "-q"), ("add", "settings.py"), (*who, "commit", "-q", "-m", "first")):
        subprocess.run(["git", *args], cwd=folder, check=True, capture_output=True)
    planted = f"x = 2\ntoken = '{SECRETS['HF_TOKEN']}'\nPASSWORD = 'only-in-the-diff'\nplain = 'stays'\n"
    (folder / "settings.py").write_text(planted)
    (folder / "logs_it.py").write_text(
        "import logging, os\n"
        "from transformers import TrainerCallback\n"
        "class LogsIt(TrainerCallback):\n"
        "    def on_train_begin(self, args, state, control, **kwargs):\n"
        "        logging.getLogger('qlora.mine').warning('the key is %s', os.environ['OPENAI_API_KEY'])\n"
        "        try:\n"
        "            raise RuntimeError(os.environ['MY_SERVICE_PASSWORD'])\n"
        "        except RuntimeError:\n"
        "            logging.getLogger('qlora.mine').exception('failed')\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "WANDB_"))}
    environment |= SECRETS | {"PYTHONPATH": f"{folder}:{ROOT}:{ROOT}/qlora/plugins", "HF_HOME": str(folder / "hf")}
    args = [*QUICK, "hydra.run.dir=run", "tracking=wandb", "tracking.mode=offline", "trusted=[logs_it]"]
    args.append("callbacks.logs._target_=logs_it.LogsIt")
    command = [sys.executable, "-c", CHILD, *args]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done


@pytest.mark.full
def test_a_run_with_the_network_blocked_tries_nothing_and_gives_the_same_losses(
    child: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder, done = child
    assert "ATTEMPTS []" in done.stdout
    Run(compose(QUICK), tmp_path).train()
    assert losses(folder / "run") == losses(tmp_path)


@pytest.mark.full
def test_telemetry_is_off_and_no_kernels_are_fetched(child: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    assert "TELEMETRY True 1 None" in child[1].stdout
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "WANDB_ERROR_REPORTING", "MLFLOW_DISABLE_TELEMETRY"):
        assert os.environ[name]


def test_no_secret_reaches_a_file_or_the_screen(child: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = child
    files = [path for path in (folder / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for name, secret in SECRETS.items():
        matches = [str(path) for path in files if secret.encode() in path.read_bytes()]
        assert not matches, f"{name} in {matches}"
        assert secret not in done.stdout + done.stderr, name
    log = (folder / "run" / "train.log").read_text()
    assert f"the key is {HIDDEN}" in log
    assert f"RuntimeError: {HIDDEN}" in log, "in a traceback, too"
    project = json.loads((folder / "run" / "manifest.json").read_text())["project"]
    assert "only-in-the-diff" not in json.dumps(project)
    assert project["changes"] == [{"file": "settings.py", "added": 4, "removed": 1}]
    assert "diff" not in project
    assert "logs_it.py" in project["untracked"]


def test_a_run_writes_to_its_folder_alone(child: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    there = {path.name for path in child[0].iterdir()}
    assert there <= {"run", "hf", ".git", "settings.py", "logs_it.py", "__pycache__"}


def test_a_checkpoint_of_transformers_is_written_without_reports(tmp_path: Path) -> None:
    config = compose(QUICK)
    arguments = build_arguments(config.trainer, output_dir=tmp_path, device=torch.device("cpu"),
                                compute=torch.float32, seed=0)  # fmt: skip
    assert arguments.report_to == []
    assert arguments.push_to_hub is False
