"""What a training does about what goes wrong in it: bad numbers, masked rows, a rising loss, no batches."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data._utils import signal_handling
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from qlora.config.compose import compose
from qlora.config.schema import LossConfig, QuantizationConfig, TrainerConfig, WatchdogConfig
from qlora.data.batching.collate import Collator, count_work
from qlora.errors import UserError
from qlora.objectives import build_objective
from qlora.runtime.device import Placement
from qlora.step.fast_step import FastStep
from qlora.training.arguments import build_arguments
from qlora.training.meter import Meter
from qlora.training.sampler import ShuffledSampler
from qlora.training.stopping import Stop
from qlora.training.trainer import QLoraTrainer
from qlora.training.watchdog import Halted, Watchdog

CPU = torch.device("cpu")
SFT = build_objective(LossConfig())
ROWS, STEPS, PER_STEP = 24, 12, 2
BAD_TOKEN = 31
"""In no row of its own; its embedding is not a number where a test says so."""


class Rows(list[dict[str, Any]]):
    """Rows of 4 tokens; the item of `slow` takes `seconds`."""

    slow, seconds, kills = -1, 0.0, False

    def __getitem__(self, index: Any) -> Any:
        if index == self.slow:
            if self.kills:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(self.seconds)
        return super().__getitem__(index)


def build_rows() -> Rows:
    return Rows({"input_ids": [1 + row % 8, 9, 10 + row % 5, 20], "labels": [-100, 9, 10 + row % 5, 20]}
                for row in range(ROWS))  # fmt: skip


def build(folder: Path, rows: Rows, watchdog: dict[str, Any] | None = None, **options: Any) -> QLoraTrainer:
    shape = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2, use_cache=False))
    model.model.embed_tokens.weight.data[BAD_TOKEN] = math.nan
    model.lm_head.weight.data *= 100  # so that a loss can rise and fall
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    settings = {
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "logging_steps": 4,
        "save_steps": 2,
        "optim": "adamw_torch",
        **options,
    }
    config = TrainerConfig(
        optim=settings.pop("optim", "adamw_torch"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=PER_STEP,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        group_by_length=False,
        **settings,
    )
    return QLoraTrainer(
        model=model,
        arguments=build_arguments(config, output_dir=folder, device=CPU, compute=torch.float32, seed=0),
        rows=rows,
        lengths=[4] * ROWS,
        collate=Collator(0),
        count=lambda batch: count_work(batch, 0),
        measure=lambda model, step: {"loss": 1.0},
        verify=lambda folder, model: None,
        loraplus_lr_ratio=None,
        step=FastStep(
            model, config, QuantizationConfig(bits=32), Placement(CPU, torch.float32, torch.float32), None, SFT
        ),
        objective=SFT,
        budget=None,
        watchdog=compose([f"watchdog.{key}={value}" for key, value in (watchdog or {}).items()]
                         + ["trainer.save_steps=2"]).watchdog,
        name_rows=lambda index: [(f"rows.jsonl, row {index + 1}", rows[index])],
        meter=Meter(CPU, peak_memory_gb=lambda: 0.0),
        stop=Stop(),
        metadata={},
        callbacks=[],
    )  # fmt: skip


def weights(trainer: QLoraTrainer) -> torch.Tensor:
    return torch.cat(
        [weight.detach().flatten() for weight in trainer.model.parameters() if weight.requires_grad]
    ).clone()


class Weights(TrainerCallback):
    """Keeps the weights after each step."""

    def __init__(self) -> None:
        self.after: dict[int, torch.Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        trained = [weight.detach().flatten() for weight in model.parameters() if weight.requires_grad]
        self.after[state.global_step] = torch.cat(trained).clone()


def losses(trainer: QLoraTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


BAD_STEP = 5
BAD_ROW = list(ShuffledSampler(ROWS, seed=0))[BAD_STEP * PER_STEP - 1]


@pytest.fixture
def rows() -> Rows:
    made = build_rows()
    made[BAD_ROW]["input_ids"][0] = BAD_TOKEN
    return made


@pytest.mark.matrix(1)
@pytest.mark.parametrize("optim", ["adamw_torch", "paged_adamw_32bit"], ids=["each weight", "all in one"])
def test_a_step_with_a_bad_row_is_skipped_and_the_row_is_named(
    tmp_path: Path, rows: Rows, caplog: pytest.LogCaptureFixture, optim: str
) -> None:
    trainer, seen = build(tmp_path, rows, optim=optim), Weights()
    trainer.add_callback(seen)
    with caplog.at_level(logging.WARNING):
        trainer.run(None)
    assert torch.equal(seen.after[BAD_STEP], seen.after[BAD_STEP - 1])
    assert not torch.equal(seen.after[BAD_STEP + 1], seen.after[BAD_STEP])
    assert bool(weights(trainer).isfinite().all())
    assert trainer.watchdog.metrics() == {f"train_watchdog_{name}": count for name, count in
                                          {"nonfinite": 1, "zero": 0, "divergence": 0, "slow": 0, "stalled": 0,
                                           "skipped": 1, "rollbacks": 0}.items()}  # fmt: skip
    (message,) = [record.getMessage() for record in caplog.records if "watchdog" in record.getMessage()]
    assert (
        f"step {BAD_STEP}: the loss is not a number, by itself in rows.jsonl, row {BAD_ROW + 1}; the step is" in message
    )
    assert all(5 < loss < 20 for loss in [*losses(trainer), trainer.mean_loss])


def test_skipped_steps_are_left_out_of_the_mean_loss(tmp_path: Path, rows: Rows) -> None:
    trainer = build(tmp_path / "skips", rows, logging_steps=1)
    trainer.run(None)
    logged = losses(trainer)
    assert [step for step, loss in enumerate(logged, 1) if math.isnan(loss)] == [BAD_STEP]
    assert trainer.mean_loss == pytest.approx(sum(loss for loss in logged if loss == loss) / (STEPS - 1))


def test_without_a_guard_bad_numbers_reach_the_weights_and_no_row_is_blamed_for_them(
    tmp_path: Path, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = build(tmp_path, rows, {"nonfinite": "warn"})
    with caplog.at_level(logging.WARNING):
        trainer.run(None)
    assert bool(weights(trainer).isnan().any())
    assert math.isnan(trainer.mean_loss)
    assert trainer.watchdog.counts["nonfinite"] > 1
    assert f"row {BAD_ROW + 1}" not in caplog.text.partition("more steps")[2]


@pytest.mark.parametrize("spoiled", ["gradients", "loss"])
def test_what_no_row_does_alone_is_told_so_and_stop_keeps_the_weights_from_before(tmp_path: Path, spoiled: str) -> None:
    trainer, seen = build(tmp_path, build_rows(), {"nonfinite": "stop"}), Weights()
    trainer.add_callback(seen)
    backward = trainer.accelerator.backward

    def spoil(loss: torch.Tensor, **kwargs: Any) -> None:
        bad = trainer.state.global_step == 5
        backward(loss * math.inf if bad else loss, **kwargs)

    trainer.accelerator.backward = spoil
    if spoiled == "loss":
        trainer.accelerator.backward = backward
        plain = trainer.compute_loss
        trainer.compute_loss = lambda *args, **kwargs: (
            plain(*args, **kwargs) * (math.nan if trainer.state.global_step == 5 else 1)
        )
    what = "gradients are" if spoiled == "gradients" else "loss is"
    with pytest.raises(Halted, match=f"step 6: the {what} not a number, but in no row of it alone; lower "
                       "trainer.learning_rate; if it comes back"):  # fmt: skip
        trainer.run(None)
    assert trainer.state.global_step == 6  # where it would have been saved
    assert torch.equal(weights(trainer), seen.after[5])


class SpoilOnce(TrainerCallback):
    """Makes the weights' gradients no numbers in one step of the training, once."""

    def __init__(self, step: int) -> None:
        self.step, self.rates, self.done = step, [], False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append((state.global_step + 1, kwargs["optimizer"].param_groups[0]["lr"]))


def test_a_rollback_resumes_from_the_last_checkpoint_with_a_lower_rate(tmp_path: Path) -> None:
    trainer, noted = build(tmp_path, build_rows(), {"nonfinite": "rollback"}), SpoilOnce(7)
    trainer.add_callback(noted)
    plain, spoiled = trainer.compute_loss, []

    def compute_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = plain(*args, **kwargs)
        if trainer.state.global_step == 6 and len(spoiled) < PER_STEP:
            spoiled.append(True)
            return loss * math.nan
        return loss

    trainer.compute_loss = compute_loss
    trainer.run(None)
    assert trainer.watchdog.counts["rollbacks"] == 1
    # Seen at the checkpoint of step 8, which is not written; back to that of step 6.
    assert [step for step, _ in noted.rates] == [1, 2, 3, 4, 5, 6, 7, 8, 7, 8, 9, 10, 11, 12]
    assert [rate for _, rate in noted.rates] == [1e-2] * 8 + [5e-3] * 6
    assert bool(weights(trainer).isfinite().all())
    saved = json.loads((tmp_path / "checkpoint-12" / "watchdog.json").read_text())
    assert saved["counts"]["rollbacks"] == 1
    assert saved["course"]["rate_factor"] == 0.5

    # Another start continues with the lower rate, and knows what happened.
    again = build(tmp_path, build_rows(), {"nonfinite": "rollback"}, max_steps=14)
    noted = SpoilOnce(0)
    again.add_callback(noted)
    again.run(tmp_path / "checkpoint-12")
    assert noted.rates == [(13, 5e-3), (14, 5e-3)]
    assert again.watchdog.counts["rollbacks"] == 1


@pytest.mark.full
def test_a_bad_row_that_comes_back_after_each_rollback_ends_the_training(tmp_path: Path, rows: Rows) -> None:
    trainer = build(tmp_path, rows, {"nonfinite": "rollback", "max_rollbacks": 2})
    with pytest.raises(Halted, match=rf"row {BAD_ROW + 1}, after 2 rollbacks \(watchdog.max_rollbacks\); look at"):
        trainer.run(None)


def test_n_bad_steps_in_a_row_end_the_training_run(tmp_path: Path) -> None:
    rows = build_rows()
    for row in rows:
        row["input_ids"][0] = BAD_TOKEN
    trainer = build(tmp_path, rows, {"max_skips": 4})
    with pytest.raises(Halted, match=r"4 steps in a row \(watchdog.max_skips\); look at that row"):
        trainer.run(None)


def test_a_step_whose_rows_are_all_masked_is_told(tmp_path: Path) -> None:
    rows = build_rows()
    for row in rows:
        row["labels"] = [-100] * 4
    trainer = build(tmp_path, rows, {"zero": "stop"})
    with pytest.raises(Halted, match=r"watchdog.zero: step 1: no token has a loss; everything in its rows"):
        trainer.run(None)


@pytest.mark.full
def test_a_loss_that_runs_away_is_called_divergence_and_taken_back_to_before(tmp_path: Path) -> None:
    trainer = build(
        tmp_path,
        build_rows(),
        {"divergence": "rollback", "rollback_factor": 0.1, "divergence_factor": 1.6},
        max_steps=60,
        logging_steps=5,
        save_steps=5,
        learning_rate=2e-2,
    )

    class Forget(TrainerCallback):
        """Loses at each step what was learned, from before a checkpoint until after it; once."""

        done = False

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.done = state.global_step > 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= 33 and not self.done:
                for name, weight in trainer.model.named_parameters():
                    if "lora_B" in name:
                        weight.data.zero_()

    trainer.add_callback(Forget())
    trainer.run(None)
    assert trainer.watchdog.counts["divergence"] == 1
    assert trainer.watchdog.counts["rollbacks"] == 1
    aside = sorted(path.stem for path in tmp_path.glob("checkpoint-*.diverged"))
    assert aside
    assert losses(trainer)[-1] < 6
    assert not set(aside) & {f"checkpoint-{n}" for n in range(34)}


@pytest.mark.full
def test_a_loss_that_only_wavers_has_not_diverged(tmp_path: Path) -> None:
    trainer = build(tmp_path, build_rows(), {"divergence": "stop"}, max_steps=40)
    trainer.run(None)
    assert trainer.watchdog.counts["divergence"] == 0


@pytest.mark.full
def test_a_slow_step_is_told_with_its_cause(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build(tmp_path, build_rows(), max_steps=24, save_steps=24)
    trainer.get_train_dataloader()
    item = trainer._shared.items(1, 4, 1)[0]  # in the second pass, in step 15
    plain = trainer.get_batch_samples

    def fetch(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step >= STEPS:
            trainer.train_dataset.slow, trainer.train_dataset.seconds = item, 1.2
        return plain(*args, **kwargs)

    trainer.get_batch_samples = fetch
    with caplog.at_level(logging.WARNING):
        trainer.run(None)
    assert trainer.watchdog.counts["slow"] == 1
    assert "it waited for its batches; set trainer.dataloader_num_workers" in caplog.text
    assert "watchdog.slow: step 1" in caplog.text


@pytest.mark.matrix(1)
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_that_do_not_come_end_the_training(tmp_path: Path, workers: int) -> None:
    rows = build_rows()
    trainer = build(tmp_path, rows, {"stalled_seconds": 0.5}, dataloader_num_workers=workers)
    trainer.get_train_dataloader()
    rows.slow, rows.seconds = trainer._shared.items(0, 10, 1)[0], 60
    started = time.monotonic()
    with pytest.raises(Halted, match=r"watchdog.stalled: no batch came within 0.5 s; the disk"):
        trainer.run(None)
    assert time.monotonic() - started < 20
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_dead_worker_process_ends_the_training(tmp_path: Path) -> None:
    rows = build_rows()
    trainer = build(tmp_path, rows, dataloader_num_workers=1)
    trainer.get_train_dataloader()
    rows.slow, rows.kills = trainer._shared.items(0, 10, 1)[0], True
    with pytest.raises(Halted, match=r"a process that prepares batches has ended .*; lower trainer.dataloader_num_w"):
        trainer.run(None)
    assert trainer.watchdog.counts["stalled"] == 1


def test_a_connection_that_breaks_before_its_process_is_known_to_be_dead_names_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watchdog = Watchdog(compose([]).watchdog, CPU, find_rows=lambda step: [], scales=False)
    dying = subprocess.Popen([sys.executable, "-c", "import os, time; time.sleep(0.5); os.kill(os.getpid(), 9)"])
    signal_handling._set_worker_pids(id(dying), (dying.pid,))
    try:
        message = rf"DataLoader worker \(pid {dying.pid}\) is killed"
        with pytest.raises(RuntimeError, match=message) as caught, watchdog.expecting_batches():
            raise ConnectionResetError("peer")
        assert watchdog.explain_loss(caught.value) is not None
        monkeypatch.setattr("qlora.training.batch_alarm.LOST_SECONDS", 0.1)
        with pytest.raises(ConnectionResetError), watchdog.expecting_batches():
            raise ConnectionResetError("peer")  # of something else
    finally:
        signal_handling._remove_worker_pids(id(dying))
        dying.wait()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["watchdog.zero=skip"], "watchdog.zero must be one of ignore, warn, stop, got 'skip'"),
        (["watchdog.divergence=rollback", "trainer.save_steps=null"], "watchdog.divergence=rollback needs checkpoints"),
        (["watchdog.slow_factor=1"], "watchdog.slow_factor must be above 1 and finite, got 1.0"),
    ],
)
def test_what_cannot_be_watched_so_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compose(overrides)


def test_nothing_is_watched_with_none() -> None:
    config = compose(["watchdog=none"]).watchdog
    assert isinstance(config, WatchdogConfig)
    assert {config.nonfinite.value, config.zero.value, config.slow.value} == {"ignore"}


@pytest.mark.parametrize("kind", [bnb.optim.PagedAdamW32bit, torch.optim.AdamW])
def test_an_update_that_is_undone_needs_a_copy_of_one_parameter_at_a_time(
    kind: type[torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    watchdog = Watchdog(compose([]).watchdog, torch.device("cpu"), find_rows=lambda step: [], scales=False)
    weights = [torch.nn.Parameter(torch.ones(5)) for _ in range(3)]
    optimizer = kind(weights, lr=0.1)
    watchdog.guard(optimizer)
    held, most = 0, 0
    guard = watchdog._guard
    keep, undo = guard._keep, guard._undo

    def count_keep(parameter: torch.nn.Parameter) -> torch.Tensor:
        nonlocal held, most
        held, most = held + 1, max(most, held + 1)
        return keep(parameter)

    def count_undo(*kept: Any) -> None:
        nonlocal held
        held -= 1
        undo(*kept)

    monkeypatch.setattr(guard, "_keep", count_keep)
    monkeypatch.setattr(guard, "_undo", count_undo)
    for norm in (1.0, math.nan, 1.0):
        previous = [weight.detach().clone() for weight in weights]
        watchdog.begin(None)
        watchdog.add_loss(torch.tensor(1.0))
        watchdog.judge(torch.tensor(norm))
        for weight in weights:
            weight.grad = torch.full((5,), norm)
        optimizer.step()
        unchanged = [torch.equal(weight, old) for weight, old in zip(weights, previous, strict=True)]
        assert unchanged == [math.isnan(norm)] * 3
    assert most == (1 if kind is bnb.optim.PagedAdamW32bit else 3)
