"""Private parts of lm_eval: how a task file's `!function` is imported and how its templates are rendered."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

ImportFunction = Callable[[str, Path], Any]
"""Returns the function that `!function NAME` in a task file of a folder means."""


@contextlib.contextmanager
def restricted(wrap: Callable[[ImportFunction], ImportFunction]) -> Iterator[None]:
    """Wraps the harness's import of functions, and renders its templates in Jinja's sandbox, while the block runs.

    The harness imports any function and renders any template that a task file contains, and has no setting for either.
    """
    from lm_eval import utils
    from lm_eval.tasks import _yaml_loader

    import_function, environment = _yaml_loader._import_func_in_yml, utils.env
    sandbox = ImmutableSandboxedEnvironment(undefined=environment.undefined, keep_trailing_newline=True)
    sandbox.filters |= environment.filters
    _yaml_loader._import_func_in_yml, utils.env = wrap(import_function), sandbox
    try:
        yield
    finally:
        _yaml_loader._import_func_in_yml, utils.env = import_function, environment


def is_reader(path: str) -> bool:
    """Returns whether `datasets` takes a name for one of its own readers, not for a data set."""
    import datasets

    return path in datasets.packaged_modules._PACKAGED_DATASETS_MODULES
