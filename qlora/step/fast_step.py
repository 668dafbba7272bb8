"""The fast training step: what replaces transformers' and PEFT's own forward pass while a step runs, and only then.

Four parts, each switched by a key of `trainer`:

- `fused_linear`: 4-bit linear layers with their adapters as one operation, those that read one input together;
- `fused_attention`: rows laid one behind the other, attention inside each (`torch.nn.attention.varlen`);
- `fused_loss`: the cross entropy without the logits of all tokens;
- `compile`: the decoder layers compiled one by one, all with the same code.

Evaluation, generation and saving see the unchanged model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import AttentionInterface

from qlora.config.schema import BaseProducts, FlashAttention, QuantizationConfig, TrainerConfig
from qlora.errors import ConfigError
from qlora.quantization.bnb4.quantized_weight import (
    E4M3_MAX,
    QuantizedWeight,
    can_join,
    decode_absmax,
    join,
    read_quantized_weight,
)
from qlora.runtime.device import Placement
from qlora.step.kernels.attention import (
    NEWER_FLASH,
    attend_batch,
    attend_rows,
    fastest_attention,
    find_flash_fault,
    has_varlen,
)
from qlora.step.kernels.dropout import keep_mask
from qlora.step.kernels.fused_linear import FACTOR, LARGEST_A, LARGEST_B, GroupedLinear, unread
from qlora.step.kernels.linear_cross_entropy import IGNORED, entropy_and_gradient, linear_cross_entropy
from qlora.step.offload import Offloading

log = logging.getLogger(__name__)

BATCH, ROWS = "qlora_batch", "qlora_rows"
"""The names under which transformers finds the attention over batches, and that inside rows laid out."""

SPREAD = "the model is spread over several devices (model.device_map)"

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children of one module that read the same tensor."""

OTHER_ATTENTION = ("attn_logit_softcapping", "attention_chunk_size", "attention_dropout", "alibi")
"""Settings of architectures whose attention is more than that of scaled products."""

OTHER_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Settings of architectures whose logits are more than a product with the output matrix."""


KEEP_LITTLE = {
    "ban_recompute_materialized_backward": False,
    "ban_recompute_used_far_apart": False,
    "ban_recompute_long_fusible_chains": False,
}
"""What element-wise operations give again, dropout's masks too, compiled layers do not keep for the backward pass."""


@dataclass(frozen=True)
class Packs:
    """What packs hold at most, so that shapes stay the same from step to step."""

    width: int
    """Tokens of a pack, padding counted in."""
    rows: int
    """Most rows in a pack."""
    longest: int
    """Most tokens of a row."""

    @property
    def borders(self) -> int:
        """Most rows in a pack when its padding is cut into rows that are no longer than any."""
        return self.rows + -(-self.width // self.longest)


class Group:
    """Linear layers that read one input; whichever is called first computes the outputs of all."""

    def __init__(self, members: list[Linear4bit], *, fp8: bool) -> None:
        self.members, self.layers = members, [member.get_base_layer() for member in members]
        weights = [layer.weight for layer in self.layers]
        self.rows = [weight.quant_state.shape[0] for weight in weights]
        codes = join(weights)
        self.columns = codes.columns
        self._packed, *self._constants = codes.tensors()
        self._is_sharded = isinstance(weights[0], DTensor)
        self.factor = _fp8_factor(codes) if fp8 else None
        self.ranges: Tensor | None = None
        """As of `GroupedLinear`, with a `factor`; `AmaxTracker` fills them in."""
        self.pending: tuple[Tensor, list[Tensor]] | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of the layers' `QuantizedWeight`: of sharded ones the whole weights as they are now."""
        packed = [layer.weight for layer in self.layers] if self._is_sharded else [self._packed]
        return [*packed, *self._constants]

    @contextlib.contextmanager
    def unread(self) -> Iterator[None]:
        """Inside, nobody reads the outputs; sharded weights must be together where it begins."""
        with unread(self.tensors[0]):
            yield

    def output(self, slot: int, x: Tensor) -> Tensor:
        """Returns the output of a member for its input `x` [..., columns]."""
        if self.pending is None or self.pending[0] is not x:
            self.pending = (x, self.compute(x))
        found = self.pending[1][slot]
        if slot == len(self.members) - 1:
            self.pending = None
        return found

    def compute(self, x: Tensor) -> list[Tensor]:
        """Returns the outputs of all members, each [..., rows]."""
        first = self.members[0]
        # 8-bit products come in bf16, also where a CPU computes all else in float32.
        dtype = x.dtype if self.factor is None else torch.bfloat16
        flat = x.reshape(-1, self.columns).to(dtype)
        a = torch.cat([member.lora_A["default"].weight for member in self.members]).to(dtype)
        b = [(member.lora_B["default"].weight * member.scaling["default"]).to(dtype) for member in self.members]
        dropped = _drop(flat, first.lora_dropout["default"])
        found = GroupedLinear.apply(flat, dropped, a, self.ranges, self.rows, *b, *self.tensors)
        outputs = []
        for member, part in zip(self.members, found, strict=True):
            bias = member.get_base_layer().bias
            part = part if bias is None else part + bias.to(part.dtype)
            outputs.append(part.view(*x.shape[:-1], -1).to(x.dtype))
        return outputs


class AmaxTracker:
    """How large the numbers of adapters are, all of them measured at once where each step begins.

    Measured by each layer, that would be a seventh of all kernels of a step, which take hardly longer than their start.
    """

    def __init__(self, groups: list[Group]) -> None:
        """Takes groups with a `factor`, on one device."""
        most = max(len(group.members) for group in groups)
        # Four numbers for three, so that each group's begin where compiled code can read 16 bytes at a time.
        assert groups[0].factor is not None
        self.values = groups[0].factor.new_zeros(len(groups), 4)
        self.matrices: list[Tensor] = []
        scales, places = [], []
        for values, group in zip(self.values, groups, strict=True):
            assert group.factor is not None
            values[FACTOR] = group.factor
            group.ranges = values[:3]
            first = len(self.matrices)
            for member in group.members:
                self.matrices += [member.lora_A["default"].weight, member.lora_B["default"].weight]
                scales += [1.0, abs(member.scaling["default"])]
            last = len(self.matrices) - 2
            places.append([[min(first + 2 * slot, last) + kind for slot in range(most)] for kind in (0, 1)])
        self.scales = self.values.new_tensor(scales)
        self.places = torch.tensor(places, device=self.values.device)
        """Which matrices are a group's of each kind, [groups, 2, most members]; the last one fills up."""

    @torch.no_grad()
    def measure(self) -> None:
        """Measures the matrices as they are now."""
        found = torch.stack(torch._foreach_norm(self.matrices, torch.inf)).float() * self.scales
        self.values[:, LARGEST_A.start : LARGEST_B.stop] = found[self.places].amax(2)


def _drop(x: Tensor, dropout: torch.nn.Module) -> Tensor | None:
    """Returns `x` after an adapter's dropout, None where it has none.

    Compiled code drops by a mask that the backward pass computes again.
    """
    rate = getattr(dropout, "p", 0.0)
    if rate == 0:
        return None
    if torch.compiler.is_compiling():
        return torch.where(keep_mask(x, rate), x / (1 - rate), 0)
    dropped: Tensor = dropout(x)
    return dropped


class FastLinear(Linear4bit):
    """PEFT's 4-bit linear layer, computing with its group while it trains."""

    group: Group
    slot: int

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the layer's output; in evaluation, PEFT's own."""
        if not self.training:
            return super().forward(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return self.group.output(self.slot, x)


def _fp8_factor(codes: QuantizedWeight) -> Tensor:
    """Returns what the weights of a group are multiplied with to fill the range of e4m3: float32 [1]."""
    largest = decode_absmax(codes).abs().amax() * codes.codebook.abs().amax()
    return (E4M3_MAX / largest.clamp(min=1e-12)).view(1)


def _fits(module: torch.nn.Module) -> bool:
    """Returns whether `FastLinear` can compute a layer: in 4 bits, with one plain adapter."""
    if type(module) is not Linear4bit or list(module.lora_A) != ["default"] or module.lora_variant:
        return False
    return (
        not (module.merged or module.lora_bias["default"])
        and read_quantized_weight(module.get_base_layer().weight) is not None
    )


def fuse_linear_layers(model: torch.nn.Module, *, fp8: bool) -> list[Group]:
    """Makes the 4-bit layers with plain adapters compute in groups; returns those."""
    groups: list[Group] = []
    left = {name: module for name, module in model.named_modules() if _fits(module)}
    while left:
        together = _same_input(next(iter(left)), left)
        members = [left.pop(name) for name in together]
        group = Group(members, fp8=fp8)
        groups.append(group)
        for slot, member in enumerate(members):
            member.__class__ = FastLinear
            member.group, member.slot = group, slot
    return groups


def _same_input(name: str, layers: dict[str, Linear4bit]) -> list[str]:
    """Returns the names of the layers that can be computed together with the one of `name`, in order."""
    parent, _, own = name.rpartition(".")
    for kinds in SAME_INPUT:
        together = [f"{parent}.{kind}" for kind in kinds]
        if own in kinds and all(each in layers for each in together):
            rates = {getattr(layers[each].lora_dropout["default"], "p", 0.0) for each in together}
            codes = [read_quantized_weight(layers[each].get_base_layer().weight) for each in together]
            if len(rates) == 1 and can_join([each for each in codes if each is not None]):
                return together
    return [name]


def attend_in_batch(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention without a mask, in transformers' signature.

    `query` is [rows, heads, tokens, width]; returns [rows, tokens, heads, width].
    """
    _refuse(kwargs)
    return attend_batch(query, key, value, scaling).transpose(1, 2), None


def attend_in_rows(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    borders: Tensor | None = None,
    longest: int = 0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside rows that lie one behind the other, in transformers' signature.

    `query` is [1, heads, tokens, width], `borders` int32 [rows + 1] the first token of each row and the end, `longest`
    the most tokens of a row. Returns [1, tokens, heads, width].
    """
    _refuse(kwargs)
    if borders is None:  # the model does not hand on what it does not know, and rows would see each other
        raise NotImplementedError(f"{type(module).__name__} gets no borders of rows: set trainer.fused_attention=false")
    q, k, v = (each.transpose(1, 2).squeeze(0).contiguous() for each in (query, key, value))
    return attend_rows(q, k, v, borders, longest, scaling, sliding_window).unsqueeze(0), None


def _refuse(kwargs: dict[str, Any]) -> None:
    """Raises for what an attention of an architecture's own asks for."""
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise NotImplementedError(f"attention with {unknown[0]}: set trainer.fused_attention=false")


# Without mask functions: with one, transformers looks for packs in the positions, and waits for the device.
AttentionInterface.register(BATCH, attend_in_batch)
AttentionInterface.register(ROWS, attend_in_rows)


def _call(layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return layer._call_impl(*args, **kwargs)


def _call_inside(layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


class FastStep:
    """The model as a training step sees it; a context manager, entered around each step."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        trainer: TrainerConfig,
        quantization: QuantizationConfig,
        placement: Placement,
        packs: Packs | None,
    ) -> None:
        self.base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
        self.packs, self.placement = packs, placement
        self.parts: dict[str, str] = {}
        """The parts by name: `on`, or why not."""
        self.layers = find_layers(self.base)
        self._fuse(model, trainer, quantization)
        self.attention = self._decide("fused_attention", trainer.fused_attention, self._attention_fault())
        self._choose_flash(trainer)
        self.loss = self._decide("fused_loss", trainer.fused_loss, self._loss_fault())
        self.is_compiled = self._decide("compile", trainer.compile, self._compile_fault())
        is_sharded = any(isinstance(layer, FSDPModule) for layer in self.layers)
        self._layer = torch.compile(_call) if self.is_compiled and not is_sharded else _call
        # Not the hooks around it, which put a sharded layer together.
        self._inside = torch.compile(_call_inside) if self.is_compiled and is_sharded else None
        self._pieces = torch.compile(entropy_and_gradient) if self.is_compiled else entropy_and_gradient
        self.checkpointed = len(self.layers) if trainer.gradient_checkpointing else 0
        """How many decoder layers, the first ones, compute their activations again in the backward pass."""
        self._offloading = Offloading(placement.device)
        self.offloaded = 0
        """How many of those layers, the first ones, have their inputs wait in the host's memory."""
        self._draws = any(p.p for p in self.base.modules() if isinstance(p, torch.nn.Dropout))

    def _decide(self, name: str, wanted: bool | str, fault: str | None) -> bool:
        """Notes and returns whether a part is on; raises `ConfigError` if it is asked for and cannot be."""
        if wanted is True and fault is not None:
            raise ConfigError(f"trainer.{name}=true: {fault}; set trainer.{name}=auto")
        if wanted is False:
            fault = f"trainer.{name}=false"
        elif wanted == "auto" and fault is None and self.placement.device.type != "cuda":
            fault = "auto switches it on with CUDA only"
        self.parts[name] = fault or "on"
        return fault is None

    def _fuse(self, model: torch.nn.Module, trainer: TrainerConfig, quantization: QuantizationConfig) -> None:
        fault = None
        if not any(_fits(module) for module in model.modules()):
            fault = "the model has no 4-bit layers with plain adapters"
        elif self.placement.device.type == "cuda" and importlib.util.find_spec("triton") is None:
            fault = "Triton is not installed (pip install triton)"
        fused = self._decide("fused_linear", trainer.fused_linear, fault)
        wanted = quantization.compute is BaseProducts.fp8
        if wanted and trainer.fused_linear is False:
            raise ConfigError(
                "quantization.compute=fp8 contradicts trainer.fused_linear=false, whose layers compute it; leave one "
                "of them out"
            )
        reason = _fp8_fault(self.placement) if fused else self.parts["fused_linear"]
        if wanted:
            self.parts["fp8"] = reason or "on"
        if wanted and reason is not None:
            log.warning("quantization.compute=fp8: %s; computing in %s", reason, self.placement.compute_dtype)
        groups = fuse_linear_layers(model, fp8=wanted and reason is None) if fused else []
        scaled: dict[torch.device, list[Group]] = defaultdict(list)
        for group in groups:
            if group.factor is not None:
                scaled[group.factor.device].append(group)
        self._ranges = [AmaxTracker(own) for own in scaled.values()]

    def _attention_fault(self) -> str | None:
        if self.placement.device.type != "cuda":
            return "the attention over rows runs on CUDA only"
        if self._is_spread:
            return SPREAD
        if not has_varlen():
            return f"torch {torch.__version__} has no torch.nn.attention.varlen (2.10 or later has)"
        if self.placement.compute_dtype is torch.float32:
            return "it computes in 16 bits only"
        settings = self.base.config.get_text_config()
        own = [name for name in OTHER_ATTENTION if getattr(settings, name, None)]
        if own or not getattr(self.base, "_supports_attention_backend", False):
            return f"{settings.model_type} has an attention of its own" + (f" ({own[0]})" if own else "")
        return None

    def _choose_flash(self, trainer: TrainerConfig) -> None:
        """Takes the FlashAttention of the config; raises `ConfigError` if it names one that cannot be had."""
        wanted = trainer.flash_attention
        if not self.attention:
            if wanted is not FlashAttention.auto:
                off = f"trainer.fused_attention is off ({self.parts['fused_attention']})"
                raise ConfigError(f"trainer.flash_attention={wanted.value}: {off}; set trainer.flash_attention=auto")
            return
        if wanted is FlashAttention.fa2 or trainer.deterministic:
            return
        faults: list[str] = []
        for name in NEWER_FLASH if wanted is FlashAttention.auto else [wanted.value]:
            fault = find_flash_fault(name, self.placement.device)
            if fault is None:
                self.parts[name] = "on"
                return
            faults.append(fault)
        if wanted is not FlashAttention.auto:
            raise ConfigError(f"trainer.flash_attention={wanted.value}: {faults[0]}; set trainer.flash_attention=auto")
        self.parts["flash_attention"] = ", ".join(faults)

    @property
    def _is_spread(self) -> bool:
        return len(set((getattr(self.base, "hf_device_map", None) or {}).values())) > 1

    def _loss_fault(self) -> str | None:
        if self._is_spread:
            return SPREAD
        settings = self.base.config.get_text_config()
        if (output := self.base.get_output_embeddings()) is None or type(output) is not torch.nn.Linear:
            return "the output layer is none of torch's linear layers, or is trained"
        if output.bias is not None or output.weight.requires_grad:
            return "the output layer is trained, or has a bias"
        if changed := [name for name in OTHER_LOGITS if getattr(settings, name, None)]:
            return f"{settings.model_type} changes its logits ({changed[0]})"
        return None

    def _compile_fault(self) -> str | None:
        if self._is_spread:
            return SPREAD
        return None if self.layers else f"{self.base.config.model_type} has no list of decoder layers"

    @property
    def is_active(self) -> bool:
        """Whether anything is replaced at all."""
        return any(state == "on" for state in self.parts.values())

    def __str__(self) -> str:
        on = [name for name, state in self.parts.items() if state == "on"]
        off = [f"{name}: {state}" for name, state in self.parts.items() if state != "on"]
        return "; ".join([", ".join(on), *off])

    def __enter__(self) -> FastStep:
        self._context = contextlib.ExitStack()
        self._own = (self.base.config._attn_implementation, [each.gradient_checkpointing for each in self.layers])
        if self.attention:
            self._context.enter_context(fastest_attention())
        self._context.enter_context(torch._functorch.config.patch(KEEP_LITTLE))
        # Layers are compiled one by one, so there is nothing to cut for the exchange of gradients between processes.
        # All trainings of this process share their code; past the limit a layer would run uncompiled, and what is
        # computed again in the backward pass would not be what the forward pass had kept.
        limit = torch._dynamo.config.accumulated_recompile_limit
        self._context.enter_context(torch._dynamo.config.patch(optimize_ddp=False, recompile_limit=limit))
        self._offloading.begin()
        for ranges in self._ranges:
            ranges.measure()
        for index, layer in enumerate(self.layers):
            layer.gradient_checkpointing = False
            layer._compiled_call_impl = self._call_of(index, layer)
            if self._inside is not None:
                layer.forward = partial(self._inside, layer)
        if self.loss or self.attention:
            self.base.forward = self._forward
        return self

    def _call_of(self, index: int, layer: torch.nn.Module) -> Callable[..., Any]:
        """Returns how a step calls a layer."""
        call = partial(self._layer, layer)
        if index >= self.checkpointed:
            return call
        # What a layer adds to its input last, nothing in it reads: the second time that product is left out.
        last = _last_product(layer)
        second = contextlib.nullcontext if last is None else last.unread
        again = partial(
            checkpoint,
            call,
            use_reentrant=False,
            preserve_rng_state=self._draws,
            context_fn=lambda: (contextlib.nullcontext(), second()),
        )
        return partial(self._offloading.call, again) if index < self.offloaded else again

    def __exit__(self, *error: object) -> None:
        self._context.close()
        if any(error):
            for module in self.base.modules():
                if isinstance(module, FastLinear):  # a step that failed between q and v has left outputs there
                    module.group.pending = None
        implementation, checkpointing = self._own
        self.base.config._attn_implementation = implementation
        for layer, own in zip(self.layers, checkpointing, strict=True):
            layer._compiled_call_impl, layer.gradient_checkpointing = None, own
            if self._inside is not None:
                del layer.__dict__["forward"]
        self.base.__dict__.pop("forward", None)

    def _forward(self, **batch: Any) -> CausalLMOutputWithPast:
        """The forward pass of one batch, as the trainer asks for it."""
        batch = {name: value for name, value in batch.items() if value is not None}  # PEFT passes all it knows
        if self.attention:
            batch = self._lay_out(batch)
        if not self.loss:
            return type(self.base).forward(self.base, use_cache=False, **batch)
        labels, count = batch.pop("labels"), batch.pop("num_items_in_batch", None)
        embedded = self.base.get_input_embeddings()(batch.pop("input_ids"))
        if not embedded.requires_grad:  # all layers then see the same kind of tensor, and share their code
            embedded.requires_grad_()
        found = self.base.base_model(inputs_embeds=embedded, use_cache=False, **batch)
        hidden = found.last_hidden_state
        targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        weight = self.base.get_output_embeddings().weight
        kind = hidden.device.type
        # As autocast computes any other linear layer: the matrix may be stored in 32 bits.
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        hidden = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
        targets = targets.reshape(-1)
        with torch.autocast(kind, enabled=False):
            total = linear_cross_entropy(hidden, weight.to(dtype), targets, self._pieces)
        return CausalLMOutputWithPast(loss=total / (count if count is not None else (targets != IGNORED).sum()))

    def _lay_out(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Lays the rows of packs one behind the other; `borders` is where each begins, of a fixed count.

        Rows that are no packs keep their places: padding stands behind them, where causal attention does not see it.
        Where a layer looks back only so far, they are laid out too.
        """
        ids = batch["input_ids"]
        count, width = ids.shape
        batch.pop("attention_mask", None)
        if self.packs is not None:
            positions, longest = batch["position_ids"], self.packs.longest
            begins = (positions % longest == 0).view(-1)  # also inside padding that is longer than any row
            most = count * self.packs.borders + 1
            borders = torch.nonzero_static(begins, size=most, fill_value=count * width).view(-1).int()
        elif getattr(self.base.config.get_text_config(), "sliding_window", None) is not None:
            positions, longest = torch.arange(width, device=ids.device).expand(count, width), width
            borders = torch.arange(0, count * width + 1, width, device=ids.device, dtype=torch.int32)
        else:
            self.base.config._attn_implementation = BATCH
            return batch
        self.base.config._attn_implementation = ROWS
        return batch | {
            "input_ids": ids.view(1, -1),
            "labels": batch["labels"].view(1, -1),
            "position_ids": positions.reshape(1, -1),
            "borders": borders,
            "longest": longest,
        }


def _last_product(layer: torch.nn.Module) -> Group | None:
    """Returns the group of the product that a layer ends with by adding it to its input.

    None: it ends otherwise, with a norm for instance, or that product is none of ours.
    """
    own = {name for name, _ in layer.named_children()}
    if own != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return None
    last = getattr(layer.mlp, "down_proj", None)
    return last.group if isinstance(last, FastLinear) else None


def find_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """Returns the decoder layers, in order."""
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module):
            layers = [each for each in module if isinstance(each, GradientCheckpointingLayer)]
            if len(layers) == len(module):
                return layers
    return []


def _fp8_fault(placement: Placement) -> str | None:
    """Returns why products in 8-bit floats are not to be had on a device; on a CPU they are emulated."""
    if placement.device.type == "cpu":
        return None
    if placement.device.type != "cuda" or torch.version.hip is not None:
        return "products in 8-bit floats are for NVIDIA GPUs"
    if torch.cuda.get_device_capability(placement.device) < (8, 9):
        return "this GPU multiplies no 8-bit floats (Ada, Hopper and later do)"
    if placement.compute_dtype is not torch.bfloat16:
        return "the other products must be in bf16 (quantization.compute_dtype)"
    return None
