"""Where a command starts: folders of their own, none for a refused command, and odd command lines end in a sentence."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from qlora import cli
from qlora.config import compose, overrides
from qlora.errors import UserError
from qlora.runtime.atomic_files import follow_umask, write_folder, write_text
from qlora.runtime.command_folder import start_anew, start_in
from tests.synthetic_runs import write_run

PLAN = ["task=plan", "plan.device=a6000"]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(compose.START_VARIABLE, raising=False)
    return Command(monkeypatch, capsys)


class Command:
    """Runs the command line in this process."""

    def __init__(self, patches: pytest.MonkeyPatch, captured: pytest.CaptureFixture[str]) -> None:
        self.patches, self.captured = patches, captured

    def __call__(self, *args: str) -> tuple[int, str, str]:
        """Returns exit code, output and errors."""
        self.patches.setattr(sys, "argv", ["qlora", *args])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = self.captured.readouterr()
        return code, captured.out, captured.err


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.full
def test_looks_have_folders_of_their_own_which_reports_do_not_read(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "now", lambda: "2030-01-02_03-04-05")
    assert [command(*PLAN)[0] for _ in range(2)] == [0, 0]
    assert names(Path("outputs")) == ["looks"]
    assert names(Path("outputs/looks")) == ["2030-01-02_03-04-05", "2030-01-02_03-04-05-2"]
    code, _, said = command("task=report", "runs=outputs/*")
    assert (code, said.count("\n")) == (1, 1)
    assert "there is no run" in said
    assert names(Path("outputs")) == ["looks"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["task=report", "runs=nothing/*"],
        [*PLAN, "plan.device=a-card-of-another-world"],
        ["task=migrate", "from=no-file.yaml"],
        ["-m", "hydra.launcher.gpus_per_job=99", "device=cpu", "lora.r=8,16", "name=grid"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_a_refused_command_leaves_no_folder(command: Command, tmp_path: Path, overrides: list[str]) -> None:
    code, _, said = command(*overrides)
    assert code == 1
    assert said.startswith("error: ")
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_a_refused_command_leaves_a_folder_as_it_was(command: Command, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "outputs" / "runs" / "mine", ["lora.r=8"], steps=2)
    (folder / "train.log").write_text("a line\n")
    initial = tree(tmp_path)
    code, _, said = command("task=report", "runs=nothing/*", "name=mine")
    assert (code, said.startswith("error: runs=nothing/*: there is no run")) == (1, True)
    assert tree(tmp_path) == initial


def test_what_a_run_has_begun_is_not_put_back(tmp_path: Path) -> None:
    start = start_in(tmp_path / "a" / "run")
    (tmp_path / "a" / "run" / "status.json").write_text("{}")
    (tmp_path / "a" / "run" / "manifest.json").write_text("{}")
    start.restore()
    assert names(tmp_path / "a" / "run") == ["manifest.json", "status.json"]


def test_a_new_folder_is_nobody_else_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compose.START_VARIABLE, "noon")
    assert [start_anew(tmp_path / "noon").folder.name for _ in range(3)] == ["noon", "noon-2", "noon-3"]
    assert os.environ[compose.START_VARIABLE] == "noon-3"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["adapter=" + "[" * 40], "adapter=[[["),
        (["adapter=" + "[" * 100_000], "opens more than 30 brackets inside each other"),
        (["lora.r=choice(" + "(" * 5000 + "1"], "opens more than 30 brackets"),
        (["x" * 100_000 + "=1"], "is not a key: it has 100,000 characters"),
        (["+a." * 50_000 + "b=1"], "is not a key"),
        (
            ["-m", 'hydra.sweeper.params.seed="1,2"'],
            "hydra.sweeper.params is null here; name the key itself with its values, e.g. -m seed=A,B",
        ),
        (["-m", "--info", "lora.r=8,16"], "invalid choice: 'lora.r=8,16'"),
        (["hydra.run.dir=/proc/x", *PLAN], "/proc/x cannot be written (No such file or directory); choose another"),
        (["hydra.run.dir=" + "y" * 300, *PLAN], "cannot be written (File name too long)"),
    ],
    ids=lambda value: (value if isinstance(value, str) else value[0])[:20],
)
def test_an_odd_command_line_ends_in_a_sentence(
    command: Command, tmp_path: Path, overrides: list[str], sentence: str
) -> None:
    code, _, said = command(*overrides)
    assert code == 1
    assert sentence in said
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    assert len(said) < 1000
    assert not list(tmp_path.iterdir())


def test_a_text_with_brackets_is_read_in_quotes() -> None:
    overrides.refuse_unreadable(['name="' + "[" * 50 + '"', "data.columns={a: {b: [c]}}", "lora.target_modules=[a,b]"])
    with pytest.raises(UserError, match="brackets"):
        overrides.refuse_unreadable(["name=" + "{" * 50])


def test_a_pipe_that_is_closed_a_folder_that_is_gone_and_python_without_docstrings(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = (
        f"cd {gone} && rmdir {gone}; P={sys.executable}; $P -m qlora {' '.join(PLAN)}; echo code $?; cd {tmp_path}; "
        f"$P -OO -m qlora {' '.join(PLAN)}; echo code $?; set -o pipefail; $P -m qlora --help | head -1; echo code $?"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[:2] == ["code 1", "code 1"]
    assert done.stdout.splitlines()[-1] == "code 0"
    first, second = done.stderr.splitlines()
    assert first.startswith("error: the working directory is gone (No such file or directory); change to one that")
    assert second.startswith("error: Python was started with -OO or PYTHONOPTIMIZE=2")


def test_what_libraries_write_for_their_owner_alone_follows_the_umask(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "inner").mkdir(mode=0o700)
        (folder / "inner" / "weights").touch(mode=0o600)

    previous = os.umask(0o027)
    try:
        write_folder(tmp_path / "adapter", write)
        write_text(tmp_path / "text.json", "{}")
        (tmp_path / "late").touch(mode=0o600)
        follow_umask(tmp_path / "late")
    finally:
        os.umask(previous)
    modes = {path: oct(stat.S_IMODE((tmp_path / path).stat().st_mode)) for path in
             ("adapter", "adapter/inner", "adapter/inner/weights", "text.json", "late")}  # fmt: skip
    assert modes == {"adapter": "0o750", "adapter/inner": "0o750", "adapter/inner/weights": "0o640",
                     "text.json": "0o640", "late": "0o640"}  # fmt: skip


def test_a_status_of_a_job_is_kept_where_its_sweep_reads_it(command: Command, tmp_path: Path) -> None:
    command.patches.setenv("QLORA_SWEEP", json.dumps({"sweep": "s", "keys": []}))
    command("task=report", "runs=nothing/*", "hydra.run.dir=job")
    assert json.loads(Path("job/status.json").read_text())["status"] == "failed"
