"""`lora.parameters`: the rank or block that trains as many parameters as are asked for, and no more."""

from __future__ import annotations

import pytest

from qlora.config.compose import compose
from qlora.config.schema import Config
from qlora.errors import UserError
from qlora.planning.memory_plan import Ledger
from qlora.planning.training_plan import find_shape, read_setup
from qlora.tasks.lora_start import with_start

LIMIT = 70_000


def sized(*overrides: str) -> tuple[Config, int]:
    config = with_start(compose([f"lora.parameters={LIMIT}", *overrides]), [f"lora.parameters={LIMIT}", *overrides])
    shape = find_shape(config)
    return config, Ledger(shape, read_setup(config, shape)).trained_count


@pytest.mark.parametrize("choice", ["all-linear", "rslora", "dora", "lora-fa", "vera", "oft"])
def test_the_largest_adapter_that_keeps_to_the_number_is_taken(choice: str) -> None:
    _, count = sized(f"lora={choice}")
    assert 0.87 * LIMIT < count <= LIMIT


def test_alpha_keeps_its_proportion_to_the_rank() -> None:
    config, _ = sized("lora.r=8", "lora.alpha=24")
    assert (config.lora.r, config.lora.alpha, config.lora.parameters) == (4, 12, None)
    config, _ = sized("lora=oft")
    assert config.lora.options == {"oft_block_size": 16}


def test_fewer_layers_get_larger_adapters() -> None:
    assert sized("lora.layers=[0]")[0].lora.r > 4 * sized()[0].lora.r - 1


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["lora.parameters=0"], r"^lora.parameters must be positive, or null for lora.r as it stands, got 0"),
        (["lora.parameters=9", "lora=none"], r"^lora.parameters=9 and lora=none exclude each other: all weights train"),
        (
            ["lora.parameters=9", "lora=ia3"],
            r"^lora.parameters=9 and lora.kind=ia3 exclude each other: nothing decides",
        ),
        (["lora.parameters=9", "lora.start=a"], r"^lora.parameters=9 and lora.start exclude each other: that adapter"),
        (
            ["lora.parameters=9", "lora.rank_pattern={q_proj: 2}"],
            r"lora.rank_pattern exclude each other: it sets ranks",
        ),
        (["lora.parameters=9", "lora.bias=all"], r"lora.bias=all exclude each other: biases are not counted"),
        (["lora.parameters=9"], r"^lora.parameters=9: the smallest adapter of this choice trains 17,408 parameters"),
        (
            ["lora.parameters=9", "lora=oft"],
            r"^lora.parameters=9: the smallest adapter of this choice trains 4,096 par",
        ),
    ],
    ids=str,
)
def test_a_number_that_nothing_can_keep_to_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        with_start(compose(overrides))
