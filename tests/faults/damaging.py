"""Damages the files of run folders at random: cuts, flips, and values of other kinds in JSON and YAML."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ODD_VALUES: list[Any] = [
    *(None, True, -1, 0, 10**400, 1e308, -1e308, float("nan"), float("-inf"), 2**70),
    *("", "x", "nan", "-inf", "=1+1", "<script>", "\ud800", "a\x1b[2Jb\nc", "../../x", "2024-01-01", "${oc.env:HOME}"),
    *([], [[]], [None], {}, {"a": None}, {"": {}}),
]
ODD_FILES = [
    *(
        b"",
        b" \n",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe\x00",
        b"\xef\xbb\xbf{}",
        b"\x00" * 40,
        b"[" * 100_000,
        b"9" * 5000,
    ),
    *(
        b'{"status": "finished"}',
        b'{"a": 1',
        b'{"a": 1}\n{"a": 1}',
        b"a: &x [*x]",
        b"!!python/name:os.system",
        b"\t- a: b",
    ),
    *(b"task: 5", b"- a\n- b", b"a: 1\na: 2", b"? [x]\n: y", b"1e999", b"true", b'"text"'),
]


def damage(path: Path, draw: random.Random) -> str:
    """Damages one file, and returns how."""
    content = path.read_bytes()
    kinds: dict[str, Callable[[], bytes | None]] = {
        "cut": lambda: content[: draw.randrange(len(content) + 1)],
        "flipped": lambda: _flip(content, draw),
        "odd": lambda: draw.choice(ODD_FILES),
        "value": lambda: _swap(path, content, draw),
        "two values": lambda: _swap(path, _swap(path, content, draw), draw),
        "gone": lambda: None,
        "folder": lambda: None,
    }
    kind = draw.choices(list(kinds), weights=[2, 2, 3, 6, 2, 1, 1])[0]
    changed = kinds[kind]()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif changed is not None:
        path.write_bytes(changed)
    return f"{path.name}: {kind}: {(changed or b'')[:300]!r}"


def _flip(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content or b"0")
    for _ in range(3):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _swap(path: Path, content: bytes, draw: random.Random) -> bytes:
    """Gives a value somewhere in a tree another kind, or takes it out."""
    if path.suffix not in (".json", ".yaml"):
        return _flip(content, draw)
    tree = yaml.safe_load(content) if path.suffix == ".yaml" else json.loads(content)
    spots = list(_spots(tree))
    if not spots:
        return _flip(content, draw)
    owner, key = draw.choice(spots)
    if draw.random() < 0.2:
        del owner[key]
    else:
        owner[key] = draw.choice(ODD_VALUES)
    text = yaml.safe_dump(tree) if path.suffix == ".yaml" else json.dumps(tree)
    return text.encode("utf-8", "surrogatepass")


def _spots(tree: Any) -> list[tuple[Any, Any]]:
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    return [spot for key in keys for spot in ((tree, key), *_spots(tree[key]))]


def restore(original: Path, folder: Path) -> None:
    """Puts a folder back as it was."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
