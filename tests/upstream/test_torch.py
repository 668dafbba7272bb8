"""The private names of torch, FlashAttention and transformers' models exist and do what this project needs."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

from qlora.upstream import flash_attn, torch_attention, transformers_model
from qlora.upstream import torch as private


def test_scaled_mm_takes_row_scales_and_a_fast_accumulation() -> None:
    schema = str(torch.ops.aten._scaled_mm.default._schema)
    for parameter in ("Tensor scale_a", "Tensor scale_b", "ScalarType? out_dtype", "bool use_fast_accum"):
        assert parameter in schema


def test_foreach_kernels_compute_on_lists() -> None:
    tensors = [torch.tensor([1.0, -3.0]), torch.tensor([2.0])]
    assert [norm.item() for norm in private.foreach_norm(tensors, torch.inf)] == [3.0, 2.0]
    targets = [torch.zeros(2), torch.zeros(1)]
    private.foreach_copy(targets, tensors)
    assert all(torch.equal(a, b) for a, b in zip(targets, tensors, strict=True))


def test_the_options_of_compilation_exist_and_are_restored() -> None:
    previous_options = torch._dynamo.config.recompile_limit, torch._dynamo.config.optimize_ddp
    with private.compile_options():
        assert torch._dynamo.config.recompile_limit == torch._dynamo.config.accumulated_recompile_limit
        assert not torch._dynamo.config.optimize_ddp
        assert all(getattr(torch._functorch.config, name) is value for name, value in private.RECOMPUTE_MORE.items())
    assert (torch._dynamo.config.recompile_limit, torch._dynamo.config.optimize_ddp) == previous_options


def test_a_call_of_a_layer_can_be_replaced_and_restored() -> None:
    layer = torch.nn.Linear(2, 2)
    x, hooked = torch.ones(1, 2), []
    layer.register_forward_hook(lambda *_: hooked.append(1))
    expected = layer(x)
    private.set_layer_call(layer, lambda x: "replaced")
    assert layer(x) == "replaced"
    assert torch.equal(private.call_layer(layer, x), expected)
    private.set_layer_call(layer, None)
    assert torch.equal(layer(x), expected)
    assert len(hooked) == 3


def test_ddp_reads_the_names_that_it_ignores() -> None:
    model = torch.nn.Linear(2, 2)
    private.ignore_in_ddp(model, ["weight"])
    assert model._ddp_params_and_buffers_to_ignore == ["weight"]
    assert "_ddp_params_and_buffers_to_ignore" in inspect.getsource(DistributedDataParallel.__init__)


def test_without_a_dead_worker_there_is_no_error() -> None:
    assert private.raise_if_worker_died() is None


def test_a_scheduler_reports_the_rate_that_was_set() -> None:
    scheduler = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0))
    private.set_last_rate(scheduler, [0.25])
    assert scheduler.get_last_lr() == [0.25]


def test_a_model_computes_with_the_attention_that_was_set() -> None:
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **shape))
    assert transformers_model.takes_any_attention(model)
    previous = transformers_model.attention_of(model.config)
    transformers_model.set_attention(model.config, "eager")
    assert model.config._attn_implementation == "eager"
    transformers_model.set_attention(model.config, previous)
    assert transformers_model.attention_of(model.config) == previous
    assert not transformers_model.takes_any_attention(SimpleNamespace())
    assert transformers_model.attention_of(PretrainedConfig()) is None


def test_flash_attention_4_returns_two_results(monkeypatch: pytest.MonkeyPatch) -> None:
    interface = SimpleNamespace(_flash_attn_fwd=lambda *args: ("output", "sums", *args))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)
    flash_attn.return_two_results()
    assert interface._flash_attn_fwd("more") == ("output", "sums")


def test_attention_s_kernels_take_what_they_are_given() -> None:
    for name, parameters in {
        "_flash_attention_forward": (
            "Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, SymInt max_q, SymInt max_k, "
            "float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None, "
            "SymInt? window_size_left=None, SymInt? window_size_right=None"
        ),
        "_flash_attention_backward": (
            "Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, Tensor cum_seq_q, "
            "Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, Tensor rng_state, "
            "Tensor unused, *, float? scale=None, SymInt? window_size_left=None, SymInt? window_size_right=None"
        ),
        "_scaled_dot_product_cudnn_attention": (
            "Tensor query, Tensor key, Tensor value, Tensor? attn_bias, bool compute_log_sumexp, float dropout_p=0., "
            "bool is_causal=False, bool return_debug_mask=False, *, float? scale=None"
        ),
        "_scaled_dot_product_cudnn_attention_backward": (
            "Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, "
            "Tensor philox_seed, Tensor philox_offset, Tensor attn_bias, Tensor cum_seq_q, Tensor cum_seq_k, "
            "SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, *, float? scale=None"
        ),
    }.items():
        assert parameters in str(getattr(torch.ops.aten, name).default._schema), name


def test_cudnn_s_attention_can_be_asked_for() -> None:
    q, k = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16)
    assert not torch_attention.takes_cudnn(q, k, k)  # on a CPU
