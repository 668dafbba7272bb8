"""What a training run keeps: the last step, the best one that was measured, or the average of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora.config.compose import compose
from qlora.config.schema import Keep
from qlora.errors import ConfigError, RunError
from qlora.training.checkpoints import find_checkpoints, remove_surplus, step_of
from qlora.training.keep import KeepRule
from tests.faults.runs import at_step, outcome, run

BEST = ["trainer.keep=best", "trainer.eval_steps=1", "trainer.learning_rate=0.3", "trainer.save_total_limit=1",
        "trainer.save_steps=3", "trainer.lr_scheduler_type=constant"]  # fmt: skip
"""A learning rate at which the held-out loss rises and falls."""


def history(*values: float) -> list[dict[str, Any]]:
    return [{"step": 10 * number, "eval_loss": value} for number, value in enumerate(values, 1)]


def saved_at(folder: Path, step: int, entries: list[dict[str, Any]]) -> None:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": entries}))


def interrupt() -> None:
    raise KeyboardInterrupt


def nothing() -> None:
    pass


def test_the_best_step_is_the_first_of_the_lowest_losses_and_no_number_is_never_the_best() -> None:
    rule = KeepRule(Keep.best, "eval_loss")
    best = rule.best(history(4.96, float("nan"), 7.9, 4.52, 4.52, 5.7))
    assert best is not None
    assert (best.step, best.value) == (40, 4.52)
    assert rule.best(history(float("nan"), float("inf"))) is None


def test_a_metric_that_is_better_when_higher_is_kept_at_its_highest() -> None:
    entries = [
        {"step": 1, "eval_exact_match": 0.2},
        {"step": 2, "eval_exact_match": 0.6},
        {"step": 3, "eval_loss": 1.0},
    ]
    best = KeepRule(Keep.best, "eval_exact_match").best(entries)
    assert best is not None
    assert best.step == 2


def test_the_limit_removes_no_checkpoint_that_a_resumed_run_would_keep(tmp_path: Path) -> None:
    entries = history(4.96, 4.52, 7.9, 5.0, 6.0)
    for step in (10, 20, 30, 40, 50):
        saved_at(tmp_path, step, entries[: step // 10])
    needed = KeepRule(Keep.best, "eval_loss").needed
    while remove_surplus(tmp_path, 1, needed):
        pass
    assert [step_of(path) for path in find_checkpoints(tmp_path)] == [20, 50]


def test_falling_losses_leave_no_more_checkpoints_than_the_limit(tmp_path: Path) -> None:
    entries = history(5, 4, 3, 2, 1)
    for step in (10, 20, 30, 40, 50):
        saved_at(tmp_path, step, entries[: step // 10])
    while remove_surplus(tmp_path, 2, KeepRule(Keep.best, "eval_loss").needed):
        pass
    assert [step_of(path) for path in find_checkpoints(tmp_path)] == [40, 50]


def test_the_adapter_is_that_of_the_best_step_and_a_killed_run_keeps_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(tmp_path / "calm", *BEST)
    losses = {
        entry["step"]: entry["eval_loss"] for entry in outcome(tmp_path / "calm")["history"] if "eval_loss" in entry
    }
    kept = result["kept"]
    assert kept["value"] == min(losses.values()) < losses[8]
    assert kept["steps"] == [min(losses, key=lambda step: losses[step])]
    assert (kept["last_step"], kept["last_value"]) == (8, losses[8])
    assert result["metrics"]["eval_loss"] == pytest.approx(kept["value"], rel=1e-5)
    assert result["objective"] == result["metrics"]["eval_loss"]
    best = f"step {kept['steps'][0]} of 8, the best by the held-out loss"
    assert best in (tmp_path / "calm" / "README.md").read_text()
    assert best in (tmp_path / "calm" / "adapter" / "README.md").read_text()
    assert best in (tmp_path / "calm" / "report.html").read_text()
    for step in (2, kept["steps"][0] + 1, 8):
        at_step(monkeypatch, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", *BEST)
    at_step(monkeypatch, 0, nothing)
    assert run(tmp_path / "cut", *BEST)["kept"] == kept
    adapters = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("calm", "cut")]
    assert adapters[0] == adapters[1]


@pytest.mark.full
def test_a_damaged_checkpoint_of_the_best_step_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damage() -> None:
        for checkpoint in find_checkpoints(tmp_path / "run" / "checkpoints")[:-1]:
            (checkpoint / "adapter_model.safetensors").write_bytes(b"")

    at_step(monkeypatch, 8, damage)
    with pytest.raises(
        RunError, match=r"checkpoint-\d+, whose weights trainer.keep keeps, cannot be used: adapter_model"
    ):
        run(tmp_path / "run", *BEST)


@pytest.mark.matrix(1)
@pytest.mark.parametrize("more", [[], ["lora.use_rslora=true"], ["lora.init=pissa", "quantization=fp32"]])
def test_an_average_is_the_mean_of_the_products_and_not_the_product_of_the_means(
    tmp_path: Path, more: list[str]
) -> None:
    result = run(tmp_path, "trainer.keep=average", *more)
    kept = result["kept"]
    assert kept["steps"] == [4, 6, 8]
    assert kept["value"] == result["metrics"]["eval_loss"]
    initial = tmp_path / "initial_adapter"
    deltas = [product(tmp_path / "checkpoints" / f"checkpoint-{step}") for step in kept["steps"]]
    expected = torch.stack(deltas).mean(0) - (product(initial) if initial.is_dir() else 0)
    torch.testing.assert_close(product(tmp_path / "adapter"), expected, rtol=1e-4, atol=1e-6)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 12 + 4 * initial.is_dir()


def product(folder: Path) -> torch.Tensor:
    """Returns what an adapter adds to the first layer that it adapts, scaled as PEFT does."""
    tensors = load_file(folder / "adapter_model.safetensors")
    settings = json.loads((folder / "adapter_config.json").read_text())
    name = min(name for name in tensors if name.endswith("lora_A.weight"))
    rank = settings["r"] ** 0.5 if settings["use_rslora"] else settings["r"]
    return settings["lora_alpha"] / rank * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]


def test_what_cannot_be_compared_or_averaged_is_refused() -> None:
    said = r"and trainer.eval_steps is not set; set it, e.g. to 0.5ep, or set trainer.keep=last"
    with pytest.raises(ConfigError, match=rf"trainer.keep=best compares steps by the held-out rows, {said}"):
        compose(["trainer.keep=best", "trainer.eval_steps=null"])
    with pytest.raises(ConfigError, match=r"trainer.keep=average and trainer.save_steps=null exclude each other"):
        compose(["trainer.keep=average"])
    with pytest.raises(ConfigError, match=r"trainer.keep=average and lora.use_dora=true exclude each other"):
        compose(["trainer.keep=average", "trainer.save_steps=10", "lora=dora"])
    with pytest.raises(ConfigError, match=r"trainer.keep_metric='train_loss' is not measured at trainer.eval_steps"):
        compose(["trainer.keep=best", "trainer.keep_metric=train_loss"])


def test_the_metric_is_the_objective_where_steps_are_measured_by_it() -> None:
    assert compose(["objective=eval_exact_match"]).kept_metric == "eval_exact_match"
    assert compose(["objective=train_loss"]).kept_metric == "eval_loss"
    assert compose(["objective=train_loss", "trainer.keep_metric=eval_perplexity"]).kept_metric == "eval_perplexity"


def test_early_stopping_keeps_the_best_step_and_the_default_run_the_last() -> None:
    assert compose(["callbacks=early-stopping"]).trainer.keep is Keep.best
    assert compose(["callbacks=early-stopping", "trainer.keep=last"]).trainer.keep is Keep.last
    assert compose([]).trainer.keep is Keep.last
