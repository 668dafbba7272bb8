"""task=predict: the trained adapter answers, a stopped prediction resumes, and nothing is generated twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora.config.compose import compose
from qlora.evaluation import measure
from qlora.evaluation.answer_log import AnswerLog, rows_digest
from qlora.evaluation.generation import Answer
from qlora.models.model_files import locate
from qlora.models.tokenizer import load_tokenizer
from qlora.run import Run
from qlora.session import Session

ROWS, BATCH = 14, 3  # five batches
QUICK = [
    *("lora.r=4", "lora.dropout=0.0", "quantization=fp32", "trainer.max_steps=6", "trainer.eval_steps=null"),
    *("trainer.warmup_steps=1", "trainer.lr_scheduler_kwargs.num_decay_steps=2", "data.max_train_samples=64"),
    *(f"data.max_eval_samples={ROWS}", f"generation.batch_size={BATCH}", "generation.max_new_tokens=5"),
]
SAMPLED = ["generation.do_sample=true", "generation.temperature=1.5"]


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    return Run(compose([*QUICK, *overrides]), folder, [*QUICK, *overrides]).execute()


def lines(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def unfinished(folder: Path) -> Path:
    return folder / "predictions.unfinished.jsonl"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training run, which no test writes to."""
    folder = tmp_path_factory.mktemp("predict") / "trained"
    run(folder)
    return folder


@pytest.fixture(scope="module")
def whole(trained: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of uninterrupted predictions, by the search."""
    searches: dict[str, list[str]] = {"greedy": [], "sampled": SAMPLED}
    return {
        name: lines(run(trained.parent / name, "task=predict", f"adapter={trained}", *chosen)["paths"]["predictions"])
        for name, chosen in searches.items()
    }


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[int]]:
    """Returns a function that counts the prompts of each batch from now on, and stops before the one it is given."""
    answer_batches = measure.answer_batches

    def count(stop: int | None) -> list[int]:
        seen: list[int] = []

        def counted(*arguments: Any, **options: Any) -> Any:
            for number, answers, seconds in answer_batches(*arguments, **options):
                if len(seen) == stop:
                    raise KeyboardInterrupt
                seen.append(len(answers))
                yield number, answers, seconds

        monkeypatch.setattr(measure, "answer_batches", counted)
        return seen

    return count


@pytest.mark.full
def test_the_trained_adapter_answers_in_its_own_folder_and_by_name(
    trained: Path, whole: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "own")
    answers = lines(run(tmp_path / "own", "task=predict")["paths"]["predictions"])
    base = lines(run(tmp_path / "base", "task=predict", "adapter=none")["paths"]["predictions"])
    assert answers == whole["greedy"]
    assert [row["reference"] for row in base] == [row["reference"] for row in answers]
    assert [row["prediction"] for row in base] != [row["prediction"] for row in answers]


def test_every_answer_is_that_of_plain_peft_to_the_prompt_alone(
    trained: Path, whole: dict[str, list[dict[str, Any]]]
) -> None:
    base = AutoModelForCausalLM.from_pretrained(locate("tiny"), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, trained / "adapter").eval()
    tokenizer = load_tokenizer(compose([]).model)
    for row in whole["greedy"]:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(row["input"])["input_ids"]]])
        output = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :].tolist()
        ended = tokenizer.eos_token_id in output
        answer = output[: output.index(tokenizer.eos_token_id)] if ended else output
        assert row["prediction"] == tokenizer.decode(answer, skip_special_tokens=True).strip()
        assert (row["finish"], row["answer_tokens"]) == ("stop" if ended else "length", len(answer))
        assert (row["prompt"], row["prompt_tokens"]) == (tokenizer.decode(ids[0]), ids.shape[1])
        assert row["prompt"].startswith("<s>")
    assert len(whole["greedy"]) == ROWS


def test_a_prompt_that_was_cut_is_told_whole_and_as_the_model_saw_it(tmp_path: Path) -> None:
    [first, *_] = lines(
        run(tmp_path, "task=predict", "adapter=none", "data.source_max_len=9", "data.max_eval_samples=1")["paths"][
            "predictions"
        ]
    )
    assert first["prompt_tokens"] == 9
    tail = first["prompt"].removeprefix("<s>").strip()
    assert first["input"].strip().endswith(tail)
    assert len(first["input"]) > len(tail) + 20


@pytest.mark.matrix(1)
@pytest.mark.parametrize("search", ["greedy", "sampled"])
def test_a_stopped_prediction_resumes_with_the_batches_that_are_missing(
    search: str, trained: Path, whole: dict[str, list[dict[str, Any]]], tmp_path: Path,
    batches: Callable[[int | None], list[int]], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    chosen = ["task=predict", f"adapter={trained}", *(SAMPLED if search == "sampled" else [])]
    seen = batches(2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *chosen)
    assert seen == [BATCH, BATCH]
    assert not (tmp_path / "predictions.jsonl").exists()
    with unfinished(tmp_path).open("ab") as file:  # a kill while a line was written
        file.write(b'{"row": 3, "text": "half an an')
    seen = batches(None)
    result = run(tmp_path, *chosen)
    assert sorted(seen) == [ROWS - 4 * BATCH, BATCH, BATCH]  # the smallest is answered first
    assert lines(result["paths"]["predictions"]) == whole[search]
    assert f"resuming: {2 * BATCH} of {ROWS} rows are answered already" in capsys.readouterr().out
    assert not unfinished(tmp_path).exists()
    assert result["metrics"]["predict_tokens_per_second"] > 0


@pytest.mark.full
def test_samples_follow_the_seed_alone(trained: Path, whole: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    torch.manual_seed(99)
    np.random.seed(99)
    again = lines(run(tmp_path / "a", "task=predict", f"adapter={trained}", *SAMPLED)["paths"]["predictions"])
    other = lines(run(tmp_path / "b", "task=predict", f"adapter={trained}", *SAMPLED, "seed=1")["paths"]["predictions"])
    assert again == whole["sampled"]
    assert [row["prediction"] for row in other] != [row["prediction"] for row in again]


@pytest.mark.full
def test_what_decides_the_answers_begins_them_anew(
    trained: Path, tmp_path: Path, batches: Callable[[int | None], list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "trained")
    chosen = ["task=predict", f"adapter={tmp_path / 'trained'}"]

    def start(*overrides: str) -> str:
        seen = batches(1)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", *chosen, *overrides)
        assert len(seen) == 1
        return capsys.readouterr().out

    assert "anew" not in start()
    assert "resuming" in start()
    changes = {"generation.max_new_tokens": "4", "seed": "3", "data.max_eval_samples": "13"}
    for key, value in changes.items():
        said = start(f"{key}={value}")
        name = "rows" if key.startswith("data.") else key
        assert f"starting again: {name} changed since predictions.unfinished.jsonl was written" in said
        start()
    weights = tmp_path / "trained" / "adapter" / "adapter_model.safetensors"
    save_file({name: weight * 2 for name, weight in load_file(weights).items()}, weights)
    assert "starting again: adapter changed since" in start()


@pytest.mark.full
def test_finished_answers_are_not_generated_again(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["task=predict", f"adapter={trained}"]
    result = run(tmp_path, *chosen)
    written = (tmp_path / "predictions.jsonl").read_bytes()
    load = Session.load_trained
    monkeypatch.setattr(Session, "load_trained", lambda self: pytest.fail("the model was loaded"))
    capsys.readouterr()
    assert run(tmp_path, *chosen) == result
    assert "holds these answers already; this is the saved result" in capsys.readouterr().out

    (tmp_path / "my_metric.py").write_text("def length(predictions, references):\n    return map(len, predictions)")
    monkeypatch.syspath_prepend(str(tmp_path))
    scored = run(tmp_path, *chosen, "evaluation.metrics=['my_metric:length']", "trusted=[my_metric]")
    lengths = [len(row["prediction"]) for row in lines(tmp_path / "predictions.jsonl")]
    assert scored["metrics"]["eval_length"] == np.mean(lengths)
    assert scored["metrics"]["predict_tokens_per_second"] == result["metrics"]["predict_tokens_per_second"]
    assert (tmp_path / "predictions.jsonl").read_bytes() == written

    monkeypatch.setattr(Session, "load_trained", load)
    (tmp_path / "predictions.jsonl").write_text("{}\n")
    run(tmp_path, *chosen)
    assert (tmp_path / "predictions.jsonl").read_bytes() == written


@pytest.mark.full
def test_all_batches_of_a_stopped_prediction_may_be_there(
    trained: Path, whole: dict[str, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ["task=predict", f"adapter={trained}"]
    with monkeypatch.context() as patched:
        patched.setattr("qlora.evaluation.answering.write_lines", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, *chosen)
    monkeypatch.setattr(Session, "load_trained", lambda self: pytest.fail("the model was loaded"))
    assert lines(run(tmp_path, *chosen)["paths"]["predictions"]) == whole["greedy"]


# The answers on disk


def test_an_answer_log_finds_what_it_wrote(tmp_path: Path) -> None:
    path, metadata = tmp_path / "log.jsonl", {"model": "tiny", "seed": 0}
    log = AnswerLog(path, metadata, 4)
    log.append(np.array([3, 1]), [Answer("tea\u2028\nrice", 3, "stop"), Answer("“no”", 2, "length")], 2.0)
    log.append(np.array([0]), [Answer("", 0, "stop")], 0.5)
    log = AnswerLog(path, metadata, 4)
    assert (log.answered, log.tokens_per_second) == (3, 2.0)
    assert (log.has(np.array([3, 0])), log.has(np.array([0, 2]))) == (True, False)
    log.append(np.array([2]), [Answer("last", 1, "stop")], 0.0)
    assert [answer.text for answer in AnswerLog(path, metadata, 4)] == ["", "“no”", "last", "tea\u2028\nrice"]
    assert list(log) == list(AnswerLog(path, metadata, 4))


@pytest.mark.parametrize("left", range(1, 60, 7))
def test_a_torn_line_is_dropped_wherever_it_was_torn(tmp_path: Path, left: int) -> None:
    path = tmp_path / "log.jsonl"
    log = AnswerLog(path, {"seed": 0}, 2)
    log.append(np.array([0]), [Answer("one", 1, "stop")], 1.0)
    size = path.stat().st_size
    log.append(np.array([1]), [Answer("two", 1, "stop")], 1.0)
    with path.open("r+b") as file:
        file.truncate(size + left)
    log = AnswerLog(path, {"seed": 0}, 2)
    assert (log.answered, path.stat().st_size) == (1, size)
    log.append(np.array([1]), [Answer("new", 1, "stop")], 1.0)
    assert [answer.text for answer in AnswerLog(path, {"seed": 0}, 2)] == ["one", "new"]


def test_a_file_whose_first_line_is_torn_is_begun_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.jsonl").write_text('{"seed"')
    assert AnswerLog(tmp_path / "log.jsonl", {"seed": 0}, 2).answered == 0
    assert (tmp_path / "log.jsonl").read_text() == '{"seed": 0}\n'


def test_the_digest_of_rows_distinguishes_tokens_prompts_and_references() -> None:
    row = {"prompt_ids": [1, 2], "digest": 5, "prompt": "a", "reference": "b", "task": ""}
    changes: list[dict[str, Any]] = [{}, {"prompt_ids": [1]}, {"digest": 6}, {"prompt": "c"}, {"reference": "c"}]
    digests = [rows_digest(Dataset.from_list([row | change])) for change in [*changes, {"task": "t"}]]
    assert len(set(digests)) == len(digests)
    assert rows_digest(Dataset.from_list([row, row]).select([1])) == digests[0]
