"""1,000 malformed configs by a grammar: each composes, or is refused with one message; none raises anything else."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora.config.command import check_overrides
from qlora.config.fields import config_keys, field_type
from qlora.config.options import CONF_DIR, group_names
from qlora.errors import UserError

FULL, SHORT = 1000, 50
CHUNK = 100

KEYS = sorted(config_keys())
GROUPS = group_names()
OPTIONS = {group: [file.stem for file in sorted((CONF_DIR / group).glob("*.yaml"))] for group in GROUPS}
HYDRA = (
    *("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.job.name", "hydra.verbose", "hydra.mode"),
    *("hydra.sweeper.params", "hydra.launcher.n_jobs", "hydra/launcher", "hydra/sweeper", "hydra.job.chdir"),
)
WORDS = (
    "true",
    "false",
    "null",
    "none",
    "auto",
    "tiny",
    "fp16",
    "bf16",
    "constant",
    "rows",
    "4",
    "x" * 500,
    "a b",
    "ü",
    "名",
)
NUMBERS = (
    "0",
    "-1",
    "1",
    "3.5",
    "1e-4",
    "1e400",
    "-0",
    "nan",
    "inf",
    "-inf",
    "9" * 40,
    "0x10",
    "1_000",
    "1e",
    ".5",
    "٣",
)
BROKEN = (
    *(
        "[",
        "]",
        "{",
        "}",
        "[1,",
        "{a:",
        "'",
        '"',
        "a,b",
        "a,",
        "=",
        "==",
        "",
        "${",
        "${seed}",
        "${no.such}",
        "${a",
        "\\",
    ),
    *(":", "${oc.env:HOME}", "${oc.env:NO_SUCH_VARIABLE}", "${oc.decode:1}", "${hydra:runtime.cwd}", "${.r}"),
    *("${qlora.folder:x}", "${..seed}", "range(0,3)", "choice(1,2)", "interval(0,1)", "glob(*)", "sort(3,1)", "int(x)"),
    *(
        "tag(x,1)",
        "extend_list(1)",
        "shuffle(1,2)",
        "???",
        "\t",
        "\n",
        "\0",
        "%s",
        "{}",
        "[]",
        "~",
        "@",
        "a@b",
        "a:b",
        "#",
    ),
    *("--x", "-m"),
)
HEADS = (
    *(b"defaults: [mine]", b"defaults: 3", b"defaults: [{a: b}]", b"defaults: [no-such]", b"# @package a.b"),
    *(b"# @package _global_", b"%YAML 9.9", b"--- x", b"&a [*a]"),
)
PLACES = (
    "../x",
    "/",
    "/dev/null",
    "~",
    "a" * 300,
    "no/such/file.jsonl",
    "*.jsonl",
    "os:getcwd",
    "a:b",
    "hf://x",
    "C:\\x",
)


class Grammar:
    """Draws command lines and YAML files from a seed."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def overrides(self) -> list[str]:
        """Returns a command line of some words, most of which are as they should be."""
        return [self.override() for _ in range(self.draw.choice((1, 1, 1, 2, 3, 6)))]

    def override(self) -> str:
        """Returns one word."""
        kind = self.draw.random()
        if kind < 0.2:
            return f"{self.sign()}{self.group()}={self.option()}"
        if kind < 0.25:
            return self.value()
        return f"{self.sign()}{self.key()}={self.value()}"

    def sign(self) -> str:
        return self.draw.choice(("", "", "", "", "", "", "+", "++", "~", "-", "@"))

    def group(self) -> str:
        group = self.draw.choice(GROUPS)
        return self.draw.choice((group, group, group, self.typo(group), f"{group}@{group}", f"/{group}", f"{group}/x"))

    def option(self) -> str:
        options = self.draw.choice([OPTIONS[group] for group in GROUPS])
        option = self.draw.choice(options)
        return self.draw.choice(
            (option, option, self.typo(option), self.value(), f"[{option},{option}]", f"{option}.yaml")
        )

    def key(self) -> str:
        key = self.draw.choice((*KEYS, *HYDRA))
        extra = self.draw.choice(("x", "_target_", "0", "", "a b", "ü"))
        return self.draw.choice((key, key, key, key, key, self.typo(key), f"{key}.{extra}", f"{key}[0]", key.upper()))

    def value(self) -> str:
        kind = self.draw.random()
        if kind < 0.3:
            return self.draw.choice(NUMBERS)
        if kind < 0.55:
            return self.draw.choice(WORDS)
        if kind < 0.75:
            return self.draw.choice(BROKEN)
        if kind < 0.85:
            return self.draw.choice(PLACES)
        if kind < 0.93:
            return f"[{','.join(self.value() for _ in range(self.draw.randint(0, 3)))}]"
        pairs = ",".join(f"{self.draw.choice(WORDS)}:{self.value()}" for _ in range(self.draw.randint(0, 2)))
        return f"{{{pairs}}}"

    def typo(self, word: str) -> str:
        index = self.draw.randrange(max(len(word), 1))
        letter = self.draw.choice("abcxyz._-/ü ")
        return self.draw.choice(
            (
                word[:index] + word[index + 1 :],
                word[:index] + letter + word[index:],
                word[:index] + letter + word[index + 1 :],
            )
        )

    def yaml(self, folder: Path) -> list[str]:
        """Writes an option of the user's own, made of one of ours, and returns the words that choose it."""
        group = self.draw.choice(GROUPS)
        source = CONF_DIR / group / f"{self.draw.choice(OPTIONS[group])}.yaml"
        text = source.read_bytes()
        for _ in range(self.draw.randint(1, 3)):
            text = self.damage(text)
        file = folder / group / "mine.yaml"
        file.parent.mkdir(parents=True)
        file.write_bytes(text)
        return [f"{group}=mine"]

    def damage(self, text: bytes) -> bytes:
        """Returns a YAML text with one fault."""
        lines = text.split(b"\n")
        index = self.draw.randrange(len(lines))
        kind = self.draw.randrange(9)
        if kind == 0:
            return text[: self.draw.randrange(len(text) + 1)]
        if kind == 1:
            spot = self.draw.randrange(len(text) + 1)
            return text[:spot] + bytes([self.draw.randrange(256)]) + text[spot:]
        if kind == 2:
            lines.insert(index, lines[self.draw.randrange(len(lines))])
        elif kind == 3:
            lines[index] = (
                self.draw.choice((b"\t", b"    ", b"- ", b"? ", b"!!python/object:os.system ")) + lines[index]
            )
        elif kind == 4:
            name = lines[index].partition(b":")[0]
            lines[index] = name + b": " + self.value().encode("utf-8", "replace")
        elif kind == 5:
            lines.insert(index, f"{self.draw.choice(KEYS).rpartition('.')[2]}: {self.value()}".encode())
        elif kind == 6:
            lines.insert(0, self.draw.choice(HEADS))
        elif kind == 7:
            del lines[index]
        else:
            lines.insert(index, b"a: {b: *c, d: &e 1}")
        return b"\n".join(lines)


def examine(seed: int, folder: Path) -> str:
    """Composes and checks one malformed config; returns what became of it."""
    grammar = Grammar(seed)
    config_dir = None
    if seed % 10 < 3:
        config_dir = folder / f"conf-{seed}"
        config_dir.mkdir()
        overrides = [*grammar.yaml(config_dir), *(grammar.overrides() if seed % 2 else [])]
    else:
        overrides = grammar.overrides()
    try:
        check_overrides(overrides, config_dir, multirun=seed % 7 == 0)
    except UserError as error:
        text = str(error)
        assert text.strip(), f"{seed}: {overrides}: an empty message"
        assert "Traceback" not in text, f"{seed}: {overrides}: {text}"
        assert len(text) < 3000, f"{seed}: {overrides}: {len(text)} characters: {text[:200]}"
        return "refused"
    except Exception as error:
        raise AssertionError(f"seed {seed}: {overrides}: {type(error).__name__}: {error}") from error
    return "runs"


def walk(seeds: Iterator[int] | range, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Examines many; checks that no file appears anywhere but for those that the grammar wrote itself."""
    work, home = folder / "work", folder / "home"
    work.mkdir()
    home.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    shipped = {path: path.stat().st_mtime_ns for path in CONF_DIR.rglob("*.yaml")}
    counts = Counter(examine(seed, folder) for seed in seeds)
    assert not list(work.iterdir())
    assert not list(home.iterdir())
    assert {path: path.stat().st_mtime_ns for path in CONF_DIR.rglob("*.yaml")} == shipped
    print(dict(counts))
    return counts


def test_malformed_configs_are_refused_with_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = walk(range(SHORT), tmp_path, monkeypatch)
    assert counts["refused"] > counts["runs"] > 0, "the grammar draws both"


@pytest.mark.full
@pytest.mark.parametrize("start", range(0, FULL, CHUNK))
def test_a_thousand_malformed_configs(start: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walk(range(start, start + CHUNK), tmp_path, monkeypatch)


def test_the_grammar_knows_every_field() -> None:
    assert {"lora.r", "data.mix", "model.architecture.hidden_size", "source"} <= set(KEYS)
    assert field_type("lora.r") is int
