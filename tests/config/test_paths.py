"""Systems, users and folders that are not the usual ones: each works, or is refused in one sentence."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora.cli import main
from qlora.config.compose import compose
from qlora.config.paths import anchor_paths, cache_root, give_home
from qlora.errors import UserError

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


@pytest.mark.parametrize("module", ["qlora", "qlora.run", "qlora.config.compose"])
def test_on_windows_an_import_says_so_and_may_be_caught(module: str, without_posix: dict[str, str]) -> None:
    code = f"try:\n    import {module}\nexcept ImportError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", code], env=without_posix, capture_output=True, text=True)
    assert done.stdout.startswith("qlora runs on Linux and macOS"), done.stderr


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line in this process, in an empty folder; returns its exit code and what it wrote."""
    folder = tmp_path / "work"
    folder.mkdir()

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["qlora", *arguments])
        try:
            main()
        except SystemExit as left:
            return int(left.code or 0), "".join(capfd.readouterr())
        return 0, "".join(capfd.readouterr())

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


@pytest.mark.full
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
def test_without_a_home_folder_the_doctor_names_the_remedy(command: Command, tmp_path: Path) -> None:
    code, said = command("task=doctor")
    assert code == 1
    lines = said.splitlines()
    [home] = [number for number, line in enumerate(lines) if line.split()[:3] == ["error", "home", "folder"]]
    assert "has no entry in /etc/passwd" in lines[home]
    assert "data.cache_dir=FOLDER" in lines[home + 1]
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.matrix(2)
@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize(
    "key", ["data.path", "data.eval_path", "data.template", "data.mix.mine.path", "evaluation.path"]
)
def test_a_path_in_a_home_folder_that_is_not_known_is_named(key: str) -> None:
    data = ["data=mix"] if "mix" in key else ["data=local", "data.path=rows.jsonl"]
    for value, reason in (("~/a", "HOME is unset"), ("~nobody-here/a", "there is no user 'nobody-here' here")):
        with pytest.raises(UserError, match="write the whole path") as refused:
            compose([*data, "evaluation=mmlu", f"{key}='{value}'"])
        assert str(refused.value).startswith(f"{key}={value}: {reason}")


# Options of the user's own


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The options of a package `places_of_mine.conf` that can be imported: an experiment `mine` with seed 77."""
    folder = tmp_path / "lib" / "places_of_mine" / "conf"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 77\n", encoding="utf-8")
    for inner in (folder, folder.parent):
        (inner / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    return folder


@pytest.mark.full
def test_options_are_found_in_folders_and_packages_wherever_they_are_named(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (package, "lib/places_of_mine/conf", f"file://{package}", "pkg://places_of_mine.conf"):
        assert compose(["experiment=mine"], str(name)).seed == 77
        assert compose(["experiment=mine", f"hydra.searchpath=['{name}']"]).seed == 77


def test_a_command_takes_the_options_of_a_package_and_its_help_lists_them(
    package: Path, command: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    assert package.is_dir()
    for args in (["--config-dir", "pkg://places_of_mine.conf"], ["hydra.searchpath=[pkg://places_of_mine.conf]"]):
        code, said = command(*args, "experiment=mine", "task=migrate", "from=nothing", "hydra.run.dir=m")
        assert (code, said.partition(" ")[0]) == (1, "error:"), said
        assert "from=nothing" in said
    monkey = ["--config-dir=pkg://places_of_mine.conf", "--help", "experiment"]
    assert command(*monkey)[0] == 0


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["hydra.searchpath=conf"], "takes a list of folders, e.g. 'hydra.searchpath=[my_conf]'"),
        (["hydra.searchpath=[nowhere]"], "hydra.searchpath nowhere: there is no such folder (/"),
        (["hydra.searchpath=[pkg://no.such]"], "there is no package 'no.such'; install it, or give its folder"),
        (["hydra.searchpath=[http://a]"], "options are read from FOLDER, file://FOLDER or pkg://PACKAGE"),
        (["hydra.sweep.subdir=a"], "hydra.sweep.subdir cannot be set: a job's folder is named after its overrides"),
        (["-m", "seed=1,2", "hydra.sweep.subdir=${hydra.job.num}"], "hydra.sweep.subdir cannot be set"),
        (["--config-dir", "pkg://no.such"], "--config-dir pkg://no.such: there is no package 'no.such'"),
    ],
)
def test_what_names_no_folder_of_options_or_jobs_is_refused_before_anything_is_written(
    command: Command, tmp_path: Path, args: list[str], sentence: str
) -> None:
    code, said = command(*args)
    assert code == 1
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert sentence in said
    assert not list((tmp_path / "work").iterdir())


def test_a_file_that_sets_the_search_path_is_told_to_leave_it_to_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "late.yaml"
    file.write_text("# @package _global_\nhydra:\n  searchpath: [conf]\n", encoding="utf-8")
    with pytest.raises(UserError) as refused:
        compose(["experiment=late"], tmp_path)
    assert str(refused.value) == (
        f"hydra.searchpath is set in {file}, where it comes too late; give it on the command line: "
        "'hydra.searchpath=[FOLDER]'"
    )


@pytest.mark.parametrize(("first", "second"), [("Mine", "mine"), ("NF4", None)])
def test_options_that_differ_in_case_only_are_refused(tmp_path: Path, first: str, second: str | None) -> None:
    folder = tmp_path / "quantization"
    folder.mkdir()
    for name in filter(None, (first, second)):
        (folder / f"{name}.yaml").write_text("bits: 4\n", encoding="utf-8")
    if len(list(folder.iterdir())) != len([*filter(None, (first, second))]):
        pytest.skip("this file system knows one of them only")
    with pytest.raises(UserError, match="in case only, and some systems cannot tell them apart"):
        compose(["quantization=nf4"], tmp_path)


def test_with_chdir_relative_paths_are_those_of_the_folder_where_the_command_was_typed(
    command: Command, tmp_path: Path
) -> None:
    rows = '{"instruction": "a", "output": "b"}\n' * 4
    work = tmp_path / "work"
    (work / "rows.jsonl").write_text(rows, encoding="utf-8")
    (work / "mine.jinja").write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}", encoding="utf-8")
    code, said = command(
        *("task=preview", "data=local", "data.path=rows.jsonl", "data.eval_dataset_size=1", "data.cache_dir=cache"),
        *("hydra.job.chdir=true", "hydra.run.dir=looks"),
    )
    assert code == 0, said
    assert (work / "cache").is_dir()
    assert (work / "looks" / "preview.html").is_file()


def test_paths_of_a_config_are_anchored_and_names_are_not(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "a.jsonl").touch()
    config = compose(["data=mix", "data.mix.one=a.jsonl", "data.mix.two=org/set", "tracking.uri=sqlite:///a.db",
                      "model.name=model", "data.mix.three=mod:rows", "trusted=[mod]"])  # fmt: skip
    anchor_paths(config, tmp_path)
    assert config.model.name == str(tmp_path / "model")
    assert [part.path for part in config.data.mix.values()] == [str(tmp_path / "a.jsonl"), "org/set", "mod:rows"]
    assert config.tracking.uri == f"sqlite:///{tmp_path}/a.db"


def test_in_a_folder_of_its_own_a_run_needs_the_path_of_its_mlflow_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"name one with tracking\.uri, e\.g\. tracking\.uri=sqlite:///"):
        anchor_paths(compose(["tracking=mlflow"]), tmp_path)
