"""Attention with soft caps, sinks and windows, logits behind a factor or a cap: the step computes what models do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qlora.config.compose import compose
from qlora.objectives import build_objective
from qlora.objectives.linear_cross_entropy import entropy_and_gradient
from qlora.runtime.device import Placement
from qlora.step.fast_step import FastStep
from qlora.step.kernels.attention import attend_plain, build_block_mask
from qlora.step.logit_transform import LogitTransform, find_transform
from qlora.step.part import ON, Packs

CPU = Placement(torch.device("cpu"), torch.float32, torch.float32)
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 96,
         "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"sliding_window": 6, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {"sliding_window": 6},
    "gpt_oss": {"sliding_window": 6, **EXPERTS},
    "granite": {"logits_scaling": 13.0, "attention_multiplier": 0.25},
    "cohere2": {"sliding_window": 6},
    "nanochat": {},
}


def build(kind: str) -> PreTrainedModel:
    known = AutoConfig.for_model(kind).to_dict()
    config = AutoConfig.for_model(kind, **{k: v for k, v in {**SMALL, **KINDS[kind]}.items() if k in known})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3 if parameter.dim() > 1 else 1)
    output = model.get_output_embeddings()
    if output.weight is model.get_input_embeddings().weight:
        output.weight = torch.nn.Parameter(output.weight.detach().clone())
    output.weight.requires_grad_(False)
    return model.train()


def train_once(model: PreTrainedModel, batch: dict[str, Tensor], packs: Packs | None, *overrides: str) -> Tensor:
    config = compose(["quantization=fp32", "lora.r=4", *overrides])
    step = FastStep(model, config.trainer, config.quantization, CPU, packs, build_objective(config.loss))
    if overrides:
        assert step.parts["fused_attention"] == step.parts["fused_loss"] == ON, str(step)
    model.zero_grad()
    with step:
        loss = model(**batch).loss
        loss.backward()
    gradients = [p.grad.reshape(-1) for _, p in sorted(model.named_parameters()) if p.grad is not None]
    return torch.cat([loss.detach().reshape(1), *gradients])


@pytest.mark.parametrize("kind", KINDS)
def test_padded_batches_and_packs_learn_what_the_models_own_attention_and_loss_teach(kind: str) -> None:
    model = build(kind)
    rows = [torch.randint(3, 96, (length,)) for length in (11, 5, 16)]
    ids, labels = torch.zeros(3, 16, dtype=torch.int64), torch.full((3, 16), -100)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = labels[index, : len(row)] = row
    padded = {"input_ids": ids, "attention_mask": (labels >= 0).long(), "labels": labels}
    expected = train_once(model, padded, None)
    fast = ["trainer.fused_attention=true", "trainer.fused_loss=true"]
    assert_same(train_once(model, padded, None, *fast), expected)

    pack = torch.cat([*rows, torch.zeros(4, dtype=torch.int64)])
    targets = torch.cat([*rows, torch.full((4,), -100)])
    targets[[0, 11, 16]] = -100
    positions = torch.cat([torch.arange(len(row)) for row in rows] + [torch.arange(4)])
    packed = {"input_ids": pack[None], "labels": targets[None], "position_ids": positions[None]}
    actual = train_once(model, packed, Packs(36, 3, 16), *fast)
    assert_same(actual, expected)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert float((actual - expected).norm()) < 1e-5 * float(expected.norm())
    assert float(actual[0]) == pytest.approx(float(expected[0]), rel=1e-6)


@pytest.mark.parametrize("window", [None, 1, 50, 128, 200])
@pytest.mark.parametrize("lengths", [[100, 37, 256, 7], [130, 300, 1], [5], [128, 128], [1] * 130])
def test_flex_attention_skips_no_block_with_a_token_that_is_seen(window: int | None, lengths: list[int]) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    total = sum(lengths)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist(), total, total], dtype=torch.int32)
    mask = build_block_mask(cu_seqlens, total, window)
    dense = create_block_mask(mask.mask_mod, 1, 1, total, total, device="cpu", BLOCK_SIZE=128)
    assert torch.equal(mask.to_dense(), dense.to_dense())
    index, starts = torch.arange(total), torch.repeat_interleave(cu_seqlens[: len(lengths)], torch.tensor(lengths))
    distance = index[:, None] - index[None, :]
    seen = (distance >= 0) & (index[None, :] >= starts[:, None]) & (distance < (window or total))
    assert torch.equal(mask.mask_mod(0, 0, index[:, None], index[None, :]), seen)
    counts, blocks = mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0]
    for row, count in enumerate(counts.tolist()):
        for column in blocks[row, :count].tolist():
            assert seen[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128].all()


def test_a_sink_takes_its_share_of_each_row() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(7, 2, 8), torch.randn(7, 1, 8), torch.randn(7, 1, 8)
    sinks = torch.tensor([0.5, -1.0])
    output = attend_plain(q, k, v, torch.tensor([0, 7]), 0.3, sinks=sinks)
    for head in range(2):
        scores = (q[6, head] @ k[:, 0].t()) * 0.3
        weights = scores.exp() / (scores.exp().sum() + sinks[head].exp())
        torch.testing.assert_close(output[6, head], weights @ v[:, 0])


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("llama", {}, LogitTransform()),
        ("gemma2", {"final_logit_softcapping": 30.0}, LogitTransform(cap=30.0)),
        ("granite", {"logits_scaling": 8.0}, LogitTransform(scale=0.125)),
        ("cohere2", {"logit_scale": 0.0625}, LogitTransform(scale=0.0625)),
        ("falcon_h1", {"lm_head_multiplier": 0.0195, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
         LogitTransform(scale=0.0195)),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 64}, LogitTransform()),
    ],
)  # fmt: skip
def test_what_a_model_does_to_its_logits_is_measured_whatever_its_config_calls_it(
    kind: str, settings: dict[str, Any], expected: LogitTransform
) -> None:
    known = AutoConfig.for_model(kind).to_dict()
    config = AutoConfig.for_model(kind, **{k: v for k, v in {**SMALL, **settings}.items() if k in known})
    assert find_transform(AutoModelForCausalLM.from_config(config)) == expected


def test_logits_of_another_form_are_left_to_the_model() -> None:
    model = build("llama")
    forward = type(model).forward

    class Squared(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = forward(self, *args, **kwargs)
            outputs.logits = outputs.logits.square()
            return outputs

    model.__class__ = Squared
    assert find_transform(model) is None
    config = compose(["quantization=fp32", "trainer.fused_loss=auto"])
    step = FastStep(model, config.trainer, config.quantization, CPU, None, build_objective(config.loss))
    assert step.parts["fused_loss"] == "llama computes its logits in a way of its own"


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("scale", "cap"), [(0.25, None), (1.0, 5.0), (2.0, 3.0)])
def test_the_loss_of_scaled_and_capped_logits_has_their_gradient(smoothing: float, scale: float, cap: float) -> None:
    torch.manual_seed(0)
    products = (4 * torch.randn(6, 9, dtype=torch.float64)).float().requires_grad_()
    targets = torch.tensor([1, -100, 8, 0, 3, -100])
    loss, gradient = entropy_and_gradient(products, targets, smoothing, scale, cap)
    expected = torch.nn.functional.cross_entropy(
        LogitTransform(scale, cap)(products), targets, reduction="sum", label_smoothing=smoothing
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, products)[0], rtol=1e-5, atol=1e-6)
