"""Writes a checkpoint whole or not at all: beside its path, completed and checked, then renamed."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from qlora.errors import RunError
from qlora.runtime import distributed
from qlora.runtime.atomic_files import folder_size, patiently, replace_folder
from qlora.training.checkpoints import UNFINISHED, Needed, finalize, flushing, needs_none, remove_surplus

OTHER_BYTES = 2**20
"""Bytes of a checkpoint beside weights and moments."""


class CheckpointWriter:
    """Writes the checkpoints of a training run to one folder."""

    def __init__(self, folder: Path, size: int, needed: Needed = needs_none) -> None:
        """Takes the folder, an estimate of a checkpoint's bytes, and what names the checkpoints that may not go."""
        self.folder, self.size, self.needed = folder, size, needed
        self.target = folder
        """The folder in which the library writes a checkpoint."""
        self._random_states: list[tuple[str, bytes]] = []

    def write(self, step: int, save: Callable[[], None], metadata: dict[str, Any], limit: int | None) -> None:
        """Writes the checkpoint of a step by calling `save`, waits for disk space if need be, and removes old ones."""
        path = self.folder / f"checkpoint-{step}"
        patiently(path, lambda: self._write(path, save, metadata), size=self.size)
        self.size = folder_size(path)
        while remove_surplus(self.folder, limit, self.needed):
            pass

    def _write(self, path: Path, save: Callable[[], None], metadata: dict[str, Any]) -> None:
        self.target = self.folder / UNFINISHED
        shutil.rmtree(self.target, ignore_errors=True)
        try:
            with _without_checksums(), flushing(self.target):
                save()
            finalize(self.target / path.name, metadata)
            replace_folder(self.target / path.name, path)
        finally:
            shutil.rmtree(self.target, ignore_errors=True)
            self.target = self.folder

    def gather_random_states(self, save: Callable[[str], None]) -> None:
        """Gathers the random states of all processes, each as the file that `save` writes to a folder."""
        with tempfile.TemporaryDirectory() as folder:
            save(folder)
            (file,) = Path(folder).iterdir()
            self._random_states = distributed.all_gather((file.name, file.read_bytes()))

    def write_random_states(self, folder: Path) -> None:
        """Writes the random states that were gathered."""
        for name, state in self._random_states:
            (folder / name).write_bytes(state)


@contextlib.contextmanager
def fitting(checkpoint: str | None) -> Iterator[None]:
    """Raises `RunError` where a checkpoint that is loaded in the block is another model's (`resume=force`)."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"{checkpoint} does not fit what the config makes of the model ({reason}); start with the config of the "
            "run, or anew with resume=never"
        ) from error


@contextlib.contextmanager
def _without_checksums() -> Iterator[None]:
    """Switches off torch's checksums of saved files, a third of the time that saving takes; `finalize` hashes them."""
    previous = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(previous)


def estimate_checkpoint(model: torch.nn.Module) -> int:
    """Returns an upper estimate of a checkpoint's bytes: what is trained, and two moments of 32 bits each."""
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return OTHER_BYTES + sum(parameter.numel() * (parameter.element_size() + 8) for parameter in trained)
