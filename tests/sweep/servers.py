"""Servers that tests start for themselves, and skip where they cannot."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

import pytest


@contextmanager
def postgres() -> Iterator[str]:
    """Yields the URL of an empty database on a server of its own; it listens on a socket in its folder only."""
    pytest.importorskip("psycopg", reason="the client psycopg is not installed")
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    folder = Path(mkdtemp(prefix="pg-"))  # the path of a socket must be short
    is_root = os.geteuid() == 0  # as which the server does not run
    user = ["runuser", "-u", "postgres", "--"] if is_root else []
    try:
        if is_root:
            shutil.chown(folder, "postgres")
        data, control = folder / "data", programs[-1] / "pg_ctl"
        run([*user, programs[-1] / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync"])
        options = f"-k {folder} -c listen_addresses= -c fsync=off"
        run([*user, control, "-D", data, "-o", options, "-l", folder / "log", "-w", "start"])
        try:
            yield f"postgresql+psycopg://postgres@/postgres?host={folder}"
        finally:
            run([*user, control, "-D", data, "-m", "immediate", "-w", "stop"])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(command: list[str | Path]) -> None:
    """Runs a command of a server quietly, from a folder that every user can enter."""
    subprocess.run(command, check=True, cwd="/", stdout=subprocess.DEVNULL, timeout=120)
