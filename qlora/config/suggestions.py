"""What an unknown key, option or flag was meant to be, names from other tools included."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from qlora.config.fields import config_keys
from qlora.config.foreign_names import (
    FOREIGN_NAMES,
    FOREIGN_OPTIONS,
    FOREIGN_REMEDIES,
    FOREIGN_TASKS,
    ORIGINAL_FLAGS,
    RUN_FOLDER,
)
from qlora.config.options import group_names, option_names
from qlora.config.paths import is_row_file
from qlora.errors import ConfigError, mean, nearest, suggest
from qlora.text import brief_text

FLAGS = (
    *("--help", "--version", "--schema", "--explain", "--hydra-help", "--cfg", "--resolve", "--package", "--run"),
    *("--multirun", "--info", "--shell-completion", "--config-dir", "--config-name", "--experimental-rerun"),
)
"""The flags that a user meets: ours, and Hydra's."""

LONGEST = 190
"""Characters of a sentence that lists options; where there are more of them, it names the page that does."""


def unknown_key(key: str, where: str = "", value: str | None = None) -> ConfigError:
    """Returns the error for a key that does not exist, with the nearest that do; `value` is what it was given."""
    group = key.split(".")[0]
    page = f"qlora --help {group}" if group in group_names() else "qlora --help"
    if (remedy := FOREIGN_REMEDIES.get(key.rpartition(".")[2])) is not None:
        return ConfigError(f"unknown key {key!r}{where}; {remedy}")
    value = (value or "").strip("'\"")
    known = FOREIGN_NAMES.get(key) or _same_spelled(key)
    if known == "resume=auto" and "/" in value:
        known = RUN_FOLDER
    written = f"{known}={value}" if known and value and "=" not in known else known
    remedy = f"write {written}, or see" if written and "=" in written and len(written) < LONGEST // 2 else "see"
    return ConfigError(f"unknown key {key!r}{where}{mean(nearest_keys(key))}; {remedy} `{page}`")


def unknown_flag(flag: str, behind: str = "") -> ConfigError:
    """Returns the error for an unknown flag, e.g. one of the original script; `behind` is the word behind it."""
    name = flag.lstrip("-").split("=")[0].replace("-", "_")
    if (remedy := FOREIGN_REMEDIES.get(name)) is not None:
        return ConfigError(f"unknown flag {flag.split('=')[0]}; {remedy}")
    ours = name in FOREIGN_NAMES or name in {*config_keys(), *group_names()}
    near = [] if ours else [*suggest(flag.split("=")[0], FLAGS)]
    near = near or ([ORIGINAL_FLAGS[name]] if name in ORIGINAL_FLAGS else nearest_keys(name))
    value = flag.partition("=")[2] or behind
    is_key = near and not near[0].startswith("-") and "=" not in near[0] and value and len(value) < LONGEST // 4
    example = f"here {near[0]}={value}" if is_key else "see `qlora --help`"
    return ConfigError(
        f"unknown flag {flag.split('=')[0]}{mean(near)}; options are written KEY=VALUE without dashes, {example}"
    )


def unknown_option(group: str, choice: str, options: Sequence[str], where: str = "") -> ConfigError:
    """Returns the error for an option that a group does not have."""
    says, listed = f"{group}={brief_text(choice)}{where}: {group} has no such option", ", ".join(sorted(options))
    if not where and (meant := _meant_elsewhere(group, choice)):
        return ConfigError(f"{says}; {meant}")
    if group == "model" and not where and not suggest(choice, options) and HUB_NAME.fullmatch(choice):
        return ConfigError(f"{says}; for the model of that name on the hub write model.name={choice}")
    if group == "task" and choice.lower() in FOREIGN_TASKS:
        return ConfigError(f"{says}; instead, {FOREIGN_TASKS[choice.lower()]}")
    if (known := FOREIGN_OPTIONS.get(group, {}).get(choice.lower())) is not None:
        return ConfigError(f"{says}; write {known}, or see `qlora --help {group}`")
    names = [*options, *(row_files() if group == "data" else [])]
    near = nearest_presets(choice, names) if group == "model" else suggest(choice, names)
    page = f"the {len(options)} of `qlora --help {group}`{OTHER_CHOICES.get(group, '')}"
    fewer = (near, near[:2], near[:1])
    sentences = (f"{says}{mean(some)}; choose one of {choices}" for some in fewer for choices in (listed, page))
    return ConfigError(
        next((text for text in sentences if len(text) < LONGEST), f"{says}{mean(near[:1])}; choose one of {page}")
    )


def nearest_presets(choice: str, options: Sequence[str]) -> list[str]:
    """Returns the models nearest to a name: those of its size first, and those that chat where it says so.

    What a name says of chatting is spelled otherwise from family to family: `qwen3.5-9b-instruct` is `qwen3.5-9b`.
    """
    choice = choice.lower()
    asked, size = CHATTING.search(choice), SIZE.search(choice)
    near = suggest(ROLE.sub("", choice), [ROLE.sub("", name) for name in options])
    if size is not None and len(near) > 1:
        near = [name for name in near if size[0] in SIZE.findall(name)] or near
    names = [name for name in options if ROLE.sub("", name) in near]
    if asked is None:  # of each model one
        by_model = {ROLE.sub("", name): name for name in sorted(names, key=lambda name: not ROLE.search(name))}
        return [by_model[stem] for stem in dict.fromkeys(near)][:3]
    chat = [name for name in names if CHATTING.search(name)]
    return (chat or [name for name in names if not ROLE.search(name)] or names)[:3]


def _meant_elsewhere(group: str, choice: str) -> str | None:
    """Returns what to do with a name that is none of an option, in words."""
    suffix = Path(choice).suffix.lower()
    if group == "model" and suffix in WEIGHTS:
        whole = "a folder or hub id with the original weights" if suffix == ".gguf" else "the folder that holds it"
        return f"a model is not one file; give {whole}, model=FOLDER"
    if group == "model" and is_row_file(choice):
        return f"write data={choice}"
    if group == "data" and choice in option_names("model"):
        return f"write model={choice}"
    if group == "data" and suffix in DOCUMENTS:
        return "rows are read from JSON, CSV, Parquet, Arrow and text files"
    return None


def row_files() -> list[str]:
    """Returns the files here that may hold rows."""
    return [path.name for path in sorted(Path().iterdir()) if is_row_file(path.name)]


CHATTING = re.compile(r"-(it|instruct|chat)(-\d+)?$")
ROLE = re.compile(r"-(it|instruct|chat|base|pt|hf)(-\d+)?$")
"""What the end of a model's name says of its training."""
SIZE = re.compile(r"(?<![\w.])e?\d+(?:\.\d+)?[bm](?![a-z0-9])")
"""The parameters in a model's name."""
WEIGHTS = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".ckpt")
DOCUMENTS = (".pdf", ".docx", ".doc", ".odt", ".html", ".md", ".pptx")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
"""An id of the hub without an owner, such as `gpt2`."""
OTHER_CHOICES = {"model": ", or give a hub id or a folder (./NAME)", "data": ", or give a file or a hub id"}
"""What a group takes beside the names of its options."""


def nearest_keys(key: str) -> list[str]:
    """Returns what `key` was meant to be: a foreign name's translation, else the nearest names level by level."""
    if (known := FOREIGN_NAMES.get(key) or _same_spelled(key)) is not None:
        return [known]
    keys = [*config_keys(), *group_names()]
    matches = [""]
    for word in key.split("."):
        matches = [near for prefix in matches for near in _nearest_children(prefix, word, keys)]
    if matches:
        return matches[:3]
    last = key.rpartition(".")[2]
    if same := [name for name in keys if name.rpartition(".")[2] == last]:
        return same[:3]
    names = {name.rpartition(".")[2]: name for name in reversed(keys)} | FOREIGN_NAMES
    return list(dict.fromkeys(names[name] for name in nearest(last, names)))


def _same_spelled(key: str) -> str | None:
    """Returns the key that differs by its capitals and signs alone: `lora.r` for `LORA-R`."""
    return {_letters(name): name for name in (*group_names(), *config_keys())}.get(_letters(key))


def _letters(key: str) -> str:
    return re.sub(r"[-_./:]", "", key).lower()


def _nearest_children(prefix: str, word: str, keys: list[str]) -> list[str]:
    """Returns the keys right below `prefix` that are `word`, or nearest to it; foreign names count as ours."""
    children = {name.rpartition(".")[2]: name for name in keys if name.rpartition(".")[0] == prefix}
    if word in children:
        return [children[word]]
    for name, ours in FOREIGN_NAMES.items():
        if name.rpartition(".")[0] == prefix and prefix:
            children.setdefault(name.rpartition(".")[2], ours)
    return list(dict.fromkeys(children[name] for name in suggest(word, children)))
