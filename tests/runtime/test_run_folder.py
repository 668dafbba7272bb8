"""A run's folder: which config may resume in it, and where adapters are found."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from qlora.config.compose import compose
from qlora.config.saved_config import config_to_dict
from qlora.errors import UserError
from qlora.runtime.run_folder import RunFolder, find_adapter, flatten


def plain(*overrides: str) -> dict[str, Any]:
    return config_to_dict(compose(overrides))


def test_a_changed_key_is_named_with_both_values(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        RunFolder(tmp_path).check_same_training(plain("lora.r=64"), plain("lora.r=8", "seed=1"))
    text = str(error.value)
    assert text.startswith(f"{tmp_path} holds a run with another config; changed:\n")
    assert "\n  lora.r: 64 -> 8\n  seed: 0 -> 1\n" in text
    assert "hydra.run.dir=FOLDER" in text


def test_many_changes_are_counted_rather_than_listed(tmp_path: Path) -> None:
    previous = {f"key{number:02}": 0 for number in range(20)}
    with pytest.raises(UserError, match=r"key11: 0 -> None\n  and 8 more\n"):
        RunFolder(tmp_path).check_same_training(previous, {})


def test_an_entry_that_came_or_went_counts_as_changed(tmp_path: Path) -> None:
    one = {"trainer": {"lr_scheduler_kwargs": {"min_lr_ratio": 0.1}}}
    for previous, now in ((one, {}), ({}, one)):
        with pytest.raises(UserError, match=r"trainer\.lr_scheduler_kwargs\.min_lr_ratio: "):
            RunFolder(tmp_path).check_same_training(previous, now)


@pytest.mark.matrix(1)
@pytest.mark.parametrize(
    "override",
    [
        "task.predict=false",
        "task=evaluate",
        "name=other",
        "tracking.project=other",
        "objective=eval_perplexity",
        "device=cpu",
        "evaluation.show_predictions=1",
        "model.cache_dir=/elsewhere",
        "trainer.save_total_limit=2",
        "trainer.disk_wait=0",
        "resume=force",
        "base=force",
    ],
)
def test_what_leaves_the_training_alone_may_change(tmp_path: Path, override: str) -> None:
    assert plain() != plain(override)
    RunFolder(tmp_path).check_same_training(plain(), plain(override))


@pytest.mark.full
def test_a_config_that_names_another_base_takes_both_words(tmp_path: Path) -> None:
    random_base = ["model=llama-7b", "model.weights=random", "model.tokenizer=tiny"]
    for args, change, hint in (
        ([], "lora.r=8", "resume=force resumes"),
        ([], "seed=1", "resume=force resumes"),
        ([], "model.revision=v2", "resume=force base=force resumes"),
        (random_base, "seed=1", "resume=force base=force resumes"),
        (random_base, "model.architecture.num_hidden_layers=3", "resume=force base=force resumes"),
    ):
        with pytest.raises(UserError, match=f"to resume; {hint}"):
            RunFolder(tmp_path).check_same_training(plain(*args), plain(*args, change))


def test_a_free_key_frees_no_key_that_begins_alike(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="device_map"):
        RunFolder(tmp_path).check_same_training({"device_map": 1}, {"device_map": 2})


def test_a_fresh_folder_takes_any_config(tmp_path: Path) -> None:
    RunFolder(tmp_path).check_same_training(None, plain())


def test_a_folder_below_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run cannot be written \(Not a directory\); choose another"):
        RunFolder(tmp_path / "file" / "run").create()


def test_making_a_folder_leaves_nothing_in_it(tmp_path: Path) -> None:
    RunFolder(tmp_path / "a" / "b").create()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_an_adapter_is_found_in_its_own_folder_and_in_a_runs(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    assert find_adapter(tmp_path) == (None, None)
    (adapter / "adapter_config.json").touch()
    assert find_adapter(tmp_path) == find_adapter(adapter) == (adapter, None)


def test_a_fully_finetuned_model_is_found_in_a_runs_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    assert find_adapter(tmp_path) == (None, tmp_path / "model")


def test_training_has_the_plain_name_among_results(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.result("train").write_text(json.dumps({"status": "finished", "metrics": {"eval_loss": "nan"}}))
    saved = folder.stored_result("train")
    assert saved is not None
    assert saved["status"] == "finished"
    assert math.isnan(saved["metrics"]["eval_loss"])
    assert folder.stored_result("evaluate") is None
    assert folder.result("evaluate").name == "evaluate.json"


def test_nested_keys_are_joined_with_dots() -> None:
    assert dict(flatten({"a": {"b": 1, "c": {"d": 2}}, "e": [3]})) == {"a.b": 1, "a.c.d": 2, "e": [3]}
