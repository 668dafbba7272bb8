"""The fields of a request, read from JSON; whatever would change the answer and is not known here is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, Final

from qlora.errors import did_you_mean
from qlora.serving.refusal import Refusal
from qlora.text import brief

UNREAD: Final = ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user")
"""Fields that change no answer."""
ONLY: Final[dict[str, tuple[Any, ...]]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "frequency_penalty": (0,), "presence_penalty": (0,),
    "repetition_penalty": (1,), "logit_bias": ({},), "tools": ([],), "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "min_p": (0,), "min_tokens": (0,), "ignore_eos": (False,),
    "modalities": (["text"],), "add_generation_prompt": (True,), "continue_final_message": (False,),
    "skip_special_tokens": (True,),
}  # fmt: skip
"""Fields that only these values of are served, which change nothing; null is one more."""


class Fields:
    """The fields of a JSON object; each is read once, and those that nothing has read are refused."""

    def __init__(self, body: bytes) -> None:
        try:
            value = json.loads(body, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise Refusal(f"the body is no JSON ({error})", code="invalid_json") from error
        if not isinstance(value, dict):
            raise Refusal(f"the body must be a JSON object, not {brief(value)}", code="invalid_json")
        self.left: dict[str, Any] = value
        self.known: list[str] = []

    def take(self, name: str, rule: str, fits: Callable[[Any], bool], default: Any = None) -> Any:
        """Returns the value of a field, or `default` where it is missing or null; `rule` says what it must be."""
        self.known.append(name)
        value = self.left.pop(name, None)
        if value is None:
            return default
        if not fits(value):
            raise Refusal(f"{name} must be {rule}, got {brief(value)}", param=name, code="invalid_type")
        return value

    def number(self, name: str, low: float, high: float = math.inf, *, above: bool = False) -> float | None:
        """Returns a number from `low` (or above it) to `high`."""
        limit = f" to {high:g}" if high < math.inf else " on"
        rule = f"a number above {low:g}, up to {high:g}" if above else f"a number from {low:g}{limit}"

        def fits(value: Any) -> bool:
            return is_number(value) and (low < value if above else low <= value) and value <= high

        value = self.take(name, rule, fits)
        return None if value is None else float(value)

    def count(self, name: str, low: int, high: int | None = None) -> int | None:
        """Returns a whole number from `low` to `high`."""
        rule = f"a whole number from {low} " + ("on" if high is None else f"to {high}")
        value: int | None = self.take(
            name, rule, lambda value: is_whole(value) and low <= value and (high is None or value <= high)
        )
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """Returns true or false."""
        value: bool = self.take(name, "true or false", lambda value: isinstance(value, bool), default)
        return value

    def text(self, name: str) -> str | None:
        """Returns a text."""
        value: str | None = self.take(name, "a text", is_text)
        return value

    def close(self) -> None:
        """Raises `Refusal` for a field that changes the answer and that nothing here reads."""
        for name, value in self.left.items():
            if value is None or name in UNREAD:
                continue
            if name not in ONLY:
                near = did_you_mean(name, [*self.known, *ONLY])
                raise Refusal(f"there is no field {brief(name)} here{near}; leave it out", param=name[:64])
            if not any(
                value == served and isinstance(value, bool) == isinstance(served, bool) for served in ONLY[name]
            ):
                served = " or ".join(json.dumps(value) for value in ONLY[name])
                raise Refusal(
                    f"{name}={brief(value)} is not served here; leave it out, or send {served}", param=name,
                    code="unsupported_value",
                )  # fmt: skip


def is_number(value: Any) -> bool:
    """Returns whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def is_whole(value: Any) -> bool:
    """Returns whether a value is a whole number of up to 63 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def is_text(value: Any) -> bool:
    """Returns whether a value is a text that can be encoded: JSON can spell half a character."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")
