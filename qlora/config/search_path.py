"""Folders with options of the user's own: `--config-dir`, and `hydra.searchpath` on the command line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from hydra.core.override_parser.types import Override, QuotedString

from qlora.errors import ConfigError
from qlora.text import brief_text

KEY = "hydra.searchpath"
FILE, PACKAGE = "file://", "pkg://"
OURS = (Path("schema.yaml"), Path("hydra/config.yaml"))
"""Names that qlora's own schema and Hydra's own config have."""


def option_folder(text: str, key: str) -> Path:
    """Returns the folder that FOLDER, `file://FOLDER` or `pkg://PACKAGE` names; raises `ConfigError` if it is none."""
    if text.startswith(PACKAGE):
        return _package_folder(text, key)
    path = Path(text.removeprefix(FILE)).absolute()
    if "://" in text and not text.startswith(FILE):
        raise ConfigError(f"{key} {text}: options are read from FOLDER, file://FOLDER or pkg://PACKAGE")
    if not path.is_dir():
        raise ConfigError(f"{key} {brief_text(text)}: there is no such folder ({brief_text(str(path))})")
    return path


def _package_folder(text: str, key: str) -> Path:
    name = text.removeprefix(PACKAGE).replace("/", ".")
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        spec = None
    folders = [Path(path) for path in (spec.submodule_search_locations or ())] if spec is not None else []
    if not folders:
        raise ConfigError(f"{key} {text}: there is no package {name!r}; install it, or give its folder")
    if not folders[0].is_dir():
        raise ConfigError(f"{key} {text}: the package lies in an archive; unpack it, and give its folder")
    return folders[0].absolute()


def search_folders(overrides: Iterable[Override]) -> list[Path]:
    """Returns the folders that `hydra.searchpath=[...]` among the overrides names."""
    folders: list[Path] = []
    for override in overrides:
        if override.key_or_group != KEY or override.is_delete():
            continue
        value = override.value()
        if not isinstance(value, list):
            raise ConfigError(f"{override.input_line}: {KEY} takes a list of folders, e.g. '{KEY}=[my_conf]'")
        texts = (item.text if isinstance(item, QuotedString) else str(item) for item in value)
        folders += [option_folder(text, KEY) for text in texts]
    return folders


def check_options(folders: Sequence[Path], shipped: Path) -> None:
    """Raises `ConfigError` for an option whose name another one has, in any case: only one of them could be read."""
    names = {str(file.relative_to(shipped)).lower(): file for file in shipped.rglob("*.yaml")}
    for folder in folders:
        for file in sorted(folder.rglob("*.yaml")):
            name = file.relative_to(folder)
            if name in OURS:
                raise ConfigError(f"{file}: this name is taken by qlora itself; give the file another one")
            other = names.setdefault(str(name).lower(), file)
            if other.name == file.name and (other == file or other.read_bytes() == file.read_bytes()):
                continue
            option = name.with_suffix("")
            if other.name != file.name:
                raise ConfigError(
                    f"{file}: its name differs from that of {other} in case only, and some systems cannot tell them "
                    "apart; give one of them another name"
                )
            owner = "an option of qlora" if other.is_relative_to(shipped) else str(other)
            raise ConfigError(
                f"{file}: the name {option} is taken by {owner}, which Hydra reads first; give the file another name"
            )
