"""Graphics cards: memory, matrix products a second without sparsity, and bandwidth, from the vendors' data sheets."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, replace

from qlora.errors import ConfigError


@dataclass(frozen=True)
class Card:
    """What a training can use of a card."""

    name: str
    memory: float
    """Bytes. A data sheet's GB are taken for 10^9, about what error correction and the driver leave of 2^30."""
    tflops: float | None
    """10^12 operations a second in 16-bit matrix products that add up in 32 bits; None: unknown."""
    fp8_tflops: float | None
    """The same in 8-bit floats; None: it has none, or unknown."""
    bandwidth: float | None
    """10^9 bytes a second; None: unknown."""


def _card(name: str, gb: int, tflops: float, fp8_tflops: float | None, bandwidth: float) -> Card:
    return Card(name, gb * 1e9, tflops, fp8_tflops, bandwidth)


CARDS = {
    "t4": _card("T4", 16, 65, None, 320),
    "v100-32gb": _card("V100-SXM2-32GB", 32, 125, None, 900),
    "rtx-3090": _card("GeForce RTX 3090", 24, 71, None, 936),
    "rtx-4090": _card("GeForce RTX 4090", 24, 165.2, 330.3, 1008),
    "rtx-5090": _card("GeForce RTX 5090", 32, 209.5, 419, 1792),
    "a10": _card("A10", 24, 125, None, 600),
    "l4": _card("L4", 24, 121, 242.5, 300),
    "a6000": _card("RTX A6000", 48, 154.8, None, 768),
    "l40s": _card("L40S", 48, 362, 733, 864),
    "a100-40gb": _card("A100-SXM4-40GB", 40, 312, None, 1555),
    "a100-80gb": _card("A100-SXM4-80GB", 80, 312, None, 2039),
    "h100": _card("H100 80GB HBM3", 80, 989.4, 1978.9, 3350),
    "h200": _card("H200", 141, 989.4, 1978.9, 4800),
}
"""By the names that `plan.device` takes; the vendor's driver calls them by `Card.name` behind its own."""


def find_card(wanted: str) -> Card:
    """Returns the card of `plan.device`; `this` asks the driver. Raises `ConfigError` where there is none."""
    return _this_card() if wanted == "this" else CARDS[wanted]


def _this_card() -> Card:
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
        lines = done.stdout.splitlines() if done.returncode == 0 else []
    except (OSError, subprocess.SubprocessError):
        lines = []
    if not lines:
        why = "nvidia-smi finds none" if shutil.which("nvidia-smi") else "there is no nvidia-smi"
        raise ConfigError(
            f"plan.device=this: no NVIDIA GPU is here ({why}); name the card to plan for, e.g. plan.device=a6000"
        )
    name, mebibytes = (part.strip() for part in lines[0].rsplit(",", 1))
    known = [card for card in CARDS.values() if _plain(name).endswith(_plain(card.name))]
    card = known[0] if known else Card(name, 0, None, None, None)
    return replace(card, name=name, memory=float(mebibytes) * 2**20)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
