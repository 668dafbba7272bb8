"""A text is what was typed, on the command line and in files; what YAML reads otherwise than it looks is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from qlora.config.compose import compose, compose_dict
from qlora.config.fields import config_keys, split_key, type_at
from qlora.config.file_spelling import SpelledSource, reading_spellings
from qlora.config.options import CONF_DIR
from qlora.config.override_spelling import keep_spelling
from qlora.config.overrides import override_value, write_override
from qlora.config.saved_config import dump_config, read_config, restore_config, write_yaml
from qlora.config.sweep_values import sweep_params
from qlora.errors import UserError

NUMBERS = (
    *(
        "5",
        "-5",
        "007",
        "0123456",
        "0777",
        "20231101",
        "1e5",
        "1234e567",
        "1.50",
        ".5",
        "1_000",
        "0x1F",
        "0b11",
        "1:30",
    ),
    *(".inf", "-.inf", ".nan", "1e-3", "190:20:30.15"),
)
BOOLEANS = ("on", "off", "yes", "no", "true", "False", "y", "N")
DATES = ("2024-01-02", "2024-01-02T10:00:00Z")


@pytest.mark.parametrize("word", [*NUMBERS, *BOOLEANS, *DATES, "0o10", "inf", "NaN"])
def test_a_word_of_the_command_line_keeps_its_spelling_to_the_stored_config(tmp_path: Path, word: str) -> None:
    if word in ("5", "1e5", "true", "2024-01-02"):  # the others are read by the same rule, without composing
        config = compose([f"name={word}", f"data.columns.output={word}", f"model.new_tokens=[{word},x]"])
        assert (config.name, config.data.columns["output"], config.model.new_tokens[0]) == (word, word, word)
        (tmp_path / "config.yaml").write_text(dump_config(config))
        saved = read_config(tmp_path / "config.yaml")
        assert saved is not None
        assert restore_config(saved).name == word
    [text] = keep_spelling([f"name={word}"])
    assert text in (f"name={word}", f"name='{word}'")
    assert keep_spelling([text]) == [text]
    assert OmegaConf.create(write_yaml({"name": word})).name == word
    assert override_value(write_override("name", word)) == override_value(text) == word


SPELLED = {
    "name=1e5": "name='1e5'",
    "name= 5 ": "name= '5' ",
    "++data.columns.output=5": "++data.columns.output='5'",
    "from=5": "from='5'",
    "name=on": "name=on",
    "name=null": "name=null",
    "name='5'": "name='5'",
    "name=1e5,on,5": "name='1e5',on,'5'",
    "name=choice(1,a,sort(3,2,reverse=true))": "name=choice('1',a,sort('3','2',reverse=true))",
    "model.revision=range(1,3)": "model.revision=range(1,3)",
    "data.columns={a: 5, b: x}": "data.columns={a: '5', b: x}",
    "data.mix={a: 5, b: {path: 5, weight: 5, columns: {x: 5}}}": "data.mix={a: '5', b: {path: '5', weight: 5, "
    "columns: {x: '5'}}}",
    "data.mix.a.weight=5": "data.mix.a.weight=5",
    "lora.target_modules=[5,q_proj]": "lora.target_modules=['5',q_proj]",
    "lora.target_modules=5": "lora.target_modules='5'",
    "tracking.tags=[1.0,[]]": "tracking.tags=['1.0',[]]",
    "model={name: 5, architecture: {vocab_size: 1e3}}": "model={name: '5', architecture: {vocab_size: 1000}}",
    "experiment=2024": "experiment='2024'",
    "hydra/launcher=5": "hydra/launcher='5'",
    "callbacks=5": "callbacks='5'",
    "callbacks.mine.patience=5": "callbacks.mine.patience=5",
    "hydra.run.dir=5": "hydra.run.dir='5'",
    "hydra.sweeper.storage=5": "hydra.sweeper.storage='5'",
    "hydra.sweeper.n_trials=1e1": "hydra.sweeper.n_trials=10",
    "trainer.compile=true": "trainer.compile=true",
    "trainer.max_steps=1e3,1.5e1,2E+2": "trainer.max_steps=1000,15,200",
    "trainer.max_steps=interval(1e1,1e2)": "trainer.max_steps=interval(10,100)",
    "trainer.max_steps=1.5e0": "trainer.max_steps=1.5e0",
    "trainer.max_steps=1e-3": "trainer.max_steps=1e-3",
    "trainer.max_steps=1e999999999": "trainer.max_steps=1e999999999",
    "trainer.learning_rate=1e3": "trainer.learning_rate=1e3",
    "trainer.lr_scheduler_kwargs.num_cycles=1e0": "trainer.lr_scheduler_kwargs.num_cycles=1e0",
    "~lora": "~lora",
    "no option": "no option",
}


@pytest.mark.parametrize("text", SPELLED)
def test_only_texts_and_whole_numbers_are_written_otherwise(text: str) -> None:
    assert keep_spelling([text]) == [SPELLED[text]]


def test_every_field_has_a_known_type() -> None:
    unknown = [key for key in config_keys() if type_at(split_key(key)) is None]
    assert not unknown


def test_a_number_in_exponents_is_a_whole_number_where_one_is_meant() -> None:
    assert compose(["trainer.max_steps=1e2"]).trainer.max_steps == 100
    with pytest.raises(UserError, match=r"trainer\.max_steps must be a whole number or null, got '15\.5'"):
        compose(["trainer.max_steps=1.55e1"])


# Files

HEAD = "# @package _global_\n"


def read(folder: Path, text: str, option: str = "experiment/mine") -> Any:
    """Returns what Hydra gets of a file of the user's own."""
    file = folder / f"{option}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    with reading_spellings(CONF_DIR):
        return SpelledSource("user", str(folder)).load_config(option).config


def refusal(folder: Path, text: str, option: str = "experiment/mine") -> str:
    with pytest.raises(UserError) as error:
        read(folder, text, option)
    return str(error.value)


FILES = {
    "name: WORD": (3, "name"),
    "model: {revision: WORD}": (3, "model.revision"),
    "data:\n  columns:\n    output: WORD": (5, "data.columns.output"),
    "model:\n  new_tokens:\n  - x\n  - WORD": (6, "model.new_tokens[1]"),
    "lora: {target_modules: [WORD]}": (3, "lora.target_modules[0]"),
    "lora: {target_modules: WORD}": (3, "lora.target_modules"),
    "data: {mix: {a: WORD}}": (3, "data.mix.a"),
    "data:\n  mix:\n    a:\n      path: WORD": (6, "data.mix.a.path"),
    "evaluation: {tasks: [WORD]}": (3, "evaluation.tasks[0]"),
    "tracking: {tags: [WORD]}": (3, "tracking.tags[0]"),
    "trainer: {lr_scheduler_type: WORD}": (3, "trainer.lr_scheduler_type"),
    "from: WORD": (3, "from"),
    "runs: WORD": (3, "runs"),
    "hydra: {run: {dir: WORD}}": (3, "hydra.run.dir"),
    "hydra: {sweeper: {storage: WORD}}": (3, "hydra.sweeper.storage"),
    "hydra: {sweeper: {params: {model.revision: WORD}}}": (3, "hydra.sweeper.params.model.revision"),
    "x: &x {revision: WORD}\nmodel:\n  <<: *x": (3, "model.revision"),
}


NEVER_NULL = ("data.columns.output", "model.new_tokens[1]", "evaluation.tasks[0]", "tracking.tags[0]")
"""Texts inside lists and mappings, which cannot be left out by null."""


@pytest.mark.parametrize("text", FILES)
def test_what_yaml_does_not_read_as_text_is_refused_in_a_text_field(tmp_path: Path, text: str) -> None:
    line, key = FILES[text]
    said = refusal(tmp_path, f"{HEAD}# a comment\n{text.replace('WORD', '1e5')}\n")
    assert said == (
        f"{tmp_path}/experiment/mine.yaml, line {line}: {key} must be a text, and YAML reads 1e5 as a number "
        '(100000.0); put quotes around it: "1e5"'
    )
    read(tmp_path, HEAD + text.replace("WORD", "'1e5'"))
    if key in NEVER_NULL:
        assert refusal(tmp_path, HEAD + text.replace("WORD", "null")).endswith(f": {key} must be a text, got null")
    else:
        read(tmp_path, HEAD + text.replace("WORD", "null"))


@pytest.mark.parametrize(
    ("texts", "kind"), [(NUMBERS, "a number"), (BOOLEANS[:6], "a boolean"), (DATES, "a date")], ids=lambda kind: kind
)
def test_numbers_booleans_and_dates_are_told_from_texts(tmp_path: Path, texts: tuple[str, ...], kind: str) -> None:
    for word in texts:
        assert f"YAML reads {word} as {kind}" in refusal(tmp_path, f"{HEAD}name: {word}\n")
    for word in ("a", "1e5x", "0o10", "1.2.3", "v1", "'5'", '"on"', "!!str 5", "|\n  5", "08"):
        assert read(tmp_path, f"{HEAD}name: {word}\n").name == OmegaConf.create({"n": word}).n.strip(
            "'\"|\n "
        ).removeprefix("!!str ") + ("\n" if "|" in word else "")


def test_files_of_groups_are_read_by_their_path_and_by_their_head(tmp_path: Path) -> None:
    assert "line 2: data.path must be a text" in refusal(tmp_path, "name: x\npath: 007\n", "data/mine")
    assert "line 2: data.path must be a text" in refusal(tmp_path, "# @package data\npath: 007\n", "mine/deep/set")
    assert "line 1: name must be a text" in refusal(tmp_path, "name: 007\n", "recipe/llama-7b_mine")
    assert "line 1: trainer.max_steps: YAML reads 010 as" in refusal(tmp_path, "max_steps: 010\n", "trainer/mine")


def test_a_key_that_yaml_does_not_read_as_text_is_refused_in_a_mapping_of_texts(tmp_path: Path) -> None:
    assert refusal(tmp_path, "columns: {on: output}\n", "data/mine").endswith(
        'line 1: data.columns: YAML reads on as a boolean (true), and a key is a text; put quotes around it: "on"'
    )


def test_the_choices_are_named_where_yaml_makes_a_boolean_of_a_word(tmp_path: Path) -> None:
    assert refusal(tmp_path, f"{HEAD}tracking: {{mode: off}}\n").endswith(
        "line 2: tracking.mode must be one of online, offline, disabled, and YAML reads off as a boolean (false)"
    )


@pytest.mark.parametrize(
    ("word", "base", "value"),
    [("010", "an octal", 8), ("0x1F", "a hexadecimal", 31), ("0b11", "a binary", 3), ("-010", "an octal", -8)],
)
def test_numbers_to_other_bases_are_refused(tmp_path: Path, word: str, base: str, value: int) -> None:
    for text in (f"seed: {word}", f"trainer: {{learning_rate: {word}}}", f"callbacks: {{x: {{y: {word}}}}}"):
        assert f"YAML reads {word} as {base} number ({value}); write decimal digits" in refusal(tmp_path, HEAD + text)
    assert "as a number to the base of 60 (90)" in refusal(tmp_path, f"{HEAD}seed: 1:30")


def test_numbers_stay_where_numbers_are_meant(tmp_path: Path) -> None:
    text = "seed: 1_000\ntrainer: {max_steps: 1e3, learning_rate: 1e3, save_steps: 0, eval_steps: 1.5e1}\n"
    assert read(tmp_path, HEAD + text + "callbacks: {x: {y: 1e3}}\ntask: {rows: 1.5}\n") == {
        "seed": 1000,
        "trainer": {"max_steps": 1000, "learning_rate": 1000.0, "save_steps": 0, "eval_steps": 15},
        "callbacks": {"x": {"y": 1000.0}},
        "task": {"rows": 1.5},
    }
    merged = read(tmp_path, f"{HEAD}x: &x {{max_steps: 1e3}}\ntrainer: {{<<: *x, max_steps: 7}}\n")
    assert merged.trainer.max_steps == 7


def test_what_a_file_sweeps_keeps_its_spelling(tmp_path: Path) -> None:
    text = "hydra: {sweeper: {params: {model.revision: '1e5,on,007', trainer.max_steps: 1e2, lora.r: '8,16'}}}\n"
    read(tmp_path, HEAD + text)
    composed = compose_dict(["experiment=mine"], tmp_path)
    assert sweep_params(composed, []) == ["model.revision='1e5',on,007", "trainer.max_steps=100", "lora.r=8,16"]


def test_a_defaults_list_names_one_option_of_its_group(tmp_path: Path) -> None:
    start = f"{tmp_path}/experiment/mine.yaml, line 3: "
    assert refusal(tmp_path, f"{HEAD}defaults:\n- override /lora: [dora, attention]\n") == (
        f"{start}lora takes one option, and this is a list; name one of them"
    )
    assert refusal(tmp_path, f"{HEAD}defaults:\n- override /tracking: no\n") == (
        f"{start}tracking must be the name of an option, and YAML reads no as a boolean (false); "
        'put quotes around it: "no"'
    )
    assert refusal(tmp_path, f"{HEAD}defaults:\n- /mine@data: 5\n").startswith(f"{start}mine@data: an option stays in")
    read(tmp_path, f"{HEAD}defaults:\n- override /callbacks: [early-stopping, mine]\n- _self_\n- /data@data: demo\n")


@pytest.mark.parametrize("group", ["quantization", "lora", "model", "data", "experiment", "sweep", "hydra/launcher"])
def test_a_list_of_options_is_refused_on_the_command_line(group: str) -> None:
    with pytest.raises(UserError) as error:
        compose([f"{group}=[a,b]"])
    assert str(error.value).startswith(f"{group}=[a,b]: {group} takes one option, and this is a list; name one; ")


def test_several_callbacks_are_options_of_one_run() -> None:
    assert list(compose(["callbacks=[none,early-stopping]"]).callbacks) == ["early_stopping"]


def test_every_file_that_is_shipped_is_spelled_so(tmp_path: Path) -> None:
    files = [file.relative_to(CONF_DIR) for file in CONF_DIR.rglob("*.yaml") if file != CONF_DIR / "config.yaml"]
    with reading_spellings(tmp_path):
        for file in files:
            SpelledSource("shipped", str(CONF_DIR)).load_config(str(file))
    assert len(files) > 100


@pytest.mark.full
def test_a_sweep_passes_the_spelling_on_to_its_jobs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qlora", "-m", "task=plan", "plan.device=a6000", "name=1e3", "model.revision=1e5"]
    subprocess.run([*command, "data.subset=007,5"], cwd=tmp_path, check=True, capture_output=True)
    jobs = sorted((tmp_path / "outputs/sweeps/1e3").glob("*/.hydra/config.yaml"))
    assert [OmegaConf.load(job).data.subset for job in jobs] == ["007", "5"]
    assert {OmegaConf.load(job).model.revision for job in jobs} == {"1e5"}


INSIDE = {
    "model: {new_tokens: [{a: b}]}": "model.new_tokens[0] must be a text, got {'a': 'b'}",
    "model: {new_tokens: [[a]]}": "model.new_tokens[0] must be a text, got ['a']",
    "data: {columns: {output: [a]}}": "data.columns.output must be a text, got ['a']",
    "data: {columns: {output: {a: b}}}": "data.columns.output must be a text, got {'a': 'b'}",
    "data: {mix: {a: {path: b, columns: {c.d: [a]}}}}": "data.mix.a.columns.c.d must be a text, got ['a']",
    "evaluation: {metrics: [[a]]}": "evaluation.metrics[0] must be a text, got ['a']",
    "tracking: {tags: [a, [b]]}": "tracking.tags[1] must be a text, got ['b']",
    "trusted: [[a]]": "trusted[0] must be a text, got ['a']",
    "callbacks: {x: 1}": "callbacks.x must be a mapping with a _target_ (module.Class) and its arguments, got 1",
    "callbacks: {x: [a]}": "callbacks.x must be a mapping with a _target_",
    "callbacks: {x: {patience: 1}}": "callbacks.x must be a mapping with a _target_",
    "trainer: {max_steps: 9223372036854775808}": "trainer.max_steps must lie between -2^63 and 2^63, got 92233720",
}


def mistake(folder: Path, text: str) -> str:
    """Returns what is said of a run with a file of the user's own."""
    (folder / "experiment").mkdir(exist_ok=True)
    (folder / "experiment" / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        compose(["experiment=mine"], folder)
    return str(error.value)


@pytest.mark.matrix(6)
@pytest.mark.parametrize("text", INSIDE)
def test_a_list_or_a_mapping_is_no_text_wherever_it_stands(tmp_path: Path, text: str) -> None:
    assert mistake(tmp_path, f"# @package _global_\n{text}\n").startswith(INSIDE[text])


def test_a_list_is_no_text_on_the_command_line_either() -> None:
    for override, sentence in {
        "model.new_tokens=[[a]]": "model.new_tokens[0] must be a text, got ['a']",
        "callbacks.x=1e5": "callbacks.x must be a mapping with a _target_",
    }.items():
        with pytest.raises(UserError) as error:
            compose([override])
        assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    ("group", "entries"),
    {
        "lora": ("/lora: dora", "/lora: attention"),
        "data": ("/data: alpaca", "/data@data: oasst1"),
        "callbacks": ("/callbacks: none", "/callbacks: early-stopping"),
        "hydra/sweeper": ("/hydra/sweeper: optuna", "/hydra/sweeper: basic"),
    }.items(),
)
def test_a_group_is_overridden_once_in_a_defaults_list(tmp_path: Path, group: str, entries: tuple[str, str]) -> None:
    lines = "".join(f"- override {entry}\n" for entry in entries)
    text = f"# @package _global_\ndefaults:\n- override /model: llama-7b\n{lines}"
    file = tmp_path / "experiment" / "mine.yaml"
    assert mistake(tmp_path, text) == (
        f"{file}, line 5: {group} is overridden in line 4 already, and one option would be lost; leave one of the two "
        "lines out"
    )


SHAPED = {
    "trusted: yes": "trusted must be a list such as [a,b], got yes",
    "trusted: a": "trusted must be a list such as [a,b], got a",
    "trusted: {a: b}": "trusted must be a list such as [a,b], got {a: b}",
    "model: {new_tokens: abc}": "model.new_tokens must be a list such as [a,b], got abc",
    "evaluation: {metrics: 1}": "evaluation.metrics must be a list such as [a,b], got 1",
    "data: {columns: [a]}": "data.columns must be a mapping such as {a: 1}, got [a]",
    "data: {columns: a}": "data.columns must be a mapping such as {a: 1}, got a",
    "data: {mix: [a, {b: c}]}": "data.mix must be a mapping such as {a: 1}, got [a, {b: c}]",
    "trainer: {optim_args: [a]}": "trainer.optim_args must be a mapping such as {momentum: 0.9}, got [a]",
    "callbacks: [a]": "callbacks must be a mapping such as {a: 1}, got [a]",
    "model: {new_tokens: [<a>, ~]}": "model.new_tokens[1] must be a text, got ~",
    "tracking: {tags: [null]}": "tracking.tags[0] must be a text, got null",
    "data: {columns: {output: }}": "data.columns.output must be a text, got null",
    "model.revision: x": "model.revision is written as one key; nest it: model: {revision: VALUE}",
    "model: {architecture.head_dim: 8}": "architecture.head_dim is written as one key; nest it: architecture: {head_d",
    "model.architecture.head_dim: 8": "model.architecture.head_dim is written as one key; nest it: model: "
    "{architecture: {head_dim: VALUE}}",
    "hydra.run.dir: x": "hydra.run.dir is written as one key; nest it: hydra: {run: {dir: VALUE}}",
}


@pytest.mark.parametrize("text", SHAPED)
def test_a_value_of_another_shape_is_shown_with_its_line_and_key(tmp_path: Path, text: str) -> None:
    sentence = mistake(tmp_path, f"# @package _global_\n\n{text}\n")
    assert sentence.startswith(f"{tmp_path / 'experiment' / 'mine.yaml'}, line 3: {SHAPED[text]}")


def test_a_list_is_no_file_of_options(tmp_path: Path) -> None:
    file = tmp_path / "experiment" / "mine.yaml"
    said = f"{file} must hold keys and values such as `seed: 1`, got "
    assert mistake(tmp_path, "# @package _global_\n- a\n- b: 1\n") == f"{said}[a, {{b: 1}}]"
    assert mistake(tmp_path, "# @package _global_\nseed\n") == f"{said}seed"


@pytest.mark.parametrize("text", ["seed: 1\n", "", "- a\n", "# mine\n# @package _global_\nseed: 1\n"])
def test_an_experiment_says_in_its_first_line_that_it_is_of_all_groups(tmp_path: Path, text: str) -> None:
    file = tmp_path / "experiment" / "mine.yaml"
    said = f"{file}: an option of experiment sets keys of all groups; put `# @package _global_` into its first line"
    assert mistake(tmp_path, text) == said
    file.write_text(f"# @package _global_\n{text if text != '- a' + chr(10) else ''}")
    assert compose(["experiment=mine"], tmp_path)


def test_a_byte_order_mark_hides_nothing_of_a_file(tmp_path: Path) -> None:
    for group, text in (("experiment", "# @package _global_\nseed: 5\n"), ("lora", "enabled: true\nalpha: 5\n")):
        (tmp_path / group).mkdir()
        (tmp_path / group / "mine.yaml").write_text(f"\ufeff{text}", encoding="utf-8")
    assert compose(["experiment=mine"], tmp_path).seed == 5
    assert compose(["lora=mine", "recipe=none", "lora.target_modules=all-linear", "lora.r=2"], tmp_path).lora.alpha == 5


def test_names_with_dots_stay_where_names_are_free(tmp_path: Path) -> None:
    text = "# @package _global_\ndata: {columns: {a.b: c}}\nhydra: {sweeper: {params: {model.revision: 'a,b'}}}\n"
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    assert compose(["experiment=mine", "hydra/sweeper=basic"], tmp_path).data.columns == {"a.b": "c"}


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("trainer.eval_steps=choice(null,1e1)", "trainer.eval_steps=null,10"),
        ("model.revision=choice(null, 1e5)", "model.revision=null, '1e5'"),
        ("trainer.eval_steps=choice(null)", "trainer.eval_steps=null"),
        ("lora.r=choice(8,16)", "lora.r=choice(8,16)"),
    ],
)
def test_a_choice_may_hold_null(typed: str, kept: str) -> None:
    assert keep_spelling([typed]) == keep_spelling(keep_spelling([typed])) == [kept]


def test_a_path_below_the_home_folder_is_read_as_it_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert keep_spelling(["data.path=~/rows.jsonl"]) == ["data.path='~/rows.jsonl'"]
    assert keep_spelling(["hydra.run.dir=~/runs/x"]) == [f"hydra.run.dir='{tmp_path}/runs/x'"]
    assert keep_spelling(["~lora"]) == ["~lora"]
