"""Matmuls of a few rows with weights in 4 bits, on a GPU."""

import pytest
import torch

from qlora.generation import few_rows
from tests.generation.test_few_rows import quantize

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "nested"), [("nf4", True), ("nf4", False), ("fp4", True)])
@pytest.mark.parametrize(
    ("members", "columns"),
    [([512, 256, 256], 1024), ([9000 - 8, 96], 512), ([64], 896), ([48, 16], 64), ([256], 20480)],
)
def test_the_kernel_multiplies_as_its_twin(kind, nested, dtype, members, columns):
    weight = quantize(sum(members), columns, kind, nested=nested, device="cuda")
    assert few_rows.unsupported_reason(weight, dtype, members) is None
    for rank in (0, 16, 64):
        a = torch.randn(len(members) * rank, columns, dtype=dtype, device="cuda") if rank else None
        b = torch.randn(sum(members), rank, dtype=dtype, device="cuda") / 8 if rank else None
        for rows in (1, 5, 8, 9, 16, 23, 32):
            x = torch.randn(rows, columns, dtype=dtype, device="cuda")
            actual, expected = (
                few_rows.multiply(x, weight, a, b, members),
                few_rows.multiply_plain(x, weight, a, b, members),
            )
            distance = (actual.float() - expected.float()).norm() / expected.float().norm()
            assert distance < 2 * torch.finfo(dtype).eps, (rank, rows)
            assert torch.equal(actual, few_rows.multiply(x, weight, a, b, members))


def test_a_graph_replays_it():
    weight = quantize(256, 256, device="cuda")
    x = torch.randn(4, 256, dtype=torch.bfloat16, device="cuda")
    expected = few_rows.multiply(x, weight, None, None, [256])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = few_rows.multiply(x, weight, None, None, [256])
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
