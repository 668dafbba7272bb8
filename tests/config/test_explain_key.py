"""`--explain` says what a key is, where its value comes from, and what it means; `--version` what is installed."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from qlora import __version__, cli
from qlora.errors import UserError


def explained(capsys: pytest.CaptureFixture[str], command: str) -> list[str]:
    cli.run(["--explain", *command.split()])
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 or line.count("/") > 3 for line in lines), "a path is never broken"
    return lines


def test_the_word_wins_over_the_files_and_all_are_named_in_turn(capsys: pytest.CaptureFixture[str]) -> None:
    assert explained(capsys, "lora.r lora.r=8") == [
        "lora.r = 8",
        "  set by      the word lora.r=8",
        "  instead of  conf/recipe/tiny_demo.yaml (recipe=tiny_demo)",
        "  instead of  conf/lora/all-linear.yaml (lora=all-linear)",
        "  type        a whole number",
        "  means       Rank of the adapter matrices.",
    ]


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    ("command", "value", "line"),
    [
        ("lora.r", "32", "64 with any other model or data, lora=attention, lora=none"),
        ("lora.r data=chats.jsonl", "64", "32 with model=tiny data=demo"),
        ("trainer.num_train_epochs", "null", "3 with your own rows (trainer=own)"),
        ("trainer.num_train_epochs data=x.jsonl", "3.0", "null with data=demo and the paper's sets (trainer=paper)"),
        ("lora.dropout model=llama-33b data=alpaca", "0.05", "0.1 with any other model or data"),
    ],
)
def test_a_value_that_changes_with_model_and_data_says_with_which(
    capsys: pytest.CaptureFixture[str], command: str, value: str, line: str
) -> None:
    lines = explained(capsys, command)
    assert lines[0].endswith(f" = {value}")
    assert any(other.startswith(f"  but         {line}") for other in lines), lines


def test_a_key_of_one_value_names_no_other_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert not any(line.startswith("  but ") for line in explained(capsys, "seed"))
    assert not any(line.startswith("  but ") for line in explained(capsys, "lora.r lora.r=8"))


def test_a_key_that_nothing_sets_has_the_default_of_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    lines = explained(capsys, "lora.bias")
    assert lines[:3] == [
        "lora.bias = none",
        "  set by      the default of the schema, none",
        "  type        one of none, all, lora_only",
    ]


def test_a_user_s_file_is_named_by_its_path(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "mine.yaml").write_text("defaults: [all-linear]\nr: 3\n", encoding="utf-8")
    lines = explained(capsys, f"lora.r --config-dir {tmp_path} lora=mine recipe=none")
    assert lines[0] == "lora.r = 3"
    assert f"{tmp_path}/lora/mine.yaml" in "".join(line.strip() for line in lines)


def test_the_form_that_was_typed_is_explained_by_what_it_was_read_as(capsys: pytest.CaptureFixture[str]) -> None:
    assert "  set by      conf/model/llama-3.1-8b.yaml (model=llama-3.1-8b)" in explained(
        capsys, "model.name model=meta-llama/Llama-3.1-8B"
    )
    assert explained(capsys, "data.path data=x.jsonl")[1] == "  set by      the word data.path=x.jsonl"


@pytest.mark.matrix(4)
@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("lora.r -m lora.r=8,16", "  set by      the word lora.r=8,16, each value in turn"),
        ("data.columns.output data.columns.output=x", "  type        a text"),
        ("trainer.lr_scheduler_kwargs", "trainer.lr_scheduler_kwargs = {num_decay_steps:0.5,min_lr_ratio:0.05}"),
        ("from", "from = null"),
        ("lora.r=8", "lora.r = 32"),
        ("hydra.job.name", "  set by      conf/config.yaml"),
        ("model.architecture.hidden_size", "  set by      conf/model/tiny.yaml (model=tiny)"),
    ],
)
def test_every_kind_of_key_is_explained(capsys: pytest.CaptureFixture[str], command: str, line: str) -> None:
    assert line in explained(capsys, command)


def test_a_group_is_explained_by_its_option_and_its_values(capsys: pytest.CaptureFixture[str]) -> None:
    lines = explained(capsys, "lora")
    assert lines[:2] == ["lora = all-linear", "  set by      conf/config.yaml, as the default"]
    assert "  lora.r = 32" in lines
    assert "  set by      the word lora=dora" in explained(capsys, "lora lora=dora")
    assert "  set by      the defaults of a file" in explained(capsys, "data experiment=guanaco-7b")


@pytest.mark.parametrize(("key", "near"), [("lora.rnak", "lora.r"), ("lroa", "lora"), ("epochs", "num_train_epochs")])
def test_a_misspelled_key_is_refused_with_the_nearest(key: str, near: str) -> None:
    with pytest.raises(UserError, match=rf"^unknown key '{key}' \(did you mean .*{near}\?\)"):
        cli.run(["--explain", key])


@pytest.mark.parametrize("command", ["--version", "version", "--info"])
def test_versions_of_the_project_and_its_libraries(capsys: pytest.CaptureFixture[str], command: str) -> None:
    cli.run([command])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"qlora {__version__}"
    for name in ("torch", "transformers", "peft", "bitsandbytes", "datasets", "hydra-core", "omegaconf"):
        assert f"  {name:<17}{metadata.version(name)}" in lines


def test_pages_import_no_torch() -> None:
    code = (
        "import sys; from qlora import cli; "
        "[cli.run(args.split()) for args in ('--version', '--schema', '--explain lora.r', 'chat --help')]; "
        "assert not {'torch', 'transformers', 'datasets'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
