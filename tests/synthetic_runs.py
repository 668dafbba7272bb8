"""Writes folders of runs as a training leaves them, in milliseconds: for tests of what is made of them."""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qlora.config.compose import compose
from qlora.config.options import group_names
from qlora.config.saved_config import config_to_dict
from qlora.sweep.jobs import slug


def write_run(
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    status: str = "finished",
    reason: str | None = None,
    level: float = 1.0,
    steps: int = 200,
    log: str = "",
    command: Sequence[str] = (),
    answers: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Writes the folder of one run whose held-out loss ends near `level`; `overrides` are those a sweep varies."""
    folder.mkdir(parents=True)
    draw = random.Random(f"{overrides}{level}")
    history = [point for step in range(1, steps + 1) for point in _points(step, steps, level, draw)]
    loss = next(point["eval_loss"] for point in reversed(history) if "eval_loss" in point)
    seconds = 60 + 40 * draw.random() + 20 / level
    metrics = {
        "base_eval_loss": 4.2,
        "base_eval_exact_match": 0.0,
        "train_loss": loss + 0.2,
        "train_runtime": seconds,
        "train_tokens_per_second": 300 + 100 * draw.random(),
        "eval_loss": loss,
        "eval_perplexity": math.exp(loss),
        "eval_exact_match": 1 / (1 + loss),
        "peak_memory_gb": 0.8 + 0.2 * draw.random(),
    }
    config = _config([*overrides, *command])
    _write(folder / "config.yaml", json.dumps(config))  # which is YAML too
    args = [*overrides, *command]
    _write(folder / ".hydra" / "overrides.yaml", "".join(f"- {json.dumps(word)}\n" for word in args) or "[]\n")
    record: dict[str, Any] = {"overrides": list(overrides), "status": status, "reason": reason}
    _write_json(folder / "status.json", record | {"result": "result.json", "seconds": seconds + 12, "started": 1.8e9})
    _write_json(folder / "progress.json", {"step": len(history) and history[-1]["step"], "max_steps": steps})
    _write_json(folder / "manifest.json", _manifest(config))
    _write_json(folder / "history.json", history)
    _write(folder / "stderr.log", log)
    if status == "finished":
        result = {
            "status": status,
            "task": "train",
            "objective": metrics[config["objective"]] if config["objective"] else None,
            "metrics": metrics,
            "intervals": {"eval_exact_match": [0.41, 0.55]},
            "gains": {"exact_match": {"value": 0.48, "low": 0.4, "high": 0.55}},
            "paths": {"config": str(folder / "config.yaml"), "loss": str(folder / "loss.png")},
        }
        _write_json(folder / "result.json", result)
        _write(folder / "predictions.jsonl", "".join(json.dumps(answer) + "\n" for answer in answers))
    return folder


def write_sweep(
    folder: Path,
    axes: Mapping[str, Sequence[str]],
    *,
    broken: Mapping[int, tuple[str, str, str]] | None = None,
    command: Sequence[str] = (),
) -> Path:
    """Writes the grid of `axes` as a sweep; `broken` has status, reason and log of jobs by their numbers."""
    for number, values in enumerate(itertools.product(*axes.values())):
        overrides = [f"{key}={value}" for key, value in zip(axes, values, strict=True)]
        status, reason, log = (broken or {}).get(number, ("finished", None, ""))
        draw = random.Random(f"{overrides}")
        positions = [
            list(all_).index(value) / max(len(all_) - 1, 1) for all_, value in zip(axes.values(), values, strict=True)
        ]
        level = (
            1.2
            + sum((position - 0.6) ** 2 / (1 + 3 * nth) for nth, position in enumerate(positions))
            + 0.05 * draw.random()
        )
        name = f"{slug(overrides)}-{number:08x}"
        write_run(folder / name, overrides, status=status, reason=reason, level=level, log=log, command=command)
    _write_json(folder / "sweep.json", {"name": folder.name, "objective": "eval_loss", "jobs": [], "common": {}})
    return folder


def _config(args: Sequence[str]) -> dict[str, Any]:
    """Returns the config of overrides; composing each run would take most of the time."""
    fields = [word for word in args if word.partition("=")[0] not in group_names()]
    config = json.loads(_composed(tuple(word for word in args if word not in fields)))
    for word in fields:
        key, _, value = word.partition("=")
        *groups, name = key.split(".")
        functools.reduce(dict.__getitem__, groups, config)[name] = yaml.safe_load(value)
    return config


@functools.cache
def _composed(args: tuple[str, ...]) -> str:
    return json.dumps(config_to_dict(compose(list(args))))


def _points(step: int, steps: int, level: float, draw: random.Random) -> list[dict[str, float]]:
    loss = level + (4.5 - level) * math.exp(-5 * step / steps)
    tokens = {"num_input_tokens_seen": 480 * step, "epoch": step / steps, "step": step}
    points = [
        {
            "loss": loss * (0.9 + 0.2 * draw.random()),
            "grad_norm": 0.5 + 2 * loss * draw.random(),
            "learning_rate": 2e-4 * min(1, step / 10) * (1 + math.cos(math.pi * step / steps)) / 2,
            "train_tokens_per_second": 350 + 30 * draw.random(),
            **tokens,
        }
    ]
    if step % (steps // 8 or 1) == 0:
        held_out = loss * 1.05
        points.append({"eval_loss": held_out, "eval_exact_match": 1 / (1 + held_out), "eval_perplexity": 3.0, **tokens})
    return points


def _manifest(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "started": "2030-01-02T03:04:05+00:00",
        "command": "python -m qlora",
        "config": config,
        "data": {"name": "demo", "format": "alpaca", "train_rows": 2464, "eval_rows": 200, "train_tokens": 57096,
                 "cut_sources": 3, "fingerprint": "4f029139d67f1d1a", "packs": None},
        "model": {"model": "tiny: 3.0 M parameters", "base": "nf4 + double quantization", "folder": "elsewhere",
                  "training": "LoRA r=8, alpha=32: 139,264 of 3,172,608 parameters train (4.39%)"},
        "versions": {"python": "3.11.7", "torch": "2.13.0", "qlora": "0.1.0", "peft": None},
        "code": {"commit": "0123456789abcdef", "dirty": True},
        "hardware": {"cpu": "a CPU", "cores": 2, "memory_gb": 24.0, "gpus": [{"name": "a GPU", "memory_gb": 80.0}]},
        "platform": "Linux",
    }  # fmt: skip


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _write_json(path: Path, obj: Any) -> None:
    _write(path, json.dumps(obj))
