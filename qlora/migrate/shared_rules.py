"""Rules that several dialects share: model presets, bits, optimizers, attention, trackers, chat templates."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qlora.config.optimizers import OPTIMIZERS, SCHEDULES
from qlora.config.options import model_presets
from qlora.config.overrides import write_override
from qlora.errors import did_you_mean
from qlora.migrate.translation import Lost, Part, Settings

SHARDED = "says how weights are sharded; start with torchrun and trainer.parallel=fsdp (docs/multi_gpu.md)"
ONE_PROCESS = "how a run is spread over processes is said where it is started (torchrun, accelerate launch)"
REMOTE = "set by the environment here (HF_TOKEN, or `hf auth login`), never by a config"
SPEED = "speeds up another trainer; here the fast step is on by itself (trainer.fused_linear, fused_loss, compile)"
WITHOUT_EFFECT = ("dataloader_pin_memory", "ddp_find_unused_parameters", "ddp_timeout", "logging_strategy",
                  "low_cpu_mem_usage", "remove_unused_columns")  # fmt: skip
"""Arguments of transformers' trainer, which others hand on, that make no difference here."""
NO_STEPS = "steps of an epoch are known when the rows are read; set {key}=N"

TRACKERS = {"none": "none", "wandb": "wandb", "tensorboard": "tensorboard", "mlflow": "mlflow", "trackio": "trackio"}

TEMPLATES = {
    **{name: name for name in ("alpaca", "chatml", "gemma", "vicuna", "zephyr", "mistral")},
    "llama2": "llama-2",
    "llama-2": "llama-2",
    "llama3": "llama-3",
    "llama-3": "llama-3",
    "phi": "phi-3",
    "phi_3": "phi-3",
    "phi-3": "phi-3",
    "phi3": "phi-3",
    "phi4": "auto",
    "phi_4": "auto",
    "phi_35": "phi-3",
    **dict.fromkeys(("qwen", "qwen2", "qwen_25", "qwen2_5"), "qwen"),
    **dict.fromkeys(("tokenizer_default", "qwen3", "qwen3_nothink", "gemma2", "gemma3", "deepseek3", "jinja"), "auto"),
    "mistral_v1": "mistral",
    "tokenizer_default_fallback_chatml": "auto",
}
"""Their names of chat templates, and ours; `auto` is the tokenizer's own, which the newer models bring along."""

BITS = {
    (4, "nf4", True): "nf4",
    (4, "nf4", False): "nf4-plain",
    (8, "nf4", True): "int8",
    (8, "nf4", False): "int8",
    (16, "nf4", True): "none",
    (32, "nf4", True): "fp32",
}


def choose_model(name: str, key: str) -> Iterator[Part]:
    """Yields the preset of a hub id, whose shape task=plan then knows, or the name itself."""
    presets = {preset["name"].lower(): option for option, preset in model_presets().items()}
    option = presets.get(name.lower())
    yield write_override("model", option) if option else write_override("model.name", name)
    yield "recipe=none"
    if not option and re.search(r"path/to|<|your[-_/ ]", name):
        yield Lost("this is a placeholder: give the folder or the hub id with model.name=", key)


def choose_quantization(bits: int, quant_type: str, double: bool, *, lora: bool) -> Iterator[Part]:
    """Yields the group of these bits; all weights are trained in 16 bits at least."""
    if not lora:
        yield "lora=none"
        bits = max(bits, 16)
    option = BITS.get((bits, "nf4", double if bits == 4 else True))
    if bits == 4 and quant_type == "fp4":
        yield "quantization=fp4"
        yield write_override("quantization.double_quant", double)
    elif option is not None:
        yield f"quantization={option}"


def choose_optimizer(name: str, key: str) -> Iterator[Part]:
    """Yields the optimizer, if transformers has one of this name."""
    known = {"adamw_hf": "adamw_torch", "adamw_apex_fused": "adamw_torch_fused", "adamw": "adamw_torch"}
    name = known.get(name, name)
    if name in OPTIMIZERS:
        yield write_override("trainer.optim", name)
    else:
        yield Lost(f"no such optimizer here{did_you_mean(name, OPTIMIZERS)}; see trainer.optim", key)


def choose_schedule(name: str, key: str) -> Iterator[Part]:
    """Yields the learning rate's course, if transformers has one of this name."""
    if name in SCHEDULES:
        yield write_override("trainer.lr_scheduler_type", name)
    else:
        yield Lost(f"no such schedule here{did_you_mean(name, SCHEDULES)}; see trainer.lr_scheduler_type", key)


def choose_length(epochs: Any, steps: Any) -> Iterator[Part]:
    """Yields the length of the training: steps where they are given, else epochs."""
    if isinstance(steps, int | float) and steps > 0:
        yield write_override("trainer.max_steps", int(steps))
        yield "trainer.num_train_epochs=null"
    else:
        yield "trainer.max_steps=null"
        yield write_override("trainer.num_train_epochs", epochs)


def choose_warmup(settings: Settings, unset: float = 0) -> Iterator[Part]:
    """Yields the warm-up: steps where they are given, else the share of all steps."""
    ratio, steps = settings.take("warmup_ratio"), settings.take("warmup_steps")
    yield write_override("trainer.warmup_steps", steps or ratio or unset)


def hold_out(size: Any, key: str) -> Iterator[Part]:
    """Yields the rows to hold out, or what comes nearest to none."""
    if size:
        yield write_override("data.eval_dataset_size", size if size < 1 else int(size))
        return
    yield from ("data.eval_dataset_size=1", "task.evaluate=false", "task.predict=false", "trainer.eval_steps=null")
    yield "objective=null"
    yield Lost("one row is held out, and not measured: here some always are", key)


def mix(parts: Sequence[Mapping[str, Any]]) -> Iterator[Part]:
    """Yields the overrides of one set, or of several; a part has the fields of `data.mix`."""
    if len(parts) == 1:
        yield from ("data=local", "trainer=paper")
        for field, value in parts[0].items():
            if isinstance(value, dict):
                yield from (write_override(f"data.{field}.{name}", entry) for name, entry in value.items())
            elif field != "weight":
                yield write_override(f"data.{field}", value)
        return
    yield from ("data=mix", "trainer=paper")
    names: list[str] = []
    for part in parts:
        stem = re.sub(r"\W+", "_", str(part["path"]).rpartition("/")[2].partition(".")[0]).strip("_") or "set"
        name = stem if stem not in names else f"{stem}_{len(names) + 1}"
        names.append(name)
        yield write_override(f"data.mix.{name}", dict(part))
