from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clusters import slurm_cluster


@pytest.fixture(scope="session")
def slurm() -> Iterator[dict[str, str]]:
    """The environment of the commands of a SLURM of two nodes, which lives as long as the session's process."""
    if (reason := slurm_cluster.why_not()) is not None:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:  # sockets need a short path
        try:
            yield slurm_cluster.start(Path(name))
        finally:
            slurm_cluster.stop(Path(name))


@pytest.fixture
def on_slurm(slurm: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Lets this process speak with the cluster."""
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    return slurm
