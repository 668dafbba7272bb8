"""A key that names what one task reads or writes is refused with every other task; others go with all tasks."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from qlora.config.compose import compose
from qlora.config.schema import TASK_KEYS, Config, SweepMethod, TaskName
from qlora.errors import UserError

VALUES: dict[str, Any] = {
    "adapter": "outputs/runs/a", "repo": "me/mine", "runs": "outputs/runs/*", "run": "outputs/runs/a",
    "source": "axolotl.yaml", "task.rows": 5, "task.ids": True, "task.private": False, "task.online": True,
    "task.method": SweepMethod.grid, "task.port": 9000,
}  # fmt: skip
NEEDED = {"repo": TaskName.push, "runs": TaskName.report, "run": TaskName.replay, "source": TaskName.migrate}


@cache
def training() -> Config:
    return compose()


def choose(task: TaskName, key: str) -> Config:
    """Returns the config of a task with one of the keys set, and with what the task needs."""
    changes = {name: VALUES[name] for name, owner in NEEDED.items() if owner is task}
    keys = {key.removeprefix("task."): VALUES[key]} if key.startswith("task.") else {}
    changes |= {} if keys else {key: VALUES[key]}
    return replace(training(), task=replace(training().task, name=task, **keys), **changes)


@pytest.mark.parametrize("key", TASK_KEYS)
def test_only_the_tasks_that_read_a_key_take_it(key: str) -> None:
    name = "from" if key == "source" else key
    for task in TaskName:
        if task in TASK_KEYS[key]:
            choose(task, key)
            continue
        with pytest.raises(UserError) as error:
            choose(task, key)
        text = str(error.value)
        assert text.startswith(f"{name}=")
        assert f" is not read by task={task.value.replace('_', '-')}, but by task=" in text
        assert all(
            f"task={reader.value.replace('_', '-')}" in text.partition(", but by ")[2] for reader in TASK_KEYS[key]
        )
        assert text.endswith(f"or leave {name} out")


def test_every_text_at_the_root_is_a_task_s_or_every_task_s() -> None:
    shared = {"name", "objective"}
    assert {item.name for item in fields(Config) if item.type == "str | None"} == shared | {
        key
        for key in TASK_KEYS
        if "." not in key and key != "runs"  # which may be a list
    }
    assert VALUES.keys() == TASK_KEYS.keys()


@pytest.mark.parametrize("task", ["plan", "preview", "evaluate", "doctor"])
def test_a_task_can_be_appended_to_the_command_of_a_training(task: str) -> None:
    command = ["lora=dora", "task=train", "task.predict=false", "trainer.max_steps=7", "tracking.tags=[a]"]
    assert compose([*command, f"task={task}"]).task.name.value == task


def test_an_adapter_or_a_file_without_a_task_is_no_training(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        compose(["adapter=outputs/runs/a"])
    assert str(error.value) == (
        "adapter=outputs/runs/a is not read by task=train, but by task=chat, task=evaluate, task=predict, task=merge, "
        "task=export, task=verify, task=push and task=serve; add one of these, write lora.start=outputs/runs/a to "
        "train it further, or leave adapter out"
    )
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\nfrom: axolotl.yaml\n")
    with pytest.raises(UserError) as error:
        compose(["experiment=mine"], tmp_path)
    assert str(error.value) == (
        "from=axolotl.yaml is not read by task=train, but by task=migrate; add task=migrate, or leave from out"
    )
