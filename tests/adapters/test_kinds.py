"""Adapters of other kinds than LoRA: what is planned, trained, saved, merged and resumed is what PEFT computes."""

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
from qlora.config.registries.adapter_kinds import KINDS
from qlora.config.schema.adapter_kind import describe_adapter
from qlora.errors import UserError
from qlora.planning.memory_plan import Ledger
from qlora.planning.training_plan import find_shape, read_setup
from qlora.quantization.placement import find_placement
from qlora.runtime.device import find_device
from qlora.tasks.lora_start import with_start
from tests.adapters.test_adapters import attach, load
from tests.adapters.test_choice import logits, move, planned, save, trained
from tests.adapters.test_merge import load as load_for_merge
from tests.adapters.test_merge import merger
from tests.training.test_optimizers import check_exact, settings

MORE: dict[str, list[list[str]]] = {
    "vera": [["lora.r=5", "lora.options={projection_prng_key: 3}"]],
    "oft": [["lora.options={oft_block_size: 24}"], ["lora.options={oft_block_size: 500, block_share: true}"],
        ["lora.options={use_cayley_neumann: false}"]],
    "adalora": [["lora.r=4", "lora.options={init_r: 9}"]],
    "ia3": [["lora.options={feedforward_modules: [o_proj]}"], ["lora.options={feedforward_modules: []}"]],
}  # fmt: skip
"""Settings of a kind with which it is planned and saved too."""
CASES = [[f"lora={kind}", *more] for kind in KINDS for more in ([], *MORE.get(kind, []))]


@pytest.mark.parametrize("quantization", ["nf4", "fp32"])
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_the_plan_counts_what_is_built(base_folder: Path, case: list[str], quantization: str) -> None:
    overrides = [f"quantization={quantization}", *case, "lora.exclude=[k_proj]"]
    config, base = load(base_folder, *overrides)
    plain = adapters.count_parameters(base).total
    model = attach(config, base, base_folder)
    assert trained(model) == planned(base_folder, *overrides)
    count = adapters.count_parameters(model)
    assert (count.base, count.trainable) == (plain, sum(trained(model)))
    shape = find_shape(config)
    frozen = sum(tensor.numel() for name, tensor in model.named_buffers() if name.endswith((".default",)))
    assert Ledger(shape, read_setup(config, shape)).frozen_adapters == frozen


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_plain_peft_and_merging_give_the_same_logits(tmp_path: Path, base_folder: Path, case: list[str]) -> None:
    config, base = load(base_folder, "quantization=fp32", *case)
    model = attach(config, base, base_folder)
    move(model)
    expected = logits(model)
    folder = save(model, tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    assert not torch.allclose(logits(plain), expected, atol=1e-3)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain, str(folder))), expected, atol=0, rtol=0)
    again = adapters.load_adapter(load(base_folder, "quantization=fp32")[1], folder, "base")
    torch.testing.assert_close(logits(again), expected, atol=0, rtol=0)
    placement = find_placement(config.quantization, find_device(config.device))
    made = merger(base_folder, split_adapter(again), placement)
    merged = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    merged.load_state_dict({name: made.tensor(part) for name, part in made.parts.items()}, strict=False)
    torch.testing.assert_close(logits(merged), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_into_4_bits_is_the_adapter_on_the_dequantized_base(base_folder: Path, kind: str) -> None:
    options = ["quantization=nf4", "quantization.compute_dtype=fp32"]
    config, base = load(base_folder, *options, f"lora={kind}")
    model = attach(config, base, base_folder)
    move(model)
    expected = logits(model)
    _, placement = load_for_merge(base_folder, *options)
    made = merger(base_folder, split_adapter(model), placement)
    merged = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    merged.load_state_dict({name: made.tensor(part) for name, part in made.parts.items()}, strict=False)
    torch.testing.assert_close(logits(merged), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_exactly(tmp_path: Path, kind: str) -> None:
    lora = compose([f"lora={kind}", "lora.r=2"]).lora

    def adapt(model: Any) -> Any:
        return adapters.add_lora(lora, model, tensors=dict, new_token_ids=[], batches=[])

    def ranks(model: Any) -> Any:
        return adapters.build_rank_schedule(lora, model)

    check_exact(tmp_path, settings(), adapt=adapt, ranks=ranks)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_learned_nothing_is_not_saved(tmp_path: Path, base_folder: Path, kind: str) -> None:
    config, base = load(base_folder, "quantization=fp32", f"lora={kind}")
    model = attach(config, base, base_folder)
    with pytest.raises(UserError, match=r"nothing was trained; raise trainer.learning_rate or trainer.max_steps"):
        save(model, tmp_path / "adapter")


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_answers_where_the_adapter_is_off(base_folder: Path, kind: str) -> None:
    config, base = load(base_folder, "quantization=fp32", f"lora={kind}")
    expected = logits(base)
    model = attach(config, base, base_folder)
    move(model)
    with adapters.adapter_off(model):
        torch.testing.assert_close(logits(model), expected, atol=0, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["lora.use_dora=true"], r"^lora.use_dora=true is LoRA's, and .* does not have it; leave one of them out"),
        (["lora.use_rslora=true"], r"^lora.use_rslora=true is LoRA's"),
        (["lora.init=pissa"], r"^lora.init=pissa is LoRA's"),
        (["lora.bias=all"], r"^lora.bias=all is LoRA's"),
        (["lora.dtype=bf16"], r"^lora.dtype=bf16 is LoRA's"),
        (["lora.freeze_a=true"], r"^lora.freeze_a=true is LoRA's"),
        (["lora.rank_pattern={q_proj: 2}"], r"^lora.rank_pattern=.* is LoRA's"),
        (["lora.loraplus_lr_ratio=4"], r"^lora.loraplus_lr_ratio=4.0 is LoRA's"),
        (["lora.start=outputs/runs/mine"], r"^lora.start=outputs/runs/mine is LoRA's"),
        (["lora.experts=all"], r"^lora.experts=all: lora.kind=\w+ is defined for linear layers, and experts are"),
        (["lora.router=true"], r"^lora.router=true is LoRA's"),
        (["lora.options={no_such: 1}"], r"^lora.options.no_such is not read by lora.kind=\w+; it takes "),
        (["model.new_tokens=['<a>']"], r"model.new_tokens exclude each other: their rows are trained beside LoRA"),
        (["trainer.keep=average", "trainer.save_steps=5"], r"trainer.keep=average exclude each other: only products"),
        (["trainer.memory_budget=auto"], r"trainer.memory_budget exclude each other: its formula counts LoRA"),
        (["trainer.optim=muon"], r"trainer.optim=muon exclude each other: it turns LoRA's matrices"),
        (["trainer.parallel=fsdp"], r"trainer.parallel=fsdp exclude each other: sharded layers compute LoRA alone"),
        (["trainer.fused_linear=true"], r"trainer.fused_linear=true exclude each other: its kernels compute LoRA"),
        (["loss=reward", "data=demo-preferences"], r"loss.name=reward exclude each other: its head is saved beside"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_made_for_lora_is_refused(kind: str, overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        compose([f"lora={kind}", *overrides])


@pytest.mark.parametrize("kind", KINDS)
def test_the_screen_names_the_kind(kind: str) -> None:
    lora = compose([f"lora={kind}", "recipe=none"]).lora
    short = describe_adapter(lora, short=True)
    assert short.startswith(KINDS[kind].title)
    assert describe_adapter(lora).startswith(short)
    assert (" r=" in short) == KINDS[kind].has_rank


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_the_kind_does_not_read_is_refused_where_it_is_given(kind: str) -> None:
    for name, value in (("r", "8"), ("alpha", "8"), ("dropout", "0.1")):
        overrides = [f"lora={kind}", f"lora.{name}={value}"]
        config = compose(overrides)
        if name in KINDS[kind].fields:
            assert with_start(config, overrides) is config
        else:
            with pytest.raises(UserError, match=rf"^lora.{name} is LoRA's, and .* does not read it; leave it out"):
                with_start(config, overrides)
