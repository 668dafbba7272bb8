"""Adds, counts, saves and loads LoRA adapters."""

from __future__ import annotations

import json
import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, initialize_lora_eva_weights
from peft.tuners.lora import Linear4bit, LoraLayer, LoraModel
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba, cast_adapter_dtype
from peft.utils.integrations import dequantize_module_weight
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from qlora.config.schema import LoraBias, LoraConfig, LoraDtype, LoraInit
from qlora.errors import ConfigError, did_you_mean
from qlora.models.decoder import ROUTER, linear_modules, read_decoder
from qlora.models.fingerprint import Base, write_base
from qlora.models.json_files import library_reads, read_object
from qlora.models.model_files import check_safetensors
from qlora.models.tokenizer import save_tokenizer
from qlora.models.weight_files import Tensors
from qlora.runtime.atomic_files import write_folder
from qlora.text import brief_text

log = logging.getLogger(__name__)

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LINEAR_PART = re.compile(r"base_model\.model\.(.+)\.lora_(A\.weight|B\.weight|magnitude_vector)")
EXPERTS = ".experts."
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
"""What `lora=attention` adapts."""


@dataclass(frozen=True)
class ParameterCount:
    """Counts of parameters; a 4-bit weight counts as the parameters it stands for."""

    trainable: int
    total: int
    base: int
    by_dtype: dict[str, int]
    """Those of the base, by what they are stored in: `nf4`, `int8`, `bfloat16` ..."""

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters train ({self.trainable / self.total:.2%})"


def add_lora(
    config: LoraConfig,
    model: PreTrainedModel,
    *,
    tensors: Callable[[], Tensors],
    new_token_ids: list[int],
    batches: Iterable[dict[str, torch.Tensor]],
) -> PeftModel:
    """Attaches a fresh adapter; its weights are drawn from torch's current seed and stored as `config.dtype` says.

    `tensors` opens the 16-bit weights (read by LoftQ), `batches` yields training batches (read by EVA).
    Raises `ConfigError` for target modules that match nothing.
    """
    peft_config = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        bias=config.bias.value,
        target_modules=find_target_modules(config.target_modules, model),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=_PEFT_INIT[config.init],
        trainable_token_indices=_rows_to_train(model, new_token_ids),
    )
    try:
        adapted = get_peft_model(model, peft_config, low_cpu_mem_usage=config.init is LoraInit.eva)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(
            f"lora.target_modules={config.target_modules}: PEFT cannot adapt this {model.config.model_type} so "
            f"({str(error).strip().splitlines()[0].rstrip('.')}); name other layers in lora.target_modules, or use "
            "lora=all-linear"
        ) from error
    if config.init is LoraInit.loftq:
        correct_quantization(adapted, original_weights(tensors(), model.base_model_prefix))
    elif config.init is LoraInit.eva:
        _start_from_data(adapted, batches)
        cast_adapter_dtype(adapted.base_model, "default")  # EVA leaves the base's dtype behind
    if config.bias is not LoraBias.none:
        biases = [pair for pair in _copy_biases(adapted) if pair[0].requires_grad]
        if not biases:
            log.warning("lora.bias=%s: the layers that it means have no biases, so none is trained", config.bias.value)
        _keep_biases(adapted, biases)
    if config.dtype is LoraDtype.bf16:
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.bfloat16()
    return adapted


def _copy_biases(model: torch.nn.Module) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Returns the biases of a model that no adapter has changed yet, each with a copy."""
    biases = [parameter for name, parameter in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    return [(parameter, parameter.detach().clone()) for parameter in biases]


def _keep_biases(model: PeftModel, untuned: list[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
    """Keeps the biases of the untuned base, which the adapter trains in their place, for `adapter_off`."""
    model.__dict__["untuned_biases"] = untuned


@contextmanager
def adapter_off(model: torch.nn.Module) -> Iterator[None]:
    """Makes the untuned base of a model with an adapter in the block, also where the adapter trains biases.

    PEFT alone leaves the trained biases on. A model without an adapter stays as it is. Raises `ConfigError` for an
    adapter that rewrote the base when it was loaded: what it leaves behind is not the base.
    """
    if not isinstance(model, PeftModel):
        yield
        return
    start = model.peft_config["default"].init_lora_weights if isinstance(model.base_model, LoraModel) else True
    if isinstance(start, str) and start.startswith(REWRITING):
        raise ConfigError(
            f"adapter: it begins as a part of its base (init_lora_weights={start}, as checkpoints of such a run have "
            "it), so that the untuned base is not what is left without it; measure that with adapter=none, and leave "
            "it out here with evaluation.baseline=false"
        )
    has_biases = any(config.bias != "none" for config in model.peft_config.values() if hasattr(config, "bias"))
    untuned = model.__dict__["untuned_biases"] if has_biases else []
    trained = [(parameter, parameter.detach().clone()) for parameter, _ in untuned]
    with ExitStack() as stack:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias")
            stack.enter_context(model.disable_adapter())
        stack.callback(_set_values, trained)
        _set_values(untuned)
        yield


@torch.no_grad()
def _set_values(parameters: list[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
    for parameter, value in parameters:
        parameter.copy_(value)


def _start_from_data(model: PeftModel, batches: Iterable[dict[str, torch.Tensor]]) -> None:
    """Lets PEFT draw an adapter from what its layers read (EVA), which it can of [rows, tokens, features] alone."""
    _check_rank_for_data(model)
    try:
        initialize_lora_eva_weights(model, dataloader=batches, show_progress_bar=False)
    except (ValueError, IndexError) as error:
        base = model.get_base_model()
        adapted = {_last(name) for name, module in base.named_modules() if isinstance(module, LoraLayer)}
        elsewhere = "lora=attention lora.init=eva, or " if adapted > ATTENTION else ""
        raise ConfigError(
            f"lora.init=eva: PEFT cannot start from what some layers of this {model.config.model_type} read "
            f"({str(error).strip().splitlines()[0]}); use {elsewhere}lora=all-linear lora.init=default"
        ) from error


def _check_rank_for_data(model: PeftModel) -> None:
    """Raises `ConfigError` where EVA would look for more directions than a layer reads features."""
    config = model.peft_config["default"]
    layers = {name: module for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    name = min(layers, key=lambda name: layers[name].in_features)
    features, directions = layers[name].in_features, round(config.r * config.eva_config.rho)
    if directions > features:
        raise ConfigError(
            f"lora.r={config.r}: lora.init=eva looks for {directions} directions in what a layer reads, and {name} "
            f"reads {features} features; set lora.r={int(features / config.eva_config.rho)} or less, or use "
            "lora=all-linear lora.init=default"
        )


def _rows_to_train(model: PreTrainedModel, new_token_ids: list[int]) -> dict[str, list[int]] | None:
    """Returns the rows of new tokens by matrix: of the embedding and, where it is a matrix of its own, the output."""
    if not new_token_ids:
        return None
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    matrices = [embedding] if output is None or output.weight is embedding.weight else [embedding, output]
    names = [name for name, module in model.named_modules() if any(module is matrix for matrix in matrices)]
    return {name: sorted(set(new_token_ids)) for name in names}


# LoftQ as PEFT inits it would replace the base weights; `correct_quantization` leaves them alone.
_PEFT_INIT: dict[LoraInit, Any] = {
    LoraInit.default: True,
    LoraInit.gaussian: "gaussian",
    LoraInit.orthogonal: "orthogonal",
    LoraInit.pissa: "pissa",
    LoraInit.olora: "olora",
    LoraInit.loftq: True,
    LoraInit.eva: "eva",
}
REWRITES_BASE = (LoraInit.pissa, LoraInit.olora)
REWRITING = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""How the inits begin by which PEFT rewrites the base that an adapter is added to."""


@torch.no_grad()
def correct_quantization(model: PeftModel, original: Callable[[str], torch.Tensor]) -> None:
    """Sets each adapter to the best rank-r correction of its layer's 4-bit error (LoftQ, arXiv 2310.08659).

    One step on the given quantized base, which stays as it is. `original` returns a layer's 16-bit weight by name.
    A rank above the smaller side of a matrix corrects it exactly; the rest of the adapter starts as any other.
    PEFT's own version runs on CUDA and XPU only, and forgets that the adapter's output is scaled.
    """
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, Linear4bit):
            continue
        quantized = dequantize_module_weight(module.get_base_layer()).float()
        error = original(f"{name}.weight").to(quantized) - quantized
        u, s, v = torch.linalg.svd(error, full_matrices=False)
        for adapter, rank in module.r.items():
            root, used = s[:rank].sqrt(), min(rank, len(s))
            module.lora_A[adapter].weight[:used] = root[:, None] * v[:rank]
            module.lora_B[adapter].weight[:, :used] = u[:, :rank] * root / module.scaling[adapter]


def original_weights(tensors: Tensors, prefix: str) -> Callable[[str], torch.Tensor]:
    """Returns a function from a weight's name in the model to its tensor, whose own name may lack the prefix."""
    names = set(tensors)
    return lambda name: tensors.read(name if name in names else name.removeprefix(f"{prefix}."))


def find_target_modules(wanted: list[str], model: PreTrainedModel) -> list[str]:
    """Turns `lora.target_modules` into what PEFT takes; each name or pattern must match a linear layer.

    Layers that text does not run through are left out, and with `all-linear` those that PEFT cannot adapt, too.
    """
    routers = {matrix.name.removesuffix(".weight") for matrix in read_decoder(model).matrices if matrix.kind == ROUTER}
    names = [name for name in linear_modules(model) if name not in routers]  # its output may be more than a tensor
    experts = _names_of_experts(names, model)
    if wanted == ["all-linear"]:
        chosen = [name for name in names if _last(name) not in experts and _is_called(name, model)]
        if not chosen:
            raise ConfigError(f"lora.target_modules: {model.config.model_type} has no linear layer; use lora=none")
        return chosen
    kinds = sorted({_last(name) for name in names})
    found: dict[str, list[str]] = {pattern: _matches(pattern, names) for pattern in wanted}
    if missing := [pattern for pattern, matched in found.items() if not matched]:
        raise ConfigError(
            f"lora.target_modules {missing} match no linear layer{did_you_mean(missing[0], kinds)}; "
            f"the model has {kinds}, or use all-linear"
        )
    chosen = sorted({name for matched in found.values() for name in matched})
    if taken := sorted({_last(name) for name in chosen} & experts):
        raise ConfigError(
            f"lora.target_modules {taken}: in {model.config.model_type} PEFT gives these names to the experts, which "
            f"have no adapters here; choose among {sorted(set(kinds) - experts)}, or use all-linear"
        )
    is_plain = all(pattern in kinds for pattern in wanted) and len(chosen) == _count(wanted, model)
    return wanted if is_plain else chosen


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _is_called(name: str, model: PreTrainedModel) -> bool:
    """Returns whether PEFT may adapt a layer: the kernels of Mamba read some weights and do not call their layer."""
    try:
        _check_lora_target_modules_mamba(PeftLoraConfig(), model, _last(name))
    except ValueError:
        return False
    return True


def _count(kinds: list[str], model: PreTrainedModel) -> int:
    """Returns how many modules PEFT finds by the last parts of their names."""
    return sum(_last(name) in kinds for name, _ in model.named_modules())


def _names_of_experts(names: list[str], model: PreTrainedModel) -> set[str]:
    """Returns the last parts of names that PEFT takes for experts that were linear layers once.

    It adapts the tensor of all experts then, without dropout or DoRA, and also when it loads the adapter (peft 0.21).
    """
    taken = set()
    for name in {_last(name) for name in names}:
        config = PeftLoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # one of several that are joined in the experts' tensor
            taken.add(name)
        if name not in config.target_modules:
            taken.add(name)
    return taken


def _matches(pattern: str, names: list[str]) -> list[str]:
    plain = [name for name in names if name == pattern or name.endswith(f".{pattern}")]
    if plain:
        return plain
    try:
        return [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ConfigError(f"lora.target_modules: {pattern!r} is no regular expression: {error}") from error


def count_parameters(model: torch.nn.Module) -> ParameterCount:
    """Counts trainable and all parameters; shared matrices count once."""
    by_dtype: Counter[str] = Counter()
    trainable = total = base = 0
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            count, dtype = state.shape.numel(), state.quant_type
        else:
            count, dtype = parameter.numel(), str(parameter.dtype).removeprefix("torch.")
        total += count
        if "lora_" not in name:
            base += count
            by_dtype[dtype] += count
        trainable += count if parameter.requires_grad else 0
    return ParameterCount(trainable, total, base, dict(by_dtype))


def save_initial_adapter(model: PeftModel, folder: Path) -> None:
    """Saves the drawn weights of an init that rewrites the base, so that the final adapter can be converted."""
    if not folder.exists():
        config = model.peft_config["default"]
        kept, config.init_lora_weights = config.init_lora_weights, True
        write_folder(folder, model.save_pretrained)
        config.init_lora_weights = kept


def save_adapter(
    model: PeftModel,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    initial: Path | None = None,
    base: Base | None = None,
) -> None:
    """Saves the adapter for plain PEFT on the unchanged base, with its tokenizer, and checks what was written.

    `initial` (PiSSA, OLoRA) is the folder of the drawn weights; the saved adapter is the difference, of rank 2r.
    `base` is written beside the adapter, which is then used on that base alone.
    """

    def write(partial: Path) -> None:
        # PEFT would add whole embeddings that grew; the trained rows are saved anyway.
        model.save_pretrained(partial, save_embedding_layers=False)
        save_tokenizer(tokenizer, partial)
        if base is not None:
            write_base(base, partial)
        verify_adapter(partial, model)
        if initial is not None:
            _subtract_initial(partial, initial)
        _check_trained(partial)

    write_folder(folder, write)


def _subtract_initial(folder: Path, initial: Path) -> None:
    """Makes a saved adapter one for the unchanged base: B A - B0 A0 as one product of rank 2r.

    PEFT's own conversion leaves out all but A and B: trained biases, rows of new tokens, DoRA's magnitudes.
    """
    with _open_adapter(folder) as trained, _open_adapter(initial) as start:
        tensors = {name: trained.get_tensor(name) for name in trained.keys()}  # noqa: SIM118 - no mapping
        for name, tensor in tensors.items():
            if ".lora_A." in name:
                tensors[name] = torch.cat([tensor, start.get_tensor(name)], dim=0)
            elif ".lora_B." in name:
                tensors[name] = torch.cat([tensor, -start.get_tensor(name)], dim=1)
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    path = folder / ADAPTER_CONFIG
    settings = json.loads(path.read_text(encoding="utf-8"))
    scale = math.sqrt(2) if settings["use_rslora"] else 2  # what is divided by r, or by its root, stays the same
    settings |= {"r": 2 * settings["r"], "lora_alpha": scale * settings["lora_alpha"], "init_lora_weights": True}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def verify_adapter(folder: Path, model: torch.nn.Module) -> None:
    """Raises `ConfigError` unless a saved adapter holds every tensor of the live one, to the bit.

    A model without an adapter passes.
    """
    if not isinstance(model, PeftModel):
        return
    try:
        fault = _find_fault(folder, get_peft_model_state_dict(model, save_embedding_layers=False))
    except (OSError, SafetensorError) as error:
        fault = str(error)
    if fault is not None:
        raise ConfigError(
            f"{folder}: the adapter was not saved as it is in memory ({fault}); check the disk, and run the same "
            "command again to go on"
        )


def _find_fault(folder: Path, live: dict[str, torch.Tensor]) -> str | None:
    with _open_adapter(folder) as file:
        saved = set(file.keys())
        for name, tensor in live.items():
            if name not in saved:
                return f"{name} is missing"
            if not _is_same(file.get_tensor(name), tensor.detach()):
                return f"{name} has other values"
    return None


def _is_same(stored: torch.Tensor, live: torch.Tensor) -> bool:
    """Returns whether two tensors are equal to the bit, compared where the live one is."""
    first, second = (each.contiguous().view(-1).view(torch.uint8) for each in (stored.to(live.device), live))
    return (stored.shape, stored.dtype) == (live.shape, live.dtype) and torch.equal(first, second)


def _check_trained(folder: Path) -> None:
    """Raises `ConfigError` if all B matrices of a saved adapter are zero, as they are before the first step."""
    with _open_adapter(folder) as file:
        keys = [key for key in file.keys() if ".lora_B." in key]  # noqa: SIM118 - no mapping
        if keys and not any(file.get_tensor(key).any() for key in keys):
            raise ConfigError(
                f"{folder}: all {len(keys)} B matrices of the adapter are zero: nothing was trained; raise "
                "trainer.learning_rate or trainer.max_steps"
            )


def _open_adapter(folder: Path) -> Any:
    return safe_open(folder / ADAPTER_WEIGHTS, framework="pt")


def load_adapter(model: PreTrainedModel, folder: Path, base_name: str) -> PeftModel:
    """Loads a saved adapter onto its base; raises `ConfigError` for one of another base and for one with gaps."""
    settings = check_adapter_folder(folder)
    recorded = settings.get("base_model_name_or_path")
    _check_new_tokens(model, folder)
    unfit = (
        f"adapter={folder} does not fit model.name={base_name}: it was trained on {recorded}; give that base as "
        "model.name"
    )
    if (difference := _find_difference(model, folder)) is not None:
        raise ConfigError(f"{unfit} ({difference})")
    biases = _copy_biases(model) if settings.get("bias", "none") != "none" else None
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise ConfigError(f"{unfit} ({type(error).__name__}: {brief_text(str(error))})") from error
    with _open_adapter(folder) as file:
        saved = set(file.keys())
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if missing := [name for name in expected if name not in saved and EXPERTS not in name]:
        raise ConfigError(
            f"adapter={folder} is incomplete: {len(missing)} of the {len(expected)} tensors that its {ADAPTER_CONFIG} "
            f"means on this base are missing, first {missing[0]}; copy the adapter again, or give the base it was "
            f"trained on ({recorded}) as model.name"
        )
    if biases is not None:
        _keep_biases(adapted, biases)
    return adapted


def _find_difference(model: PreTrainedModel, folder: Path) -> str | None:
    """Says in words which tensor of an adapter is the first that the base has no place for; None: all fit."""
    modules = dict(model.named_modules())
    with _open_adapter(folder) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    for name, shape in shapes.items():
        found = LINEAR_PART.fullmatch(name)
        if found is None or EXPERTS in name:  # PEFT itself renames the experts of older adapters
            continue
        layer = modules.get(found[1])
        if layer is None:
            return f"its {name} belongs to a layer that this base does not have"
        needed = _needed_shape(layer, found[2], shape)
        if needed != shape:
            return f"its {name} is {_by(shape)}, and this base needs {_by(needed)}"
    return None


def _needed_shape(layer: torch.nn.Module, part: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape that a part of a linear layer's adapter must have, of the rank that it has."""
    if isinstance(layer, Conv1D):
        inputs, outputs = layer.weight.shape
    elif hasattr(layer, "in_features"):
        inputs, outputs = layer.in_features, layer.out_features
    else:
        return shape
    return {"A.weight": (shape[0], inputs), "B.weight": (outputs, shape[-1])}.get(part, (outputs,))


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _check_new_tokens(model: PreTrainedModel, folder: Path) -> None:
    """Raises `ConfigError` if an adapter trained rows of new tokens that this base does not have."""
    trained = read_object(folder / ADAPTER_CONFIG, f"adapter={folder}").get("trainable_token_indices") or {}
    lists = trained.values() if isinstance(trained, dict) else [trained]
    last, rows = max((max(ids, default=-1) for ids in lists), default=-1), model.get_input_embeddings().weight.shape[0]
    if last >= rows:
        raise ConfigError(
            f"adapter={folder} trained the embedding of token {last}, but the base has {rows} tokens; set "
            "model.new_tokens as its training did (config.yaml of the run)"
        )


def check_adapter_folder(folder: Path) -> dict[str, Any]:
    """Returns what `adapter_config.json` says; raises `ConfigError` unless `folder` holds a whole adapter."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise ConfigError(f"adapter={folder}: no {ADAPTER_CONFIG} there; give an adapter's or a finished run's folder")
    settings = read_object(path, f"adapter={folder}")
    if settings.get("megatron_config"):  # PEFT imports the module that stands beside it
        raise ConfigError(
            f"adapter={folder}: {ADAPTER_CONFIG} is that of an adapter for Megatron (megatron_config), which names a "
            "module to import; give an adapter for transformers"
        )
    with library_reads(f"adapter={folder}", ADAPTER_CONFIG):
        PeftConfig.from_pretrained(str(folder))
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise ConfigError(f"adapter={folder}: {ADAPTER_WEIGHTS} is missing; copy the adapter again")
    check_safetensors(weights, "adapter")
    return settings
