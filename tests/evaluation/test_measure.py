"""The measured loss: every token weighs the same, whatever the batches, and measuring leaves no trace."""

from __future__ import annotations

import contextlib
import math
import random
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from qlora.config.compose import compose
from qlora.config.schema import GenerationConfig
from qlora.data.batching.collate import Collator
from qlora.errors import UserError
from qlora.evaluation import row_loss
from qlora.evaluation.generation import Answer, plan_batches, prompt_lengths
from qlora.evaluation.measure import Measurer, evaluation_mode, read_result, seeded
from qlora.evaluation.metrics import exact_match, find_metrics
from qlora.evaluation.row_loss import measure_loss
from qlora.models.tokenizer import load_tokenizer

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
        for index in range(1, row["length"]):
            if row["labels"][index] != -100:
                total -= float(scores[index - 1, row["input_ids"][index]])
                count += 1
    return total / count


def measurer(**changes: Any) -> Measurer:
    fields: dict[str, Any] = {
        "rows": Dataset.from_list(rows()),
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
        measure_loss(model.eval(), Dataset.from_list([row]), collate=Collator(0), batch_size=1, device=CPU)["loss"]
        for row in rows()
    ]
    assert abs(sum(by_row) / len(by_row) - expected) > 1e-3, "a mean of row means would be another number"
    actual = measurer(batch_size=batch_size).measure(model, answers=0).metrics
    assert actual["loss"] == pytest.approx(expected, rel=1e-6)
    assert actual["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_logits_are_computed_only_where_a_row_has_a_label(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = [row | {"labels": [-100] * (len(row["labels"]) - 2) + row["labels"][-2:]} for row in rows()]
    cells = Collator(0)(held_out)["labels"][:, 1:]
    read: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: read.append(output.shape[1]))
    losses = []
    for takes in (True, False):
        monkeypatch.setattr(row_loss, "takes_logits_to_keep", lambda model, takes=takes: takes)
        options: Any = {"collate": Collator(0), "batch_size": 100, "device": CPU}
        losses.append(measure_loss(model.eval(), Dataset.from_list(held_out), **options)["loss"])
    hook.remove()
    assert read == [int((cells != -100).any(0).sum()), cells.shape[1] + 1]
    assert read[0] < cells.shape[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_order_of_the_rows_does_not_matter(model: LlamaForCausalLM) -> None:
    there = measurer().measure(model, answers=0).metrics["loss"]
    back = measurer(rows=Dataset.from_list(rows()[::-1])).measure(model, answers=0).metrics["loss"]
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


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_measuring_takes_no_random_numbers(model: LlamaForCausalLM, do_sample: bool) -> None:
    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]

    previous = states()
    measurer(generation=GenerationConfig(max_new_tokens=3, do_sample=do_sample)).measure(model, answers=None)
    assert states() == previous


def test_sampled_answers_follow_the_seed_and_their_place(model: LlamaForCausalLM) -> None:
    options = GenerationConfig(max_new_tokens=6, do_sample=True, batch_size=2)
    first, again, other = (
        [row["prediction"] for row in measurer(generation=options, seed=seed).predict(model, None)]
        for seed in (0, 0, 1)
    )
    assert first == again != other
    same = Dataset.from_list([rows()[0]] * 4)
    random_values = [row["prediction"] for row in measurer(generation=options, rows=same).predict(model, None)]
    assert len(set(random_values)) > 2, "each batch draws numbers of its own"


def test_a_seed_of_several_numbers_is_no_sum() -> None:
    def draw(*seed: int) -> float:
        with seeded(*seed, device=CPU):
            return torch.rand(()).item()

    assert draw(0, 1) == draw(0, 1)
    assert len({draw(0, 1), draw(1, 0), draw(0, 0), draw(1, 1)}) == 4


def test_a_training_step_after_a_measurement_is_the_same_step(model: LlamaForCausalLM) -> None:
    ids = torch.arange(3, 35)[None]

    def gradient() -> torch.Tensor:
        torch.manual_seed(5)
        model.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        return model.lm_head.weight.grad.clone()

    previous = gradient()
    measurer().measure(model, answers=2)
    assert torch.equal(previous, gradient())


def test_the_mode_comes_back_after_a_failure(model: LlamaForCausalLM) -> None:
    model.train()
    with pytest.raises(KeyboardInterrupt), evaluation_mode(model):
        raise KeyboardInterrupt
    assert model.training


def test_answers_are_counted_by_the_argument(model: LlamaForCausalLM) -> None:
    assert [len(measurer().measure(model, answers=count).predictions) for count in (0, 2, None)] == [0, 2, 9]
    assert "exact_match" not in measurer().measure(model, answers=0).metrics


def test_a_prediction_records_its_row_and_its_lengths(model: LlamaForCausalLM) -> None:
    [first, second] = measurer().measure(model, answers=2).predictions
    assert (first["input"], first["reference"], second["reference"]) == ("p0", "r0", "r1")
    assert first["prompt"] == load_tokenizer(compose([]).model).decode(rows()[0]["prompt_ids"])
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


def test_what_a_metric_may_return() -> None:
    assert read_result("m", 0.5, 3).metrics == {"m": 0.5}
    assert read_result("m", np.float64(0.5), 3).metrics == {"m": 0.5}
    assert read_result("m", torch.tensor(0.5), 3).metrics == {"m": 0.5}
    by_row = read_result("m", np.array([1, 0, 0]), 3)
    assert by_row.metrics == {"m": pytest.approx(1 / 3)}
    assert by_row.scores["m"].values == [1, 0, 0]
    assert read_result("m", {"a": 1, "b": np.float32(2), "c": [1, 2], "d": "x"}, 3).metrics == {"m_a": 1.0, "m_b": 2.0}


@pytest.mark.parametrize(
    ("result", "given"), [([1, 2], "2 numbers"), (None, "a NoneType"), ("good", "a str"), ([[1], [2], [3]], "a list")]
)
def test_what_a_metric_may_not_return(result: Any, given: str) -> None:
    with pytest.raises(UserError) as error:
        read_result("mine", result, 3)
    expected = "evaluation.metrics: mine must return a number, or one for each of the 3 answers, got "
    assert str(error.value) == expected + given


LIBRARY_METRIC = """
import datasets
import evaluate

class Shares(evaluate.Metric):
    def _info(self):
        texts = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=texts)

    def _compute(self, predictions, references):
        same = [prediction == reference for prediction, reference in zip(predictions, references)]
        return {"same": sum(same) / len(same), "count": len(same), "all": same}
"""


@pytest.fixture
def library_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A metric of the evaluate library in a folder, which stands for its place on the hub."""
    evaluate = pytest.importorskip("evaluate")
    (tmp_path / "hub" / "shares").mkdir(parents=True)
    (tmp_path / "hub" / "shares" / "shares.py").write_text(LIBRARY_METRIC)
    load = evaluate.load
    monkeypatch.setattr(evaluate, "load", lambda name: load(str(tmp_path / "hub" / name)))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("library_metric")
def test_a_metric_of_the_library_gives_each_of_its_numbers_a_name(model: LlamaForCausalLM) -> None:
    measured = measurer(metrics=find_metrics(["exact_match", "evaluate:shares"]))
    references = [row["prediction"] for row in measured.predict(model, None)]
    references[-1] = "another"
    known = Dataset.from_list([row | {"reference": text} for row, text in zip(rows(), references, strict=True)])
    actual = measurer(metrics=measured.metrics, rows=known).measure(model, answers=None).metrics
    assert actual.keys() == {"loss", "perplexity", "exact_match", "evaluate_shares_same", "evaluate_shares_count"}
    assert (actual["evaluate_shares_same"], actual["evaluate_shares_count"]) == (pytest.approx(8 / 9), 9)


def test_a_metric_of_the_library_that_cannot_be_had_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal() -> str:
        with pytest.raises(UserError) as error:
            find_metrics(["evaluate:rouge"])
        assert "\n" not in str(error.value)
        return str(error.value)

    monkeypatch.setitem(sys.modules, "evaluate", None)
    assert refusal() == "evaluation.metrics=evaluate:rouge needs the package evaluate; pip install 'qlora[eval]'"
    nowhere = "could not be loaded from the hub"
    for error, said in (
        (FileNotFoundError("no script\nmore"), f"{nowhere}: no script; check the name and the network"),
        (ConnectionError("offline"), f"{nowhere}: offline; check the name and the network"),
        (ImportError("pip install rouge_score."), "evaluate:rouge: pip install rouge_score"),
    ):

        def load(name: str, error: Exception = error) -> None:
            raise error

        monkeypatch.setitem(sys.modules, "evaluate", SimpleNamespace(load=load))
        assert said in refusal()


class Blind(torch.nn.Module):
    """A model that finds every token equally likely, and answers at once."""

    generation_config = SimpleNamespace(eos_token_id=2)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 40))

    def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.nn.functional.pad(input_ids, (0, 1), value=2)


def many_rows(file: Path, count: int) -> Dataset:
    """Rows of 40 tokens in a file, mapped into memory."""
    ids = pa.array([list(range(40))] * 100, pa.list_(pa.int32()))
    texts = pa.array(["x" * 200] * 100)
    lengths = pa.array([40] * 100, pa.int32())
    columns = {
        "input_ids": ids,
        "labels": ids,
        "prompt_ids": ids,
        "length": lengths,
        "prompt": texts,
        "reference": texts,
    }
    batch = pa.record_batch(columns)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        for _ in range(count // 100):
            writer.write_batch(batch)
    return Dataset.from_file(str(file))


@pytest.mark.full
@pytest.mark.parametrize("what", ["loss", "answers"])
def test_memory_does_not_grow_with_the_held_out_rows(tmp_path: Path, what: str) -> None:
    def peak(count: int) -> int:
        """Returns the bytes that Python and Arrow took at most beyond the rows' place in the order of lengths."""
        held_out = measurer(rows=many_rows(tmp_path / f"{count}.arrow", count), batch_size=50,
                            generation=GenerationConfig(batch_size=50))  # fmt: skip
        previous = pa.total_allocated_bytes()
        tracemalloc.start()
        most = 0
        if what == "loss":
            actual = measure_loss(Blind(), held_out.rows, collate=held_out.collate, batch_size=50, device=CPU)
            assert actual["loss"] == pytest.approx(math.log(40), abs=1e-4)
        else:
            plan = dict(enumerate(plan_batches(prompt_lengths(held_out.rows), 50)))
            for _ in held_out.answer(Blind(), held_out.rows, plan):
                most = max(most, pa.total_allocated_bytes() - previous)
            for _ in held_out.records(held_out.rows, (Answer("", 0, "stop") for _ in range(count))):
                most = max(most, pa.total_allocated_bytes() - previous)
        size = tracemalloc.get_traced_memory()[1] + most
        tracemalloc.stop()
        return size

    peak(200)
    small, large = peak(1_000), peak(10_000)
    in_memory = 9_000 * (3 * 40 * 8 + 2 * 200)
    assert large - small < in_memory / 10, (small, large)


def test_exact_match_forgives_white_space_at_the_ends_only() -> None:
    assert exact_match([" a b\n", "ab", "A b"], ["a b", "a b", "a b"]) == [1, 0, 0]


def test_a_plain_loss_by_hand_equals_torchs(model: LlamaForCausalLM) -> None:
    row = rows()[5]
    logits = model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
    expected = F.cross_entropy(logits, torch.tensor(row["labels"][1:]), ignore_index=-100).item()
    actual = measure_loss(model, Dataset.from_list([row]), collate=Collator(0), batch_size=1, device=CPU)["loss"]
    assert actual == pytest.approx(expected, rel=1e-6)
