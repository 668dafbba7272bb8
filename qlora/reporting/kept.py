"""What the reports say of the step that a training run keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora.text import format_metric, listed


def kept_lines(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the line on what was kept, with its label; empty where the last step was, as nothing was compared."""
    kept = result.get("kept")
    if not isinstance(kept, Mapping):
        return []
    name = str(kept["metric"]).removeprefix("eval_")
    value, last = (format_metric(name, kept[key]) if kept[key] is not None else None for key in ("value", "last_value"))
    metric = name.replace("_", " ")
    if kept["keep"] == "best":
        what = f"step {kept['steps'][0]:,} of {kept['last_step']:,}, the best by the held-out {metric}: {value}"
    else:
        what = f"the average of the steps {listed(f'{step:,}' for step in kept['steps'])}"
        what += f", held-out {metric} {value}" if value is not None else ""
    is_last = kept["steps"] == [kept["last_step"]]
    return [("kept", what + (f" (the last step: {last})" if last is not None and not is_last else ""))]
