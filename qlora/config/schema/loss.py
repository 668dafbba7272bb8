"""The training objective: the group `loss`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qlora.config.registries.installed import check_name
from qlora.config.registries.objectives import GROUP, OBJECTIVES
from qlora.config.schema.code_names import check_plain
from qlora.config.schema.values import HOLDS, MAPPINGS
from qlora.errors import ConfigError
from qlora.text import brief


@dataclass(kw_only=True, slots=True)
class LossConfig:
    """The training objective: what is minimised."""

    name: str = "sft"
    """`sft`: the mean cross entropy of the tokens that are trained; or an objective of another package, by the name
    that it registers (entry point group `qlora.objectives`) or as `module:Class` of a package in `trusted`."""
    options: Any = field(default_factory=dict, metadata={HOLDS: dict[str, Any]})
    """Settings of an objective of another package, e.g. `{smoothing: 0.1}`; `sft` has none."""

    def __post_init__(self) -> None:
        check_name("loss.name", self.name, OBJECTIVES, GROUP)
        if not isinstance(self.options, dict):
            given = "null" if self.options is None else brief(self.options)
            raise ConfigError(f"loss.options must be a mapping such as {MAPPINGS['loss.options']}, got {given}")
        check_plain("loss.options", self.options)
        if self.name == "sft" and self.options:
            raise ConfigError("loss.options is not read by loss.name=sft; leave it out")
