"""Names that installed packages add to the choices of a config, by entry points; to check a name imports nothing."""

from __future__ import annotations

from functools import cache
from importlib import metadata
from pathlib import Path


def installed_names(group: str) -> dict[str, str]:
    """Returns the entry points of a group, e.g. `qlora.trackers`: by name what each one points to, `module:name`.

    To install a package is to trust it. A package that merely lies in the folder where the command starts was not
    installed, so its entry points do not count.
    """
    return dict(_read(group, str(Path.cwd())))


@cache
def _read(group: str, folder: str) -> tuple[tuple[str, str], ...]:
    return tuple(
        (point.name, point.value)
        for point in metadata.entry_points(group=group)
        if point.dist is None or Path(str(point.dist.locate_file(""))).resolve() != Path(folder).resolve()
    )
