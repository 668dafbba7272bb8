"""Each part of the plan against real modules: what bitsandbytes, PEFT, the optimizers and autograd really hold."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from real_models import CPU, KINDS, adapted, base, peak_bytes, saved_bytes, setup, shape

import qlora.step.kernels.dequantize
from qlora.config.compose import compose
from qlora.config.registries.optimizers import OPTIMIZERS, Optimizer
from qlora.planning import activations
from qlora.planning.adapter_targets import find_targets
from qlora.planning.memory_plan import Ledger
from qlora.planning.setup import Setup
from qlora.quantization.method import find_method
from qlora.training.arguments import build_arguments
from qlora.training.optimizers import optimizer_class

BF16 = compose(["quantization=none"]).quantization
BF16_BASE = find_method(BF16).stored_base(BF16)
CHOICES = [f"quantization={name}" for name in ("nf4", "nf4-plain", "fp4", "int8", "none")]


def stored_bytes(layer: torch.nn.Module) -> int:
    """What a linear layer's matrix takes with all that belongs to it."""
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    tensors = [weight.data]
    if state is not None:
        tensors += [state.absmax, state.code]
        if state.nested:
            tensors += [state.offset, state.state2.absmax, state.state2.code]
    if getattr(weight, "SCB", None) is not None:
        tensors.append(weight.SCB)
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.matrix(3)
@pytest.mark.parametrize("chosen", CHOICES)
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "phi3"])
def test_each_matrix_takes_what_is_planned(kind: str, chosen: str) -> None:
    model, sizes = base(kind, chosen), shape(kind)
    layers = dict(model.named_modules())
    quantization = compose([chosen]).quantization
    stored_base = find_method(quantization).stored_base(quantization)
    for layer in range(sizes.layers):
        for name, linear in sizes.full_names(layer).items():
            assert stored_base.matrix_bytes(linear.outputs, linear.inputs) == stored_bytes(layers[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_quantized_is_counted_to_the_parameter(kind: str) -> None:
    model, sizes = base(kind, "quantization=none"), shape(kind)
    assert sizes.parameters == sum(parameter.numel() for parameter in model.parameters())
    packed = base(kind, "quantization=nf4")
    plain = [parameter for parameter in packed.parameters() if parameter.dtype is torch.bfloat16]
    ledger = Ledger(sizes, setup(sizes))
    assert ledger.unquantized == sum(parameter.nbytes for parameter in plain)


@pytest.mark.matrix(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overrides", [[], ["lora=dora"], ["lora=attention"], ["lora.dtype=bf16"]], ids=str)
def test_adapters_and_gradients_are_peft_s(kind: str, overrides: list[str]) -> None:
    if overrides == ["lora=attention"] and kind in ("phi3", "gpt_neox"):
        pytest.skip("one matrix makes queries, keys and values")
    model, sizes = adapted(kind, *overrides), shape(kind)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    requested = compose([*overrides]).lora.target_modules
    chosen = {"dora": "lora=dora" in overrides, "bf16_adapters": "lora.dtype=bf16" in overrides}
    ledger = Ledger(sizes, setup(sizes, targets=find_targets(sizes, requested), **chosen))
    assert ledger.adapters == ledger.gradients == sum(parameter.nbytes for parameter in trained)
    assert sorted(ledger.trained.elements()) == sorted(parameter.numel() for parameter in trained)


@pytest.mark.parametrize("optim", [name for name in OPTIMIZERS if name != "lorafa"])  # which has a test of its own
def test_states_are_the_optimizer_s(optim: str) -> None:
    kind = OPTIMIZERS[optim]
    if kind.needs_cuda and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if kind.module is not None:
        pytest.importorskip(kind.module)
    wider = {"hidden_size": 128, "intermediate_size": 2048, "num_hidden_layers": 1}
    for given in given_to(kind):
        if kind.trains_all_weights:
            model: torch.nn.Module = copy.deepcopy(base("llama", "quantization=none", **wider)).requires_grad_(True)
            chosen = {"r": 0, "base": BF16_BASE}
        else:
            model, chosen = adapted("llama", "lora.r=64", **wider), {"r": 64}
        compare_states(optim, given, model, Ledger(shape("llama", **wider), planned_setup(optim, given, **chosen)))


def given_to(kind: Optimizer) -> list[dict[str, Any]]:
    """Returns arguments that change what an optimizer keeps."""
    if "proj_type" in kind.arguments:
        return [{"rank": 8, "proj_type": name} for name in kind.arguments["proj_type"]]
    if kind.trains_all_weights:
        return [{"rank": 1}, {"rank": 100}]
    return [{}, *({name: value} for name, value in (("momentum", 0.9), ("centered", True)) if name in kind.arguments)]


def planned_setup(optim: str, given: dict[str, Any], **chosen: Any) -> Setup:
    wider = {"hidden_size": 128, "intermediate_size": 2048, "num_hidden_layers": 1}
    return setup(shape("llama", **wider), optim=optim, optim_args=given, **chosen)


def compare_states(optim: str, given: dict[str, Any], model: torch.nn.Module, ledger: Ledger) -> None:
    config = compose(["recipe=none", "lora=none", "quantization=none", f"trainer.optim={optim}"]).trainer
    config.optim_args = given
    arguments = build_arguments(config, output_dir=Path("unused"), device=CPU, compute=torch.float32, seed=0)
    kind, options = optimizer_class(arguments, model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = kind([{"params": trained}], **options)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    kept = {tensor.data_ptr(): tensor.nbytes for state in optimizer.state.values() for tensor in tensors_of(state)}
    fixed, paged = ledger.optimizer
    assert fixed + paged == sum(kept.values())
    assert any(parameter.numel() >= 100_000 for parameter in trained)
    assert bool(paged) == optim.startswith("paged")


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors of a state without single numbers and the codebooks that all states of bitsandbytes share."""
    if isinstance(value, torch.Tensor):
        inner = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else None
        if inner is not None:
            for name in inner:
                yield getattr(value, name)
        elif value.dim():
            yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            if not str(name).startswith("qmap"):
                yield from tensors_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from tensors_of(item)
    elif hasattr(value, "ortho_matrix"):
        yield from tensors_of(value.ortho_matrix)


def per_layer(kind: str, overrides: list[str], monkeypatch: pytest.MonkeyPatch, length: int) -> int:
    """Bytes that one more layer keeps."""
    three, two = (adapted(kind, *overrides, num_hidden_layers=count) for count in (3, 2))
    return saved_bytes(three, monkeypatch, 1, length) - saved_bytes(two, monkeypatch, 1, length)


@pytest.mark.matrix(6)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        ([], {}),
        (["lora.dropout=0.1"], {"dropout": True}),
        (["quantization=none"], {"base": BF16_BASE}),
        (["quantization=none", "lora.dropout=0.1"], {"base": BF16_BASE, "dropout": True}),
    ],
    ids=["nf4", "dropout", "bf16", "bf16 with dropout"],
)
def test_a_layer_keeps_what_is_planned(
    kind: str, overrides: list[str], changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, length = shape(kind), 128
    ledger = Ledger(sizes, setup(sizes, length=length, **changes))
    names = ledger.setup.targets[0]
    measured = per_layer(kind, overrides, monkeypatch, length)
    planned = ledger.activations.saved(0, names) + ledger.activations.copies(0, names)
    assert planned == pytest.approx(measured, rel=0.005)


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    ("rows", "length", "passes", "checkpoint", "dropout", "vocabulary"),
    [  # all pairs of values of two parameters
        (1, 512, 1, False, 0, 96),
        (1, 512, 1, True, 0.1, 4000),
        (1, 512, 2, False, 0.1, 4000),
        (1, 512, 2, True, 0, 96),
        (4, 256, 1, False, 0, 4000),
        (4, 256, 1, True, 0.1, 96),
        (4, 256, 2, False, 0.1, 96),
        (4, 256, 2, True, 0, 4000),
    ],
)
def test_the_most_that_a_step_holds_at_once_is_planned(
    rows: int, length: int, passes: int, checkpoint: bool, dropout: float, vocabulary: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    wider = {"hidden_size": 128, "intermediate_size": 352, "vocab_size": vocabulary, "num_hidden_layers": 4}
    model, sizes = adapted("llama", f"lora.dropout={dropout}", **wider), shape("llama", **wider)
    chosen = setup(
        sizes, rows=rows, length=length, dropout=dropout > 0, accumulates=passes > 1,
        checkpointed=sizes.layers if checkpoint else 0,
    )  # fmt: skip
    ledger = Ledger(sizes, chosen)
    step = ("gradients", "adapters in 16 bits", "activations", "logits", "backward pass of a layer")
    planned = max(sum(parts.get(name, 0) for name in step) for _, parts in ledger.moments())
    measured = peak_bytes(model, monkeypatch, rows, length, checkpoint=checkpoint, passes=passes)
    assert planned == pytest.approx(measured, rel=0.03)


def test_the_sizes_of_chunks_are_those_of_the_kernels() -> None:
    """The plan does not import torch, so they stand in both."""
    assert activations.DECODED_CHUNK == qlora.step.kernels.dequantize.CHUNK_BYTES
