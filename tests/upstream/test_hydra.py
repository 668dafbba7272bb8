"""What `qlora.upstream.hydra` takes from Hydra's inside is there, with the bodies that were tested."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from contract import check_body, check_signature
from hydra._internal import hydra as main
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigSource

from qlora.config.checked_loader import CheckedLoader
from qlora.config.compose import register
from qlora.config.file_spelling import SpelledSource
from qlora.upstream import hydra

SIGNATURES: dict[Callable[..., Any], list[str]] = {
    Hydra.create_main_hydra2: ["task_name", "config_search_path"],
    ConfigLoaderImpl.__init__: ["self", "config_search_path"],
    create_config_search_path: ["search_path_dir"],
    get_args_parser: [],
    ConfigSource._normalize_file_name: ["filename"],
    ConfigSource._get_header_dict: ["config_text"],
    SourcesRegistry.instance: ["args", "kwargs"],
    OverridesParser.create: ["config_loader"],
}
"""What is called, by the parameters that it takes."""

BODIES: dict[Callable[..., Any], dict[str, str]] = {
    ConfigLoaderImpl._load_configuration_impl: {
        "1.3.8": "f611c97e466f94db72ac0a127250fa439eb79a30fe164968e5d71f543bb960c2",
    },
    ConfigLoaderImpl._load_single_config: {
        "1.3.8": "cf33039b7488e6cfa34d6771642a44b67e23cae41be5eef807f49285d71d7c30",
    },
    FileConfigSource.load_config: {
        "1.3.8": "f62f895694ab1a7336f1ea2f8e15f61567570576e49daab79a1f006e8340050f",
    },
    Hydra.create_main_hydra2: {  # which looks `ConfigLoaderImpl` up in its module, where ours is put
        "1.3.8": "e361a497916c34235dda0af7e271feeb57d1c49ef6902bd950ad0aedc563d123",
    },
}
"""What is overridden, or reads a name that is replaced, by the hash of its source in each tested version."""

OVERRIDDEN = {
    hydra.ConfigLoader: (ConfigLoaderImpl, ("_load_configuration_impl", "_load_single_config")),
    SpelledSource: (FileConfigSource, ("load_config",)),
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_a_private_function_takes_what_it_is_given(function: Callable[..., Any]) -> None:
    check_signature(function, SIGNATURES[function])


@pytest.mark.parametrize("function", BODIES, ids=lambda function: function.__qualname__)
def test_the_body_of_an_overridden_method_is_known(function: Callable[..., Any]) -> None:
    check_body(function, BODIES[function])


@pytest.mark.parametrize("ours", OVERRIDDEN, ids=lambda ours: ours.__name__)
def test_an_override_takes_the_parameters_of_its_method(ours: type) -> None:
    upstream, names = OVERRIDDEN[ours]
    for name in names:
        assert name in ours.__dict__
        check_signature(ours.__dict__[name], list(inspect.signature(getattr(upstream, name)).parameters))


def test_hydra_composes_with_the_checked_loader() -> None:
    register()
    assert main.ConfigLoaderImpl is CheckedLoader


def test_another_reader_serves_inside_the_block_alone() -> None:
    Plugins.instance()
    types = SourcesRegistry.instance().types
    previous = types["file"]
    with hydra.reading_files_with(SpelledSource):
        assert types["file"] is SpelledSource
    assert types["file"] is previous


def test_the_lexer_finds_the_tokens_of_an_override() -> None:
    assert [token.text for token in hydra.override_tokens("lora.r=[1, 2]")] == ["lora.r", "=", "[", "1", ", ", "2", "]"]
    for name in ("INT", "FLOAT", "BOOL", "NULL", "COMMA", "COLON", "EQUAL", "WS", "POPEN", "PCLOSE"):
        assert isinstance(getattr(hydra.OverrideLexer, name), int)
    for kind in ("BRACKET", "BRACE"):
        assert isinstance(getattr(hydra.OverrideLexer, f"{kind}_OPEN"), int)
        assert isinstance(getattr(hydra.OverrideLexer, f"{kind}_CLOSE"), int)
