"""Writes a model as one GGUF file, tensor by tensor: in memory is one tensor, or the experts of one layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qlora.config.schema import GgufType
from qlora.errors import DataError
from qlora.export.architectures import SCRIPT, find_architecture, row_order, shift_norm, write_settings
from qlora.export.gguf_package import load_gguf
from qlora.export.rope import rope_table, write_rope
from qlora.export.vocabulary import Vocabulary, read_vocabulary
from qlora.models.weight_files import ModelNames, Tensors
from qlora.runtime.atomic_files import write_file

EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
STACKED = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)")
BLOCK = 32
"""The numbers that q8_0 scales together; a row that is no multiple of it stays float16."""
MOST_ENDS = 3
"""How many tokens a GGUF file can name that end an answer."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    """Returns it in float32."""


@dataclass(frozen=True)
class ModelFile:
    """What becomes a GGUF file: a model's tensors, settings, tokenizer and template."""

    tensors: Tensors
    names: ModelNames
    config: Any
    """transformers' config of the whole model."""
    tokenizer: PreTrainedTokenizerBase
    end_ids: Sequence[int]
    """The tokens that end an answer, the tokenizer's own first."""
    title: str
    key: str = "task=export"
    """What errors begin with."""

    def check(self) -> Vocabulary:
        """Returns the tokenizer in its new form; raises `DataError` for anything of the model that has no form."""
        text = self.config.get_text_config()
        find_architecture(text, self.key)
        if len(self.end_ids) > MOST_ENDS:
            raise DataError(
                f"{self.key}: {len(self.end_ids)} tokens end an answer of this model, and a GGUF file can name "
                f"{MOST_ENDS}; leave some out of eos_token_id in its generation_config.json"
            )
        rows = next(tensor.shape[0] for tensor in self.gguf_tensors() if tensor.name == "token_embd.weight")
        return read_vocabulary(self.tokenizer, rows, self.key)

    def write(self, path: Path, kind: GgufType, on_progress: Callable[[int], None]) -> None:
        """Writes the file whole or not at all; `on_progress` is called with the number of tensors that are written."""
        vocabulary = self.check()
        write_file(path, lambda file: self._write(file, kind, vocabulary, on_progress))

    def _write(self, file: Path, kind: GgufType, vocabulary: Vocabulary, on_progress: Callable[[int], None]) -> None:
        gguf = load_gguf()
        text = self.config.get_text_config()
        architecture = find_architecture(text, self.key)
        name = gguf.MODEL_ARCH_NAMES[getattr(gguf.MODEL_ARCH, architecture.name)]
        writer = gguf.GGUFWriter(file, name)
        try:
            writer.add_type(gguf.GGUFType.MODEL)
            writer.add_name(self.title)
            writer.add_file_type(file_type(gguf, kind))
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            write_settings(writer, text, architecture)
            write_rope(writer, gguf, text)
            self._write_tokenizer(writer, vocabulary)
            write_tensors(writer, gguf, list(self.gguf_tensors()), kind, on_progress, self.key)
        finally:
            writer.close()

    def _write_tokenizer(self, writer: Any, vocabulary: Vocabulary) -> None:
        writer.add_vocab_size(len(vocabulary.tokens))
        writer.add_tokenizer_model(vocabulary.model)
        if vocabulary.pre is not None:
            writer.add_tokenizer_pre(vocabulary.pre)
        writer.add_token_list(vocabulary.tokens)
        writer.add_token_types(vocabulary.types)
        if vocabulary.scores:
            writer.add_token_scores(vocabulary.scores)
        if vocabulary.merges:
            writer.add_token_merges(vocabulary.merges)
        writer.add_add_space_prefix(vocabulary.space_prefix)
        writer.add_add_bos_token(vocabulary.adds_bos)
        writer.add_add_eos_token(False)
        tokenizer = self.tokenizer
        add = {
            writer.add_bos_token_id: tokenizer.bos_token_id,
            writer.add_pad_token_id: tokenizer.pad_token_id,
            writer.add_unk_token_id: tokenizer.unk_token_id,
            **dict(zip((writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), self.end_ids,
                       strict=False)),
        }  # fmt: skip
        for write, index in add.items():
            if index is not None and index < len(vocabulary.tokens):
                write(index)
        if tokenizer.chat_template:
            segments, template = vocabulary.segments, str(tokenizer.chat_template)
            writer.add_chat_template(template if segments is None else segments.wrap(template))

    def gguf_tensors(self) -> Iterator[GgufTensor]:
        """Yields the tensors of the file in the order of the model's files."""
        gguf = load_gguf()
        text = self.config.get_text_config()
        architecture = find_architecture(text, self.key)
        known = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.name), text.num_hidden_layers)
        ties = bool(text.tie_word_embeddings)
        for parameter, shape, read in self._sources(ties):
            name = known.get_name(parameter, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise DataError(
                    f"{self.key}: llama.cpp has no tensor for {parameter} of a {text.model_type}; convert the merged "
                    f"folder with {SCRIPT}"
                )
            order = row_order(architecture, text, parameter)

            def make(read: Callable[[], Tensor] = read, parameter: str = parameter, order: Any = order) -> Tensor:
                value = shift_norm(architecture, parameter, read().float())
                return value if order is None else order(value)

            yield GgufTensor(name, tuple(shape), make)
        if (table := rope_table(text)) is not None:
            yield GgufTensor("rope_freqs.weight", tuple(table.shape), lambda: table)

    def _sources(self, ties: bool) -> Iterator[tuple[str, Sequence[int], Callable[[], Tensor]]]:
        """Yields a name, shape and reader of each tensor; one holds a matrix of all experts of a layer."""
        experts: dict[str, dict[int, str]] = {}
        seen = set[str]()
        for source in self.tensors:
            if (match := EXPERT.fullmatch(source)) is not None:
                experts.setdefault(f"{match[1]}.{match[3]}.weight", {})[int(match[2])] = source
                continue
            if (match := STACKED.fullmatch(source)) is not None:
                yield from self._stacked(match[1], match[2], source)
                continue
            parameter = self.names.find(source)
            if parameter is None or ".vision_tower." in f".{parameter}" or "multi_modal_projector." in parameter:
                continue
            parameter = plain_name(parameter)
            if parameter == "lm_head.weight" and ties:
                parameter = "model.embed_tokens.weight"
            if parameter in seen:
                continue
            seen.add(parameter)
            yield parameter, self.tensors.shape(source), lambda source=source: self.tensors.read(source)  # type: ignore[misc]
        for name, sources in experts.items():
            ordered = [sources[index] for index in range(len(sources))]
            shape = (len(ordered), *self.tensors.shape(ordered[0]))
            yield name, shape, lambda ordered=ordered: torch.stack([self.tensors.read(one).float() for one in ordered])  # type: ignore[misc]

    def _stacked(
        self, prefix: str, matrix: str, source: str
    ) -> Iterator[tuple[str, Sequence[int], Callable[[], Tensor]]]:
        """Yields the experts of a layer that one tensor of the files holds, [experts, out, in]."""
        count, rows, columns = self.tensors.shape(source)
        if matrix == "down_proj":
            yield f"{prefix}.down_proj.weight", (count, rows, columns), lambda: self.tensors.read(source)
            return
        half = rows // 2
        yield f"{prefix}.gate_proj.weight", (count, half, columns), lambda: self.tensors.read(source)[:, :half]
        yield f"{prefix}.up_proj.weight", (count, half, columns), lambda: self.tensors.read(source)[:, half:]


def plain_name(parameter: str) -> str:
    """Returns a parameter's name without what a model of pictures and text puts before it."""
    return parameter.replace("model.language_model.", "model.").replace("language_model.model.", "model.")


def file_type(gguf: Any, kind: GgufType) -> Any:
    """Returns llama.cpp's number of what most tensors are."""
    return gguf.LlamaFileType.MOSTLY_Q8_0 if kind is GgufType.q8_0 else gguf.LlamaFileType.MOSTLY_F16


def tensor_type(gguf: Any, name: str, shape: Sequence[int], kind: GgufType) -> Any:
    """Returns how a tensor is written: norms, biases, tables and routers in float32."""
    types = gguf.GGMLQuantizationType
    if len(shape) < 2 or name.endswith("ffn_gate_inp.weight"):
        return types.F32
    return types.Q8_0 if kind is GgufType.q8_0 and shape[-1] % BLOCK == 0 else types.F16


def write_tensors(
    writer: Any, gguf: Any, tensors: Sequence[GgufTensor], kind: GgufType, on_progress: Callable[[int], None], key: str
) -> None:
    """Writes header and tensors, each read when its turn comes; raises `DataError` for a number float16 cannot hold."""
    kinds = [tensor_type(gguf, tensor.name, tensor.shape, kind) for tensor in tensors]
    for tensor, tensor_kind in zip(tensors, kinds, strict=True):
        block, size = gguf.GGML_QUANT_SIZES[tensor_kind]
        count = 1
        for length in tensor.shape:
            count *= length
        writer.add_tensor_info(tensor.name, tensor.shape, None, count // block * size, raw_dtype=tensor_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for index, (tensor, tensor_kind) in enumerate(zip(tensors, kinds, strict=True), 1):
        value = tensor.read().float()
        if not torch.isfinite(value).all():
            raise DataError(f"{key}: {tensor.name} holds numbers that are NaN or infinite")
        if tensor_kind != gguf.GGMLQuantizationType.F32 and value.abs().max() > torch.finfo(torch.float16).max:
            raise DataError(
                f"{key}: {tensor.name} holds numbers too large for {kind.value}, whose scales are float16; serve the "
                "merged folder instead"
            )
        writer.write_tensor_data(gguf.quantize(value.contiguous().numpy(), tensor_kind))
        on_progress(index)


def end_ids_of(tokenizer: PreTrainedTokenizerBase, *ends: int | list[int] | None) -> list[int]:
    """Returns the tokens that end an answer: the tokenizer's, which templates write as `eos_token`, and `ends`."""
    listed = [token for end in ends for token in (end if isinstance(end, list) else [end])]
    return [*dict.fromkeys(token for token in (tokenizer.eos_token_id, *listed) if token is not None)]
