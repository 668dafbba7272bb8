"""The measured loss: every token weighs the same, whatever the batches, and measuring leaves no trace."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from qlora.compose import compose
from qlora.data.collate import Collator
from qlora.evaluation.loss import measure_loss
from qlora.evaluation.measure import Measurer, evaluation_mode
from qlora.evaluation.metrics import exact_match, find_metrics
from qlora.models.tokenizer import load_tokenizer
from qlora.schema import GenerationConfig

CPU = torch.device("cpu")


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=1600,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, attention_dropout=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def rows() -> list[dict[str, Any]]:
    """Nine rows of 3 to 27 tokens, of which 1 to 20 carry loss."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(9):
        length = 3 + 3 * number
        ids = torch.randint(3, 1500, (length,), generator=generator).tolist()
        prompt = 1 + (number * 7) % max(1, length - 2)
        labels = [-100] * prompt + ids[prompt:]
        made.append(
            {"input_ids": ids, "labels": labels, "length": length, "prompt_ids": ids[:prompt], "prompt": f"p{number}",
             "reference": f"r{number}"}
        )  # fmt: skip
    return made


def plain_loss(model: torch.nn.Module) -> float:
    """The mean over all trained tokens of all rows, one row at a time and without padding."""
    total, count = 0.0, 0
    for row in rows():
        with torch.no_grad():
            scores = model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for place in range(1, row["length"]):
            if row["labels"][place] != -100:
                total -= float(scores[place - 1, row["input_ids"][place]])
                count += 1
    return total / count


def measurer(**changes: Any) -> Measurer:
    fields: dict[str, Any] = {
        "rows": rows(),
        "collate": Collator(0),
        "tokenizer": load_tokenizer(compose([]).model),
        "generation": GenerationConfig(max_new_tokens=3),
        "metrics": {"exact_match": exact_match},
        "pad_token_id": 0,
        "batch_size": 4,
        "device": CPU,
        "autocast": contextlib.nullcontext,
    }
    return Measurer(**(fields | changes))


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_every_trained_token_weighs_the_same_in_any_batch(model: LlamaForCausalLM, batch_size: int) -> None:
    expected = plain_loss(model)
    by_row = [
        measure_loss(model.eval(), [row], collate=Collator(0), batch_size=1, device=CPU)["loss"] for row in rows()
    ]
    assert abs(sum(by_row) / len(by_row) - expected) > 1e-3, "a mean of row means would be another number"
    found = measurer(batch_size=batch_size).measure(model, answers=0).metrics
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_the_order_of_the_rows_does_not_matter(model: LlamaForCausalLM) -> None:
    there = measurer().measure(model, answers=0).metrics["loss"]
    back = measurer(rows=rows()[::-1]).measure(model, answers=0).metrics["loss"]
    assert there == pytest.approx(back, rel=1e-6)


def test_what_stands_in_the_padding_does_not_matter(model: LlamaForCausalLM) -> None:
    losses = {measurer(collate=Collator(pad)).measure(model, answers=0).metrics["loss"] for pad in (0, 1, 77)}
    assert max(losses) == pytest.approx(min(losses), rel=1e-6)


def test_measuring_switches_dropout_off_and_on_again(model: LlamaForCausalLM) -> None:
    model.train()
    first, second = (measurer().measure(model, answers=0).metrics["loss"] for _ in range(2))
    assert first == second
    assert all(module.training for module in model.modules())
    model.eval()
    measurer().measure(model, answers=1)
    assert not any(module.training for module in model.modules())


def test_measuring_leaves_gradients_and_weights_alone(model: LlamaForCausalLM) -> None:
    model.train()
    ids = torch.arange(3, 35)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    measurer().measure(model, answers=None)
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_measuring_takes_no_random_numbers(model: LlamaForCausalLM) -> None:
    state = torch.get_rng_state()
    measurer().measure(model, answers=None)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_training_step_after_a_measurement_is_the_same_step(model: LlamaForCausalLM) -> None:
    ids = torch.arange(3, 35)[None]

    def gradient() -> torch.Tensor:
        torch.manual_seed(5)
        model.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        return model.lm_head.weight.grad.clone()

    before = gradient()
    measurer().measure(model, answers=2)
    assert torch.equal(before, gradient())


def test_the_mode_comes_back_after_a_failure(model: LlamaForCausalLM) -> None:
    model.train()
    with pytest.raises(KeyboardInterrupt), evaluation_mode(model):
        raise KeyboardInterrupt
    assert model.training


def test_answers_are_counted_by_the_argument(model: LlamaForCausalLM) -> None:
    assert [len(measurer().measure(model, answers=count).predictions) for count in (0, 2, None)] == [0, 2, 9]
    assert "exact_match" not in measurer().measure(model, answers=0).metrics


def test_a_prediction_tells_its_row_and_its_lengths(model: LlamaForCausalLM) -> None:
    [first, second] = measurer().measure(model, answers=2).predictions
    assert (first["prompt"], first["reference"], second["reference"]) == ("p0", "r0", "r1")
    assert first["prompt_tokens"] == len(rows()[0]["prompt_ids"])
    assert (first["answer_tokens"], first["finish"]) == (3, "length")


def test_a_metric_of_ones_own_sees_predictions_and_references(
    model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("metrics")
    (folder / "my_metrics.py").write_text("def count(predictions, references):\n    return len(references)\n")
    monkeypatch.syspath_prepend(str(folder))
    measured = measurer(metrics=find_metrics(["exact_match", "my_metrics:count"])).measure(model, answers=3)
    assert measured.metrics["count"] == 3.0


def test_exact_match_forgives_white_space_at_the_ends_only() -> None:
    assert exact_match([" a b\n", "ab", "A b"], ["a b", "a b", "a b"]) == pytest.approx(1 / 3)


def test_a_plain_loss_by_hand_equals_torchs(model: LlamaForCausalLM) -> None:
    row = rows()[5]
    logits = model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
    expected = F.cross_entropy(logits, torch.tensor(row["labels"][1:]), ignore_index=-100).item()
    found = measure_loss(model, [row], collate=Collator(0), batch_size=1, device=CPU)["loss"]
    assert found == pytest.approx(expected, rel=1e-6)
