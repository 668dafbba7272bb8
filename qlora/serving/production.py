"""The commands by which servers for production serve the same: vLLM and SGLang, with the adapters attached."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.adapters.adapter_files import check_adapter_folder

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM can be told to make room for."""
TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Attached:
    """An adapter as its folder describes it."""

    folder: Path
    settings: Mapping[str, Any]

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        return max(self.settings.get("r") or 0, *(self.settings.get("rank_pattern") or {}).values(), 1)

    @property
    def is_plain(self) -> bool:
        """Whether it is LoRA on linear layers and nothing else, as both servers take it."""
        others = ("use_dora", "modules_to_save", "target_parameters", "trainable_token_indices")
        has_biases = self.settings.get("bias", "none") != "none"
        return not has_biases and not any(self.settings.get(name) for name in others)


def production_lines(base: str, adapters: Mapping[str, Path], full: Path | None = None) -> list[str]:
    """Returns the commands of vLLM and SGLang for a base (a hub id or a folder) with adapters by their names.

    `full` is a model of its own in place of both. An adapter that they do not take is left out, for `task=merge`;
    with none left, the list is empty.
    """
    attached = {name: Attached(folder, check_adapter_folder(folder)) for name, folder in adapters.items()}
    plain = {name: adapter for name, adapter in attached.items() if adapter.is_plain}
    if adapters and not plain:
        return []
    folder = full or next((adapter.folder for adapter in plain.values()), None)
    template = ["--chat-template", str(folder / TEMPLATE)] if folder and (folder / TEMPLATE).is_file() else []
    vllm, sglang = ["vllm", "serve", str(full or base)], ["python", "-m", "sglang.launch_server", "--model-path"]
    sglang.append(str(full or base))
    if plain:
        named = [f"{name}={adapter.folder}" for name, adapter in plain.items()]
        rank = max(adapter.rank for adapter in plain.values())
        room = next((size for size in RANKS if size >= rank), rank)
        vllm += ["--enable-lora", "--max-lora-rank", str(room), "--lora-modules", *named]
        sglang += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-paths", *named]
    return [shlex.join([*vllm, *template]), shlex.join([*sglang, *template])]
