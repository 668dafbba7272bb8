"""The speed of a training run, and what its steps do not wait for."""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.masking_utils import create_causal_mask

from qlora.config.compose import compose
from qlora.config.schema import LossConfig, QuantizationConfig, TrainerConfig
from qlora.data.batching.collate import Collator, count_work
from qlora.objectives import build_objective
from qlora.runtime.device import Placement
from qlora.step.fast_step import FastStep
from qlora.step.parts.attention import BATCH, VARLEN
from qlora.training.arguments import build_arguments
from qlora.training.meter import Meter
from qlora.training.stopping import Stop
from qlora.training.trainer import QLoraTrainer

ROWS, STEPS, ACCUMULATED = 2, 6, 2
LENGTHS = (3, 5, 8)
TOKENS = [length for _ in range(8) for length in LENGTHS]
CPU = torch.device("cpu")
WATCHDOG = compose([]).watchdog
SFT = build_objective(LossConfig())


def build_model() -> Any:
    shape = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2, use_cache=False))
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))


def build_config(**options: Any) -> TrainerConfig:
    settings = {"logging_steps": 3, "max_grad_norm": 0.3, **options}
    return TrainerConfig(
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=ACCUMULATED,
        learning_rate=1e-3,
        optim="adamw_torch",
        gradient_checkpointing=False,
        group_by_length=False,
        **settings,
    )


def build_trainer(folder: Path, meter: Meter | None = None, **options: Any) -> QLoraTrainer:
    config = build_config(**options)
    rows = [{"input_ids": list(range(1, n + 1)), "labels": list(range(1, n + 1))} for n in TOKENS]
    model, placement = build_model(), Placement(CPU, torch.float32, torch.float32)
    return QLoraTrainer(
        model=model,
        arguments=build_arguments(config, output_dir=folder, device=CPU, compute=torch.float32, seed=0),
        rows=rows,
        lengths=TOKENS,
        collate=Collator(0),
        count=lambda batch: count_work(batch, 0),
        measure=lambda model, step: {"loss": 1.0},
        verify=lambda folder, model: None,
        loraplus_lr_ratio=None,
        step=FastStep(model, config, QuantizationConfig(bits=32), placement, None, SFT),
        objective=SFT,
        budget=None,
        watchdog=WATCHDOG,
        name_rows=lambda index: [(f"row {index}", rows[index])],
        meter=meter or Meter(CPU, peak_memory_gb=lambda: 1.5),
        stop=Stop(),
        metadata={},
        callbacks=[],
    )


class Reads(TorchDispatchMode):
    """Notes who asks a tensor for a number, which on a GPU waits until all work is done."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            frames = [frame for frame in traceback.extract_stack()[:-1] if "/torch/_" not in frame.filename]
            self.asked[f"{Path(frames[-1].filename).name}:{frames[-1].name}"] += 1
        return func(*args, **(kwargs or {}))


class BetweenLogs(TrainerCallback):
    """Watches the steps from the begin of one that is not logged to its end."""

    def __init__(self, reads: Reads) -> None:
        self.reads, self.watched = reads, 0
        self._stack = contextlib.ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stack.enter_context(self.reads)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stack.close()
        self.watched += 1


@pytest.mark.parametrize("max_grad_norm", [0.3, 0.0], ids=["clipping", "no clipping"])
def test_no_step_asks_for_the_value_of_a_loss_or_a_gradient(tmp_path: Path, max_grad_norm: float) -> None:
    trainer = build_trainer(tmp_path, max_grad_norm=max_grad_norm, logging_steps=4)
    watch = BetweenLogs(Reads())
    trainer.add_callback(watch)
    trainer.train()
    assert watch.watched == STEPS
    # Left are the mask of transformers' own attention, which the fast step does without, and torch's optimizers, which
    # count their steps on the host.
    assert {name.partition(":")[0] for name in watch.reads.asked} <= {"masking_utils.py", "optimizer.py"}
    assert watch.reads.asked["optimizer.py:_get_value"] > 0, "nothing was watched"


def test_the_library_s_filter_would_ask_in_every_micro_step(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path)
    trainer.args.logging_nan_inf_filter = True
    watch = BetweenLogs(Reads())
    trainer.add_callback(watch)
    trainer.train()
    assert watch.reads.asked["trainer.py:_run_epoch"] == 2 * STEPS * ACCUMULATED


@pytest.mark.parametrize("attention", [BATCH, VARLEN])
def test_the_fast_attention_asks_for_no_mask_of_packs(attention: str) -> None:
    config = LlamaConfig(hidden_size=8, num_attention_heads=2)
    config._attn_implementation = attention
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    with Reads() as reads:
        assert create_causal_mask(config, torch.zeros(1, 5, 8), None, None, position_ids=positions) is None
    assert not reads.asked


def test_on_an_accelerator_batches_go_there_while_it_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}

    def keep(**options: Any) -> Any:
        made.update(options)
        return SimpleNamespace(n_gpu=1)

    monkeypatch.setattr("qlora.training.arguments.TrainingArguments", keep)
    build_arguments(build_config(), output_dir=tmp_path, device=torch.device("cuda"), compute=torch.bfloat16, seed=0)
    assert (made["dataloader_pin_memory"], made["accelerator_config"]) == (True, {"non_blocking": True})


def test_a_loss_that_is_no_number_is_logged_as_such(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, logging_steps=1)
    healthy = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: (  # type: ignore[method-assign]
        healthy(*args, **kwargs) * (float("nan") if trainer.state.global_step == 2 else 1.0)
    )
    trainer.train()
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    assert losses[2] == losses[2]
    assert losses[3] != losses[3]


def test_tokens_and_operations_are_those_of_the_batches_trained_on(tmp_path: Path) -> None:
    meter = Meter(CPU, peak_memory_gb=lambda: 1.5, operations=lambda tokens, pairs: 10.0 * tokens + pairs, rate=1e3)
    trainer = build_trainer(tmp_path, meter)
    trainer.train()
    rows = STEPS * ACCUMULATED * ROWS
    assert rows == len(TOKENS), "an epoch, so that every row counts once"
    assert trainer.state.num_input_tokens_seen == sum(TOKENS)
    operations = 10 * sum(TOKENS) + sum(n * (n + 1) // 2 for n in TOKENS)
    assert trainer.state.total_flos == operations
    speed = meter.overall(trainer.state)
    seconds = meter.clock.trained
    assert speed["train_tokens_per_second"] == pytest.approx(sum(TOKENS) / seconds)
    assert speed["train_mfu"] == pytest.approx(operations / seconds / 1e3)
    assert 0 < speed["train_data_wait"] < 1


def test_a_token_without_a_label_needs_no_output_layer(tmp_path: Path) -> None:
    meter = Meter(CPU, peak_memory_gb=lambda: 1.5, operations=lambda tokens, pairs: 10.0 * tokens, output=4.0, rate=1e3)
    trainer = build_trainer(tmp_path, meter)
    for index in range(len(TOKENS)):
        trainer.rows[index]["labels"][:2] = [-100, -100]
    trainer.train()
    assert trainer.state.total_flos == 10 * sum(TOKENS) - 4 * 2 * len(TOKENS)


def test_a_log_holds_the_speed_since_the_last_one(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [1, 3, 6]
    assert all(entry["peak_memory_gb"] == 1.5 for entry in logs)
    assert all("train_mfu" not in entry for entry in logs), "without a measured rate there is none"
    seen = [0, *(entry["num_input_tokens_seen"] for entry in logs)]
    seconds = [(after - previous) / entry["train_tokens_per_second"]
               for previous, after, entry in zip(seen, seen[1:], logs, strict=False)]  # fmt: skip
    assert sum(seconds) == pytest.approx(trainer.meter.clock.trained)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    moment = [0.0]
    monkeypatch.setattr("qlora.training.meter.time.monotonic", lambda: moment[0])
    return moment


def test_waiting_counts_while_training_and_not_behind_an_evaluation(now: list[float]) -> None:
    state = SimpleNamespace(num_input_tokens_seen=100, total_flos=1e6)
    control = SimpleNamespace(should_log=False, should_evaluate=False, should_save=False, should_training_stop=False)
    args = SimpleNamespace(world_size=2)
    meter = Meter(CPU, peak_memory_gb=lambda: 0.0, operations=lambda tokens, pairs: 0.0, rate=100.0)
    meter.on_train_begin(args, state, control)

    def step(wait: float, work: float) -> None:
        with meter.waiting():
            now[0] += wait
        meter.on_step_begin(args, state, control)
        now[0] += work
        state.num_input_tokens_seen += 40
        state.total_flos += 800
        meter.on_step_end(args, state, control)

    step(wait=1.0, work=3.0)
    rates = meter.since_last_log(state)
    assert rates == {
        "train_tokens_per_second": 10.0,  # tokens before a resumption do not count
        "train_mfu": 1.0,  # of both processes' devices
        "train_data_wait": 0.25,
        "peak_memory_gb": 0.0,
    }
    now[0] += 50.0
    meter.on_evaluate(args, state, control)
    step(wait=10.0, work=4.0)
    assert meter.since_last_log(state)["train_data_wait"] == 0.0
    assert meter.overall(state)["train_data_wait"] == 0.125


def test_spared_walks_leave_the_model_as_it_was(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, eval_steps=2)
    modes: list[set[bool]] = []

    def measure(model: torch.nn.Module, step: int) -> dict[str, float]:
        model.eval()
        modes.append({module.training for module in model.modules()})
        model.train()
        return {"loss": 1.0}

    trainer.measure = measure
    trainer.model.base_model.eval()  # as a model comes from a file, below an adapter
    seen: list[set[bool]] = []
    healthy = trainer.compute_loss

    def compute(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append({module.training for module in model.modules()})
        assert all(parameter.grad is None for parameter in model.parameters()) == (len(seen) % ACCUMULATED == 1)
        return healthy(model, *args, **kwargs)

    trainer.compute_loss = compute  # type: ignore[method-assign]
    trainer.train()
    assert modes == [{False}] * 3
    assert seen == [{True}] * (STEPS * ACCUMULATED)
    assert not {"train", "zero_grad"} & trainer.model.__dict__.keys()
