"""The help pages and the reference say what the schema and the YAML files say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from qlora.config import help as pages
from qlora.config.command_words import read_words
from qlora.config.compose import compose
from qlora.config.fields import config_keys, field_type
from qlora.config.foreign_names import ORIGINAL_FLAGS
from qlora.config.options import CONF_DIR, group_names, option_names
from qlora.errors import UserError

DOCS = Path(__file__).parents[2] / "docs" / "configuration.md"


def page(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    pages.print_help(list(argv))
    return capsys.readouterr().out


def test_the_page_names_every_group_and_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    names = page(capsys, "--help").replace(",", " ").replace("*", " ").split()
    for group in group_names():
        assert {group, *(file.stem for file in (CONF_DIR / group).glob("*.yaml"))} <= set(names)


@pytest.mark.parametrize("columns", [80, 100])
def test_a_page_fits_the_terminal_and_has_no_line_of_blanks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for argv in [(), *((name,) for name in (*group_names(), *option_names("task")))]:
        text = page(capsys, "--help", *argv)
        assert max(map(len, text.splitlines())) <= columns, argv
        assert "\n\n\n" not in text, argv


@pytest.mark.parametrize("group", group_names())
def test_a_group_s_page_has_every_field_with_its_meaning(capsys: pytest.CaptureFixture[str], group: str) -> None:
    text = page(capsys, group, "--help")
    for key, meaning in pages.group_fields(group):
        assert f"\n  {key}: " in text
        assert meaning.split()[-1].replace("`", "") in text


def test_every_field_has_a_docstring() -> None:
    groups = {key for key in config_keys() if dataclasses.is_dataclass(field_type(key)) and "." not in key}
    documented = {key for group in groups for key, meaning in pages.group_fields(group) if meaning}
    top = {key for key, meaning in pages.field_docs()["Config"].items() if meaning}
    assert set(config_keys()) == documented | top | groups


def test_a_user_s_options_and_groups_are_listed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for group in ("lora", "team"):
        (tmp_path / group).mkdir()
        (tmp_path / group / "mine.yaml").write_text("# What I like.\nr: 3\n", encoding="utf-8")
    for flags in (["--config-dir", str(tmp_path)], [f"--config-dir={tmp_path}"], ["-cd", str(tmp_path)]):
        text = page(capsys, "--help", *flags)
        assert "mine" in text
        assert "\n  team" in text
        assert "mine         What I like." in page(capsys, "--help", "lora", *flags)


def test_an_unknown_group_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"^--help lroa: there is no such group \(did you mean lora\?\); choose one of"):
        pages.print_help(["--help", "lroa"])


def test_an_unknown_folder_is_refused() -> None:
    with pytest.raises(UserError, match="--config-dir nowhere: there is no such folder"):
        pages.print_help(["--help", "--config-dir", "nowhere"])


@pytest.mark.parametrize(
    "command", [text for text in pages.EXAMPLES if text.startswith("qlora") and "-" not in text[6:9]]
)
def test_every_example_composes(command: str) -> None:
    for word in ("seed=0,1", "--cfg job"):
        command = command.replace(word, "")
    compose(read_words(command.split()[1:]).overrides)


def test_the_reference_in_the_docs_is_up_to_date() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert text.partition("## Every key")[1:] == ("## Every key", pages.reference().removeprefix("## Every key")), (
        "run: python -m qlora.config.help docs/configuration.md"
    )


def test_every_original_flag_leads_to_a_key_or_a_choice() -> None:
    known = {*config_keys(), *group_names(), "hydra.run.dir"}
    for flag, ours in ORIGINAL_FLAGS.items():
        assert ours.partition("=")[0] in known, flag
        if "=" in ours:
            compose([ours, "quantization=none", "trainer.max_steps=1"])
