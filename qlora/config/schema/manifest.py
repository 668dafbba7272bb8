"""What is recorded of the repository that a run starts in: the group `manifest`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class ManifestConfig:
    """What `manifest.json` records of the repository that a run is started in."""

    diff: bool = False
    """Store the uncommitted changes themselves, too, without what may be secret in them; else the names of the changed
    files, how many lines each gained and lost, and the SHA-256 of the changes."""
