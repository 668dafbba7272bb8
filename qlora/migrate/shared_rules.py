"""Rules that several dialects share: model presets, bits, optimizers, trackers, held-out rows, chat templates."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qlora.config.optimizers import SCHEDULES
from qlora.config.options import model_presets
from qlora.config.overrides import write_override
from qlora.config.registries.optimizers import OPTIMIZERS
from qlora.errors import did_you_mean
from qlora.migrate.translation import Lost, Part, is_unset

STREAMING = (
    "rows are kept in a cache on disk and need not fit into memory; for sets that are larger than the disk set "
    "data.streaming=true with trainer.max_steps"
)
"""Why a setting that streams rows is not needed, and what to set where it is."""
WEIGHTS = "give each set a weight (data.mix.NAME.weight), or with data.streaming=true a data.mix.NAME.probability"

SHARDED = "says how weights are sharded; start with torchrun and trainer.parallel=fsdp (docs/multi_gpu.md)"
ONE_PROCESS = "how a run is spread over processes is said where it is started (torchrun, accelerate launch)"
REMOTE = "set by the environment here (HF_TOKEN, or `hf auth login`), never by a config"
SPEED = "speeds up another trainer; here the fast step is on by itself (trainer.fused_linear, fused_loss, compile)"
ONE_DEVICE = "a row and a layer stay on one device here"
NO_RESUME = "another tool's checkpoint cannot be resumed: the training begins anew"
NO_NOISE = "no noise is added to embeddings here"
NO_MEDIA = "only text is trained here"
NO_DEEPSPEED = "DeepSpeed is not used here; docs/multi_gpu.md says how several GPUs share a run"
PUSH = "upload a finished run with task=push repo=OWNER/NAME"

TRACKERS = {"wandb": "wandb", "tensorboard": "tensorboard", "mlflow": "mlflow", "trackio": "trackio"}

BITS = {
    (4, "nf4", True): "nf4",
    (4, "nf4", False): "nf4-plain",
    (8, "nf4", True): "int8",
    (16, "nf4", True): "none",
    (32, "nf4", True): "fp32",
}

PEFT_TARGETS = {"gpt_neox": ["query_key_value"], "phi3": ["qkv_proj"]}
"""Where PEFT 0.21 puts an adapter whose config names no modules, by model type; else on queries and values."""
MATRICES = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")
"""Names of modules that no other module's name ends with."""
EXPERTS = re.compile(r"(?:(?:[a-z_]+\.)*experts\.)?(gate_up_proj|down_proj)")
ROUTERS = re.compile(r"(?:[a-z_]+\.)*(?:gate|router)\.weight")
"""Parameters of mixtures as PEFT's `target_parameters` names them: by their ends, in all layers."""
BALANCE = "no loss balances experts here: that of the routers is logged and not trained"
EXPERT_KERNELS = "trainer.fused_experts chooses how experts are computed"


def choose_model(name: str, key: str) -> Iterator[Part]:
    """Yields the preset of a hub id, with its shape and licence, or the name itself, with those of no other model."""
    option = _preset(name)
    if option is not None:
        yield write_override("model", option)
    else:
        yield write_override("model.name", name)
        yield from ("model.architecture=null", "model.license=null")
    yield "recipe=none"
    if option is None and re.search(r"path/to|<|your[-_/ ]|^unset$", name):
        yield Lost("no model is named: give the folder or the hub id with model.name=", key)


def _preset(name: str) -> str | None:
    return next((option for option, preset in model_presets().items() if preset["name"].lower() == name.lower()), None)


def choose_revision(revision: Any) -> Iterator[Part]:
    """Yields the branch, tag or commit of the base, unless it is the branch that is taken anyway."""
    if revision not in (None, "", "main"):
        yield write_override("model.revision", str(revision))


def default_targets(model: str) -> Iterator[Part]:
    """Yields the modules that PEFT adapts where a config names none."""
    option = _preset(model)
    model_type = model_presets()[option]["architecture"]["model_type"] if option is not None else ""
    yield write_override("lora.target_modules", PEFT_TARGETS.get(model_type, ["q_proj", "v_proj"]))


def choose_targets(named: Any, everything: Sequence[str] = ("all-linear", "all")) -> Iterator[Part]:
    """Yields the modules that a config names, as a list or a text with commas."""
    names = named if isinstance(named, list) else [name.strip() for name in str(named).split(",")]
    is_every = any(name in everything for name in names)
    yield write_override("lora.target_modules", "all-linear" if is_every else names)


def choose_whole_modules(named: Any, key: str) -> Iterator[Part]:
    """Yields the modules that train whole, which PEFT finds by the ends of their names; a head does so by itself."""
    if is_unset(named):
        return
    names = [str(name) for name in (named if isinstance(named, list) else re.split(r"[,\s]+", str(named).strip()))]
    if groups := [name for name in names if name.startswith("all-")]:
        yield Lost(f"{groups[0]} is no module's name; name them in lora.modules_to_save", key)
    elif names := [name for name in names if name != "score"]:
        yield write_override("lora.modules_to_save", [name if name in MATRICES else f".*{name}" for name in names])


def choose_pattern(pattern: Any, ours: str, key: str) -> Iterator[Part]:
    """Yields the ranks or alphas of layers that a config names for PEFT, which reads regular expressions otherwise."""
    if not pattern:
        return
    entries = {str(name).removeprefix("^").removesuffix("$"): value for name, value in dict(pattern).items()}
    if all(re.fullmatch(r"[\w.]+", name, re.ASCII) for name in entries):
        yield write_override(ours, entries)
    else:
        yield Lost(f"its regular expressions match ends of names: write {ours} with those of whole names", key)


def choose_parameters(named: Any, rank: int, key: str) -> Iterator[Part]:
    """Yields the adapters on 3-D parameters that a config names for PEFT's `target_parameters`, with its rank."""
    names = named if isinstance(named, list) else [name.strip() for name in str(named).split(",")]
    matrices = {match[1] for name in names if (match := EXPERTS.fullmatch(str(name)))}
    routers = [name for name in names if ROUTERS.fullmatch(str(name))]
    others = [str(name) for name in names if not EXPERTS.fullmatch(str(name)) and name not in routers]
    if matrices == {"gate_up_proj", "down_proj"}:
        yield "lora.experts=all"
        yield f"lora.expert_r={rank}"
    elif matrices:
        [matrix] = matrices
        yield Lost(
            f"it names {matrix} of the experts alone: here all matrices of an expert get adapters (lora.experts=all) "
            "or none",
            key,
        )
    if routers:
        yield "lora.router=true"
    if others:
        reason = "there are adapters on linear layers, on the experts of all layers, and on routers alone"
        yield Lost(f"{', '.join(others)}: {reason}", key)


def choose_quantization(
    bits: int, quant_type: str = "nf4", *, double: bool = True, dtype: str = "auto", lora: bool = True
) -> Iterator[Part]:
    """Yields the group of these bits and the precision of matmuls; all weights are trained in 16 bits at least."""
    if not lora:
        yield "lora=none"
        bits = max(bits, 16)
    if bits == 16 and dtype == "fp32":
        bits = 32
    if bits == 4 and quant_type == "fp4":
        yield "quantization=fp4"
        yield write_override("quantization.double_quant", double)
    else:
        yield f"quantization={BITS[bits, 'nf4', double if bits == 4 else True]}"
    if bits != 32 or dtype != "auto":
        yield f"quantization.compute_dtype={dtype}"


def choose_optimizer(name: str, key: str) -> Iterator[Part]:
    """Yields the optimizer, if transformers has one of this name."""
    known = {
        "adamw_hf": "adamw_torch", "adamw_apex_fused": "adamw_torch_fused", "adamw": "adamw_torch",
        "optimi_adamw": "adamw_torch", "lion_pytorch": "lion_32bit",
        "ao_adamw_8bit": "adamw_torch_8bit", "ao_adamw_4bit": "adamw_torch_4bit",
    }  # fmt: skip
    name = known.get(name, name)
    if name in OPTIMIZERS:
        yield write_override("trainer.optim", name)
    else:
        yield "trainer.optim=adamw_torch_fused"
        yield Lost(f"no such optimizer here{did_you_mean(name, OPTIMIZERS)}; adamw_torch_fused is taken", key)


LAYERWISE = "it changes weights within the backward pass there; here all weights move at the end of a step"


def choose_projection(optim: str, values: Mapping[str, Any]) -> Iterator[str]:
    """Yields an optimizer that projects gradients, with its arguments."""
    yield f"trainer.optim={optim}"
    for key, value in values.items():
        yield write_override(f"trainer.optim_args.{key}", value)


def choose_schedule(name: str, key: str) -> Iterator[Part]:
    """Yields the learning rate's course, if transformers has one of this name."""
    if name in SCHEDULES:
        yield write_override("trainer.lr_scheduler_type", name)
    else:
        yield "trainer.lr_scheduler_type=cosine"
        yield Lost(f"no such schedule here{did_you_mean(name, SCHEDULES)}; cosine is taken", key)


def choose_length(epochs: Any, steps: Any) -> Iterator[Part]:
    """Yields the length of the training: steps where they are given, else epochs."""
    if isinstance(steps, int | float) and steps > 0:
        yield write_override("trainer.max_steps", int(steps))
        yield "trainer.num_train_epochs=null"
    else:
        yield "trainer.max_steps=null"
        yield write_override("trainer.num_train_epochs", epochs)


def every(ours: str, *, steps: Any = None, epochs: float | None = None) -> Iterator[Part]:
    """Yields how often is measured or saved: every N steps or epochs, or never."""
    if epochs is not None:
        yield f"{ours}={epochs:g}ep"
    else:
        yield write_override(ours, None if steps is None else max(int(steps), 1))


def every_share(ours: str, fraction: float, *, epochs: Any, steps: Any) -> Iterator[Part]:
    """As `every`, for a fraction of all steps of a training run of N epochs or steps."""
    if isinstance(steps, int | float) and steps > 0:
        yield from every(ours, steps=math.ceil(fraction * steps))
    else:
        yield from every(ours, epochs=fraction * float(epochs))


def keep(key: str, *, best: bool, metric: Any = "loss") -> Iterator[Part]:
    """Yields whether the last or the best state becomes the adapter; the best is that of the lowest held-out loss."""
    is_loss = metric in (None, "loss", "eval_loss")
    yield f"trainer.keep={'best' if best and is_loss else 'last'}"
    if best and not is_loss:
        yield Lost("the last state is kept; callbacks=early-stopping ends a training", key)


def choose_trackers(names: Any, key: str) -> Iterator[Part]:
    """Yields the trackers of a list of names, or of a text."""
    listed = names if isinstance(names, list) else str(names).replace(",", " ").split()
    listed = [str(name).lower() for name in listed if str(name).lower() not in ("none", "null", "[]")]
    known = [name for name in listed if name in TRACKERS]
    yield f"tracking={TRACKERS[known[0]] if known else 'none'}"
    if len(known) > 1:
        yield write_override("tracking.also", [TRACKERS[name] for name in known[1:]])
    if left := [name for name in listed if name not in TRACKERS]:
        yield Lost(f"the trackers are {', '.join(TRACKERS)}: not sent to {', '.join(left)}", key)


def choose_name(name: Any) -> Iterator[Part]:
    """Yields the name of a run, which is a folder's here."""
    if name:
        yield write_override("name", re.sub(r"[/\\]+", "-", str(name)).strip("-") or "run")


def hold_out(size: Any) -> Iterator[Part]:
    """Yields the rows to hold out, or none."""
    if size:
        yield write_override("data.eval_dataset_size", size if size < 1 else int(size))
        return
    yield "data.eval_dataset_size=0"
    yield from ("task.evaluate=false", "trainer.eval_steps=null", "objective=null")


def mix(parts: Sequence[Mapping[str, Any]]) -> Iterator[Part]:
    """Yields the overrides of one set, or of several; a part has the fields of `data.mix`."""
    if len(parts) == 1:
        yield "data=local"
        for field, value in parts[0].items():
            if isinstance(value, dict):
                yield from (write_override(f"data.{field}.{name}", entry) for name, entry in value.items())
            elif field != "weight":
                yield write_override(f"data.{field}", value)
        return
    yield "data=mix"
    names: list[str] = []
    for part in parts:
        stem = re.sub(r"\W+", "_", str(part["path"]).rpartition("/")[2].partition(".")[0]).strip("_") or "set"
        name = stem if stem not in names else f"{stem}_{len(names) + 1}"
        names.append(name)
        yield write_override(f"data.mix.{name}", dict(part))


def measure_on(held_out: Mapping[str, Any], trained: Sequence[Mapping[str, Any]], key: str) -> Iterator[Part]:
    """Yields the rows to measure on, a set of their own with the fields of `data.mix`.

    They are read in the format and with the columns of the rows to train on, which may be another's.
    """
    path, split = held_out["path"], held_out.get("split", "train")
    first = trained[0]
    if len(trained) == 1 and path == first["path"] and split != first.get("split", "train"):
        yield write_override("data.eval_split", split)
    else:
        yield write_override("data.eval_path", path)
        if split != "train":
            yield Lost(f"held-out rows come from the split test, validation or train of {path}, not {split}", key)
    if len(trained) > 1:
        yield write_override("data.format", held_out.get("format", "auto"))
        yield from (write_override(f"data.columns.{name}", source)
                    for name, source in held_out.get("columns", {}).items())  # fmt: skip
    elif any(held_out.get(name) != first.get(name) for name in ("format", "columns")):
        yield Lost("these rows are read in the format and with the columns of those to train on", key)
    if held_out.get("max_samples") is not None:
        yield write_override("data.max_eval_samples", held_out["max_samples"])
    if left := [name for name in ("subset", "data_files", "revision") if name in held_out and path != first["path"]]:
        yield Lost(f"{', '.join(left)} of held-out rows cannot be named here; write them to a file", key)
