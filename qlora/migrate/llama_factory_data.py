"""The rows of LLaMA-Factory: the names in `dataset` and `eval_dataset`, and what `dataset_info.json` says of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora.config.overrides import write_override
from qlora.config.registries.chat_keys import CALL_ROLES, ROLES
from qlora.errors import DataError
from qlora.migrate import shared_rules
from qlora.migrate.translation import Lost, Part, Settings, is_unset

CHAT = "qlora.data.formats.as_chat:from_alpaca"
PAIRS = "qlora.data.formats.as_chat:from_pair"
RANKED = ("chosen", "rejected")
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system"}
TURN_KEYS = {"role_tag": ("from", "role"), "content_tag": ("value", "content")}
SPEAKERS = {"user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "system_tag": "system"}
MEDIA = ("images", "videos", "audios")
READ = ("ranking", "file_name", "hf_hub_url", "formatting", "subset", "split", "columns", "tags", "num_samples")
"""The keys of an entry of the registry that are read here."""
TEMPLATES = {
    **{name: name for name in ("alpaca", "chatml", "gemma", "qwen")},
    "llama2": "llama-2",
    "llama3": "llama-3",
    "phi": "phi-3",
    "qwen3_nothink": "chatml",
    **dict.fromkeys(("qwen3", "gemma2", "gemma3", "deepseek3", "phi4"), "auto"),
}
"""Its chat templates that are the same here; `auto` is the tokenizer's own, which these models bring along."""
UNLIKE = {
    "mistral": "no blank before [/INST]",
    "vicuna": "no blanks before USER: and behind ASSISTANT:",
    "zephyr": "a system turn of its own where a row has none, and no line break behind a turn",
}
"""Those of which ours differs, by what theirs has."""
PACKED_TEXTS = (
    "texts are joined and cut into blocks there; here a text stays in one pack, unseen by the others, and one longer "
    "than cutoff_len loses its end"
)


def choose_data(settings: Settings) -> Iterator[Part]:
    """The sets, their template, their lengths, and the rows to measure on."""
    names, is_text = _names(settings.take("dataset")), settings.look("stage") == "pt"
    if not names:
        yield Lost("no rows are named: give data.path=FILE", "dataset")
        names = ["rows"]
    registry = _Registry(settings, is_text=is_text)
    parts = []
    for name in names:
        part, notes = registry.part(name)
        yield from notes
        parts.append(part)
    limit = settings.take("max_samples")
    parts = [_limited(part, limit) for part in parts]
    yield from shared_rules.mix(parts)
    yield from registry.missing("dataset", names)
    if is_text:
        settings.read |= {"template", "enable_thinking", "default_system", "tool_format", "preserve_thinking"}
    else:
        yield from _template(settings)
    yield write_override("data.max_length", int(settings.take("cutoff_len")))
    yield from _packing(settings, is_text=is_text)
    if is_text or settings.take("train_on_prompt"):
        yield "data.train_on=all"
    elif settings.take("mask_history"):
        yield "data.train_on=last"
    measured, size = _names(settings.take("eval_dataset")), settings.take("val_size")
    if not measured:
        yield from shared_rules.hold_out(size)
        return
    held_out, notes = registry.part(measured[0])
    yield from notes
    yield from shared_rules.measure_on(_limited(held_out, limit), parts, "eval_dataset")
    yield from registry.missing("eval_dataset", measured[:1])
    if len(measured) > 1:
        yield Lost("one set is measured: join the others to it in a file", "eval_dataset")


def _names(value: Any) -> list[str]:
    names = value if isinstance(value, list) else str(value or "").split(",")
    return [str(name).strip() for name in names if str(name).strip()]


def _limited(part: Mapping[str, Any], limit: Any) -> dict[str, Any]:
    """Returns a set of which at most `limit` rows are taken, the first ones."""
    limits = [int(count) for count in (part.get("max_samples"), limit) if count is not None]
    return {**part, **({"max_samples": min(limits)} if limits else {})}


def _packing(settings: Settings, *, is_text: bool) -> Iterator[Part]:
    neat, packing = settings.take("neat_packing"), settings.take("packing")
    if not (neat or (is_text if packing is None else packing)):
        return
    yield "data.packing=true"
    yield "trainer.group_by_length=false"
    if is_text:
        yield Lost(PACKED_TEXTS, "packing")
    elif not neat:
        yield Lost("rows of a pack see each other there without neat_packing; here they do not", "packing")


def _template(settings: Settings) -> Iterator[Part]:
    name = settings.take("template")
    if name in TEMPLATES:
        yield f"data.template={TEMPLATES[name]}"
    elif name in UNLIKE:
        yield f"data.template={name}"
        yield Lost(f"LLaMA-Factory's has {UNLIKE[name]}: give it as a Jinja file in data.template", "template")
    else:
        yield "data.template=auto"
        said = "no such template here" if name else "where it has none, texts are joined bare there"
        yield Lost(f"{said}: the tokenizer's own is used (data.template=auto)", "template")
    thinks = settings.take("enable_thinking")
    if thinks is not True and str(name).startswith("qwen3") and not str(name).endswith("nothink"):
        yield Lost("empty thoughts are part of the answer here, as with enable_thinking=true", "enable_thinking")
    if settings.take("default_system"):
        yield Lost(
            "write it into the column system of the rows, or into a Jinja file (data.template)", "default_system"
        )
    settings.read.add("preserve_thinking")
    if settings.look("preserve_thinking"):
        yield Lost("the template decides which thoughts are kept", "preserve_thinking")
    if settings.take("tool_format"):
        yield Lost("tools are written by the chat template", "tool_format")


class _Registry:
    """`dataset_info.json`, from below the working directory or beside the YAML."""

    def __init__(self, settings: Settings, *, is_text: bool) -> None:
        self.folder, self.is_text = Path(str(settings.take("dataset_dir"))), is_text
        self.stage = str(settings.look("stage"))
        self.is_online = str(self.folder) == "ONLINE"
        self.sets: dict[str, dict[str, Any]] = {}
        for parent in (self.folder, Path(str(settings.look("folder of the file", "."))) / self.folder):
            if (file := parent / "dataset_info.json").is_file():
                self.folder, self.sets = parent, _read(file)
                return

    def missing(self, key: str, names: list[str]) -> Iterator[Part]:
        """Yields the sets that the registry does not name."""
        if unknown := [name for name in names if name not in self.sets and not self.is_online]:
            yield Lost(f"{', '.join(unknown)} stand in no {self.folder}/dataset_info.json here: give their files", key)

    def part(self, name: str) -> tuple[dict[str, Any], list[Part]]:
        """Returns a set with the fields of `data.mix`, and what of its entry was lost."""
        entry = self.sets.get(name, {})
        file = str(self.folder / str(entry.get("file_name", f"{name}.json")))
        part: dict[str, Any] = {"path": name if self.is_online else entry.get("hf_hub_url") or file}
        for theirs, ours in (("subset", "subset"), ("split", "split"), ("num_samples", "max_samples")):
            if entry.get(theirs) and (theirs, entry[theirs]) != ("split", "train"):
                part[ours] = entry[theirs]
        columns, tags = dict(entry.get("columns") or {}), dict(entry.get("tags") or {})
        turns = entry.get("formatting") in ("sharegpt", "openai")
        notes = list(self._text(part, entry, columns) if self.is_text else
                     _turns(part, entry, columns, tags) if turns else _alpaca(part, columns))  # fmt: skip
        notes += self._ranking(part, entry)
        notes += [Lost(shared_rules.NO_MEDIA, f"columns.{column}") for column in MEDIA if columns.get(column)]
        if "num_samples" in entry:
            notes.append(Lost("rows are drawn at random there; here the first ones are taken", "num_samples"))
        is_hub = "hf_hub_url" in entry
        for key, value in entry.items():
            if key in READ or is_unset(value) or value is False or (is_hub and key.endswith("_hub_url")):
                continue
            notes.append(Lost("not read here", key))
        for note in notes:
            assert isinstance(note, Lost)
        return part, [Lost(note.why, f"{name}.{note.key}") for note in notes if isinstance(note, Lost)]

    def _ranking(self, part: dict[str, Any], entry: Mapping[str, Any]) -> Iterator[Part]:
        """How the rows of a set of pairs are read, and whether they fit the stage."""
        ranked, compares = bool(entry.get("ranking")), self.stage in ("dpo", "rm")
        if ranked or (compares and not entry):
            turns = part["format"] != CHAT
            if turns:
                columns = part.get("columns", {})
                columns["conversations"] = columns.pop(part["format"], part["format"])
                part["columns"] = {role: column for role, column in columns.items() if role != column}
            part["format"] = "chosen" if turns else PAIRS
            if not part.get("columns"):
                part.pop("columns", None)
        if ranked and not compares:
            yield Lost(
                f"its rows are pairs, and stage={self.stage} reads one answer each: the chosen one is", "ranking"
            )
        elif compares and entry and not ranked:
            yield Lost(f"it is not set, and stage={self.stage} compares two answers: give rows of pairs", "ranking")

    def _text(self, part: dict[str, Any], entry: Mapping[str, Any], columns: Mapping[str, Any]) -> Iterator[Part]:
        """A set of documents: what Alpaca's form calls the prompt is the text."""
        part["format"] = "text"
        if entry.get("formatting", "alpaca") != "alpaca":
            yield Lost("a document is the first turn of a chat there: write it to a column text", "formatting")
            return
        column = columns.get("prompt") if columns else "instruction"
        if column != "text" and column:
            part["columns"] = {"text": column}
        if columns.get("query"):
            yield Lost("a document is prompt and query there: write both to a column text", "columns.query")


def _alpaca(part: dict[str, Any], columns: Mapping[str, Any]) -> Iterator[Part]:
    part["format"] = CHAT
    names = {**COLUMNS, **{role: role for role in (*RANKED, "kto_tag")}}
    renamed = {names[role]: column for role, column in columns.items() if role in names and column}
    if renamed := {role: column for role, column in renamed.items() if role != column}:
        part["columns"] = renamed
    for role in columns:
        if role not in names and role not in MEDIA and columns[role]:
            yield Lost("rows of this form have no such column here", f"columns.{role}")


def _turns(
    part: dict[str, Any], entry: Mapping[str, Any], columns: Mapping[str, Any], tags: Mapping[str, Any]
) -> Iterator[Part]:
    is_openai = tags.get("role_tag") == "role" or entry["formatting"] == "openai"
    part["format"] = "messages" if is_openai else "conversations"
    renamed = {part["format"]: columns.get("messages") if columns else "conversations"}
    renamed |= {role: columns.get(role) for role in ("system", "tools", *RANKED, "kto_tag")}
    if renamed := {role: column for role, column in renamed.items() if column and role != column}:
        part["columns"] = renamed
    for role in columns:
        if role not in ("messages", "system", "tools", "kto_tag", *RANKED, *MEDIA) and columns[role]:
            yield Lost("rows of this form have no such column here", f"columns.{role}")
    for tag, value in tags.items():
        known = value in TURN_KEYS[tag] if tag in TURN_KEYS else _speaks(tag, str(value))
        if not known:
            yield Lost(f"{value} is no such key or speaker of a turn here: rename it in the file", f"tags.{tag}")


def _speaks(tag: str, value: str) -> bool:
    """Tells whether a speaker is known here under this name."""
    return value in CALL_ROLES if tag == "function_tag" else ROLES.get(value.lower()) == SPEAKERS.get(tag, "")


def _read(file: Path) -> dict[str, dict[str, Any]]:
    try:
        sets = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"from: {file} is not valid JSON ({error})") from error
    if not isinstance(sets, dict):
        raise DataError(f"from: {file} holds no mapping of sets; it must be LLaMA-Factory's registry")
    return {name: entry for name, entry in sets.items() if isinstance(entry, dict)}
