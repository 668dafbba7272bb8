"""Runs that train from preferences, from rows to what they leave: measures, a chained run, a reward model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from qlora.config.compose import compose
from qlora.data.reference_store import WithReference
from qlora.errors import DataError, RunError
from qlora.models.model_files import locate
from qlora.run import Run
from qlora.step.parts import attention
from qlora.tasks import build_trainer
from qlora.tasks.build_reference import build_items
from qlora.training.resume import check_prompts
from tests.faults.runs import write_preferences

QUICK = [
    *("data=local", "data.eval_dataset_size=6", "evaluation=loss", "task.predict=false", "recipe=none", "lora.r=8"),
    *("trainer.max_steps=6", "trainer.logging_steps=2", "trainer.eval_steps=3", "trainer.save_steps=3", "device=cpu"),
    *("trainer.per_device_train_batch_size=6", "trainer.gradient_accumulation_steps=1", "trainer.learning_rate=5e-3"),
    *(
        "quantization=fp32",
        "trainer.optim=adamw_torch",
        "trainer.warmup_steps=0",
        "trainer.gradient_checkpointing=false",
    ),
]


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    chosen = [*QUICK, *overrides]
    return Run(compose(chosen), folder, overrides=chosen).execute()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_preferences(tmp_path_factory.mktemp("rows"))[0]


@pytest.fixture(scope="module")
def dpo(tmp_path_factory: pytest.TempPathFactory, pairs: Path) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("dpo")
    return folder, run(folder, "loss=dpo", f"data.path={pairs}")


def test_bad_answers_are_nothing_that_answers_are_compared_with(pairs: Path, tmp_path: Path) -> None:
    chosen = [*QUICK, "loss=kto", f"data.path={pairs}", "evaluation=exact-match"]
    measurer = Run(compose(chosen), tmp_path).session.measurer
    is_good = measurer.rows["desirable"][:]
    assert [reference is not None for reference in measurer.rows["reference"][:]] == is_good
    assert 0 < sum(is_good) < len(is_good)
    assert measurer._good_rows["desirable"][:] == [True] * sum(is_good)
    assert measurer.unanswered == len(is_good) - sum(is_good)


def test_held_out_pairs_are_told_apart_and_measured_with_intervals_and_the_difference_to_the_start(
    dpo: tuple[Path, dict[str, Any]],
) -> None:
    folder, result = dpo
    metrics = result["metrics"]
    assert (metrics["base_eval_reward_accuracy"], metrics["base_eval_reward_margin"]) == (0.5, 0)
    assert metrics["base_eval_reference_kl"] == 0
    assert metrics["eval_reward_accuracy"] > 0.9
    assert metrics["eval_reward_margin"] > 0
    assert metrics["eval_reference_kl"] > 0
    low, high = result["intervals"]["eval_reward_margin"]
    assert low <= metrics["eval_reward_margin"] <= high
    assert result["gains"]["reward_margin"]["value"] == pytest.approx(metrics["eval_reward_margin"])
    logged = [entry for entry in json.loads((folder / "history.json").read_text()) if "eval_reward_margin" in entry]
    assert [entry["step"] for entry in logged] == [3, 6]


def test_a_run_that_starts_from_an_adapter_compares_with_it_and_another_task_measures_the_same(
    dpo: tuple[Path, dict[str, Any]], pairs: Path, tmp_path: Path
) -> None:
    start = dpo[0] / "adapter"
    overrides = [
        "loss=dpo",
        f"data.path={pairs}",
        f"lora.start={start}",
        "trainer.eval_steps=null",
        "trainer.keep=last",
    ]
    metrics = run(tmp_path / "next", *overrides)["metrics"]
    assert metrics["base_eval_reward_margin"] == 0  # the start is its own reference
    assert metrics["base_eval_loss"] == pytest.approx(dpo[1]["metrics"]["eval_loss"])
    again = run(tmp_path / "again", *overrides, "task=evaluate", f"adapter={tmp_path / 'next'}")["metrics"]
    for name in ("preference_loss", "reward_accuracy", "reward_margin", "reference_kl"):
        assert again[f"eval_{name}"] == pytest.approx(metrics[f"eval_{name}"], rel=1e-4)
    assert again["base_eval_loss"] == pytest.approx(metrics["base_eval_loss"], rel=1e-4)  # that of the start
    assert again["base_eval_reward_margin"] == 0


@pytest.mark.parametrize("loss", ["dpo", "reward"])
def test_the_base_alone_is_measured_as_the_start(loss: str, pairs: Path, tmp_path: Path) -> None:
    metrics = run(tmp_path / "base", f"loss={loss}", f"data.path={pairs}", "task=evaluate", "adapter=none")["metrics"]
    assert (metrics["eval_reward_accuracy"], metrics["eval_reward_margin"]) == (0.5, 0)


def test_a_reward_model_is_saved_for_plain_libraries_and_scores_pairs(pairs: Path, tmp_path: Path) -> None:
    overrides = ["loss=reward", f"data.path={pairs}", "trainer.eval_steps=null", "trainer.keep=last"]
    metrics = run(tmp_path / "run", *overrides)["metrics"]
    assert metrics["base_eval_reward_accuracy"] == 0.5  # a head of zeros
    assert metrics["eval_reward_accuracy"] > 0.9
    again = run(tmp_path / "again", *overrides, "task=evaluate", f"adapter={tmp_path / 'run'}")["metrics"]
    assert again["eval_reward_margin"] == pytest.approx(metrics["eval_reward_margin"], rel=1e-5)
    run(tmp_path / "scores", *overrides, "task=predict", f"adapter={tmp_path / 'run'}")
    records = [json.loads(line) for line in (tmp_path / "scores" / "predictions.jsonl").read_text().splitlines()]
    mean = sum(record["chosen_reward"] - record["rejected_reward"] for record in records) / len(records)
    assert mean == pytest.approx(metrics["eval_reward_margin"], rel=1e-5)

    for task, message in (("merge", "is a reward model: it scores texts and answers nothing; task=merge needs a"),
                          ("evaluate", "is a reward model; add loss=reward, or name another adapter")):  # fmt: skip
        loss = "loss=reward" if task == "merge" else "loss=dpo"
        with pytest.raises(DataError, match=message):
            run(tmp_path / task, *overrides, loss, f"task={task}", f"adapter={tmp_path / 'run'}")

    session = Run(compose([*QUICK, *overrides]), tmp_path / "run").session
    plain = AutoModelForSequenceClassification.from_pretrained(
        locate(session.config.model.name), num_labels=1, dtype=torch.float32
    )
    model = PeftModel.from_pretrained(plain, str(tmp_path / "run" / "adapter")).eval()
    assert session.data.eval is not None
    for row, record in zip(session.data.eval, records, strict=True):
        for ids, side in ((row["input_ids"], "chosen"), (row["rejected_ids"], "rejected")):
            reward = model(input_ids=torch.tensor([ids])).logits
            assert float(reward) == pytest.approx(record[f"{side}_reward"], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("loss", ["dpo", "reward"])
def test_a_run_whose_answers_share_prompts_learns_what_one_does_that_computes_them_twice(
    loss: str, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    histories = {}
    for fused in ("false", "true"):
        run(tmp_path / fused, f"loss={loss}", f"data.path={pairs}", "trainer.eval_steps=null", "trainer.keep=last",
            f"trainer.fused_attention={fused}", "trainer.group_by_length=false", "lora.dropout=0",
            "trainer.max_steps=3", "trainer.logging_steps=1", "task.evaluate=false")  # fmt: skip
        history = json.loads((tmp_path / fused / "history.json").read_text())
        histories[fused] = [(entry["loss"], entry["num_input_tokens_seen"]) for entry in history if "loss" in entry]
        said = re.findall(r"prompts +once for both answers of a pair: (\d+) of (\d+) tokens", capsys.readouterr().out)
        assert len(said) == (fused == "true")
    for (loss_once, tokens_once), (loss_twice, tokens_twice) in zip(*histories.values(), strict=True):
        assert loss_once == pytest.approx(loss_twice, rel=1e-4)
        assert tokens_once == tokens_twice  # both answers count


PACKED = ("data.packing=true", "data.pack_length=96", "trainer.fused_attention=true")


def test_a_reward_model_learns_from_packs(pairs: Path, tmp_path: Path) -> None:
    packed = ["loss=reward", f"data.path={pairs}", *PACKED, "trainer.per_device_train_batch_size=2"]
    metrics = run(tmp_path, *packed, "trainer.eval_steps=null", "trainer.keep=last", "trainer.max_steps=8")["metrics"]
    assert metrics["eval_reward_accuracy"] > 0.9


def test_packs_count_a_shared_prompt_once_and_a_model_that_cannot_share_it_gets_others(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = [*QUICK, "loss=dpo", f"data.path={pairs}", *PACKED, "trainer.per_device_train_batch_size=1"]
    sharing, separate = (Run(compose(overrides), tmp_path / name).session for name in ("sharing", "separate"))
    step = build_trainer.build_step(sharing, sharing.add_adapter(sharing.load_base()))
    assert step.shares_prompts
    assert sharing.data.packed is not None
    assert sharing.data.packed.lengths.sum() < sharing.data.report.train_tokens
    batch = sharing.collator(96)([sharing.data.packed[0]])
    assert batch["first_cell"].shape == (1, 96)
    assert batch["input_ids"].shape == (1, sharing.data.packed.most_cells)

    monkeypatch.setattr(attention, "mixes_by_attention_alone", lambda model: False)
    fewer = len(sharing.data.packed)
    step = build_trainer.build_step(separate, separate.add_adapter(separate.load_base()))
    assert not step.shares_prompts
    assert separate.data.packed is not None
    assert separate.data.packed.lengths.sum() == separate.data.report.train_tokens
    assert len(separate.data.packed) == separate.length.units > fewer
    assert "first_cell" not in separate.collator(96)([separate.data.packed[0]])
    assert re.search(
        r"data\.packing=true: both answers of a pair have a prompt of their own, because trainer\.fused_attention "
        rf"cannot share it \(this architecture .*\): {len(separate.data.packed)} packs instead of {fewer}, "
        + str(separate.length),
        caplog.text,
    )


def test_a_run_resumes_where_prompts_count_as_they_did(pairs: Path, tmp_path: Path) -> None:
    sharing = ["loss=dpo", f"data.path={pairs}", "trainer.fused_attention=true", "trainer.save_steps=1",
               "trainer.eval_steps=null", "trainer.keep=last", "task.evaluate=false"]  # fmt: skip
    whole = run(tmp_path / "whole", *sharing, *PACKED, "trainer.per_device_train_batch_size=1", "trainer.max_steps=3")
    assert whole["metrics"]["train_loss"] > 0
    checkpoints = tmp_path / "whole" / "checkpoints"
    first = checkpoints / "checkpoint-1"
    config = compose([*QUICK, *sharing, *PACKED])
    check_prompts(first, config, shares_prompts=True)
    with pytest.raises(
        RunError,
        match=r"checkpoint-1 was written by a step that computed the prompt of a pair once, and here it is computed "
        r"twice \(trainer\.fused_attention\): packs come in another order; resume on the kind of device where the run ",
    ):
        check_prompts(first, config, shares_prompts=False)
    check_prompts(first, compose([*QUICK, *sharing, "trainer.group_by_length=false"]), shares_prompts=False)
    adapter = (tmp_path / "whole" / "adapter" / "adapter_model.safetensors").read_bytes()
    for late in (checkpoints / "checkpoint-2", checkpoints / "checkpoint-3", tmp_path / "whole" / "adapter"):
        shutil.rmtree(late)
    (tmp_path / "whole" / "result.json").unlink()
    run(tmp_path / "whole", *sharing, *PACKED, "trainer.per_device_train_batch_size=1", "trainer.max_steps=3")
    assert (tmp_path / "whole" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


CACHED = ("trainer.max_steps=5", "trainer.eval_steps=null", "trainer.keep=last", "task.evaluate=false",
          "trainer.logging_steps=1")  # fmt: skip


@pytest.mark.matrix(2)
@pytest.mark.parametrize("layout", ["shared prompts", "rows", "a start", "packs"])
def test_a_cached_reference_gives_the_bits_of_one_that_is_computed_in_each_step(
    layout: str, dpo: tuple[Path, dict[str, Any]], pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layouts = {
        "rows": ["lora.dropout=0.1"],
        "shared prompts": ["trainer.fused_attention=true", "trainer.fused_loss=true"],
        "packs": [*PACKED, "trainer.per_device_train_batch_size=1", "trainer.fused_loss=true"],
        "a start": [f"lora.start={dpo[0] / 'adapter'}"],
    }
    overrides = [*layouts[layout], "loss=dpo", f"data.path={pairs}", *CACHED, f"data.cache_dir={tmp_path}"]
    written = {}
    for name, settings, said in (
        ("each", ["loss.cache_reference=false"], r"reference +computed in each step: loss\.cache_reference=false"),
        ("once", ["loss.cache_reference=true"], r"reference +the log-probabilities of \d+ pairs are computed once, in"),
        ("again", ["loss.cache_reference=true"], r"reference +the log-probabilities of \d+ pairs are read from"),
    ):
        run(tmp_path / name, *overrides, *settings)
        assert re.search(said, capsys.readouterr().out), name
        written[name] = (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
    assert written["each"] == written["once"] == written["again"]
    assert len(list(tmp_path.glob("reference-*"))) == 1


def test_runs_share_a_cached_reference_whatever_they_minimise_and_no_other_rows_or_reference(
    dpo: tuple[Path, dict[str, Any]], pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["loss=dpo", f"data.path={pairs}", "loss.cache_reference=true", f"data.cache_dir={tmp_path}",
              *CACHED, "trainer.max_steps=1"]  # fmt: skip

    def caches(name: str, *overrides: str) -> bool:
        session = Run(compose([*QUICK, *common, *overrides]), tmp_path / name).session
        model = session.build_model()
        items = build_items(session, model, build_trainer.build_step(session, model), None)
        assert isinstance(items, WithReference)
        return "computed once" in capsys.readouterr().out

    assert caches("first")
    assert not caches("same", "loss.beta=0.5", "trainer.learning_rate=1e-3", "seed=3")
    assert not caches("ipo", "loss=ipo", "loss.cache_reference=true")
    assert caches("others", "data.split_seed=3")
    assert caches("start", f"lora.start={dpo[0] / 'adapter'}")
    assert not caches("base", f"lora.start={dpo[0] / 'adapter'}", "loss.reference=base")
    (entry, *_) = tmp_path.glob("reference-*/log_probs.arrow")
    for damaged in tmp_path.glob("reference-*/log_probs.arrow"):
        damaged.write_bytes(entry.read_bytes()[:100])
    assert caches("damaged")


def test_auto_caches_the_reference_of_pairs_that_come_again_and_resumes_as_the_run_began(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["loss=dpo", f"data.path={pairs}", *CACHED, "trainer.save_steps=2"]
    run(tmp_path / "once", *overrides, "trainer.max_steps=2")
    assert re.search(r"in each step: loss\.cache_reference=auto, the run\s+passes over its pairs once", _plain(capsys))
    folder, adapter = tmp_path / "run", tmp_path / "run" / "adapter"
    run(folder, *overrides, "trainer.max_steps=12")
    assert re.search(r"loss\.cache_reference=auto, the run passes over its pairs [\d.]+ times", _plain(capsys))
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    for late in [
        *(folder / "checkpoints").glob("checkpoint-[468]*"),
        *folder.glob("checkpoints/checkpoint-1*"),
        adapter,
    ]:
        shutil.rmtree(late)
    (folder / "result.json").unlink()
    run(folder, *overrides, "trainer.max_steps=12")
    assert "loss.cache_reference=auto, as before checkpoint-2" in _plain(capsys)
    assert (adapter / "adapter_model.safetensors").read_bytes() == whole


def _plain(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_card_and_page_say_that_a_run_is_compared_with_its_start_and_draw_both_curves_of_a_measure_together(
    dpo: tuple[Path, dict[str, Any]], pairs: Path, tmp_path: Path
) -> None:
    run(tmp_path / "next", "loss=dpo", f"data.path={pairs}", f"lora.start={dpo[0] / 'adapter'}", "trainer.max_steps=3")
    assert "| held-out metric | untuned base | this model |" in (dpo[0] / "README.md").read_text()
    assert "| held-out metric | start | this model |" in (tmp_path / "next" / "README.md").read_text()
    page = (tmp_path / "next" / "report.html").read_text()
    assert "untuned base" not in page
    assert '<th scope="col" class="number">start</th>' in page
    assert page.count('"title":"reward accuracy","unit":"","lines":[{') == 1
    assert page.count('"title":"reward accuracy"') == 1
