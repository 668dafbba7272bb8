"""On a GPU, long rows learn what others do, with the memory that is planned."""

from __future__ import annotations

import pytest
import torch

from qlora.quantization.bnb4.layers import set_compute_dtype
from qlora.runtime import long_rows
from qlora.runtime.device import Placement
from qlora.step.kernels.attention import attend_varlen
from qlora.step.kernels.kept_attention import attend_kept
from tests.step.test_fast import batch, build, build_step, learn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = Placement(torch.device("cuda"), torch.bfloat16, torch.bfloat16)


def random(heads: int, tokens: int = 320, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, tokens, heads, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
    given = torch.randn_like(ours)
    assert (ours - theirs).float().norm() < 0.01 * theirs.float().norm()
    for a, b in zip(*(torch.autograd.grad(out, inputs, given) for out in (ours, theirs)), strict=True):
        assert (a - b).float().norm() < 0.01 * b.float().norm()


def test_rows_attend_as_torch_s_own_attention() -> None:
    q, k, v = random(8, rows=2), random(2, rows=2), random(2, rows=2)
    by_heads = (part.transpose(1, 2) for part in (q, k, v))
    theirs = torch.nn.functional.scaled_dot_product_attention(*by_heads, is_causal=True, enable_gqa=True, scale=0.1)
    assert_near(attend_kept(q, k, v, 0.1), theirs.transpose(1, 2), (q, k, v))


@pytest.mark.parametrize("window", [None, 64])
def test_packs_attend_as_torch_s_own_attention(window: int | None) -> None:
    q, k, v = random(8), random(2), random(2)
    cu = torch.tensor([0, 100, 101, 320], dtype=torch.int32, device="cuda")
    theirs = attend_varlen(q[0], k[0], v[0], cu, 219, 0.1, window)[None]
    assert_near(attend_kept(q, k, v, 0.1, cu_q=cu, max_q=219, window=window), theirs, (q, k, v))


def test_a_row_with_fewer_queries_than_keys_ends_at_its_last_key() -> None:
    q, k, v = random(8), random(2), random(2)
    whole = torch.tensor([0, 320], dtype=torch.int32, device="cuda")
    expected = attend_varlen(q[0], k[0], v[0], whole, 320, 0.1)[200:][None]
    part = torch.tensor([0, 120], dtype=torch.int32, device="cuda")
    ours = attend_kept(q[:, 200:], k, v, 0.1, cu_q=part, cu_k=whole, max_q=120, max_k=320)
    assert_near(ours, expected, (q, k, v))


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packs"])
@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("offloaded", [0, 3])
def test_long_rows_learn_the_same(offloaded: int, compiled: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_rows, "CHUNK", 40)
    model, config = build(overrides=("trainer.fused_attention=auto", f"trainer.compile={compiled}"))
    model.to("cuda", torch.bfloat16)
    set_compute_dtype(model, torch.bfloat16)
    rows = {name: tensor.repeat(4, 1).cuda() for name, tensor in batch(packed=packed).items()}
    step = build_step(model, config, CUDA)
    step.checkpointed, results = 3, []
    for limit, step.offloaded in ((1000, 0), (23, offloaded)):
        monkeypatch.setattr(long_rows, "LONG", limit)
        with step, CUDA.autocast():
            results.append(learn(model, rows, num_items_in_batch=31))
    (loss, gradients), (other, others) = results
    assert other == pytest.approx(loss, rel=1e-2)
    for name, gradient in gradients.items():
        assert (others[name] - gradient).float().norm() < 0.05 * gradient.float().norm(), name
