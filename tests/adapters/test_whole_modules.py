"""`lora.modules_to_save`: modules that train whole beside an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from qlora import adapters
from qlora.adapters.adapted import split_adapter
from qlora.config.compose import compose
from qlora.errors import UserError
from qlora.models.new_tokens import resize_embeddings
from qlora.planning.memory_plan import Ledger
from qlora.planning.training_plan import find_shape, read_setup
from qlora.quantization.placement import find_placement
from qlora.runtime.device import find_device
from tests.adapters.test_adapters import attach, load
from tests.adapters.test_choice import check_reloaded_and_merged, logits, move, planned, save, trained
from tests.adapters.test_merge import merger
from tests.training.test_optimizers import check_exact, settings

NORMS = "lora.modules_to_save=[norm, .*input_layernorm]"
MATRICES = "lora.modules_to_save=[embed_tokens, lm_head]"


def whole(model: PeftModel) -> set[str]:
    names = [name for name, weight in model.named_parameters() if weight.requires_grad and "modules_to_save" in name]
    return {name.partition(".modules_to_save")[0].removeprefix("base_model.model.") for name in names}


@pytest.mark.parametrize("chosen", [NORMS, MATRICES])
@pytest.mark.parametrize("kind", ["all-linear", "vera"])
def test_the_plan_counts_what_is_built(base_folder: Path, chosen: str, kind: str) -> None:
    overrides = ["quantization=nf4", f"lora={kind}", chosen]
    config, base = load(base_folder, *overrides)
    model = attach(config, base, base_folder)
    assert trained(model) == planned(base_folder, *overrides)
    expected = {"model.norm", "model.layers.0.input_layernorm", "model.layers.1.input_layernorm"}
    assert whole(model) == (expected if chosen == NORMS else {"model.embed_tokens", "lm_head"})
    assert adapters.count_parameters(model).base == adapters.count_parameters(load(base_folder)[1]).base


def test_the_plan_counts_states_and_logits(base_folder: Path) -> None:
    def ledger(*overrides: str) -> Ledger:
        config = compose([f"model.name={base_folder}", "model.tokenizer=tiny", "lora.dropout=0", *overrides])
        shape = find_shape(config)
        return Ledger(shape, read_setup(config, shape))

    plain, chosen = ledger("quantization=nf4"), ledger("quantization=nf4", MATRICES)
    added = 2 * 1600 * 64
    assert chosen.trained_count - plain.trained_count == added
    assert chosen.gradients - plain.gradients == 4 * added
    assert sum(chosen.optimizer) - sum(plain.optimizer) == 8 * added
    assert chosen.unquantized == plain.unquantized  # the base's own stay
    assert (plain.setup.step.value, chosen.setup.step.value) == ("fast", "plain")
    assert ledger("quantization=nf4", "lora.modules_to_save=[embed_tokens]").setup.step.value == "fast"


@pytest.mark.parametrize("chosen", [NORMS, MATRICES])
@pytest.mark.parametrize("kind", ["all-linear", "dora", "pissa", "eva", "ia3"])
def test_plain_peft_and_merging_give_the_same_logits(tmp_path: Path, base_folder: Path, chosen: str, kind: str) -> None:
    check_reloaded_and_merged(tmp_path, base_folder, f"lora={kind}", chosen)


def test_the_untuned_base_is_there_without_the_adapter(base_folder: Path) -> None:
    config, base = load(base_folder, "quantization=fp32", MATRICES)
    untuned = logits(base)
    model = attach(config, base, base_folder)
    move(model)
    with adapters.adapter_off(model):
        assert torch.equal(logits(model), untuned)
    assert not torch.equal(logits(model), untuned)


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_copies_are_stored_as_the_adapter_is_and_return_what_the_base_does(
    base_folder: Path, dtype: str, expected: torch.dtype
) -> None:
    overrides = ["quantization.compute_dtype=bf16", f"lora.dtype={dtype}", "lora.modules_to_save=[embed_tokens, norm]"]
    config, base = load(base_folder, *overrides)
    model = attach(config, base, base_folder)
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {expected}
    embedded = model.get_input_embeddings()(torch.arange(4)[None])
    assert embedded.dtype == base.model.embed_tokens.original_module.weight.dtype == torch.bfloat16
    assert model.base_model.model.model.norm(embedded).dtype == torch.bfloat16


def test_a_run_that_was_cut_in_two_ends_in_the_same_weights(tmp_path: Path) -> None:
    lora = compose(["lora.r=2", "lora.dropout=0", "lora.modules_to_save=[embed_tokens, lm_head, .*norm]"]).lora

    def adapt(model: Any) -> Any:
        return adapters.add_lora(lora, model, tensors=dict, new_token_ids=[], batches=[])

    trainer = check_exact(tmp_path, settings(), adapt=adapt)
    assert len(whole(trainer.model)) > 4
    assert trainer.step.parts["fused_loss"] == "the output layer is not a plain torch.nn.Linear, or it is trained"
    assert trainer.step.parts["compile"] == "modules inside layers train whole (lora.modules_to_save)"


def test_rows_of_new_tokens_train_with_a_matrix_that_trains_whole(base_folder: Path) -> None:
    config, base = load(base_folder, "quantization=fp32", "lora.modules_to_save=[embed_tokens]")
    model = adapters.add_lora(config.lora, base, tensors=dict, new_token_ids=[1598, 1599], batches=[])
    assert model.peft_config["default"].trainable_token_indices == {"lm_head": [1598, 1599]}
    config, base = load(base_folder, "quantization=fp32", MATRICES)
    model = adapters.add_lora(config.lora, base, tensors=dict, new_token_ids=[1598, 1599], batches=[])
    assert model.peft_config["default"].trainable_token_indices is None


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["lora.modules_to_save=[lm_hed]"],
         r"^lora.modules_to_save \['lm_hed'\] matches no module that can train whole .did you mean lm_head"),
        (["lora.modules_to_save=[q_proj]"],
         r"^lora.modules_to_save: model.layers.0.self_attn.q_proj is quantized, and a module trains whole in 16 or 32"),
        (["lora.modules_to_save=[q_proj]", "quantization=fp32"],
         r"q_proj has an adapter too; leave it out of one of both, e.g. with lora.exclude=\[q_proj\]"),
        (["lora.modules_to_save=['[']"], r"^lora.modules_to_save: '\[' is not a regular expression"),
    ],
)  # fmt: skip
def test_what_cannot_train_whole_stops_the_run_and_the_plan(
    base_folder: Path, overrides: list[str], sentence: str
) -> None:
    overrides = ["quantization=nf4", *overrides]
    config, base = load(base_folder, *overrides)
    with pytest.raises(UserError, match=sentence):
        attach(config, base, base_folder)
    with pytest.raises(UserError, match=sentence):
        planned(base_folder, *overrides)


def test_a_layer_without_an_adapter_can_train_whole(base_folder: Path) -> None:
    overrides = ["quantization=fp32", "lora.exclude=[q_proj]", "lora.modules_to_save=[q_proj]"]
    config, base = load(base_folder, *overrides)
    model = attach(config, base, base_folder)
    assert trained(model) == planned(base_folder, *overrides)
    assert whole(model) == {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}


def test_one_of_two_tied_matrices_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                         vocab_size=1600, max_position_embeddings=64, tie_word_embeddings=True)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    sentence = (
        r"^lora.modules_to_save: in this model lm_head and model.embed_tokens are one matrix .tie_word_embeddings., "
        r"and a trained copy for lm_head alone would untie them; name other modules, or train the rows of model.new_t"
    )
    config, base = load(tmp_path, "lora.modules_to_save=[lm_head]")
    with pytest.raises(UserError, match=sentence):
        attach(config, base, tmp_path)
    with pytest.raises(UserError, match=sentence):
        planned(tmp_path, "lora.modules_to_save=[lm_head]")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["lora.modules_to_save={a: 1}"], "^lora.modules_to_save must be a text or a list of texts"),
        (["lora=none", "quantization=fp32"], r"^lora.modules_to_save=\['norm'\] and lora=none exclude each other: all"),
        (["lora=loraplus"], "and lora.loraplus_lr_ratio=16 exclude each other: LoRA. has learning rates for A and B"),
        (["lora.bias=all"], "and lora.bias=all exclude each other: the bias of such a module trains with it"),
        (["lora.start=x"], "and lora.start exclude each other: that adapter keeps its form"),
        (["trainer.parallel=fsdp", "quantization=none"], "^trainer.parallel=fsdp and lora.modules_to_save exclude"),
    ],
)
def test_what_cannot_be_is_refused_when_the_config_is_composed(overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        compose(["lora.modules_to_save=[norm]", *overrides])


def test_matrices_that_grew_for_new_tokens_are_saved_and_merged_whole(tmp_path: Path, base_folder: Path) -> None:
    config, base = load(base_folder, "quantization=fp32", MATRICES)
    resize_embeddings(base, [1600, 1601])
    model = adapters.add_lora(config.lora, base, tensors=dict, new_token_ids=[1600, 1601], batches=[])
    move(model)
    expected = logits(model)
    folder = save(model, tmp_path / "adapter")
    _, fresh = load(base_folder, "quantization=fp32")
    with pytest.raises(UserError, match=r"does not fit model.name"):
        adapters.load_adapter(fresh, folder, str(base_folder))
    _, fresh = load(base_folder, "quantization=fp32")
    resize_embeddings(fresh, [1600, 1601])
    loaded = adapters.load_adapter(fresh, folder, str(base_folder))
    assert torch.equal(logits(loaded), expected)
    made = merger(base_folder, split_adapter(loaded), find_placement(config.quantization, find_device(config.device)))
    merged = {name: made.tensor(part) for name, part in made.parts.items()}
    assert merged["lm_head.weight"].shape == merged["model.embed_tokens.weight"].shape == (1602, 64)
    assert torch.equal(merged["lm_head.weight"], loaded.get_output_embeddings().weight)
