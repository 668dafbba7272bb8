"""Python code in the folder of an adapter: `model.trust_remote_code` trusts that of the base alone."""

from __future__ import annotations

import re
from pathlib import Path

from qlora.config.schema import ModelConfig
from qlora.errors import DataError
from qlora.models.model_files import locate
from qlora.models.weight_files import local_files

OTHER_REPOSITORY = re.compile(r'"([^"\s]+)--[\w.]+"')
"""How transformers names code of another repository in its JSON files."""


def check_code_files(folder: Path, config: ModelConfig) -> None:
    """Raises `DataError` if a folder holds code that is not that of the base, byte by byte."""
    if config.trust_remote_code and (name := _find_other_code(folder, config)) is not None:
        raise DataError(
            f"adapter={folder} comes with other Python code than its base ({name}), and model.trust_remote_code=true "
            f"trusts that of {config.tokenizer or config.name} alone; remove it, or replace it by that model's"
        )


def _find_other_code(folder: Path, config: ModelConfig) -> str | None:
    bases = [name for name in (config.tokenizer, config.name) if name is not None]
    for file in sorted(folder.glob("**/*.py")):
        copies = [_base_folder(name, config) / file.relative_to(folder) for name in bases]
        if not any(copy.is_file() and copy.read_bytes() == file.read_bytes() for copy in copies):
            return file.name
    for file in sorted(folder.glob("*.json")):
        for repository in OTHER_REPOSITORY.findall(file.read_text("utf-8", "replace")):
            if repository not in bases:
                return f"{repository}, by {file.name}"
    return None


def _base_folder(name: str, config: ModelConfig) -> Path:
    revision = config.revision if name == config.name else None
    return local_files(locate(name), revision=revision, cache_dir=config.cache_dir)
