"""Checkpointed layers as CUDA graphs: the same bits as without, in all that a step does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.config.compose import compose
from qlora.models.fingerprint import adapter_digest
from qlora.run import Run
from qlora.step.layer_graphs import LayerGraphs
from tests.models.bases import write

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

WIDTHS = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128}
QUICK = [
    *("lora.r=8", "lora.dropout=0.0", "recipe=none", "data=demo", "model.tokenizer=tiny", "trainer.max_steps=6"),
    *("trainer.eval_steps=3", "trainer.save_steps=null", "trainer.warmup_steps=0", "trainer.logging_steps=1"),
    *("trainer.per_device_train_batch_size=4", "trainer.gradient_accumulation_steps=3", "trainer.learning_rate=3e-3"),
    *("trainer.lr_scheduler_type=constant", "evaluation=loss", "task.predict=false", "data.max_eval_samples=32"),
    *("evaluation.baseline=false", "trainer.gradient_checkpointing=true"),
]
PACKS = ["data.packing=true", "data.pack_length=256"]
ON_EXPERTS = ["lora.experts=all"]
SETTINGS: dict[str, tuple[str, list[str]]] = {
    "a mixture": ("qwen3_moe", [*ON_EXPERTS, *PACKS]),
    "in 8 bits": ("qwen3_moe", [*ON_EXPERTS, *PACKS, "quantization.compute=fp8"]),
    "dropout": ("qwen3_moe", [*ON_EXPERTS, *PACKS, "lora.dropout=0.1"]),
    "dense": ("llama", [*PACKS, "trainer.cuda_graphs=true", "lora.dropout=0.1"]),
    "rows": (
        "mixtral",
        [
            *ON_EXPERTS,
            "data.max_length=64",
            "data.source_max_len=null",
            "data.target_max_len=null",
            "trainer.per_device_train_batch_size=2",
        ],
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {kind: write(kind, root / kind, **WIDTHS) for kind in ("qwen3_moe", "gpt_oss", "mixtral", "llama")}


def run(base: Path, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    Run(compose([*QUICK, f"model.name={base}", *overrides]), folder).execute()
    times = ("second", "runtime", "wait", "mfu", "peak", "epoch", "time")
    history = json.loads((folder / "history.json").read_text())
    return [
        {name: value for name, value in entry.items() if not any(part in name for part in times)} for entry in history
    ]


@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_run_by_graphs_has_the_bits_of_one_without(
    name: str, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, overrides = SETTINGS[name]
    captured: list[bool] = []
    capture = LayerGraphs._capture
    monkeypatch.setattr(LayerGraphs, "_capture", lambda *args: captured.append(capture(*args)) or captured[-1])
    actual = run(bases[kind], tmp_path / "graphs", *overrides)
    assert captured
    assert all(captured)
    expected = run(bases[kind], tmp_path / "plain", *overrides, "trainer.cuda_graphs=false")
    assert actual == expected
    assert adapter_digest(tmp_path / "graphs" / "adapter") == adapter_digest(tmp_path / "plain" / "adapter")
