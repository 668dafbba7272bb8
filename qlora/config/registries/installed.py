"""Names that installed packages add to the choices of a config, by entry points; to check a name imports nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path

from qlora.errors import ConfigError, did_you_mean


def installed_names(group: str) -> dict[str, str]:
    """Returns the entry points of a group, e.g. `qlora.trackers`: by name what each one points to, `module:name`.

    To install a package is to trust it. A package that merely lies in the folder where the command starts was not
    installed, so its entry points do not count.
    """
    return dict(_read(group, str(Path.cwd())))


def check_name(key: str, name: str, shipped: Iterable[str], group: str) -> None:
    """Raises `ConfigError` unless a name is shipped, installed, or spelled as `module:Class`; imports nothing."""
    names = [*shipped, *installed_names(group)]
    if name not in names and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        choices = f"choose one of {', '.join(names)}" if names else "no installed package adds one"
        raise ConfigError(
            f"{key}={name} is unknown{did_you_mean(name, names)}; {choices}, or name a class "
            "of your own as module:Class"
        )


@cache
def _read(group: str, folder: str) -> tuple[tuple[str, str], ...]:
    return tuple(
        (point.name, point.value)
        for point in metadata.entry_points(group=group)
        if point.dist is None or Path(str(point.dist.locate_file(""))).resolve() != Path(folder).resolve()
    )
