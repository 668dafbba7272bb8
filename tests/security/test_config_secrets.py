"""Secrets in configs, environments and notebooks."""

from __future__ import annotations

import json
import re
import sys

import pytest
from promises import SECRETS, refusal

from qlora.doctor.machine import check_environment
from qlora.reporting.manifest import build_manifest
from qlora.secrets import HIDDEN, find_secret, hide, hide_all


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("tracking.uri=https://me:planted@server/path", "tracking.uri"),
        ("name=hf_plantedplantedplantedplanted", "name"),
        ("tracking.tags=[a,sk-planted-0123456789abcdefghij]", "tracking.tags"),
        ("data.path=https://user:planted@host/rows.jsonl", "data.path"),
        ("hydra.run.dir=out/hf_plantedplantedplantedplanted", "hydra.run.dir"),
        ("++callbacks.a.key=ghp_0123456789abcdefghijABCDEFGHIJ012345", "callbacks.a.key"),
        ("tracking.project=${oc.env:MY_SERVICE_PASSWORD}", "tracking.project"),
        ("model.name=x/AKIAIOSFODNN7EXAMPLE", "model.name"),
    ],
)
def test_a_secret_in_a_config_is_refused_and_not_shown(
    override: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SERVICE_PASSWORD", SECRETS["MY_SERVICE_PASSWORD"])
    text = refusal(override)
    assert text.startswith(key)
    assert "environment" in text
    assert not re.search(r"planted|ghp_|AKIA|battery", text.partition(";")[0])


def test_texts_without_secrets_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    for text in ("hf://datasets/a/b", "https://host:8080/x", "tokenizer: abc", "sk-1", "s3://bucket/key", "a@b.c:d"):
        assert find_secret(text) is None
        assert hide(text) == text
    assert hide_all({"a": ["https://u:p@h", 1]}) == {"a": [f"https://{HIDDEN}@h", 1]}
    key = "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----"
    assert hide(f"before {key} after") == f"before {HIDDEN} after"


def test_a_manifest_hides_what_a_notebook_was_started_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["start.py", "--key", "hf_plantedplantedplantedplanted"])
    assert "planted" not in json.dumps(build_manifest({}, data={}, model={}))


def test_what_changes_a_run_behind_its_config_is_shown_without_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://me:planted@mirror")
    [finding] = check_environment()
    assert hide(finding.says).startswith(f"HF_ENDPOINT=https://{HIDDEN}@mirror")
