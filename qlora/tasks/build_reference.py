"""Computes what the reference of a preference loss says of all pairs, once for all epochs and runs that share it.

`loss.cache_reference` says whether. The key of what is kept names all that it follows from: base, reference, tokens of
the rows, the step, and the code. The loss and its settings, the seed and the schedule are not in it.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qlora.config.paths import cache_root, short_path
from qlora.config.saved_config import config_to_dict
from qlora.data.batching.item_stream import ItemStream
from qlora.data.batching.packing import PackedRows
from qlora.data.batching.token_store import column
from qlora.data.cache import Cache
from qlora.data.reference_store import WithReference, load_reference, members, save_reference
from qlora.objectives.protocol import IGNORED
from qlora.reporting.manifest import code_digest, versions
from qlora.runtime import console, distributed
from qlora.runtime.device import device_name
from qlora.session import Session
from qlora.step.fast_step import FastStep
from qlora.training.checkpoints import read_metadata
from qlora.training.resume import CACHES_REFERENCE

if TYPE_CHECKING:
    from datasets import Dataset


def build_items(
    session: Session, model: torch.nn.Module, step: FastStep, checkpoint: Path | None
) -> Dataset | PackedRows | ItemStream | WithReference:
    """Returns what is trained on, rows or packs: with what the reference says of them, where that is cached."""
    loss, items = session.config.loss, session.data.items
    if not loss.can_cache_reference or session.reference_weights is None:
        return items
    assert not isinstance(items, ItemStream), "Config refuses streams of pairs"
    caches, reason = distributed.broadcast(_decide(session, checkpoint))
    if not caches:
        console.say_rows([("reference", f"computed in each step: {reason}")])
        return items
    return WithReference(items, _cached(session, model, step, reason))


def _decide(session: Session, checkpoint: Path | None) -> tuple[bool, str]:
    """Returns whether the reference is cached, and why."""
    value, epochs = session.config.loss.cache_reference, session.length.epochs
    setting = f"loss.cache_reference={str(value).lower()}"
    if value != "auto":
        return bool(value), setting
    if checkpoint is not None:  # the same bits as before
        cached = bool(read_metadata(checkpoint).get(CACHES_REFERENCE, False))
        return cached, f"{setting}, as before {checkpoint.name}"
    if epochs > 1:
        return True, f"{setting}, the run passes over its pairs {epochs:.3g} times"
    return False, f"{setting}, the run passes over its pairs once at most"


def _cached(session: Session, model: torch.nn.Module, step: FastStep, reason: str) -> np.ndarray:
    """Returns the log-probabilities of both answers of each row, float32 [rows, 2]: as kept, or computed now."""
    rows = session.data.train
    assert rows is not None
    cache, key = Cache(cache_root(session.config.data.cache_dir)), _key(session, step)
    log_probs = load_reference(cache, key, len(rows))
    what, started = f"the log-probabilities of {len(rows):,} pairs are read from", time.monotonic()
    if not all(distributed.all_gather(log_probs is not None)):
        computed = _compute(session, model, step)
        with distributed.local_main_process_first():
            save_reference(cache, key, computed)
            log_probs = load_reference(cache, key, len(rows))
        seconds = time.monotonic() - started
        what = f"the log-probabilities of {len(rows):,} pairs are computed once, in {seconds:.1f} s, and kept in"
    assert log_probs is not None, "it has just been written"
    console.say_rows([("reference", f"{what} {short_path(cache.root / key)} ({reason})")])
    return log_probs


def _compute(session: Session, model: torch.nn.Module, step: FastStep) -> np.ndarray:
    """Runs the step's own pass of the reference over all items, in batches as large as those of a step.

    Long items come first, and batches are the same in any number of processes, each of which computes some.
    """
    items, config = session.data.items, session.config
    assert not isinstance(items, ItemStream), "Config refuses streams of pairs"
    assert session.data.train is not None
    size, processes = config.trainer.per_device_train_batch_size, distributed.world_size()
    order = np.argsort(-session.data.lengths, kind="stable")
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    local = batches[distributed.rank() :: processes]
    rounds = -(-len(batches) // processes)
    was_training = model.training
    model.train()  # as in a step
    parts = []
    with console.progress("reference", len(order)) as update:
        for index in range(rounds):  # all processes call a sharded model as often
            batch = local[index] if index < len(local) else batches[0]
            read = _read(session, model, step, [items[int(item)] for item in batch])
            if index < len(local):
                parts += [(members(items, int(item)), row) for item, row in zip(batch, read, strict=True)]
            update(min((index + 1) * size * processes, len(order)))
    model.train(was_training)
    log_probs = np.zeros((len(session.data.train), 2), np.float32)
    for indices, values in (part for gathered in distributed.all_gather(parts) for part in gathered):
        log_probs[indices] = values[: len(indices)]
    return log_probs


def _read(session: Session, model: torch.nn.Module, step: FastStep, rows: list[dict[str, Any]]) -> np.ndarray:
    """Returns the log-probabilities of the answers of items, float32 [items, pairs, 2]; with less memory, if it ran
    out."""
    width = session.config.data.pack_width or 0 if step.is_compiled else 0
    batch = session.collator(width)(rows)
    targets = int((batch["labels"] != IGNORED).sum())
    inputs = {name: value.to(session.placement.device) for name, value in batch.items()}
    try:
        with torch.no_grad(), session.placement.autocast(), step.reading_reference(), step:
            step.targets = targets
            log_probs = model(**inputs).logits
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise
        half = len(rows) // 2
        return np.concatenate([_read(session, model, step, part) for part in (rows[:half], rows[half:])])
    output: np.ndarray = log_probs.float().cpu().numpy().reshape(len(rows), -1, 2)
    return output


def _key(session: Session, step: FastStep) -> str:
    """Names all that the log-probabilities follow from; a change of any of it is another key."""
    config, data = session.config, session.data
    whole = config_to_dict(config)
    parts = {
        "base": [session.base.fingerprint, session.base.random, config.model.name, session.base.revision],
        "quantization": whole["quantization"],
        "reference": _reference_digest(session),
        "rows": hashlib.sha256(column(data.train, "digest").astype("<i8").tobytes()).hexdigest(),
        "batches": [config.trainer.per_device_train_batch_size, data.packed is not None and config.data.pack_width],
        "step": [step.parts, data.shares_prompts, config.trainer.deterministic],
        "device": [device_name(session.placement.device), str(session.placement)],
        "code": [code_digest(), versions()],
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return f"reference-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _reference_digest(session: Session) -> str:
    """Returns a hash of the weights that make the model its reference; "base" where they add nothing to it."""
    assert session.reference_weights is not None
    names = {id(parameter): name for name, parameter in session.reference_weights.model.named_parameters()}
    values = [(names[id(parameter)], value.detach()) for parameter, value in session.reference_weights.values]
    if not any(bool(value.any()) or ".lora_B." not in name for name, value in values):
        return "base"
    digest = hashlib.sha256()
    for name, value in values:
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
