"""What a task that uses an adapter takes from the config of its run, and what it never takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora.config import trained_run
from qlora.config.compose import compose, compose_dict
from qlora.config.saved_config import config_to_dict, dump_config, flatten
from qlora.config.schema import Config
from qlora.config.trained_run import differences, find_run
from qlora.errors import UserError

TRAINED = [
    *("seed=7", "quantization=fp32", "lora.r=5", "data=local", "data.path=mine.jsonl", "data.template=chatml"),
    *("model.name=/models/base", "model.revision=abc", "model.tokenizer=/models/tokens", "generation.max_new_tokens=9"),
    *("evaluation=loss", "trainer.per_device_eval_batch_size=3", "data.eval_split=test"),
]


@pytest.fixture(scope="module")
def trained() -> Config:
    return compose(TRAINED)


@pytest.fixture
def run(tmp_path: Path, trained: Config) -> Path:
    """The folder of a run, as far as a config is concerned."""
    return write(tmp_path / "run", trained)


def write(folder: Path, config: Config | dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    text = dump_config(config) if isinstance(config, Config) else json.dumps(config)
    (folder / "config.yaml").write_text(text)
    return folder


def used(run: Path, *overrides: str, task: str = "evaluate") -> Config:
    return compose([f"task={task}", f"adapter={run}", *overrides])


@pytest.mark.matrix(2)
@pytest.mark.parametrize("task", ["evaluate", "predict", "chat", "merge", "push"])
def test_a_task_with_an_adapter_takes_what_its_run_was_trained_with(run: Path, task: str) -> None:
    config = used(run, *(["repo=me/mine"] if task == "push" else []), task=task)
    trained = config_to_dict(compose(TRAINED))
    assert differences(config_to_dict(config), trained) == {}
    assert (config.seed, config.model.name, config.model.revision) == (7, "/models/base", "abc")
    assert (config.data.path, config.data.template, config.generation.max_new_tokens) == ("mine.jsonl", "chatml", 9)


def test_the_command_line_wins(run: Path) -> None:
    config = used(run, "quantization=nf4", "generation.max_new_tokens=4", "seed=0", "data.max_eval_samples=2")
    assert (config.quantization.bits, config.generation.max_new_tokens, config.seed) == (4, 4, 0)
    assert (config.data.path, config.data.max_eval_samples, config.lora.r) == ("mine.jsonl", 2, 5)
    changed = differences(config_to_dict(config), config_to_dict(compose(TRAINED)))
    assert changed["generation.max_new_tokens"] == (4, 9)
    assert {key.partition(".")[0] for key in changed} == {"generation", "quantization", "seed", "data"}


def test_a_group_of_the_command_line_is_read_whole_but_for_how_conversations_are_written(run: Path) -> None:
    config = used(run, "data=local", "data.path=other.jsonl")
    assert (config.data.path, config.data.eval_split, config.data.template) == ("other.jsonl", None, "chatml")
    assert used(run, "data=local", "data.path=other.jsonl", "data.template=guanaco").data.template == "guanaco"


def test_an_experiment_of_the_command_line_wins_too(run: Path, tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    text = "# @package _global_\ngeneration:\n  max_new_tokens: 2\n"
    (tmp_path / "conf" / "experiment" / "short.yaml").write_text(text)
    config = compose(["task=evaluate", f"adapter={run}", "experiment=short"], tmp_path / "conf")
    assert (config.generation.max_new_tokens, config.lora.r) == (2, 5)


@pytest.mark.full
def test_what_excludes_a_key_of_the_command_line_is_left_out(run: Path) -> None:
    config = used(run, "data.eval_path=questions.jsonl")
    assert (config.data.eval_path, config.data.eval_split) == ("questions.jsonl", None)


@pytest.mark.matrix(1)
@pytest.mark.parametrize("part", ["adapter", "model", "merged", "checkpoints/checkpoint-3"])
def test_a_part_of_a_run_knows_its_run(run: Path, part: str) -> None:
    (run / part).mkdir(parents=True)
    assert find_run(str(run / part)) == run
    assert used(run / part).lora.r == 5


@pytest.mark.full
def test_a_merged_model_is_not_quantized_again(run: Path, tmp_path: Path) -> None:
    (run / "merged").mkdir()
    (run / "merged" / "config.json").write_text("{}")
    for named in (run, run / "merged"):
        assert used(named).quantization.bits == 16
        assert used(named, "quantization=fp32").quantization.bits == 32
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").write_text("{}")
    assert used(run).quantization.bits == 32


@pytest.mark.matrix(1)
@pytest.mark.parametrize(
    "key", ["trainer.warmup_steps", "loss.name", "quantization.double_quant", "data.max_row_bytes"]
)
def test_a_key_that_an_older_version_did_not_store_has_its_default(tmp_path: Path, key: str) -> None:
    plain = config_to_dict(compose(["lora.r=5"]))
    group, _, name = key.partition(".")
    del plain[group][name]
    config = used(write(tmp_path / "run", plain))
    assert config.lora.r == 5
    assert getattr(getattr(config, group), name) == getattr(getattr(compose(["recipe=none"]), group), name)


def test_an_adapter_without_its_run_and_the_untuned_base_have_the_defaults(run: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    unset = config_to_dict(compose(["task=chat"]))
    for adapter in (str(tmp_path / "plain"), "none"):
        assert config_to_dict(compose(["task=chat", f"adapter={adapter}"])) == {**unset, "adapter": adapter}


def test_the_folder_of_a_command_is_the_run_where_no_adapter_is_named(run: Path) -> None:
    assert compose(["task=evaluate", f"hydra.run.dir={run}"]).lora.r == 5


def test_a_training_takes_nothing_of_the_run_in_its_folder(run: Path) -> None:
    assert compose([f"hydra.run.dir={run}"]).lora.r != 5


def test_relative_paths_are_those_of_the_folder_where_the_training_was_started(run: Path, tmp_path: Path) -> None:
    (tmp_path / "began").mkdir()
    (tmp_path / "began" / "mine.jsonl").touch()
    (run / "manifest.json").write_text(json.dumps({"working_directory": str(tmp_path / "began")}))
    assert used(run).data.path == str(tmp_path / "began" / "mine.jsonl")


def test_a_stored_config_of_another_schema_is_refused_with_its_file(tmp_path: Path) -> None:
    plain = config_to_dict(compose())
    plain["lora"]["rank"] = 8
    run = write(tmp_path / "run", plain)
    with pytest.raises(UserError, match=rf"^{run}/config.yaml: .*rank"):
        used(run)


@pytest.mark.full
def test_what_was_composed_for_a_run_leaves_no_option_behind(run: Path) -> None:
    used(run)
    with pytest.raises(UserError, match="quantization"):
        compose([f"quantization={trained_run.OPTION}"])
    assert [*compose_dict(["task=evaluate", f"adapter={run}"]).hydra.overrides.task] == [
        "task=evaluate",
        f"adapter={run}",
    ]


# Facts of a preset


FACTS = ("license", "gated", "architecture", "revision")


def said_of_model(*overrides: str) -> list[Any]:
    model = compose(list(overrides)).model
    return [getattr(model, name) for name in FACTS]


@pytest.mark.matrix(2)
@pytest.mark.parametrize("preset", ["tiny", "llama-7b", "llama-3.1-8b", "gemma-2-2b"])
def test_facts_of_a_preset_leave_with_another_model_name(preset: str) -> None:
    assert said_of_model(f"model={preset}", "data=alpaca")[0] is not None
    assert said_of_model(f"model={preset}", "model.name=other/model", "data=alpaca") == [None, False, None, None]


def test_what_the_command_says_of_another_model_stays() -> None:
    model = compose(["model=llama-7b", "model.name=a/b", "model.license=mit", "model.gated=true"]).model
    assert (model.license, model.gated, model.architecture) == ("mit", True, None)


@pytest.mark.full
def test_the_recipe_of_a_preset_leaves_with_another_model_name() -> None:
    plain = compose(["recipe=none", "data=alpaca"]).trainer
    assert compose(["model=llama-7b", "data=alpaca"]).trainer != plain
    assert compose(["model=llama-7b", "model.name=a/b", "data=alpaca"]).trainer == plain
    assert compose(["model=llama-7b", "model.name=huggyllama/llama-7b", "data=alpaca"]).trainer != plain


def test_a_recipe_that_the_command_names_stays_whatever_the_model_is_called() -> None:
    named = compose(["recipe=llama-7b", "model=llama-7b", "model.name=a/b", "data=alpaca"])
    assert named.trainer == compose(["model=llama-7b", "data=alpaca"]).trainer


def test_random_weights_keep_the_shape_whatever_they_are_called() -> None:
    model = compose(["model=llama-7b", "model.weights=random", "model.name=mine", "data=alpaca"]).model
    assert model.architecture is not None
    assert model.architecture.hidden_size == 4096


def test_facts_of_the_user_s_own_preset_leave_too(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("name: a/b\nlicense: mine\n")
    assert compose(["model=mine"], tmp_path).model.license == "mine"
    assert compose(["model=mine", "model.name=c/d"], tmp_path).model.license is None


def test_each_model_name_of_a_grid_is_composed_by_itself() -> None:
    from qlora.config.combinations import Combinations

    grid = Combinations(["model=llama-7b", "model.name=huggyllama/llama-7b,other/model", "data=alpaca"])
    licenses = [grid.config(positions).model.license for positions in grid]
    assert licenses[0] is not None
    assert licenses[1] is None


def test_all_settings_of_a_run_are_those_of_the_schema() -> None:
    keys = {key for key, _ in flatten(config_to_dict(compose()))}
    assert {key for key in trained_run.OF_MACHINE if key not in keys} == {"model.architecture"}
