"""The rows of Axolotl's YAML: what stands in `datasets`, `test_datasets` and `pretraining_dataset`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qlora.config.overrides import write_override
from qlora.config.registries.chat_keys import ROLES, SWITCHES, THOUGHT_KEYS
from qlora.config.registries.chat_templates import TEMPLATES
from qlora.errors import did_you_mean
from qlora.migrate import axolotl_answers, shared_rules
from qlora.migrate.translation import Lost, Part, Same, Settings, is_unset
from qlora.migrate.vocabulary import keys

ALPACA: dict[str, Any] = {"format": "alpaca-newline"}
OPEN_ASSISTANT: dict[str, Any] = {**ALPACA, "columns": {"instruction": "INSTRUCTION", "output": "RESPONSE"}}
TYPES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("alpaca", "alpaca:instruct", "alpaca_instruct", "gpteacher"), ALPACA),
    **dict.fromkeys(("oasst", "oasst:instruct"), OPEN_ASSISTANT),
    "completion": {"format": "text"},
    "pretrain": {"format": "text"},
    "chat_template": {"format": "messages"},
    "sharegpt": {"format": "conversations"},
}
"""The forms of rows that are the same here, as fields of `data.mix`."""
NEAREST: dict[str, tuple[dict[str, Any], str]] = {
    "alpaca_chat.load_qa": ({"format": "question-answer"}, "a preamble with USER: and ASSISTANT: there, Question: and "
                            "Answer: here"),
    "input_output": ({"format": "segments"}, "segments are pairs [text, true or false] here, and the end token follows "
                     "the last one"),
    **{name: ({"format": "alpaca"}, "its own preamble with USER: and ASSISTANT: there, Alpaca's prompt here")
       for name in ("alpaca:chat", "alpaca_chat", "alpaca_chat.load", "alpaca_chat.load_concise")},
}  # fmt: skip
"""Forms that another one comes nearest to, and how they differ."""
CHAT = ("messages", "conversations")
WAY_OUT = "write them as Axolotl does with data.format=module:function"
TEMPLATE_NAMES = {
    **{name: name for name in ("chatml", "gemma")},
    "llama3": "llama-3",
    "phi_3": "phi-3",
    "phi_35": "phi-3",
    "qwen_25": "qwen",
    **dict.fromkeys(("tokenizer_default", "qwen3", "qwen3_5"), "auto"),
}
"""Axolotl's chat templates that are the same here; `auto` is the tokenizer's own."""
FILE_TYPES = ("json", "csv", "parquet", "text", "arrow")
USUAL_MARKS = {
    "bos_token": ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>"),
    "eos_token": ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "<|eot_id|>"),
    "unk_token": ("<unk>", "<|endoftext|>"),
}
"""The marks that bases bring along: a config that names them changes nothing."""
ROWS_OF_A_PART = "rows of a part only are taken there: leave the others out of the file"
SPLIT_TEXTS = "a text longer than sequence_len is split there; here it goes by data.on_too_long"
ENTRY_KEYS = keys(
    """
    path split type input_transform shards shards_idx preprocess_shards conversation chat_template
    chat_template_jinja data_files input_format name ds_type field field_human field_model field_messages
    field_system field_tools field_thinking template_thinking_key message_field_role message_field_content
    message_property_mappings message_field_training message_field_training_detail split_thinking logprobs_field
    temperature roles_to_train train_on_eos train_on_eot roles drop_system_message trust_remote_code revision
    text_column skip
    """
)
"""The keys of an entry of `datasets`."""


def choose_data(settings: Settings) -> Iterator[Part]:
    """The sets, their template, and the rows to measure on."""
    sets, texts = settings.take("datasets"), settings.take("pretraining_dataset")
    key = "datasets" if sets else "pretraining_dataset"
    entries = sets or ([] if texts is None else texts if isinstance(texts, list) else [texts])
    if not sets:
        entries = [{"type": "pretrain", **(entry if isinstance(entry, dict) else {"path": str(entry)})}
                   for entry in entries]  # fmt: skip
    method = "reward" if settings.look("reward_model") else settings.look("rl")
    parts: list[dict[str, Any]] = []
    for number, entry in enumerate(entries):
        entry = entry if isinstance(entry, dict) else {"path": str(entry)}
        more, notes = _parts(entry, f"{key}[{number}]", method)
        yield from notes
        parts += more
    if not parts:
        yield Lost("no rows are named: give data.path=FILE", "datasets")
        parts = [{"path": "rows.jsonl", **ALPACA}]
    templates = yield from _templates(settings, parts)
    if len(set(templates)) == 1:
        yield write_override("data.template", templates[0])
        parts = [{field: value for field, value in part.items() if field != "template"} for part in parts]
    yield from shared_rules.mix(parts)
    yield from _new_tokens(settings, templates)
    yield write_override("data.max_length", int(settings.take("sequence_len")))
    if settings.take("sample_packing"):
        yield "data.packing=true"
        yield "trainer.group_by_length=false"
        settings.read.add("group_by_length")
    if settings.take("train_on_inputs"):
        yield "data.train_on=all"
    yield from _held_out(settings, parts, method)


def _held_out(settings: Settings, parts: list[dict[str, Any]], method: str | None) -> Iterator[Part]:
    tests, size = settings.take("test_datasets"), float(settings.take("val_set_size"))
    if not tests:
        yield from shared_rules.hold_out(size)
        return
    entry = tests[0] if isinstance(tests, list) else {"path": tests}
    held_out, notes = _parts(entry, "test_datasets[0]", method)
    yield from notes
    held_out[0].pop("template", None)
    yield from shared_rules.measure_on(held_out[0], parts, "test_datasets")
    if len(held_out) > 1 or (isinstance(tests, list) and len(tests) > 1):
        yield Lost("one set is measured: join the others to it in a file", "test_datasets")


def _parts(entry: Mapping[str, Any], key: str, method: str | None) -> tuple[list[dict[str, Any]], list[Part]]:
    """Returns an entry of `datasets` with our field names, once for each of its files, and what of it was lost.

    `method` is that of a loss over answers, if the config has one.
    """
    settings = Settings(entry)
    part, notes = _form(settings, key, method)
    files, path = settings.take("data_files"), settings.take("path")
    is_local = bool(files) and path in FILE_TYPES
    settings.read.add("ds_type")
    for theirs, ours in (("name", "subset"), ("split", "split"), ("revision", "revision")):
        value = settings.take(theirs)
        if value is not None and (theirs, value) != ("split", "train"):
            part[ours] = str(value)
    notes += _turns(settings, part, key)
    for name, value in entry.items():
        if name not in settings.read and not is_unset(value) and value is not False:
            known = "" if name in ENTRY_KEYS else f": an entry has no such key{did_you_mean(str(name), ENTRY_KEYS)}"
            parted = name in ("shards", "shards_idx", "skip")
            notes.append(Lost(ROWS_OF_A_PART if parted else f"not read here{known}", f"{key}.{name}"))
    listed = files if isinstance(files, list) else [files]
    if is_local:
        return [{"path": str(file), **part} for file in listed], notes
    if files:
        return [{"path": path, **part, "data_files": str(file)} for file in listed], notes
    return [{"path": path if path is not None else "rows.jsonl", **part}], notes


def _form(settings: Settings, key: str, method: str | None) -> tuple[dict[str, Any], list[Part]]:
    """Returns the format of an entry with its columns and its template."""
    if method is not None and (answers := axolotl_answers.read_form(settings, str(method))) is not None:
        settings.read.add("type")
        return answers, []
    kind, notes = settings.take("type"), list[Part]()
    if isinstance(kind, dict):
        names = {"instruction": "instruction", "input": "input", "output": "output", "system": "system"}
        columns = {role: str(kind.get(f"field_{role}") or name) for role, name in names.items()}
        columns = {role: column for role, column in columns.items() if column != role}
        notes.append(Lost(f"words of your own around a row: {WAY_OUT}", f"{key}.type"))
        return {"format": "alpaca", **({"columns": columns} if columns else {})}, notes
    name = str(kind)
    if name in TYPES:
        part = {field: dict(value) if isinstance(value, dict) else value for field, value in TYPES[name].items()}
    elif name in NEAREST or name.startswith("sharegpt"):
        nearest, why = NEAREST.get(name, (TYPES["sharegpt"], f"the words of {name} are not known here"))
        part = dict(nearest)
        notes.append(Lost(f"{why}; {WAY_OUT}", f"{key}.type"))
    else:
        part = {"format": "auto"}
        said = "no type is named" if kind is None else f"the form {name!r} is not known here"
        notes.append(Lost(f"{said}: rows are recognised by their columns; {WAY_OUT}", f"{key}.type"))
    column = settings.take("field") or settings.take("text_column")
    if part["format"] == "text":
        notes.append(Lost(SPLIT_TEXTS, f"{key}.type"))
        if column not in (None, "text"):
            part["columns"] = {"text": str(column)}
    return part, notes


def _turns(settings: Settings, part: dict[str, Any], key: str) -> Iterator[Part]:
    """What an entry says of the turns of a chat, and which of them are trained."""
    columns: dict[str, str] = part.get("columns", {})
    if part["format"] == axolotl_answers.CHATS:
        yield from _mapping(dict(settings.take("message_property_mappings", {})), key)
        yield from _roles(settings, key)
    if part["format"] in CHAT:
        column = str(settings.take("field_messages", part["format"]))
        mapping = dict(settings.take("message_property_mappings", {}))
        for older in ("role", "content"):
            mapping.setdefault(older, settings.take(f"message_field_{older}") or older)
        if mapping["role"] == "from":
            part["format"] = "conversations"
        if column != part["format"]:
            columns[part["format"]] = column
        for theirs in ("system", "tools"):
            if (other := settings.take(f"field_{theirs}")) not in (None, theirs):
                columns[theirs] = str(other)
        yield from _mapping(mapping, key)
        yield from _roles(settings, key)
        yield from _training(settings, key)
        name = settings.take("chat_template") or settings.take("conversation")
        jinja = settings.take("chat_template_jinja")
        if name or jinja:
            part["template"] = (name, jinja)
    if columns:
        part["columns"] = columns


def _mapping(mapping: Mapping[str, Any], key: str) -> Iterator[Part]:
    known = {"role": ("role", "from"), "content": ("content", "value")}
    other = {theirs: ours for ours, theirs in mapping.items()
             if theirs not in known.get(ours, (*THOUGHT_KEYS, *SWITCHES, ours))}  # fmt: skip
    if other:
        listed = ", ".join(f"{theirs} (here {ours})" for theirs, ours in other.items())
        why = f"keys of a turn have fixed names: rename {listed} in the file, or with data.format=module:function"
        yield Lost(why, f"{key}.message_property_mappings")


def _roles(settings: Settings, key: str) -> Iterator[Part]:
    pairs = [(target, source) for target, sources in dict(settings.take("roles", {})).items() for source in sources]
    unlike = [
        f"{source} as {target}"
        for target, source in pairs
        if ROLES.get(str(source).lower()) != ROLES.get(str(target).lower(), target)
    ]
    if unlike:
        yield Lost(f"speakers have fixed names: rename {', '.join(unlike)} in the file", f"{key}.roles")
    elif "roles" in settings:
        yield Same("these speakers have the same roles here", f"{key}.roles")
    trained = settings.take("roles_to_train")
    if trained is not None and {ROLES.get(str(role).lower()) for role in trained} != {"assistant"}:
        yield Lost("the assistant's turns are trained, or with data.train_on=all everything", f"{key}.roles_to_train")


def _training(settings: Settings, key: str) -> Iterator[Part]:
    """What decides which tokens of a turn are trained."""
    switch = settings.take("message_field_training")
    if switch in SWITCHES:
        yield Same(f"the key {switch} of a turn is read by itself", f"{key}.message_field_training")
    elif switch is not None:
        yield Lost(f"rename the key {switch} of a turn to train", f"{key}.message_field_training")
    for name in ("train_on_eos", "train_on_eot"):
        if settings.take(name, "turn") != "turn":
            yield Lost("the end of each trained turn is trained here, of no other", f"{key}.{name}")
    if settings.take("drop_system_message"):
        yield Lost("system turns are kept: leave them out of the file", f"{key}.drop_system_message")
    thoughts = settings.take("field_thinking")
    if thoughts not in (None, *THOUGHT_KEYS):
        yield Lost(f"rename the key {thoughts} of a turn to {THOUGHT_KEYS[0]}", f"{key}.field_thinking")
    if settings.take("template_thinking_key"):
        yield Same("each template gets thoughts under the key that it reads", f"{key}.template_thinking_key")
    if settings.take("split_thinking"):
        yield Lost("<think> at the beginning of a content is told apart where the template reads thoughts, and is text "
                   "where it does not", f"{key}.split_thinking")  # fmt: skip


def _templates(settings: Settings, parts: list[dict[str, Any]]) -> Any:
    """Gives each set of chats its template; yields what was lost, and returns the templates in use."""
    overall = settings.take("chat_template"), settings.take("chat_template_jinja")
    used: list[str] = []
    for part in parts:
        template = part.pop("template", None)
        name, jinja = template or overall
        if part["format"] in CHAT or part["format"] == axolotl_answers.CHATS or template:
            ours = yield from _template(name, jinja)
            part["template"] = ours
            used.append(ours)
    if settings.take("default_system_message"):
        yield Lost("rows without a system turn get none, or that of their template", "default_system_message")
    if settings.take("eot_tokens"):
        yield Same("the token that ends a turn is found in the template", "eot_tokens")
    return used


def _template(name: Any, jinja: Any) -> Any:
    if jinja and str(jinja).endswith((".jinja", ".j2")):
        return str(jinja)
    if jinja:
        yield Lost("put it into a file, and name that in data.template=FILE.jinja", "chat_template_jinja")
        return "auto"
    name = str(name or "tokenizer_default")
    fallback = name.removeprefix("tokenizer_default_fallback_")
    if fallback != name:
        ours = TEMPLATE_NAMES.get(fallback, fallback)
        yield Lost(f"a tokenizer without a template gets guanaco here: set data.template={ours} then", "chat_template")
        return "auto"
    if name in TEMPLATE_NAMES:
        return TEMPLATE_NAMES[name]
    yield Lost("no such template here: the tokenizer's own is taken; a Jinja file goes to data.template",
               "chat_template")  # fmt: skip
    return "auto"


def _new_tokens(settings: Settings, templates: list[str]) -> Iterator[Part]:
    """Yields the tokens that a base has to learn, with the other marks of a template whose end token is one of them."""
    special = dict(settings.take("special_tokens", {}))
    tokens = [*settings.take("tokens", []), *(special.pop("additional_special_tokens", None) or [])]
    special.pop("pad_token", None)
    for name, token in special.items():
        if is_unset(token) or token in USUAL_MARKS.get(name, ()):
            continue
        if name != "eos_token":
            yield Lost("the base's own is kept", f"special_tokens.{name}")
            continue
        marks = next((TEMPLATES[template] for template in templates if token in TEMPLATES.get(template, ())), (token,))
        tokens += marks
        if not any(token in TEMPLATES.get(template, ()) for template in templates):
            yield Lost("the base's own end token follows a row that is no chat", "special_tokens.eos_token")
    if tokens:
        yield write_override("model.new_tokens", list(dict.fromkeys(map(str, tokens))))
