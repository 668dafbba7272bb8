"""The private methods of `transformers.Trainer` that this project overrides still are what they were when tested."""

from __future__ import annotations

import hashlib
import inspect
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import Trainer, TrainingArguments

from qlora.errors import ResourceError
from qlora.training.trainer import QLoraTrainer
from qlora.upstream import transformers_trainer
from qlora.upstream.transformers_trainer import CALLED, OVERRIDDEN, SUPPORTED, check_trainer

ROOT = Path(__file__).parents[2]
BODIES = json.loads(Path(__file__).with_name("trainer_bodies.json").read_text())
"""By version of transformers, the SHA-256 of the source of each overridden method. A new version is added when its
changes to these methods have been read, and the tests have passed with it."""


def body(name: str) -> str:
    return hashlib.sha256(inspect.getsource(getattr(Trainer, name)).encode()).hexdigest()


def test_every_overridden_underscore_method_is_declared() -> None:
    overridden = {
        name
        for name, value in vars(QLoraTrainer).items()
        if name.startswith("_") and not name.startswith("__") and callable(value) and hasattr(Trainer, name)
    }
    assert overridden == set(OVERRIDDEN)


@pytest.mark.parametrize("name", OVERRIDDEN | CALLED)
def test_an_underscore_method_has_the_parameters_of_upstream(name: str) -> None:
    assert tuple(inspect.signature(getattr(Trainer, name)).parameters)[1:] == (OVERRIDDEN | CALLED)[name]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_the_body_upstream_is_one_that_was_tested(name: str) -> None:
    assert transformers.__version__ in BODIES, (
        f"read what {transformers.__version__} changes in {', '.join(OVERRIDDEN)}"
    )
    assert body(name) == BODIES[transformers.__version__][name]


@pytest.mark.parametrize("name", ["_total_loss_scalar", "_tr_loss", "_globalstep_last_logged"])
def test_the_loss_sums_are_where_upstream_keeps_them(name: str) -> None:
    assert f"self.{name}" in inspect.getsource(Trainer)


def test_the_number_of_gpus_is_where_upstream_keeps_it() -> None:
    assert "self._n_gpu" in inspect.getsource(TrainingArguments)


def test_the_supported_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"transformers{SUPPORTED}" in project["dependencies"]


def test_the_installed_trainer_passes_the_check() -> None:
    check_trainer()


def renamed() -> type:
    methods = {name: value for name, value in vars(Trainer).items() if name != "_save_checkpoint"}
    return type("Trainer", (), {**methods, "_write_checkpoint_files": Trainer._save_checkpoint})


def changed() -> type:
    def _save_checkpoint(self: Any, model: Any) -> None: ...

    return type("Trainer", (Trainer,), {"_save_checkpoint": _save_checkpoint})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (renamed, r"transformers [\d.]+: Trainer\._save_checkpoint does not exist, .*transformers>=5\.17,<6"),
        (changed, r"Trainer\._save_checkpoint takes \(model\) instead of \(model, trial\), so"),
    ],
)
def test_a_trainer_with_another_method_is_refused_in_one_sentence(kind: Any, message: str) -> None:
    with pytest.raises(ResourceError, match=message) as refused:
        check_trainer(kind())
    assert "\n" not in str(refused.value)


def test_a_run_is_refused_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora.config.compose import compose
    from qlora.run import Run
    from qlora.session import Session

    monkeypatch.setattr(transformers_trainer, "OVERRIDDEN", OVERRIDDEN | {"_write_files": ("model",)})
    run = Run(compose(["device=cpu"]), tmp_path / "run")
    monkeypatch.setattr(Session, "load_base", lambda self: pytest.fail("the model was loaded"))
    with pytest.raises(ResourceError, match=r"Trainer\._write_files does not exist"):
        run.train()
