"""The section of the README that shows what commands print: `tools/readme_outputs.py` reads, runs and compares it."""

from __future__ import annotations

from pathlib import Path

import readme_outputs as tool

from qlora.config.compose import compose
from qlora.config.help import EXAMPLES

README = tool.README.read_text(encoding="utf-8")


def test_every_command_of_the_section_shows_what_it_prints() -> None:
    blocks = tool.blocks(README)
    tasks = [command.split()[1] for block in blocks for command in block.commands]
    assert tasks == ["preview", "plan", "train", "chat", "merge"]
    assert all(block.output.strip() for block in blocks)


def test_the_plan_in_the_readme_is_that_of_its_command(tmp_path: Path) -> None:
    [block] = [block for block in tool.blocks(README) if block.commands[0].startswith("qlora plan")]
    tool.write_chats(tmp_path / "chats.jsonl", tool.ROWS)
    assert tool.differences(block.output, tool.run(block, tmp_path)) == []


def test_a_line_that_is_no_longer_printed_is_named_and_numbers_may_differ() -> None:
    documented = "  needed     43.79  fits\n...\n  gone       1.0\n> Hello?\nan answer\n"
    printed = "title\n  needed     51.2  does not fit\n  weights    3.0\n> Hello?\nanother one\n"
    assert tool.differences(documented, printed) == ["  gone       1.0"]
    assert tool.shorten(documented, printed) == "  needed     51.2  does not fit\n...\n> Hello?\nanother one\n"


def test_the_embedded_model_stands_for_the_one_that_is_not_here() -> None:
    args = tool.small(["train", "data=chats.jsonl", "model=llama-3.1-8b-instruct"])
    assert "model=llama-3.1-8b-instruct" not in args
    assert tool.small(["plan", "llama-3.1-8b-instruct"]) == ["plan", "llama-3.1-8b-instruct"]
    assert compose([*tool.SMALL, *tool.QUICK]).model.name == "tiny"


def test_the_section_says_first_what_stood_for_its_model() -> None:
    section = README[README.index(tool.SECTION) :]
    before = section[: section.index("```bash")]
    assert "`model=tiny recipe=none`" in before
    assert "data.template=alpaca" in before
    assert "python tools/readme_outputs.py" in before


def test_the_first_run_takes_as_long_wherever_it_is_said() -> None:
    root = tool.README.parent
    files = ("docs/start.md", "conf/recipe/tiny_demo.yaml")
    pages = [README, *((root / name).read_text(encoding="utf-8") for name in files)]
    for text in (*pages, EXAMPLES["qlora"]):
        assert "about a minute on two CPU cores" in " ".join(text.split())
        assert "two minutes" not in text
