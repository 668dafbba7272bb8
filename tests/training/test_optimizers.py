"""Every optimizer and schedule that is offered trains, and a run that was cut in two ends in the same weights."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.training_args import OptimizerNames

from qlora.config.compose import compose
from qlora.config.optimizers import (
    SCHEDULES,
    check_installed,
    check_optimizer,
    read_arguments,
    write_arguments,
)
from qlora.config.registries.optimizers import LEFT_OUT, OPTIMIZERS
from qlora.config.schema import LossConfig, QuantizationConfig, TrainerConfig
from qlora.data.batching.collate import Collator, count_work
from qlora.errors import UserError
from qlora.objectives import build_objective
from qlora.runtime.device import Placement
from qlora.step.fast_step import FastStep
from qlora.training.arguments import build_arguments
from qlora.training.device_checks import check_device
from qlora.training.meter import Meter
from qlora.training.optimizers.adopt import Adopt
from qlora.training.stopping import Stop
from qlora.training.trainer import QLoraTrainer

CPU = torch.device("cpu")
STEPS, HALF = 4, 2
ARGUMENTS: dict[str, Any] = {
    "num_decay_steps": 0.5, "num_stable_steps": 1, "num_cycles": 2, "min_lr": 1e-4, "max_lr": 0.5, "lr_end": 1e-4,
    "power": 2.0, "timescale": 3, "factor": 0.5, "patience": 0, "warmup_lr_rate": 0.5, "min_lr_ratio": 0.1,
    "threshold": 1e-3, "threshold_mode": "rel", "cooldown": 1, "eps": 1e-9, "warmup": 1, "smooth": True,
    "window_size": 2, "reset_start": 5, "warmup_type": "cosine", "decay_type": "1-sqrt",
    "beta3": 0.99, "alpha": 0.9, "t_alpha": 3, "t_beta3": 3, "momentum": 0.5, "centered": True, "lr_decay": 0.1,
    "dampening": 0.0, "nesterov": True, "r": 1.0, "weight_lr_power": 1.0, "block_size": 128,
    "bf16_stochastic_round": False, "decouple_lr": True, "kahan_sum": True, "ns_steps": 4, "adjust_lr_fn": "original",
    "rank": 3, "update_proj_gap": 3, "scale": 2.0, "proj_type": "reverse_std", "proj": "svd", "scale_type": "tensor",
}  # fmt: skip
"""A value of every argument that an optimizer or a schedule takes, other than its default."""
WATCHDOG = compose(["trainer.save_steps=2"]).watchdog
SFT = build_objective(LossConfig())


def settings(**changes: Any) -> TrainerConfig:
    plain: dict[str, Any] = {"max_steps": STEPS, "save_steps": HALF, "eval_steps": 1, "learning_rate": 1e-2}
    return TrainerConfig(
        **{**plain, "optim": "adamw_torch", **changes},
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        group_by_length=False,
        logging_steps=1,
    )


def build(
    folder: Path,
    config: TrainerConfig,
    measure: Callable[[Any, int], dict[str, float]] | None = None,
    loraplus: float | None = None,
    adapt: Callable[[Any], Any] = lambda model: get_peft_model(
        model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    ),
    ranks: Callable[[Any], Any] = lambda model: None,
    dtype: torch.dtype = torch.float32,
) -> QLoraTrainer:
    device = torch.device("cuda") if OPTIMIZERS[config.optim].needs_cuda else CPU
    torch.manual_seed(0)
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2, use_cache=False))
    model = model.to(device, dtype) if OPTIMIZERS[config.optim].trains_all_weights else adapt(model).to(device)
    rows = [{"input_ids": [1 + row % 8, 9, 20], "labels": [-100, 9, 20]} for row in range(8)]
    return QLoraTrainer(
        model=model,
        arguments=build_arguments(config, output_dir=folder, device=device, compute=torch.float32, seed=0),
        rows=rows,
        lengths=[3] * len(rows),
        collate=Collator(0),
        count=lambda batch: count_work(batch, 0),
        measure=measure or (lambda model, step: {"loss": 2.0 + step}),
        verify=lambda folder, model: None,
        loraplus_lr_ratio=loraplus,
        ranks=ranks(model),
        step=FastStep(
            model, config, QuantizationConfig(bits=32), Placement(device, torch.float32, torch.float32), None, SFT
        ),
        objective=SFT,
        budget=None,
        watchdog=WATCHDOG,
        name_rows=lambda index: [(f"row {index + 1}", rows[index])],
        meter=Meter(device, peak_memory_gb=lambda: 0.0),
        stop=Stop(),
        metadata={},
        callbacks=[],
    )


def weights(trainer: QLoraTrainer) -> torch.Tensor:
    return torch.cat(
        [weight.detach().flatten() for weight in trainer.model.parameters() if weight.requires_grad]
    ).clone()


def rates(trainer: QLoraTrainer) -> list[float]:
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


def check_exact(folder: Path, config: TrainerConfig, **how: Any) -> QLoraTrainer:
    """Trains, and trains again from the checkpoint in the middle; returns the first training."""
    whole = build(folder, config, **how)
    half = config.save_steps
    first = weights(whole)
    whole.run(None)
    assert not torch.equal(weights(whole), first)
    assert bool(weights(whole).isfinite().all())
    again = build(folder, config, **how)
    again.run(folder / f"checkpoint-{half}")
    assert torch.equal(weights(again), weights(whole))
    assert rates(again) == rates(whole)
    return whole


def add_frozen_a(model: Any) -> Any:
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    for name, weight in adapted.named_parameters():
        weight.requires_grad_(".lora_B." in name)
    return adapted


@pytest.mark.matrix(3)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_takes_its_arguments_and_resumes_exactly(tmp_path: Path, name: str) -> None:
    optimizer = OPTIMIZERS[name]
    if optimizer.needs_cuda and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if optimizer.module is not None:
        pytest.importorskip(optimizer.module)
    given = {key: ARGUMENTS[key] for key in optimizer.arguments}
    # The first steps of RAdam are none.
    steps = {"max_steps": 10, "save_steps": 8} if name == "schedule_free_radam" else {}
    adapt = {"adapt": add_frozen_a} if optimizer.trains_b_alone else {}
    trainer = check_exact(tmp_path, settings(optim=name, optim_args=given, **steps), **adapt)
    [group, *_] = trainer.optimizer.optimizer.param_groups
    for key, value in given.items():
        if key == "beta3":
            assert group["betas"][2] == value
        elif key in group:
            assert (group[key], type(group[key])) == (value, type(value))


@pytest.mark.parametrize("name", [name for name, kind in OPTIMIZERS.items() if kind.trains_all_weights])
@pytest.mark.parametrize("kind", ["std", "right", "left", "full"])
def test_projections_and_16_bit_states_resume_exactly(tmp_path: Path, name: str, kind: str) -> None:
    pytest.importorskip(str(OPTIMIZERS[name].module))
    given = {"rank": 3, "update_proj_gap": 3}  # made anew after the checkpoint, too
    if "proj_type" in OPTIMIZERS[name].arguments:
        given |= {"proj_type": kind}
    elif kind in ("right", "left"):
        pytest.skip("it has one kind of projection")
    else:
        given |= {"proj": {"std": "random", "full": "svd"}[kind]}
    dtype = torch.bfloat16 if kind in ("std", "full") else torch.float32
    check_exact(tmp_path, settings(optim=name, optim_args=given), dtype=dtype)


@pytest.mark.matrix(1)
@pytest.mark.parametrize("name", ["adamw_torch", "paged_adamw_8bit", "adafactor", "muon"])
def test_lora_plus_resumes_exactly(tmp_path: Path, name: str) -> None:
    check_exact(tmp_path, settings(optim=name), loraplus=4.0)


@pytest.mark.matrix(2)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_takes_its_arguments_and_resumes_exactly(tmp_path: Path, name: str) -> None:
    chosen = dict(SCHEDULES[name].arguments)
    for key in SCHEDULES[name].one_of[1:]:
        del chosen[key]
    given = {key: ARGUMENTS[key] for key in chosen}
    trainer = check_exact(tmp_path, settings(lr_scheduler_type=name, lr_scheduler_kwargs=given, warmup_steps=1))
    assert (len(set(rates(trainer))) > 1) == (name != "constant")


def test_a_schedule_that_follows_the_loss_lowers_the_rate_where_it_rises(tmp_path: Path) -> None:
    config = settings(lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_kwargs={"patience": 0, "factor": 0.5})
    trainer = build(tmp_path, config)
    trainer.run(None)
    assert rates(trainer) == [1e-2, 1e-2, 5e-3, 2.5e-3]


@pytest.mark.parametrize("name", ["schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"])
def test_the_weights_that_are_measured_and_kept_are_the_averages(tmp_path: Path, name: str) -> None:
    pytest.importorskip("schedulefree")
    seen: list[tuple[torch.Tensor, bool]] = []

    def measure(model: Any, step: int) -> dict[str, float]:
        seen.append((weights(trainer), trainer.optimizer.optimizer.param_groups[0]["train_mode"]))
        return {"loss": 1.0}

    trainer = build(tmp_path, settings(optim=name, warmup_steps=0.5), measure)
    trainer.run(None)
    assert [mode for _, mode in seen] == [False] * STEPS
    assert torch.allclose(weights(trainer), seen[-1][0], atol=1e-6)
    groups = trainer.optimizer.optimizer.param_groups
    assert [group.get("warmup_steps", 2) for group in groups] == [2] * len(groups), "a share of 4 steps"


def test_what_is_offered_and_what_is_left_out_are_all_of_transformers() -> None:
    assert {name.value for name in OptimizerNames} == (
        OPTIMIZERS.keys() - {"muon", "adopt_adamw", "lorafa"}
    ) | LEFT_OUT.keys()
    assert not OPTIMIZERS.keys() & LEFT_OUT.keys()
    assert SCHEDULES.keys() == {item.value for item in transformers.SchedulerType}


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        compose(["recipe=none", *overrides])
    return str(error.value)


@pytest.mark.parametrize(
    "name", ["adamw_torch_4bit", "stable_adamw", "schedule_free_sgd", "galore_adamw", "apollo_adamw"]
)
def test_a_package_that_is_missing_is_named_before_anything_starts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, package = OPTIMIZERS[name].module, OPTIMIZERS[name].package
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda requested, *at: None if requested == module else find(requested, *at)
    )
    with pytest.raises(UserError) as error:
        check_installed(name)
    assert str(error.value) == (
        f"trainer.optim={name} needs the package {package}, which is not installed: pip install {package}, or choose "
        "another, e.g. trainer.optim=adamw_torch"
    )


def test_a_training_and_the_doctor_alone_ask_for_the_package_of_an_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    chosen = ["recipe=none", "trainer.optim=stable_adamw"]
    for task in ("train", "doctor"):
        assert "needs the package torch-optimi" in refusal(*chosen, f"task={task}")
    assert compose([*chosen, "task=plan"]).trainer.optim == "stable_adamw"


@pytest.mark.parametrize("name", LEFT_OUT)
def test_an_optimizer_that_is_left_out_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(UserError) as error:
        settings(optim=name)
    assert str(error.value).startswith(f"trainer.optim={name} is not offered: it")


@pytest.mark.parametrize("name", [name for name, kind in OPTIMIZERS.items() if kind.trains_all_weights])
def test_an_optimizer_that_projects_gradients_is_refused_for_an_adapter(name: str) -> None:
    assert refusal(f"trainer.optim={name}", "task=plan") == (
        f"trainer.optim={name} projects the gradients of whole matrices to a low rank, and those of an adapter are of "
        "low rank already; set lora=none, or choose another, e.g. trainer.optim=muon"
    )
    whole = ["recipe=none", "lora=none", "quantization=none", f"trainer.optim={name}", "task=plan"]
    assert compose(whole).trainer.optim == name


def test_the_average_of_checkpoints_is_refused_where_the_optimizer_averages() -> None:
    chosen = ["trainer.optim=schedule_free_adamw", "trainer.keep=average", "trainer.save_steps=10", "task=plan"]
    assert refusal(*chosen) == (
        "trainer.keep=average and trainer.optim=schedule_free_adamw exclude each other: its checkpoints hold the "
        "weights of the next step, and it averages by itself; change one of them"
    )


def test_a_gradient_that_cannot_be_projected_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    pytest.importorskip("galore_torch")
    trainer = build(tmp_path, settings(optim="galore_adamw", optim_args={"rank": 3}))
    optimizer = trainer.create_optimizer()
    for parameter in trainer.model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    with pytest.raises(UserError, match=r"^a gradient is NaN or infinite and cannot be projected; lower"):
        optimizer.step()


def test_adopt_scales_a_gradient_by_the_moments_before_it() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Adopt([weight], 0.1, (0.9, 0.99), 1e-6, weight_decay=0.01)
    expected, average, square = weight.detach().clone().double(), torch.zeros(2).double(), torch.zeros(2).double()
    for step, gradient in enumerate(torch.tensor([[0.5, -1.0], [0.3, 4.0], [-0.2, 0.0]])):
        weight.grad = gradient.clone()
        optimizer.step()
        double = gradient.double()
        if step:
            scaled = (double / square.sqrt().clamp(min=1e-6)).clamp(-(step**0.25), step**0.25)
            average = 0.9 * average + 0.1 * scaled
            expected = expected * (1 - 0.1 * 0.01) - 0.1 * average
        square = 0.99 * square + 0.01 * double**2 if step else double**2
    assert weight.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_a_rank_that_no_matrix_exceeds_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("galore_torch")
    with pytest.raises(UserError) as error:
        build(tmp_path, settings(optim="galore_adamw")).run(None)
    assert str(error.value) == (
        "trainer.optim=galore_adamw projects matrices that are larger than its rank, 128, and the smaller side of each "
        "matrix of this model has at most 16; set trainer.optim_args.rank below that"
    )


def test_an_optimizer_that_needs_a_cuda_device_is_refused_without_one() -> None:
    text = refusal("trainer.optim=paged_ademamix_32bit", "device=cpu")
    assert text == (
        "trainer.optim=paged_ademamix_32bit runs on CUDA only, and this run computes on cpu; set trainer.optim=ademamix"
    )
    trainer = compose(["recipe=none", "trainer.optim=paged_ademamix_8bit"]).trainer
    with pytest.raises(UserError, match=r"set trainer.optim=ademamix_8bit$"):
        check_device(trainer, "cpu")


REFUSED = {
    "adam": ({"optim": "adamw_torh"}, "trainer.optim='adamw_torh' is unknown (did you mean adamw_torch"),
    "unknown argument": (
        {"optim": "sgd", "optim_args": {"momentun": 0.9}},
        "trainer.optim_args.momentun is not an argument of trainer.optim=sgd (did you mean momentum?); it reads "
        "momentum, dampening, nesterov; trainer.optim_args=null takes all out",
    ),
    "no arguments": (
        {"optim": "adafactor", "optim_args": {"r": 1}},
        "trainer.optim_args.r is not an argument of trainer.optim=adafactor; it takes none",
    ),
    "wrong type": (
        {"optim": "sgd", "optim_args": {"nesterov": 1}},
        "trainer.optim_args.nesterov must be true or false, got 1",
    ),
    "nesterov alone": (
        {"optim": "sgd", "optim_args": {"nesterov": True}},
        "trainer.optim_args.nesterov=true needs a momentum and no dampening, got momentum=0 and dampening=0; set",
    ),
    "window": (
        {"lr_scheduler_type": "greedy", "lr_scheduler_kwargs": {"min_lr": 1e-4, "max_lr": 0.5, "window_size": 0}},
        "trainer.lr_scheduler_kwargs.window_size=0 must be 1 or more",
    ),
    "share": (
        {"optim": "rmsprop_bnb", "optim_args": {"alpha": 0}},
        "trainer.optim=rmsprop_bnb: trainer.optim_args.alpha=0 must be above 0 and below 1",
    ),
    "no schedule's": (
        {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"num_cycle": 1}},
        "trainer.lr_scheduler_kwargs.num_cycle is not an argument of any trainer.lr_scheduler_type (did you mean "
        "num_cycles?); leave it out, as trainer.lr_scheduler_type=constant takes none",
    ),
    "half a step": (
        {"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 1.5}},
        "trainer.lr_scheduler_kwargs.timescale must be a whole number, got 1.5",
    ),
    "another's argument": (
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_decay_steps": 0.5}},
        "trainer.lr_scheduler_kwargs.num_decay_steps is not an argument of trainer.lr_scheduler_type=cosine; it reads "
        "num_cycles; trainer.lr_scheduler_kwargs=null takes all out",
    ),
    "needed": (
        {"lr_scheduler_type": "warmup_stable_decay"},
        "trainer.lr_scheduler_type=warmup_stable_decay needs trainer.lr_scheduler_kwargs.num_decay_steps; set it",
    ),
    "one of two": (
        {"lr_scheduler_type": "cosine_with_min_lr"},
        "exactly one of trainer.lr_scheduler_kwargs.min_lr and min_lr_rate, and neither is set; set min_lr_rate to",
    ),
    "both of two": (
        {"lr_scheduler_type": "cosine_warmup_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4, "min_lr_rate": 0.1}},
        "and both are set",
    ),
    "shape": (
        {
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 1, "decay_type": "cos"},
        },
        "trainer.lr_scheduler_kwargs.decay_type must be one of linear, cosine, 1-sqrt, got 'cos'",
    ),
    "never measured": (
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_steps": None},
        "reduce_lr_on_plateau follows the held-out loss during training; set trainer.eval_steps",
    ),
    "limits of greedy": ({"lr_scheduler_type": "greedy"}, "greedy needs trainer.lr_scheduler_kwargs.min_lr; set it"),
    "above the rate": (
        {"lr_scheduler_type": "polynomial", "learning_rate": 1e-8},
        "trainer.lr_scheduler_kwargs.lr_end=1e-07 must lie between 0 and trainer.learning_rate=1e-08",
    ),
    "below the rate": (
        {"lr_scheduler_type": "greedy", "lr_scheduler_kwargs": {"min_lr": 1e-4, "max_lr": 1e-3}},
        "trainer.lr_scheduler_kwargs.max_lr=0.001 lies below trainer.learning_rate=0.01; raise it",
    ),
    "factor": (
        {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"factor": 2}},
        "trainer.lr_scheduler_kwargs.factor=2 must lie between 0 and 1",
    ),
    "negative": (
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": -1}},
        "trainer.lr_scheduler_kwargs.num_cycles=-1 must not be negative",
    ),
    "two schedules": (
        {"optim": "schedule_free_adamw", "lr_scheduler_type": "linear"},
        "schedule_free_adamw averages weights in place of a schedule, and trainer.lr_scheduler_type=linear; set "
        "trainer.lr_scheduler_type=constant",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_run_is_refused_when_the_config_is_read(kind: str) -> None:
    changes, sentence = REFUSED[kind]
    with pytest.raises(UserError) as error:
        settings(**changes)
    assert sentence in str(error.value)


OWN_BOUNDS = ("t_alpha", "t_beta3")
"""What bitsandbytes takes below zero, as counts of steps that turn the average around."""


@pytest.mark.parametrize(
    "name", [name for name in OPTIMIZERS if not (OPTIMIZERS[name].module or OPTIMIZERS[name].builder)]
)
def test_arguments_are_refused_where_the_library_refuses_them(name: str) -> None:
    if not OPTIMIZERS[name].arguments:
        assert not OPTIMIZERS[name].bounds
    for key, kind in OPTIMIZERS[name].arguments.items():
        for value in (True, False) if kind is bool else (-1, 0, 1, 2) if kind is int else (-0.1, 0.0, 0.5, 1.0, 1.5):
            assert_agrees(name, {key: value})
    if "nesterov" in OPTIMIZERS[name].arguments:
        for momentum in (0.0, 0.5):
            for dampening in (-0.1, 0.0, 0.1):
                assert_agrees(name, {"nesterov": True, "momentum": momentum, "dampening": dampening})


def assert_agrees(name: str, given: dict[str, Any]) -> None:
    """Compares our check of the arguments of an optimizer with what happens where the library builds it."""
    text = write_arguments(given)
    arguments = transformers.TrainingArguments(optim=name, optim_args=text, use_cpu=True, report_to=[])
    kind, keys = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments)
    if "rmsprop_bnb" in name:  # which transformers hands texts
        keys |= read_arguments(name, text)
    try:
        kind([torch.nn.Parameter(torch.zeros(2))], **keys)
        is_refused = False
    except (ValueError, NotImplementedError):
        is_refused = True
    try:
        check_optimizer(name, given, "linear")
        is_ours = False
    except UserError:
        is_ours = True
    assert is_ours == is_refused or (is_ours and set(given) <= set(OWN_BOUNDS)), (name, given, is_ours, is_refused)


@pytest.mark.full
def test_the_arguments_of_a_recipe_are_taken_out_by_null_and_by_an_empty_mapping() -> None:
    assert compose(["trainer.lr_scheduler_type=constant"]).trainer.lr_scheduler_kwargs == {}
    left = {"num_decay_steps": 0.2, "decay_type": "1-sqrt"}
    assert settings(lr_scheduler_type="constant", lr_scheduler_kwargs=left).lr_scheduler_kwargs == {}
    for nothing in ("null", "{}"):
        trainer = compose(["trainer.lr_scheduler_type=linear", f"trainer.lr_scheduler_kwargs={nothing}"]).trainer
        assert trainer.lr_scheduler_kwargs == {}
    chosen = ["trainer.optim=sgd", "trainer.optim_args.momentum=0.9", "trainer.optim_args={nesterov: true}"]
    assert compose(chosen).trainer.optim_args == {"momentum": 0.9, "nesterov": True}
    assert replace(compose(chosen).trainer, optim_args=None).optim_args == {}


def test_the_manual_names_every_optimizer_and_schedule_with_its_arguments() -> None:
    text = (Path(__file__).parents[2] / "docs/run.md").read_text(encoding="utf-8")
    rows = [row.split("|")[1:3] for row in text.splitlines() if row.startswith("| `")]
    for name, table in {**OPTIMIZERS, **SCHEDULES}.items():
        [arguments] = [second for first, second in rows if f"`{name}`" in first]
        assert re.findall(r"`(\w+)`", arguments) == list(table.arguments)
    prose = text.replace("all `..._layerwise` ones", " ".join(f"`{name}`" for name in LEFT_OUT if "layerwise" in name))
    assert all(f"`{name}`" in prose for name in LEFT_OUT)
