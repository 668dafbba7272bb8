"""Without a network the hub's library works offline at once, and again online when there is one."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from huggingface_hub import constants

from qlora.upstream.huggingface_hub import read_cache_without_network, why_offline


def test_a_host_without_an_address_is_not_tried_and_an_address_brings_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: Any) -> None:
        raise socket.gaierror

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("qlora.upstream.huggingface_hub.getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    read_cache_without_network()
    assert constants.is_offline_mode()
    assert why_offline() == "there is no network (huggingface.co has no address)"
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: ["an address"])
    read_cache_without_network()
    assert not constants.is_offline_mode()
    assert why_offline() is None


def test_a_variable_that_forbids_downloads_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    read_cache_without_network()
    assert why_offline() == "HF_HUB_OFFLINE=1 forbids downloads"
