"""Two runs side by side: the keys of their configs that differ, and their answers to the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from qlora.errors import DamagedFile
from qlora.reporting.rendering import plain_value
from qlora.reporting.runs_page_parts import Answers, SideBySide
from qlora.runtime.atomic_files import read_lines
from qlora.runtime.console import say
from qlora.runtime.run_folder import RunFolder, is_below
from qlora.runtime.saved_run import RESULTS, read_result
from qlora.sweep.jobs import UNNAMED_KEYS
from qlora.text import plural, prompt_core, shorten, shorten_cells, terminal_width

ON_SCREEN = 5
"""The answers that are printed."""
MOST_NAME, WIDEST = 24, 120
"""Characters of a run's name beside its answer, and of a line on a wide terminal."""
MODEL_FACTS = ("model.architecture", "model.license", "model.gated")
"""What follows from the name of the model."""


def lay_side_by_side(names: Sequence[str], folders: Sequence[Path], configs: Sequence[Mapping[str, Any]]) -> SideBySide:
    """Returns what differs between two runs; a run without a config that can be read has no settings."""
    first, second = configs
    left_out = UNNAMED_KEYS if first.get("model.name") == second.get("model.name") else (*UNNAMED_KEYS, *MODEL_FACTS)
    keys = [key for key in dict.fromkeys([*first, *second]) if not is_below(key, left_out)] if all(configs) else []
    texts = [(key, _text(first.get(key)), _text(second.get(key))) for key in keys]
    said = [_answers(folder) for folder in folders]
    shared = [key for key in said[0] if key in said[1]]
    answers = [Answers(key[0], key[1], said[0][key], said[1][key]) for key in shared]
    return SideBySide(
        (names[0], names[1]),
        [line for line in texts if line[1] != line[2]],
        all(configs),
        len(answers),
        [answer for answer in answers if answer.first != answer.second],
    )


def _text(value: Any) -> str:
    """Returns a config's value; "" for null, which is what a key that is missing there means."""
    return "" if value is None else plain_value(value)


def _answers(folder: Path) -> dict[tuple[str, str | None, int], str]:
    """Returns the answers in a run's folder by question, reference, and how often both came before."""
    answers: dict[tuple[str, str | None, int], str] = {}
    for record in _records(folder):
        asked = prompt_core(str(record.get("input", record.get("prompt", ""))))
        expected = record.get("reference")
        key = (asked, None if expected is None else str(expected))
        count = next(number for number in range(len(answers) + 1) if (*key, number) not in answers)
        answers[(*key, count)] = str(record.get("prediction", ""))
    return answers


def _records(folder: Path) -> list[dict[str, Any]]:
    """Returns what the task of the result answered; [] where nothing was, or the file is damaged."""
    names = {"evaluate.json": "evaluate.jsonl"}
    for result in RESULTS:
        try:
            if read_result(folder / result) is not None:
                path = folder / names.get(result, RunFolder(folder).predictions.name)
                return [row for row in read_lines(path) if isinstance(row, dict)] if path.is_file() else []
        except (DamagedFile, OSError, ValueError):
            return []
    return []


def print_side_by_side(pair: SideBySide) -> None:
    """Prints the settings that differ, and the first answers that do."""
    first, second = pair.names
    say(Text(f"{first} beside {second}", style="bold"))
    if not pair.knows_configs:
        say("  the config of one of them is not known")
    for key, one, other in pair.settings:
        half = max((terminal_width() - len(key) - 7) // 2, 20)
        values = shorten_cells([value or "–" for value in (one, other)], half)
        say(Text.assemble((f"  {key}  ", "cyan"), " | ".join(values)))
    if pair.knows_configs and not pair.settings:
        say("  their configs are equal")
    if not pair.shared:
        say("  there are no answers to the same rows")
        return
    alike = pair.shared - len(pair.differing)
    same = "" if not alike else ", all of them alike" if not pair.differing else f", {alike:,} of them alike"
    say(f"  both answered {plural(pair.shared, 'row')}{same}")
    names = shorten_cells(pair.names, MOST_NAME)
    indent, width = max(map(len, names)), min(terminal_width(), WIDEST)
    for answer in pair.differing[:ON_SCREEN]:
        say(Text.assemble("  ", shorten(answer.asked, width - 2)))
        for name, text in zip(names, (answer.first, answer.second), strict=True):
            said = shorten(text, width - indent - 8) or "(nothing)"
            say(Text.assemble((f"      {name.ljust(indent)}  ", "dim"), said))
    if len(pair.differing) > ON_SCREEN:
        say(f"  and {len(pair.differing) - ON_SCREEN:,} more, on the page")
