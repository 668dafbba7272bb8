"""Long rows learn the same as others do: feed-forward layers in chunks, outputs of attention kept, both on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora.runtime import long_rows
from qlora.step.kernels import chunked, kept_attention
from qlora.step.kernels.attention import attend_plain
from qlora.step.kernels.kept_attention import attend_kept
from tests.step.test_fast import OWN, batch, build, build_step, learn

ATTENDING = "trainer.fused_attention=true"


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_rows, "LONG", 23)
    monkeypatch.setattr(long_rows, "CHUNK", 13)


def compare(model: Any, config: Any, rows: dict[str, torch.Tensor], *, offloaded: int = 0, bound: float = 1e-5) -> None:
    """The gradients of a step of long rows are those of the plain step."""
    expected, gradients = learn(model.train(), rows, num_items_in_batch=31)
    step = build_step(model, config)
    step.checkpointed, step.offloaded = len(step.layers), offloaded
    kinds = [type(module) for module in model.modules()]
    with step:
        actual, fused = learn(model, rows, num_items_in_batch=31)
    assert actual == pytest.approx(expected, rel=1e-5)
    assert fused.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (fused[name] - gradient).norm() < bound * gradient.norm(), name
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packs"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "phi3", "gemma2", "gpt_neox"])
def test_long_rows_learn_the_same(model_type: str, packed: bool) -> None:
    model, config = build(model_type, (ATTENDING,), **OWN.get(model_type, {}))
    compare(model, config, batch(packed=packed), bound=1e-4 if model_type == "gemma2" else 1e-5)  # its tanh


@pytest.mark.parametrize("offloaded", [1, 3])
def test_long_rows_learn_the_same_with_what_layers_keep_on_the_host(offloaded: int) -> None:
    model, config = build(overrides=(ATTENDING,))
    compare(model, config, batch(packed=True), offloaded=offloaded)


def test_attention_of_long_rows_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = build(overrides=(ATTENDING,))
    step = build_step(model, config)
    step.checkpointed = step.offloaded = 3
    computed, attend = [], kept_attention.attend_in_blocks
    monkeypatch.setattr(kept_attention, "attend_in_blocks", lambda *args: computed.append(1) or attend(*args))
    with step:
        learn(model, batch(packed=True), num_items_in_batch=31)
    assert len(computed) == 3


def test_a_chunk_of_a_feed_forward_layer_is_computed_twice_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = build(overrides=(ATTENDING,))
    step = build_step(model, config)
    step.checkpointed = 3
    sizes, call = [], chunked._call_inner
    monkeypatch.setattr(step._calls._chunked, "_call", lambda layer, x: sizes.append(x.shape[1]) or call(layer, x))
    with step:
        learn(model, batch(), num_items_in_batch=31)
    assert sizes == [12] * 4 * 3 * 2  # 2 rows of 24 tokens in 4 chunks


def test_chunks_draw_the_same_masks_of_dropout_again() -> None:
    model, config = build(overrides=(ATTENDING, "lora.dropout=0.5"))
    step = build_step(model, config)
    step.checkpointed = 3
    mlp = step.layers[0].mlp
    x = torch.randn(1, 48, 256, requires_grad=True)
    trained = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
    results = []
    with step:
        step._calls.begin(48)
        for compute in (mlp, lambda x: torch.cat([type(mlp).inner.forward(mlp, part) for part in x.split(12, 1)], 1)):
            torch.manual_seed(3)
            out = compute(x)
            after = torch.rand(1)
            torch.manual_seed(11)
            results.append([out, after, *torch.autograd.grad(out.square().sum(), [x, *trained])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_rows_that_are_not_long_are_computed_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_rows, "LONG", 24)
    monkeypatch.setattr(chunked.ChunkedLayers, "enter", lambda *_: pytest.fail("a chunk"))
    monkeypatch.setattr(kept_attention, "attend_in_blocks", lambda *_: pytest.fail("a kept output"))
    model, config = build(overrides=(ATTENDING,))
    compare(model, config, batch(packed=True))


@pytest.mark.matrix(1)
@pytest.mark.parametrize("compute", ["native", "fp8"])
def test_compiled_long_rows_share_their_code(compute: str) -> None:
    chosen = ("trainer.compile=true", f"quantization.compute={compute}", ATTENDING)
    model, config = build(overrides=chosen)
    rows, actual = batch(packed=True), []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = build_step(model, config)
    frames = []
    for step.checkpointed in (0, 3, 3):
        with step:
            actual.append(learn(model, rows, num_items_in_batch=31))
        frames.append(torch._dynamo.utils.counters["frames"]["ok"])
    (loss, gradients), (other, others), _ = actual
    assert other == pytest.approx(loss, rel=2e-2 if compute == "fp8" else 1e-5)
    bound = 0.1 if compute == "fp8" else 1e-4
    assert all((others[name] - gradient).norm() <= bound * gradient.norm() for name, gradient in gradients.items())
    assert frames[1] <= frames[0] + 4  # both parts around the feed-forward layer, that, and attention: of three layers
    assert frames[2] == frames[1]


@pytest.mark.parametrize("window", [None, 5])
def test_kept_attention_is_that_of_its_twin(window: int | None) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 40, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    cu = torch.tensor([0, 11, 12, 40], dtype=torch.int32)
    ours = attend_kept(q, k, v, 0.3, cu_q=cu, max_q=28, window=window)
    theirs = attend_plain(q[0], k[0], v[0], cu, 0.3, window=window)[None]
    given = torch.randn_like(ours)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(out, (q, k, v), given) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_row_with_fewer_queries_than_keys_ends_at_its_last_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_attention, "BLOCK", 4)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 20, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    whole = torch.tensor([0, 20], dtype=torch.int32)
    expected = attend_plain(q[0], k[0], v[0], whole, 0.3)[11:][None]
    part = torch.tensor([0, 9], dtype=torch.int32)
    ours = attend_kept(q[:, 11:], k, v, 0.3, cu_q=part, cu_k=whole, max_q=9, max_k=20)
    torch.testing.assert_close(ours, expected)
    given = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(out, (q, k, v), given) for out in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b)
