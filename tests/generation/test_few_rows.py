"""Matmuls of a few rows with weights in 4 bits."""

from importlib.resources import files

import pytest
import torch
from bitsandbytes.nn import Params4bit

from qlora.generation import few_rows
from qlora.quantization.bnb4.quantized_weight import QuantizedWeight, read_quantized_weight


def quantize(
    rows: int, columns: int, kind: str = "nf4", *, nested: bool = True, device: str = "cpu"
) -> QuantizedWeight:
    """Returns a random weight of bitsandbytes."""
    torch.manual_seed(rows)
    data = torch.randn(rows, columns, dtype=torch.bfloat16)
    weight = Params4bit(data, requires_grad=False, quant_type=kind, compress_statistics=nested, blocksize=64)
    read = read_quantized_weight(weight.to(device))
    assert read is not None
    return read


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_words_of_a_codebook_are_its_numbers_byte_by_byte(dtype):
    codebook = quantize(64, 64).codebook
    halves = few_rows._codebook_halves(codebook, dtype)
    data = b"".join((word & 0xFFFFFFFF).to_bytes(4, "little") for word in halves)
    pairs = torch.tensor([[lower, upper] for upper, lower in zip(data[:16], data[16:], strict=True)], dtype=torch.uint8)
    assert torch.equal(pairs.view(dtype).view(-1), codebook.to(dtype))


def test_the_twin_is_the_decoded_weight_and_the_adapters_of_each_layer():
    weight, members, rank = quantize(96, 128), [64, 32], 16
    x, a, b = torch.randn(3, 128), torch.randn(2 * rank, 128), torch.randn(96, rank)
    result = few_rows.multiply(x, weight, a, b, members)
    decoded = few_rows.decode_plain(weight, torch.float32).view(96, 128)
    first, second = result.split(members, 1)
    torch.testing.assert_close(first, x @ decoded[:64].t() + x @ a[:16].t() @ b[:64].t())
    torch.testing.assert_close(second, x @ decoded[64:].t() + x @ a[16:].t() @ b[64:].t())


def test_a_weight_in_32_bits_or_of_odd_rows_is_refused():
    weight = quantize(64, 64)
    assert "not in float32" in str(few_rows.unsupported_reason(weight, torch.float32, [64]))
    assert "a multiple of 16 rows" in str(few_rows.unsupported_reason(weight, torch.bfloat16, [40, 24]))


def test_the_kernels_are_in_the_package():
    assert files("qlora.generation").joinpath("few_rows.cu").is_file()
