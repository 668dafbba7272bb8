"""Uploads against a local stand-in of the hub's HTTP interface: what arrives, and what is said when nothing does."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load

from qlora.config.compose import compose
from qlora.errors import UserError
from qlora.run import Run

TOKEN = "hf_secret"


class Hub(ThreadingHTTPServer):
    """Keeps what is uploaded: small files come in the commit, weights through git-lfs."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.status = 200
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.status != 200:
            self.answer({"error": "no such luck"}, self.server.status)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request['organization']}/{request['name']}" if request.get("organization") else request["name"]
            self.server.repos[name] = request
            self.answer({"url": f"{self.server.address}/{name}", "id": name})
        elif "/preupload/" in self.path:
            modes = [
                {"path": file["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                for file in json.loads(body)["files"]
            ]  # fmt: skip
            self.answer({"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            links = [{**blob, "actions": {"upload": {"href": f"{self.server.address}/lfs/{blob['oid']}"}}}
                     for blob in objects]  # fmt: skip
            self.answer({"transfer": "basic", "objects": links}, kind="application/vnd.git-lfs+json")
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[value["path"]] = self.server.blobs[value["oid"]]
            self.answer({"commitUrl": f"{self.server.address}/me/tuned/commit/abc", "commitOid": "abc"})
        else:
            self.answer({"error": f"unknown {self.path}"}, 404)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(body).hexdigest() == self.path.rpartition("/")[2]
        self.server.blobs[self.path.rpartition("/")[2]] = body
        self.answer({})

    def answer(self, content: dict[str, Any], status: int = 200, kind: str = "application/json") -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "finished"
    quick = ["lora.r=4", "trainer.max_steps=2", "trainer.eval_steps=null", "data.max_eval_samples=4"]
    quick += ["data.max_train_samples=32", "trainer.lr_scheduler_type=constant", "trainer.lr_scheduler_kwargs={}"]
    quick += ["trainer.warmup_steps=0", "evaluation=loss", "task.predict=false"]
    Run(compose(quick), folder).execute()
    return folder


def push(hub_address: str, tmp_path: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {"HF_ENDPOINT": hub_address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "qlora", "task=push", f"hydra.run.dir={tmp_path / 'push'}", *overrides]
    return subprocess.run(
        command, env=os.environ | variables | {"HF_HOME": str(tmp_path)} | environment, capture_output=True, text=True
    )


@pytest.mark.full
def test_a_finished_run_arrives_whole_in_one_private_repository(hub: Hub, finished: Path, tmp_path: Path) -> None:
    done = push(hub.address, tmp_path, f"adapter={finished}", "repo=me/tuned")
    assert done.returncode == 0, done.stderr
    assert f"{hub.address}/me/tuned/commit/abc" in done.stdout
    request = hub.repos["me/tuned"]  # how privacy is said depends on the version of huggingface_hub
    assert request.get("private") is True or request.get("visibility") == "private"
    local = {path.name for path in (finished / "adapter").iterdir()}
    assert set(hub.files) == local | {"loss.png", "metrics.json"}
    assert load(hub.files["adapter_model.safetensors"]).keys()
    for name in local - {"README.md"}:
        assert hub.files[name] == (finished / "adapter" / name).read_bytes()
    card = hub.files["README.md"].decode()
    assert '\nfolder = "me/tuned"\n' in card
    assert "eval" in card or "held-out metric" in card
    assert json.loads((tmp_path / "push" / "push.json").read_text())["paths"]["commit"].endswith("/commit/abc")


@pytest.mark.full
@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (403, "error: repo=me/tuned: the access token may not write there; use a token with write access"),
        pytest.param(
            *(401, "error: repo=me/tuned: the hub does not accept the access token; log in again with `hf auth login`"),
            marks=pytest.mark.full,
        ),
        pytest.param(422, "error: repo=me/tuned: the hub refused the upload (no such luck)", marks=pytest.mark.full),
    ],
)
def test_a_refusal_is_one_sentence(hub: Hub, finished: Path, tmp_path: Path, status: int, sentence: str) -> None:
    hub.status = status
    done = push(hub.address, tmp_path, f"adapter={finished}", "repo=me/tuned")
    assert (done.returncode, done.stderr.strip().count("\n")) == (1, 0)
    assert done.stderr.startswith(sentence)


@pytest.mark.full
def test_without_network_the_host_is_named(finished: Path, tmp_path: Path) -> None:
    done = push("http://127.0.0.1:9", tmp_path, f"adapter={finished}", "repo=me/tuned")
    assert done.returncode == 1
    assert done.stderr.startswith("error: repo=me/tuned: http://127.0.0.1:9 cannot be reached (")


@pytest.mark.full
def test_without_a_login_nothing_is_sent(hub: Hub, finished: Path, tmp_path: Path) -> None:
    done = push(hub.address, tmp_path, f"adapter={finished}", "repo=me/tuned", HF_TOKEN="")
    assert done.returncode == 1
    assert "no access token is set; log in with `hf auth login`, or set HF_TOKEN" in done.stderr
    assert not hub.repos


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([], "repo is not set; name the hub repository to upload to, e.g. repo=me/guanaco-7b"),
        (["repo=mine"], "repo must be OWNER/NAME, got 'mine'; name the hub repository"),
    ],
)
def test_a_repository_has_an_owner_and_a_name(overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=f"^{sentence}"):
        compose(["task=push", *overrides])


def test_the_bare_base_is_not_pushed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="adapter=none: there is nothing to push"):
        Run(compose(["task=push", "repo=me/tuned", "adapter=none"]), tmp_path).execute()
