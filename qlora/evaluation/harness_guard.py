"""Keeps the lm-evaluation-harness from running code that task files contain."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qlora.config.schema import check_trusted
from qlora.config.user_code import import_function
from qlora.errors import DataError, UserError
from qlora.evaluation.metrics import check_library_metric
from qlora.upstream.lm_eval import ImportFunction, is_reader, restricted

READERS = ("json", "csv", "parquet", "arrow", "text")
"""The readers of `datasets` that a task may name; the others run code that their arguments name."""


@contextlib.contextmanager
def guarded(path: str | None, trusted: Sequence[str]) -> Iterator[None]:
    """Lets task files below `path` call only functions of packages in `trusted`.

    The harness's own tasks may call theirs. Templates are rendered in a sandbox, and neither a metric nor a data set
    may run a script.
    """
    import datasets
    import lm_eval

    package, key = Path(lm_eval.__file__).parent.resolve(), f"evaluation.path={path}"

    def wrap(import_named: ImportFunction) -> ImportFunction:
        def import_trusted(name: str, folder: Path) -> Any:
            if folder.resolve().is_relative_to(package):
                return import_named(name, folder)
            is_installed = importlib.util.find_spec(name.partition(".")[0] or "sys") is not None
            if is_installed or (folder / f"{name.rpartition('.')[0].replace('.', '/')}.py").exists():
                check_trusted(f"{key}, !function in {folder}", name, trusted)
            if is_installed:  # trust is for the installed package, not for a module of its name in the folder
                return import_function(":".join(name.rsplit(".", 1)), f"{key}, !function in {folder}")
            return import_named(name, folder)

        return import_trusted

    def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
        if is_reader(path) and path not in READERS:
            raise DataError(f"{key}: dataset_path: {path} must be one of {', '.join(READERS)}, or name a data set")
        return load_any(path, *args, **kwargs)

    load_any = datasets.load_dataset
    with restricted(wrap):
        datasets.load_dataset = load_dataset
        try:
            with _library_metrics_guarded(key):
                yield
        finally:
            datasets.load_dataset = load_any


@contextlib.contextmanager
def _library_metrics_guarded(key: str) -> Iterator[None]:
    """Lets the harness load metrics of the `evaluate` library only by their plain names."""
    try:
        import evaluate
    except ImportError:
        yield
        return
    load_any = evaluate.load

    refused: list[UserError] = []  # the harness continues without a metric that it cannot load

    def load_metric(name: str, *args: Any, **kwargs: Any) -> Any:
        try:
            check_library_metric(name, f"{key}: metric: {name}")
        except UserError as error:
            refused.append(error)
            raise
        return load_any(name, *args, **kwargs)

    evaluate.load = load_metric
    try:
        yield
    except Exception:
        if refused:
            raise refused[0] from None
        raise
    finally:
        evaluate.load = load_any
    if refused:
        raise refused[0]
