"""Tasks of EleutherAI's harness on the model in memory: the numbers of a few lines by hand, and nothing left behind."""

from __future__ import annotations

import functools
import json
import logging
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerBase

from qlora import adapters
from qlora.config.compose import compose
from qlora.demo.instructions import eval_rows
from qlora.errors import UserError
from qlora.evaluation.lm_harness import LmHarness
from qlora.evaluation.measure import Measurement, evaluation_mode
from qlora.models.tokenizer import load_tokenizer
from qlora.run import Run
from qlora.session import Session
from qlora.text import format_metric, is_detail

tasks = pytest.importorskip("lm_eval.tasks")
MANAGER = tasks.TaskManager

CPU = torch.device("cpu")
PROMPT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response: "

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}, train: {file}}}}}
output_type: multiple_choice
test_split: test
fewshot_split: train
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
GROUP = """
group: all_words
task: [words, few_words]
aggregate_metric_list: [{metric: acc, weight_by_size: %s}]
"""
WRITTEN = """
task: written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: generate_until
test_split: test
num_fewshot: 0
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
metric_list: [{{metric: exact_match}}]
filter_list:
  - {{name: strict-match, filter: [{{function: take_first}}]}}
  - {{name: flexible-extract, filter: [{{function: regex, regex_pattern: "(\\\\w+)"}}, {{function: take_first}}]}}
"""


def questions() -> list[dict[str, Any]]:
    """The held-out rows that ask for one of their words."""
    made = []
    for row in eval_rows():
        tokens = row["input"].split()
        if row["task"] in ("first", "last", "second", "longest") and len(set(tokens)) == len(tokens):
            made.append({"prompt": PROMPT.format(**row), "choices": tokens, "answer": tokens.index(row["output"])})
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks on two local files, and a group of two of them."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in (("words", questions()), ("few_words", questions()[:7])):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(CHOICE.format(name=name, file=file))
    (folder / "written.yaml").write_text(WRITTEN.format(file=folder / "few_words.jsonl"))
    (folder / "all_words.yaml").write_text(GROUP % "false")
    return folder


@pytest.fixture(scope="module")
def model() -> Any:
    """The embedded model in fp32 with an adapter that says something else."""
    base = Run(compose(["quantization=fp32"]), "unused").session.load_base()
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    return adapted


@pytest.fixture(autouse=True)
def own_tasks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the harness's 14,000 tasks out, whose list takes it seconds to make."""
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(MANAGER, include_defaults=False))


def harness(folder: Path | None, *names: str, batch_size: int = 8, **fields: Any) -> LmHarness:
    overrides = ["evaluation=lm-eval", f"evaluation.tasks=[{','.join(names)}]"]
    overrides += [f"evaluation.{name}={value}" for name, value in fields.items()]
    config = compose(overrides)
    config.evaluation.path = folder and str(folder)
    tokenizer = load_tokenizer(config.model)
    return LmHarness(config.evaluation, tokenizer=tokenizer, batch_size=batch_size, device=CPU)


def measure(suite: LmHarness, model: torch.nn.Module) -> Measurement:
    with evaluation_mode(model):
        return suite.measure(model)


@functools.cache
def embedded_tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(compose([]).model)


def likeliest(model: Any, row: dict[str, Any], *, by_letter: bool = False) -> int:
    """Returns which choice has the largest likelihood, in all or for each of its letters."""
    tokenizer, actual = embedded_tokenizer(), []
    for choice in row["choices"]:
        asked, whole = tokenizer(row["prompt"].rstrip())["input_ids"], tokenizer(row["prompt"] + choice)["input_ids"]
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        total = sum(float(scores[index - 1, whole[index]]) for index in range(len(asked), len(whole)))
        actual.append(total / (len(choice) if by_letter else 1))
    return int(np.argmax(actual))


def test_the_accuracy_is_that_of_a_few_lines_by_hand(model: Any, folder: Path) -> None:
    right = [float(likeliest(model, row) == row["answer"]) for row in questions()]
    by_letter = [float(likeliest(model, row, by_letter=True) == row["answer"]) for row in questions()]
    assert 0 < sum(right) < len(right) > 30
    measured = measure(harness(folder, "words"), model)
    assert measured.metrics == {
        "lm_eval_words_acc": pytest.approx(np.mean(right)),
        "lm_eval_words_acc_norm": pytest.approx(np.mean(by_letter)),
    }
    assert measured.scores["lm_eval_words_acc"].values == right
    assert [record["acc"] for record in measured.records] == right
    assert measured.records[0]["item"] == questions()[0]
    assert measure(harness(folder, "words", batch_size=3), model).metrics == measured.metrics


@pytest.mark.full
def test_the_untuned_base_is_compared_item_by_item(model: Any, folder: Path) -> None:
    suite = harness(folder, "words")
    after = measure(suite, model)
    with model.disable_adapter():
        base = measure(suite, model)
        right = [likeliest(model, row) == row["answer"] for row in questions()]
    assert base.scores["lm_eval_words_acc"].values == right
    assert after.scores["lm_eval_words_acc"] != base.scores["lm_eval_words_acc"]
    gain = after.gains(base)["lm_eval_words_acc"]
    assert gain.value == pytest.approx(after.metrics["lm_eval_words_acc"] - base.metrics["lm_eval_words_acc"])
    assert measure(suite, model).metrics == after.metrics


def test_it_computes_in_the_precision_of_the_run(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    handle = model.get_base_model().lm_head.register_forward_hook(lambda *arguments: seen.append(arguments[2].dtype))
    suite = harness(folder, "few_words")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        measure(suite, model)
    assert set(seen) == {torch.bfloat16}
    measure(suite, model)
    handle.remove()
    assert seen[-1] is torch.float32


def test_only_the_first_items_are_asked_if_so_wanted(model: Any, folder: Path) -> None:
    measured = measure(harness(folder, "words", max_samples=5), model)
    assert len(measured.scores["lm_eval_words_acc"].values) == len(measured.records) == 5


@pytest.mark.parametrize("by_size", [False, True])
def test_a_group_has_its_total_and_its_parts_are_details(model: Any, folder: Path, by_size: bool) -> None:
    (folder / "all_words.yaml").write_text(GROUP % str(by_size).lower())
    measured = measure(harness(folder, "all_words"), model)
    total = measured.metrics["lm_eval_all_words_acc"]
    parts = [measured.metrics[f"lm_eval_all_words_acc/{name}"] for name in ("words", "few_words")]
    sizes = [len(questions()), 7]
    assert total == pytest.approx(np.average(parts, weights=sizes if by_size else None))
    assert measured.scores["lm_eval_all_words_acc"].estimate().value == pytest.approx(total)
    names = [name for name in measured.metrics if not is_detail(name)]
    assert names == ["lm_eval_all_words_acc"]


def test_several_filters_of_a_metric_have_names_of_their_own(model: Any, folder: Path) -> None:
    measured = measure(harness(folder, "written"), model)
    names = ["lm_eval_written_exact_match_strict_match", "lm_eval_written_exact_match_flexible_extract"]
    assert list(measured.metrics) == names
    assert len(measured.records) == 2 * 7
    assert all(format_metric(name, 0.5) == "50.0 %" for name in names)


@pytest.mark.full
def test_shots_are_those_of_the_config_and_the_same_each_time(
    model: Any, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, with_shots = harness(folder, "words"), harness(folder, "words", shots=3)
    assert [suite.tasks["tasks"]["words"].config.num_fewshot for suite in (plain, with_shots)] == [0, 3]
    first, second = measure(with_shots, model), measure(with_shots, model)
    assert first.records == second.records
    assert first.records != measure(plain, model).records
    assert not [record for record in caplog.records if record.name.startswith("qlora")]
    with caplog.at_level(logging.WARNING, logger="qlora"):
        harness(folder, "written", shots=3)
    [record] = [record for record in caplog.records if record.name.startswith("qlora")]
    assert record.getMessage() == "evaluation.shots=3 is not used for written, whose questions come without any"


def test_measuring_leaves_no_trace(model: Any, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    suite, ids = harness(folder, "few_words", "written"), torch.arange(3, 35)[None]
    previous = model(input_ids=ids).logits
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    tokens = len(suite.tokenizer)
    measure(suite, model)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(previous, model(input_ids=ids).logits)
    assert len(suite.tokenizer) == tokens
    assert capfd.readouterr() == ("", "")


# Through a run


@pytest.fixture
def adapter(model: Any, tmp_path: Path) -> Path:
    tokenizer = load_tokenizer(compose([]).model)
    adapters.save_adapter(model, tmp_path / "adapter", tokenizer=tokenizer)
    return tmp_path / "adapter"


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    chosen = ["task=evaluate", "evaluation=lm-eval", "quantization=fp32", *overrides]
    return Run(compose(chosen), folder, chosen).execute()


def test_a_run_measures_adapter_and_base_without_a_word_of_the_harness(
    model: Any, adapter: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(tmp_path / "run", f"adapter={adapter}", f"evaluation.path={folder}", "evaluation.tasks=[words]")
    assert (
        result["metrics"]["eval_lm_eval_words_acc"]
        == measure(harness(folder, "words"), model).metrics["lm_eval_words_acc"]
    )
    assert result["gains"]["lm_eval_words_acc"]["low"] <= result["gains"]["lm_eval_words_acc"]["high"]
    assert len(Path(result["paths"]["questions"]).read_text().splitlines()) == len(questions())
    printed = capsys.readouterr()
    assert not [word for word in ("contexts", "equests") if word in printed.err]
    assert "lm eval words acc norm" in printed.out
    assert "oglikelihood" not in printed.out


def refusal(tmp_path: Path, *overrides: str) -> str:
    """Returns the sentence that a run is refused with, before it looks for a model."""
    with pytest.raises(UserError) as error:
        run(tmp_path / "run", "adapter=none", *overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "load_base", lambda self: pytest.fail("the model was loaded"))


@pytest.mark.usefixtures("no_model")
def test_a_missing_package_is_named_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    expected = "evaluation=lm-eval needs the package lm_eval; pip install 'qlora[eval]'"
    assert refusal(tmp_path, "evaluation.tasks=[arc_easy]") == expected


@pytest.mark.full
@pytest.mark.usefixtures("no_model")
def test_a_task_that_cannot_be_had_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "TaskManager", functools.cache(MANAGER))  # it reads thousands of files
    text = refusal(tmp_path, "evaluation.tasks=[arc_esay]")
    assert text.startswith("evaluation.tasks: lm_eval has no task 'arc_esay' (did you mean arc_easy?); `lm_eval ls")
    text = refusal(tmp_path, "evaluation.tasks=[arc_easy]")
    assert text.startswith("evaluation.tasks: the data of arc_easy is not available: Couldn't reach 'allenai/ai2_arc'")
    assert text.endswith("; check the network, or give tasks of your own with evaluation.path=FOLDER")


@pytest.mark.full
@pytest.mark.usefixtures("no_model")
def test_a_folder_of_tasks_that_is_broken_is_one_sentence(tmp_path: Path, folder: Path) -> None:
    text = refusal(tmp_path, "evaluation.tasks=[words]", "evaluation.path=nowhere")
    assert text == "evaluation.path=nowhere: no such folder; with evaluation=lm-eval it holds task files"
    (tmp_path / "own").mkdir()
    broken = tmp_path / "own" / "mine.yaml"
    chosen = ("evaluation.tasks=[mine]", f"evaluation.path={tmp_path / 'own'}")
    broken.write_text("task: mine\ndataset_path: json\ndataset_kwargs: {data_files: nowhere.jsonl}\n")
    assert refusal(tmp_path, *chosen).startswith("evaluation.tasks: the data of mine is not available: Unable to find")
    broken.write_text("task: mine\nclass: !function nothing.here\n")
    assert refusal(tmp_path, *chosen).startswith("evaluation.tasks: mine cannot be loaded: ")
    broken.write_text(CHOICE.format(name="mine", file=folder / "words.jsonl") + "unsafe_code: true\n")
    assert "mine runs code that the model writes, which is not supported here" in refusal(tmp_path, *chosen)
    text = refusal(tmp_path, "evaluation.tasks=[all_words,words]", f"evaluation.path={folder}")
    assert text == "evaluation.tasks: words comes twice, the second time in words; leave one of the two out"
