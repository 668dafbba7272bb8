"""Writes a LoRA adapter as a GGUF file that llama.cpp adds to an untouched base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qlora.config.schema import GgufType
from qlora.errors import DataError
from qlora.export.architectures import find_architecture, row_order
from qlora.export.gguf_package import load_gguf
from qlora.export.model_file import GgufTensor, plain_name, write_tensors
from qlora.runtime.atomic_files import write_file

if TYPE_CHECKING:  # a room of the same level
    from qlora.adapters.adapted import Adapted, LowRank

INSTEAD = "write the merged model instead, with export.format=gguf"


@dataclass(frozen=True)
class AdapterFile:
    """What becomes a GGUF file: the matrices of an adapter for a base of known settings."""

    adapted: Adapted
    config: Any
    """transformers' config of the whole base."""
    title: str
    key: str = "export.format=gguf-adapter"
    """What errors begin with."""

    def check(self) -> None:
        """Raises `DataError` for an adapter that holds more than LoRA on linear layers, or a base of another family."""
        adapted = self.adapted
        text = self.config.get_text_config()
        find_architecture(text, self.key)
        held = {
            "another kind of change than LoRA's": any(not hasattr(layer, "a") for layer in adapted.layers.values()),
            "the magnitudes of DoRA": any(
                getattr(layer, "magnitude", None) is not None for layer in adapted.layers.values()
            ),
            "LoRA on the experts of a mixture": bool(adapted.experts),
            "trained rows of an embedding": bool(adapted.rows),
            "biases or other whole tensors": bool(adapted.replaced),
            "LoRA on an output matrix that is the embedding": bool(text.tie_word_embeddings)
            and "lm_head" in adapted.layers,
        }
        if (first := next((name for name, is_held in held.items() if is_held), None)) is not None:
            raise DataError(f"{self.key}: the adapter holds {first}, which llama.cpp adds to no base; {INSTEAD}")

    def write(self, path: Path, kind: GgufType, on_progress: Callable[[int], None]) -> None:
        """Writes the file whole or not at all; `on_progress` is called with the number of matrices that are written."""
        self.check()
        write_file(path, lambda file: self._write(file, kind, on_progress))

    def _write(self, file: Path, kind: GgufType, on_progress: Callable[[int], None]) -> None:
        gguf = load_gguf()
        architecture = find_architecture(self.config.get_text_config(), self.key)
        writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[getattr(gguf.MODEL_ARCH, architecture.name)])
        try:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_name(self.title)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, self.alpha)
            write_tensors(writer, gguf, list(self.gguf_tensors()), kind, on_progress, self.key)
        finally:
            writer.close()

    @property
    def layers(self) -> dict[str, LowRank]:
        """The matrices of each layer; `check` refuses what else an adapter may do to one."""
        return {name: cast("LowRank", layer) for name, layer in self.adapted.layers.items()}

    @property
    def alpha(self) -> float:
        """The one `alpha` of the file, that of the first layer; other layers have theirs in their matrix B."""
        first = next(iter(self.layers.values()))
        return first.scaling * first.a.shape[0]

    def gguf_tensors(self) -> Iterator[GgufTensor]:
        """Yields A and B of each layer, as llama.cpp multiplies with them."""
        gguf, text = load_gguf(), self.config.get_text_config()
        architecture = find_architecture(text, self.key)
        known = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.name), text.num_hidden_layers)
        for layer, matrices in self.layers.items():
            parameter = plain_name(f"{layer}.weight")
            name = known.get_name(parameter, try_suffixes=(".weight",))
            if name is None:
                raise DataError(f"{self.key}: llama.cpp has no tensor for {layer}; {INSTEAD}")
            order = row_order(architecture, text, parameter)
            yield GgufTensor(f"{name}.lora_a", tuple(matrices.a.shape), lambda matrices=matrices: matrices.a)  # type: ignore[misc]
            yield GgufTensor(
                f"{name}.lora_b",
                tuple(matrices.b.shape),
                lambda matrices=matrices, order=order: self._second(matrices, order),  # type: ignore[misc]
            )

    def _second(self, matrices: LowRank, order: Callable[[Any], Any] | None) -> Any:
        scaled = matrices.b.float() * (matrices.scaling * matrices.a.shape[0] / self.alpha)
        return scaled if order is None else order(scaled)
