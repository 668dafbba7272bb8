"""The exceptions for what a user can put right, by kind, and those that end a training run early."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable
from pathlib import Path

from qlora.text import brief, tidy

OF_CODE = (TypeError, LookupError, ValueError, AttributeError, ArithmeticError, RecursionError, MemoryError)
"""What code of a user's, such as the expressions of a chat template, may raise."""


class UserError(Exception):
    """Something that the user can put right: the message says what is wrong (full key or file), why, and the way out.

    The command line prints the message alone and exits with 1; any other exception is a bug and keeps its
    traceback. No value in it is printed at length, and none can move the cursor.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(tidy(str(message)))


class ConfigError(UserError):
    """A key, an override or a combination of them asks for what cannot be done."""


class DataError(UserError):
    """A file, a data set, a model or an adapter does not hold what it must."""


class ResourceError(UserError):
    """The machine or a service lacks what the run needs: memory, disk space, a device, a package, a login."""


class RunError(UserError):
    """The run cannot start or resume here: its folder is in use, it belongs to another run, or training failed."""


class DamagedFile(DataError):
    """Says which stored file cannot be read back, and what is wrong in it."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged ({reason}); put a whole copy in its place, or remove it")
        self.path, self.reason = path, reason


def describe_fault(error: BaseException) -> str:
    """Returns in a few words why a file cannot be read, for a message that names the file."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


class Pruned(Exception):
    """Ends a training run that fell behind the others of its search; it is no mistake, and it has no result."""


class Stopped(BaseException):
    """Ends a training run that a signal asked to end; the message says what is saved and how to resume."""

    exit_code = 75
    """What a stopped run exits with; to shells (EX_TEMPFAIL) it means: try again."""


def require(fact: bool, key: str, rule: str, value: object, remedy: str = "") -> None:
    """Raises `ConfigError` unless `fact` holds: "`key` must `rule`, got `value`; `remedy`"."""
    if not fact:
        raise ConfigError(f"{key} must {rule}, got {brief(value)}" + (f"; {remedy}" if remedy else ""))


def suggest(word: str, choices: Iterable[str]) -> list[str]:
    """Returns the choices nearest to `word`, else those that hold it, at most three; none when there are none."""
    choices = list(choices)
    within = (choice for choice in choices if len(word) > 2 and word.lower() in choice.lower())
    return nearest(word, choices) or list(itertools.islice(within, 3))


def nearest(word: str, choices: Iterable[str]) -> list[str]:
    """Returns the choices nearest to `word`, at most three, in their own order; none when nothing is near."""
    from rapidfuzz.distance import OSA  # a typo pays for the import, not each start

    choices = list(dict.fromkeys(choices))
    if same := [choice for choice in choices if _letters(choice) == _letters(word)]:
        return same[:3]
    distances = [OSA.distance(word.lower(), choice.lower()) for choice in choices]  # a swap of neighbours counts 1
    near = min(distances, default=len(word))
    if near > 1 and len(word) > 2 and (longer := [choice for choice in choices if _begins(choice, word)]):
        return longer[:3]
    if near <= max(1, len(word) // 3):
        return [choice for distance, choice in zip(distances, choices, strict=True) if distance == near][:3]
    return difflib.get_close_matches(word, choices, n=3, cutoff=0.7)


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _begins(choice: str, word: str) -> bool:
    """Returns whether a choice begins with a word, whatever its signs: `llama-3.1` with `llama3`, `llama-33b` not."""
    pattern = r"[-_. ]?".join(_letters(word)) + (r"(?![0-9])" if word[-1:].isdigit() else "")
    return bool(_letters(word)) and re.match(pattern, choice.lower()) is not None


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Returns " (did you mean A or B?)" for the nearest choices, or an empty string."""
    return mean(suggest(word, choices))


def mean(choices: Iterable[str]) -> str:
    """Returns " (did you mean A or B?)", or an empty string without choices."""
    text = " or ".join(choices)
    return f" (did you mean {text}?)" if text else ""
