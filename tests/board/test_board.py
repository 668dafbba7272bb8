"""The board's server: what it shows, and what it refuses to everybody."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import write_run, write_sweep

from qlora.board.run_list import RunList
from qlora.board.served_folder import ServedFolder
from qlora.board.server import Board
from qlora.config.compose import compose
from qlora.config.saved_config import dump_config
from qlora.errors import UserError
from qlora.runtime.folder_lock import locked
from qlora.sweep.sweep_page import write_overview

SECRET = "outside of the folder"
ANSWERS = [{"prompt": "Say yes.", "reference": "yes", "prediction": "yes"}]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    (root / "secret.json").write_text(json.dumps({"status": "finished", "reason": SECRET, "note": SECRET}))
    outputs = root / "outputs"
    write_run(outputs / "runs" / "mine", ["lora.r=8"], answers=ANSWERS, steps=20)
    write_run(outputs / "runs" / "broken", status="failed", reason="out of memory", steps=10)
    write_sweep(outputs / "sweeps" / "ranks", {"lora.r": ["4", "8"]})
    write_overview(outputs / "sweeps" / "ranks", None)
    (outputs / "runs" / "mine" / ".env").write_text(SECRET)
    (outputs / "runs" / "mine" / "evil.html").write_text("<script>1</script>")
    (outputs / "runs" / "mine" / "link.json").symlink_to(root / "secret.json")
    (outputs / "runs" / "away").symlink_to(root)
    linked = write_run(outputs / "runs" / "linked", steps=5)
    (linked / "status.json").unlink()
    (linked / "status.json").symlink_to(root / "secret.json")
    looks = outputs / "looks" / "plan"
    looks.mkdir(parents=True)
    (looks / "status.json").write_text(json.dumps({"status": "finished", "result": "plan.json"}))
    return outputs


@pytest.fixture(scope="module")
def board(outputs: Path) -> Iterator[Board]:
    with Board(outputs, 0) as board:
        threading.Thread(target=board.serve_forever, args=(0.05,), daemon=True).start()
        yield board
        board.shutdown()


def ask(board: Board, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", board.server_port, timeout=30)
    connection.putrequest(method, path, skip_host="Host" in headers, skip_accept_encoding=True)
    for name, value in headers.items():
        if value:
            connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), body


def answer(board: Board, path: str) -> Any:
    status, _, body = ask(board, path)
    assert status == 200, body
    return json.loads(body)


def test_the_list_has_every_run_with_status_metrics_and_sweep_and_no_other_task(board: Board) -> None:
    listed = answer(board, "/api/runs")
    runs = {run["path"]: run for run in listed["runs"]}
    jobs = [path for path in runs if path.startswith("sweeps/ranks/")]
    assert {*runs} == {"runs/mine", "runs/broken", *jobs}
    assert len(jobs) == 2
    assert runs[jobs[0]]["sweep"] == "sweeps/ranks"
    assert runs["runs/broken"]["status"] == "failed"
    assert runs["runs/broken"]["reason"] == "out of memory"
    assert runs["runs/mine"]["metrics"]["base_eval_loss"] == 4.2
    assert runs["runs/mine"]["config"]["lora.r"] == "8"
    assert listed["sweeps"] == [{"path": "sweeps/ranks", "runs": 2, "page": True}]


def test_curves_begin_with_the_base_and_come_in_the_order_that_was_asked_for(board: Board) -> None:
    result = answer(board, "/api/curves?run=runs/mine&run=runs/broken&run=runs/nothing")
    assert result["runs"] == ["runs/mine", "runs/broken"]
    held_out = next(chart for chart in result["charts"] if chart["name"] == "eval_loss")
    assert (held_out["lines"][0]["step"][0], held_out["lines"][0]["value"][0]) == (0, 4.2)


def test_one_run_is_sent_with_config_and_answers(board: Board) -> None:
    run = answer(board, "/api/run?run=runs/mine")
    assert run["config"]["lora.r"] == "8"
    assert [(row["asked"], row["got"], row["right"]) for row in run["answers"]] == [("Say yes.", "yes", True)]


def test_a_list_that_has_not_changed_is_not_sent_again(board: Board) -> None:
    _, headers, _ = ask(board, "/api/runs")
    status, _, body = ask(board, "/api/runs", If_None_Match=headers["ETag"])
    assert (status, body) == (304, b"")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost@evil.example", "0.0.0.0", ""])
def test_another_name_in_host_is_refused(board: Board, host: str) -> None:
    status, _, body = ask(board, "/api/runs", Host=host)
    assert status == 421
    assert body.decode() == f"open this page as {board.url}\n"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:9999", "LOCALHOST"])
def test_the_names_of_this_machine_are_taken_with_any_port_for_a_tunnel_has_its_own(board: Board, host: str) -> None:
    assert ask(board, "/api/runs", Host=host)[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_it_only_reads(board: Board, method: str) -> None:
    status, headers, _ = ask(board, "/api/runs", method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


def test_head_sends_no_body(board: Board) -> None:
    for path in ("/", "/api/runs", "/files/runs/mine/result.json", "/nothing"):
        status, headers, body = ask(board, path, "HEAD")
        assert status == ask(board, path)[0]
        assert int(headers["Content-Length"]) > 0
        assert body == b""


@pytest.mark.parametrize(
    "path",
    [
        *("../secret.json", "runs/../../secret.json", "%2e%2e/secret.json", "..%2fsecret.json", "runs/mine/link.json"),
        *("runs/away/secret.json", "/etc/passwd", "//etc/passwd", "%2fetc%2fpasswd", "runs/mine/.env", ".hydra", ""),
        *("runs/mine/.hydra/overrides.yaml", "runs/mine", "runs/mine/nothing", "runs\\..\\secret.json", "a%00b"),
        "runs/linked/status.json",
    ],
)
def test_no_file_outside_the_folder_is_served_nor_a_hidden_one(board: Board, path: str) -> None:
    status, _, body = ask(board, f"/files/{path}")
    assert status == 404
    assert SECRET not in body.decode()


@pytest.mark.parametrize("path", ["../outputs/runs/mine", "runs/linked", "runs/away", "/", ".", "", "runs/nothing"])
def test_no_run_that_leads_out_of_the_folder_is_read(board: Board, path: str) -> None:
    assert ask(board, f"/api/run?run={path}")[0] == 404
    assert answer(board, f"/api/curves?run={path}")["runs"] == []


def test_only_pages_that_runs_write_run_scripts(board: Board) -> None:
    _, page, _ = ask(board, "/files/sweeps/ranks/report.html")
    assert page["Content-Type"] == "text/html; charset=utf-8"
    assert "script-src 'unsafe-inline'" in page["Content-Security-Policy"]
    _, other, body = ask(board, "/files/runs/mine/evil.html")
    assert other["Content-Type"] == "text/plain; charset=utf-8"
    assert other["Content-Security-Policy"] == "default-src 'none'; sandbox"
    assert body == b"<script>1</script>"
    for headers in (page, other):
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Access-Control-Allow-Origin" not in headers


def test_too_many_runs_and_foreign_targets_are_refused(board: Board) -> None:
    assert ask(board, "/api/curves?" + "&".join(["run=a"] * 60))[0] == 400
    assert ask(board, "http://evil.example/api/runs")[0] == 421
    assert ask(board, "http://evil.example/api/runs", Host="127.0.0.1")[0] == 400


def test_a_damaged_run_does_not_hide_the_others(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    write_run(outputs / "runs" / "whole", steps=5)
    damaged = write_run(outputs / "runs" / "damaged", steps=5)
    for name in ("manifest.json", "history.json", "result.json", "progress.json"):
        (damaged / name).write_bytes(b"\xff{")
    with Board(outputs, 0) as board:
        runs = {run["name"]: run["status"] for run in board.runs.read()["runs"]}
    assert runs == {"whole": "finished", "damaged": "failed"}


def test_a_run_that_begins_ends_or_is_killed_shows_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora.board.run_list.FRESH_SECONDS", 0)
    with Board(tmp_path / "outputs", 0) as board:
        assert board.runs.read()["runs"] == []
        folder = write_run(tmp_path / "outputs" / "runs" / "new", status="running", steps=9)
        with locked(folder, "in use"):
            [run] = board.runs.read()["runs"]
            assert (run["status"], run["step"], run["steps"]) == ("running", 9, 9)
        assert [run["status"] for run in board.runs.read()["runs"]] == ["interrupted"]
        (folder / "status.json").write_text(json.dumps({"status": "failed", "reason": "full", "result": "result.json"}))
        assert [run["reason"] for run in board.runs.read()["runs"]] == ["full"]


def test_nothing_is_written(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "outputs" / "runs" / "mine", steps=5)
    previous = sorted((str(path), path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    with Board(tmp_path / "outputs", 0) as board:
        board.runs.read()
    assert sorted((str(path), path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == previous
    assert folder.is_dir()


def test_it_listens_on_the_loopback_alone(board: Board) -> None:
    assert board.socket.getsockname()[0] == "127.0.0.1"


def test_a_port_in_use_is_one_sentence_with_the_way_out(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = (
            f"task.port={port} is in use, perhaps by another board; choose another with task.port={port + 1}, or any "
            "free one with task.port=0"
        )
        with pytest.raises(UserError) as error:
            Board(tmp_path, port)
    assert str(error.value) == message


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_the_command_serves_within_two_seconds_of_computing_without_torch_and_ctrl_c_ends_it_quietly(
    tmp_path: Path,
) -> None:
    write_run(tmp_path / "outputs" / "runs" / "mine", steps=5)
    code = (
        "import sys, time\nfrom qlora.tasks import board\nfrom qlora.board.server import Board\n"
        "begin = Board.serve_forever\n"
        "def serve(self, **options):\n"
        "    heavy = {'torch', 'transformers', 'matplotlib', 'plotly'} & {*sys.modules}\n"
        "    print(time.process_time(), heavy or 'light', flush=True)\n"
        "    begin(self, **options)\n"
        "Board.serve_forever = serve\nfrom qlora.cli import main\n"
        "sys.argv = ['qlora', 'task=board', 'task.port=0']\nmain()\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=30)
    assert lines[0] == "board of outputs: 1 run\n"
    assert lines[1].startswith("open http://127.0.0.1:")
    seconds, weight = lines[2].split()
    assert float(seconds) < 2
    assert weight == "light"
    assert (process.returncode, rest.strip(), errors) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


def test_an_evaluation_says_of_what_it_is(tmp_path: Path) -> None:
    write_run(tmp_path / "outputs" / "runs" / "mine", ["lora.r=8"])
    folder = tmp_path / "outputs" / "runs" / "measured"
    folder.mkdir()
    config = compose(["task=evaluate", "adapter=outputs/runs/mine/adapter", "lora.r=8"])
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "status.json").write_text(json.dumps({"status": "finished", "result": "evaluate.json"}))
    (folder / "evaluate.json").write_text(json.dumps({"objective": 1.0, "metrics": {}, "task": "evaluate"}))
    rows = {row["name"]: row for row in RunList(ServedFolder(tmp_path / "outputs")).read()["runs"]}
    assert (rows["measured"]["task"], rows["measured"]["of"]) == ("evaluate", "mine")
    assert rows["measured"]["config"]["lora.r"] == "8"
    assert rows["mine"]["of"] is None
    (folder / "config.yaml").rename(tmp_path / "config.yaml")
    (folder / "config.yaml").symlink_to(tmp_path / "config.yaml")
    rows = {row["name"]: row for row in RunList(ServedFolder(tmp_path / "outputs")).read()["runs"]}
    assert "measured" not in rows
