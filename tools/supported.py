"""Writes the README's table of what is supported, from the registries and the folders of `conf/`.

`python tools/supported.py` writes it anew; `tests/test_supported.py` holds that it is up to date.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from qlora.config.addresses import SCHEMES
from qlora.config.optimizers import SCHEDULES
from qlora.config.registries.chat_templates import TEMPLATES
from qlora.config.registries.data_formats import FORMAT_NAMES
from qlora.config.registries.optimizers import OPTIMIZERS
from qlora.config.registries.rope_scaling import ROPE_TYPES
from qlora.config.registries.trackers import TRACKERS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- made by: python tools/supported.py -->", "<!-- end -->"


def table() -> str:
    """Returns the table: what there is, how it is chosen, and its names."""
    presets = len(options("model"))
    rows = [
        ("models", "`model=`", f"{presets} presets, and every causal model of transformers by folder or hub id"),
        ("base weights", "`quantization=`", names(options("quantization"))),
        ("adapters, or all weights", "`lora=`", names(options("lora"))),
        ("losses", "`loss=`", names(options("loss"))),
        ("optimizers", "`trainer.optim=`", names(OPTIMIZERS)),
        ("learning rates", "`trainer.lr_scheduler_type=`", names(SCHEDULES)),
        ("stretched positions", "`model.rope_scaling=`", names(ROPE_TYPES)),
        ("rows", "`data.format=`", names(FORMAT_NAMES)),
        (
            "rows from",
            "`data.path=`",
            f"files, the hub, functions, {names(f'{scheme}://' for scheme in SCHEMES)}; whole or as a stream",
        ),
        ("chat templates", "`data.template=`", names(TEMPLATES)),
        ("measured", "`evaluation=`", names(options("evaluation"))),
        ("exported", "`export=`", names(options("export"))),
        ("trackers", "`tracking=`", names(TRACKERS)),
        ("tasks", "`task=`", names(options("task"))),
    ]
    lines = [f"| {what} | {key} | {listed} |" for what, key, listed in rows]
    return "\n".join(["| what | chosen by | names |", "|---|---|---|", *lines]) + "\n"


def options(group: str) -> list[str]:
    """Returns the names of a config group's files."""
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


def names(known: Iterable[str]) -> str:
    """Returns names as a cell holds them."""
    return ", ".join(f"`{name}`" for name in known)


def section() -> str:
    """Returns what stands between the two marks."""
    return f"{BEGIN}\n\n{table()}\n{END}"


def updated(text: str) -> str:
    """Returns a README with the table anew."""
    head, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{head}{section()}{after}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
