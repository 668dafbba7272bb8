"""Runs the commands of a section of the README with the embedded model, and compares what they print.

`python tools/readme_outputs.py` runs them and names each block whose lines have changed; with `--write` it puts what
was printed in their place. A block of commands (```bash) may be followed by the block of what they print (```text). In
it `...` stands for lines that are left out, and what follows `> ` is typed into a chat. Numbers and answers may differ:
machines do.

The commands name a model that is not here. In its place runs the embedded one; `plan`, which loads nothing, keeps it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
SECTION = "## Your chats on one 24 GB GPU"
BLOCKS = re.compile(r"^```bash\n(?P<commands>.*?)^```\n\n```text\n(?P<output>.*?)^```$", re.MULTILINE | re.DOTALL)
SMALL = ("model=tiny", "recipe=none", "data.template=alpaca", "data.max_length=256")
"""What stands for the model of the section."""
QUICK = (
    *("trainer.per_device_train_batch_size=16", "trainer.gradient_accumulation_steps=1"),
    *("trainer.optim=adamw_torch", "trainer.gradient_checkpointing=false", "trainer.learning_rate=2e-3"),
    *("lora.r=16", "trainer.logging_steps=50", "generation.max_new_tokens=16"),
)
"""How a model of 3 million parameters is trained in a minute."""
ROWS = 1200
LEFT_OUT = "..."
PROMPT = "> "


@dataclass(frozen=True)
class Block:
    """Commands, what they are said to print, and where that stands in the README."""

    commands: list[str]
    output: str
    start: int
    end: int

    @property
    def typed(self) -> list[str]:
        """What a person types into a chat."""
        return [line.removeprefix(PROMPT) for line in self.output.splitlines() if line.startswith(PROMPT)]


def main(args: list[str]) -> int:
    """Checks the section, or writes it with `--write`; returns the exit code."""
    text = README.read_text(encoding="utf-8")
    changed = 0
    with tempfile.TemporaryDirectory() as folder:
        write_chats(Path(folder) / "chats.jsonl", ROWS)
        outputs = [run(block, Path(folder)) for block in blocks(text)]
    for block, output in reversed([*zip(blocks(text), outputs, strict=True)]):
        if missing := differences(block.output, output):
            changed += 1
            print("\n".join([f"$ {'; '.join(block.commands)}", *(f"  no longer printed: {line}" for line in missing)]))
        if "--write" in args:
            text = text[: block.start] + shorten(block.output, output) + text[block.end :]
    if "--write" in args:
        README.write_text(text, encoding="utf-8")
        return 0
    return 1 if changed else 0


def blocks(text: str) -> list[Block]:
    """Returns the blocks of the section, in their order."""
    begin = text.index(SECTION)
    end = text.find("\n## ", begin + 1)
    return [
        Block(
            [line.partition("  #")[0] for line in match["commands"].splitlines()],
            match["output"],
            *match.span("output"),
        )
        for match in BLOCKS.finditer(text, begin, end if end >= 0 else len(text))
    ]


def write_chats(file: Path, rows: int) -> None:
    """Writes conversations of the embedded world."""
    lines = (ROOT / "qlora/demo/data/train.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
    with file.open("w", encoding="utf-8") as out:
        for row in map(json.loads, lines):
            question = "\n".join(filter(None, [row["instruction"], row.get("input")]))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
            out.write(json.dumps({"messages": turns}) + "\n")


def run(block: Block, folder: Path) -> str:
    """Returns what commands print, one after the other; raises `SystemExit` where one fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "100", "PYTHONPATH": str(ROOT)}
    output = ""
    for command in block.commands:
        done = subprocess.run(
            [sys.executable, "-m", "qlora", *small(shlex.split(command)[1:])],
            cwd=folder, env=environment, input="".join(f"{line}\n" for line in block.typed),
            capture_output=True, text=True, timeout=1800,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"$ {command}\n{done.stdout}{done.stderr}")
        output += done.stdout
    lines = output.replace(f"{folder.resolve()}/", "").replace(f"{folder}/", "").splitlines()
    if block.typed:  # a pipe shows answers alone
        answers = lines[-len(block.typed) :]
        lines[-len(block.typed) :] = [
            text for pair in zip(block.typed, answers, strict=True) for text in (PROMPT + pair[0], pair[1])
        ]
    return "\n".join(lines)


def small(args: list[str]) -> list[str]:
    """Returns the arguments of a command for the embedded model."""
    if args[0] == "plan":
        return args
    if args[0] in ("train", "preview"):
        args = [arg for arg in args if not arg.startswith("model=")]
        return [*args, *SMALL, *QUICK]
    return args


def differences(documented: str, printed: str) -> list[str]:
    """Returns the lines of a documented output that are no longer printed; numbers, and answers of a chat, aside."""
    lines, told = {outline(line) for line in printed.splitlines()}, documented.splitlines()
    answers = {index + 1 for index, line in enumerate(told) if line.startswith(PROMPT)}
    checked = [line for index, line in enumerate(told) if index not in answers and line.strip() not in ("", LEFT_OUT)]
    return [line for line in checked if outline(line) not in lines]


def outline(line: str) -> str:
    """Returns what a line is about: its label, or its words without numbers."""
    if label := re.match(r"  (\S.*?)  +\S", line):
        return label[1]
    return re.sub(r"[\d.,%]+", "0", " ".join(line.split()))


def shorten(documented: str, printed: str) -> str:
    """Returns what was printed, of the lines that the documented output has, and `...` for those between them."""
    lines, result, position = printed.splitlines(), list[str](), 0
    for documented_line in documented.splitlines():
        outlines = [outline(line) for line in lines[position:]]
        if documented_line.strip() in ("", LEFT_OUT) or outline(documented_line) not in outlines:
            continue
        index = position + outlines.index(outline(documented_line))
        result += [*_between(lines[position:index], at_start=not result), lines[index].rstrip()]
        position = index + 1
        if lines[index].startswith(PROMPT):
            result.append(lines[position].rstrip())
            position += 1
    return "\n".join([*result, *([LEFT_OUT] if any(map(str.strip, lines[position:])) else [])]) + "\n"


def _between(lines: list[str], *, at_start: bool) -> list[str]:
    """Returns what stands for lines that are left out: nothing before the first line that is shown."""
    if at_start or not lines:
        return []
    return [LEFT_OUT] if any(map(str.strip, lines)) else [""]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
