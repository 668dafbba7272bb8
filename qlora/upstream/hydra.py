"""Private names of Hydra 1.3, and why each is needed.

A config may name code and files, so this project reads overrides and files before Hydra does, and refuses some of them.
Hydra has no public place for that: its composer and its file reader are extended here, and put in place of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from antlr4 import InputStream
from hydra._internal import hydra as _main
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

__all__ = ["Hydra", "OverrideLexer"]
"""`Hydra.create_main_hydra2` composes with a search path of ours, which `hydra.initialize_config_dir` does not take.
`OverrideLexer` is the generated lexer of overrides: it finds where a value begins and ends before Hydra reads it."""


def flag_parser() -> argparse.ArgumentParser:
    """Returns the parser of Hydra's command line, which `hydra.main` keeps to itself."""
    parser: argparse.ArgumentParser = get_args_parser()
    return parser


def override_tokens(text: str) -> list[Any]:
    """Returns the tokens of an override; what the lexer cannot read is left to the parser, which says why."""
    lexer = OverrideLexer(InputStream(text))
    lexer.removeErrorListeners()
    return list(lexer.getAllTokens())


def search_path_of(folder: Path) -> ConfigSearchPath:
    """Returns the search path with one folder of options, and Hydra's own entries."""
    return create_config_search_path(str(folder))


class FileSource(FileConfigSource):
    """Hydra's reader of YAML files, which subclasses check."""

    def file_of(self, config_path: str) -> Path:
        """Returns the file of an option such as `lora/none`."""
        return Path(self.path) / self._normalize_file_name(config_path)

    def read_header(self, file: Path) -> dict[str, str | None]:
        """Returns the header of a file (`# @package ...`), behind a byte order mark too, where Hydra sees none."""
        with file.open(encoding="utf-8-sig") as stream:
            return self._get_header_dict(stream.read(512))


@contextmanager
def reading_files_with(source: type[FileSource]) -> Iterator[None]:
    """Puts another reader in place of Hydra's own inside the block; Hydra refuses a second one for the same scheme."""
    Plugins.instance()  # registers Hydra's own reader, once
    types = SourcesRegistry.instance().types
    previous = types[source.scheme()]
    types[source.scheme()] = source
    try:
        yield
    finally:
        types[source.scheme()] = previous


class ConfigLoader(ConfigLoaderImpl):
    """Hydra's composer, with places for subclasses to check what it reads and what it made."""

    def is_checked(self) -> bool:
        """Returns whether a config of this search path is to be checked; Hydra composes others by itself."""
        return False

    def check_path(self, config_path: str) -> None:
        """Called before an option is read."""

    def check_option(self, loaded: ConfigResult, config_path: str, package: str) -> None:
        """Called with each option that was read, and the package that it sets keys of."""

    @contextmanager
    def checking(self, overrides: list[str]) -> Iterator[list[DictConfig]]:
        """Surrounds the composition of these overrides; the config is in the list at the end of the block."""
        yield []

    def _load_configuration_impl(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: Any,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        arguments = (config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        if not self.is_checked():
            return super()._load_configuration_impl(*arguments)
        with self.checking(overrides) as composed:
            composed.append(super()._load_configuration_impl(*arguments))
        return composed[0]

    def _load_single_config(self, default: Any, repo: Any) -> ConfigResult:
        if not self.is_checked():
            return super()._load_single_config(default, repo)
        self.check_path(default.config_path)
        loaded = super()._load_single_config(default, repo)
        self.check_option(loaded, default.config_path, default.package or "")
        return loaded


def add_schema(name: str, schema: type[Any]) -> None:
    """Puts a dataclass where Hydra looks for schemas, unless it is there; making its nodes takes a while."""
    known = ConfigStore.instance().repo.get(f"{name}.yaml")
    if known is None or OmegaConf.get_type(known.node) is not schema:
        ConfigStore.instance().store(name=name, node=schema)


def _itself(store: ConfigStore, _: dict[int, Any]) -> ConfigStore:
    return store


# Hydra copies its sources for every look at a group, and with them the one store of all schemas, whose nodes it copies
# when it loads them.
ConfigStore.__deepcopy__ = _itself  # type: ignore[attr-defined]


def compose_with(loader: type[ConfigLoader]) -> None:
    """Puts another composer in place of Hydra's own, which `Hydra.__init__` names and takes from nowhere else."""
    _main.ConfigLoaderImpl = loader  # type: ignore[misc]
