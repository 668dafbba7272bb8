"""What a value that its field cannot hold was meant to be: `10%` is 0.1, `2k` tokens are 2048, `a b` is a list."""

from __future__ import annotations

import math
import re
from typing import get_origin

from qlora.config.fields import field_type
from qlora.config.override_spelling import is_whole

NUMBER = r"([+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)"
PERCENT = re.compile(rf"{NUMBER}\s*(?:%|percent)")
THOUSANDS = re.compile(r"(\d+(?:\.\d+)?)\s*[kK]")
QUOTIENT = re.compile(rf"{NUMBER}\s*([/*])\s*{NUMBER}")
RANGE = re.compile(rf"{NUMBER}(?:\.\.+|:|-)(\d.*)")
UNIT = re.compile(rf"{NUMBER}\s*[A-Za-z]+")
WORDS = re.compile(r"[\w.:-]+(?: +[\w.:-]+)*")


def meant_value(key: str, value: str) -> str | None:
    """Returns the override that `key=value` was probably meant to be; None: that is not known."""
    if value == "null":
        return None
    hint = field_type(key)
    if get_origin(hint) is list or hint is list:
        return f"{key}=[{','.join(value.split())}]" if WORDS.fullmatch(value) else None
    kinds = {int, float} & {hint, *getattr(hint, "__args__", ())}
    if not kinds:
        return None
    if (limits := RANGE.fullmatch(value)) and re.fullmatch(NUMBER, limits[2]):
        return f"-m {key}={limits[1]},{limits[2]}"
    number = _number(key, value)
    if number is None or not math.isfinite(number) or (is_whole(hint) and number != int(number)):
        return None
    return f"{key}={_spell(number)}"


def _number(key: str, value: str) -> float | None:
    if match := PERCENT.fullmatch(value):
        return float(match[1]) / 100
    if match := THOUSANDS.fullmatch(value):
        return float(match[1]) * (1024 if "len" in key else 1000)
    if (match := QUOTIENT.fullmatch(value)) and not (match[2] == "/" and float(match[3]) == 0):
        first, second = float(match[1]), float(match[3])
        return first / second if match[2] == "/" else first * second
    match = UNIT.fullmatch(value)
    return float(match[1]) if match else None


def _spell(number: float) -> str:
    return str(int(number)) if number == int(number) and abs(number) < 1e15 else f"{number:.6g}"
