"""`lora.experts` and the keys beside it: what excludes what, said while the config is composed."""

from __future__ import annotations

import pytest

from qlora.config.compose import compose
from qlora.config.saved_config import config_to_dict
from qlora.errors import ConfigError
from qlora.runtime.run_folder import config_digest


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["lora.experts=all", "lora.use_dora=true"],
            "lora.experts=all: lora.use_dora=true is defined for linear layers, and experts are one tensor a layer; "
            "set lora.experts=shared or none, or leave lora.use_dora out",
        ),
        (
            ["lora.experts=all", "lora.bias=all"],
            "lora.experts=all: lora.bias=all trains biases of linear layers, and experts are one tensor a layer; set "
            "lora.experts=shared or none, or leave lora.bias out",
        ),
        (
            ["lora.router=true", "lora.init=eva"],
            "lora.router=true: lora.init=eva is defined for linear layers, and experts are one tensor a layer; leave "
            "lora.router out, or leave lora.init out",
        ),
        (
            ["lora.experts=none", "lora.expert_r=4"],
            "lora.expert_r=4 is the rank of adapters on routed experts, and lora.experts=none adapts none of them; set "
            "lora.experts=all, or leave lora.expert_r out",
        ),
        (
            ["lora.experts=shared", "lora.per_expert=true"],
            "lora.per_expert=true names the adapters of routed experts, and lora.experts=shared adapts none of them; "
            "set lora.experts=all, or leave lora.per_expert out",
        ),
        (
            ["lora.router=true", "lora.per_expert=true"],
            "lora.per_expert=true is for servers, and these read no adapters on routers (lora.router=true); leave one "
            "of them out",
        ),
        (
            ["lora=none", "quantization=fp32", "lora.experts=all"],
            "lora.experts=all asks for an adapter, and lora=none trains all weights; leave one of them out",
        ),
    ],
)
def test_keys_that_exclude_each_other_are_refused_in_one_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose(overrides)
    assert str(error.value) == sentence


def test_a_rank_of_experts_must_be_positive() -> None:
    with pytest.raises(ConfigError, match=r"lora.expert_r must be positive, or null for r over the experts of a token"):
        compose(["lora.expert_r=0"])


def test_a_config_from_before_these_keys_has_the_same_digest() -> None:
    config = config_to_dict(compose([]))
    former = {**config, "lora": {key: value for key, value in config["lora"].items()
                                 if key not in ("experts", "expert_r", "router", "per_expert")}}  # fmt: skip
    assert config_digest(config) == config_digest(former)
