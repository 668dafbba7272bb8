"""Losses over answers are those of their papers, weigh every row alike, and read each setting that they have."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor

from qlora import adapters
from qlora.config.compose import compose
from qlora.config.registries.objectives import SHIPPED, Head, RowKind
from qlora.config.schema import LOSS_SETTINGS, LossConfig
from qlora.data.batching.collate import Collator, SidesCollator, count_work
from qlora.data.batching.packing import SIDES, PackedRows
from qlora.errors import ConfigError
from qlora.objectives import answer_passes, build_objective
from qlora.objectives.answers import AnswerLoss, Answers
from qlora.objectives.linear_cross_entropy import entropies_and_gradient
from qlora.runtime.device import Placement
from qlora.step.fast_step import FastStep
from qlora.step.part import Packs
from qlora.training.batches import CountingCollator
from qlora.upstream.peft import base_of
from tests.real_models import CPU
from tests.step.test_fast import build

NAMES = [name for name, shipped in SHIPPED.items() if shipped.rows in (RowKind.pairs, RowKind.labelled)]
OF_ANSWERS = [name for name in NAMES if SHIPPED[name].head is Head.causal]
IGNORED = -100
PLACEMENT = Placement(CPU, torch.float32, torch.float32)


def answers(**rest: Tensor) -> Answers:
    """Returns three rows of two answers."""
    torch.manual_seed(1)
    log_probs = (-torch.rand(3, 2) * 30).requires_grad_()
    tokens = torch.tensor([[3, 5], [4, 4], [9, 2]])
    return Answers(log_probs, tokens, -torch.rand(3, 2) * 30, log_probs * 1.5, tokens + 6, rest)


composed = functools.cache(lambda *overrides: compose(overrides))


def objective(*overrides: str) -> AnswerLoss:
    loss = build_objective(composed(*overrides, "trainer.per_device_train_batch_size=2").loss)
    assert isinstance(loss, AnswerLoss)
    return loss


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_each_loss_is_the_formula_of_its_paper() -> None:
    a = answers(desirable=torch.tensor([True, False, True]))
    a = replace(a, log_probs=a.log_probs.detach())
    (c, r), (rc, rr) = (a.log_probs.tolist()[1], a.reference.tolist()[1])
    n, m = a.tokens.tolist()[1]
    losses = {
        "dpo": -math.log(sigma(0.1 * ((c - rc) - (r - rr)))),
        "ipo": ((c - rc) / n - (r - rr) / m - 1 / 0.2) ** 2,
        "orpo": -0.1
        * math.log(sigma((c / n - math.log(1 - math.exp(c / n))) - (r / m - math.log(1 - math.exp(r / m))))),
        "reward": -math.log(sigma(c - r)),
        "simpo": -math.log(sigma(2 * c / n - 2 * r / m - 1)),
    }
    for name, expected in losses.items():
        assert float(objective(f"loss={name}").losses(a)[1]) == pytest.approx(expected, rel=1e-5), name
    divergence = max(float(0.1 * (a.log_probs - a.reference)[:, 1].mean()), 0)
    value = 1 - sigma(divergence - 0.1 * (c - rc))  # row 1 is a bad one
    assert float(objective("loss=kto").losses(a)[1]) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_of_a_loss_changes_it_or_its_reference(name: str) -> None:
    other = {"beta": "0.7", "label_smoothing": "0.2", "reference": "none", "gamma": "0.3", "sft_weight": "0.5",
             "desirable_weight": "2", "undesirable_weight": "2", "center_rewards": "0.1"}  # fmt: skip
    a = answers(desirable=torch.tensor([True, False, True]))
    plain = objective(f"loss={name}")
    for setting in SHIPPED[name].settings:
        value = str(not plain.config.length_normalize).lower() if setting == "length_normalize" else other[setting]
        changed = objective(f"loss={name}", f"loss.{setting}={value}")
        if setting == "reference":
            assert (plain.compares, changed.compares) == (True, False)
        else:
            assert not torch.isclose(changed.loss(a, None), plain.loss(a, None)), setting


@pytest.mark.matrix(2)
@pytest.mark.parametrize("name", ["sft", *NAMES])
def test_a_setting_that_a_loss_does_not_read_is_refused(name: str) -> None:
    value = {"reference": "base", "length_normalize": "true"}
    for setting in set(LOSS_SETTINGS) - {*SHIPPED[name].settings}:
        with pytest.raises(
            ConfigError, match=rf"loss\.{setting}=.* is not read by loss\.name={name}; choose (one of )?loss="
        ):
            objective(f"loss={name}", f"loss.{setting}={value.get(setting, '0.1')}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.name=dpo"], r"loss\.beta is not set, and loss\.name=dpo reads it; loss=dpo sets it"),
        (["loss=dpo", "loss.beta=0"], r"loss\.beta must be positive and finite, got 0"),
        (["loss=dpo", "loss.label_smoothing=0.5"], r"loss\.label_smoothing must be at least 0 and below 0\.5"),
        (["loss=dpo", "loss.reference=start"], r"loss\.reference=start is the adapter of lora\.start, which is not"),
        (["loss=dpo", "lora=none", "quantization=fp32"],
         r"loss=dpo compares with the model that was before, and lora=none trains all of its weights: there is no ref"),
        (["loss=dpo", "loss.reference=base", "lora=pissa", "quantization=fp32"],
         r"loss\.reference=base and lora\.init=pissa exclude each"),
        (["loss=dpo", "data.train_on=all"], r"data\.train_on=all counts the tokens of the prompt, and loss=dpo comp"),
        (["loss=kto", "data.packing=true"], r"data\.packing=true joins rows into one, and loss=kto lays answers of"),
        (["loss=dpo", "trainer.neftune_noise_alpha=5"], r"trainer\.neftune_noise_alpha=5 would compare answers with"),
        (["loss=kto", "trainer.per_device_train_batch_size=1"], r"per_device_train_batch_size=1 leaves none; set it"),
        (["loss=orpo", "loss.cache_reference=true"],
         r"loss\.cache_reference=true: loss=orpo compares with no reference; leave it out"),
        (["loss=sft", "loss.cache_reference=true"],
         r"loss\.cache_reference=true: loss=sft compares with no reference; leave it out"),
        (["loss=dpo", "loss.reference=none", "loss.cache_reference=true"],
         r"loss\.cache_reference=true: loss=dpo with loss\.reference=none compares with no reference; leave it out"),
        (["loss=kto", "loss.cache_reference=true"],
         r"loss\.cache_reference=true: loss=kto compares prompts with answers of other rows of a micro-batch, too, wh"),
        (["loss=dpo", "loss.cache_reference=1"], r"loss\.cache_reference must be true, false or auto, got 1"),
        (["objective=eval_reward_accuracy"], r"objective='eval_reward_accuracy' is not a metric of this run"),
        (["loss=orpo", "objective=eval_reference_kl"], r"objective='eval_reference_kl' is not a metric of this run"),
    ],
)  # fmt: skip
def test_what_a_loss_cannot_be_trained_with_is_refused_in_one_sentence(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(overrides)


def batch(rows: int = 4) -> dict[str, Tensor]:
    """Returns rows of two answers of different lengths to a prompt of three tokens."""
    torch.manual_seed(2)
    ids = torch.randint(3, 90, (rows, 2, 9))
    ids[:, 1, :3] = ids[:, 0, :3]
    labels = ids.clone()
    labels[:, :, :3] = IGNORED
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, row % 2, 7 - row % 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, IGNORED),
            "desirable": torch.arange(rows) % 2 == 0}  # fmt: skip


def step_of(loss: AnswerLoss, *overrides: str, packs: Packs | None = None) -> tuple[Any, FastStep]:
    model, _ = build()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    reference = adapters.reference_at_start(model, is_base=True)
    config = composed(*overrides, "device=cpu", "trainer.fused_linear=false")
    return model, FastStep(model, config.trainer, config.quantization, PLACEMENT, packs, loss, reference)


def gradients(
    name: str, batches: list[dict[str, Tensor]], count: Tensor | None, *overrides: str, packs: int = 0
) -> Tensor:
    """Returns the loss and the gradients of all micro-batches of a step."""
    loss = objective(f"loss={name}")
    model, step = step_of(loss, *overrides, packs=Packs(64, packs, 9) if packs else None)
    total = torch.zeros(())
    for micro in batches:
        inputs = copy.deepcopy(micro)
        if name != "kto":
            inputs.pop("desirable", None)
        step.targets = int((inputs["labels"] != IGNORED).sum())
        with step:
            part = model(**inputs, num_items_in_batch=count).loss
            part.backward()
        total += part.detach()
    flat = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return torch.cat([total[None], *flat])


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_tokens_without_a_target_are_not_multiplied_and_layers_may_be_computed_again(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = gradients(name, [batch()], None, "trainer.fused_loss=true")
    monkeypatch.setattr(answer_passes, "BUCKET", 4)
    read: list[int] = []
    compute = answer_passes.linear_entropies
    monkeypatch.setattr(
        answer_passes, "linear_entropies", lambda hidden, *rest: (read.append(len(hidden)), compute(hidden, *rest))[1]
    )
    again = gradients(name, [batch()], None, "trainer.fused_loss=true", "trainer.gradient_checkpointing=true")
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-5)
    assert min(read) < batch()["labels"].numel()


def test_scaled_and_capped_logits_have_their_entropy_and_gradient() -> None:
    torch.manual_seed(3)
    products, targets = torch.randn(6, 20, dtype=torch.float64).mul(20).requires_grad_(), torch.randint(0, 20, (6,))
    targets[2] = IGNORED
    expected = torch.nn.functional.cross_entropy(
        30 * torch.tanh(0.5 * products / 30), targets, reduction="none", ignore_index=IGNORED
    )
    losses, gradient = entropies_and_gradient(products.detach(), targets, scale=0.5, cap=30.0)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-4, atol=1e-5)
    assert gradient is not None
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), products)[0], rtol=1e-4, atol=1e-5)
    assert entropies_and_gradient(products.detach(), targets, scale=0.5, cap=30.0, graded=False)[1] is None


def test_8_bit_matmuls_measure_the_weights_of_the_reference_too() -> None:
    margins = []
    for compute in ("native", "fp8"):
        model, config = build(overrides=(f"quantization.compute={compute}",))  # with an adapter that is not 0
        loss = objective("loss=dpo")
        reference = adapters.reference_at_start(model, is_base=False)
        step = FastStep(model, config.trainer, config.quantization, PLACEMENT, None, loss, reference)
        inputs = {name: value for name, value in batch().items() if name != "desirable"}
        with step:
            assert float(model(**copy.deepcopy(inputs)).loss) == pytest.approx(math.log(2), abs=1e-6)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.mul_(0.01 if ".lora_B." in name else 1)  # the reference is now far larger
        loss.metrics()
        with step:
            model(**copy.deepcopy(inputs))
        margins.append(loss.metrics()["reward_margin"])
    assert margins[1] == pytest.approx(margins[0], rel=0.1)


def test_the_base_is_the_reference_of_a_start_adapter_that_is_asked_for() -> None:
    model, _ = step_of(objective("loss=dpo"))
    ids = batch()["input_ids"][:, 0]
    with torch.no_grad():
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        with adapters.reference_at_start(model, is_base=True).active():
            torch.testing.assert_close(model(input_ids=ids).logits, base, rtol=0, atol=0)
        with adapters.reference_at_start(model, is_base=False).active():
            assert not torch.equal(model(input_ids=ids).logits, base)


def test_a_loss_of_another_package_is_a_few_lines() -> None:
    text = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(text.split("# my_preferences.py\n")[1].split("```")[0], names)  # as the page has it
    hinge = names["Hinge"](LossConfig(name="my_preferences:Hinge", options={"beta": 0.2}))
    a = answers()
    margin = 0.2 * (a.log_probs[:, 0] - a.log_probs[:, 1])
    torch.testing.assert_close(hinge.losses(a), torch.relu(1 - margin))
    assert (hinge.rows, hinge.compares) == (RowKind.pairs, False)


@pytest.mark.matrix(2)
@pytest.mark.parametrize("name", OF_ANSWERS)
def test_hidden_states_and_logits_give_one_loss_and_one_gradient(name: str) -> None:
    plain = gradients(name, [batch()], None, "trainer.fused_loss=false")
    torch.testing.assert_close(gradients(name, [batch()], None, "trainer.fused_loss=true"), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.matrix(2)
@pytest.mark.parametrize("name", [name for name in OF_ANSWERS if name != "kto"])
def test_rows_weigh_the_same_in_whatever_micro_batch_they_are(name: str) -> None:
    whole, loss = batch(), objective(f"loss={name}")
    count = loss.count(whole).sum(0)
    parts = [{key: value[rows] for key, value in whole.items()} for rows in (slice(0, 3), slice(3, 4))]
    torch.testing.assert_close(gradients(name, parts, count), gradients(name, [whole], None), rtol=1e-4, atol=1e-5)


def packs_of(rows: dict[str, Tensor], width: int = 64) -> dict[str, Tensor]:
    """Returns the rows of a batch as two packs."""
    table: dict[str, list[Any]] = {name: [] for name in ("input_ids", "labels", "rejected_ids", "rejected_labels")}
    for ids, labels, mask in zip(rows["input_ids"], rows["labels"], rows["attention_mask"].bool(), strict=True):
        for side, names in enumerate(SIDES):
            for name, values in zip(names, (ids, labels), strict=True):
                table[name].append(values[side][mask[side]].tolist())
    table["length"] = [len(a) + len(b) for a, b in zip(table["input_ids"], table["rejected_ids"], strict=True)]
    packed = PackedRows(Dataset.from_dict(table), [np.array([2, 0, 1]), np.array([3])])
    assert (packed.most_rows, packed.longest_row) == (6, max(map(len, table["input_ids"] + table["rejected_ids"])))
    return Collator(0, width=width)([packed[0], packed[1]])


@pytest.mark.matrix(2)
@pytest.mark.parametrize("name", [name for name in OF_ANSWERS if name != "kto"])
def test_packs_give_the_loss_and_the_gradient_of_rows(name: str) -> None:
    rows = batch()
    packs, loss = packs_of(rows), objective(f"loss={name}")
    torch.testing.assert_close(loss.count(packs).sum(0), loss.count(rows).sum(0))
    plain = gradients(name, [rows], loss.count(rows).sum(0))
    for fused in ("true", "false"):
        packed = gradients(name, [packs], loss.count(packs).sum(0), f"trainer.fused_loss={fused}", packs=6)
        torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-5 * max(float(plain.abs().max()), 1))


def test_packs_give_a_reward_model_the_loss_and_the_gradient_of_rows() -> None:
    rows = {name: value for name, value in batch().items() if name != "desirable"}
    learned = []
    for inputs, limits in ((rows, None), (packs_of(rows), Packs(64, 6, 9))):
        loss = objective("loss=reward", "loss.center_rewards=0.1")
        model, step = step_of(loss, packs=limits)
        base = base_of(model)
        torch.manual_seed(5)
        adapters.attach_head(base)
        torch.nn.init.normal_(base.get_submodule("score").weight, std=0.1)
        with step:
            model(**copy.deepcopy(inputs), num_items_in_batch=loss.count(inputs).sum(0)).loss.backward()
        gradient = [parameter.grad.reshape(-1) for parameter in model.parameters() if parameter.grad is not None]
        learned.append(torch.cat([*gradient, torch.tensor(list(loss.metrics().values()))]))
    plain, packed = learned
    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-5 * max(float(plain.abs().max()), 1))


@pytest.mark.matrix(2)
@pytest.mark.parametrize("name", OF_ANSWERS)
def test_a_row_without_labels_counts_nothing(name: str) -> None:
    whole = batch(3)
    blank = {key: value[:1].clone() for key, value in whole.items()}
    blank["labels"][:] = IGNORED
    joined = {key: torch.cat([value, blank[key]]) for key, value in whole.items()}
    assert objective(f"loss={name}").count(joined)[-1].tolist() == [0, 0]
    torch.testing.assert_close(gradients(name, [joined], None), gradients(name, [whole], None), rtol=1e-4, atol=1e-5)


def test_the_reference_is_the_model_as_it_began_and_training_goes_on_from_what_was_trained() -> None:
    loss = objective("loss=dpo")
    model, step = step_of(loss)
    start = {name: parameter.clone() for name, parameter in model.named_parameters()}
    inputs = batch()
    del inputs["desirable"]
    with step:
        model(**copy.deepcopy(inputs)).loss.backward()
    assert loss.metrics()["reward_margin"] != 0  # the adapter is not that of the base, which has none
    assert all(torch.equal(parameter, start[name]) for name, parameter in model.named_parameters())


def test_counts_of_a_batch_are_those_of_its_rows() -> None:
    loss = objective("loss=orpo")
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [IGNORED, IGNORED, 3, 4], "rejected_ids": [1, 2, 5],
             "rejected_labels": [IGNORED, IGNORED, 5], "answer_start": 2}]  # fmt: skip
    collate = CountingCollator(SidesCollator(0), lambda batch: count_work(batch, 0), loss, rows[0])
    micro = collate(rows)
    assert micro["targets"].tolist() == [3]
    assert micro["weights"].tolist() == [[1, 3]]  # ORPO's likelihood counts the prompt
    assert micro["counts"] == (7, 10 + 6)
