"""What a job knows about its sweep, for the names, groups and columns of trackers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

VARIABLE = "QLORA_SWEEP"
"""The environment variable that passes the sweep to a job."""
TRIAL_VARIABLE = "QLORA_TRIAL"
"""The environment variable that passes its trial of a search to a job, if the trial may be pruned."""


@dataclass(frozen=True)
class SweepJob:
    """The sweep of a job, and the overrides by which the job differs from the others in it."""

    sweep: str
    """The name of the sweep: that of its folder."""
    overrides: list[str]
    """Those that differ between the jobs, as one would type them."""

    @property
    def label(self) -> str:
        """The overrides as a name: `lora.r=8 seed=1`."""
        return " ".join(text.lstrip("+~") for text in self.overrides)

    def values(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the varied keys with their values in the flat, resolved `config`; of a group its option."""
        pairs = dict(text.lstrip("+~").partition("=")[::2] for text in self.overrides)
        return {key: config.get(key, text) for key, text in pairs.items()}

    @staticmethod
    def environment(sweep: str, varied: Sequence[str]) -> dict[str, str]:
        """Returns the environment of a job; `varied` are keys, or overrides of them with any values."""
        keys = list(dict.fromkeys(key_of(text) for text in varied))
        return {VARIABLE: json.dumps({"sweep": sweep, "keys": keys})}

    @classmethod
    def from_environment(cls, overrides: Sequence[str]) -> Self | None:
        """Returns the sweep of a job that runs with `overrides`, as `environment` passed it; None: it has no sweep."""
        if (text := os.environ.get(VARIABLE)) is None:
            return None
        passed = json.loads(text)
        return cls.among(passed["sweep"], overrides, passed["keys"])

    @classmethod
    def among(cls, sweep: str, overrides: Sequence[str], keys: Sequence[str]) -> Self:
        """Returns the sweep of a job that runs with `overrides`, of which the sweep varies those of `keys`."""
        last = {key_of(text): text for text in overrides}  # the last one counts
        return cls(sweep, [text for key, text in last.items() if key in keys])


def key_of(override: str) -> str:
    """Returns the key of an override: `lora.r` of `+lora.r=8`."""
    return override.lstrip("+~").partition("=")[0]
