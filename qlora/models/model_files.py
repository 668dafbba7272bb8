"""Finds a model's files, and checks them before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qlora.errors import ConfigError, DataError, did_you_mean
from qlora.models.json_files import check_files, read_object
from qlora.models.json_shapes import MODEL_FILES, TOKENIZER_JSON
from qlora.text import brief

EMBEDDED = {"tiny": Path(__file__).parent.parent / "demo" / "model"}
WEIGHTS = "*.safetensors"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The single file of a model's weights, or the index of several; repositories may hold copies under other names."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
"""Weights in other files than safetensors: reading a pickle may run code that it holds."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def locate(name: str, key: str = "model.name") -> str:
    """Returns the folder of an embedded or local model, or the hub id unchanged.

    Raises `ConfigError` for what looks like a path but is not one.
    """
    if name in EMBEDDED:
        return str(EMBEDDED[name])
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise ConfigError(f"{key}={name}: this is a file; give the folder that holds config.json")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        siblings = [f"{path.parent}/{entry.name}" for entry in path.parent.glob("*/")] if path.parent.is_dir() else []
        raise ConfigError(f"{key}={name}: no such folder{did_you_mean(str(path), siblings)}")
    return name


def is_local(source: str) -> bool:
    """Returns whether `locate` returned a folder, not a hub id."""
    return Path(source).is_dir()


def check_model_folder(folder: Path, *, tokenizer: bool = True) -> None:
    """Raises `DataError` unless `folder` holds a config, whole weights and, if asked, a tokenizer."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise DataError(
                f"model.name={folder} is an adapter, not a base model; give its base as model.name and this folder "
                "as adapter"
            )
        raise DataError(f"model.name={folder}: config.json is missing; a model folder needs it")
    check_files(folder, MODEL_FILES, f"model.name={folder}")
    weights = sorted(folder.glob(WEIGHTS))
    if not weights and (pickles := [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]):
        raise only_safetensors(str(folder), pickles[0])
    if not weights:
        raise DataError(
            f"model.name={folder} has a config but no weights (*.safetensors); finish the download, or use "
            "model.weights=random to initialise them from a seed"
        )
    weight_files(folder)
    if tokenizer:
        check_tokenizer_folder(folder, "model.name")


def weight_files(folder: Path) -> list[Path]:
    """Returns the files of the weights in a model's folder; raises `DataError` where one is missing or damaged."""
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    elif index.is_file():
        files = _read_index(index)
    else:
        raise DataError(f"model.name={folder} has no weights ({SINGLE}, or an index of several files)")
    for file in files:
        check_safetensors(file, "model.name")
    return files


def _read_index(index: Path) -> list[Path]:
    """Returns the files that an index names; raises `DataError` if one is missing."""
    folder = index.parent
    names = set(read_object(index, f"model.name={folder}")["weight_map"].values())
    if strange := sorted(name for name in names if Path(name).name != name or len(name) > 255 or "\0" in name):
        raise DataError(
            f"model.name={folder}: {INDEX} names {brief(strange[0])}, which is no file in this folder; download or "
            "copy the model again"
        )
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise DataError(
            f"model.name={folder}: {len(missing)} of the {len(names)} files of the weights that {INDEX} names are "
            f"missing, first {missing[0]}; finish the download, or copy the model again"
        )
    return sorted(folder / name for name in names)


def only_safetensors(name: str, file: str) -> DataError:
    """Returns the error for a model without safetensors."""
    return DataError(
        f"model.name={name} has its weights in {file} alone; only safetensors are loaded, because other files may hold "
        'code. If you trust them, convert them once: python -c "from transformers import AutoModelForCausalLM as M; '
        "M.from_pretrained('OLD').save_pretrained('NEW')\", and copy the tokenizer's files"
    )


def check_tokenizer_folder(folder: Path, key: str) -> dict[str, Any]:
    """Returns what `tokenizer_config.json` says; raises `DataError` unless `folder` holds a tokenizer."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise DataError(
            f"{key}={folder} has no tokenizer ({', '.join(TOKENIZER_FILES[:3])}); copy it there or name another with "
            "model.tokenizer"
        )
    return check_files(folder, TOKENIZER_JSON, f"{key}={folder}").get("tokenizer_config.json", {})


def check_safetensors(path: Path, key: str) -> None:
    """Raises `DataError` if a safetensors file is cut off or not of that format; reads its header only."""
    if path.suffix != ".safetensors":
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise DataError(f"{key}: {path} is damaged or incomplete ({error}); download or copy it again") from error
