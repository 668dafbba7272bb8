"""Whether a training step of this config works on this device, and which parts of the fast step are on."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from qlora.config.options import model_presets
from qlora.config.schema import ArchitectureConfig, Config, Weights
from qlora.doctor.findings import Finding, fail, fine, first_line, warn
from qlora.errors import UserError
from qlora.models.model_files import is_local, locate
from qlora.quantization.method import find_method
from qlora.text import format_percent

LINEAR_KERNELS = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d"}
"""The modules of the packages of `qlora[linear]`."""
LEAST_AGREEMENT = 0.99
"""The cosine of a gradient before and after an evaluation; bitsandbytes' repacked weights gave 0.24."""


def check_step(config: Config) -> Iterator[Finding]:
    """Trains one small layer of the model's architecture for a step, before and after an evaluation."""
    from qlora.doctor.miniature import try_layer
    from qlora.quantization.placement import find_placement
    from qlora.runtime.device import find_device

    placement = find_placement(config.quantization, find_device(config.device))
    yield fine("device", str(placement))
    architecture, whose = find_architecture(config)
    try:
        trial = try_layer(config, architecture, placement)
    except UserError as error:
        yield fail("training step", first_line(error), "change the key that the message names")
        return
    method = find_method(config.quantization)
    bits, limit = method.width(config.quantization), method.largest_error(config.quantization)
    if trial.rounding is not None and limit is not None and trial.rounding > limit:
        yield fail("training step", f"{bits} weights are wrong by {trial.rounding:.0%} on this device",
                   "reinstall bitsandbytes (pip install --force-reinstall bitsandbytes)")  # fmt: skip
    elif trial.agreement < LEAST_AGREEMENT:
        yield fail("training step", f"gradients are others after an evaluation (cosine {trial.agreement:.2f}): {bits} "
                   "layers lose theirs",
                   "install the tested versions (constraints.txt), or use quantization=none")  # fmt: skip
    else:
        rounded = f", weights rounded by {format_percent(trial.rounding)}" if trial.rounding is not None else ""
        layer = f"a {bits} layer with experts" if trial.has_experts else f"a {bits} layer"
        yield fine("training step", f"{layer} of {whose} trains{rounded}")
    for name, state in trial.parts.items():
        if name == "fp8" and state != "on":
            yield warn(name, state, "quantization.compute=native")
        else:
            yield fine(name, "on" if state == "on" else f"off: {state}")


def find_architecture(config: Config) -> tuple[ArchitectureConfig, str]:
    """Returns the shape of the model, from its preset or the `config.json` that is here, and whose it is."""
    model = config.model
    presets = {preset["name"]: preset["architecture"] for preset in model_presets().values()}
    if model.architecture is not None and (model.weights is Weights.random or model.name in presets):
        return model.architecture, model.architecture.model_type
    settings = _stored_config(config)
    names = {item.name for item in fields(ArchitectureConfig)}
    needed = (
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
    )
    if all(settings.get(name) is not None for name in needed):
        plain = {name: value for name, value in settings.items() if isinstance(value, int | float | str)}
        known: dict[str, Any] = {"max_position_embeddings": 2048} | {name: plain[name] for name in names & plain.keys()}
        if settings.get("q_lora_rank", "") is None:  # DeepSeek's queries are not compressed
            known["q_lora_rank"] = 0
        return ArchitectureConfig(**known), settings["model_type"]
    return ArchitectureConfig(**presets["tiny"]), "the embedded model (the config.json of the base is not here)"


def _stored_config(config: Config) -> dict[str, Any]:
    """Returns the `config.json` of a folder or of the hub library's cache; fetches nothing."""
    from huggingface_hub import try_to_load_from_cache

    model = config.model
    location = locate(model.name)
    path: Any = Path(location) / "config.json"
    if not is_local(location):
        path = try_to_load_from_cache(location, "config.json", revision=model.revision, cache_dir=model.cache_dir)
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8")) if isinstance(path, str | Path) else {}
    except (OSError, ValueError):
        return {}
    text = settings.get("text_config") if isinstance(settings, dict) else None
    return text if isinstance(text, dict) else settings if isinstance(settings, dict) else {}


def check_support(config: Config) -> Iterator[Finding]:
    """Looks for what attention and compilation need beside torch."""
    import torch

    requested = config.model.attn_implementation or ""
    packages = {
        "flash_attention_2": "flash_attn",
        "flash_attention_3": "flash_attn_interface",
        "flex_attention": "torch",
    }
    if (package := packages.get(requested)) is not None and importlib.util.find_spec(package) is None:
        yield fail("attention", f"model.attn_implementation={requested} needs the package {package}",
                   f"pip install {package.replace('_', '-')}, or use sdpa")  # fmt: skip
    else:
        yield fine("attention", requested or "transformers' choice (sdpa where the model allows it)")
    if config.data.packing:
        yield from _check_packing(config)
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            yield warn("compile", "Triton is not installed: the fast step stays off", "pip install triton")
        elif shutil.which("gcc") is None and shutil.which("cc") is None and shutil.which("clang") is None:
            yield fail("compile", "there is no C compiler, which Triton needs", "apt-get install gcc, or CC=PATH")
    elif config.trainer.compile is True and shutil.which("g++") is None and shutil.which("clang++") is None:
        yield fail("compile", "trainer.compile=true on a CPU needs a C++ compiler", "apt-get install g++")


def _check_packing(config: Config) -> Iterator[Finding]:
    """Looks for the kernels with which recurrent layers keep packed rows apart."""
    from transformers import CONFIG_MAPPING

    from qlora.upstream.transformers_model import RECURRENT_LAYERS

    kind = find_architecture(config)[0].model_type
    settings = {**(CONFIG_MAPPING[kind]().to_dict() if kind in CONFIG_MAPPING else {}), **_stored_config(config)}
    if not RECURRENT_LAYERS.intersection(settings.get("layer_types") or ()):
        return
    missing = [name for module, name in LINEAR_KERNELS.items() if importlib.util.find_spec(module) is None]
    if missing:
        yield warn("packing", f"{kind} has recurrent layers, which keep packed rows apart with kernels of "
                   f"{' and '.join(LINEAR_KERNELS.values())}; not installed: {', '.join(missing)}",
                   "pip install 'qlora[linear]', or set data.packing=false")  # fmt: skip
    else:
        yield fine("packing", f"{' and '.join(LINEAR_KERNELS.values())} keep packed rows apart in recurrent layers")
