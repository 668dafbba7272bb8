"""What README and docs tell people to type is accepted, and what they link to exists."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora import cli
from qlora.config import help as pages
from qlora.config.command import check_overrides
from qlora.config.command_words import read_words
from qlora.config.compose import compose
from qlora.config.fields import config_keys
from qlora.config.foreign_names import FOREIGN_OPTIONS
from qlora.config.options import group_names
from qlora.config.suggestions import unknown_flag

ROOT = Path(__file__).parent.parent
DOCS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Commands that prepare or check a whole machine; the continuous integration runs them.
SETUP = "python3 -m venv .venv && "


def blocks(*languages: str) -> list[tuple[Path, str]]:
    return [
        (path, body)
        for path in DOCS
        for language, body in FENCE.findall(path.read_text(encoding="utf-8"))
        if language in languages
    ]


def commands() -> list[str]:
    return [
        line.split(" #")[0].strip()
        for _, body in blocks("bash", "sh")
        for line in body.replace("\\\n", " ").splitlines()
        if line.strip() and not line.startswith("#")
    ]


COMMANDS = commands()


def words_of(command: str, *program: str) -> list[str] | None:
    args = shlex.split(command)
    return args[len(program) :] if tuple(args[: len(program)]) == program else None


def qlora_words(command: str) -> list[str] | None:
    args = shlex.split(command)
    if args[0] in ("torchrun", "accelerate"):
        return args[args.index("qlora") + 1 :]
    result = words_of(command, "qlora")
    return result if result is not None else words_of(command, "python", "-m", "qlora")


def is_pip(command: str) -> bool:
    return "pip install" in command


@pytest.fixture(scope="module")
def extensions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Makes the modules that docs/extending.md shows importable."""
    folder = tmp_path_factory.mktemp("extensions")
    for block in re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(encoding="utf-8"), re.DOTALL
    ):
        for name, code in re.findall(
            r"^# ([\w/]+\.py)[^\n]*\n(.*?)(?=^# [\w/]+\.py|\Z)", block, re.DOTALL | re.MULTILINE
        ):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


@pytest.mark.matrix(6)
@pytest.mark.usefixtures("extensions")
@pytest.mark.parametrize("command", [text for text in COMMANDS if qlora_words(text) is not None])
def test_a_documented_command_is_accepted(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = qlora_words(command)
    assert args is not None
    if {"--help", "--version", "--schema", "--explain"} & {*args}:
        cli.run(args[: args.index(">")] if ">" in args else args)
        assert capsys.readouterr().out
        return
    flags = {"-m": 1, "--cfg": 2, "--config-dir": 2}  # with the number of words that each takes
    taken, overrides = dict[str, str](), list(args)
    for flag, count in flags.items():
        if flag in overrides:
            index = overrides.index(flag)
            taken[flag] = overrides[index + count - 1]
            del overrides[index : index + count]
    for word in overrides:
        if word.startswith("-"):
            raise unknown_flag(word)
    folder = taken.get("--config-dir")
    overrides = read_words(overrides).overrides
    check_overrides(overrides, folder and str(config_dir(folder, tmp_path)), multirun="-m" in taken)


def config_dir(folder: str, scratch: Path) -> Path:
    """Returns a folder of this repository, or one with the files that the documentation puts there."""
    if (ROOT / folder).is_dir():
        return ROOT / folder
    block = re.compile(rf"```yaml\n# ({folder}/\S+\.yaml)[^\n]*\n(.*?)```", re.DOTALL)
    for document in DOCS:
        for name, text in block.findall(document.read_text(encoding="utf-8")):
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).write_text(text, encoding="utf-8")
    return scratch / folder


def test_the_readme_sets_up_a_fresh_machine_in_two_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    run, test = [line for line in readme if line.startswith(SETUP) and "index-url" not in line]
    install = f"{SETUP}.venv/bin/pip install -q -c constraints.txt -e"
    assert run == f"{install} . && .venv/bin/python -m qlora"
    assert test == f"{install} '.[dev]' && .venv/bin/python -m pytest"


def test_continuous_integration_tests_with_the_command_of_the_readme() -> None:
    [test] = [command for command in COMMANDS if command.startswith(SETUP) and "pytest" in command]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace('"$venv/bin/', ".venv/bin/").replace('"', "")
    install, run = test.removeprefix(SETUP).split(" && ")
    assert f"\n{run}\n" in script
    # uv installs what pip would.
    assert install.removeprefix(".venv/bin/pip install -q ") in script


@pytest.mark.parametrize("command", [text for text in COMMANDS if is_pip(text)])
def test_an_install_command_names_extras_and_files_that_exist(command: str) -> None:
    for extras in re.findall(r"\[([\w,-]+)\]", command):
        assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    for file in re.findall(r"-c (\S+)", command):
        assert (ROOT / file).is_file()


@pytest.mark.parametrize("command", [text for text in COMMANDS if text.startswith(("torchrun ", "accelerate "))])
def test_a_documented_launcher_starts_this_program(command: str) -> None:
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    program, *args = shlex.split(command)
    parser = get_args_parser() if program == "torchrun" else launch_command_parser()
    told = parser.parse_args(args if program == "torchrun" else args[1:])
    assert told.module
    assert told.training_script == "qlora"
    assert told.training_script_args == qlora_words(command)


@pytest.mark.matrix(60)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_of_a_kind_that_is_checked(command: str) -> None:
    if qlora_words(command) is not None or is_pip(command):
        return
    program, *rest = shlex.split(command)
    if program == "export":
        assert all("=" in word for word in rest)
    elif program == "srun":  # SLURM's, around a launcher
        assert qlora_words(shlex.join(rest[rest.index("torchrun") :])) is not None
    elif program == "python" and rest[0] != "-m":
        assert (ROOT / rest[0]).is_file()
    elif program == "python":
        assert importlib.util.find_spec(rest[1]), f"no module {rest[1]}"
        assert all((ROOT / word).exists() for word in rest[2:] if word.startswith(("tests/", "docs/")))
    else:
        assert (ROOT / program).is_file(), f"{program} is no file of the project"


@pytest.mark.parametrize(("path", "code"), blocks("python"))
def test_documented_python_compiles_and_its_names_exist(path: Path, code: str) -> None:
    tree = ast.parse(code, filename=str(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "qlora":
            module = importlib.import_module(node.module)
            assert all(hasattr(module, name.name) for name in node.names)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "compose":
            check_overrides(ast.literal_eval(node.args[0]))


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings_that_exist(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_manual_s_map_names_every_page() -> None:
    for index in (ROOT / "docs").rglob("index.md"):
        text = index.read_text(encoding="utf-8")
        pages = [path for path in index.parent.glob("*.md") if path != index]
        assert not [path.name for path in pages if f"({path.name})" not in text]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_keys_in_the_texts_exist(path: Path) -> None:
    known, groups = set(config_keys()), set(group_names())
    free = ("trainer.lr_scheduler_kwargs.", "trainer.optim_args.", "callbacks.", "data.columns.", "data.mix.")
    for key in re.findall(r"`(\w+(?:\.\w+)+)(?:=[^`]*)?`", path.read_text(encoding="utf-8")):
        is_file = key.endswith((".py", ".yaml", ".json", ".jsonl", ".png"))
        if key.partition(".")[0] in groups and not is_file and not key.startswith(free):
            assert key in known, key


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_options_in_the_texts_exist(path: Path) -> None:
    for group, option in re.findall(r"`(\w+)=([a-z0-9][\w.-]*)`", path.read_text(encoding="utf-8")):
        is_file = group == "data" and option.endswith(".jsonl")  # which is read as data=local data.path=FILE
        is_foreign = option in FOREIGN_OPTIONS.get(group, {})  # which is answered by the word that works
        if group in group_names() and not is_file and not is_foreign:
            assert option in pages.options(group), f"{group}={option}"


def test_the_table_of_what_models_need_is_what_the_plan_says() -> None:
    from qlora.planning.training_plan import build_plan

    text = (ROOT / "docs/your_model.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.-]+)` \| ([\d.]+) \|$", text, re.MULTILINE)
    assert len(rows) > 5
    common = ["lora.r=16", "plan.length=2048", "plan.device=h200", "trainer.per_device_train_batch_size=1"]
    for model, needed in rows:
        config = compose([f"model={model}", "data=local", "data.path=rows.jsonl", *common])
        assert build_plan(config).memory.needed / 1e9 == pytest.approx(float(needed), abs=0.1), model
