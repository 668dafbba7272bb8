"""A mixture of experts in 4 bits is trained, resumed, measured, asked and merged like any other base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qlora.config.compose import compose
from qlora.models.fingerprint import adapter_digest
from qlora.run import Run
from tests.models.bases import write

QUICK = [
    *("lora.r=4", "lora.dropout=0.1", "recipe=none", "trainer.eval_steps=null", "trainer.warmup_steps=0"),
    *("data.max_train_samples=8", "data.max_eval_samples=4", "evaluation=loss", "task.predict=false"),
    *("trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=1", "trainer.optim=adamw_torch"),
    *("generation.max_new_tokens=4", "model.tokenizer=tiny", "trainer.max_steps=4", "trainer.save_steps=2"),
]


def run(folder: Path, base: Path, *overrides: str) -> dict[str, Any]:
    return Run(compose([*QUICK, f"model.name={base}", *overrides]), folder).execute()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("qwen3_moe", tmp_path_factory.mktemp("base") / "qwen3_moe")


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "trained"
    run(folder, base)
    return folder


def test_the_manifest_says_what_is_in_4_bits(trained: Path) -> None:
    model = json.loads((trained / "manifest.json").read_text())["model"]
    assert model["base"] == "nf4 + double quantization; 0.4 % of the decoder's weights are in bfloat16 (router)"


def test_a_run_that_was_cut_off_ends_with_the_same_adapter(
    trained: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = shutil.copytree(trained, tmp_path / "cut")
    shutil.rmtree(cut / "checkpoints" / "checkpoint-4")
    shutil.rmtree(cut / "adapter")
    (cut / "result.json").unlink()
    run(cut, base)
    assert "resuming from checkpoint-2" in capsys.readouterr().out
    assert adapter_digest(cut / "adapter") == adapter_digest(trained / "adapter")


def test_it_is_measured_asked_and_merged(trained: Path, base: Path, tmp_path: Path) -> None:
    adapter = f"adapter={trained / 'adapter'}"
    loss = json.loads((trained / "result.json").read_text())["metrics"]["eval_loss"]
    assert run(tmp_path / "evaluate", base, "task=evaluate", adapter)["metrics"]["eval_loss"] == pytest.approx(loss)
    run(tmp_path / "predict", base, "task=predict", adapter)
    assert len((tmp_path / "predict" / "predictions.jsonl").read_text().splitlines()) == 4
    merged = run(tmp_path / "merge", base, "task=merge", adapter, "merge.dtype=fp32")
    assert merged["metrics"]["merge_kl_mean"] < 1e-6
