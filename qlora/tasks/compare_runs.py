"""Compares two runs that have trained: what is the same to the bit, what is near, and what differs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from safetensors import safe_open

from qlora.models.fingerprint import find_difference, read_run_base
from qlora.runtime.atomic_files import read_json, read_lines
from qlora.runtime.run_folder import FREE_KEYS, RunFolder, describe_changes, flatten, is_below, training_keys
from qlora.text import format_percent

TIMED = ("runtime", "per_second", "mfu", "data_wait", "memory_gb", "memory_retries", "speed")
"""Parts of the names of metrics that no two runs have alike."""
MACHINE = ("versions", "hardware", "platform", "code.sha256", "model.device")
"""What of a manifest must be the same for the same bits."""
TOLERANCE = 0.02
"""The relative difference of the final held-out loss that other machines and versions may make."""


class Verdict(Enum):
    """What a comparison came to."""

    same = "same"
    near = "near"
    """Other bits, where the same ones cannot be expected."""
    differs = "differs"


@dataclass(frozen=True)
class Comparison:
    """One line of the table."""

    what: str
    verdict: Verdict
    says: str


def compare(first: RunFolder, second: RunFolder) -> Iterator[Comparison]:
    """Yields what is the same in two runs that have trained, and what is not."""
    previous, now = (read_json(folder.manifest) for folder in (first, second))
    yield from _compare_inputs(previous, now)
    yield _compare_bases(first, second)
    reason = _other_machine(previous, now)
    if reason is None:
        yield Comparison("machine", Verdict.same, "same versions, hardware and code: the same bits are expected")
    else:
        yield Comparison("machine", Verdict.near, f"other bits are expected: {reason}")
    bits = Verdict.differs if reason is None else Verdict.near
    yield _compare_losses(first, second, bits)
    yield from _compare_metrics(first, second, bits)
    yield _compare_weights(first, second, bits)
    yield _compare_answers(first, second, bits)


def _compare_inputs(previous: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Comparison]:
    old, new = training_keys(previous["config"]), training_keys(now["config"])
    keys = [key for key in {*old, *new} if not is_below(key, FREE_KEYS)]
    changes = describe_changes(old, new, keys)
    yield Comparison("config", Verdict.differs if changes else Verdict.same, changes.strip() or f"{len(keys)} keys")
    a, b = previous["data"].get("fingerprint"), now["data"].get("fingerprint")
    says = str(b)[:16] if a == b else f"{a} -> {b}: other files, or rows written otherwise"
    yield Comparison("rows", Verdict.same if a == b else Verdict.differs, says)


def _compare_bases(first: RunFolder, second: RunFolder) -> Comparison:
    trained, now = read_run_base(first), read_run_base(second)
    assert trained is not None, "_read_finished checks it"
    assert now is not None, "it has just ended"
    difference = find_difference(trained, now)
    if difference is None:
        return Comparison("base", Verdict.same, str(now.fingerprint)[:16])
    return Comparison("base", Verdict.differs if difference.is_certain else Verdict.near, difference.what)


def _other_machine(previous: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Says why the bits may be others; None: they must be the same."""
    for key in MACHINE:
        a, b = _find(previous, key), _find(now, key)
        if a != b:
            pairs = dict(flatten({key: a})), dict(flatten({key: b}))
            changed = [name for name in sorted({*pairs[0], *pairs[1]}) if pairs[0].get(name) != pairs[1].get(name)]
            return f"{changed[0]} was {pairs[0].get(changed[0])}, is {pairs[1].get(changed[0])}"
    on_gpu = not str(now["model"].get("device", "")).startswith("CPU")
    if on_gpu and not now["config"]["trainer"]["deterministic"]:
        return "a GPU adds up in any order without trainer.deterministic=true"
    return None


def _find(tree: Mapping[str, Any], key: str) -> Any:
    node: Any = tree
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _compare_losses(first: RunFolder, second: RunFolder, bits: Verdict) -> Comparison:
    rows = [
        [{key: value for key, value in row.items() if not _is_timed(key)} for row in read_json(folder.history) or []]
        for folder in (first, second)
    ]
    if rows[0] == rows[1]:
        return Comparison("losses", Verdict.same, f"{len(rows[0])} lines of the history, number by number")
    index = next((i for i, (a, b) in enumerate(zip(*rows, strict=False)) if a != b), min(map(len, rows)))
    if index >= min(map(len, rows)):
        return Comparison("losses", bits, f"{len(rows[0])} and {len(rows[1])} lines")
    a, b = rows[0][index], rows[1][index]
    key = next(key for key in {**a, **b} if a.get(key) != b.get(key))
    return Comparison("losses", bits, f"first at step {b.get('step')}: {key} was {a.get(key)}, is {b.get(key)}")


def _compare_metrics(first: RunFolder, second: RunFolder, bits: Verdict) -> Iterator[Comparison]:
    results = [folder.stored_result("train") or {} for folder in (first, second)]
    a, b = ({key: value for key, value in result["metrics"].items() if not _is_timed(key)} for result in results)
    changed = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    if not changed:
        yield Comparison("metrics", Verdict.same, f"all {len(a)}")
        return
    worst = "; ".join(f"{key} was {a.get(key)}, is {b.get(key)}" for key in changed[:3])
    yield Comparison("metrics", bits, worst + (f" and {len(changed) - 3} more" if len(changed) > 3 else ""))
    loss, loss_now = float(a.get("eval_loss", math.nan)), float(b.get("eval_loss", math.nan))
    if math.isfinite(loss) and math.isfinite(loss_now):
        difference = abs(loss_now - loss) / max(abs(loss), 1e-9)
        verdict = Verdict.near if difference <= TOLERANCE else Verdict.differs
        apart = f"{format_percent(difference, 2)} apart, up to {TOLERANCE:.0%} are accepted"
        yield Comparison("held-out loss", verdict, apart)


def _compare_weights(first: RunFolder, second: RunFolder, bits: Verdict) -> Comparison:
    what = "adapter" if first.adapter.exists() else "model"
    files = [sorted((folder.adapter if what == "adapter" else folder.model).glob("*.safetensors"))
             for folder in (first, second)]  # fmt: skip
    if [file.name for file in files[0]] != [file.name for file in files[1]] or not files[0]:
        return Comparison(what, Verdict.differs, "the files have other names, or are missing")
    count, changed, max_difference = 0, 0, 0.0
    for one, other in zip(*files, strict=True):
        with safe_open(one, framework="pt") as a, safe_open(other, framework="pt") as b:
            if set(a.keys()) != set(b.keys()):
                return Comparison(what, Verdict.differs, f"{one.name} holds other tensors")
            for name in a.keys():  # noqa: SIM118 - no mapping
                x, y = a.get_tensor(name), b.get_tensor(name)
                count += 1
                if x.shape != y.shape:
                    return Comparison(what, Verdict.differs, f"{name} was {list(x.shape)}, is {list(y.shape)}")
                if not torch.equal(x, y):
                    changed += 1
                    max_difference = max(max_difference, float((x.float() - y.float()).abs().max()))
    if not changed:
        return Comparison(what, Verdict.same, f"{count} tensors, bit by bit")
    return Comparison(what, bits, f"{changed} of {count} tensors have other bits, by {max_difference:.3g} at most")


def _compare_answers(first: RunFolder, second: RunFolder, bits: Verdict) -> Comparison:
    a, b = (read_lines(folder.predictions) for folder in (first, second))
    changed = sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b))
    if not changed:
        return Comparison("answers", Verdict.same, f"{len(a)}, word by word")
    return Comparison("answers", bits, f"{changed} of {len(a)} are others")


def _is_timed(name: str) -> bool:
    return any(part in name for part in TIMED)
