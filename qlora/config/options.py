"""The groups of options in `conf/`, and the presets among them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qlora.config.schema import ArchitectureConfig

_PACKAGE = Path(__file__).parent.parent


CONF_DIR = next(path for path in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if path.is_dir())


def group_names(conf_dir: Path = CONF_DIR) -> list[str]:
    """Returns the config groups a user chooses from, in alphabetical order."""
    return sorted(path.name for path in conf_dir.iterdir() if path.is_dir() and path.name != "hydra")


def option_names(group: str) -> list[str]:
    folder = CONF_DIR / group
    return sorted(path.stem for path in folder.glob("*.yaml")) if folder.is_dir() else []


@functools.cache
def model_presets() -> dict[str, dict[str, Any]]:
    """Returns the shipped models by option: `name`, and `architecture` with every field."""
    presets = {}
    for file in sorted((CONF_DIR / "model").glob("*.yaml")):
        node = OmegaConf.load(file)
        shape = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(ArchitectureConfig), node.architecture))
        presets[file.stem] = {"name": str(node.name), "architecture": shape}
    return presets


OWN_DATA = ("local", "mix")
"""The options of `data` that read the user's own rows."""


def is_own_data(option: str) -> bool:
    """Returns whether an option of `data` holds the user's own rows: `local`, `mix`, or a file of the user's."""
    return option in OWN_DATA or option not in option_names("data")


MANY = ("callbacks",)
"""The groups of which a run may have several options at once."""

ANYWHERE = ("recipe",)
"""The groups whose files set keys of all groups, whatever package their first line names."""


def takes_one_option(group: str, shipped: Path) -> bool:
    """Returns whether a run has exactly one option of a group, as of all but `callbacks`."""
    return group not in MANY and (group.startswith("hydra/") or (shipped / group).is_dir())
