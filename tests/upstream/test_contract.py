"""A contract test fails where a library has changed, and says what to do."""

from __future__ import annotations

import json

import pytest
from contract import check_body, check_signature


def test_another_parameter_fails() -> None:
    check_signature(json.JSONDecoder.raw_decode, ["self", "s", "idx"])
    with pytest.raises(AssertionError, match=r"raw_decode takes \['self', 's', 'idx'\], and our code gives \['self'\]"):
        check_signature(json.JSONDecoder.raw_decode, ["self"])


def test_another_body_fails_with_its_hash() -> None:
    with pytest.raises(
        AssertionError, match=r"no tested version \(8\.0\); pytest .* has [0-9a-f]{64}: read what changed"
    ):
        check_body(pytest.Config.getini, {"8.0": "0" * 64})
