"""Private names of transformers that loading and building a model needs; `tests/upstream` checks each."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming, rename_source_key
from transformers.utils.hub import cached_file
from transformers.utils.loading_report import LoadStateDictInfo

from qlora.upstream.transformers_quantizer import merges_matrices

if TYPE_CHECKING:
    from peft import PeftModel


def dtype_plan(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Returns the parameters that `from_pretrained` keeps in another dtype, as patterns (float32 of some experts).

    A base with random weights, and one that was saved quantized, is to have the dtypes of one that was loaded.
    """
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    return plan


def init_weights(model: PreTrainedModel, module: nn.Module) -> None:
    """Initialises the parameters of one module by the rules of the model it belongs to.

    The public `init_weights` initialises all modules at once, which must exist in full precision then.
    """
    model._init_weights(module)


def commit_hash(model_config: Any) -> str | None:
    """Returns the commit of the hub that a config was read from."""
    commit: str | None = getattr(model_config, "_commit_hash", None)
    return commit


def attention_of(model: PreTrainedModel | PeftModel) -> str | None:
    """Returns the attention that a model computes with, e.g. `sdpa`; what the config asks for may be None."""
    implementation: str | None = model.config._attn_implementation
    return implementation


def failed_conversions(error_traceback: TracebackType | None) -> list[str] | None:
    """Returns the tensors that `from_pretrained` could not make of those in the files; None: it failed otherwise.

    Its message refers to a table in the log, so the report is taken from the frame that raised it.
    """
    for frame, _ in traceback.walk_tb(error_traceback):
        report = frame.f_locals.get("loading_info")
        if isinstance(report, LoadStateDictInfo) and report.conversion_errors:
            return list(report.conversion_errors)
    return None


def find_hub_file(repository: str, name: str, **options: Any) -> Path | None:
    """Returns a file of a hub repository, downloaded if needed; None: the repository has no such file.

    The public call raises one exception for a file that is missing and for a hub that cannot be reached.
    """
    path = cached_file(repository, name, _raise_exceptions_for_missing_entries=False, **options)
    return None if path is None else Path(path)


def matrices_of(model: PreTrainedModel, parameter: str) -> list[str]:
    """Returns the names in a model's files of the matrices that loading joins in a tensor of experts, `*` the expert.

    [] where the files hold the tensor itself.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    for converter in converters:
        target = converter.target_patterns[0]
        if not parameter.endswith(target) or not any(isinstance(op, MergeModulelist) for op in converter.operations):
            continue
        names = [parameter.removesuffix(target) + source for source in converter.source_patterns]
        for renaming in renamings:
            former = [name.replace(renaming.target_patterns[0], renaming.source_patterns[0]) for name in names]
            loaded = {rename_source_key(name.replace("*", "0"), renamings, converters)[0] for name in former}
            names = former if former != names and loaded == {parameter} else names
        return names
    return []


@dataclass(frozen=True)
class SavedMatrix:
    """A matrix of one expert in a model's files."""

    parameter: str
    """The projection of all experts that it is loaded into."""
    part: int
    """Its index among the matrices of an expert that the projection is made of: gate, then up."""
    parts: int
    """The number of these."""
    expert: int


class TensorNames:
    """The parameters and buffers that the tensors of a model's files are loaded into, by transformers' own rules."""

    def __init__(self, model: PreTrainedModel) -> None:
        transforms = get_model_conversion_mapping(model)
        self._tensors = model.state_dict()
        self._renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self._converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self._prefix = model.base_model_prefix

    def find(self, name: str) -> str | None:
        """Returns the parameter's or buffer's name, or None for a tensor that loading leaves out."""
        for renamings, converters in ((self._renamings, self._converters), ([], [])):
            renamed, _ = rename_source_key(name, renamings, converters, self._prefix, self._tensors)
            if renamed in self._tensors:
                return str(renamed)
        return None

    def find_matrix(self, name: str) -> SavedMatrix | None:
        """Returns which part of a projection of experts a tensor is; None: loading does not merge it into one."""
        parameter, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self._tensors)
        converters = [converter for converter in self._converters if pattern in converter.source_patterns]
        if pattern is None or not converters or not merges_matrices(converters[0]):
            return None
        renamed, _ = rename_source_key(name, self._renamings, [], self._prefix, self._tensors)
        match = re.search(pattern.replace("*.", r"(\d+)\."), renamed)
        sources = converters[0].source_patterns
        return match and SavedMatrix(parameter, sources.index(pattern), len(sources), int(match[1]))

    def is_converted(self, name: str) -> bool:
        """Returns whether loading makes another tensor of this one, for example by joining experts."""
        _, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self._tensors)
        return pattern is not None
