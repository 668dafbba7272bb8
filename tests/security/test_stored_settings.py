"""What a task takes from the config of the run whose adapter it uses: values, and nothing that runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora.config.compose import compose
from qlora.config.saved_config import config_to_dict
from qlora.config.schema import Config
from qlora.errors import UserError


def write(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(config))  # which is YAML too
    return folder


def used(run: Path, task: str = "evaluate") -> Config:
    return compose([f"task={task}", f"adapter={run}"])


STRANGE: dict[str, Any] = {
    "trusted": ["os"],
    "callbacks": {"x": {"_target_": "os.system"}},
    "model": {"trust_remote_code": True, "cache_dir": "/tmp/elsewhere"},
    "evaluation": {"name": "rows", "metrics": ["exact_match", "evaluate:stranger/metric", "os:system"]},
    "loss": {"name": "os:system"},
    "trainer": {"step_parts": ["os:system"]},
    "hydra": {"run": {"dir": "/tmp/elsewhere"}},
    "tracking": {"backend": "wandb"},
    "adapter": "/elsewhere",
}


@pytest.mark.matrix(2)
@pytest.mark.parametrize("key", STRANGE)
def test_a_stored_config_names_no_code_and_nobody_to_trust(tmp_path: Path, key: str) -> None:
    plain = config_to_dict(compose())
    value = plain[key] | STRANGE[key] if isinstance(plain.get(key), dict) else STRANGE[key]
    run = write(tmp_path / "run", {**plain, key: value})
    config = used(run)
    assert (config.trusted, config.callbacks, config.tracking.backend) == ([], {}, "none")
    assert (config.model.trust_remote_code, config.model.cache_dir) == (False, None)
    assert (config.evaluation.metrics, config.trainer.step_parts, config.loss.name) == (["exact_match"], [], "sft")


@pytest.mark.matrix(1)
@pytest.mark.parametrize("name", ["path", "format"])
def test_code_that_rows_need_is_to_be_trusted_on_the_command_line(tmp_path: Path, name: str) -> None:
    plain = config_to_dict(compose())
    plain["data"][name] = "os:system"
    run = write(tmp_path / "run", plain)
    with pytest.raises(UserError, match=r"code of the package 'os' would run, which is not trusted"):
        used(run)
    assert used(run, task="chat").data.format != "os:system"


@pytest.mark.full
@pytest.mark.parametrize("text", ["${oc.env:HOME}", "${seed}", "\\${x}"])
def test_an_interpolation_in_a_stored_config_is_text(tmp_path: Path, text: str) -> None:
    plain = config_to_dict(compose())
    plain["data"]["name"] = text
    assert used(write(tmp_path / "run", plain)).data.name == text
