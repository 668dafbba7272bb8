"""How transformers quantizes a base while it loads it, extended to experts; none of it is documented.

transformers asks a quantizer which parameters it quantizes. It merges the matrices of all experts of a layer into one
tensor first, where the files hold each alone: here they are handed on one by one instead, so that neither the merged
tensor nor all matrices of a layer exist at once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, Protocol, cast

from torch import Tensor, nn
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    log_conversion_errors,
)
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

NAME = "bitsandbytes_4bit"
STATISTICS = (
    "nested_absmax",
    "nested_quant_map",
    "quant_map",
    "absmax",
    "quant_state.bitsandbytes__nf4",
    "quant_state.bitsandbytes__fp4",
)
"""What bitsandbytes saves beside a weight."""

BLOCKED = ("gate_up_proj", "down_proj")
"""The projections that gpt-oss is stored with in MXFP4, each as blocks and scales."""

Saved = dict[str, Tensor]
"""A saved tensor as `weight`, and what is saved beside it."""


class ExpertsLoading(Protocol):
    """What stores the experts of a base that is loaded."""

    @property
    def decodes_blocks(self) -> bool:
        """Whether the files hold experts in MXFP4."""

    def projections(self, model: nn.Module) -> Iterable[str]:
        """Returns the names of the parameters of experts that are to be quantized."""

    def quantize(self, experts: nn.Module, projection: str, weight: Tensor) -> nn.Parameter:
        """Stores a whole projection, in the layout of its parameter; returns what takes the parameter's place."""

    def holds(self, experts: nn.Module, projection: str) -> bool:
        """Returns whether a projection is stored."""

    def takes_matrices(self, experts: nn.Module, projection: str, count: int) -> bool:
        """Returns whether a projection is made of `count` matrices an expert, stacked by rows."""

    def store_blocks(self, experts: nn.Module, projection: str, blocks: Tensor, scales: Tensor) -> nn.Parameter:
        """Stores a projection from the MXFP4 of all experts, [experts, out, ...]; returns its new parameter."""

    def store(self, experts: nn.Module, projection: str, matrices: list[Iterator[Saved]]) -> nn.Parameter:
        """Stores a projection from the matrices of all experts for each of its parts; returns its new parameter.

        It is asked for one that is not to be quantized, too, if the files hold its matrices quantized.
        """


@contextlib.contextmanager
def quantizing_experts(loading: ExpertsLoading) -> Iterator[None]:
    """Inside, `from_pretrained` with bitsandbytes' 4 bits hands the weights of experts to `loading`."""
    quantizers: dict[str, Any] = cast(Any, AUTO_QUANTIZER_MAPPING)
    former = quantizers[NAME]
    quantizers[NAME] = functools.partial(_ExpertsQuantizer, loading)
    try:
        yield
    finally:
        quantizers[NAME] = former


class _ExpertsQuantizer(Bnb4BitHfQuantizer):
    """bitsandbytes' quantizer for a model with experts."""

    def __init__(self, loading: ExpertsLoading, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._loading = loading
        self._projections: frozenset[str] = frozenset()

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
        skipped = getattr(self.quantization_config, "llm_int8_skip_modules", None) or []
        names = self._loading.projections(model)
        self._projections = frozenset(name for name in names if not any(f".{part}." in f".{name}." for part in skipped))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Quantizes the experts that a quantized base was saved with in full."""
        for name in sorted(self._projections if self.pre_quantized else ()):
            experts, projection = get_module_from_name(model, name)
            if not self._loading.holds(experts, projection):
                weight: Tensor = getattr(experts, projection)
                setattr(experts, projection, self._loading.quantize(experts, projection, weight.detach()))
        return super()._process_model_after_weight_loading(model, **kwargs)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Says yes to experts, too."""
        return param_name in self._projections or super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> ConversionOps:
        """Returns what quantizes any parameter."""
        return _Quantize(self._loading, self._projections, super().get_quantize_ops())

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """Takes the merging of experts out; `args` is the model in newer versions."""
        conversions = [self._without_merge(conversion) for conversion in weight_conversions]
        if self._loading.decodes_blocks:
            conversions += [_BlocksConverter(self._loading, projection) for projection in BLOCKED]
        return super().update_weight_conversions(conversions, *args)

    def _without_merge(self, conversion: Any) -> Any:
        """Returns a converter that stores experts instead of merging them; any other transform as it is."""
        if not (self._projections or self.pre_quantized) or not merges_matrices(conversion):
            return conversion
        sources = conversion._original_source_patterns
        beside = (
            [f"{source}.{statistic}" for source in sources for statistic in STATISTICS] if self.pre_quantized else []
        )
        converter = _ExpertsConverter(
            [*beside, *sources],  # a version without word boundaries takes the first that fits
            conversion._original_target_patterns,
            [_HoldsSaved(self), *conversion.operations],
        )
        converter.scope_prefix, converter.base_model_prefix = conversion.scope_prefix, conversion.base_model_prefix
        converter.parts = tuple(sources)
        return converter


def merges_matrices(conversion: Any) -> bool:
    """Returns whether a transform stacks the matrices of experts, and joins those of gate and up by rows."""
    if type(conversion) is not WeightConverter or len(conversion.target_patterns) != 1:
        return False
    operations, sources = conversion.operations, conversion.source_patterns
    merge, *others = operations
    if not (type(merge) is MergeModulelist and merge.dim == 0) or not all("*." in source for source in sources):
        return False
    if not others:
        return len(sources) == 1
    return len(others) == 1 and type(others[0]) is Concatenate and others[0].dim == 1


class _HoldsSaved(ConversionOps):
    """Marks a converter: transformers casts no tensor that one with this attribute collects."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer if hf_quantizer.pre_quantized else None
        self.quantizer = hf_quantizer

    def __deepcopy__(self, memo: Any) -> _HoldsSaved:
        return self  # each layer gets a copy of its converter, and the quantizer is that of the model

    def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("the converter stores experts itself")

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("quantized experts are not written as they were loaded")


class _ExpertsConverter(WeightConverter):
    """Stores the experts of one layer, or merges them as transformers does where they are not to be quantized."""

    __slots__ = ("parts",)
    parts: tuple[str, ...]
    """The patterns of gate and up, or of one matrix."""

    def convert(
        self, layer_name: str, model: Any = None, config: Any = None, hf_quantizer: Any = None, loading_info: Any = None
    ) -> dict[str, Any]:
        """Returns the parameter of a projection."""
        marker, *operations = self.operations
        quantizer = cast(_HoldsSaved, marker).quantizer
        experts, projection = get_module_from_name(model, layer_name)
        is_saved = len(self.collected_tensors) > len(self.parts)
        takes = quantizer._loading.takes_matrices(experts, projection, len(self.parts))
        if not takes or not (is_saved or layer_name in quantizer._projections):
            self.operations = operations
            return super().convert(layer_name, model, config, hf_quantizer, loading_info)
        count = len(self.collected_tensors)
        with log_conversion_errors(layer_name, loading_info, (count, layer_name), operations):
            matrices = [_saved(self.collected_tensors, part) for part in self.parts]
            return {layer_name: quantizer._loading.store(experts, projection, matrices)}
        raise AssertionError("the block above returns or raises")


class _Blocks(ConversionOps):
    """Stands where transformers has the operation of a converter."""

    def __init__(self, loading: ExpertsLoading) -> None:
        self.loading = loading

    def __deepcopy__(self, memo: Any) -> _Blocks:
        return self

    def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("the converter stores experts itself")

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("quantized experts are not written as they were loaded")


class _BlocksConverter(WeightConverter):
    """Stores a projection of experts from the MXFP4 in the files."""

    __slots__ = ()

    def __init__(self, loading: ExpertsLoading, projection: str) -> None:
        super().__init__([f"{projection}_blocks", f"{projection}_scales"], projection, [_Blocks(loading)])

    def convert(
        self, layer_name: str, model: Any = None, config: Any = None, hf_quantizer: Any = None, loading_info: Any = None
    ) -> dict[str, Any]:
        """Returns the parameter of a projection."""
        experts, projection = get_module_from_name(model, layer_name)
        collected = self.materialize_tensors()
        with log_conversion_errors(layer_name, loading_info, (len(collected), layer_name), self.operations):
            if len(collected) != len(self.source_patterns):
                raise ValueError(f"of {' and '.join(self.source_patterns)} only {', '.join(collected)} is there")
            blocks, scales = (collected[pattern][0] for pattern in self.source_patterns)
            loading = cast(_Blocks, self.operations[0]).loading
            return {layer_name: loading.store_blocks(experts, projection, blocks, scales)}
        raise AssertionError("the block above returns or raises")


def _saved(collected: Mapping[str, list[Any]], part: str) -> Iterator[Saved]:
    """Yields the tensors of one expert after the other; they are read when they are asked for, and not kept."""
    names = {"weight": part} | {statistic: f"{part}.{statistic}" for statistic in STATISTICS}
    queues = {name: collected[pattern] for name, pattern in names.items() if collected.get(pattern)}
    if lengths := {len(queue) for queue in queues.values()} - {len(queues.get("weight", []))}:
        raise ValueError(f"{len(queues.get('weight', []))} experts have a weight, and {min(lengths)} its scales")
    for index in range(len(queues.get("weight", []))):
        tensors = {name: _materialize(queue[index]) for name, queue in queues.items()}
        for queue in queues.values():
            queue[index] = None
        yield tensors


def _materialize(tensor: Tensor | Future[Tensor] | Callable[[], Tensor]) -> Tensor:
    if isinstance(tensor, Tensor):
        return tensor
    return tensor.result() if isinstance(tensor, Future) else tensor()


class _Quantize(ConversionOps):
    """Quantizes one parameter: of experts as `loading` does, of linear layers as transformers does."""

    def __init__(self, loading: ExpertsLoading, projections: frozenset[str], linear: ConversionOps) -> None:
        self._loading, self._projections, self._linear = loading, projections, linear

    def convert(self, input_dict: Any, *args: Any, model: Any = None, **kwargs: Any) -> Any:
        """Returns the quantized parameters by their names."""
        result: dict[str, Any] = {}
        for name, value in input_dict.items():
            if name not in self._projections:
                result |= self._linear.convert({name: value}, *args, model=model, **kwargs)
            elif isinstance(value, nn.Parameter):  # it was stored without being merged
                result[name] = value
            else:
                experts, projection = get_module_from_name(model, name)
                weight = value[0] if isinstance(value, list) else value
                if weight.shape != getattr(experts, projection).shape:
                    raise ValueError(
                        f"{tuple(weight.shape)}, and {tuple(getattr(experts, projection).shape)} is needed"
                    )
                result[name] = self._loading.quantize(experts, projection, weight)
        return result

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("quantized experts are not written as they were loaded")
