"""Running out of memory costs a run nothing but time, and a budget checkpoints as few layers as fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora.config.compose import compose
from qlora.errors import UserError
from qlora.run import Run
from qlora.session import Session
from qlora.step import layer_calls
from qlora.step.fast_step import FastStep
from qlora.tasks.build_trainer import build_trainer
from qlora.training.memory_budget import Budget, Formula, MemoryPlan, StepMemory, close_gaps
from qlora.training.peak_memory import PeakMemory

CPU = torch.device("cpu")
QUICK = [
    *("lora.r=4", "lora.dropout=0.3", "trainer.max_steps=3", "trainer.per_device_train_batch_size=4"),
    *("trainer.gradient_accumulation_steps=3", "trainer.logging_steps=1", "trainer.eval_steps=null"),
    *("data.max_eval_samples=4", "data.max_train_samples=64", "evaluation=loss", "evaluation.baseline=false"),
    *("task.predict=false", "device=cpu", "trainer.gradient_checkpointing=false"),
]
Enough = Callable[[FastStep, int], bool]


class SmallMemory:
    """Lets steps run out of memory at a decoder layer, unless `enough` of the step and its rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, enough: Enough, *, backward: bool, since: int = 1) -> None:
        self.enough, self.backward, self.since, self.entered = enough, backward, since, 0
        self.step: FastStep | None = None
        self.plain_enter, self.plain_call = FastStep.__enter__, layer_calls.call_layer
        monkeypatch.setattr(FastStep, "__enter__", lambda step: self.enter(step))
        monkeypatch.setattr(layer_calls, "call_layer", lambda *args, **kwargs: self.call(*args, **kwargs))

    def enter(self, step: FastStep) -> FastStep:
        self.step, self.entered = step, self.entered + 1
        return self.plain_enter(step)

    def call(self, layer: torch.nn.Module, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self.plain_call(layer, hidden, *args, **kwargs)
        assert self.step is not None
        if self.entered >= self.since and layer is self.step.layers[1] and not self.enough(self.step, len(hidden)):
            if not self.backward:
                raise torch.OutOfMemoryError("no memory")
            output.register_hook(self.fail)
        return output

    def fail(self, gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("no memory")


def run(folder: Path, *overrides: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    result = Run(compose([*QUICK, *overrides]), folder).execute()
    return result["metrics"], load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    trained = run(tmp_path_factory.mktemp("undisturbed"), "trainer.gradient_checkpointing=true")
    assert trained[0]["train_memory_retries"] == 0
    return trained


LEANER = {
    "all layers": (lambda step, rows: step.checkpointed == len(step.layers), 2),
    "offloaded": (lambda step, rows: step.offloaded == len(step.layers), 3),
}


@pytest.mark.matrix(1)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("needed", LEANER)
def test_a_step_that_runs_out_of_memory_learns_to_the_bit_what_an_undisturbed_one_does(
    needed: str, backward: bool, undisturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enough, retries = LEANER[needed]
    memory = SmallMemory(monkeypatch, enough, backward=backward, since=5)  # the second micro-batch of the second step
    metrics, adapter = run(tmp_path / "run")
    assert metrics["train_memory_retries"] == retries
    assert memory.entered == 9 + retries + 1  # each failed try, and once more the step's first micro-batch
    expected = undisturbed[1]
    assert metrics["train_loss"] == undisturbed[0]["train_loss"]
    assert adapter.keys() == expected.keys()
    assert all(torch.equal(adapter[name], expected[name]) for name in adapter)


def two_rows(step: FastStep, rows: int) -> bool:
    return rows <= 2


@pytest.mark.full
def test_where_leaner_layers_are_not_enough_micro_batches_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        SmallMemory(context, two_rows, backward=True)
        metrics, adapter = run(tmp_path / "retried")
    assert metrics["train_memory_retries"] == 4
    local = StepMemory.__init__

    def begin_lean(memory: StepMemory, *args: Any, **kwargs: Any) -> None:
        local(memory, *args, **kwargs)
        memory.plan = MemoryPlan(4, offloaded=4, chunks=2)

    monkeypatch.setattr(StepMemory, "__init__", begin_lean)
    _, expected = run(tmp_path / "lean")
    assert all(torch.equal(adapter[name], expected[name]) for name in expected)


@pytest.mark.full
def test_micro_batches_in_parts_learn_what_whole_ones_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = ["lora.dropout=0", "quantization.compute_dtype=fp32", "trainer.optim=sgd", "trainer.learning_rate=1"]
    plain, expected = run(tmp_path / "plain", *exact)
    SmallMemory(monkeypatch, two_rows, backward=False, since=5)
    metrics, adapter = run(tmp_path / "run", *exact)
    assert metrics["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)
    moved = [name for name in expected if "lora_B" in name]
    assert all((adapter[name] - expected[name]).norm() < 1e-3 * expected[name].norm() for name in moved)


@pytest.mark.full
def test_what_no_plan_makes_fit_ends_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SmallMemory(monkeypatch, lambda step, rows: False, backward=False)
    plan = "with 4 layers checkpointed, their inputs in the host's memory, micro-batches in 4 parts"
    with pytest.raises(UserError, match=rf"{plan}; take shorter rows .* quantization=nf4, or see with task=plan"):
        run(tmp_path / "run")


def test_plans_get_leaner_step_by_step() -> None:
    plans, plan = [], MemoryPlan(3)
    while (leaner := plan.leaner(10, 3)) is not None:
        plans.append(plan := leaner)
    assert plans == [
        MemoryPlan(7),
        MemoryPlan(10),
        MemoryPlan(10, 10),
        MemoryPlan(10, 10, 2),
        MemoryPlan(10, 10, 3),
    ]
    assert MemoryPlan(0).leaner(0, 2) == MemoryPlan(0, chunks=2)


class FakeStep:
    """A step of four layers that does nothing."""

    checkpointed, offloaded, layers, base = 0, 0, [torch.nn.Identity()] * 4, torch.nn.Identity()
    has_graphs = False

    def __enter__(self) -> FakeStep:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def keep(self, layers: int) -> None:
        assert layers == 0

    def give_up_graphs(self) -> bool:
        had, self.has_graphs = self.has_graphs, False
        return had


def no_memory(batch: Any) -> torch.Tensor:
    raise torch.OutOfMemoryError("no memory")


def test_graphs_are_given_up_before_anything_is_computed_again(caplog: pytest.LogCaptureFixture) -> None:
    step = FakeStep()
    step.has_graphs = True
    memory = StepMemory(step, CPU, None, alone=True)
    memory.begin()
    failures = iter([True, True, False])

    def learn(batch: Any) -> torch.Tensor:
        return no_memory(batch) if next(failures) else torch.zeros(())

    memory.run({"input_ids": torch.ones(2, 3)}, learn, lambda: None, rows=2)
    said = [record.message.partition("; ")[2] for record in caplog.records]
    assert said == ["once more without CUDA graphs", "once more with 2 layers checkpointed"]
    assert memory.retries == 2


def test_one_of_several_processes_does_not_begin_again_alone() -> None:
    memory = StepMemory(FakeStep(), CPU, None, alone=False)
    memory.begin()
    with pytest.raises(UserError, match="a training step runs out of memory with 0 layers checkpointed; take"):
        memory.run({"input_ids": torch.ones(2, 3)}, no_memory, lambda: None, rows=2)


class FakeGpu:
    """A GPU of 100 bytes, half of them taken; loading took 70."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.peak, self.fraction = 70, 1.0
        for name, value in {
            "memory_allocated": lambda device: 50,
            "max_memory_allocated": lambda device: self.peak,
            "reset_peak_memory_stats": lambda device: setattr(self, "peak", 50),
            "get_per_process_memory_fraction": lambda device: self.fraction,
            "set_per_process_memory_fraction": lambda value, device: setattr(self, "fraction", value),
            "get_device_properties": lambda device: type("Card", (), {"total_memory": 100}),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


# For rows of two times three tokens 10 bytes, 4 more for each layer not checkpointed, 1 less for each offloaded one.
def added(checkpointed: int, offloaded: int, rows: int, length: int) -> float:
    return rows * length * (10 + 4 * (4 - checkpointed) - offloaded) / 6


@pytest.mark.parametrize(("layer", "first", "then"), [(4, 2, 2), (2, 2, 1), (8, 2, 4)])
def test_a_budget_is_kept_by_the_formula_first_and_then_by_what_was_measured(
    layer: int, first: int, then: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, kept = FakeGpu(monkeypatch), PeakMemory(torch.device("cuda"))
    budget = Budget(Formula(50, True, added, rows=2, length=3), 4, limit=69, cap=80, device=CPU, memory=kept)
    memory = StepMemory(step := FakeStep(), CPU, budget, alone=True)
    plans = []

    def learn(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        assert gpu.fraction == 0.8
        plans.append(step.checkpointed)
        gpu.peak = max(gpu.peak, round(50 + batch["input_ids"].numel() * (10 + layer * (4 - step.checkpointed)) / 6))
        return torch.zeros(())

    for _ in range(4):
        memory.begin()
        for width in (1, 3, 2):
            memory.run({"input_ids": torch.ones(2, width)}, learn, lambda: None, rows=2)
    assert gpu.fraction == 1
    assert plans == [first] * 6 + [then] * 6
    assert kept.gb() == pytest.approx(max(70, 60 + 2 * layer) / 1e9)
    assert memory.retries == 0


def paged_optimizer(sizes: list[int]) -> torch.optim.Optimizer:
    """Returns an optimizer with paged states of these bytes, and some that lie on the GPU."""
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in [*sizes, 0]]
    optimizer = torch.optim.SGD(weights)
    for weight, size in zip(weights, sizes, strict=False):
        state = torch.zeros(size, dtype=torch.uint8)
        state.is_paged = True  # type: ignore[attr-defined]  # as bitsandbytes marks them
        optimizer.state[weight] = {"state1": state, "state2": torch.zeros(1000, dtype=torch.uint8)}
    return optimizer


def test_the_peak_of_a_run_holds_paged_states_and_what_loading_took(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, memory = FakeGpu(monkeypatch), PeakMemory(torch.device("cuda"))
    optimizer = paged_optimizer([])
    memory.watch(optimizer)
    assert (memory.paged, memory.gb()) == (0, 70e-9), "loading took more than there is now"
    optimizer = paged_optimizer([8, 4])
    memory.watch(optimizer)
    gpu.peak = 61
    assert (memory.paged, memory.gb()) == (12, 73e-9)
    del optimizer
    assert (memory.paged, memory.gb()) == (0, 73e-9), "it is released with the optimizer, and was needed"
    on_host = PeakMemory(CPU)
    optimizer = paged_optimizer([8])
    on_host.watch(optimizer)
    assert on_host.paged == 0, "the memory of a process holds them already"


@pytest.mark.parametrize(("paged", "first", "then"), [(0, 2, 2), (4, 3, 3), (8, 4, 4)])
def test_a_budget_leaves_room_for_paged_states(
    paged: int, first: int, then: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, kept = FakeGpu(monkeypatch), PeakMemory(torch.device("cuda"))
    optimizer = paged_optimizer([])
    kept.watch(optimizer)
    formula = Formula(50, True, added, rows=2, length=3, paged=paged)
    budget = Budget(formula, 4, limit=69, cap=80, device=CPU, memory=kept)
    assert budget.choose().checkpointed == first
    optimizer = paged_optimizer([paged])
    kept.watch(optimizer)
    with budget.measured(MemoryPlan(first), {"input_ids": torch.ones(2, 3)}):
        gpu.peak = 60 + 4 * (4 - first)
    assert budget.choose().checkpointed == then


def test_a_budget_that_no_number_of_layers_keeps_begins_with_the_leanest_plan() -> None:
    assert Budget(Formula(50, False, added, 2, 3), 4, 55, None, CPU).choose() == MemoryPlan(4, 4)
    assert Budget(Formula(50, False, added, 2, 3), 4, 58, None, CPU).choose() == MemoryPlan(4, 2)
    assert Budget(Formula(50, False, added, 2, 3), 4, 60, None, CPU).choose() == MemoryPlan(4)
    assert Budget(Formula(50, False, added, 2, 3), 4, 76, None, CPU).choose() == MemoryPlan(0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "trainer.memory_budget=24GB",
            "trainer.memory_budget=24GB limits a CUDA device's memory, and this run computes on cpu; leave it out",
        ),
        (
            "trainer.flash_attention=fa3",
            "trainer.flash_attention=fa3 runs on CUDA only, and this run computes on cpu; set "
            "trainer.flash_attention=auto",
        ),
    ],
)
def test_what_needs_a_gpu_is_refused_before_anything_is_loaded(
    override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "load_base", None)
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        run(tmp_path, override)


def test_a_budget_of_what_is_free_does_without_a_gpu(tmp_path: Path) -> None:
    parts = Run(compose([*QUICK, "trainer.memory_budget=auto"]), tmp_path / "auto").session
    model = parts.add_adapter(parts.load_base())
    assert build_trainer(parts, model, [], None).memory.budget is None  # type: ignore[arg-type]


def test_gaps_are_closed_under_tensors_that_share_what_they_show(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, resize = [], torch.UntypedStorage.resize_

    def note(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        sizes.append(size)
        return resize(storage, size)

    monkeypatch.setattr(torch.UntypedStorage, "resize_", note)
    linear = torch.nn.Linear(1024, 1024, bias=False)
    linear.register_buffer("rows", linear.weight.detach()[512:])
    linear.register_buffer("small", torch.ones(8))
    previous = linear.weight.detach().clone()
    close_gaps(linear, CPU)
    assert sizes == [0, previous.nbytes]  # what two show once, and nothing small
    assert torch.equal(linear.weight, previous)
    assert torch.equal(linear.rows, previous[512:])
    assert linear.rows.untyped_storage().data_ptr() == linear.weight.untyped_storage().data_ptr()
    linear.weight.sum().backward()
    assert torch.equal(linear.weight.grad, torch.ones(1024, 1024))
