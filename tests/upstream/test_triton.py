"""A kernel that Triton has compiled is launched with what it needs, and only where it was compiled for that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
backends = pytest.importorskip("triton.backends.compiler")
runtime = pytest.importorskip("triton.runtime")
upstream = pytest.importorskip("qlora.upstream.triton")


@upstream.cheap_launch
@triton.jit
def add(x, out, count, missing, PLUS: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    tl.store(out + at, tl.load(x + at, mask=at < count) + PLUS, mask=at < count)


class RecordingDriver:
    """A driver of a GPU that is not there: it notes what it is told to launch."""

    launches: list[tuple[Any, ...]]

    class utils:
        """What Triton asks of a GPU where it loads a kernel."""

        @staticmethod
        def load_binary(*_: Any) -> tuple[int, ...]:
            return 1, 2, 32, 0, 1024

        @staticmethod
        def get_device_properties(_: int) -> dict[str, int]:
            return {"max_shared_mem": 200_000}

        @staticmethod
        def unload_module(_: int) -> None: ...

    def __init__(self) -> None:
        self.launches, self.device = [], 0

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        return lambda *launch: self.launches.append((src, metadata.num_warps, *launch))

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_current_target(self) -> Any:
        return backends.GPUTarget("cuda", 90, 32)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[RecordingDriver]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    recording = RecordingDriver()
    monkeypatch.setattr(runtime.driver, "_active", recording)
    add.kernel.device_caches.clear()
    add._compiled.clear()
    yield recording
    add.kernel.device_caches.clear()
    add._compiled.clear()


def test_a_second_launch_tells_the_driver_what_the_first_one_does(recorded: RecordingDriver) -> None:
    x, out = torch.zeros(64), torch.zeros(64)
    for _ in range(2):
        add[(3, 2)](x, out, 5, None, PLUS=2, WIDTH=64, num_warps=2)
    (_, warps, *first), (_, _, *second) = recorded.launches
    assert warps == 2
    # Triton gives the tensors themselves, and the values of constants; the launch reads neither of the latter.
    assert first[9:] == [x, out, 5, None, 2, 64]
    assert second[9:] == [x.data_ptr(), out.data_ptr(), 5, None, None, None]
    assert first[:6] == second[:6] == [3, 2, 1, 7, 2, first[5]]


def test_a_kernel_serves_only_what_it_was_compiled_for(recorded: RecordingDriver) -> None:
    x, out = torch.zeros(65), torch.zeros(64)
    options: dict[str, Any] = {"PLUS": 2, "WIDTH": 64, "num_warps": 2}

    def launched(*arguments: Any, **more: Any) -> Any:
        add[(1,)](*arguments, None, **options | more)
        return recorded.launches[-1][0]

    plain = launched(x, out, 5)
    assert launched(x, out, 5) is plain
    assert launched(torch.ones(64), out, 17) is plain
    others = [launched(x[1:], out, 5), launched(x, out, 1), launched(x, out, 16), launched(x, out, 2**40 + 1)]
    others += [launched(x.half(), out, 5), launched(x, out, 5, PLUS=3), launched(x, out, 5, num_warps=4)]
    assert len({id(source) for source in (plain, *others)}) == 8
    recorded.device = 1
    assert launched(x, out, 5) is not plain  # a kernel is loaded on one device


def test_numbers_are_those_of_triton() -> None:
    for number in (1, 2, 3, 128, 129):
        assert upstream.next_power_of_2(number) == triton.next_power_of_2(number)
        assert upstream.cdiv(number, 4) == triton.cdiv(number, 4)
