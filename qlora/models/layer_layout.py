"""What a decoder layer consists of, found by the classes and names of its modules: attention, recurrences, feed-forward
layers and norms, with the numbers a token that each reads and keeps."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from qlora.experts.names import SHARED
from qlora.upstream.transformers_experts import is_experts

RECURRENT = re.compile(
    r"Mamba|Delta|Lightning|Recurrent|ShortConv|LinearAttention|Rwkv|KDA|mLSTM|sLSTM|xLSTM|SSM|Mixer"
)
"""In the names of classes that mix tokens by a state, and not by comparing pairs."""
ATTENTION = re.compile(r"Attention|Attn")
OUTPUT = re.compile(
    r"^(o_proj|out_proj|down_proj|wo|Wo|w2|c_proj|output_linear|fc2|fc_out|dense|dense_4h_to_h|out_lin|lin2|"
    r"per_layer_projection|output_proj|linear2|o)$"
)
"""The names of linear layers that return to the hidden state."""
JOINED = re.compile(r"qkv|query_key_value|c_attn|Wqkv", re.IGNORECASE)


def read_layer(config: Any, index: int, modules: dict[str, nn.Module], linears: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns a layer as JSON: its linear layers with what each reads, its mixers, norms and feed-forward width."""
    mixers = _outermost({name: module for name, module in modules.items() if _is_mixer(module)})
    hidden = config.hidden_size
    described = [_mixer(config, index, name, module, linears) for name, module in mixers.items()]
    pairwise = [name for name, mixer in zip(mixers, described, strict=True) if mixer["queries"]]
    experts = [name for name, module in modules.items() if is_experts(module)]
    gates_heads = any(
        linear["name"].rpartition(".")[2] == "q_proj" and linear["outputs"] > mixer["queries"] > 0
        for linear in linears
        for mixer in described
    )
    width, is_gated, shared, shared_gate = _feed_forward(mixers, linears, hidden)
    return {
        "linears": [{**linear, "reads": _reads(linear, mixers, hidden, is_gated=gates_heads)} for linear in linears],
        "mixers": described,
        "norms": _norms(modules, mixers, described, hidden),
        "hidden_norms": sum(1 for name in modules if _is_norm(modules[name]) and "." not in name),
        "feed_forward": width,
        "is_gated": is_gated,
        "shared": shared,
        "shared_gate": shared_gate,
        "is_joined": any(JOINED.search(linear["name"]) for name in pairwise for linear in _inside(name, linears)),
        "has_experts": bool(experts),
    }


def _is_mixer(module: nn.Module) -> bool:
    name = type(module).__name__
    return (
        "Norm" not in name
        and bool(RECURRENT.search(name) or ATTENTION.search(name))
        and any(True for _ in module.parameters())
    )


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def _outermost(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Returns the modules that lie in none of the others."""
    return {
        name: module for name, module in modules.items() if not any(name.startswith(f"{other}.") for other in modules)
    }


def _inside(name: str, linears: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [linear for linear in linears if linear["name"].startswith(f"{name}.")]


def _last(linear: dict[str, Any]) -> str:
    return str(linear["name"]).rpartition(".")[2]


def _is_output(linear: dict[str, Any]) -> bool:
    return bool(OUTPUT.match(_last(linear)))


def _mixer(config: Any, index: int, name: str, module: Any, linears: list[dict[str, Any]]) -> dict[str, Any]:
    inner = _inside(name, linears)
    outputs = [linear for linear in inner if _is_output(linear)]
    returned = sum(linear["inputs"] for linear in outputs) or config.hidden_size
    made = sum(linear["outputs"] for linear in inner if linear not in outputs)
    if RECURRENT.search(type(module).__name__):
        convolutions = [part.weight for part in module.modules() if isinstance(part, nn.Conv1d)]
        channels = sum(int(weight.shape[0]) for weight in convolutions)
        state = _state(module) + sum(int(weight.numel()) for weight in convolutions)
        return _described(0, 0, returned, 0, made + channels + returned, None, state)
    by_name = {_last(linear): linear["outputs"] for linear in inner}
    expanded = by_name.get("kv_b_proj", 0)
    queries = by_name.get("q_b_proj", by_name.get("q_proj", returned)) if expanded else returned
    joined = any(JOINED.search(last) for last in by_name)
    keys = queries if expanded else max((made - queries) // 2, 0) if joined else by_name.get("k_proj", 0)
    kept = 2 * queries + expanded + returned if expanded else made + returned
    heads = int(config.num_attention_heads)
    return _described(queries, keys, returned, heads, kept, _window(config, index, module), 0)


def _described(
    queries: int, keys: int, values: int, heads: int, kept: int, window: int | None, state: int
) -> dict[str, Any]:
    return {
        "queries": queries, "keys": keys, "values": values, "heads": heads, "kept": kept, "window": window,
        "state": state,
    }  # fmt: skip


def _state(module: Any) -> int:
    """Returns the multiplications a token with the state of a recurrence.

    A delta rule reads the state twice and writes it once; Mamba and linear attention read it and write it.
    """
    sizes = [getattr(module, name, None) for name in ("num_v_heads", "head_k_dim", "head_v_dim")]
    if all(isinstance(size, int) for size in sizes):
        return 3 * sizes[0] * sizes[1] * sizes[2]  # type: ignore[operator]
    states = getattr(module, "ssm_state_size", getattr(module, "state_size", None))
    width = getattr(module, "intermediate_size", None)
    if isinstance(states, int) and isinstance(width, int):
        return 2 * width * states
    heads, size = (
        getattr(module, "num_heads", getattr(module, "num_attention_heads", None)),
        getattr(module, "head_dim", None),
    )
    if isinstance(heads, int) and isinstance(size, int):
        return (3 if "Delta" in type(module).__name__ else 2) * heads * size * size
    return 0


def _window(config: Any, index: int, module: Any) -> int | None:
    """Returns how many tokens attention looks back at most; None: all of them."""
    types = getattr(config, "layer_types", None)
    kind = types[index] if isinstance(types, list) and index < len(types) else None
    if kind == "chunked_attention":
        return getattr(config, "attention_chunk_size", None)
    window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    if kind is not None and "sliding" not in kind:
        return None
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return window if isinstance(window, int) and window > 0 else None


def _feed_forward(
    mixers: dict[str, nn.Module], linears: list[dict[str, Any]], hidden: int
) -> tuple[int, bool, int, str]:
    """Returns the width of what computes every token, whether it is gated, and the width and gate of shared experts."""
    outside = [linear for linear in linears if not any(linear["name"].startswith(f"{name}.") for name in mixers)]
    outputs = [linear for linear in outside if _is_output(linear) and linear["path"] != linear["name"]]
    width = sum(linear["inputs"] for linear in outputs)
    made = sum(linear["outputs"] for linear in outside if linear["inputs"] == hidden and not _is_output(linear))
    shared = [linear for linear in outputs if SHARED.search(f".{linear['name']}.")]
    gates = [linear["name"] for linear in outside if linear["outputs"] == 1 and "shared" in linear["name"]]
    return width, made >= 2 * width > 0, sum(linear["inputs"] for linear in shared), gates[0] if gates else ""


def _reads(linear: dict[str, Any], mixers: dict[str, nn.Module], hidden: int, *, is_gated: bool) -> str:
    """Returns what a linear layer reads, by a name that layers share that read the same."""
    inside = next((name for name in mixers if linear["name"].startswith(f"{name}.")), None)
    if _is_output(linear):
        if inside is not None:
            return "gated heads" if is_gated else "heads"
        return f"{linear['name'].rpartition('.')[0]} product"
    if linear["inputs"] != hidden:
        return str(linear["name"])
    return "attention" if inside is not None else "mlp"


def _norms(
    modules: dict[str, nn.Module], mixers: dict[str, nn.Module], described: list[dict[str, Any]], hidden: int
) -> list[list[int]]:
    """Returns for each norm the numbers of a token that it reads, and how many rows they are."""
    norms = []
    for name, module in modules.items():
        if not _is_norm(module):
            continue
        weight = getattr(module, "weight", None)
        size = int(weight.numel()) if weight is not None else hidden
        position = next((at for at, mixer in enumerate(mixers) if name.startswith(f"{mixer}.")), None)
        width = size
        if position is not None:
            mixer, last = described[position], name.rpartition(".")[2]
            read = {"q": mixer["queries"], "k": mixer["keys"], "v": mixer["keys"]}.get(last[0], mixer["values"])
            is_of_heads = re.match(r"[qkv]_?(layer)?norm|(query|key)_(layer)?norm|norm$", last) is not None
            width = read if is_of_heads and read and read >= size and read % size == 0 else size
            width = width if weight is not None else read
        norms.append([width, max(width // size, 1)])
    return norms
