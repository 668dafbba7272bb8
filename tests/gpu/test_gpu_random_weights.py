"""Random weights on a GPU: a large base is quantized layer by layer there, and comes out the same each time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora.config.compose import compose
from qlora.run import Run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_large_base_never_exists_in_16_bits(tmp_path: Path, quantization: str) -> None:
    chosen = ["model=llama-7b", "model.weights=random", "model.tokenizer=tiny", f"quantization={quantization}"]
    run = Run(compose([*chosen, "model.architecture.num_hidden_layers=8"]), tmp_path).session
    torch.cuda.empty_cache()
    allocated = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    base = run.load_base()
    held, peak = torch.cuda.memory_allocated() - allocated, torch.cuda.max_memory_allocated() - allocated
    output_bytes = base.get_output_embeddings().weight.nbytes
    assert peak < held + 2 * output_bytes
    first = base.state_dict()
    again = run.load_base().state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert {parameter.device.type for parameter in base.parameters()} == {"cuda"}
