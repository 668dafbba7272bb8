"""Which layers get adapters, with which ranks: what is asked for is built, planned, saved and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qlora import adapters
from qlora.adapters.adapted import split_adapter
from qlora.config.compose import compose
from qlora.errors import UserError
from qlora.models.tokenizer import load_tokenizer
from qlora.planning.memory_plan import Ledger
from qlora.planning.training_plan import find_shape, read_setup
from qlora.quantization.placement import find_placement
from qlora.runtime.device import find_device
from tests.adapters.test_adapters import attach, load
from tests.adapters.test_merge import merger
from tests.training.test_optimizers import check_exact, settings

CHOSEN = ["lora.layers=[1]", "lora.exclude=[down_proj]", "lora.rank_pattern={q_proj: 2, .*mlp.up_proj: 8}",
          "lora.alpha_pattern={up_proj: 3}"]  # fmt: skip


def planned(folder: Path, *overrides: str) -> list[int]:
    config = compose(
        [f"model.name={folder}", "model.tokenizer=tiny", "recipe=none", "lora.r=4", "lora.dropout=0", *overrides]
    )
    shape = find_shape(config)
    return sorted(Ledger(shape, read_setup(config, shape)).trained.elements())


def trained(model: torch.nn.Module) -> list[int]:
    return sorted(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 35)[None]).logits


def move(model: torch.nn.Module) -> None:
    """Trains an adapter a little, in the dark."""
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)


def save(model: PeftModel, folder: Path) -> Path:
    tokenizer = load_tokenizer(compose(["model.tokenizer=tiny"]).model)
    adapters.save_adapter(model, folder, tokenizer=tokenizer)
    return folder


@pytest.mark.parametrize(
    "overrides", [CHOSEN, ["lora.freeze_a=true"], [*CHOSEN, "lora.freeze_a=true", "lora=dora"]], ids=str
)
def test_the_plan_counts_what_is_built(base_folder: Path, overrides: list[str]) -> None:
    config, base = load(base_folder, "quantization=nf4", *overrides)
    assert trained(attach(config, base, base_folder)) == planned(base_folder, *overrides)


def test_layers_and_ranks_are_those_asked_for(base_folder: Path) -> None:
    config, base = load(base_folder, "quantization=nf4", *CHOSEN)
    model = attach(config, base, base_folder)
    ranks = {name.split("layers.")[1]: (module.r["default"], module.scaling["default"])
             for name, module in model.named_modules() if hasattr(module, "lora_A")}  # fmt: skip
    assert set(ranks) == {f"1.{kind}" for kind in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                                                   "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")}  # fmt: skip
    assert ranks["1.self_attn.q_proj"] == (2, config.lora.alpha / 2)
    assert ranks["1.mlp.up_proj"] == (8, 3 / 8)
    assert ranks["1.mlp.gate_proj"] == (4, config.lora.alpha / 4)


@pytest.mark.parametrize("overrides", [CHOSEN, [*CHOSEN, "lora=pissa"], ["lora.freeze_a=true"]], ids=str)
def test_plain_peft_and_merging_give_the_same_logits(tmp_path: Path, base_folder: Path, overrides: list[str]) -> None:
    check_reloaded_and_merged(tmp_path, base_folder, *overrides)


def check_reloaded_and_merged(folder: Path, base_folder: Path, *overrides: str) -> None:
    """Compares a model with an adapter with plain PEFT and with a merge, by their logits."""
    config, base = load(base_folder, "quantization=fp32", *overrides)
    model = attach(config, base, base_folder)
    initial = folder / "initial" if "lora=pissa" in overrides else None
    if initial is not None:
        adapters.save_initial_adapter(model, initial)
    move(model)
    expected = logits(model)
    adapters.save_adapter(model, folder / "adapter", tokenizer=load_tokenizer(config.model), initial=initial)
    plain = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(plain, str(folder / "adapter"))
    torch.testing.assert_close(logits(loaded), expected, atol=2e-5, rtol=1e-4)
    placement = find_placement(config.quantization, find_device(config.device))
    made = merger(base_folder, split_adapter(loaded), placement)
    merged = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    merged.load_state_dict({name: made.tensor(part) for name, part in made.parts.items()}, strict=False)
    torch.testing.assert_close(logits(merged), expected, atol=2e-5, rtol=1e-4)


def test_frozen_a_matrices_stay_and_resume_is_exact(tmp_path: Path) -> None:
    lora = compose(["lora.freeze_a=true", "lora.r=2", "lora.dropout=0"]).lora

    def adapt(model: Any) -> Any:
        return adapters.add_lora(lora, model, tensors=dict, new_token_ids=[], batches=[])

    trainer = check_exact(tmp_path, settings(), adapt=adapt)
    assert not any(".lora_A." in name for name, weight in trainer.model.named_parameters() if weight.requires_grad)
    assert not any(weight.grad is not None for name, weight in trainer.model.named_parameters() if ".lora_A." in name)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("lora.layers=[2]", r"^lora.layers \[2\]: the model has 2 decoder layers, 0 to 1; name some of them"),
        ("lora.exclude=[q_prj]", r"^lora.exclude \['q_prj'\] matches no layer with an adapter .did you mean q_proj"),
        ("lora.rank_pattern={lm_head: 2}", r"^lora.rank_pattern \['lm_head'\] matches no layer with an adapter"),
        ("lora.exclude=['[']", r"^lora.exclude: '\[' is not a regular expression"),
    ],
)
def test_what_matches_nothing_stops_the_run_and_the_plan(base_folder: Path, override: str, sentence: str) -> None:
    config, base = load(base_folder, "quantization=fp32", override)
    with pytest.raises(UserError, match=sentence):
        attach(config, base, base_folder)
    with pytest.raises(UserError, match=sentence):
        planned(base_folder, override)


def test_no_layer_has_two_ranks(base_folder: Path) -> None:
    config, base = load(base_folder, "quantization=fp32", "lora.rank_pattern={q_proj: 2, .*self_attn.*: 3}")
    with pytest.raises(UserError, match=r"both match model.layers.0.self_attn.q_proj; make them match different"):
        attach(config, base, base_folder)
    with pytest.raises(UserError, match="both match"):
        planned(base_folder, "lora.rank_pattern={q_proj: 2, .*self_attn.*: 3}")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["lora.layers=[]"], "^lora.layers must be numbers of decoder layers, from 0, got"),
        (["lora.layers=[a]"], "^lora.layers must be numbers of decoder layers"),
        (["lora.exclude={a: 1}"], "^lora.exclude must be a text or a list of texts"),
        (["lora.rank_pattern={q_proj: 0}"], "^lora.rank_pattern must be a mapping from module names to ranks"),
        (["lora.alpha_pattern={q_proj: x}"], "^lora.alpha_pattern must be a mapping from module names to positive"),
        (["lora.rank_pattern={q_proj: 2}", "lora=eva"], "lora.init=eva exclude each other: EVA chooses ranks"),
        (["lora.freeze_a=true", "lora=loraplus"], "^lora.freeze_a=true trains B alone, and lora.loraplus_lr_ratio"),
        (["lora.freeze_a=true", "trainer.keep=average", "trainer.save_steps=5"], "keep=average and lora.freeze_a=true"),
        (["lora.layers=[0]", "lora.experts=all"], r"^lora.experts=all: lora.layers=\[0\] is for linear layers"),
        (["lora.kind=verra"], "^lora.kind=verra is unknown"),
        (["lora.options={a: 1}"], "^lora.options is not read by lora.kind=lora; leave it out"),
    ],
)
def test_what_cannot_be_is_refused_when_the_config_is_composed(overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        compose(overrides)
