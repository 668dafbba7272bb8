"""Packed rows are kept apart by recurrent layers, too, where their kernels are installed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from qlora.errors import UserError
from qlora.models.cu_seqlens import hand_cu_seqlens, varlen_arguments
from qlora.models.packing_guard import check_packing
from qlora.runtime.device import Placement

FP32 = Placement(torch.device("cpu"), torch.float32, torch.float32)
SHAPE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
         "num_key_value_heads": 2, "vocab_size": 120, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
         "linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "use_cache": False, "pad_token_id": 0,
         "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
MODULE = "transformers.models.qwen3_next.modeling_qwen3_next"


def test_borders_are_where_positions_restart() -> None:
    result = varlen_arguments(torch.tensor([[0, 1, 2, 0, 1, 0]]))
    assert result["cu_seq_lens_q"].tolist() == result["cu_seq_lens_k"].tolist() == [0, 3, 5, 6]
    assert (result["max_length_q"], result["max_length_k"]) == (3, 3)
    assert result["seq_idx"].tolist() == [[0, 0, 0, 1, 1, 2]]
    assert varlen_arguments(torch.tensor([[4, 5, 0]]))["cu_seq_lens_q"].tolist() == [0, 2, 3]


def kernels(modeling: Any) -> dict[str, ModuleType]:
    """Stand for the packages, which have no CPU kernels: each row alone through what transformers computes without."""

    def by_row(function: Callable[..., Any], dim: int, *tensors: Tensor, lengths: list[int], **options: Any) -> Tensor:
        rows = zip(*(tensor.split(lengths, dim) for tensor in tensors), strict=True)
        outputs = [function(*row, **options) for row in rows]
        return torch.cat([output[0] if isinstance(output, tuple) else output for output in outputs], dim)

    convolve, attend = (
        function.__wrapped__ for function in (modeling.causal_conv1d_fn, modeling.torch_chunk_gated_delta_rule)
    )

    def causal_conv1d_fn(x: Any, weight: Any, bias: Any = None, seq_idx: Any = None, activation: Any = None) -> Tensor:
        lengths = (
            [x.shape[-1]] if seq_idx is None else torch.unique_consecutive(seq_idx[0], return_counts=True)[1].tolist()
        )
        return by_row(lambda row: convolve(row, weight, bias, activation), 2, x, lengths=lengths)

    def chunk_gated_delta_rule(
        query: Any, key: Any, value: Any, g: Any, beta: Any, cu_seqlens: Any = None, initial_state: Any = None,
        output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        lengths = [query.shape[1]] if cu_seqlens is None else cu_seqlens.diff().tolist()

        def row(q: Any, k: Any, v: Any, decay: Any, b: Any) -> Any:
            return attend(q, k, v, g=decay, beta=b, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)

        return by_row(row, 1, query, key, value, g, beta, lengths=lengths), None

    convolution, attention = ModuleType("causal_conv1d"), ModuleType("fla")
    convolution.causal_conv1d_fn = causal_conv1d_fn  # type: ignore[attr-defined]
    rule = SimpleNamespace(chunk_gated_delta_rule=chunk_gated_delta_rule)
    attention.ops = SimpleNamespace(gated_delta_rule=rule)  # type: ignore[attr-defined]
    return {"causal_conv1d": convolution, "fla": attention}


@pytest.fixture
def modeling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of Qwen3-Next, imported anew with the packages that the test names."""
    plain: Any = importlib.import_module(MODULE)
    packages = kernels(plain)
    with monkeypatch.context() as patch:
        for name in request.param:
            patch.setitem(sys.modules, name, packages[name])
        patch.delitem(sys.modules, MODULE)
        yield importlib.import_module(MODULE)
    sys.modules[MODULE] = plain


def build(modeling: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = modeling.Qwen3NextForCausalLM(AutoConfig.for_model("qwen3_next", **SHAPE)).eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
    hand_cu_seqlens(model)
    return model


@pytest.mark.parametrize("modeling", [["causal_conv1d", "fla"]], indirect=True)
def test_with_kernels_rows_of_a_pack_are_kept_apart(modeling: Any) -> None:
    model = build(modeling)
    check_packing(model, FP32, batch_size=1)
    ids = torch.arange(20)[None] + 3
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions).logits
        alone = torch.cat([model(input_ids=part).logits for part in (ids[:, :12], ids[:, 12:])], 1)
        run_on = model(input_ids=ids).logits
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert (run_on - alone).abs().max() > 0.01


@pytest.mark.parametrize("modeling", [["causal_conv1d", "fla"]], indirect=True)
def test_several_packs_in_a_batch_are_refused_with_the_way_out(modeling: Any) -> None:
    with pytest.raises(
        UserError, match=r"recurrent layers .* only with trainer\.per_device_train_batch_size=1 \(got 2\)"
    ):
        check_packing(build(modeling), FP32, batch_size=2)


@pytest.mark.parametrize(
    ("modeling", "package"),
    [([], "causal_conv1d"), (["causal_conv1d"], "flash-linear-attention")],
    indirect=["modeling"],
)
def test_without_a_kernel_its_package_is_named(modeling: Any, package: str) -> None:
    message = rf"recurrent layers of qwen3_next .* kernels of {package}, .*; pip install 'qlora\[linear\]'"
    with pytest.raises(UserError, match=message):
        check_packing(build(modeling), FP32, batch_size=1)
