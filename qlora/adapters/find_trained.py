"""What `adapter=` names: an adapter, a fully finetuned model, or the untuned base."""

from __future__ import annotations

from pathlib import Path

from qlora.errors import ConfigError, DataError, did_you_mean
from qlora.runtime.run_folder import find_adapter


def find_trained(requested: str | None, run_folder: Path) -> tuple[Path | None, Path | None]:
    """Returns the (adapter, fully finetuned model) of `adapter=`, or of the run's own folder where it is unset.

    Both are None for `adapter=none`. Raises `ConfigError` for a folder that does not exist, `DataError` for one that
    holds neither.
    """
    if requested == "none":
        return None, None
    folder = Path(requested).expanduser() if requested is not None else run_folder
    if not folder.is_dir():
        siblings = [str(path) for path in folder.parent.glob("*/")]
        raise ConfigError(f"adapter={requested}: no such folder{did_you_mean(str(folder), siblings)}")
    trained = find_adapter(folder)
    if trained == (None, None):
        raise DataError(
            f"adapter={requested or 'null'}: {folder} holds no adapter; give adapter=FOLDER of an adapter "
            "or of a finished run, or adapter=none for the untuned base"
        )
    return trained
