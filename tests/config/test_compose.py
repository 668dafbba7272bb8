"""A mistake in a config is one clear sentence: what (full key or file), why, and the way out."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, get_origin

import pytest
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora.config import schema
from qlora.config.command import check_overrides
from qlora.config.compose import compose, compose_dict
from qlora.config.conversion import to_config
from qlora.config.fields import config_keys, field_type, in_words, may_be_null
from qlora.config.foreign_names import FOREIGN_NAMES
from qlora.config.messages import explain
from qlora.config.options import CONF_DIR, group_names
from qlora.config.registries.chat_templates import TEMPLATE_NAMES
from qlora.config.registries.data_formats import FORMAT_NAMES
from qlora.config.schema import MixConfig
from qlora.config.suggestions import unknown_flag
from qlora.errors import UserError, suggest

ROOT = Path(__file__).parents[2]
KEYS = list(config_keys())
FIELDS = [key for key in KEYS if key not in group_names()]
NUMBERS = [key for key in FIELDS if field_type(key) in (int, float)]


@pytest.fixture(scope="module")
def base() -> DictConfig:
    return compose_dict(["model=llama-7b", "model.weights=random"])


def message(*overrides: str, config_dir: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        compose(overrides, config_dir)
    return str(caught.value)


def message_of_value(base: DictConfig, key: str, value: Any) -> str:
    """Returns the refusal of one value, without composing anew."""
    changed = base.copy()
    try:
        OmegaConf.update(changed, key, value)
    except OmegaConfBaseException as error:
        return str(explain(error))
    with pytest.raises(UserError) as caught:
        to_config(changed)
    return str(caught.value)


def typos(name: str, taken: set[str]) -> Iterator[str]:
    """Yields misspelled names: a doubled letter, a dropped letter, two swapped letters."""
    middle = len(name) // 2
    edits = [name[: middle + 1] + name[middle:]]
    if len(name) > 3:
        edits += [name[:middle] + name[middle + 1 :], name[:1] + name[2] + name[1] + name[3:]]
    yield from (edit for edit in edits if edit not in taken and edit != name)


def suggested(text: str) -> list[str]:
    match = re.search(r"\(did you mean (.*)\?\)", text)
    return match[1].split(" or ") if match else []


def siblings(key: str) -> set[str]:
    parent = key.rpartition(".")[0]
    names = {*KEYS, *group_names(), *FOREIGN_NAMES}
    return {name.rpartition(".")[2] for name in names if name.rpartition(".")[0] == parent}


# --- keys that do not exist ---------------------------------------------------------------------------------------


def check_misspelled(key: str, sign: str, kinds: slice) -> None:
    parent, dot, name = key.rpartition(".")
    for typo in list(typos(name, siblings(key)))[kinds]:
        text = message(f"{sign}{parent}{dot}{typo}=1")
        assert text.startswith(f"unknown key '{parent}{dot}{typo}'")
        assert key in suggested(text), text
        assert "`qlora --help" in text


@pytest.mark.matrix(40)
@pytest.mark.parametrize("key", KEYS)
def test_a_misspelled_key_is_refused_with_the_right_one(key: str) -> None:
    check_misspelled(key, "", slice(1))


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_a_key_is_refused_however_it_is_misspelled_and_added(sign: str) -> None:
    for key in KEYS[::40]:
        check_misspelled(key, sign, slice(3))


@pytest.mark.full
@pytest.mark.parametrize(("sign", "kinds"), [("", slice(1, 3)), ("+", slice(1)), ("++", slice(1))])
@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_refused_however_it_is_misspelled_and_added(key: str, sign: str, kinds: slice) -> None:
    check_misspelled(key, sign, kinds)


@pytest.mark.parametrize("group", group_names())
def test_a_misspelled_group_is_refused_with_the_right_one(group: str) -> None:
    for typo in typos(group, siblings(group)):
        assert group in suggested(message(f"{typo}=any"))
    fields = [key for key in KEYS if key.startswith(f"{group}.")]
    if fields:
        typo = next(typos(group, siblings(group)))
        assert fields[0] in suggested(message(f"{typo}.{fields[0].partition('.')[2]}=1"))


@pytest.mark.matrix(7)
@pytest.mark.parametrize("group", [group for group in group_names() if any(k.startswith(f"{group}.") for k in KEYS)])
def test_a_misspelled_key_in_a_user_s_file_is_refused_with_file_and_right_key(group: str, tmp_path: Path) -> None:
    key = next(name for name in FIELDS if name.startswith(f"{group}."))
    typo = next(typos(key.partition(".")[2], siblings(key)))
    (tmp_path / group).mkdir()
    file = tmp_path / group / "mine.yaml"
    file.write_text(f"{typo}: 1\n", encoding="utf-8")
    text = message(f"{group}=mine", config_dir=tmp_path)
    assert text.startswith(f"unknown key '{group}.{typo}' in {file} ")
    assert key in suggested(text)


def test_a_misspelled_group_in_a_user_s_experiment_is_refused(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    for body in ("lroa: {r: 3}", "defaults:\n  - override /lroa: none"):
        file.write_text(f"# @package _global_\n{body}\n", encoding="utf-8")
        assert message("experiment=mine", config_dir=tmp_path) == (
            f"unknown key 'lroa' in {file} (did you mean lora?); see `qlora --help`"
        )


@pytest.mark.matrix(40)
@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        *((name, ours) for name, ours in FOREIGN_NAMES.items() if name not in group_names()),
        ("lora.rnak", "lora.r"),
        ("lroa.r", "lora.r"),
        ("trainer.bits", "quantization.bits"),
        ("learning_rte", "trainer.learning_rate"),
        ("optimizer.weight_decay", "trainer.weight_decay"),
    ],
)
def test_a_name_from_elsewhere_leads_to_ours(typed: str, ours: str) -> None:
    assert suggested(message(f"{typed}=1")) == [ours]


def test_a_key_far_from_everything_gets_no_suggestion() -> None:
    assert message("tiny=3") == "unknown key 'tiny'; see `qlora --help`"


def test_a_plus_before_an_existing_key_is_refused() -> None:
    assert message("+lora.r=3") == "+lora.r=3: lora.r exists; write it without the +"
    assert compose(["++lora.r=3"]).lora.r == 3


def test_free_mappings_take_any_entry() -> None:
    for sign in ("", "+", "++"):
        config = compose(
            [f"{sign}trainer.lr_scheduler_kwargs.num_cycles=3", f"{sign}callbacks.mine._target_=a.B", "trusted=[a]"]
        )
        assert config.trainer.lr_scheduler_kwargs is not None
        assert config.trainer.lr_scheduler_kwargs["num_cycles"] == 3
        assert config.callbacks == {"mine": {"_target_": "a.B"}}
    assert compose(["data.columns={output: answer}"]).data.columns == {"output": "answer"}


@pytest.mark.full
def test_entries_of_a_mix_are_typed_and_their_typos_found() -> None:
    config = compose(["data=mix", "data.mix.a=a.jsonl", "data.mix.b.path=b.jsonl", "data.mix.b.weight=2"])
    assert config.data.mix == {"a": MixConfig(path="a.jsonl"), "b": MixConfig(path="b.jsonl", weight=2.0)}
    start = ["data=mix", "data.mix.a.path=a.jsonl"]
    assert "unknown key 'data.mix.a.wight' (did you mean weight?)" in message(*start, "data.mix.a.wight=2")
    assert message(*start, "data.mix.a.weight=0") == "data.mix.a.weight must be positive, got 0.0"
    assert message(*start, "data.split=test") == (
        "data.split=test is not read beside data.mix, for each of its sets has its own; set data.mix.NAME.split"
    )
    assert message("data=mix", "data.mix.a.weight=2").startswith("data.mix.a needs a path: data.mix.a=FILE")
    assert "data.mix.a.format='alpca' is unknown (did you mean alpaca?)" in message(*start, "data.mix.a.format=alpca")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("~lora", "~lora: a run needs every group; choose an option instead, e.g. lora=none"),
        ("~lora.r", "~lora.r: a field cannot be removed; give it another value, or null if it may be unset"),
        ("lora.r", "'lora.r' is not an option; options are written KEY=VALUE, e.g. lora.r=16"),
        ("lora@foo=none", "lora@foo=none: an option stays in its group; write lora=OPTION without the @"),
        ("experiment=null", "experiment=null: a group takes the name of an option; leave it out"),
        ("lora={r:3}", "lora={...}: name an option of lora and set single fields with lora.FIELD=VALUE"),
        ("lora.r=${nope}", "lora.r refers to ${nope}, but there is no such key"),
        ("lora.r=${seeed}", "lora.r refers to ${seeed}, but there is no such key (did you mean seed?)"),
    ],
)
def test_a_malformed_override_says_how_to_write_it(override: str, text: str) -> None:
    assert message(override, "recipe=none") == text


def test_an_unreadable_override_is_refused() -> None:
    assert message("lora.r=[1") == "'lora.r=[1' cannot be read; write lora.r=[1]"


@pytest.mark.parametrize(("flag", "near"), [("--bits", "quantization.bits"), ("--multirn", "--multirun")])
def test_an_unknown_flag_leads_to_a_key_or_a_flag(flag: str, near: str) -> None:
    assert suggested(str(unknown_flag(flag))) == [near]
    assert "KEY=VALUE without dashes" in str(unknown_flag(f"{flag}=4"))


# --- options that do not exist ------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", group_names())
def test_an_unknown_option_is_refused_with_the_nearest(group: str) -> None:
    options = sorted(file.stem for file in (CONF_DIR / group).glob("*.yaml"))
    for name in options[:2]:
        typo = next(typos(name, set(options)))
        text = message(f"{group}={typo}")
        assert text.startswith(f"{group}={typo}: {group} has no such option (did you mean {name}?); choose one of ")
        page = f" the {len(options)} of `qlora --help {group}`"
        assert text.endswith(", ".join(options)) or page in text
        assert len(text) < 200


def test_an_unknown_option_in_a_user_s_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    file = tmp_path / "lora" / "mine.yaml"
    file.write_text("defaults:\n  - all-liner\n", encoding="utf-8")
    text = message("lora=mine", config_dir=tmp_path)
    assert text.startswith(f"lora=all-liner in {file}: lora has no such option (did you mean all-linear?)")


# --- values -------------------------------------------------------------------------------------------------------


def wrong_value(key: str) -> Any:
    hint = field_type(key)
    if hint is str:
        return ["a"]
    return 5 if get_origin(hint) is dict or hint is schema.ArchitectureConfig else "abc"


TYPED = [key for key in FIELDS if field_type(key) is not Any and not isinstance(field_type(key), UnionType)]
"""The fields whose type Hydra can express; the others have a sentence of their own."""


@pytest.mark.matrix(40)
@pytest.mark.parametrize("key", TYPED)
def test_a_value_of_the_wrong_type_is_refused_with_the_right_type(base: DictConfig, key: str) -> None:
    text = message_of_value(base, key, wrong_value(key))
    assert text.startswith(f"{key} must be {in_words(key)}, got "), text


@pytest.mark.parametrize("name", ["compile", "fused_linear", "fused_attention", "fused_loss"])
@pytest.mark.parametrize("value", ["on", 1, None, ["auto"]])
def test_a_part_of_the_fast_step_is_true_false_or_auto(base: DictConfig, name: str, value: Any) -> None:
    text = message_of_value(base, f"trainer.{name}", value)
    assert text == f"trainer.{name} must be true, false or auto, got {value!r}"


@pytest.mark.matrix(50)
@pytest.mark.parametrize("key", [key for key in TYPED if not may_be_null(key)])
def test_null_is_refused_where_a_value_is_needed(base: DictConfig, key: str) -> None:
    assert message_of_value(base, key, None) == f"{key} must be {in_words(key)}, got null"


@pytest.mark.parametrize(
    "key", [k for k in FIELDS if isinstance(field_type(k), type) and issubclass(field_type(k), Enum)]
)
def test_an_unknown_enum_value_is_refused_with_the_choices(base: DictConfig, key: str) -> None:
    name = max(field_type(key).__members__, key=len)
    typo = next(typos(name, set(field_type(key).__members__)))
    text = message_of_value(base, key, typo)
    assert text.startswith(f"{key} must be {in_words(key)}, got {typo!r}")
    assert name in suggested(text)


def test_a_wrong_value_on_the_command_line_is_one_sentence() -> None:
    assert message("lora.r=abc") == "lora.r must be a whole number, got 'abc'"
    assert message("data.path=[a,b]") == (
        "data.path must be a text or null, got ['a', 'b']; one after the other: -m data.path=a,b"
    )
    assert message("quantization.quant_type=nf5") == (
        "quantization.quant_type must be one of nf4, fp4, got 'nf5' (did you mean nf4?)"
    )


# Any number is fine for these.
UNBOUNDED = {"generation.length_penalty"}
# The smallest or largest number that is refused, where -1 is not.
REFUSED = {"generation.penalty_alpha": 0.6, "generation.num_beam_groups": 3, "lora.loraplus_lr_ratio": 0.5}


@pytest.mark.matrix(50)
@pytest.mark.parametrize("key", [key for key in NUMBERS if key not in UNBOUNDED])
def test_a_number_out_of_range_is_refused(base: DictConfig, key: str) -> None:
    assert message_of_value(base, key, REFUSED.get(key, -1)).startswith(key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora.r", 0),
        ("lora.alpha", 0),
        ("lora.dropout", 1),
        ("trainer.learning_rate", 0),
        ("trainer.learning_rate", float("inf")),
        ("trainer.adam_beta2", 1),
        ("trainer.save_steps", 0),
        ("trainer.memory_budget", "0GB"),
        ("trainer.memory_budget", "24"),
        ("generation.top_p", 0),
        ("generation.top_p", 1.1),
        ("generation.typical_p", 1.1),
        ("data.target_max_len", 0),
        ("data.max_eval_samples", 0),
        ("quantization.bits", 5),
        ("seed", 2**32),
        ("model.architecture.vocab_size", 0),
    ],
)
def test_the_first_number_beyond_a_limit_is_refused(base: DictConfig, key: str, value: float | str) -> None:
    assert message_of_value(base, key, value).startswith(f"{key} must ")


CROSS_FIELD = {
    "quantization=int8 quantization.double_quant=true": "quantization.double_quant=true needs quantization.bits=4 of "
    "bitsandbytes, got quantization.bits=8; choose quantization=int8, quantization=none or quantization=fp32, or set "
    "quantization.double_quant=false",
    "quantization=none quantization.compute_dtype=fp32": "quantization.compute_dtype=fp32 contradicts "
    "quantization.bits=16; use quantization=fp32 for 32-bit weights, or compute_dtype=auto, bf16 or fp16",
    "data=local": "data.path is not set; give a file or a hub id, e.g. data=local data.path=my_rows.jsonl",
    "trainer.max_steps=9 trainer.num_train_epochs=3": "trainer.max_steps=9 and trainer.num_train_epochs=3.0: set "
    "exactly one of the two and the other to null, e.g. trainer.num_train_epochs=3 trainer.max_steps=null",
    "trainer.max_steps=null": "trainer.max_steps=null and trainer.num_train_epochs=null: set exactly one of the two "
    "and the other to null, e.g. trainer.num_train_epochs=3 trainer.max_steps=null",
    "lora=none": "lora=none trains all weights, which 4-bit weights do not allow; choose quantization=none (16 bit) or "
    "quantization=fp32, or an adapter with lora=all-linear",
    "lora=pissa": "lora.init=pissa rewrites the base weights, which quantization.bits=4 does not allow exactly; it is "
    "valid with quantization=none or quantization=fp32. With 4 bits use lora.init=loftq or eva",
    "lora=loftq quantization=none": "lora.init=loftq corrects the error of 4-bit weights, got quantization.bits=16; "
    "choose quantization=nf4, or another lora.init",
    "lora=dora quantization=int8": "lora.use_dora=true (lora=dora) reads the full weights in each "
    "step, which PEFT cannot do with 8-bit layers in training; choose quantization=nf4 or quantization=none, or train "
    "without it (lora=all-linear lora.use_dora=false)",
    "lora.use_dora=true quantization=int8": "lora.use_dora=true (lora=dora) reads the full weights in each "
    "step, which PEFT cannot do with 8-bit layers in training; choose quantization=nf4 or quantization=none, or train "
    "without it (lora=all-linear lora.use_dora=false)",
    "generation.num_beam_groups=2 generation.num_beams=4": "generation.num_beam_groups: transformers moved this search "
    "to a hub repository of its own and runs it as remote code; set model.trust_remote_code=true to allow that, or "
    "leave the option out",
    "generation.penalty_alpha=0.6": "generation.penalty_alpha: transformers moved this search to a hub repository of "
    "its own and runs it as remote code; set model.trust_remote_code=true to allow that, or leave the option out",
    "generation.min_new_tokens=17": "generation.min_new_tokens must be null or lie between 0 and "
    "generation.max_new_tokens, got 17",
    "generation.num_beam_groups=3 generation.num_beams=4": "generation.num_beam_groups must divide "
    "generation.num_beams, got 3",
    "model.weights=random model.device_map=auto": "model.weights=random initialises the base on one device; leave "
    "model.device_map and model.max_memory out",
    "model.weights=random model.architecture=null": "model.weights=random needs the shape of tiny in "
    "model.architecture; choose a preset with model=NAME or set model.architecture.* fields",
    "lora=none quantization=none model.device_map=auto": "model.device_map and model.max_memory spread a frozen "
    "base; full finetuning (lora=none) needs the model on one device: leave them out",
    "trainer.memory_budget=24GB model.device_map=auto": "trainer.memory_budget counts one GPU's memory, and "
    "model.device_map and model.max_memory spread the base over several; leave the one or the others out",
    "name=a/b": "name='a/b' must be a plain folder name; use hydra.run.dir=FOLDER for another place",
    "lora.target_modules=[]": "lora.target_modules must be 'all-linear' or a list of module names, got []",
    "objective=eval_los evaluation=loss": "objective='eval_los' is not a metric of this run (did you mean eval_loss?); "
    "choose one of eval_loss, eval_perplexity, base_eval_loss and 15 more, or null",
    "evaluation.metrics=[exct_match]": "evaluation.metrics: 'exct_match' is unknown (did you mean exact_match?); "
    "choose from exact_match, evaluate:NAME of the evaluate library, or name your own function as module:function",
    "data.format=alpca": "data.format='alpca' is unknown (did you mean alpaca?); choose one of "
    f"{', '.join(FORMAT_NAMES)}, or module:function of your own",
    "data.template=chatm": "data.template='chatm' is unknown (did you mean chatml?); choose one of "
    f"{', '.join(TEMPLATE_NAMES)}, or a file with a Jinja chat template (my.jinja)",
}


@pytest.mark.matrix(6)
@pytest.mark.parametrize("overrides", CROSS_FIELD)
def test_fields_that_contradict_each_other_are_refused(overrides: str) -> None:
    assert message(*overrides.split()) == CROSS_FIELD[overrides]


@pytest.mark.parametrize(("key", "near"), [("optim", "adamw_torch"), ("lr_scheduler_type", "cosine")])
def test_an_unknown_optimizer_or_schedule_is_refused(base: DictConfig, key: str, near: str) -> None:
    typo = near[:-1] if key == "optim" else near + "e"
    assert near in suggested(message_of_value(base, f"trainer.{key}", typo))


# --- a user's folder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"r: [8\nalpha: 3\n", "{file}, line 2: this is not valid YAML: expected ',' or ']', but got ':'"),
        (b"r: 8\nr: 9\n", "{file}, line 2: this is not valid YAML: found duplicate key r"),
        (b"r: 8\n\talpha: 3\n", "{file}, line 2: this is not valid YAML: found character '\\t' that cannot start any "
         "token; indent with spaces"),
        (b"\xff\xfe", "{file} is not UTF-8 text; save it as UTF-8"),
        (b"- 1\n", "{file} must hold keys and values such as `seed: 1`, got [1]"),
        (b"r: abc\n", "lora.r in {file} must be a whole number, got 'abc'"),
        (b"bias: nones\n", "lora.bias in {file} must be one of none, all, lora_only, got 'nones' (did you mean none?)"),
        (b"defaults: 3\nr: 3\n", "Invalid defaults list in 'lora/mine', defaults must be a list (got int)"),
        (b"r: 8\n", "lora.alpha is not set; choose an option for its group or give lora.alpha=VALUE"),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused_with_its_name(tmp_path: Path, body: bytes, text: str) -> None:
    (tmp_path / "lora").mkdir()
    file = tmp_path / "lora" / "mine.yaml"
    file.write_bytes(body)
    assert message("lora=mine", "recipe=none", config_dir=tmp_path) == text.format(file=file)


@pytest.mark.parametrize("body", ["lora:", "lora: 5"])
def test_a_group_set_to_a_scalar_in_an_experiment_is_refused(tmp_path: Path, body: str) -> None:
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    file.write_text(f"# @package _global_\n{body}\n", encoding="utf-8")
    value = body.partition(": ")[2] or "null"
    text = f"lora in {file} must be a mapping of fields, got {value}"
    assert message("experiment=mine", config_dir=tmp_path) == text


def test_a_file_that_ours_would_hide_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    file = tmp_path / "lora" / "dora.yaml"
    file.write_text("r: 4\n", encoding="utf-8")
    assert message(config_dir=tmp_path) == (
        f"{file}: the name lora/dora is taken by an option of qlora, which Hydra reads first; "
        "give the file another name"
    )


def test_a_user_s_option_is_composed(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "small.yaml").write_text("defaults:\n  - all-linear\n\nr: 4\n", encoding="utf-8")
    config = compose(["lora=small", "recipe=none"], tmp_path)
    assert (config.lora.r, config.lora.alpha) == (4, 16)


def test_an_unknown_config_dir_is_refused() -> None:
    assert message(config_dir=Path("/nowhere/at/all")) == (
        "--config-dir /nowhere/at/all: there is no such folder (/nowhere/at/all)"
    )


# --- sweeps -------------------------------------------------------------------------------------------------------


@pytest.mark.matrix(4)
@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        ("lora.r=0,1,2", "lora.r must be positive, got 0"),
        ("lora.r=1,2,0", "lora.r must be positive, got 0"),
        ("lora.r=1,foo,2", "lora.r must be a whole number, got 'foo'"),
        ("seed=1,2 quantization=nf4,fp4,nf3", "quantization=nf3: quantization has no such option (did you mean nf4?)"),
        ("quantization=none,fp32,nf4 lora=pissa", "lora.init=pissa rewrites the base weights"),
        ("sweep=lora-rank lora.r=1,0", "lora.r must be positive, got 0"),
        ("lora.rnak=interval(1,3)", "unknown key 'lora.rnak' (did you mean lora.r?)"),
        ("hydra/sweeper=optuna lora.dropout=interval(0,3)", "lora.dropout must be at least 0 and below 1, got 3.0"),
        ("sweep=lora-rank,seeds", "sweep=lora-rank,seeds: one sweep at a time"),
    ],
)
def test_a_bad_value_anywhere_in_a_sweep_is_refused_before_a_job_starts(overrides: str, start: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(start)}"):
        check_overrides(overrides.split(), multirun=True)


def test_a_bad_value_in_a_sweep_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    text = "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {lora.r: '8,0'}}}\n"
    (tmp_path / "sweep" / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"^lora\.r must be positive, got 0"):
        check_overrides(["sweep=mine"], tmp_path)


def test_a_sweep_file_needs_no_m_and_combines_with_the_command_line() -> None:
    check_overrides(["sweep=lora-rank", "seed=1,2", "trainer.max_steps=5"])


def test_several_values_without_m_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"^lora\.r=1,2 gives several values: add -m to run a sweep, or write lora\.r=VALUE"
    ):
        check_overrides(["lora.r=1,2"])


# --- spelling -----------------------------------------------------------------------------------------------------


def test_a_swap_of_neighbours_is_one_edit() -> None:
    assert suggest("rnak", ["rink", "rank"]) == ["rank"]


def test_suggestions_are_the_nearest_only() -> None:
    assert suggest("nf3", ["nf4", "fp4", "none"]) == ["nf4"]
    assert suggest("zzz", ["nf4", "fp4", "none"]) == []
    assert suggest("adamw", ["adalomo", "adamw_torch", "paged_adamw"]) == ["adamw_torch"]


# --- the command line ---------------------------------------------------------------------------------------------


def qlora(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qlora", *args],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def cpu_seconds() -> float:
    """Returns what children have computed, which does not depend on what else the machine does."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.cold
@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["--help"], 0),
        (["--help", "lora"], 0),
        (["--cfg", "job"], 0),
        (["--info", "defaults"], 0),
        (["lora.rnak=3"], 1),
    ],
)
def test_the_command_line_answers_at_once(args: list[str], code: int) -> None:
    start = cpu_seconds()
    done = qlora(*args)
    seconds = cpu_seconds() - start
    print(f"{' '.join(args)}: {seconds:.2f} s")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert seconds < 2


@pytest.mark.cold
def test_a_mistake_is_one_line_on_standard_error() -> None:
    done = qlora("lora.rnak=3")
    assert done.stderr == "error: unknown key 'lora.rnak' (did you mean lora.r?); see `qlora --help lora`\n"
    assert done.stdout == ""


@pytest.mark.parametrize(("line", "answer"), [("qlora lora=", "lora=dora"), ("qlora lora.us", "lora.use_dora=")])
def test_the_shell_completes_options_and_keys(line: str, answer: str) -> None:
    done = qlora("-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert answer in done.stdout.split()


def test_composing_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; import qlora.cli, qlora.config.help; from qlora.config.compose import compose; "
        "compose(['model=llama-7b']); "
        "print({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_list_in_place_of_a_mapping_is_shown_beside_what_is_expected() -> None:
    for override, said in {
        "trainer.optim_args=[a]": "trainer.optim_args must be a mapping such as {momentum: 0.9} or null, got [a]",
        "trainer.optim_args=true": "trainer.optim_args must be a mapping such as {momentum: 0.9} or null, got True",
        "data.columns=[a,b]": "data.columns must be a mapping such as {a: 1}, got [a,b]",
    }.items():
        with pytest.raises(UserError) as refused:
            compose([override])
        assert str(refused.value) == said
    assert compose(["trainer.optim=sgd", "trainer.optim_args={momentum: 0.9}"]).trainer.optim_args == {"momentum": 0.9}
