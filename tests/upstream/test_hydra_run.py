"""What `qlora.upstream.hydra_run` uses of Hydra is there, and what it repeats is what Hydra does."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import hydra
import pytest
from hydra._internal import hydra as hydra_module
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.hydra import Hydra
from hydra._internal.utils import _run_app, get_args_parser
from hydra.core.utils import JobReturn, configure_log, run_job

REPEATED = {
    Hydra.run: {"1.3.8": "1d738243fa8c02aff5a79245ea6e85087df27ba64932f8ac7780f4f0c98be090"},
    Hydra.multirun: {"1.3.8": "1528620d5caae32156b58e47003f2124c940705730a89dfa59a12a8c2b9fd388"},
    _run_app: {"1.3.8": "c6282a21225813cfad22e47e98c6d3018745007af520dc5d91d614c135ddfcc4"},
}
"""SHA-256 of the source of each function that is repeated, by version. Compare a new one by hand before adding it."""
USED = {
    ConfigLoaderImpl._apply_overrides_to_config: ["overrides", "cfg"],
    get_overrides_dirname: ["overrides", "exclude_keys", "item_sep", "kv_sep"],
    get_args_parser: [],
    Hydra.create_main_hydra2: ["task_name", "config_search_path"],
    Hydra.compose_config: [
        *("self", "config_name", "overrides", "run_mode"),
        *("with_log_configuration", "from_shell", "validate_sweep_overrides"),
    ],
    Hydra.show_cfg: ["self", "config_name", "overrides", "cfg_type", "package", "resolve"],
    Hydra.show_info: ["self", "info", "config_name", "overrides", "run_mode"],
    Hydra.hydra_help: ["self", "config_name", "args_parser", "args"],
    Hydra.shell_completion: ["self", "config_name", "overrides"],
    Hydra._print_debug_info: ["self", "config_name", "overrides", "run_mode"],
    Callbacks.on_run_start: ["self", "config", "kwargs"],
    Callbacks.on_run_end: ["self", "config", "kwargs"],
    Callbacks.on_multirun_start: ["self", "config", "kwargs"],
    Callbacks.on_multirun_end: ["self", "config", "kwargs"],
    configure_log: ["log_config", "verbose_config"],
}


@pytest.mark.parametrize("function", REPEATED, ids=lambda function: function.__qualname__)
def test_what_is_repeated_is_a_known_version(function: Any) -> None:
    assert hydra.__version__ in REPEATED[function], f"compare {function.__qualname__} with hydra_run.py"
    source = inspect.getsource(function)
    assert hashlib.sha256(source.encode()).hexdigest() == REPEATED[function][hydra.__version__]


@pytest.mark.parametrize("function", USED, ids=lambda function: function.__qualname__)
def test_what_is_used_takes_the_same_parameters(function: Any) -> None:
    assert list(inspect.signature(function).parameters) == USED[function]


def test_attributes_that_are_read_are_there() -> None:
    assert hasattr(hydra_module, "log")
    assert JobReturn()._return_value is None
    assert {"task_function", "config", "job_dir_key", "hydra_context"} <= {*inspect.signature(run_job).parameters}
    parameters = {"config_name", "overrides", "with_log_configuration", "run_mode"}
    assert parameters <= {*inspect.signature(Hydra.compose_config).parameters}
