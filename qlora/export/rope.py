"""How rotary positions are written: the base of their frequencies, what stretches them, and llama 3's table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

PLAIN_YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None, "mscale": None, "mscale_all_dim": None}
"""What llama.cpp assumes of YaRN where the file says nothing."""
TYPES = ("default", "linear", "llama3", "yarn")


def check_rope(config: Any) -> str | None:
    """Returns what of a model's rope has no form in GGUF; None: all has one."""
    rope = full_rope(config)
    kind = rope.get("rope_type", "default")
    if kind not in TYPES:
        return f"rope of the type {kind}"
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        return "a part of each head rotated"
    if kind == "yarn":
        changed = [name for name, value in PLAIN_YARN.items() if rope.get(name, value) not in (value, None)]
        changed += ["truncate"] if rope.get("truncate") is False else []
        return f"YaRN and its {changed[0]}" if changed else None
    sliding = sliding_rope(config)
    if sliding is not None and sliding.get("rope_type", "default") != "default":
        return "scaled rope in layers with a sliding window"
    return None


def write_rope(writer: Any, gguf: Any, config: Any) -> None:
    """Writes base and scaling; raises nothing, as `check_rope` has refused what has no form."""
    rope, sliding = full_rope(config), sliding_rope(config)
    kind = rope.get("rope_type", "default")
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if sliding is not None:
        writer.add_rope_freq_base_swa(float(sliding["rope_theta"]))
    if kind in ("linear", "yarn"):
        scaling = gguf.RopeScalingType.LINEAR if kind == "linear" else gguf.RopeScalingType.YARN
        writer.add_rope_scaling_type(scaling)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(int(original))


def rope_table(config: Any) -> Tensor | None:
    """Returns the factors by which llama 3 divides each frequency, float32 [half a head]; None: there are none."""
    rope = full_rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = 2 * len(scaled)
    plain = 1.0 / (rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    return plain / scaled


def full_rope(config: Any) -> dict[str, Any]:
    """Returns the rope of layers that attend to all tokens."""
    rope = config.rope_parameters
    return dict(rope.get("full_attention", rope))


def sliding_rope(config: Any) -> dict[str, Any] | None:
    """Returns the rope of layers with a sliding window, where it is one of its own."""
    rope = config.rope_parameters.get("sliding_attention")
    return None if rope is None else dict(rope)
