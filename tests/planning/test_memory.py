"""Each part of the plan against real modules: what bitsandbytes, PEFT, the optimizers and autograd really hold."""

from __future__ import annotations

import pytest
import torch
from real_models import KINDS, adapted, base, peak_bytes, saved_bytes, setup, shape
from transformers import Trainer, TrainingArguments

import qlora.step.kernels.dequantize
from qlora.config.compose import compose
from qlora.planning import activations
from qlora.planning.adapter_targets import find_targets
from qlora.planning.memory_plan import Ledger
from qlora.planning.optimizer_states import OPTIMIZERS
from qlora.quantization.method import find_method

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


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_states_are_the_optimizer_s(optim: str) -> None:
    sizes = shape("llama", hidden_size=128, intermediate_size=2048, num_hidden_layers=1)
    model = adapted("llama", "lora.r=64", hidden_size=128, intermediate_size=2048, num_hidden_layers=1)
    arguments = TrainingArguments(output_dir="unused", optim=optim, use_cpu=True, report_to="none")
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = kind(trained, **options)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    seen = {}
    for state in optimizer.state.values():
        for name, tensor in state.items():
            if isinstance(tensor, torch.Tensor) and name != "step" and not name.startswith("qmap"):
                seen[tensor.data_ptr()] = tensor.nbytes
    ledger = Ledger(sizes, setup(sizes, r=64, optim=optim))
    fixed, paged = ledger.optimizer
    assert fixed + paged == sum(seen.values())
    large = [parameter for parameter in trained if parameter.numel() >= 100_000]
    assert large
    assert bool(paged) == optim.startswith("paged")


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
