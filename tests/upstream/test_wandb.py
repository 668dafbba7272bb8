"""The private parts of wandb that `qlora.upstream.wandb` uses exist and work as it expects."""

from __future__ import annotations

import inspect
import time
from pathlib import Path

import pytest

wandb = pytest.importorskip("wandb")

from qlora.upstream.wandb import count_rows  # noqa: E402


def test_the_login_without_a_prompt_has_the_known_parameters() -> None:
    if not hasattr(wandb.sdk.lib, "wbauth"):
        assert hasattr(wandb, "api")
        return
    from wandb.sdk.lib import wbauth

    known = inspect.signature(wbauth.authenticate_session).parameters
    assert {"host", "source", "prompt", "update_session"} <= known.keys()
    assert hasattr(wandb.Settings(), "base_url")


def test_records_of_offline_runs_have_a_history() -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    assert not Record().HasField("history")
    record = Record()
    record.history.item.add()
    assert Record.FromString(record.SerializeToString()).HasField("history")


def test_rows_of_an_offline_run_are_counted(tmp_path: Path) -> None:
    run = wandb.init(mode="offline", dir=str(tmp_path), settings=wandb.Settings(console="off", silent=True))
    for step in range(3):
        run.log({"x": step})
    run.finish()
    [file] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 60
    while count_rows(file) < 3 and time.monotonic() < deadline:  # wandb's own process may still be writing
        time.sleep(0.2)
    assert count_rows(file) == 3


def test_a_run_knows_its_first_step_after_a_resume() -> None:
    assert isinstance(inspect.getattr_static(wandb.Run, "starting_step"), property)
