"""Systems, users and folders that are not the usual ones: each works, or is refused in one sentence."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora.cli import main
from qlora.compose import compose
from qlora.errors import ConfigError
from qlora.places import cache_root, give_home

WINDOWS = """
import sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
"""
"""A `sitecustomize` that takes away what Python has on POSIX systems only."""


@pytest.fixture
def without_posix(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python that has no POSIX-only modules."""
    (tmp_path / "sitecustomize.py").write_text(WINDOWS, encoding="utf-8")
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "qlora"],
        [sys.executable, "-m", "qlora", "--help"],
        [str(Path(sys.executable).with_name("qlora")), "task=doctor"],
    ],
)
def test_on_windows_the_one_line_of_a_command_names_wsl(command: list[str], without_posix: dict[str, str]) -> None:
    done = subprocess.run(command, env=without_posix, capture_output=True, text=True)
    assert done.returncode == 1
    [line] = (done.stdout + done.stderr).splitlines()
    assert line.startswith("error: qlora runs on Linux and macOS; on Windows install WSL")


@pytest.mark.parametrize("module", ["qlora", "qlora.run", "qlora.compose"])
def test_on_windows_an_import_says_so_and_may_be_caught(module: str, without_posix: dict[str, str]) -> None:
    code = f"try:\n    import {module}\nexcept ImportError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", code], env=without_posix, capture_output=True, text=True)
    assert done.stdout.startswith("qlora runs on Linux and macOS"), done.stderr


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line in this process, in an empty folder; returns its exit code and what it wrote to errors."""
    folder = tmp_path / "work"
    folder.mkdir()

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["qlora", *arguments])
        try:
            main()
        except SystemExit as left:
            return int(left.code or 0), capfd.readouterr().err
        return 0, capfd.readouterr().err

    return run


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without HOME and without an entry in /etc/passwd, as containers have them."""

    def unknown(key: object) -> None:
        raise KeyError(f"getpwuid(): uid not found: {key}")

    for name in ("HOME", "USER", "LOGNAME", "QLORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)


def test_the_root_of_caches_is_chosen_by_config_then_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("QLORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_root(None) == tmp_path / ".cache" / "qlora"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root(None) == Path("/xdg/qlora")
    monkeypatch.setenv("QLORA_CACHE", "~/own")
    assert cache_root(None) == tmp_path / "own"
    assert cache_root("~/chosen") == tmp_path / "chosen"


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize("arguments", [["task=preview"], ["-m", "seed=1,2"]])
def test_without_a_home_folder_a_command_names_the_cure_and_writes_nothing(
    command: Command, tmp_path: Path, arguments: list[str]
) -> None:
    code, said = command(*arguments)
    assert code == 1
    assert said == (
        "error: data.cache_dir is unset, and there is no home folder for caches: HOME is unset, and user "
        f"{os.getuid()} has no entry in /etc/passwd; choose a folder that can be written with data.cache_dir=FOLDER, "
        "and all libraries take it as home\n"
    )
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.usefixtures("homeless")
def test_the_cure_works_and_is_home_to_every_library(command: Command, tmp_path: Path) -> None:
    looks = tmp_path / "work" / "looks"
    code, said = command("task=preview", "data.cache_dir=cache", f"hydra.run.dir={looks}")
    assert code == 0, said
    assert not (tmp_path / "work" / "~").exists()
    assert "HOME" not in os.environ, "the command is over"
    give_home("cache")
    assert Path.home() == tmp_path / "work" / "cache"


@pytest.mark.usefixtures("homeless")
def test_a_homeless_doctor_tells_the_cure(command: Command, tmp_path: Path) -> None:
    code, _ = command("task=doctor", f"hydra.run.dir={tmp_path / 'doctor'}")
    assert code == 1
    findings = json.loads((tmp_path / "doctor" / "doctor.json").read_text())["findings"]
    [home] = [finding for finding in findings if finding["name"] == "home folder"]
    assert "has no entry in /etc/passwd" in home["says"]
    assert "data.cache_dir=FOLDER" in home["fix"]


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize("key", ["data.path", "data.eval_path", "data.template", "data.mix.mine.path", "evaluation.path"])
def test_a_path_in_a_home_folder_that_is_not_known_is_named(key: str) -> None:
    data = ["data=mix"] if "mix" in key else ["data=local", "data.path=rows.jsonl"]
    for value, reason in (("~/a", "HOME is unset"), ("~nobody-here/a", "there is no user 'nobody-here' here")):
        with pytest.raises(ConfigError, match="write the whole path") as refused:
            compose([*data, "evaluation=mmlu", f"{key}='{value}'"])
        assert str(refused.value).startswith(f"{key}={value}: {reason}")
