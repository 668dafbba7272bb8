"""An objective from outside trains the embedded model on the plain and on the fast step; older configs mean `sft`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.config.compose import compose
from qlora.config.registries import installed
from qlora.config.saved_config import config_to_dict, restore_config
from qlora.config.schema import LossConfig
from qlora.errors import ConfigError, RunError
from qlora.objectives import OBJECTIVES, TokenWork, build_objective
from qlora.objectives.sft import SupervisedFinetuning
from qlora.planning import activations
from qlora.run import Run
from qlora.runtime.run_folder import RunFolder, config_digest
from tests.objective_extension import SmoothedLoss

QUICK = [
    *("trainer.max_steps=3", "trainer.logging_steps=1", "trainer.eval_steps=null", "trainer.save_steps=null"),
    *("trainer.warmup_steps=0", "trainer.lr_scheduler_type=constant", "trainer.lr_scheduler_kwargs=null"),
    *("data.max_train_samples=24", "data.max_eval_samples=4", "evaluation=loss", "evaluation.baseline=false"),
    *("task.predict=false", "device=cpu", "lora.dropout=0", "trainer.compile=false"),
    *("quantization.compute_dtype=fp32", "trainer.learning_rate=1e-4"),
]
SMOOTHED = ["loss.name=tests.objective_extension:SmoothedLoss", "loss.options.smoothing=0.3", "trusted=[tests]"]
FAST = ["trainer.fused_linear=true", "trainer.fused_loss=true"]


def train(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    Run(compose([*QUICK, *overrides]), folder).execute()
    return [entry for entry in json.loads((folder / "history.json").read_text()) if "loss" in entry]


def test_an_objective_of_another_package_learns_the_same_on_the_plain_and_on_the_fast_step(tmp_path: Path) -> None:
    plain, fast = train(tmp_path / "plain", *SMOOTHED), train(tmp_path / "fast", *SMOOTHED, *FAST)
    assert [entry["loss"] for entry in fast] == pytest.approx([entry["loss"] for entry in plain], rel=1e-4)
    usual = train(tmp_path / "sft")
    assert all(entry["loss"] > other["loss"] + 0.1 for entry, other in zip(plain, usual, strict=True))
    assert all(entry["smoothed_batches"] == 1 for entry in plain)


def test_the_shipped_objective_computes_one_loss_from_logits_and_from_hidden_states() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 9, 8), torch.randn(30, 8)
    labels = torch.randint(0, 30, (2, 9))
    labels[:, :4] = -100
    objective = build_objective(LossConfig())
    objective.prepare(compiled=False)
    for count in (None, 17):
        fused = objective.loss_on_hidden(hidden, weight, labels, count)
        torch.testing.assert_close(fused, objective.loss_on_logits(hidden @ weight.t(), labels, count))


def test_smoothed_labels_give_one_loss_and_one_gradient_on_both_paths() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 9, 8, requires_grad=True), torch.randn(30, 8)
    labels = torch.randint(0, 30, (2, 9))
    labels[:, :4] = -100
    objective = build_objective(LossConfig(), label_smoothing=0.2)
    objective.prepare(compiled=False)
    losses = [
        objective.loss_on_hidden(hidden, weight, labels, 17),
        objective.loss_on_logits(hidden @ weight.t(), labels, 17),
    ]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, hidden)[0] for loss in losses))
    plain = build_objective(LossConfig()).loss_on_logits(hidden @ weight.t(), labels, 17)
    assert not torch.isclose(losses[0], plain)


@pytest.mark.full
def test_smoothed_labels_and_noise_change_what_is_trained_and_not_how_rows_are_measured(tmp_path: Path) -> None:
    usual = train(tmp_path / "sft")
    smoothed = train(tmp_path / "smoothed", "trainer.label_smoothing_factor=0.3")
    noisy = train(tmp_path / "noisy", "trainer.neftune_noise_alpha=15")
    assert smoothed[0]["loss"] > usual[0]["loss"] + 0.1
    assert noisy[0]["loss"] != usual[0]["loss"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.label_smoothing_factor=1"], r"trainer\.label_smoothing_factor must be at least 0 and below 1"),
        (["trainer.neftune_noise_alpha=0"], r"trainer\.neftune_noise_alpha must be positive or null"),
        (["trainer.label_smoothing_factor=0.1", "loss.name=tests.objective_extension:SmoothedLoss", "trusted=[tests]"],
         r"trainer\.label_smoothing_factor=0.1 is read by loss=sft, and loss.name=.* has a loss of its own"),
        (["trainer.neftune_noise_alpha=5", "data.packing=true"], r"data\.packing=true joins rows"),
    ],
)  # fmt: skip
def test_smoothing_and_noise_are_refused_where_they_would_mean_something_else(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(overrides)


def test_an_entry_point_is_an_objective_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    point = ("smoothed", "tests.objective_extension:SmoothedLoss")
    monkeypatch.setattr(installed, "_read", lambda group, _: (point,) if group == "qlora.objectives" else ())
    objective = build_objective(LossConfig(name="smoothed", options={"smoothing": 0.2}))
    assert isinstance(objective, SmoothedLoss)
    assert objective.smoothing == 0.2
    with pytest.raises(ConfigError, match=r"loss\.name=smothed is unknown \(did you mean smoothed\?\)"):
        LossConfig(name="smothed")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (SMOOTHED[:2], r"loss\.name=tests\.objective_extension:SmoothedLoss: code of the package 'tests' would run"),
        (["loss.options.smoothing=0.1"], r"loss\.options is not read by loss\.name=sft"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(overrides)


def test_a_class_without_a_method_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"has no columns and no is_model_loss and no labels and no loss"):
        build_objective(LossConfig(name="tests.step_extension:CountTokens"))


def test_an_objective_that_needs_other_columns_is_refused_before_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SupervisedFinetuning, "columns", ("input_ids", "rejected_ids"))
    run = Run(compose(QUICK), tmp_path / "run").session
    with pytest.raises(ConfigError, match=r"loss\.name=sft needs rows with rejected_ids"):
        _ = run.data


def older(config: Any) -> dict[str, Any]:
    """Returns the config as a run stored it before objectives and parts of other packages had keys."""
    plain = config_to_dict(config)
    del plain["loss"], plain["trainer"]["step_parts"], plain["quantization"]["method"], plain["data"]["max_samples"]
    for part in plain["data"]["mix"].values():
        del part["max_samples"]
    return plain


def test_a_config_of_an_older_run_of_several_sets_is_the_same_training() -> None:
    config = compose(["data=mix", "data.mix.a=a.jsonl", "data.mix.b={path:b.jsonl,weight:2}"])
    assert config_digest(older(config)) == config_digest(config_to_dict(config))
    fewer = compose(["data=mix", "data.mix.a=a.jsonl", "data.mix.b={path:b.jsonl,weight:2,max_samples:9}"])
    assert config_digest(older(config)) != config_digest(config_to_dict(fewer))


def test_a_config_of_an_older_run_means_sft_and_is_the_same_training(tmp_path: Path) -> None:
    config = compose(QUICK)
    saved = older(config)
    assert restore_config(saved).loss == LossConfig()
    assert config_digest(saved) == config_digest(config_to_dict(config))
    assert RunFolder(tmp_path).check_same_training(saved, config_to_dict(config))
    other = config_to_dict(compose([*QUICK, *SMOOTHED]))
    assert config_digest(saved) != config_digest(other)
    with pytest.raises(RunError, match=r"loss\.name: 'sft' -> 'tests\.objective_extension:SmoothedLoss'"):
        RunFolder(tmp_path).check_same_training(saved, other)


def test_the_memory_plan_asks_the_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    work = TokenWork(tokens=4096, hidden=64, vocabulary=1000, width=2, fused=True)
    sft = build_objective(LossConfig())
    assert sft.activation_bytes(work) == (2048 * 1000 * 4 + 4096 * 64 * 2, 0)
    some = replace(work, targets=1000)  # the gradient and the copy of what is read, and the gradient of all
    assert sft.activation_bytes(some) == (1000 * 1000 * 4 + 2 * 1000 * 64 * 2, (2 * 1000 + 4096) * 64 * 2)
    assert sft.activation_bytes(replace(work, targets=9000)) == sft.activation_bytes(work)
    assert {"sft", "dpo", "ipo"} <= OBJECTIVES.keys()
    assert activations.build_objective is build_objective
