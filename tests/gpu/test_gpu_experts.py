"""Mixtures of experts on a GPU: kernels equal to their twins, the fast step to the plain one, runs exact and merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.config.compose import compose
from qlora.models.fingerprint import adapter_digest
from qlora.run import Run
from qlora.step.fast_step import FastStep
from qlora.step.kernels import grouped
from tests.models.bases import write

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

KINDS = ("qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "deepseek_v3")
WIDTHS = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128}
QUICK = [
    *("lora.r=8", "lora.experts=all", "lora.dropout=0.0", "recipe=none", "data=demo", "model.tokenizer=tiny"),
    *("trainer.max_steps=12", "trainer.eval_steps=null", "trainer.save_steps=6", "trainer.warmup_steps=0"),
    *("trainer.per_device_train_batch_size=8", "trainer.gradient_accumulation_steps=2", "trainer.logging_steps=1"),
    *("trainer.learning_rate=3e-3", "trainer.lr_scheduler_type=constant", "evaluation=loss", "task.predict=false"),
    *("data.max_eval_samples=32", "evaluation.baseline=false"),
]
PLAIN = [f"trainer.{part}=false" for part in ("compile", "fused_linear", "fused_experts", "fused_attention",
                                              "fused_loss")]  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {kind: write(kind, root / kind, **WIDTHS) for kind in KINDS}


def run(base: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    return Run(compose([*QUICK, f"model.name={base}", *overrides]), folder).execute()


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / "history.json").read_text()) if "loss" in entry]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("tokens", "picks", "experts"), [(37, 2, 5), (2048, 8, 128), (3, 1, 16)])
def test_kernels_of_routed_rows_compute_as_their_twins(
    dtype: torch.dtype, tokens: int, picks: int, experts: int
) -> None:
    torch.manual_seed(0)
    depth, columns, rank = 256, 384, 16
    index = torch.rand(tokens, experts, device="cuda").topk(picks).indices
    _, source, positions, offsets = grouped.route_tokens(index, experts)
    x = torch.randn(tokens, depth, device="cuda", dtype=torch.bfloat16)
    weight = (torch.randn(experts, columns, depth, device="cuda") / 16).to(dtype)
    a = torch.randn(experts, rank, depth, device="cuda", dtype=torch.bfloat16) / 16
    b = torch.randn(experts, columns, rank, device="cuda", dtype=torch.bfloat16)
    xa = grouped.multiply_low_rank(x, a, offsets, source)
    pairs = [(xa, grouped.matmul_plain(x, a, offsets, x.dtype, source=source))]
    scale = torch.rand(tokens, 1, device="cuda") if dtype.itemsize == 1 else None
    options = {"source": source, "scale": scale, "xa": xa, "b": b}
    rows = grouped.matmul(x.to(dtype), weight, offsets, torch.bfloat16, **options)
    pairs += [(rows, grouped.matmul_plain(x.to(dtype), weight, offsets, torch.bfloat16, **options))]
    pairs += [(grouped.combine(rows, positions), grouped.combine_plain(rows, positions))]
    pairs += [(grouped.sum_rows(xa, x, offsets, source), grouped.sum_rows_plain(xa, x, offsets, source))]
    for actual, expected in pairs:
        torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=1e-2 * float(expected.abs().max()))
    assert torch.equal(rows, grouped.matmul(x.to(dtype), weight, offsets, torch.bfloat16, **options))


@pytest.mark.parametrize(
    ("tokens", "picks", "experts"), [(16384, 8, 128), (100_000, 4, 300), (37, 2, 5), (1, 1, 1), (0, 2, 4)]
)
def test_picks_are_sorted_as_their_twin_sorts_them(tokens: int, picks: int, experts: int) -> None:
    index = torch.rand(tokens, experts, device="cuda").topk(picks).indices
    for actual, expected in zip(grouped.route_tokens(index, experts), grouped.route_plain(index, experts), strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_learns_on_the_fast_step_what_it_learns_on_the_plain_one(
    kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    run(bases[kind], tmp_path / "plain", *PLAIN)
    run(bases[kind], tmp_path / "fast")
    plain, fast = losses(tmp_path / "plain"), losses(tmp_path / "fast")
    assert plain[-1] < 0.95 * plain[0]
    assert fast == pytest.approx(plain, rel=0.02)
    assert fast[0] == pytest.approx(plain[0], rel=2e-3)


def test_the_same_run_has_the_same_bits_with_layers_computed_again_or_experts_kept_decoded(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = ["trainer.deterministic=true", "trainer.gradient_checkpointing=false"]
    for name, overrides in {"once": [], "again": [], "checkpointed": ["trainer.gradient_checkpointing=true"]}.items():
        run(bases["qwen3_moe"], tmp_path / name, *exact, *overrides)
    build = FastStep.__init__

    def build_and_keep(step: FastStep, *args: Any) -> None:
        build(step, *args)
        step.keep(2)

    monkeypatch.setattr(FastStep, "__init__", build_and_keep)  # a budget does not go with `trainer.deterministic`
    run(bases["qwen3_moe"], tmp_path / "kept", *exact)
    names = ("once", "again", "checkpointed", "kept")
    digests = {name: adapter_digest(tmp_path / name / "adapter") for name in names}
    assert len(set(digests.values())) == 1, digests


def test_8_bit_matmuls_learn_about_the_same(bases: dict[str, Path], tmp_path: Path) -> None:
    run(bases["qwen3_moe"], tmp_path / "bf16")
    run(bases["qwen3_moe"], tmp_path / "fp8", "quantization.compute=fp8")
    assert losses(tmp_path / "fp8") == pytest.approx(losses(tmp_path / "bf16"), rel=0.05)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_a_trained_mixture_is_merged_to_the_same_answers(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    run(bases[kind], tmp_path)
    Run(compose([*QUICK, f"model.name={bases[kind]}", "task=merge"]), tmp_path).execute()
    assert json.loads((tmp_path / "merge_report.json").read_text())["accepted"]
