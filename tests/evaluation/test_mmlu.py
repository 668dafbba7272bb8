"""MMLU: the original's prompts to the byte, whole solved questions left out, the likeliest letter, subjects that count
the same."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from qlora.config.compose import compose
from qlora.data.ingest.row_files import read_rows
from qlora.errors import UserError
from qlora.evaluation.measure import Suite, evaluation_mode
from qlora.evaluation.mmlu import LETTERS, Mmlu, Parts, Question, load_questions, read_question, render_questions
from qlora.models.tokenizer import load_tokenizer
from qlora.run import Run
from qlora.session import Session

REAL = Path(__file__).parents[3] / "shared" / "data"
MMLU = REAL / "mmlu"
ZERO_SHOT, FIVE_SHOT = MMLU / "zero_shot_mmlu_val.json", MMLU / "five_shot_mmlu_val.jsonl.gz"
STORIES = REAL / "models" / "TinyStories-656K"
needs_real = pytest.mark.skipif(not MMLU.is_dir(), reason="no shared/data beside the checkout")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(compose([]).model)


def row(subject: str, question: str, answer: int = 0) -> dict[str, Any]:
    """A row in the layout of the hub's set."""
    return {"subject": subject, "question": question, "choices": ["red", "dog", "cup", "ten"], "answer": answer}


def invented(count: int = 24, shots: int = 2) -> list[Question]:
    """Questions on two subjects, of which the first has three times as many, of very different lengths."""
    subjects = ["the_colours" if number % 4 else "the_animals" for number in range(count)]
    asked = [row(name, f"{'And ' * (number * 5 % 17)}which is {number}?", number % 3) for number, name in
             enumerate(subjects)]  # fmt: skip
    solved = [row(name, f"Which one is {word}?", 1) for name in set(subjects) for word in ("it", "blue", "a dog")]
    return render_questions(asked, solved, shots)


def build(questions: list[Question], tokenizer: Any, **changes: Any) -> Mmlu:
    options = {"split": "val", "source_max_len": 2048, "context": 512, "pad_token_id": 0, "batch_size": 8}
    return Mmlu(questions, tokenizer=tokenizer, device=CPU, **options | changes)


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=1600,
        num_key_value_heads=1, max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


# Prompts


def real_rows(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def csv_rows(split: str, subject: str) -> list[dict[str, Any]]:
    path = MMLU / "csv" / split / f"{subject}_{split}.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {"subject": subject, "question": line["question"], "choices": [line[f"choice{n}"] for n in range(4)],
             "answer": int(line["answer"])}
            for line in csv.DictReader(file)
        ]  # fmt: skip


LAYOUT = re.compile(r".*?\n\n(.*)\nA\. (.*)\nB\. (.*)\nC\. (.*)\nD\. (.*)\nAnswer:", re.DOTALL)


@needs_real
def test_the_hub_s_rows_are_rendered_as_the_original_s_files_to_the_byte() -> None:
    zero, five = real_rows(ZERO_SHOT), real_rows(FIVE_SHOT)
    asked = []
    for line in zero:
        question, *choices = LAYOUT.fullmatch(line["input"]).groups()  # type: ignore[union-attr]
        answer = "ABCD".index(line["output"])
        asked.append({"subject": line["subject"], "question": question, "choices": choices, "answer": answer})
    solved = [solved for path in sorted((MMLU / "csv" / "dev").iterdir())
              for solved in csv_rows("dev", path.stem.removesuffix("_dev"))]  # fmt: skip
    assert [tuple(line.values()) for line in zero] == render_questions(asked, solved, 0)
    known = {line["subject"] for line in solved}
    rendered = [question for question in render_questions(asked, solved, 5) if question.subject in known]
    assert len(rendered) > 1000
    assert [tuple(line.values()) for line in five if line["subject"] in known] == rendered


def test_a_question_is_laid_out_as_by_mmlu_s_authors() -> None:
    [question] = render_questions([row("the_colours", "Which?", 2)], [row("the_colours", "What?", 3)], 5)
    assert question == Question(
        "the_colours",
        "The following are multiple choice questions (with answers) about  the colours.\n\n"
        "What?\nA. red\nB. dog\nC. cup\nD. ten\nAnswer: D\n\n"
        "Which?\nA. red\nB. dog\nC. cup\nD. ten\nAnswer:",
        "C",
    )


def test_solved_questions_are_those_of_the_subject_and_no_more_than_asked_for() -> None:
    solved = [row("a", "of a?"), row("b", "1 of b?"), row("b", "2 of b?"), row("b", "3 of b?")]
    asked, nothing_solved = render_questions([row("b", "b?"), row("c", "c?")], solved, 2)
    assert re.findall(r".*\?", asked.text) == ["1 of b?", "2 of b?", "b?"]
    assert re.findall(r".*\?", nothing_solved.text) == ["c?"]


# Shortening


def test_too_long_a_prompt_loses_whole_solved_questions_first_the_first(tokenizer: Any, caplog: Any) -> None:
    solved = [row("a", f"{word} here?") for word in ("first", "second", "third")]
    questions = render_questions([row("a", "which one?"), row("a", "so " * 300 + "which?")], solved, 3)
    whole = build(questions, tokenizer, context=2048).prompts
    with caplog.at_level(logging.INFO):
        mmlu = build(questions, tokenizer, source_max_len=len(whole[0].ids) - 1)
    shorter = render_questions([row("a", "which one?")], solved[1:], 3)[0].text
    assert mmlu.prompts[0].ids[1:].tolist() == tokenizer(shorter, add_special_tokens=False)["input_ids"]
    assert len(mmlu.prompts[1].ids) == len(whole[0].ids) - 1
    assert mmlu.prompts[1].ids[0] == tokenizer.bos_token_id
    assert (mmlu.prompts[1].ids[1:] == whole[1].ids[-(len(whole[0].ids) - 2) :]).all()
    assert caplog.messages == [
        f"MMLU: 2 of 2 prompts are longer than evaluation.source_max_len={len(whole[0].ids) - 1}: 1 lose solved "
        "questions, 1 the beginning of their own"
    ]


def test_what_just_fits_is_kept_whole_and_nothing_is_said(tokenizer: Any, caplog: Any) -> None:
    [prompt] = build(invented(1), tokenizer).prompts
    with caplog.at_level(logging.INFO):
        [again] = build(invented(1), tokenizer, source_max_len=len(prompt.ids)).prompts
    assert (again.ids == prompt.ids).all()
    assert not caplog.messages


def test_the_model_s_context_limits_too_and_leaves_room_for_the_answer(tokenizer: Any, caplog: Any) -> None:
    with caplog.at_level(logging.INFO):
        mmlu = build(invented(), tokenizer, context=100)
    assert 90 < max(len(prompt.ids) + prompt.rest for prompt in mmlu.prompts) <= 100
    assert "longer than the model's context of 100 tokens" in caplog.text


@pytest.mark.parametrize("shots", [0, 1, 3])
def test_a_blank_line_inside_of_a_question_is_no_border_between_questions(shots: int) -> None:
    solved = [row("a", f"Read:\n\nA. {word}\n\nand tell?") for word in ("x", "y", "z")]
    [question] = render_questions([row("a", "Two parts:\n\nfirst\n\nsecond?")], solved, shots)
    parts = Parts.of(question.text)
    assert parts.text == question.text
    assert len(parts.shots) == shots
    assert parts.question.endswith("Two parts:\n\nfirst\n\nsecond?\nA. red\nB. dog\nC. cup\nD. ten\nAnswer:")
    assert all(shot.startswith("Read:") and shot.endswith("Answer: A\n\n") for shot in parts.shots)


def test_a_file_without_a_heading_has_solved_questions_all_the_same() -> None:
    text = "What?\nA. red\nAnswer: B\n\nWhy?\nA. dog\nAnswer: C\n\nWho?\nA. cup\nAnswer:"
    assert Parts.of(text) == Parts(
        "", ["What?\nA. red\nAnswer: B\n\n", "Why?\nA. dog\nAnswer: C\n\n"], "Who?\nA. cup\nAnswer:"
    )


# Answers


def reference(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> list[str]:
    """Asks one question at a time: the letter with the highest logit behind the prompt."""
    actual = []
    for line in rows:
        ids, text = [tokenizer.bos_token_id] * 600, line["input"]
        fewer: str | None = text
        while len(ids) > 512 and fewer is not None:
            text = fewer
            ids = [tokenizer.bos_token_id, *tokenizer(f"{text} A", add_special_tokens=False)["input_ids"][:-1]]
            solved = re.fullmatch(r"(.*?\n\n).*?\nAnswer: [ABCD]\n\n(.*)", text, re.DOTALL)
            fewer = solved[1] + solved[2] if solved else None
        ids = ids[:1] + ids[1:][-511:]
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        letters = [tokenizer(f"{text} {letter}", add_special_tokens=False)["input_ids"][-1] for letter in "ABCD"]
        actual.append("ABCD"[int(logits[letters].argmax())])
    return actual


@needs_real
@pytest.mark.full
@pytest.mark.parametrize("path", [ZERO_SHOT, FIVE_SHOT], ids=["zero shot", "five shot"])
def test_a_real_model_gives_the_answers_of_a_plain_loop_to_the_item(path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    questions = [read_question(line, source) for line, source in read_rows(str(path), key="evaluation.path")]
    records = build(questions, tokenizer).measure(model).records
    assert len(records) == 1531
    assert [record["prediction"] for record in records] == reference(model, tokenizer, real_rows(path))


@pytest.mark.parametrize(("batch_size", "shots"), [(1, 2), (8, 0), (8, 3), (64, 2)])
def test_answers_are_those_of_a_plain_loop_whatever_the_batch(tokenizer: Any, batch_size: int, shots: int) -> None:
    questions, model = invented(40, shots), small_model()
    records = build(questions, tokenizer, batch_size=batch_size).measure(model).records
    rows = [{"input": question.text} for question in questions]
    assert [record["prediction"] for record in records] == reference(model, tokenizer, rows)


class Always(torch.nn.Module):
    """A model that finds one token more likely than all others, by `margin` nats."""

    def __init__(self, token: int, margin: float) -> None:
        super().__init__()
        self.token, self.margin = token, margin

    def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, 1600)
        logits[..., self.token] = self.margin
        return SimpleNamespace(logits=logits)


def test_every_subject_counts_the_same_in_the_accuracy_and_every_question_in_the_loss(tokenizer: Any) -> None:
    mmlu = build(invented(24, 0), tokenizer)
    [letter] = mmlu.prompts[0].answers[0]
    measured = mmlu.measure(Always(letter, 3.0))
    right = {name: [q.answer == "A" for q in mmlu.questions if q.subject == name]
             for name in ("the_animals", "the_colours")}  # fmt: skip
    shares = {name: sum(values) / len(values) for name, values in right.items()}
    assert {len(values) for values in right.values()} == {6, 18}
    assert measured.metrics["mmlu_val_accuracy"] == pytest.approx(sum(shares.values()) / 2)
    for name, fraction in shares.items():
        assert measured.metrics[f"mmlu_val_accuracy_{name}"] == pytest.approx(fraction)
        assert len(measured.scores[f"mmlu_val_accuracy_{name}"].values) == len(right[name])
    rest = torch.tensor([3.0, *[0.0] * 1599]).logsumexp(0).item()
    count = sum(map(sum, right.values()))
    assert measured.metrics["mmlu_val_loss"] == pytest.approx((count * (rest - 3) + (24 - count) * rest) / 24)
    assert measured.intervals()["mmlu_val_accuracy"][0] < measured.metrics["mmlu_val_accuracy"]


def test_a_subject_with_blanks_and_signs_becomes_the_end_of_a_metric_s_name(tokenizer: Any) -> None:
    questions = [Question("U.S. history", "Which?\nAnswer:", "A"), Question("U.S. history", "What?\nAnswer:", "B")]
    metrics = build(questions, tokenizer).measure(small_model()).metrics
    assert set(metrics) == {"mmlu_val_accuracy", "mmlu_val_loss", "mmlu_val_accuracy_U_S_history"}


def test_a_record_holds_the_likelihood_of_every_letter(tokenizer: Any) -> None:
    mmlu = build(invented(5), tokenizer)
    suite: Suite = mmlu
    records = suite.measure(small_model()).records
    for record, prompt, question in zip(records, mmlu.prompts, mmlu.questions, strict=True):
        assert list(record) == ["subject", "prediction", "reference", "log_likelihoods", "prompt_tokens"]
        assert (record["subject"], record["reference"]) == (question.subject, question.answer)
        likelihoods = record["log_likelihoods"]
        assert record["prediction"] == max(LETTERS, key=likelihoods.__getitem__)
        assert sum(torch.tensor(list(likelihoods.values())).exp()) <= 1
        assert record["prompt_tokens"] == len(prompt.ids)


def test_measuring_twice_gives_equal_numbers_and_no_gain_of_a_model_over_itself(tokenizer: Any) -> None:
    mmlu, model = build(invented(), tokenizer), small_model()
    with evaluation_mode(model):
        first, second = mmlu.measure(model), mmlu.measure(model)
    assert first == second
    assert second.gains(first)["mmlu_val_accuracy"].value == 0


# Where questions come from


def config(*overrides: str) -> Any:
    return compose(["evaluation=mmlu", *overrides]).evaluation


def from_file(path: Path, *overrides: str) -> list[Question]:
    return load_questions(
        config(f"evaluation.path={path}", *overrides),
        read_file=lambda name: read_rows(name, key="evaluation.path"),
        load_split=lambda split: pytest.fail("a file was named"),
    )


LINES = [{"subject": "a", "input": f"Which is {number}?\nAnswer:", "output": "ABCD"[number % 4]} for number in range(6)]


@pytest.mark.parametrize("form", ["array.json", "lines.json", "lines.jsonl.gz"])
def test_a_file_is_an_array_or_an_object_a_line_gzipped_or_not(tmp_path: Path, form: str) -> None:
    path = tmp_path / form
    text = json.dumps(LINES) if "array" in form else "".join(json.dumps(line) + "\n" for line in LINES)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    assert from_file(path) == [tuple(line.values()) for line in LINES]
    assert from_file(path, "evaluation.max_samples=2") == [tuple(line.values()) for line in LINES[:2]]


NO_LETTER = "line 2: 'output' must be the letter of the right choice, A, B, C or D"


def without(name: str) -> dict[str, str]:
    return {key: value for key, value in LINES[0].items() if key != name}


@pytest.mark.matrix(4)
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"subject": "a", "input"', "line 2: broken JSON ("),
        (without("input"), "line 2: no column 'input'; a question needs subject, input, output, and this one has "
                           "subject, output"),
        ({}, "line 2: no column 'subject'; a question needs subject, input, output, and this one has none"),
        (LINES[0] | {"output": "E"}, f"{NO_LETTER}, got 'E'"),
        (LINES[0] | {"output": 0}, f"{NO_LETTER}, got 0"),
        (LINES[0] | {"output": "AB"}, f"{NO_LETTER}, got 'AB'"),
        (LINES[0] | {"input": " \n"}, r"line 2: 'input' must be a text and not empty, got ' \n'"),
        (LINES[0] | {"subject": None}, "line 2: 'subject' must be a text and not empty, got None"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: Any, message: str) -> None:
    path = tmp_path / "my.jsonl"
    path.write_text("\n".join([json.dumps(LINES[0]), line if isinstance(line, str) else json.dumps(line)]))
    with pytest.raises(UserError) as error:
        from_file(path)
    assert str(error.value).startswith(f"evaluation.path={path}, {message}")


def test_a_file_that_is_not_there_or_empty_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mmlu_val.jsonl"
    path.write_text("")
    for wrong, message in (
        (path, f"evaluation.path={path} is empty"),
        (tmp_path / "mmlu_vla.jsonl", f"no such file (did you mean {path}?)"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            from_file(wrong)
    path.write_text("[]")
    with pytest.raises(UserError, match=re.escape(f"evaluation.path={path}: it holds no questions")):
        from_file(path)


@pytest.mark.parametrize(
    ("limits", "key"),
    [
        ({"source_max_len": 3}, "evaluation.source_max_len=3"),
        ({"context": 4}, "the model's context of 4 tokens"),
    ],
)
def test_limits_that_hold_no_question_are_refused(tokenizer: Any, limits: dict[str, int], key: str) -> None:
    with pytest.raises(UserError) as error:
        build(invented(), tokenizer, **limits)
    assert re.fullmatch(
        re.escape(f"{key} leaves no room for a question: its last word, Answer:, takes ")
        + r"\d+ tokens by itself; 2048 is enough for five solved questions before it",
        str(error.value),
    )


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[tuple[Any, ...]]]:
    """A folder in the layout of the hub's set in place of the hub; returns what was asked for."""
    folder, asked = tmp_path / "hub", []
    features = datasets.Features(
        question=datasets.Value("string"),
        subject=datasets.Value("string"),
        choices=datasets.Sequence(datasets.Value("string")),
        answer=datasets.ClassLabel(names=list(LETTERS)),
    )
    splits = {"test": 7, "validation": 3, "dev": 5}
    for name, count in splits.items():
        rows = [row(subject, f"{name} {number}?", number % 4) for subject in ("a_b", "c") for number in range(count)]
        path = folder / "all" / f"{name}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    files = "".join(f"\n  - split: {name}\n    path: all/{name}-*" for name in splits)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: all\n  data_files:{files}\n---\n")
    load = datasets.load_dataset

    def load_dataset(path: str, subset: str, *, split: str, data_files: None, revision: None) -> datasets.Dataset:
        asked.append((path, subset, split))
        return load(str(folder), subset, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return lambda: asked


def suite_of(*overrides: str) -> Mmlu:
    suite = Run(compose(["task=evaluate", "adapter=none", "evaluation=mmlu", *overrides]), "unused").session.suite
    assert isinstance(suite, Mmlu)
    return suite


@pytest.mark.parametrize(
    ("overrides", "count", "shots", "split"),
    [
        ([], 6, 5, "validation"),
        (["evaluation.split=test", "evaluation.shots=2"], 14, 2, "test"),
        (["evaluation.shots=0", "evaluation.max_samples=4"], 4, 0, "validation"),
    ],
)
def test_without_a_file_the_questions_are_the_hub_s(
    hub: Any, overrides: list[str], count: int, shots: int, split: str
) -> None:
    questions = suite_of(*overrides).questions
    assert {asked[:2] for asked in hub()} == {("cais/mmlu", "all")}
    assert {asked[2] for asked in hub()} == {split, "dev"} - ({"dev"} if not shots else set())
    assert len(questions) == count
    first = questions[0]
    assert first.subject == "a_b"
    assert first.answer == "A"
    assert first.text.startswith("The following are multiple choice questions (with answers) about  a b.\n\n")
    assert re.findall(r".*\?", first.text) == [*(f"dev {number}?" for number in range(shots)), f"{split} 0?"]


def test_a_hub_out_of_reach_is_answered_with_a_way_out() -> None:
    with pytest.raises(UserError) as error:
        suite_of()
    assert str(error.value).startswith(
        "evaluation=mmlu: cais/mmlu is not available from the Hugging Face hub (HF_HUB_OFFLINE=1 "
    )
    assert str(error.value).endswith("; or give the questions as a file: evaluation.path=FILE")


# Whole runs


def write_questions(folder: Path) -> Path:
    path = folder / "questions.jsonl"
    lines = [{"subject": q.subject, "input": q.text, "output": q.answer} for q in invented(16, 1)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mmlu")
    overrides = [
        *("evaluation=mmlu", f"evaluation.path={write_questions(folder)}", "lora.r=4", "trainer.max_steps=4"),
        *("trainer.eval_steps=2", "trainer.per_device_train_batch_size=4", "trainer.warmup_steps=0"),
        *("trainer.lr_scheduler_kwargs.num_decay_steps=2", "trainer.learning_rate=0.01", "trainer.logging_steps=1"),
        *("data.max_train_samples=32", "data.max_eval_samples=4", "generation.max_new_tokens=4"),
        "objective=eval_mmlu_val_accuracy",
    ]
    Run(compose(overrides), folder / "run").execute()
    return folder


def test_a_training_measures_it_before_at_each_evaluation_and_after(trained: Path) -> None:
    history = json.loads((trained / "run" / "history.json").read_text())
    logged = {line["step"]: line["eval_mmlu_val_accuracy"] for line in history if "eval_mmlu_val_accuracy" in line}
    assert list(logged) == [2, 4]
    result = json.loads((trained / "run" / "result.json").read_text())
    metrics = result["metrics"]
    assert metrics["eval_mmlu_val_accuracy"] == pytest.approx(logged[4])
    assert metrics["base_eval_mmlu_val_loss"] != metrics["eval_mmlu_val_loss"]
    assert {"eval_mmlu_val_accuracy_the_animals", "eval_loss", "base_eval_mmlu_val_accuracy"} <= metrics.keys()
    assert result["objective"] == metrics["eval_mmlu_val_accuracy"]
    assert result["gains"]["mmlu_val_loss"]["value"] == pytest.approx(
        metrics["eval_mmlu_val_loss"] - metrics["base_eval_mmlu_val_loss"]
    )


def test_evaluate_compares_a_run_s_adapter_with_its_base_and_writes_every_question(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained / "evaluated"
    overrides = ["task=evaluate", f"adapter={trained / 'run'}", "evaluation=mmlu",
                 f"evaluation.path={trained / 'questions.jsonl'}"]  # fmt: skip
    result = Run(compose(overrides), folder, overrides=overrides).execute()
    saved = json.loads((trained / "run" / "result.json").read_text())["metrics"]
    for name in ("eval_mmlu_val_accuracy", "eval_mmlu_val_loss", "base_eval_mmlu_val_loss"):
        assert result["metrics"][name] == pytest.approx(saved[name], rel=1e-4)
    assert not [name for name in result["metrics"] if "mmlu" not in name]
    records = [json.loads(line) for line in (folder / "mmlu.jsonl").read_text().splitlines()]
    assert len(records) == 16
    assert result["paths"]["questions"] == str(folder / "mmlu.jsonl")
    right = [record["prediction"] == record["reference"] for record in records if record["subject"] == "the_animals"]
    assert result["metrics"]["eval_mmlu_val_accuracy_the_animals"] == pytest.approx(sum(right) / len(right))
    text = capsys.readouterr().out
    assert re.search(r"mmlu val accuracy .* % → .* %   95 %: .* %; gain .* points", text)
    assert "the animals" not in text


def test_a_broken_file_of_questions_stops_a_run_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"subject": "a"}\n')
    monkeypatch.setattr(Session, "load_base", lambda run: pytest.fail("a model was loaded"))
    for task in (["task=evaluate", "adapter=none"], ["data.max_train_samples=8", "data.max_eval_samples=2"]):
        with pytest.raises(UserError, match="line 1: no column 'input'"):
            Run(compose([*task, "evaluation=mmlu", f"evaluation.path={path}"]), tmp_path / "run").execute()
