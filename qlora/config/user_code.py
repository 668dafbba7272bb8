"""The user's own code, named as `module:function`, `module:Class` or `module.Class`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from qlora.errors import ConfigError, ResourceError, did_you_mean


def import_function(path: str, key: str, what: str = "function") -> Callable[..., Any]:
    """Returns the function or class that `path` names as `module:name`; raises `ConfigError`, which names `key`.

    `what` it is called in the error.
    """
    module_name, name = path.split(":")
    return _import(module_name, name, f"{key}={path}", what)


def import_class(path: str, key: str, kind: type) -> type:
    """Returns the subclass of `kind` that `path` names; raises `ConfigError`, which names `key`, for anything else."""
    module_name, _, name = path.rpartition(".")
    setting = f"{key}={path}"
    if not module_name:
        raise ConfigError(f"{setting} must be module.Class, the full name of a class")
    result = _import(module_name, name, setting, "class")
    if not isinstance(result, type) or not issubclass(result, kind):
        raise ConfigError(f"{setting} is not a {kind.__name__}")
    return result


def _import(module_name: str, name: str, setting: str, what: str) -> Any:
    """Returns what the module itself defines: neither a module that it imports nor another package's code."""
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"{setting}: there is no module {error.name}; it must be installed or lie on PYTHONPATH"
            ) from None
        raise ResourceError(
            f"{setting}: {module_name} needs the module {error.name}, which is not installed"
        ) from error
    except ImportError as error:
        raise ConfigError(f"{setting}: {module_name} cannot be imported ({error}); correct the import") from error
    result = getattr(module, name, None)
    if not callable(result):
        functions = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise ConfigError(f"{setting}: module {module_name} has no {what} {name}{did_you_mean(name, functions)}")
    home = str(getattr(result, "__module__", None))
    if home.partition(".")[0] != module_name.partition(".")[0]:
        raise ConfigError(
            f"{setting}: this {what} is not code of {module_name}, which imports it from {home}; name the "
            "module that defines it, and trust its package"
        )
    return result
