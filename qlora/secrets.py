"""Tokens, keys and passwords: found in texts, taken out of what is written, and refused in configs.

A config is stored, printed and sent to trackers; a secret belongs into the environment, where the libraries read it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "[hidden]"
SHORTEST = 8
"""Characters; a shorter value of a variable is no secret, and would be found everywhere."""

NAMES = re.compile(r"(_|^)(TOKEN|API_?KEY|SECRET|SECRET_KEY|ACCESS_KEY|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
"""Variables of the environment that hold one."""

KINDS = {
    "a password in an address": re.compile(r"(?<=://)[^\s/@:'\"]*:[^\s/@'\"]+(?=@)"),
    "a token of the Hugging Face hub": re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    "a key of an API": re.compile(r"\b(?:sk|rk|pk)-[A-Za-z0-9_-]{20,}|\bAIza[0-9A-Za-z_-]{35}|\bglpat-[\w-]{20,}"),
    "a key of wandb": re.compile(r"\bwandb_v\d_\w{20,}"),
    "a token of GitHub": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}"),
    "a key of AWS": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a token of Slack": re.compile(r"\bxox[abeoprs]-[\w-]{10,}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S),
}
"""What a secret looks like by itself."""

ASSIGNED = re.compile(
    r"(?i)(\b[\w.-]*(?:api[_-]?key|secret|password|passwd|token|credential)s?[\"']?\s*[:=]\s*[\"']?)(?!\s)[^\s\"',;]{8,}"
)
"""What code assigns to a name that says it; taken out of diffs, where it is better to hide too much."""


def find_secret(text: str) -> str | None:
    """Says in words which secret a text holds; None: none that is known."""
    for kind, pattern in KINDS.items():
        if pattern.search(text):
            return kind
    return next((f"the value of {name}" for name, value in _environment().items() if value in text), None)


def hide(text: str, *, assigned: bool = False) -> str:
    """Returns a text with every secret in it replaced; `assigned` replaces what looks like one by its name, too."""
    for value in _environment().values():
        text = text.replace(value, HIDDEN)
    for pattern in KINDS.values():
        text = pattern.sub(HIDDEN, text)
    return ASSIGNED.sub(rf"\g<1>{HIDDEN}", text) if assigned else text


def hide_all(tree: Any) -> Any:
    """Returns nested dicts and lists with every secret in their texts replaced, keys included."""
    if isinstance(tree, str):
        return hide(tree)
    if isinstance(tree, Mapping):
        return {hide_all(key): hide_all(value) for key, value in tree.items()}
    return [hide_all(each) for each in tree] if isinstance(tree, list | tuple) else tree


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if len(value) >= SHORTEST and NAMES.search(name)}
