"""The private parts of Ray that `qlora.upstream.ray` uses exist and have the known parameters."""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip("ray")

from ray._private import services, worker

from qlora.upstream.ray import printing_to, running_address


def test_the_address_of_a_running_cluster_is_none_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(inspect.signature(services.get_ray_address_from_environment).parameters) == ["addr", "temp_dir"]
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert running_address() == "10.0.0.1:6379"


def test_the_output_of_daemons_goes_to_the_given_function() -> None:
    original = worker.print_to_stdstream
    assert list(inspect.signature(original).parameters) == ["data", "ignore_prefix"]
    with printing_to(print):  # type: ignore[arg-type]
        assert worker.print_to_stdstream is print
    assert worker.print_to_stdstream is original
    assert "print_to_stdstream" in inspect.getsource(worker)
