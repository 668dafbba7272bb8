"""The parts of the plan that mixtures of experts add, against real modules."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from real_models import BF16, GROUPED, SIZES, composed, saved_bytes, setup
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qlora import adapters
from qlora.config.compose import compose
from qlora.config.options import model_presets
from qlora.config.schema import PlanStep, described_settings
from qlora.errors import ConfigError, DataError
from qlora.experts.host import experts_on_host, is_waiting
from qlora.experts.layout import find_experts
from qlora.experts.waiting import ROOM
from qlora.models import loading
from qlora.models.random_weights import RandomWeights
from qlora.planning.memory_plan import Ledger
from qlora.planning.mixture import MIXTURES
from qlora.planning.model_shape import Shape
from qlora.planning.read_shape import read_shape
from qlora.planning.training_plan import Plan, build_plan, find_shape, read_setup
from qlora.planning.waiting_experts import RunOnGpu, waiting_for_run
from qlora.quantization.method import find_method
from qlora.quantization.stored_base import StoredBase
from qlora.tasks.plan import _describe_experts, _describe_shape
from tests.experts.test_host import SlowCopies

FEW = GROUPED | {"num_experts_per_tok": 2}
DEEPSEEK = SIZES | {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
}
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": FEW | {"num_experts": 8, "moe_intermediate_size": 48, "head_dim": 32, "mlp_only_layers": [1]},
    "qwen2_moe": FEW
    | {"num_experts": 8, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80, "mlp_only_layers": [1]},
    "mixtral": FEW | {"num_local_experts": 4},
    "gpt_oss": FEW | {"num_local_experts": 4, "head_dim": 32},
    "granitemoe": FEW | {"num_local_experts": 4, "tie_word_embeddings": True},
    "olmoe": FEW | {"num_experts": 4},
    "deepseek_v2": DEEPSEEK | {"q_lora_rank": 0},
    "deepseek_v3": DEEPSEEK | {"q_lora_rank": 24, "n_group": 2, "topk_group": 1},
}
QUANTIZED = ["nf4", "nf4-plain", "fp4"]
ADAPTED = ("gate_up_proj", "down_proj")


def shape(kind: str, **sizes: Any) -> Shape:
    return read_shape({"model_type": kind, **KINDS[kind], **sizes}, "test")


def settings(kind: str, **sizes: Any) -> Any:
    values = {**KINDS[kind], **sizes}
    if values.get("q_lora_rank") == 0:
        values["q_lora_rank"] = None
    return AutoConfig.for_model(kind, bos_token_id=1, eos_token_id=2, pad_token_id=0, **values)


def base(kind: str, *overrides: str, **sizes: Any) -> PreTrainedModel:
    config = composed(*overrides)
    weights = RandomWeights(settings(kind, **sizes), placement=BF16, seed=0)
    return loading.build_random_base(config.model, config.quantization, weights)


def adapted(kind: str, *overrides: str, **sizes: Any) -> Any:
    """A base with adapters of rank 8 on all linear layers, and of rank 4 on experts."""
    overrides = ("lora.r=8", "lora.expert_r=4", "lora.dropout=0", *overrides)
    config = composed(*overrides)
    model = adapters.add_lora(config.lora, base(kind, *overrides, **sizes), tensors=list, new_token_ids=[], batches=[])
    model.config.use_cache = False
    return model.train()


@pytest.mark.parametrize("kind", KINDS)
def test_the_parameters_of_a_mixture_are_counted_to_the_last(kind: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings(kind))
    sizes = shape(kind)
    assert sizes.parameters == sum(parameter.numel() for parameter in model.parameters())
    experts = find_experts(model)
    assert sizes.experts is not None
    assert {int(name.split(".")[2]) for name in experts} == sizes.experts.layers
    idle = sum(
        getattr(module, name).numel() * (1 - 2 / sizes.experts.count) for module in experts.values() for name in ADAPTED
    )
    assert sizes.active_parameters == sizes.parameters - idle


PRESETS = [name for name, preset in model_presets().items() if preset["architecture"]["model_type"] in MIXTURES]


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_of_mixtures_are_counted_to_the_last(name: str) -> None:
    preset = described_settings(model_presets()[name]["architecture"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**preset))
    assert read_shape(preset, name).parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("kind", MIXTURES)
def test_what_a_config_leaves_out_is_transformers_default(kind: str) -> None:
    defaults = AutoConfig.for_model(kind)
    for name, value in MIXTURES[kind].defaults.items():
        assert getattr(defaults, name) == value, name


@pytest.mark.matrix(8)
@pytest.mark.parametrize("chosen", QUANTIZED)
@pytest.mark.parametrize("kind", KINDS)
def test_experts_take_what_is_planned(kind: str, chosen: str) -> None:
    model, sizes = base(kind, f"quantization={chosen}"), shape(kind)
    held = sum(buffer.nbytes for module in find_experts(model).values() for buffer in module.quantized.buffers())
    quantization = compose([f"quantization={chosen}"]).quantization
    ledger = Ledger(sizes, setup(sizes, base=find_method(quantization).stored_base(quantization)))
    assert ledger.experts == held
    placed = {id(getattr(module, name)) for module in find_experts(model).values() for name in ADAPTED}
    plain = [
        parameter
        for parameter in model.parameters()
        if id(parameter) not in placed and parameter.dtype is not torch.uint8
    ]
    assert ledger.unquantized == sum(2 * parameter.numel() for parameter in plain)


@pytest.mark.parametrize("chosen", ["quantization=none", "quantization.experts=none"])
def test_experts_that_are_not_quantized_take_16_bits(chosen: str) -> None:
    model, sizes = base("qwen3_moe", chosen), shape("qwen3_moe")
    quantization = compose([chosen]).quantization
    ledger = Ledger(sizes, setup(sizes, base=find_method(quantization).stored_base(quantization)))
    held = sum(getattr(module, name).nbytes for module in find_experts(model).values() for name in ADAPTED)
    assert ledger.experts == held


@pytest.mark.matrix(7)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overrides", [[], ["lora.dtype=bf16"]], ids=str)
def test_adapters_on_experts_are_counted(kind: str, overrides: list[str]) -> None:
    model, sizes = adapted(kind, *overrides), shape(kind)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ledger = Ledger(sizes, setup(sizes, expert_r=4, bf16_adapters=bool(overrides)))
    assert ledger.adapters == ledger.gradients == sum(parameter.nbytes for parameter in trained)
    assert sorted(ledger.trained.elements()) == sorted(parameter.numel() for parameter in trained)


@pytest.mark.matrix(8)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("overrides", "changes"),
    [([], {}), (["lora.dropout=0.1"], {"dropout": True}), (["lora.dtype=bf16"], {"bf16_adapters": True})],
    ids=["nf4", "dropout", "bf16 adapters"],
)
def test_a_layer_with_experts_keeps_what_is_planned(
    kind: str, overrides: list[str], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, length = shape(kind), 128
    ledger = Ledger(sizes, setup(sizes, length=length, expert_r=4, **changes))
    models = (adapted(kind, *overrides, num_hidden_layers=count) for count in (3, 2))
    three, two = (saved_bytes(model, monkeypatch, 1, length) for model in models)
    order = 3 * 8 * ledger.activations.routed.rows  # which is kept, and not by autograd
    planned = ledger.saved(2) + ledger.activations.copies(2, ledger.targets[2]) - order
    assert planned == pytest.approx(three - two, rel=0.02)


def test_the_fast_step_keeps_no_matrix_of_scores_for_the_sake_of_sinks() -> None:
    sizes = shape("gpt_oss")

    def kept(length: int, step: PlanStep) -> float:
        activations = Ledger(sizes, setup(sizes, length=length, step=step)).activations
        return activations.saved(0, frozenset()) / length

    assert kept(2048, PlanStep.fast) == pytest.approx(kept(512, PlanStep.fast), rel=1e-3)
    assert kept(2048, PlanStep.plain) == pytest.approx(kept(512, PlanStep.plain) + 1536 * sizes.heads * 2, rel=1e-3)


def test_a_mixture_with_code_of_its_own_is_not_planned() -> None:
    llama4 = {"model_type": "llama4_text", **SIZES, "num_local_experts": 4, "intermediate_size_mlp": 96}
    with pytest.raises(DataError, match="test: llama4_text computes its experts by code of its own, which task=plan"):
        read_shape(llama4, "test")
    with pytest.raises(DataError, match="test: num_experts_per_tok is missing, so the model's size is unknown"):
        shape("deepseek_v2", num_experts_per_tok=None)


def test_the_default_plan_of_a_mixture_is_said_with_its_active_parameters() -> None:
    sizes = find_shape(compose(["model=qwen3-30b-a3b"]))
    assert _describe_experts(sizes) == ", 3.35 billion of them for each token (8 of 128 experts)"
    written = json.dumps(_describe_shape(sizes))
    assert '"active_parameters": 3353032704' in written


def test_experts_of_a_dense_model_are_refused_before_anything_is_loaded() -> None:
    config = compose(["model=llama-7b", "lora.experts=all"])
    with pytest.raises(ConfigError, match=r"lora\.experts=all: this llama is dense: it has no experts; leave"):
        read_setup(config, find_shape(config))


@pytest.mark.parametrize(
    ("overrides", "rank"),
    [([], 8), (["lora.expert_r=3"], 3), (["lora.experts=none"], 0), (["lora=attention"], 0), (["lora=dora"], 0)],
)
def test_the_rank_on_experts_is_the_one_that_training_chooses(overrides: list[str], rank: int) -> None:
    config = compose(["model=qwen3-30b-a3b", "lora.r=64", *overrides])
    assert read_setup(config, find_shape(config)).expert_r == rank


def planned(*overrides: str) -> Plan:
    return build_plan(compose(["model=qwen3-30b-a3b", "lora.r=8", "data.max_length=256", *overrides]))


@pytest.mark.parametrize("compute", ["native", "fp8"])
def test_decoded_experts_are_kept_where_memory_is_free(compute: str) -> None:
    auto, quantization = "trainer.memory_budget=auto", f"quantization.compute={compute}"
    free = planned("plan.device=h200", auto, quantization)
    assert (free.setup.checkpointed, free.setup.kept) == (0, 48)
    # 58 GB: in 16 bits once, in 8 bits twice, for the backward pass reads them turned.
    assert free.memory.parts["decoded experts"] == 48 * 128 * 3 * 768 * 2048 * 2
    some = planned("plan.device=a100-80gb", auto, quantization)
    assert 0 < some.setup.kept < 48
    assert some.memory.comfortable <= some.gpu.memory < some.memory.comfortable + 1.3e9
    assert some.speed.seconds > 0  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "overrides", [[], ["trainer.memory_budget=20GB"], ["trainer.memory_budget=auto", "quantization.experts=none"],
                  ["trainer.memory_budget=auto", "trainer.fused_experts=false"]], ids=str
)  # fmt: skip
def test_decoded_experts_are_not_kept_without_room_or_quantized_weights_or_the_fast_step(overrides: list[str]) -> None:
    plan = planned("plan.device=h200", *overrides)
    assert plan.setup.kept == 0
    assert not plan.memory.parts["decoded experts"]


def test_the_experts_that_do_not_fit_wait_on_the_host_as_few_as_must() -> None:
    plan = planned("plan.device=rtx-4090", "trainer.memory_budget=12GB")
    waiting = plan.setup.waiting
    assert ROOM < waiting < 48
    assert plan.fits
    fewer = replace(plan.training, setup=replace(plan.setup, waiting=waiting - 1)).memory
    assert fewer.needed > plan.gpu.memory  # with all layers checkpointed and their inputs on the host
    layer = plan.memory.parts["experts"] / (48 - waiting + ROOM)
    assert plan.memory.host == pytest.approx(waiting * layer, rel=0.35)
    assert plan.memory.host > waiting * layer
    plain = planned("plan.device=rtx-4090", "trainer.memory_budget=12GB", "quantization.experts_offload=none")
    assert (plain.setup.waiting, plain.memory.host, plain.fits) == (0, 0, False)
    assert plain.changes[0].overrides == "quantization.experts_offload=auto"
    assert plain.changes[0].fits
    assert planned("plan.device=rtx-4090", "trainer.memory_budget=23GB").setup.waiting == 0
    every = planned("plan.device=h200", "quantization.experts_offload=all")
    assert every.memory.parts["experts"] == pytest.approx(ROOM * layer)
    assert every.speed is not None
    assert every.speed.bound == "copying experts"  # of one row of 256 tokens


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_experts_that_wait_take_what_is_planned(kind: str) -> None:
    with experts_on_host(None, SlowCopies()):
        model = base(kind, num_hidden_layers=5)
    sizes = shape(kind, num_hidden_layers=5)
    assert sizes.experts is not None
    waiting = len(sizes.experts.layers)
    ledger = Ledger(sizes, setup(sizes, base=_base_in("quantization=nf4"), waiting=waiting))
    buffers = [buffer for module in find_experts(model).values() for buffer in module.quantized.buffers()]
    moved = [buffer.nbytes for buffer in buffers if is_waiting(buffer)]
    # Codebooks, offsets and the scales of scales stay with each layer.
    assert ledger.experts == pytest.approx(sum(b.nbytes for b in buffers) * ROOM / waiting)
    assert sum(moved) <= ledger.on_host < 2 * sum(buffer.nbytes for buffer in buffers)


def _base_in(chosen: str) -> StoredBase:
    quantization = compose([chosen]).quantization
    return find_method(quantization).stored_base(quantization)


def test_a_run_has_experts_wait_as_its_free_memory_asks() -> None:
    preset = described_settings(model_presets()["qwen3-30b-a3b"]["architecture"])

    def waiting(
        free: float, *overrides: str, longest_row: int | None = 2048, settings: dict[str, Any] = preset
    ) -> int | None:
        config = compose(["model=qwen3-30b-a3b", "lora.r=8", *overrides])
        run = RunOnGpu(
            "cuda", is_spread=False, settings=lambda: settings, free=lambda: free, longest_row=lambda: longest_row
        )
        return waiting_for_run(config, run)

    some, every = range(ROOM + 1, 48), 48
    assert waiting(80e9) == 0
    assert waiting(18e9) in some
    assert waiting(80e9, "trainer.memory_budget=16GB") in some
    assert waiting(12e9, longest_row=None) in some
    assert waiting(24e9, longest_row=None) == 0
    assert waiting(4e9) == every
    assert waiting(4e9, "quantization.experts_offload=none") == 0
    assert waiting(80e9, "quantization.experts_offload=all") is None
    assert waiting(4e9, "quantization.experts=none") == 0
    assert waiting(4e9, settings={"model_type": "llama4_text"}) == 0
    assert waiting(4e9, "trainer.optim=adafactor") == every
