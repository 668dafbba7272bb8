"""Progress lines and the clock behind them, driven by the library's own trainer."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers import ProgressCallback as LibraryProgress

from qlora.training.meter import TrainingClock
from qlora.training.progress import ProgressCallback, evaluation_line, fit, format_rate

STEPS, ROWS, TOKENS = 6, 2, 8
EVALUATION = 1.5  # seconds


class SlowEvaluation(Trainer):
    """Takes its time to evaluate, and says so as the library does."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        time.sleep(EVALUATION)
        metrics = {"eval_loss": 0.5, "eval_exact_match": 0.56}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class SlowStep(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        time.sleep(0.02)


def build_trainer(folder: Path, callback: TrainerCallback, **options: Any) -> Trainer:
    shape = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2))
    row = {name: torch.ones(TOKENS, dtype=torch.long) for name in ("input_ids", "labels", "attention_mask")}
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        logging_steps=2,
        eval_steps=2,
        eval_strategy="steps",
        save_strategy="no",
        include_num_input_tokens_seen="non_padding",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    trainer = SlowEvaluation(
        model, arguments, train_dataset=[row] * 64, eval_dataset=[row], callbacks=[callback, SlowStep()]
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(LibraryProgress)
    return trainer


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlora.training.progress.say", printed.append)
        tokens = iter(range(0, 10_000, ROWS * TOKENS))
        build_trainer(tmp_path_factory.mktemp("progress"), ProgressCallback(tokens=lambda: next(tokens))).train()
    return printed


@pytest.mark.full
def test_a_pipe_gets_a_line_a_log_and_a_line_an_evaluation(lines: list[str]) -> None:
    kinds = [line.split()[0] for line in lines]
    assert kinds == ["step", "eval"] * 3
    assert re.fullmatch(r"step 2/6  loss \d\.\d{3}  lr [\d.]+e-5  [\d,]+ tokens/s  0:0\d left", lines[0])
    assert lines[1] == "eval at step 2: loss 0.500, perplexity 1.649, exact match 56.0 %"
    assert lines[4].startswith("step 6/6")
    assert not lines[4].endswith("left")


def test_time_left_counts_the_evaluations_to_come(lines: list[str]) -> None:
    left = re.search(r"0:(\d\d) left", lines[2])  # one more evaluation and two steps
    assert left is not None
    assert int(left[1]) >= EVALUATION


def test_the_clock_stops_between_steps_only_if_something_happened_there(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("qlora.training.meter.time.monotonic", lambda: now[0])
    clock = TrainingClock()

    def step(wait: float, work: float, pause: bool) -> None:
        if pause:
            clock.pause()
        now[0] += wait
        clock.begin_step()
        now[0] += work
        clock.end_step()

    step(1.0, 2.0, pause=False)  # waiting for data counts
    assert clock.trained == 3.0
    step(10.0, 2.0, pause=True)
    assert clock.trained == 5.0
    assert clock.pauses == [10.0]
    assert clock.seconds_left(4, pauses=2) == 4 * 2.0 + 2 * 10.0, "the first step warms up"


def test_speed_and_time_left_are_those_of_the_latest_steps_without_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("qlora.training.meter.time.monotonic", lambda: now[0])
    clock = TrainingClock()

    def step(seconds: float) -> None:
        now[0] += seconds
        clock.end_step(tokens=100)

    step(60.0)  # compiles
    assert (clock.tokens_per_second, clock.seconds_left(9)) == (None, None)
    step(30.0)
    assert clock.seconds_left(8) == 240
    for _ in range(3):
        step(2.0)
    assert clock.tokens_per_second == 50
    assert clock.seconds_left(10) == 20
    for _ in range(50):
        step(1.0)
    assert clock.tokens_per_second == 100, "a training run that became faster"


@pytest.mark.parametrize(
    ("rate", "text"), [(0.0, "0 (warm-up)"), (2e-4, "2e-4"), (1.46e-5, "1.5e-5"), (0.002, "2e-3"), (1.0, "1e0")]
)
def test_a_learning_rate_reads_as_it_is_typed(rate: float, text: str) -> None:
    assert format_rate(rate) == text


def test_an_evaluation_line_keeps_bookkeeping_out() -> None:
    assert evaluation_line({"eval_runtime": 3.0, "epoch": 1.0, "num_input_tokens_seen": 5}, 5) is None
    assert evaluation_line({"base_eval_loss": 0.0, "base_eval_runtime": 1.0}, 0) == (
        "untuned base: loss 0.000, perplexity 1.000"
    )
    assert evaluation_line({"eval_loss": 1000.0}, 5) == "eval at step 5: loss 1,000, perplexity inf"


def test_a_line_that_is_too_long_leaves_out_what_matters_least() -> None:
    notes = [(0, "step 120/1000"), (0, "loss 1.234"), (4, "lr 2.0e-04"), (1, "12,345 tokens/s"), (2, "MFU 43%")]
    notes += [(3, "wait 12%"), (5, "71.2 GB"), (0, "1:23:45 left")]
    assert fit(notes, 200) == [text for _, text in notes]
    line = "  ".join(fit(notes, 80))
    assert line == "step 120/1000  loss 1.234  12,345 tokens/s  MFU 43%  wait 12%  1:23:45 left"
    assert fit(notes, 10) == ["step 120/1000", "loss 1.234", "1:23:45 left"]


def test_close_ends_the_bar_of_a_training_that_failed(tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError

    callback = ProgressCallback()
    trainer = build_trainer(tmp_path, callback)
    trainer.add_callback(Fails())
    with pytest.raises(RuntimeError):
        trainer.train()
    callback.close()
    callback.close()
