"""Commands in scripts: which of them start a training run that can be translated, and their arguments."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from string import Template
from typing import Any

from qlora.errors import ConfigError, DataError
from qlora.migrate.translation import read_number

TRL_SCRIPTS = {**{name: name for name in ("dpo", "kto", "orpo", "cpo", "reward")}, "reward_modeling": "reward"}
"""The names of TRL's scripts that train from preferences, each with its method."""
STARTS: dict[tuple[str, ...], str] = {
    ("qlora.py",): "qlora.py",
    ("trl", "sft"): "TRL",
    ("scripts/sft.py",): "TRL",
    **{("trl", method): f"TRL's {method}" for method in ("dpo", "kto", "orpo", "cpo", "reward")},
    **{(f"{script}.py",): f"TRL's {method}" for script, method in TRL_SCRIPTS.items()},
    ("swift", "sft"): "ms-swift",
    ("swift", "pt"): "ms-swift",
    ("swift", "rlhf"): "ms-swift",
    ("sft.py",): "",
    ("llamafactory-cli", "train"): "LLaMA-Factory",
    ("lmf", "train"): "LLaMA-Factory",
}
"""What starts a training run, and whose it is; "": the arguments tell."""
CONFIG_STARTS = (("axolotl", "train"), ("-m", "axolotl.cli.train"), ("tune", "run"))
"""What starts a training run whose settings stand in a YAML."""
OTHER_TASKS = {
    "trl": ("grpo", "ppo", "rloo", "gkd", "online_dpo", "nash_md", "xpo"),
    "swift": ("infer", "export", "deploy", "eval", "app", "sample"),
    "llamafactory-cli": ("export", "chat", "webui", "api", "webchat"),
    "megatron": ("sft", "pt", "rlhf"),
}
ENDS = (";", "&&", "||", "|", "&", ">", ">>", "2>&1", "<")
YAML_FILES = (".yaml", ".yml", ".json")


def read_command(text: str) -> tuple[str, tuple[str, ...], dict[str, Any]] | None:
    """Returns whose training the first command of a script starts, how, and its arguments.

    A text that begins with arguments is one command, of whom its arguments tell. None: it holds no such command.
    Raises a `UserError` for a command that cannot be read, and for one that does another thing.
    """
    joined = re.sub(r"\\\s*\Z", "", text.replace("\\\r\n", " ").replace("\\\n", " "))
    if joined.lstrip().startswith(("--", "–", "—")):
        args = [word for line in joined.splitlines() for word in _split(line, {}, must=True)]
        return "", (), _arguments(args)
    variables: dict[str, str] = {}
    for line in joined.splitlines():
        args = _split(line, variables, must=any(start[0] in line for start in STARTS))
        for word in args if all("=" in word for word in args) or args[:1] == ["export"] else ():
            name, _, value = word.partition("=")
            if name.isidentifier() and "=" in word:
                variables[name] = value
        for start, owner in STARTS.items():
            if (end := _find(args, start)) is not None:
                return owner, start, _arguments(_without_config(args[end:], start))
        _refuse(args)
    return None


def _split(line: str, variables: Mapping[str, str], *, must: bool) -> list[str]:
    try:
        return shlex.split(Template(_without_comment(line)).safe_substitute(variables))
    except ValueError as error:
        if must:
            raise DataError(f"from: the command cannot be read ({error}): {line.strip()[:80]}") from None
        return []


def _without_comment(line: str) -> str:
    """Returns a line up to its comment, which begins at a word and outside quotes, as a shell reads it."""
    quote = ""
    for index, letter in enumerate(line):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in ("'", '"'):
            quote = letter
        elif letter == "#" and (index == 0 or line[index - 1].isspace()):
            return line[:index]
    return line


def _find(args: Sequence[str], start: Sequence[str]) -> int | None:
    """Returns where the arguments of a command begin; None: these args do not start it."""
    for index in range(len(args) - len(start) + 1):
        first = args[index]
        if (first == start[0] or first.endswith(f"/{start[0]}")) and list(args[index + 1 : index + len(start)]) == list(
            start[1:]
        ):
            return index + len(start)
    return None


def _refuse(args: Sequence[str]) -> None:
    """Raises `ConfigError` for a command of a known tool that trains on no answers, or reads its settings in a file."""
    for start in CONFIG_STARTS:
        if (end := _find(args, start)) is not None:
            file = next((word for word in args[end:] if word.endswith(YAML_FILES)), None)
            raise ConfigError(f"from: {' '.join(start)} reads its settings in a file: give from={file or 'FILE.yaml'}")
    for tool, tasks in OTHER_TASKS.items():
        for task in tasks:
            if _find(args, (tool, task)) is not None:
                raise ConfigError(f"from: {tool} {task} is no training on answers, which alone is translated")


def _without_config(args: Sequence[str], start: Sequence[str]) -> list[str]:
    """Returns the arguments; raises `ConfigError` where a file holds the settings."""
    file = next((word for word in args if word.partition("=")[2].endswith(YAML_FILES) and word.startswith("--config")),
                None)  # fmt: skip
    if file is None and args[:1] and args[0].endswith(YAML_FILES):
        file = args[0]
    if file is None and "--config" in args[:-1]:
        file = args[args.index("--config") + 1]
    if file is not None:
        raise ConfigError(f"from: {' '.join(start)} reads its settings in a file: give from={file.rpartition('=')[2]}")
    return list(args)


def _arguments(args: Sequence[str]) -> dict[str, Any]:
    """Returns values by argument: true for one without a value, a list for one with several."""
    values: dict[str, Any] = {}
    for name, value in _pairs(args):
        if name not in values or values[name] is True:
            values[name] = value
        elif value is not True:
            previous = values[name]
            values[name] = [*(previous if isinstance(previous, list) else [previous]), value]
    return values


def _pairs(args: Sequence[str]) -> Iterator[tuple[str, Any]]:
    name = None
    for word in args:
        if word in ENDS:
            return
        if word.lstrip("–—").startswith("--") or word[:1] in ("–", "—"):
            name, has_value, value = word.lstrip("-–—").partition("=")
            name = name.replace("-", "_")
            yield name, _typed(value) if has_value else True
        elif name is not None:
            yield name, _typed(word)


def _typed(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text in ("None", "null"):
        return None
    return read_number(text)
