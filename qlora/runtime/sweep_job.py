"""What a job knows of the sweep it belongs to, for the names, groups and columns of trackers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

VARIABLE = "QLORA_SWEEP"
"""The environment variable that tells a job its sweep."""
TRIAL_VARIABLE = "QLORA_TRIAL"
"""The environment variable that tells a job which trial of a search it is, if that may be pruned."""


@dataclass(frozen=True)
class SweepJob:
    """The sweep of a job, and what makes the job differ from the others in it."""

    sweep: str
    """The name of the sweep: that of its folder."""
    overrides: list[str]
    """Those that differ between the jobs, as one would type them."""

    @property
    def label(self) -> str:
        """The overrides as a name: `lora.r=8 seed=1`."""
        return " ".join(text.lstrip("+~") for text in self.overrides)

    def values(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the varied keys with their values: those of the flat, resolved `config`, else (of groups) names."""
        pairs = dict(text.lstrip("+~").partition("=")[::2] for text in self.overrides)
        return {key: config.get(key, text) for key, text in pairs.items()}

    @staticmethod
    def environment(sweep: str, varied: Sequence[str]) -> dict[str, str]:
        """Returns the environment of a job; `varied` are keys, or overrides of them with any values."""
        keys = list(dict.fromkeys(key_of(text) for text in varied))
        return {VARIABLE: json.dumps({"sweep": sweep, "keys": keys})}

    @classmethod
    def from_environment(cls, overrides: Sequence[str]) -> Self | None:
        """Returns what `environment` told a job that runs with `overrides`; None: it told nothing."""
        if (text := os.environ.get(VARIABLE)) is None:
            return None
        told = json.loads(text)
        return cls.among(told["sweep"], overrides, told["keys"])

    @classmethod
    def among(cls, sweep: str, overrides: Sequence[str], keys: Sequence[str]) -> Self:
        """Returns the membership of a job that runs with `overrides`, those of `keys` being varied."""
        last = {key_of(text): text for text in overrides}  # the last one counts
        return cls(sweep, [text for key, text in last.items() if key in keys])


def key_of(override: str) -> str:
    """Returns the key of an override: `lora.r` of `+lora.r=8`."""
    return override.lstrip("+~").partition("=")[0]
