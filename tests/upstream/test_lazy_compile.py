"""Functions that libraries compile when they are imported are compiled at their first call instead."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from qlora.upstream.lazy_compile import compile_at_first_call

IMPORTS = """
import sys
from qlora.upstream.lazy_compile import compile_at_first_call
with compile_at_first_call():
    import bitsandbytes
    from bitsandbytes.backends.default import ops
assert "torch._inductor.compile_fx" not in sys.modules, "it is imported in another way now"
import torch
assert torch.compile.__module__ == "torch"
"""


def test_bitsandbytes_is_imported_without_the_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_function_is_compiled_once_and_at_its_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []

    def compile_now(function: object, **options: object) -> object:
        compiled.append((function, options))
        return lambda number: ("compiled", number)

    monkeypatch.setattr(torch, "compile", compile_now)
    with compile_at_first_call():

        @torch.compile(dynamic=False)
        def double(number: int) -> int:
            return 2 * number

        plain = torch.compile(abs)
    assert torch.compile is compile_now
    assert compiled == []
    assert double.__name__ == "double"
    assert [double(2), double(3), plain(4)] == [("compiled", 2), ("compiled", 3), ("compiled", 4)]
    assert [options for _, options in compiled] == [{"dynamic": False}, {}]


def test_a_module_is_compiled_at_once_for_it_keeps_its_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Linear(2, 2)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    with compile_at_first_call():
        assert torch.compile(module) is module
