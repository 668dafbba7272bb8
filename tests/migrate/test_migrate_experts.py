"""What other tools say of experts and routers becomes our keys, or a sentence that says what is lost."""

from __future__ import annotations

from typing import Any

import pytest

from qlora.config.compose import compose
from qlora.migrate.axolotl import AXOLOTL
from qlora.migrate.llama_factory import FACTORY
from qlora.migrate.ms_swift import SWIFT
from qlora.migrate.translation import Dialect, translate
from qlora.migrate.trl import TRL

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTED: list[tuple[Dialect, dict[str, Any], str]] = [
    (AXOLOTL, {"base_model": "openai/gpt-oss-20b", "adapter": "lora", "lora_r": 4, "lora_alpha": 8,
               "lora_target_modules": ["q_proj"]}, "lora_target_parameters"),
    (TRL, {"model_name_or_path": "openai/gpt-oss-20b", "use_peft": True, "lora_r": 4,
           "lora_target_modules": ["q_proj"]}, "lora_target_parameters"),
    (SWIFT, {"model": "openai/gpt-oss-20b", "tuner_type": "lora", "lora_rank": 4,
             "target_modules": ["q_proj"]}, "target_parameters"),
]  # fmt: skip
IDS = [dialect.name for dialect, _, _ in ADAPTED]


def read(dialect: Dialect, given: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    reading = translate(dialect, given)
    return reading.overrides, {key: why for key, _, why in reading.lost}


@pytest.mark.parametrize(("dialect", "given", "key"), ADAPTED, ids=IDS)
def test_parameters_of_experts_become_adapters_of_the_same_rank(
    dialect: Dialect, given: dict[str, Any], key: str
) -> None:
    overrides, lost = read(dialect, {**given, key: [*BOTH, "mlp.router.weight"]})
    assert key not in lost
    lora = compose([word for word in overrides if word.startswith("lora")]).lora
    assert (lora.experts.value, lora.r, lora.expert_r, lora.router) == ("all", 4, 4, True)
    plain, _ = read(dialect, given)
    assert not [word for word in plain if "expert" in word or "router" in word]


@pytest.mark.parametrize(("dialect", "given", "key"), ADAPTED, ids=IDS)
@pytest.mark.parametrize(
    ("named", "reason"),
    [
        (["mlp.experts.down_proj"], "it names down_proj of the experts alone: here all matrices of an expert get"),
        (
            ["model.layers.7.mlp.experts.gate_up_proj"],
            "model.layers.7.mlp.experts.gate_up_proj: there are adapters",
        ),
        ([*BOTH, "conv1d.weight"], "conv1d.weight: there are adapters on linear layers, on the experts of all layers"),
    ],
)
def test_what_has_no_counterpart_is_named(
    dialect: Dialect, given: dict[str, Any], key: str, named: list[str], reason: str
) -> None:
    overrides, lost = read(dialect, {**given, key: named})
    assert lost[key].startswith(reason)
    assert ("lora.experts=all" in overrides) is (len(named) == 3)


@pytest.mark.parametrize(
    ("dialect", "key", "value", "is_lost"),
    [
        (FACTORY, "moe_aux_loss_coef", 0.01, True),
        (FACTORY, "moe_aux_loss_coef", 0, False),
        (SWIFT, "router_aux_loss_coef", 0.01, True),
        (TRL, "router_aux_loss_coef", 0.02, True),
        (TRL, "router_aux_loss_coef", 0.001, False),
    ],
)
def test_a_loss_that_balances_experts_is_lost_where_it_has_a_weight(
    dialect: Dialect, key: str, value: float, is_lost: bool
) -> None:
    _, lost = read(dialect, {dialect.model_key: "Qwen/Qwen3-30B-A3B", key: value})
    assert (key in lost) is is_lost
    assert not is_lost or lost[key] == "no loss balances experts here: that of the routers is logged and not trained"


def test_axolotl_says_whether_experts_are_quantized() -> None:
    for value, ours in ((True, "same"), (False, "none")):
        overrides, lost = read(AXOLOTL, {"base_model": "Qwen/Qwen3-30B-A3B", "quantize_moe_experts": value})
        assert f"quantization.experts={ours}" in overrides
        assert "quantize_moe_experts" not in lost
