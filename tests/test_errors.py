"""Each mistake of a user has a kind, and the command line prints it as one sentence without a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora.config.compose import compose
from qlora.errors import ConfigError, DamagedFile, DataError, ResourceError, RunError, UserError
from qlora.planning.training_plan import build_plan
from qlora.runtime.command_folder import check_links

KINDS = (ConfigError, DataError, ResourceError, RunError)

Cause = tuple[type[UserError], Callable[[Path], list[str]], str]


def wrong_key(folder: Path) -> list[str]:
    return ["lora.r=0"]


def incomplete_model(folder: Path) -> list[str]:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return [f"model.name={folder}/model"]


def unreachable_model(folder: Path) -> list[str]:
    return ["model.name=nobody/nothing"]


def linked_folder(folder: Path) -> list[str]:
    (folder / "run").mkdir()
    (folder / "elsewhere").touch()
    (folder / "run" / "train.log").symlink_to(folder / "elsewhere")
    return []


CAUSES: dict[str, Cause] = {
    "a key": (ConfigError, wrong_key, "lora.r must be"),
    "a model": (DataError, incomplete_model, "hidden_size is missing"),
    "a network": (ResourceError, unreachable_model, "its config.json is not available"),
    "a folder": (RunError, linked_folder, "is a link to"),
}


def start(folder: Path, overrides: list[str]) -> None:
    """Does what `task=plan` does, in the folder `run`."""
    config = compose(["task=plan", "plan.device=a6000", *overrides])
    check_links(folder / "run")
    build_plan(config)


@pytest.mark.parametrize("cause", CAUSES)
def test_each_mistake_has_its_kind(cause: str, tmp_path: Path) -> None:
    kind, prepare, text = CAUSES[cause]
    overrides = prepare(tmp_path)
    with pytest.raises(UserError, match=text) as error:
        start(tmp_path, overrides)
    assert type(error.value) is kind


def test_a_mistake_is_no_error_of_a_value_and_has_one_kind() -> None:
    assert not issubclass(UserError, ValueError)
    assert all(issubclass(kind, UserError) for kind in KINDS)
    assert not any(issubclass(kind, other) for kind in KINDS for other in KINDS if kind is not other)
    assert issubclass(DamagedFile, DataError)


COMMANDS = """
import sys
from qlora import cli

for overrides in {commands}:
    sys.argv = ["qlora", "task=plan", "plan.device=a6000", *overrides]
    try:
        cli.main()
    except SystemExit as end:
        print("exit code", end.code, file=sys.stderr)
"""


def test_the_command_line_prints_each_kind_as_one_sentence(tmp_path: Path) -> None:
    causes = list(CAUSES.values())
    prepared = [prepare(tmp_path) for _, prepare, _ in causes]
    # The link stops every command in its folder, so the others run in other ones.
    commands = [[*overrides, f"hydra.run.dir={f'other-{index}' if overrides else 'run'}"]
                for index, overrides in enumerate(prepared)]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS.format(commands=commands)],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert lines[1::2] == ["exit code 1"] * len(causes), done.stderr
    for line, (_, _, text) in zip(lines[::2], causes, strict=True):
        assert line.startswith("error: ")
        assert text in line
