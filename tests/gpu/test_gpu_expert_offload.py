"""Experts that wait in pinned memory, on a GPU: the results are the same to the bit, and the GPU holds two layers."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.config.compose import compose
from qlora.experts.host import CudaCopies, HostLayers, describe_waiting, experts_on_host, is_waiting
from qlora.models.fingerprint import adapter_digest
from qlora.run import Run
from qlora.session import Session

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LAYERS, EXPERTS, WIDTH, HIDDEN = 6, 32, 768, 1024
LAYER = EXPERTS * 3 * WIDTH * HIDDEN * 0.516
"""Bytes of a layer's experts in 4 bits."""
SHAPE = [
    *("model=qwen3-30b-a3b", "model.weights=random", "model.tokenizer=tiny", "model.architecture.vocab_size=2048"),
    *(f"model.architecture.num_hidden_layers={LAYERS}", f"model.architecture.hidden_size={HIDDEN}"),
    *(f"model.architecture.num_experts={EXPERTS}", f"model.architecture.moe_intermediate_size={WIDTH}"),
    *("lora.r=8", "lora.dropout=0.1", "trainer.max_steps=4", "trainer.per_device_train_batch_size=2"),
    *("trainer.gradient_accumulation_steps=2", "trainer.eval_steps=2", "trainer.save_steps=null"),
    *("data=local", "data.format=text", "data.eval_dataset_size=2", "data.source_max_len=null"),
    *("data.target_max_len=null", "data.max_length=1024", "evaluation=loss", "evaluation.baseline=false"),
    *("task.predict=false", "trainer.keep=last", "trainer.deterministic=true"),
]


def run(folder: Path, rows: Path, *overrides: str) -> dict[str, Any]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return Run(compose([*SHAPE, f"data.path={rows}", *overrides]), folder).execute()["metrics"]


@pytest.mark.parametrize("fetched", ["forward", "forward and backward"])
def test_copies_arrive_before_kernels_read_them_and_after_kernels_have_read_the_last(fetched: str) -> None:
    layers, size = HostLayers(CudaCopies(torch.device("cuda", 0)), 6), 2**26
    for layer in range(6):
        layers.store(layer, "weight", torch.full((size,), layer, dtype=torch.uint8, device="cuda"))
    order = [*range(6), *(reversed(range(6)) if fetched != "forward" else range(6))]
    torch.cuda._sleep(100_000_000)  # the copies would be long there if they did not wait
    sums = [layers.fetch(layer, "weight").sum(dtype=torch.int64) for layer in order]
    assert [int(total) for total in sums] == [layer * size for layer in order]


def test_what_waits_is_pinned_and_the_gpu_has_room_for_two_layers(rows: Path, tmp_path: Path) -> None:
    allocated = {}
    for name, context in {
        "here": contextlib.nullcontext(),
        "waiting": experts_on_host(None, CudaCopies(torch.device("cuda", 0))),
    }.items():
        torch.cuda.empty_cache()
        session = Run(
            compose([*SHAPE, f"data.path={rows}", "quantization.experts_offload=none"]), tmp_path / name
        ).session
        previous = torch.cuda.memory_allocated()
        with context:
            base = session.load_base()
        with torch.no_grad(), session.placement.autocast():
            base(input_ids=torch.arange(64, device="cuda")[None])
        allocated[name] = torch.cuda.memory_allocated() - previous
        if name == "waiting":
            assert describe_waiting(base)
            assert all(buffer.is_pinned() for buffer in base.buffers() if is_waiting(buffer))
        del base, session
    assert allocated["here"] - allocated["waiting"] == pytest.approx((LAYERS - 2) * LAYER, rel=0.05)


@pytest.mark.parametrize(
    "overrides",
    [["trainer.fused_experts=false", "trainer.compile=false"], ["trainer.gradient_checkpointing=true"],
     ["trainer.gradient_checkpointing=false"], ["quantization.compute=fp8"]],
    ids=["plain", "checkpointed", "kept", "fp8"],
)  # fmt: skip
def test_a_run_whose_experts_wait_ends_with_the_same_adapter(rows: Path, tmp_path: Path, overrides: list[str]) -> None:
    peaks = {}
    for offload in ("none", "all"):
        metrics = run(tmp_path / offload, rows, f"quantization.experts_offload={offload}", *overrides)
        peaks[offload] = metrics["peak_memory_gb"]
    print(peaks)
    assert adapter_digest(tmp_path / "none" / "adapter") == adapter_digest(tmp_path / "all" / "adapter")
    assert peaks["all"] < peaks["none"]


def test_experts_wait_by_themselves_where_they_do_not_fit(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "free", rows)
    assert "wait in the host's memory" not in capsys.readouterr().out
    peak = torch.cuda.max_memory_allocated()
    monkeypatch.setattr("qlora.session.free_memory", lambda device: int(peak * 0.8))
    overrides = [*SHAPE, f"data.path={rows}"]
    session: Session = Run(compose(overrides), tmp_path / "small").session
    assert session.waiting_experts is not None
    assert 2 < session.waiting_experts <= LAYERS


def test_copying_overlaps_with_computing() -> None:
    """A layer that computes longer than a copy takes hides the copy."""
    device, size = torch.device("cuda", 0), 2**27
    layers, x = HostLayers(CudaCopies(device), 6), torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    for layer in range(6):
        layers.store(layer, "weight", torch.zeros(size, dtype=torch.uint8, device=device))

    def milliseconds(*, copies: bool, computes: bool) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for layer in [*range(6), *reversed(range(6))]:
            if copies:
                layers.fetch(layer, "weight")
            for _ in range(16 if computes else 0):
                x @ x
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    milliseconds(copies=True, computes=True)
    both, alone = milliseconds(copies=True, computes=True), milliseconds(copies=False, computes=True)
    copied = milliseconds(copies=True, computes=False)
    print(f"both {both:.1f} ms, computing {alone:.1f} ms, copying {copied:.1f} ms")
    assert both < alone + 0.5 * copied
