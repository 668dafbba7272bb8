"""How numbers, times, prompts and lines read to people."""

from __future__ import annotations

import math
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence

SHARE = re.compile(r"(^| )(exact match|accuracy|acc|acc norm|match|win rate|flexible extract|mfu|data wait)$")
DETAIL = re.compile(r"_accuracy_\w+$|/")
_ASKS = ("instruction", "human", "user", "question", "prompt", "q")
_ANSWERS = ("response", "assistant", "answer", "output", "a")
_ROLES = "|".join((*_ASKS, *_ANSWERS, "input", "context", "system"))
_HEADING = re.compile(rf"^(?:#+\s*)?({_ROLES})\s*(?::\s*(.*))?$", re.IGNORECASE)
_SHELL_WORD = re.compile(r"""(?:[^\s'"\\]|\\.|'[^']*'|"(?:\\.|[^"\\])*")+""")
_CONTROL = re.compile(r"<\|[^|<>]*\|>|</?s>|<bos>|<eos>|\[/?INST\]|(?=###\s)")


def format_metric(name: str, value: float | None) -> str:
    """Returns `value` for people: shares such as `exact_match` in percent, else four digits that matter."""
    if value is None:
        return "–"
    if is_share(name) and 0 <= value <= 1:
        return f"{format_percent(value).removesuffix('%')} %"
    if name.endswith("_count") and value.is_integer():
        return f"{value:,.0f}"
    size = abs(value)
    if not math.isfinite(value) or (0 < size < 0.001):
        return f"{value:.3g}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.{3 if size < 10 else 2 if size < 100 else 1}f}"


def is_share(name: str) -> bool:
    """Returns whether a metric's name is that of a share, which people read in percent."""
    return bool(SHARE.search(name.replace("_", " ")))


LOWER = re.compile(
    r"(^|_)(loss|perplexity|runtime|memory_gb|seconds|data_wait|memory_retries|wer|cer|mae|mse|rmse|brier|error)$"
)


def higher_is_better(name: str) -> bool:
    """Returns whether a larger value of a metric is the better one: shares, scores and speed, not losses or times."""
    if name.endswith("data_wait"):
        return False
    return is_share(name) or bool(
        re.search(r"accuracy|match|_acc|margin|f1|rouge|bleu|meteor|pearson|spearman|ndcg|mrr|per_second", name)
    )


def better_direction(name: str) -> str | None:
    """Returns `maximize` or `minimize` where a metric's name says which values are better; None: it does not."""
    return "maximize" if higher_is_better(name) else "minimize" if LOWER.search(name) else None


def is_detail(name: str) -> bool:
    """Returns whether a metric is one of many of its kind, such as a subject's accuracy: stored, not printed."""
    return bool(DETAIL.search(name))


def format_number(value: float, digits: int) -> str:
    """Returns a number with `digits` decimals; one that they would round to nothing as `<0.1`."""
    text = f"{value:,.{digits}f}"
    return f"<{10**-digits:.{digits}f}" if value > 0 and not text.strip("0.") else text


def format_percent(fraction: float, digits: int = 1) -> str:
    """Returns a share as `8.4%`: never 0% of something, or 100% of what is not all."""
    text = format_number(100 * fraction, digits)
    if fraction < 1 and float(text.lstrip("<").replace(",", "")) == 100:
        text = f">{100 - 10**-digits:.{digits}f}"
    return f"{text}%"


def format_speed(per_second: float) -> str:
    """Returns a number of tokens or rows a second: `1,210`, below ten with a decimal."""
    return format_number(per_second, 0 if per_second >= 9.95 else 1)


def format_count(parameters: int, million: str = " million") -> str:
    """Returns how many parameters there are: `8.03 billion`, `0.7 million`, and few of them to the last one.

    With another word for `million`, such as ` M`, billions are counted in millions too.
    """
    if parameters < 1e5:
        return f"{parameters:,}"
    if parameters >= 1e9 and million == " million":
        return f"{parameters / 1e9:,.2f} billion"
    return f"{parameters / 1e6:,.1f}{million}"


def format_range(name: str, low: float, high: float, *, signed: bool = False) -> str:
    """Returns `50.3 to 61.5 %`, or `1.203 to 1.310` for other metrics; `signed` writes the plus of a gain."""
    scale, unit, digits = (100, " %", 1) if is_share(name) else (1, "", 3)
    sign = "+" if signed else ""
    if signed and unit:
        unit = " points"
    limits = (f"{limit:{sign}.{digits}f}" if abs(limit) >= 0.5 * 10**-digits or not limit else f"{limit:{sign}.1g}"
              for limit in (scale * low, scale * high))  # fmt: skip
    return f"{' to '.join(limits)}{unit}"


def parse_size(text: str) -> int | None:
    """Returns the bytes of a size such as `7.5GB` (10^9 bytes each) or `22GiB` (2^30); None for any other text."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(?:([KMGT])(i?))?B", text)
    if match is None:
        return None
    number, prefix, binary = match.groups()
    unit = (1024 if binary else 1000) ** ("KMGT".index(prefix) + 1 if prefix else 0)
    return int(number) * unit if number.isdecimal() else round(float(number) * unit)


def format_duration(seconds: float) -> str:
    """Returns seconds as `0:41`, `12:05` or `3:07:00`; a number that is not finite by its name."""
    if not math.isfinite(seconds):
        return str(seconds)
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_bytes(size: float) -> str:
    """Returns a size as `1.2 GB`, `1.2 MB`, `1.2 KB` or `12 bytes`, in units of 1000."""
    for unit, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if size >= 0.9995 * unit:
            return f"{size / unit:,.1f} {prefix}B"
    return plural(size, "byte")


def plural(count: float | None, noun: str) -> str:
    """Returns a count with its noun: `1 step`, `2 steps`, `0.5 epochs`."""
    number = f"{count:,}" if isinstance(count, int) else f"{count or 0:,.4g}"
    return f"{number} {noun}{'' if count == 1 else 's'}"


def brief(value: object, width: int = 60) -> str:
    """Returns a user's value as a message shows it: in Python's spelling, on one line, at most `width` characters."""
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 3]}..."


def brief_text(text: str, width: int = 240) -> str:
    """Returns what a library says, on one line and not at length."""
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= width else shorten(line, width)


def listed(names: Iterable[object], most: int = 20) -> str:
    """Returns names as a message lists them: the first ones, and how many more there are."""
    texts = [str(name) for name in names]
    plain = [text if text.isprintable() else repr(text)[1:-1] for text in texts[:most]]
    labels = [text if len(text) <= 80 else f"{text[:77]}..." for text in plain]
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return ", ".join(labels) + more


LONGEST_MESSAGE, LONGEST_WORD, MOST_LINES = 3000, 400, 40
"""Characters of a message and of a word in it; lines. A path has fewer characters, and no remedy is longer."""


def tidy(message: str) -> str:
    """Returns a message that can be printed, whatever values it holds: without control characters, and cut in the
    middle where it or a word is too long, for it begins with what is wrong and ends with the way out."""
    text = re.sub(rf"\S{{{LONGEST_WORD + 1},}}", lambda word: _cut(word[0], LONGEST_WORD), visible(message))
    lines = text.split("\n")
    if len(lines) > MOST_LINES:
        left_out = f"  ... {len(lines) - MOST_LINES:,} lines ..."
        text = "\n".join([*lines[: MOST_LINES - 10], left_out, *lines[-10:]])
    return _cut(text, LONGEST_MESSAGE)


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    return f"{text[: 2 * most // 3]} ... {len(text) - most:,} characters ... {text[-most // 3 :]}"


INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves the cursor, colours, hides or reorders text on a terminal, and what no encoding can write."""


def visible(text: str) -> str:
    """Returns `text` with every control character but line ends and tabs as a picture of it, one for one."""
    return INVISIBLE.sub(lambda match: _picture(ord(match[0])), text)


def _picture(code: int) -> str:
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"


def terminal_width() -> int:
    """Returns the columns of the terminal, or those of `COLUMNS`; 80 where neither is known."""
    return shutil.get_terminal_size().columns


def wrap(text: str, width: int, first: str = "", rest: str = "") -> list[str]:
    """Returns a text as lines of `width` columns, broken between words; a longer word stands on a line of its own.

    The first line begins with `first`, the others with `rest`.
    """
    lines = textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False,
                          break_on_hyphens=False)  # fmt: skip
    return lines or [first.rstrip()]


def wrap_command(command: str, width: int, indent: str = "  ") -> list[str]:
    """Returns a shell command as lines that can be copied: broken between its words, with a backslash at each end."""
    lines: list[str] = []
    for word in _SHELL_WORD.findall(command):
        if lines and len(lines[-1]) + len(word) + 1 <= width - 2:
            lines[-1] += f" {word}"
        else:
            lines.append(f"{indent}  {word}" if lines else f"{indent}{word}")
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def quoted(text: str) -> str:
    """Returns a text as the value of an override: in quotes where it has special characters."""
    if re.fullmatch(r"[\w./+-]+", text):
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def shorten(text: str, width: int) -> str:
    """Returns `text` on one line of at most `width` characters; what is too much goes from its middle."""
    line = " ".join(text.split())
    if len(line) <= width:
        return line
    tail = (width - 3) // 3
    return f"{line[: width - 3 - tail].rstrip()} … {line[-tail:].lstrip()}"


def shorten_cells(texts: Sequence[str], width: int) -> list[str]:
    """Returns texts of a table's column in at most `width` characters each, so that they can be recognised.

    Of a path its end is kept, of other texts their start; where these would be alike, both ends, or the end.
    """
    lines = [" ".join(text.split()) for text in texts]
    ways = (_keep_name, _keep_both_ends, _keep_end)
    columns = [[line if len(line) <= width else keep(line, width) for line in lines] for keep in ways]
    return max(columns, key=lambda column: len(set(column)))


def _keep_name(line: str, width: int) -> str:
    """Returns the last parts of a path, or the start of its last part and of what is no path."""
    parts = line.split("/")
    for first in range(1, len(parts)):
        if len(end := "/".join(["…", *parts[first:]])) <= width:
            return end
    last = parts[-1] or line
    return last if len(last) <= width else f"{last[: width - 1].rstrip()}…"


def _keep_both_ends(line: str, width: int) -> str:
    start = width // 2
    return f"{line[:start].rstrip()}…{line[start + 1 - width :].lstrip()}"


def _keep_end(line: str, width: int) -> str:
    return f"…{line[1 - width :].lstrip()}"


def prompt_core(prompt: str) -> str:
    """Returns what a prompt asks: its last instruction and input, without preamble, headings or control tokens."""
    parts: list[tuple[str, list[str]]] = [("", [])]
    for line in _CONTROL.sub("\n", prompt).splitlines():
        heading = _HEADING.match(line.strip())
        if heading and (heading[2] is not None or line.strip().islower()):  # a bare word only as a chat role
            parts.append((heading[1].lower(), [heading[2] or ""]))
        else:
            parts[-1][1].append(line)
    asks = [index for index, (role, _) in enumerate(parts) if role in _ASKS]
    kept = [" ".join(lines) for role, lines in parts[asks[-1] if asks else 0 :] if role not in _ANSWERS]
    core = " · ".join(text for text in (" ".join(text.split()) for text in kept) if text)
    return core or " ".join(prompt.split())
