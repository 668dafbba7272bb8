"""Hydra's composer, which refuses files that name code: whatever Hydra composes for this project passes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig

from qlora.config.composed_trust import check_composed
from qlora.config.default_values import settle
from qlora.config.file_trust import check_file
from qlora.config.trust import Trust, fixed_resolvers, read_trust
from qlora.errors import ConfigError
from qlora.text import brief_text
from qlora.upstream import hydra


@dataclass(frozen=True)
class ReadOption:
    """A file that was composed."""

    file: str
    config_path: str
    """The option as Hydra names it, e.g. `lora/attention`."""
    config: Any
    """What it sets, below the keys of its package."""


class CheckedLoader(hydra.ConfigLoader):
    """Composes our configs with the trust that their overrides state; those of other projects as Hydra does."""

    shipped: Path
    """The folder with our own options, which is in the search path of our configs alone."""
    trust = Trust()
    read: ClassVar[list[ReadOption]] = []
    """The files of the last composition, in the order in which they were read: the last one wins."""

    def is_checked(self) -> bool:
        """Returns whether a config is ours."""
        return any(str(item.path) in (f"file://{self.shipped}", str(self.shipped))
                   for item in self.config_search_path.get_path())  # fmt: skip

    @contextmanager
    def checking(self, overrides: list[str]) -> Iterator[list[DictConfig]]:
        """Reads the trust of the overrides, and checks the composed config."""
        composed: list[DictConfig] = []
        CheckedLoader.read.clear()
        with fixed_resolvers():
            self.trust = read_trust(OverridesParser.create(config_loader=self).parse_overrides(overrides))
            yield composed
            settle(composed[0])
            check_composed(composed[0], self.trust)

    def check_path(self, config_path: str) -> None:
        """Raises `ConfigError` for the name of an option that leads out of the folders of options."""
        if {"", ".", ".."} & {*config_path.split("/")}:
            raise ConfigError(
                f"{brief_text(config_path)} names an option outside the folders of options; write GROUP/NAME, "
                "and add its folder with --config-dir FOLDER"
            )

    def check_option(self, loaded: ConfigResult, config_path: str, package: str) -> None:
        """Raises `ConfigError` for a file that sets a key of the command line; what is installed may set all."""
        file = f"{loaded.path.removeprefix('file://')}/{config_path.removesuffix('.yaml')}.yaml"
        if not loaded.path.startswith("structured://"):
            label = file.replace(f"{self.shipped}/", "conf/", 1)
            CheckedLoader.read.append(ReadOption(label, config_path.removesuffix(".yaml"), loaded.config))
        is_installed = loaded.path == f"file://{self.shipped}" or loaded.path.startswith(
            ("structured://", "pkg://hydra.", "pkg://hydra_plugins.")
        )
        if not is_installed:
            check_file(file, loaded.config, package, self.trust)


def install(shipped: Path) -> None:
    """Lets Hydra compose by `CheckedLoader`; `shipped` is the folder with our own options."""
    CheckedLoader.shipped = shipped
    hydra.compose_with(CheckedLoader)
