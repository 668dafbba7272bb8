"""Tasks declare what they need without torch, and importing the package changes nothing in the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.config.compose import compose
from qlora.runtime.needs import Rows
from qlora.runtime.task_result import TaskResult
from qlora.tasks import TASKS, needs_of


def python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "USE_HUB", "DO_NOT"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**env, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_every_task_declares_its_needs_without_torch(tmp_path: Path) -> None:
    code = (
        "import importlib, sys\nfrom qlora.tasks import TASKS\n"
        "for name in TASKS.values():\n    module = importlib.import_module(name)\n    module.needs, module.run\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets'} & {*sys.modules}\nassert not heavy, heavy\n"
    )
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_changes_nothing_in_the_process(tmp_path: Path) -> None:
    code = (
        "import os, sys\nbefore = dict(os.environ)\nimport qlora\nfrom qlora import Run, train\n"
        "from qlora.config.compose import compose\n"
        "assert dict(os.environ) == before\nassert 'kernels' not in sys.modules\nassert 'torch' not in sys.modules\n"
        "assert Run.__module__ == 'qlora.run'\n"
        "Run(compose(['task=evaluate', 'adapter=none']), 'unused')\n"
        "assert os.environ['USE_HUB_KERNELS'] == 'NO'\nassert sys.modules['kernels'] is None\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.full
@pytest.mark.slow
def test_a_notebook_is_as_quiet_as_the_command_line(tmp_path: Path) -> None:
    code = (
        "import logging, warnings\nfrom qlora import Run\nfrom qlora.config.compose import compose\n"
        "Run(compose(['data.max_eval_samples=4', 'data.max_train_samples=16', 'trainer.max_steps=1', 'lora.r=2',\n"
        "    'trainer.lr_scheduler_kwargs.num_decay_steps=1', 'trainer.warmup_steps=0', 'evaluation=loss']),\n"
        "    'run').train()\n"
        "assert logging.getLogger().handlers == [] and logging.getLogger().level == logging.WARNING\n"
    )
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("overrides", "rows", "processes"),
    [
        (["task=train"], Rows.all, True),
        (["task=train", "task.train=false"], Rows.held_out, False),
        (["task=evaluate"], Rows.held_out, False),
        (["task=evaluate", "evaluation=mmlu"], Rows.none, False),
        (["task=preview"], Rows.all, False),
        (["task=chat"], Rows.none, False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_task_reads_the_rows_that_it_needs(overrides: list[str], rows: Rows, processes: bool) -> None:
    needs = needs_of(compose(overrides))
    assert (needs.rows, needs.several_processes) == (rows, processes)


def test_every_task_has_a_module_and_an_option() -> None:
    options = {path.stem.replace("-", "_") for path in (Path(__file__).parent.parent / "conf" / "task").glob("*.yaml")}
    assert options == {*TASKS}


def test_a_result_is_read_back_as_it_was_written() -> None:
    result = TaskResult("train", {"eval_loss": 1.5}, {"config": "c"}, 1.5, {"intervals": {}, "gains": {}}, {"more": 1})
    saved = json.loads(json.dumps(result.to_dict()))
    assert list(saved) == ["status", "task", "objective", "metrics", "intervals", "gains", "paths", "more"]
    assert TaskResult.from_dict(saved).to_dict() == saved
