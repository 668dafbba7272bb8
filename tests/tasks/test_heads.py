"""Runs that train a head on whole texts, from rows to what they leave: labels, measures, plain libraries."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from qlora.config.compose import compose
from qlora.errors import ConfigError, DataError
from qlora.models.model_files import locate
from qlora.run import Run

QUICK = [
    *("data=local", "data.eval_dataset_size=12", "evaluation=loss", "recipe=none", "lora.r=8", "device=cpu"),
    *("trainer.max_steps=4", "trainer.logging_steps=2", "trainer.eval_steps=2", "trainer.save_steps=2"),
    *("trainer.per_device_train_batch_size=4", "trainer.gradient_accumulation_steps=1", "trainer.learning_rate=2e-3"),
    *("quantization=fp32", "trainer.optim=adamw_torch", "trainer.warmup_steps=0", "lora.dropout=0.1"),
    *("trainer.gradient_checkpointing=false", "lora.target_modules=[q_proj,v_proj,up_proj]"),
]
WORDS = {
    "animal": ["cat", "dog", "cow", "horse", "duck", "frog"],
    "fruit": ["apple", "pear", "plum", "cherry", "lemon", "grape"],
    "tool": ["hammer", "saw", "drill", "knife", "spoon", "rake"],
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def class_rows(count: int) -> list[dict[str, Any]]:
    """Five words each, of which four are of the class and one is of another, in any order."""
    stream, rows = random.Random(0), list[dict[str, Any]]()
    for _ in range(count):
        label = stream.choice(list(WORDS))
        others = [name for name in WORDS if name != label]
        chosen = [*stream.choices(WORDS[label], k=4), stream.choice(WORDS[stream.choice(others)])]
        stream.shuffle(chosen)
        rows.append({"text": " ".join(chosen), "label": label})
    return rows


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    chosen = [*QUICK, *overrides]
    return Run(compose(chosen), folder, overrides=chosen).execute()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("rows") / "rows.jsonl", class_rows(80))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("classifier")
    return folder, run(folder, "head=classify", f"data.path={rows}")


@pytest.mark.slow
def test_a_classifier_learns_far_more_than_the_most_frequent_class(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", class_rows(400))
    result = run(tmp_path / "run", "head=classify", f"data.path={path}", "data.eval_dataset_size=60",
                 "trainer.max_steps=50", "trainer.per_device_train_batch_size=16", "trainer.eval_steps=50",
                 "lora.dropout=0", "lora.target_modules=all-linear", "task.predict=false")  # fmt: skip
    assert result["intervals"]["eval_accuracy"][0] > 0.6
    assert result["metrics"]["base_eval_accuracy"] < 0.5
    assert result["gains"]["accuracy"]["low"] > 0.2


def plain_logits(folder: Path, texts: list[str], *, side: str) -> torch.Tensor:
    """Returns what plain transformers and PEFT make of texts in one batch, padded on a side."""
    adapter = str(folder / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(
        locate("tiny"), config=AutoConfig.from_pretrained(adapter), dtype=torch.float32
    )
    model = PeftModel.from_pretrained(base, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(adapter, padding_side=side)
    with torch.no_grad():
        return model(**tokenizer(texts, padding=True, return_tensors="pt")).logits


def test_a_classifier_is_measured_beside_the_most_frequent_class_with_intervals(
    classifier: tuple[Path, dict[str, Any]],
) -> None:
    folder, result = classifier
    metrics, records = result["metrics"], read(folder / "predictions.jsonl")
    truth = [record["reference"] for record in records]
    most = max(truth.count(name) for name in WORDS)
    assert metrics["base_eval_accuracy"] == most / len(truth)
    right = sum(record["prediction"] == record["reference"] for record in records)
    assert metrics["eval_accuracy"] == right / len(records)
    assert all(sum(record["scores"].values()) == pytest.approx(1, abs=1e-5) for record in records)
    for name in ("loss", "accuracy", "macro_f1"):
        low, high = result["intervals"][f"eval_{name}"]
        assert low <= metrics[f"eval_{name}"] <= high
        assert name in result["gains"]
    assert "eval_perplexity" not in metrics


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("side", ["right", "left"])
def test_plain_transformers_and_peft_say_the_same_with_padding_on_either_side(
    classifier: tuple[Path, dict[str, Any]], side: str
) -> None:
    folder, _ = classifier
    records = read(folder / "predictions.jsonl")
    logits = plain_logits(folder, [record["input"] for record in records], side=side)
    settings = AutoConfig.from_pretrained(folder / "adapter")
    names = [settings.id2label[index] for index in range(3)]
    assert names == sorted(WORDS)
    for row, record in zip(logits.softmax(1).tolist(), records, strict=True):
        assert row == pytest.approx([record["scores"][name] for name in names], rel=1e-4, abs=1e-5)


def test_the_head_is_saved_in_32_bits_and_evaluate_and_predict_say_the_same(
    classifier: tuple[Path, dict[str, Any]], rows: Path, tmp_path: Path
) -> None:
    folder, result = classifier
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.score.weight"].dtype is torch.float32
    command = ["head=classify", f"data.path={rows}", f"adapter={folder}"]
    again = run(tmp_path / "again", *command, "task=evaluate")
    for name in ("eval_loss", "eval_accuracy", "eval_macro_f1", "base_eval_loss"):
        assert again["metrics"][name] == pytest.approx(result["metrics"][name], rel=1e-5)
    run(tmp_path / "said", *command, "task=predict")
    first, second = (read(path / "predictions.jsonl") for path in (folder, tmp_path / "said"))
    assert [row["prediction"] for row in first] == [row["prediction"] for row in second]


def test_a_resumed_run_trains_the_same_head_to_the_bit(
    classifier: tuple[Path, dict[str, Any]], rows: Path, tmp_path: Path
) -> None:
    command = ["head=classify", f"data.path={rows}", "trainer.lr_scheduler_type=constant"]
    weights = []
    for name, parts in (("whole", ["4"]), ("parts", ["2", "4"])):
        for steps in parts:
            run(tmp_path / name, *command, f"trainer.max_steps={steps}", "resume=force")
        weights.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_what_writes_texts_is_refused_with_a_head(
    classifier: tuple[Path, dict[str, Any]], rows: Path, tmp_path: Path
) -> None:
    folder, _ = classifier
    loose = shutil.copytree(folder / "adapter", tmp_path / "loose")  # without the config of its run
    for task in ("merge", "serve", "chat", "export"):
        with pytest.raises(ConfigError, match=f"task={task} needs a model that predicts the next token"):
            compose([*QUICK, "head=classify", f"data.path={rows}", f"task={task}", f"adapter={folder}"])
    with pytest.raises(DataError, match="is a classifier: it scores texts and answers nothing; task=chat needs a"):
        run(tmp_path / "chat", f"data.path={rows}", "task=chat", f"adapter={loose}")
    with pytest.raises(DataError, match="is a classifier; add head=classify, or name another adapter"):
        run(tmp_path / "other", f"data.path={rows}", "task=evaluate", f"adapter={loose}")


def test_a_regression_learns_several_numbers_and_16_bits_compute_as_a_plain_model_does(tmp_path: Path) -> None:
    made = [{"text": row["text"], "kind": len(row["label"]), "length": len(row["text"]) / 10}
            for row in class_rows(40)]  # fmt: skip
    path = write(tmp_path / "rows.jsonl", made)
    metrics = run(tmp_path / "run", "head=regress", f"data.path={path}", "data.label=[kind,length]")["metrics"]
    assert {"eval_pearson", "eval_spearman", "base_eval_loss"} <= {*metrics}
    assert metrics["base_eval_spearman"] == 0  # the mean says nothing of an order
    records = read(tmp_path / "run" / "predictions.jsonl")
    logits = plain_logits(tmp_path / "run", [record["input"] for record in records], side="right")
    assert logits.shape == (12, 2)
    for row, record in zip(logits.tolist(), records, strict=True):
        assert row == pytest.approx(record["scores"], rel=1e-4, abs=1e-5)


def data_of(tmp_path: Path, made: list[dict[str, Any]], *overrides: str) -> Any:
    path = write(tmp_path / "rows.jsonl", made)
    return Run(compose([*QUICK, f"data.path={path}", *overrides]), tmp_path / "run").session


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([2, 10, 1], ("1", "2", "10")),
        ([True, False, True], ("false", "true")),
        (["b", " a ", "b"], ("a", "b")),
        ([1.0, 0.0, 1.0], ("0", "1")),
    ],
)
def test_classes_are_names_or_whole_numbers_in_order(tmp_path: Path, labels: list[Any], expected: tuple[str]) -> None:
    made = [{"text": f"text {index}", "labels": labels[index % len(labels)]} for index in range(24)]
    session = data_of(tmp_path, made, "head=classify", "data.eval_dataset_size=0")
    assert session.head.labels == expected
    assert int(session.collator()([session.data.train[0]])["truth"]) == expected.index(session.data.train[0]["label"])


def test_class_labels_of_a_data_set_keep_their_names_and_order(tmp_path: Path) -> None:
    kind = ClassLabel(names=["negative", "neutral", "positive"])
    made = {"sentence1": [f"a {i}" for i in range(30)], "sentence2": ["b"] * 30, "label": [i % 3 for i in range(30)]}
    features = Features({"sentence1": Value("string"), "sentence2": Value("string"), "label": kind})
    Dataset.from_dict(made, features=features).save_to_disk(str(tmp_path / "set"))
    chosen = [*QUICK, f"data.path={tmp_path / 'set'}", "head=classify"]
    session = Run(compose(chosen), tmp_path / "run").session
    assert session.head.labels == ("negative", "neutral", "positive")
    assert session.data.eval is not None
    assert session.data.eval["prompt"][0].endswith("\nb")


LABELLED = [{"text": f"text {index}", "label": "ab"[index % 2]} for index in range(24)]


@pytest.mark.parametrize(
    ("made", "overrides", "message"),
    [
        ([{"text": "a"}] * 24, ["head=classify"], r"has the columns text, and none of them is label, labels, class: a "
         r"head learns a label of each text; name its column with data\.label=COLUMN"),
        ([{"id": 1, "label": "a"}] * 24, ["head=classify"], r"none that is known to hold a text; name it with "
         r"data\.columns\.text=COLUMN"),
        ([{"text": f"t {i}", "label": "a"} for i in range(24)], ["head=classify"], "are labelled 'a', and a head "
         "learns to tell classes apart; add rows of another class"),
        (LABELLED, ["head=regress"], "row 1: column label holds 'a', and what is learned are numbers; choose "
         "head=classify for names"),
        ([{"text": "t", "label": 0.5}] * 24, ["head=classify"], "row 1: column label holds 0.5, and a class is a name "
         "or a whole number; choose head=regress"),
        ([{"text": "t", "label": ["a", "b"]}] * 24, ["head=classify"], "column label holds a list, and a class is"),
        ([*LABELLED, {"text": "t", "label": None}], ["head=classify", "data.eval_dataset_size=0"],
         "row 25: column label holds no label; label the row, or leave it out"),
        (LABELLED, ["head=classify", "data.label=lable"], r"data\.label=lable: data\.path has no such column \(did "
         r"you mean label\?\)"),
        (LABELLED, ["head=classify", "data.label=[label,text]"], "gives a text one class, from one column"),
        (LABELLED, ["head=classify", "head.labels=[a,c]"], "head.labels=a, c leaves out 'b', which rows to train on"),
        (LABELLED, ["head=classify", "data.format=alpaca"], "data.format=alpaca says what is asked and answered"),
        ([{"text": "t", "score": [1, 2, 3][: 1 + index % 2]} for index in range(24)], ["head=regress"],
         r"a row holds \d numbers and the first one \d \(number \d+ of the rows"),
    ],
)  # fmt: skip
def test_rows_that_a_head_cannot_learn_are_refused(
    tmp_path: Path, made: list[dict[str, Any]], overrides: list[str], message: str
) -> None:
    with pytest.raises((DataError, ConfigError), match=message):
        _ = data_of(tmp_path, made, *overrides).head


def test_a_held_out_class_that_is_not_trained_is_refused(tmp_path: Path) -> None:
    held_out = write(tmp_path / "held.jsonl", [{"text": "x", "label": "a"}, {"text": "y", "label": "z"}])
    session = data_of(tmp_path, LABELLED, "head=classify", f"data.eval_path={held_out}", "data.eval_dataset_size=null")
    with pytest.raises(DataError, match=r"held-out row 2 is labelled 'z', a class that is not one of those trained"):
        _ = session.measurer


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["head=classify", "loss=dpo"], "head=classify says something of whole texts, and loss=dpo is no loss of it"),
        (
            ["head=regress", "loss=sft"],
            r"leave loss out, which takes loss=regress, or write loss=reward, loss=absolute",
        ),
        (["loss=absolute"], "is a loss of head=regress; write head=regress loss=absolute$"),
        (["loss=classify"], "loss=classify is a loss of head=classify; write head=classify$"),
        (["head=classify", "data.packing=true"], "joins rows into one, and head=classify reads the last token of each"),
        (["head=classify", "lora=none"], "head=classify saves a head beside an adapter, and lora=none trains all"),
        (["head=classify", "lora.start=x"], "head=classify begins with a fresh adapter and head"),
        (["head=classify", "evaluation=exact-match"], "compares generated answers, and head=classify writes none"),
        (["head=classify", "evaluation=mmlu"], "evaluation=mmlu asks a model for its next token"),
        (["head=classify", "data.train_on=all"], "says which tokens have a loss, and head=classify has one for each"),
        (["head=classify", "data.source_max_len=9"], "cuts prompts and answers apart, and head=classify reads whole"),
        (["head=classify", 'model.new_tokens=["<x>"]'], "trains rows of the output layer, and head=classify has none"),
        (["head=classify", "head.labels=[a]"], "head.labels must be a list of at least two different names"),
        (["head=classify", "head.labels=[a,a]"], "head.labels must be a list of at least two different names"),
        (["head=regress", "head.labels=[a,b]"], r"head.labels=\['a', 'b'\] is read by head=classify"),
        (["head.dtype=bf16"], "head.dtype=bf16 is that of a head, and head=causal trains none"),
        (["data.label=x"], "data.label='x' is read with head=classify, head=regress or head=embed"),
        (["head=classify", "objective=eval_perplexity"], "objective='eval_perplexity' is not a metric of this run"),
        (["head=classify", "trainer.keep_metric=eval_spearman"], "is not measured at trainer.eval_steps"),
    ],
)
def test_what_contradicts_a_head_is_refused_when_the_config_is_composed(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose([*QUICK, "data.path=rows.jsonl", *overrides])


def test_a_head_in_16_bits_computes_in_them_from_weights_in_32() -> None:
    from qlora.step.forward_passes import outputs_of_head

    base, hidden = torch.nn.Module(), torch.randn(3, 8)
    base.add_module("score", torch.nn.Linear(8, 2, bias=False))
    weight = base.get_submodule("score").weight
    outputs = outputs_of_head(base, hidden, bf16=True)
    assert torch.equal(outputs, (hidden.bfloat16() @ weight.bfloat16().t()).float())
    assert torch.equal(outputs_of_head(base, hidden), hidden @ weight.t())
    outputs.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype is torch.float32


def pair_rows(count: int) -> list[dict[str, Any]]:
    """Three things of a kind, the same in another order, and things of another kind."""
    stream, rows = random.Random(0), list[dict[str, Any]]()
    for _ in range(count):
        kind, other = stream.sample(list(WORDS), 2)
        things = stream.sample(WORDS[kind], 3)
        wrong = stream.sample(WORDS[other], 3)
        rows.append({"anchor": " ".join(things), "positive": " ".join(things[::-1]), "negative": " ".join(wrong)})
    return rows


@pytest.fixture(scope="module")
def triplets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("rows") / "triplets.jsonl", pair_rows(60))


@pytest.fixture(scope="module", params=["last", "mean"])
def embedder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, triplets: Path) -> Path:
    folder: Path = tmp_path_factory.mktemp("embedder")
    result = run(folder, "head=embed", f"data.path={triplets}", f"head.pooling={request.param}")
    metrics = result["metrics"]
    assert {"eval_mrr", "eval_ndcg", "base_eval_mrr", "base_eval_ndcg"} <= {*metrics}
    assert metrics["eval_loss"] < metrics["base_eval_loss"]
    assert not {"eval_pearson", "eval_perplexity"} & {*metrics}
    return folder


def test_sentence_transformers_and_plain_transformers_make_the_same_vectors(embedder: Path, triplets: Path) -> None:
    records = read(embedder / "predictions.jsonl")
    vectors = torch.tensor([record["vectors"][0] for record in records])
    assert vectors.norm(dim=1).tolist() == pytest.approx([1] * len(records), abs=1e-5)
    texts = [record["input"] for record in records]
    tokenizer = AutoTokenizer.from_pretrained(embedder / "adapter")
    plain = AutoModel.from_pretrained(embedder / "adapter", dtype=torch.float32).eval()
    mode = json.loads((embedder / "adapter" / "1_Pooling" / "config.json").read_text())["pooling_mode"]
    for text, vector in zip(texts[:4], vectors, strict=False):
        with torch.no_grad():
            hidden = plain(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        pooled = hidden[-1] if mode == "lasttoken" else hidden.mean(0)
        assert torch.allclose(torch.nn.functional.normalize(pooled, dim=0), vector, atol=1e-5)
    library = pytest.importorskip("sentence_transformers")
    precision = {"dtype": torch.float32}  # the base has 16 bits on disk
    model = library.SentenceTransformer(str(embedder / "adapter"), device="cpu", model_kwargs=precision)
    made = model.encode(texts)
    assert torch.allclose(torch.from_numpy(made), vectors, atol=1e-5)


def test_a_model_of_embeddings_is_measured_again_and_pools_as_it_was_trained(
    embedder: Path, triplets: Path, tmp_path: Path
) -> None:
    trained = json.loads((embedder / "result.json").read_text())["metrics"]
    again = run(tmp_path / "again", f"data.path={triplets}", "task=evaluate", f"adapter={embedder}")["metrics"]
    for name in ("eval_loss", "eval_mrr", "base_eval_loss", "base_eval_ndcg"):
        assert again[name] == pytest.approx(trained[name], rel=1e-4)
    loose = shutil.copytree(embedder / "adapter", tmp_path / "loose")
    other = "last" if "mean" in (loose / "1_Pooling" / "config.json").read_text() else "mean"
    with pytest.raises(DataError, match=r"was trained with head\.pooling=\w+; set it so"):
        run(tmp_path / "other", "head=embed", f"head.pooling={other}", f"data.path={triplets}", "task=evaluate",
            f"adapter={loose}")  # fmt: skip


def test_pairs_with_scores_are_measured_by_correlations(tmp_path: Path) -> None:
    made = [{"sentence1": row["anchor"], "sentence2": row[("positive", "negative")[index % 2]], "score": 1 - index % 2}
            for index, row in enumerate(pair_rows(40))]  # fmt: skip
    path = write(tmp_path / "rows.jsonl", made)
    metrics = run(tmp_path / "run", "head=embed", f"data.path={path}", "trainer.max_steps=2")["metrics"]
    assert {"eval_pearson", "eval_spearman", "base_eval_spearman"} <= {*metrics}
    assert "eval_mrr" not in metrics
    with pytest.raises(ConfigError, match="objective=eval_ndcg: the held-out rows have scores, of which correlations"):
        _ = data_of(tmp_path, made, "head=embed", "objective=eval_ndcg").measurer


@pytest.mark.parametrize(
    ("made", "overrides", "message"),
    [
        ([{"text": f"t {i}"} for i in range(24)], [], "head=embed learns from texts that belong together; name them"),
        ([{"anchor": "a", "positive": "b", "negative": "c", "score": 1}] * 24, [], "has both score and negative"),
        ([{"anchor": "a", "positive": ""}] * 24, [], "row 1: column positive holds no text"),
        ([{"anchor": "a", "positive": "b", "score": 5}] * 24, [], "row 1: column score holds 5, and the score of a "
         "pair is a cosine, from -1 to 1; divide them"),
        ([{"anchor": "a", "positive": ["b"]}] * 24, [], r"column positive holds \['b'\], and a head reads texts"),
        (pair_rows(24), ["data.label=negative"], "has both negative and|column negative holds"),
        ([{"anchor": f"a {i}", "positive": "b"} for i in range(24)], ["trainer.per_device_train_batch_size=1"],
         "leaves a pair alone, and head=embed learns from the texts of the other rows"),
    ],
)  # fmt: skip
def test_rows_that_give_no_embeddings_are_refused(
    tmp_path: Path, made: list[dict[str, Any]], overrides: list[str], message: str
) -> None:
    with pytest.raises((DataError, ConfigError), match=message):
        _ = data_of(tmp_path, made, "head=embed", *overrides).head


@pytest.mark.parametrize("head", ["classify", "embed"])
def test_fused_attention_trains_a_head_as_the_plain_step_does(
    head: str, rows: Path, triplets: Path, tmp_path: Path
) -> None:
    losses = []
    for fused in ("false", "true"):
        run(tmp_path / fused, f"head={head}", f"data.path={rows if head == 'classify' else triplets}",
            f"trainer.fused_attention={fused}", "lora.dropout=0", "trainer.max_steps=2", "trainer.logging_steps=1",
            "trainer.eval_steps=null", "trainer.keep=last", "task.evaluate=false", "task.predict=false")  # fmt: skip
        history = json.loads((tmp_path / fused / "history.json").read_text())
        losses.append([entry["loss"] for entry in history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
