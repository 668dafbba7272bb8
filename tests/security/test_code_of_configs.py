"""Code that a config names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from promises import QUICK, refusal

from qlora.config.command import check_overrides
from qlora.config.compose import compose
from qlora.errors import UserError
from qlora.run import Run


@pytest.mark.matrix(5)
@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["data=local", "data.path=os:getcwd"], "data.path=os:getcwd"),
        (["data=local", "data.path=a.jsonl", "data.format=mine.rows:convert"], "data.format=mine.rows:convert"),
        (["data=mix", "data.mix.x=posix:system"], "data.mix.x.path=posix:system"),
        (["evaluation.metrics=['subprocess:run']"], "evaluation.metrics[0]=subprocess:run"),
        (["callbacks.x._target_=os.system"], "callbacks.x._target_=os.system"),
        (["callbacks.x._target_=torch.load"], "callbacks.x._target_=torch.load"),
        (["callbacks.x={_target_:qlora.training.callbacks.EarlyStopping,patience:{_target_:os.getpid}}"],
         "callbacks.x.patience._target_=os.getpid"),
        (["hydra/launcher=processes", "hydra.launcher._target_=os.system"], "hydra.launcher._target_=os.system"),
        (["+hydra.callbacks.x._target_=subprocess.Popen"], "hydra.callbacks.x._target_=subprocess.Popen"),
        (["+hydra.job_logging.handlers.x.class=a.Popen"], "hydra.job_logging.handlers.x.class=a.Popen"),
    ],
)  # fmt: skip
def test_code_of_packages_that_are_not_trusted_does_not_run(overrides: list[str], key: str) -> None:
    text = refusal(*overrides)
    assert text.startswith(key)
    assert "trusted=[" in text


def test_code_named_by_somebody_s_yaml_does_not_run_either(tmp_path: Path) -> None:
    (tmp_path / "hydra" / "job_logging").mkdir(parents=True)
    (tmp_path / "hydra" / "job_logging" / "mine.yaml").write_text(
        "version: 1\nhandlers:\n  x:\n    (): os.system\n    command: ls\n"
    )
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ncallbacks:\n  x:\n    _target_: os.system\n    command: ls\n"
    )
    for args, key in (
        (["hydra/job_logging=mine"], "hydra.job_logging"),
        (["experiment=mine"], "callbacks.x._target_"),
    ):
        with pytest.raises(UserError, match=rf"{re.escape(key)}.*os\.system.*trusted=\[os\]"):
            check_overrides(args, tmp_path)


def test_a_user_extends_the_trusted_packages() -> None:
    config = compose(["data=local", "data.path=mine:rows", "data.format=mine.rows:convert", "trusted=[mine]"])
    assert config.data.path == "mine:rows"


def test_a_callback_must_be_one(tmp_path: Path) -> None:
    overrides = ["callbacks.x._target_=transformers.AutoModelForCausalLM.from_pretrained", *QUICK]
    with pytest.raises(UserError, match=r"callbacks\.x"):
        Run(compose(overrides), tmp_path).train()
    with pytest.raises(UserError, match=r"callbacks\.x\._target_=transformers\.LlamaConfig is not a TrainerCallback"):
        Run(compose(["callbacks.x._target_=transformers.LlamaConfig", *QUICK]), tmp_path).train()


def test_code_of_the_hub_for_attention_needs_the_same_leave() -> None:
    text = refusal("model.attn_implementation=kernels-community/flash-attn2")
    assert "model.trust_remote_code=true" in text
