"""The private parts of lm_eval and datasets that `qlora.upstream.lm_eval` uses exist and are what it expects."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from lm_eval import utils
from lm_eval.tasks import _yaml_loader

from qlora.upstream.lm_eval import is_reader, restricted

IMPORT_FUNCTION = {
    "0.4.13": "f807328ab60d0dd866014b2aa37f91a8b02d21b8cf7c3e907356a752abc0a29f",
}
"""SHA-256 of the bodies of `_import_func_in_yml` that were checked to import only the named function, by version."""


def test_the_import_of_functions_is_the_known_one() -> None:
    function = _yaml_loader._import_func_in_yml
    assert list(inspect.signature(function).parameters)[:2] == ["qual", "base_dir"]
    assert hashlib.sha256(inspect.getsource(function).encode()).hexdigest() in IMPORT_FUNCTION.values()


def test_imports_and_templates_are_replaced_within_the_block() -> None:
    original, environment = _yaml_loader._import_func_in_yml, utils.env
    seen = []

    def wrap(import_function: Any) -> Any:
        def refuse(name: str, folder: Path) -> Any:
            seen.append((name, folder))
            raise PermissionError(name)

        return refuse

    with restricted(wrap):
        assert utils.apply_template("{{ x }}", {"x": 3}) == "3"
        with pytest.raises(Exception, match="unsafe"):
            utils.apply_template("{{ x.__class__.__mro__ }}", {"x": 3})
        with pytest.raises(PermissionError):
            _yaml_loader._import_func_in_yml("utils.f", Path())
    assert seen == [("utils.f", Path())]
    assert (_yaml_loader._import_func_in_yml, utils.env) == (original, environment)


def test_readers_of_datasets_are_known() -> None:
    assert all(map(is_reader, ("json", "csv", "parquet", "arrow", "text")))
    assert not is_reader("me/set")
