"""The fast step gives the loss and the gradients of the plain model, and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from qlora.adapters import add_lora
from qlora.config.compose import compose
from qlora.errors import UserError
from qlora.objectives import build_objective
from qlora.quantization.bnb4.layers import set_compute_dtype
from qlora.runtime.device import Placement
from qlora.step.fast_step import FastStep
from qlora.step.kernels import fused_linear
from qlora.step.offload import Offloading
from qlora.step.parts.attention import attend_packed, attend_padded
from qlora.step.parts.fused_linear import FastLinear, LinearGroup
from qlora.training import memory_budget
from qlora.upstream.bitsandbytes import disable_repacking

CPU = Placement(torch.device("cpu"), torch.float32, torch.float32)
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 120,
    "pad_token_id": 0,
    "head_dim": 64,
}
ON = ["trainer.fused_linear=true", "trainer.fused_loss=true"]


def build(model_type: str = "llama", overrides: tuple[str, ...] = (), **changes: Any) -> tuple[PeftModel, Any]:
    """Returns a model of random 4-bit weights with an adapter whose B matrices are not zero, and its config."""
    config = compose(["quantization=nf4", "lora.r=4", "lora.dropout=0", "trainer.compile=false", *ON, *overrides])
    torch.manual_seed(0)
    shape = {key: value for key, value in (SHAPE | changes).items() if value is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape))
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings():
            made = Linear4bit(
                layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=torch.float32,
                quant_type="nf4", compress_statistics=True,
            )  # fmt: skip
            made.load_state_dict(layer.state_dict())
            parent, _, fused = name.rpartition(".")
            setattr(model.get_submodule(parent), fused, made.to("cpu"))
            quantized = made.weight if made.weight.bnb_quantized else made.weight._quantize(torch.device("cpu"))
            made.weight = quantized
    disable_repacking(model)
    model.requires_grad_(False)
    model.quantization_method, model.is_loaded_in_4bit = BitsAndBytesConfig(load_in_4bit=True).quant_method, True
    model.config.use_cache = False
    adapted = add_lora(config.lora, model, tensors=dict, new_token_ids=[], batches=[])
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 10
    return adapted.train(), config


def build_step(model: PeftModel, config: Any, placement: Placement = CPU) -> FastStep:
    return FastStep(model, config.trainer, config.quantization, placement, None, build_objective(config.loss))


def batch(*, packed: bool = False, seed: int = 2) -> dict[str, torch.Tensor]:
    """Returns two rows, the second one with padding or both with two segments."""
    ids = torch.randint(3, 120, (2, 24), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :5] = -100
    if packed:
        positions = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, 24)
        labels[:, 10] = -100
        return {"input_ids": ids, "labels": labels, "position_ids": positions}
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    labels[1, 17:] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def learn(model: PeftModel, rows: dict[str, torch.Tensor], **more: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**rows, **more).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: PeftModel, config: Any, rows: dict[str, torch.Tensor], checkpointed: int = 0) -> FastStep:
    loss_before, _ = learn(model.eval(), rows)
    expected, gradients = learn(model.train(), rows, num_items_in_batch=31)
    step = build_step(model, config)
    step.checkpointed = checkpointed
    with step:
        actual, fused = learn(model, rows, num_items_in_batch=31)
    assert actual == pytest.approx(expected, rel=1e-5)
    assert fused.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (fused[name] - gradient).norm() < 1e-5 * gradient.norm(), name
    assert learn(model.eval(), rows)[0] == loss_before
    return step


OWN = {
    "qwen2": {"head_dim": None},
    "gpt_neox": {"head_dim": None, "num_key_value_heads": None},
    "mistral": {"sliding_window": 8},
}


@pytest.mark.matrix(3)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packs"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "gemma", "phi3", "gpt_neox"])
def test_architectures_learn_the_same(model_type: str, packed: bool) -> None:
    model, config = build(model_type, **OWN.get(model_type, {}))
    assert_same(model, config, batch(packed=packed))


@pytest.mark.parametrize("checkpointed", [1, 3])
def test_checkpointed_layers_learn_the_same(checkpointed: int) -> None:
    model, config = build()
    assert_same(model, config, batch(), checkpointed)


@pytest.mark.full
@pytest.mark.parametrize("compiled", ["true", "false"])
@pytest.mark.parametrize(("model_type", "times"), [("llama", 2), ("gemma2", 3)])
def test_the_matmul_that_ends_a_layer_is_not_computed_again_where_no_norm_reads_it(
    model_type: str, times: int, compiled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = build(model_type, (f"trainer.compile={compiled}", "trainer.fused_loss=auto"))
    step = build_step(model, config)
    with step:
        _, expected = learn(model, batch(), num_items_in_batch=31)
    last = step.layers[0].mlp.down_proj.group.tensors[0].data_ptr()
    decoded, decode = [], fused_linear.dequantize

    def count(codes: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        decoded.append(codes.packed.data_ptr())
        return decode(codes, *args, **kwargs)

    monkeypatch.setattr(fused_linear, "dequantize", count)
    step.checkpointed = 3
    with step:
        _, actual = learn(model, batch(), num_items_in_batch=31)
    assert decoded.count(last) == times  # forward, backward, and in between
    assert all((actual[name] - gradient).norm() <= 1e-5 * gradient.norm() for name, gradient in expected.items())


@pytest.mark.full
@pytest.mark.parametrize("compiled", ["true", "false"])
def test_offloaded_inputs_change_no_bit(compiled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = build(overrides=("lora.dropout=0.5", f"trainer.compile={compiled}"))
    step = build_step(model, config)
    step.checkpointed = 2
    copied: list[torch.Tensor] = []
    store = Offloading.store
    monkeypatch.setattr(Offloading, "store", lambda self, tensor: copied.append(tensor) or store(self, tensor))
    actual = []
    for step.offloaded in (0, 2):
        torch.manual_seed(4)
        with step:
            actual.append(learn(model, batch(), num_items_in_batch=31))
    (loss, gradients), (other, others) = actual
    assert loss == other
    assert all(torch.equal(others[name], gradients[name]) for name in gradients)
    assert [tensor.shape for tensor in copied] == [(2, 24, 256)] * 2


@pytest.mark.full
def test_compiled_layers_keep_no_masks_of_dropout() -> None:
    kept: dict[float, int] = {}
    sizes: list[int] = []
    rows = {name: tensor.repeat(4, 1) for name, tensor in batch().items()}
    for rate in (0.0, 0.1):
        model, config = build(overrides=(f"lora.dropout={rate}", "trainer.compile=true"))
        torch._dynamo.reset()
        step = build_step(model, config)
        sizes.clear()
        with step, saved_tensors_hooks(lambda tensor: sizes.append(tensor.nbytes) or tensor, lambda tensor: tensor):
            loss = model(**rows, num_items_in_batch=31).loss
        kept[rate] = sum(sizes)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert kept[0.1] <= kept[0.0] + 3 * 4 * 8  # two numbers for each group of layers


@pytest.mark.matrix(1)
@pytest.mark.parametrize("compute", ["native", "fp8"])
def test_compiled_layers_keep_each_output_apart(compute: str) -> None:
    chosen = ("trainer.compile=true", "quantization.compute_dtype=bf16", f"quantization.compute={compute}")
    model, config = build(overrides=chosen, num_key_value_heads=4)
    model.to(torch.bfloat16)
    placement = Placement(torch.device("cpu"), torch.bfloat16, torch.bfloat16)
    set_compute_dtype(model, torch.bfloat16)
    rows = {name: tensor.repeat(4, 1) for name, tensor in batch().items()}
    kept: list[tuple[int, int]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype is torch.bfloat16 and tensor.numel() >= rows["input_ids"].numel() * 256:
            kept.append((tensor.nbytes, tensor.untyped_storage().nbytes()))
        return tensor

    torch._dynamo.reset()
    step = build_step(model, config, placement)
    with step, placement.autocast():
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**rows, num_items_in_batch=31).loss
        loss.backward()
    assert loss.isfinite()
    assert len(kept) >= 2 * 8  # of two layers two residuals, queries, keys, values, what was attended, gate and up
    assert all(fused == whole for fused, whole in kept)


@pytest.mark.full
def test_compiled_layers_learn_the_same_with_one_code_for_all() -> None:
    model, config = build(overrides=("trainer.compile=true",))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = assert_same(model, config, batch(), checkpointed=1)
    assert str(step) == "fused_linear, fused_loss, compile; fused_attention: auto switches it on with CUDA only"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3  # layer, layer under checkpointing, loss


@pytest.mark.parametrize("compute", ["native", "fp8"])
def test_a_pass_without_gradients_is_compiled_whole(compute: str) -> None:
    logits = []
    for compiled in ("false", "true"):
        model, config = build(overrides=(f"trainer.compile={compiled}", f"quantization.compute={compute}"))
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        rows = {name: tensor for name, tensor in batch().items() if name != "labels"}
        step = build_step(model, config)
        with step, torch.no_grad():
            logits.append(step.base.model(use_cache=False, **rows).last_hidden_state)
        assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    bound = 1e-5 if compute == "native" else 0.1  # rounding to 8 bits moves them by 0.06
    assert (logits[1] - logits[0]).norm() < bound * logits[0].norm()


@pytest.mark.full
def test_layers_are_compiled_for_every_form_that_they_meet() -> None:
    model, config = build(overrides=("trainer.compile=true",))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        step = build_step(model, config)
        for copies in (1, 4):
            rows = {name: tensor.repeat(copies, 1) for name, tensor in batch().items()}
            with step:
                model(**rows, num_items_in_batch=31).loss.backward()


def test_layers_that_read_one_input_are_one_group() -> None:
    model, config = build()
    build_step(model, config)
    attention, mlp = (getattr(model.get_base_model().model.layers[0], name) for name in ("self_attn", "mlp"))
    assert attention.q_proj.group is attention.k_proj.group is attention.v_proj.group
    assert mlp.gate_proj.group is mlp.up_proj.group is not mlp.down_proj.group
    assert attention.o_proj.group.rows == [256]


@pytest.mark.full
@pytest.mark.parametrize("compiled", ["true", "false"])
def test_a_model_is_what_it_was_after_a_step(compiled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = build(overrides=("lora.dropout=0.5", f"trainer.compile={compiled}"))
    base, weights = model.get_base_model(), {name: weight.clone() for name, weight in model.state_dict().items()}
    kinds, calls = [type(module) for module in model.modules()], []
    step = build_step(model, config)
    step.checkpointed = 1
    with step:
        learn(model, batch())
        assert sum(isinstance(module, FastLinear) for module in model.modules()) == 7 * 3
    monkeypatch.setattr(LinearGroup, "compute", lambda self, x: calls.append(x))
    assert [type(module) for module in model.modules()] == kinds
    assert model.train()(**batch()).logits is not None
    assert not calls
    assert "forward" not in base.__dict__
    assert all(layer._compiled_call_impl is None for layer in base.model.layers)
    assert base.config._attn_implementation == "sdpa"
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    layer = base.model.layers[0].self_attn.q_proj
    added = {"group", "slot"}  # as documented, with the storage that the weights of a group share
    assert (
        layer.__dict__.keys()
        - build(overrides=())[0].get_submodule("base_model.model.model.layers.0.self_attn.q_proj").__dict__.keys()
        == added
    )


def test_a_step_finds_weights_that_were_moved_in_memory() -> None:
    model, config = build()
    step = build_step(model, config)
    with step:
        expected = learn(model, batch())
    packed = [layer.weight.data_ptr() for layer in model.modules() if isinstance(layer, Linear4bit)]
    move_apart(model)
    assert packed != [layer.weight.data_ptr() for layer in model.modules() if isinstance(layer, Linear4bit)]
    with step:
        actual = learn(model, batch())
    assert actual[0] == expected[0]
    assert all(torch.equal(grad, expected[1][name]) for name, grad in actual[1].items())


def move_apart(model: torch.nn.Module) -> None:
    """Closes gaps, while what would fit into them is taken."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_budget, "SMALL", 2**10)
        taken, resize = [], torch.UntypedStorage.resize_

        def elsewhere(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            if size:
                taken.append(torch.empty(size, dtype=torch.uint8))
            return resize(storage, size)

        patch.setattr(torch.UntypedStorage, "resize_", elsewhere)
        memory_budget.close_gaps(model, torch.device("cpu"))


def test_each_part_can_be_switched_off() -> None:
    off = [f"trainer.{name}=false" for name in ("compile", "fused_linear", "fused_attention", "fused_loss")]
    model, config = build(overrides=tuple(off))
    step = build_step(model, config)
    assert step.parts == {text[8:-6]: text for text in off}
    assert not any(isinstance(module, FastLinear) for module in model.modules())


def test_auto_switches_nothing_on_without_cuda() -> None:
    auto = [f"trainer.{name}=auto" for name in ("compile", "fused_linear", "fused_attention", "fused_loss")]
    model, config = build(overrides=tuple(auto))
    assert "on" not in build_step(model, config).parts.values()


@pytest.mark.parametrize(
    ("overrides", "changes", "message"),
    [
        (
            ["trainer.fused_attention=true", "trainer.neftune_noise_alpha=5"],
            {},
            r"trainer\.fused_attention=true: trainer.neftune_noise_alpha scales .*; set trainer.fused_attention=auto",
        ),
        (
            ["trainer.flash_attention=fa3"],
            {},
            r"flash_attention=fa3: trainer\.fused_attention is off \(.*; set",
        ),
        (["lora.use_dora=true"], {}, r"trainer\.fused_linear=true: the model has no 4-bit layers with plain adapters"),
        (
            ["trainer.fused_linear=false", "quantization.compute=fp8"],
            {},
            r"quantization\.compute=fp8 contradicts trainer\.fused_linear=false, whose layers compute it; leave one",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(overrides: list[str], changes: dict[str, Any], message: str) -> None:
    model, config = build(overrides=tuple(overrides), **changes)
    with pytest.raises(UserError, match=message):
        build_step(model, config)


def test_where_8_bits_cannot_be_had_a_sentence_says_so_and_the_step_computes_natively(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, config = build(overrides=("quantization.compute=fp8", "trainer.fused_linear=auto"))
    step = build_step(model, config)
    assert step.parts["fp8"] == "auto switches it on with CUDA only"
    assert "quantization.compute=fp8: auto switches it on with CUDA only; computing in torch.float32" in caplog.text


def test_a_model_that_drops_cu_seqlens_is_stopped() -> None:
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(NotImplementedError, match=r"Linear gets no cu_seqlens: set trainer\.fused_attention=false"):
        attend_packed(torch.nn.Linear(1, 1), q, q, q, None, scaling=1.0)
    with pytest.raises(NotImplementedError, match=r"attends with softcap: set trainer\.fused_attention=false"):
        attend_padded(torch.nn.Linear(1, 1), q, q, q, None, scaling=1.0, softcap=30.0)
    with pytest.raises(NotImplementedError, match="Linear attends with a mask of its own"):
        attend_padded(torch.nn.Linear(1, 1), q, q, q, torch.zeros(1, 1, 4, 4), scaling=1.0)


def test_the_fused_loss_computes_the_output_layer_in_the_precision_of_the_others() -> None:
    model, config = build(overrides=("trainer.fused_linear=false",))
    rows = batch()
    _, exact = learn(model, rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, plain = learn(model, rows)
        with build_step(model, config):
            loss, fused = learn(model, rows)
    assert loss == pytest.approx(expected, rel=1e-6)  # float32 in the output layer is 6e-6 away
    error, usual = (
        sum((gradients[name] - gradient).norm() / gradient.norm() for name, gradient in exact.items())
        for gradients in (fused, plain)
    )
    assert error < 1.1 * usual


def test_dropout_reaches_the_adapter_only_and_one_group_shares_its_mask() -> None:
    model, config = build(overrides=("lora.dropout=0.5",))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(1, 6, 256)
    with build_step(model, config):
        torch.manual_seed(3)
        output = layer(x)
    torch.manual_seed(3)
    kept = torch.nn.functional.dropout(x.view(-1, 256), 0.5)
    adapter = layer.scaling["default"] * kept @ layer.lora_A["default"].weight.t() @ layer.lora_B["default"].weight.t()
    expected = layer.get_base_layer()(x) + adapter
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert layer.group.pending is not None  # k and v are computed with q, under its mask


def test_a_step_that_fails_leaves_no_outputs_behind() -> None:
    model, config = build()
    step = build_step(model, config)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj

    def fail() -> None:
        with step:
            layer(torch.randn(1, 6, 256))
            assert layer.group.pending is not None
            raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        fail()
    assert layer.group.pending is None


def test_8_bit_matmuls_learn_nearly_the_same() -> None:
    model, config = build(overrides=("quantization.compute=fp8",))
    model.to(torch.bfloat16)
    expected, gradients = learn(model, batch(), num_items_in_batch=31)
    step = build_step(model, config)
    with step:
        actual, fused = learn(model, batch(), num_items_in_batch=31)
    assert actual == pytest.approx(expected, rel=0.02)
    flat, exact = (torch.cat([run[name].flatten() for name in gradients]) for run in (fused, gradients))
    assert torch.nn.functional.cosine_similarity(flat.float(), exact.float(), dim=0) > 0.97


def test_a_step_knows_how_large_the_adapters_have_become() -> None:
    model, config = build(overrides=("quantization.compute=fp8", "lora.alpha=12"))
    model.to(torch.bfloat16)
    step = build_step(model, config)
    with torch.no_grad():
        for layer in model.get_base_model().model.layers:
            layer.self_attn.k_proj.lora_A["default"].weight[1, 2] = -5.0
            layer.mlp.down_proj.lora_B["default"].weight[3, 0] = -7.0
    with step:
        learn(model, batch())
    groups = {module.group for module in model.modules() if isinstance(module, PeftLinear4bit)}
    assert len(groups) == 4 * len(step.layers)
    for group in groups:
        matrices = [(member.lora_A["default"].weight, member.lora_B["default"].weight) for member in group.members]
        amax = [max(float(kind.abs().max()) for kind in kinds) for kinds in zip(*matrices, strict=True)]
        assert group.scales.tolist() == pytest.approx([group.weight_scale.item(), amax[0], 3 * amax[1]])
    down = step.layers[0].mlp.down_proj.group
    assert down.scales[2] == 21
