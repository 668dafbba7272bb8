"""Answers to held-out rows as pages show them: what was expected, the untuned base's answer, the trained model's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from qlora.errors import DamagedFile
from qlora.runtime.atomic_files import read_lines
from qlora.runtime.run_folder import RunFolder
from qlora.text import prompt_core

log = logging.getLogger(__name__)

Result = TypeVar("Result")

ANSWERS = 60
"""The most answers that are shown."""

_named: set[str] = set()
"""The damage that was warned of; a page of a run that is alive is written again and again."""


def read_answers(folder: RunFolder) -> list[dict[str, Any]]:
    """Returns the first answers to held-out rows, each beside that of the untuned base; before there are any, those
    of the base alone."""
    trained = intact(lambda: read_lines(folder.predictions, ANSWERS)) or []
    base = intact(lambda: read_lines(folder.base_predictions, ANSWERS)) or []
    answers_of_base = {_prompt(record): str(record.get("prediction", "")) for record in base}
    if not trained:
        return [_answer(record, str(record.get("prediction", "")), None) for record in base]
    return [
        _answer(record, answers_of_base.get(_prompt(record)), str(record.get("prediction", ""))) for record in trained
    ]


def _prompt(record: Mapping[str, Any]) -> str:
    return str(record.get("prompt") or record.get("input", ""))


def _answer(record: Mapping[str, Any], base: str | None, got: str | None) -> dict[str, Any]:
    expected = str(record.get("reference", ""))
    return {
        "asked": prompt_core(str(record.get("input") or _prompt(record))),
        "prompt": _prompt(record),
        "expected": expected,
        "base": base,
        "base_right": base is not None and _is_same(expected, base),
        "got": got,
        "right": got is not None and _is_same(expected, got),
        "note": _answer_note(record),
    }


def _is_same(expected: str, got: str) -> bool:
    return " ".join(expected.split()) == " ".join(got.split())


def _answer_note(record: Mapping[str, Any]) -> str:
    """Returns the length of an answer, and whether it was cut."""
    count, finish = record.get("answer_tokens"), record.get("finish")
    length = [] if not isinstance(count, int) else ["1 token" if count == 1 else f"{count:,} tokens"]
    return ", ".join([*length, *(["cut at generation.max_new_tokens"] if finish == "length" else [])])


def intact(read: Callable[[], Result]) -> Result | None:
    """Returns the result of `read`, or None if the file is damaged; warns of each damage once."""
    try:
        return read()
    except DamagedFile as error:
        if str(error) not in _named:
            log.warning("%s is damaged (%s); the page is written without it", error.path, error.reason)
        _named.add(str(error))
        return None
