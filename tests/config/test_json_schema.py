"""The JSON schema accepts every YAML file of conf/ under its part, and refuses what the config would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from omegaconf import OmegaConf

from qlora import cli
from qlora.config.compose import compose
from qlora.config.fields import config_keys
from qlora.config.help import field_docs
from qlora.config.json_schema import DRAFT, build_schema
from qlora.config.options import CONF_DIR, group_names
from qlora.config.saved_config import config_to_dict
from qlora.errors import UserError

FILES = sorted(file for file in CONF_DIR.rglob("*.yaml") if "hydra" not in file.parts)


def refusals(schema: dict[str, Any], value: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(value)]


def read(file: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(file), resolve=False)


@pytest.mark.parametrize("group", [None, *group_names()])
def test_every_file_of_conf_is_valid_under_its_part(group: str | None) -> None:
    schema = build_schema(group)
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == DRAFT
    files = [file for file in FILES if file.parent == (CONF_DIR / group if group else CONF_DIR)]
    assert files
    for file in files:
        assert not refusals(schema, read(file)), file


@pytest.mark.parametrize("overrides", [[], ["model=llama-7b", "data=oasst1"], ["data=mix", "data.mix.a=x.jsonl"]])
def test_a_config_that_a_run_stores_is_valid(overrides: list[str]) -> None:
    assert not refusals(build_schema(), config_to_dict(compose(overrides)))


@pytest.mark.parametrize(
    ("group", "text"),
    [
        ("lora", "rnak: 3"),
        ("lora", "r: many"),
        ("lora", "bias: nones"),
        ("trainer", "max_steps: 1.5"),
        ("quantization", "double_quant: 3"),
        ("data", "columns: [a]"),
        (None, "lora: {rnak: 3}"),
        ("experiment", "lora: 3"),
        ("model", "architecture: {hidden_size: wide}"),
    ],
)
def test_what_the_config_refuses_the_schema_refuses(group: str | None, text: str) -> None:
    assert refusals(build_schema(group), OmegaConf.to_container(OmegaConf.create(text)))


@pytest.mark.parametrize(
    "text", ["lora: {r: '${seed}'}", "trainer: {max_steps: null, learning_rate: 2e-4}", "seed: ???"]
)
def test_references_and_missing_values_are_accepted(text: str) -> None:
    assert not refusals(build_schema(), OmegaConf.to_container(OmegaConf.create(text)))


def test_every_field_has_its_type_its_meaning_and_its_default() -> None:
    schema = build_schema()
    parts = {**schema["$defs"], "Config": schema}
    for owner, docs in field_docs().items():
        for name, meaning in docs.items():
            described = parts[owner]["properties"][name]
            assert described.get("description", "") == meaning
            assert "$ref" in described or described["anyOf"]
    assert parts["LoraConfig"]["properties"]["dropout"]["default"] == 0.0
    assert {"enum": ["none", "all", "lora_only"]} in parts["LoraConfig"]["properties"]["bias"]["anyOf"]
    assert {key for key in config_keys() if "." not in key} == schema["properties"].keys() - {"defaults", "hydra"}


def test_the_command_line_prints_it_whole_or_for_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    for args, group in ((["--schema"], None), (["--schema", "lora"], "lora")):
        cli.run(args)
        assert json.loads(capsys.readouterr().out) == build_schema(group)
    with pytest.raises(UserError, match=r"^--schema lroa: there is no such group \(did you mean lora\?\)"):
        cli.run(["--schema", "lroa"])
