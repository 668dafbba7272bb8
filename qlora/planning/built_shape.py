"""The shape of a model that no table knows: from the modules that transformers builds on the meta device.

That imports torch, which takes seconds, so what was read is kept in a file for each model and version of transformers.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qlora.errors import ResourceError
from qlora.planning.families import Family
from qlora.planning.mixture import Experts, MixtureFamily
from qlora.planning.model_shape import Layer, Linear, Mixer, Shape
from qlora.runtime.atomic_files import write_text

FORMAT = 3
"""Of the file; another one is read anew."""


def build_shape(
    settings: Mapping[str, Any], where: str, cache: Path | None = None, options: Collection[str] | None = None
) -> Shape:
    """Returns the shape of the model that transformers builds from settings; `where` names them in errors.

    `cache` is a folder that keeps its layout. Raises `DataError` for settings that transformers builds no model from.
    `options`: the settings are those of `model.architecture`, of which one that the model type does not have raises
    `ConfigError`.
    """
    text = json.dumps(dict(settings), sort_keys=True, default=str)
    return _shape(_layout(text, where, cache, None if options is None else tuple(options)))


@dataclass(frozen=True)
class WholeModules:
    """The modules of a model that could train whole beside an adapter."""

    shapes: dict[str, list[list[int]]]
    """Those of their tensors, by the names of the modules."""
    tied: list[str]
    """The names of embedding and output layer where they are one matrix."""
    output: str
    """The name of the output layer."""


def build_modules(
    settings: Mapping[str, Any], where: str, cache: Path | None = None, options: Collection[str] | None = None
) -> WholeModules:
    """Returns the modules that could train whole; the arguments are those of `build_shape`, for any architecture."""
    inner = settings.get("text_config")
    text = json.dumps(dict(inner if isinstance(inner, Mapping) else settings), sort_keys=True, default=str)
    layout = _layout(text, where, cache, None if options is None else tuple(options))
    return WholeModules(layout["whole"], layout["tied_modules"], layout["output"])


@functools.lru_cache(maxsize=64)
def _layout(settings: str, where: str, cache: Path | None, options: tuple[str, ...] | None) -> dict[str, Any]:
    """Returns the layout of the model of these settings, which are JSON; one that was kept is not read again."""
    known = f"{FORMAT} {version('transformers')} {options} {settings}"
    file = cache / f"{hashlib.sha256(known.encode()).hexdigest()[:32]}.json" if cache is not None else None
    if file is not None and (kept := _read(file)) is not None:
        return kept
    from qlora.models.meta_layout import read_layout  # imports torch and transformers

    layout = read_layout(json.loads(settings), where, options)
    if file is not None:
        _keep(file, layout)
    return layout


def _read(file: Path) -> dict[str, Any] | None:
    try:
        layout = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return layout if isinstance(layout, dict) else None


def _keep(file: Path, layout: dict[str, Any]) -> None:
    """Writes a layout for the next plan; where that is impossible, the next plan reads the model again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(layout), flush=False)
    except (OSError, ResourceError):
        return


def _shape(layout: Mapping[str, Any]) -> Shape:
    layers = [_layer(layer) for layer in layout["layers"]]
    kinds = tuple(dict.fromkeys(layers))
    experts = _experts(layout)
    matrices = sum(linear.weights for layer in layers for linear in layer.linears)
    routed = len(experts.layers) * experts.weights if experts is not None else 0
    return Shape(
        model_type=layout["model_type"],
        hidden=layout["hidden"],
        intermediate=layout["intermediate"] or max(layer.feed_forward for layer in layers),
        layers=len(layers),
        heads=layout["heads"],
        key_value_heads=layout["key_value_heads"],
        head_dim=layout["head_dim"],
        vocabulary=layout["vocabulary"],
        tied=layout["tied"],
        context=layout["context"],
        family=Family(
            norms=max(layer["hidden_norms"] for layer in layout["layers"]),
            layer_norm=layout["layer_norm"],
            gated=any(layer["is_gated"] for layer in layout["layers"]),
            joined=any(layer["is_joined"] for layer in layout["layers"]),
            capped=layout["capped"],
            capped_logits=layout["capped_logits"],
            sinks=layout["sinks"],
        ),
        kinds=kinds,
        order=tuple(kinds.index(layer) for layer in layers),
        unquantized=layout["parameters"] - matrices - routed,
        experts=experts,
        is_estimate=True,
    )


def _layer(layer: Mapping[str, Any]) -> Layer:
    return Layer(
        linears=tuple(Linear(**linear) for linear in layer["linears"]),
        mixers=tuple(Mixer(**mixer) for mixer in layer["mixers"]),
        norms=tuple((width, rows) for width, rows in layer["norms"]),
        feed_forward=layer["feed_forward"],
        has_experts=layer["has_experts"],
    )


def _experts(layout: Mapping[str, Any]) -> Experts | None:
    if (experts := layout["experts"]) is None:
        return None
    gate = next((layer["shared_gate"] for layer in layout["layers"] if layer["shared_gate"]), "")
    family = MixtureFamily({}, module=experts["module"], shared_gate=gate, is_biased=experts["is_biased"])
    return Experts(
        family=family,
        count=experts["count"],
        per_token=experts["per_token"],
        hidden=experts["hidden"],
        intermediate=experts["intermediate"],
        shared=max(layer["shared"] for layer in layout["layers"]),
        layers=frozenset(experts["layers"]),
        has_gate=experts["has_gate"],
    )
