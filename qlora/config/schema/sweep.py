"""How a sweep is run: the group `sweep`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    """How a sweep is run; its values are those of the command line, or of a file chosen with `sweep=`."""

    detach: bool = False
    """Submit the jobs and return; the same command shows their state later (`hydra/launcher=slurm`)."""
