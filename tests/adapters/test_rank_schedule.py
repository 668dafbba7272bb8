"""AdaLoRA's schedule: the ranks it ends with, its penalty, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qlora import adapters
from qlora.adapters.rank_schedule import RankSchedule
from qlora.config.compose import compose
from qlora.errors import UserError
from tests.training.test_optimizers import build, settings

CHOSEN = ["lora=adalora", "lora.r=2", "lora.alpha=2", "lora.dropout=0"]


def adalora(*overrides: str) -> tuple[Any, Any]:
    lora = compose([*CHOSEN, *overrides]).lora

    def adapt(model: Any) -> Any:
        return adapters.add_lora(lora, model, tensors=dict, new_token_ids=[], batches=[])

    return adapt, lambda model: adapters.build_rank_schedule(lora, model)


def test_the_layers_end_with_the_rank_that_was_asked_for_on_average(tmp_path: Path) -> None:
    adapt, ranks = adalora("lora.options={init_r: 4, tfinal: 2}")
    trainer = build(tmp_path, settings(max_steps=8, save_steps=8), adapt=adapt, ranks=ranks)
    trainer.run(None)
    values = [value for name, value in trainer.model.named_parameters() if ".lora_E." in name]
    assert len(values) == 7
    assert sum(int(value.count_nonzero()) for value in values) == 7 * 2
    assert all(len(value) == 4 for value in values)
    config = trainer.model.peft_config["default"]
    assert (config.total_step, config.tinit, config.tfinal, config.rank_pattern) == (8, 1, 2, None)


def test_the_penalty_has_the_gradient_of_peft_s() -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    adapt, ranks = adalora()
    model = adapt(LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2)))
    schedule: RankSchedule = ranks(model)
    ids = torch.arange(3, 20)[None]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model(input_ids=ids, labels=ids).loss.backward()
    schedule.penalise(1.0)
    ours = [parameter.grad.clone() for parameter in trained]
    model.zero_grad()
    del model.base_model.forward  # PEFT's own adds the penalty to the loss
    model(input_ids=ids, labels=ids).loss.backward()
    for gradient, parameter in zip(ours, trained, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_phases_that_leave_no_step_stop_the_run(tmp_path: Path) -> None:
    adapt, ranks = adalora("lora.options={tinit: 3, tfinal: 1}")
    trainer = build(tmp_path, settings(), adapt=adapt, ranks=ranks)
    with pytest.raises(
        UserError, match=r"^lora.options.tinit=3 and tfinal=1 leave none of the 4 steps to choose ranks"
    ):
        trainer.run(None)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["lora.options={init_r: 2}"], r"^lora.options.init_r=2 must be above lora.r=2, the rank that the layers have"),
        (["lora.options={deltaT: 0}"], r"^lora.options.deltaT must be at least 1"),
        (["lora.options={beta1: 1.0}"], r"^lora.options.beta1 and beta2 must lie between 0 and 1"),
        (
            ["recipe=none", "trainer.lr_scheduler_type=constant", "trainer.optim=schedule_free_adamw"],
            r"optim=schedule_free_adamw exclude each other: it averages weights",
        ),
        (["lora.options={init_r: x}"], r"^lora.options.init_r must be a whole number, got x"),
    ],
)
def test_values_that_mean_nothing_are_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        compose([*CHOSEN, *overrides])
