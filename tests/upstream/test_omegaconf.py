"""What `qlora.upstream.omegaconf` takes from OmegaConf's inside is there, with the bodies that were tested."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml
from contract import check_body, check_signature
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_omega_conf_dumper, get_yaml_loader
from omegaconf.basecontainer import BaseContainer
from omegaconf.nodes import ValueNode

from qlora.upstream.omegaconf import is_filled, only_resolvers, raw_node, raw_value

SIGNATURES: dict[Callable[..., Any], list[str]] = {
    get_omega_conf_dumper: [],
    get_yaml_loader: [],
    DictConfig._get_node: [
        *("self", "key", "validate_access", "validate_key", "throw_on_missing_value", "throw_on_missing_key"),
    ],
    ValueNode._value: ["self"],
    DictConfig._is_none: ["self"],
    DictConfig._is_missing: ["self"],
    DictConfig._is_interpolation: ["self"],
}
"""What is called, by the parameters that it takes."""

BODIES: dict[Callable[..., Any], dict[str, str]] = {
    OmegaConf._get_resolver: {
        "2.3.1": "3c1762839dedf7bff2e8951358e04c44235527029f2a8ffb6b6f0fff24c5e710",
    },
    OmegaConf.register_new_resolver: {
        "2.3.1": "064c0bdd726abd5827d86229d53d32625c883c8eaaf605bb14d5055ea6f529ed",
    },
    OmegaConf.clear_resolvers: {
        "2.3.1": "a0db40e31d881885e5b78298075db562db378f05d1dc2cd96e690bcfe538a305",
    },
}
"""What reads or writes the table of resolvers that is replaced, by the hash of its source in each tested version."""


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_a_private_function_takes_what_it_is_given(function: Callable[..., Any]) -> None:
    check_signature(function, SIGNATURES[function])


@pytest.mark.parametrize("function", BODIES, ids=lambda function: function.__qualname__)
def test_the_body_that_reads_the_resolvers_is_known(function: Callable[..., Any]) -> None:
    check_body(function, BODIES[function])


def test_a_raw_value_is_not_resolved() -> None:
    config = OmegaConf.create({"a": "${b}", "b": 1, "c": "???", "d": None, "e": {"f": 1}})
    assert [raw_value(raw_node(config, key)) for key in "abcd"] == ["${b}", 1, "???", None]
    assert raw_value(raw_node(config, "e")) == {"f": 1}
    assert is_filled(raw_node(config, "e"))
    assert not is_filled(raw_node(OmegaConf.create({"a": DictConfig(None)}), "a"))


def test_other_resolvers_are_hidden_inside_the_block() -> None:
    OmegaConf.register_new_resolver("contract.kept", lambda: 1, replace=True)
    OmegaConf.register_new_resolver("contract.hidden", lambda: 1, replace=True)
    try:
        with only_resolvers(lambda name: name == "contract.kept"):
            assert list(BaseContainer._resolvers) == ["contract.kept"]
            OmegaConf.register_new_resolver("contract.inside", lambda: 1, replace=True)
        assert all(OmegaConf.has_resolver(f"contract.{name}") for name in ("kept", "hidden", "inside"))
    finally:
        for name in ("kept", "hidden", "inside"):
            OmegaConf.clear_resolver(f"contract.{name}")


def test_yaml_is_read_and_written_as_omegaconf_does() -> None:
    assert yaml.load("x: 2e-4", Loader=get_yaml_loader()) == {"x": 2e-4}
    assert yaml.dump({"x": "2e-4"}, Dumper=get_omega_conf_dumper()) == "x: '2e-4'\n"
