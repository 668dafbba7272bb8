"""The words of a command line: Hydra's flags, and the overrides."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NoReturn

from qlora.config.command_words import experiment_of, read_words
from qlora.config.overrides import override_value
from qlora.config.search_path import option_folder
from qlora.config.suggestions import unknown_flag
from qlora.config.typed_forms import Reading
from qlora.errors import ConfigError
from qlora.upstream.hydra_run import get_args_parser

VALUES = {
    "--explain": "KEY, e.g. --explain lora.r",
    "--cfg": "job, which prints the composed config",
    "--package": "GROUP, beside --cfg job",
    "--config-dir": "FOLDER, the folder with your own options",
    "--config-path": "FOLDER",
    "--config-name": "NAME",
    "--config": "FILE",
    "--experimental-rerun": "FILE",
}
"""What stands behind a flag that takes a value."""


@dataclass(frozen=True)
class Arguments:
    """A command line."""

    overrides: list[str]
    config_dir: str | None
    """The folder with the user's own configs."""
    flags: argparse.Namespace
    """Hydra's flags."""
    read_as: Mapping[str, str] = field(default_factory=dict)
    """What was typed, and what it stands for: `chat RUN`, and `task=chat adapter=RUN`."""
    outdone: tuple[str, ...] = ()
    """Options that a later one of their group outdoes, in words."""
    typed: tuple[str, ...] = ()
    """The words as they were typed."""

    @property
    def multirun(self) -> bool:
        """Whether `-m` asks for a sweep."""
        return bool(self.flags.multirun)

    @property
    def sweeps(self) -> bool:
        """Whether a sweep is asked for, by `-m` or by `sweep=`."""
        return self.multirun or any(text.startswith("sweep=") for text in self.overrides)

    def describe_reading(self) -> list[str]:
        """Returns how the words were read, where they say it otherwise or twice, as lines for the start screen."""
        return [*([f"read as {'; '.join(self.read_as.values())}"] if self.read_as else []), *self.outdone]

    def read(self, reading: Reading) -> Arguments:
        """Returns the command line with its overrides read once more."""
        earlier, later = dict(self.read_as), dict(reading.read_as)
        for typed, text in earlier.items():  # `plan OWNER/NAME` is `task=plan model=OWNER/NAME`, which is a preset
            spelled = [later.pop(word, word) for word in text.split(" ")]
            earlier[typed] = " ".join(spelled)
        return replace(self, overrides=reading.overrides, read_as={**earlier, **later}, outdone=reading.outdone)

    @property
    def shows(self) -> bool:
        """Whether something is printed, and no config of ours is composed for it."""
        return bool(self.flags.shell_completion or self.flags.hydra_help)


def read_arguments(argv: list[str]) -> Arguments:
    """Returns what a command line says; raises `ConfigError` for a flag that is unknown or that we do not offer."""
    flags, rest = _parser().parse_known_intermixed_args(argv)
    if unknown := [text for text in rest if text.startswith("-")]:
        behind = next(iter(argv[argv.index(unknown[0]) + 1 :]), "")
        raise unknown_flag(unknown[0], "" if "=" in behind or behind.startswith("-") else behind)
    if flags.config is not None:
        raise ConfigError(
            f"--config {flags.config}: a file of options is an experiment; put it into a folder as "
            f"{experiment_of(flags.config)} (docs/configuration.md)"
        )
    if flags.config_path is not None:
        raise ConfigError(
            "--config-path replaces the whole configuration; use --config-dir FOLDER to add your own options"
        )
    if flags.config_name is not None:
        raise ConfigError(
            f"--config-name replaces the whole configuration; use --config-dir FOLDER experiment={flags.config_name}"
        )
    if flags.experimental_rerun is not None:
        raise ConfigError(
            "--experimental-rerun unpickles a file, which may run code that it holds; use task=replay run=FOLDER"
        )
    config_dir = flags.config_dir
    if config_dir is not None and "://" in config_dir:  # Hydra's flag knows folders only
        config_dir = str(option_folder(config_dir, "--config-dir"))
    reading = read_words(flags.overrides)
    arguments = Arguments(reading.overrides, config_dir, flags, reading.read_as, typed=tuple(argv))
    _check_together(arguments)
    return arguments


def _check_together(arguments: Arguments) -> None:
    """Raises `ConfigError` for flags that exclude each other."""
    flags = arguments.flags
    commands = {
        "--run": flags.run,
        "--multirun": flags.multirun and flags.cfg != "job" and flags.info is None,
        "--cfg": flags.cfg is not None,
        "--info": flags.info is not None,
        "--shell-completion": flags.shell_completion,
    }
    given = [name for name, is_given in commands.items() if is_given]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} exclude each other; give one of them")
    if flags.resolve and flags.cfg is None:
        raise ConfigError("--resolve belongs to --cfg, which prints the config; add --cfg job, or leave it out")


def _parser() -> argparse.ArgumentParser:
    """Returns Hydra's parser of flags, which complains in our sentences."""

    parser: argparse.ArgumentParser = get_args_parser()

    def complain(message: str) -> NoReturn:
        lacks = re.fullmatch(r"argument ([\w/-]+): expected (?:one|at least one) argument", message)
        if lacks is None:
            raise ConfigError(f"{message}; see `qlora --help`")
        flag = next(name for name in lacks[1].split("/") if name.startswith("--"))
        raise ConfigError(f"{flag} takes a value: write {flag} {VALUES.get(flag, 'VALUE')}")

    parser.add_argument("--config")  # of other tools; Hydra's flags begin like it
    parser.add_argument("--explain", metavar="KEY")
    parser.error = complain  # type: ignore[method-assign]
    return parser


def folder_override(overrides: list[str]) -> str | None:
    """Returns the folder that the last of some overrides names; None: none of them does."""
    given = [text for text in overrides if text.startswith(("hydra.run.dir=", "hydra.sweep.dir="))]
    return str(override_value(given[-1])) if given else None
