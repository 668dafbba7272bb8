"""What stands inside `datasets[]`, `dataset_info.json` and a builder of rows is translated key by key, or listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora.config.schema import Config
from qlora.migrate import read
from qlora.migrate.axolotl import AXOLOTL as DIALECT
from qlora.migrate.translation import translate

AXOLOTL = "base_model: my/base\nadapter: lora\nlora_r: 8\nlora_alpha: 8\nlora_target_linear: true\nmax_steps: 100\n"
FACTORY = "model_name_or_path: my/base\nstage: {stage}\ndataset: {names}\ndataset_dir: sets\ntemplate: chatml\n"


def migrated(path: Path, text: str) -> tuple[Config, dict[str, str], list[str]]:
    """Returns the config that a file becomes, what of it was lost and why, and what needs no override."""
    path.write_text(text, encoding="utf-8")
    _, reading = read(path)
    assert reading.config is not None
    return reading.config, {key: why for key, _, why in reading.lost}, [key for key, _, _ in reading.same]


def lost_of(text: str) -> set[str]:
    """Returns the keys of one entry of Axolotl's `datasets` that are lost, without composing the command."""
    tree = yaml.safe_load(f"{AXOLOTL}datasets:\n  - path: rows.jsonl\n    {text}\nval_set_size: 5\n")
    lost = {key for key, _, _ in translate(DIALECT, tree).lost}
    return {key.removeprefix("datasets[0].") for key in lost - {"save_strategy"}}


def entry(folder: Path, text: str, more: str = "") -> tuple[Config, dict[str, str], list[str]]:
    """As `migrated`, for one entry of Axolotl's `datasets`; what a base config loses is left out."""
    config, lost, same = migrated(
        folder / "a.yaml", f"{AXOLOTL}datasets:\n  - path: rows.jsonl\n    {text}\n{more}\nval_set_size: 5\n"
    )
    return config, {key.removeprefix("datasets[0]."): why for key, why in lost.items() if key != "save_strategy"}, same


@pytest.mark.parametrize(
    "text",
    [
        "type: chat_template\n    train_on_eos: last",
        "type: chat_template\n    train_on_eot: all",
        "type: chat_template\n    message_property_mappings: {role: speaker, content: text}",
        "type: chat_template\n    roles: {user: [customer]}",
        "type: chat_template\n    roles: {assistant: [user]}",
        "type: chat_template\n    roles_to_train: [user, assistant]",
        "type: chat_template\n    message_field_training: learn",
        "type: chat_template\n    message_field_training_detail: detail",
        "type: chat_template\n    drop_system_message: true",
        "type: chat_template\n    split_thinking: true",
        "type: chat_template\n    field_thinking: why",
        "type: alpaca\n    shards: 4",
        "type: alpaca\n    preprocess_shards: 2",
        "type: alpaca\n    some_key: 2",
        "type: alpaca_chat.load_qa",
        "type: jeopardy",
        "type: completion",
        "type: {field_instruction: q, format: 'Q {instruction}'}",
    ],
)
def test_a_key_of_a_set_without_counterpart_is_listed(text: str) -> None:
    assert lost_of(text) == {text.rpartition("\n")[2].strip().partition(":")[0]}


@pytest.mark.parametrize(
    "text",
    [
        "type: alpaca\n    ds_type: json\n    split: train\n    trust_remote_code: false",
        "type: gpteacher",
        "type: chat_template\n    train_on_eos: turn\n    roles_to_train: [gpt]",
        "type: chat_template\n    roles: {assistant: [gpt, model], user: [human, user], system: [system]}",
        "type: chat_template\n    message_field_training: train\n    field_tools: tools",
        "type: chat_template\n    message_property_mappings: {role: from, content: value}",
        "type: chat_template\n    field_thinking: reasoning_content\n    chat_template: chatml",
    ],
)
def test_a_key_of_a_set_that_changes_nothing_is_not_listed(text: str) -> None:
    assert lost_of(text) == set()


def test_keys_of_a_set_become_those_of_data(tmp_path: Path) -> None:
    config, lost, same = entry(
        tmp_path,
        "type: chat_template\n    field_messages: turns\n    field_tools: functions\n    field_system: preamble\n"
        "    revision: abc\n    name: en\n    split: extra\n    message_field_training: train",
    )
    data = config.data
    assert (data.format, data.revision, data.subset, data.split) == ("messages", "abc", "en", "extra")
    assert data.columns == {"messages": "turns", "tools": "functions", "system": "preamble"}
    assert lost == {}
    assert "datasets[0].message_field_training" in same


@pytest.mark.full
def test_several_files_of_an_entry_are_several_sets(tmp_path: Path) -> None:
    text = "type: oasst\n    data_files: [a.jsonl, b.jsonl]"
    config, _, _ = migrated(tmp_path / "a.yaml", f"{AXOLOTL}datasets:\n  - path: json\n    {text}\n")
    assert [(part.path, part.format) for part in config.data.mix.values()] == [
        ("a.jsonl", "alpaca-newline"),
        ("b.jsonl", "alpaca-newline"),
    ]
    assert config.data.mix["a"].columns == {"instruction": "INSTRUCTION", "output": "RESPONSE"}


@pytest.mark.full
def test_a_template_of_its_own_stays_with_its_set(tmp_path: Path) -> None:
    second = "  - path: b.jsonl\n    type: chat_template\n    chat_template: llama3\n"
    config, lost, _ = entry(tmp_path, "type: chat_template\n    chat_template: chatml", second)
    assert [part.template for part in config.data.mix.values()] == ["chatml", "llama-3"]
    assert lost == {}
    file, lost, _ = entry(tmp_path, "type: chat_template", "chat_template: jinja\nchat_template_jinja: my.jinja")
    assert (file.data.template, lost) == ("my.jinja", {})


@pytest.mark.matrix(1)
@pytest.mark.parametrize(
    ("special", "tokens", "lost"),
    [
        ("{eos_token: '<|im_end|>'}", ["<|im_start|>", "<|im_end|>"], set()),
        ("{eos_token: '</s>', bos_token: '<s>', unk_token: '<unk>', pad_token: '<x>'}", [], set()),
        ("{bos_token: '<begin>'}", [], {"special_tokens.bos_token"}),
        ("{additional_special_tokens: ['<a>', '<b>']}\ntokens: ['<c>']", ["<c>", "<a>", "<b>"], set()),
    ],
)
def test_special_tokens_become_new_tokens(tmp_path: Path, special: str, tokens: list[str], lost: set[str]) -> None:
    more = f"chat_template: chatml\nspecial_tokens: {special}"
    config, left, _ = entry(tmp_path, "type: chat_template", more)
    assert (config.model.new_tokens, set(left)) == (tokens, lost)


def registry(folder: Path, sets: dict[str, Any]) -> None:
    (folder / "sets").mkdir()
    (folder / "sets" / "dataset_info.json").write_text(json.dumps(sets))


def test_a_registry_is_read_key_by_key(tmp_path: Path) -> None:
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    registry(
        tmp_path,
        {
            "chats": {"file_name": "a.json", "formatting": "sharegpt", "num_samples": 9, "tags": tags,
                      "columns": {"messages": "messages", "tools": "functions", "system": "preamble"}},
            "rows": {"file_name": "b.json", "columns": {"prompt": "q", "response": "a", "system": "preamble"}},
            "odd": {"file_name": "c.json", "formatting": "sharegpt", "folder": "x",
                    "tags": {"user_tag": "customer", "role_tag": "speaker"},
                    "columns": {"messages": "m", "images": "i"}},
        },
    )  # fmt: skip
    config, lost, _ = migrated(
        tmp_path / "f.yaml", FACTORY.format(stage="sft", names="chats,rows,odd") + "max_samples: 5\nval_size: 0.1\n"
    )
    chats, rows, _ = config.data.mix.values()
    assert (chats.format, chats.max_samples) == ("messages", 5)
    assert chats.columns == {"tools": "functions", "system": "preamble"}
    assert rows.columns == {"instruction": "q", "output": "a", "system": "preamble"}
    assert [part.max_samples for part in config.data.mix.values()] == [5, 5, 5]
    assert set(lost) == {"chats.num_samples", "odd.folder", "odd.tags.user_tag", "odd.tags.role_tag",
                         "odd.columns.images"}  # fmt: skip


def test_a_registered_set_to_measure_on_is_found(tmp_path: Path) -> None:
    registry(tmp_path, {"rows": {"file_name": "a.json"}, "held": {"file_name": "b.json"}})
    text = FACTORY.format(stage="sft", names="rows") + "eval_dataset: held\neval_strategy: steps\neval_steps: 20\n"
    config, lost, _ = migrated(tmp_path / "f.yaml", text)
    assert (config.data.eval_path, config.trainer.eval_steps) == (f"{tmp_path}/sets/b.json", 20)
    assert config.task.evaluate
    assert lost == {}


@pytest.mark.full
@pytest.mark.parametrize("names", ["texts", "texts,more"])
def test_registered_documents_are_texts_in_packs(tmp_path: Path, names: str) -> None:
    sets = {name: {"file_name": f"{name}.json", "columns": {"prompt": "body"}} for name in ("texts", "more")}
    registry(tmp_path, sets)
    config, lost, _ = migrated(tmp_path / "f.yaml", FACTORY.format(stage="pt", names=names))
    parts = list(config.data.mix.values()) or [config.data]
    assert [(part.format, part.columns) for part in parts] == [("text", {"text": "body"})] * len(parts)
    assert config.data.packing
    assert set(lost) == {"packing"}


def test_a_builder_without_chat_marks_asks_bare(tmp_path: Path) -> None:
    text = (
        "model: {_component_: torchtune.models.gemma.lora_gemma_2b, lora_attn_modules: [q_proj]}\n"
        "tokenizer: {_component_: torchtune.models.gemma.gemma_tokenizer}\n"
        "checkpointer: {checkpoint_dir: /m}\noptimizer: {_component_: torch.optim.AdamW}\n"
        "dataset: {_component_: torchtune.datasets.alpaca_dataset, split: 'train[:100]', train_on_input: false}\n"
        "dataset_val: {_component_: torchtune.datasets.alpaca_dataset, source: json, data_files: held.json}\n"
        "run_val_every_n_steps: 25\n"
    )
    config, lost, _ = migrated(tmp_path / "t.yaml", text)
    assert (config.data.format, config.data.max_samples) == ("alpaca-newline", 100)
    assert config.data.train_on.value == "assistant"
    assert (config.data.eval_path, config.trainer.eval_steps) == ("held.json", 25)
    assert lost == {}


def test_a_hub_id_that_a_preset_has_becomes_the_preset(tmp_path: Path) -> None:
    preset, _, _ = migrated(tmp_path / "a.yaml", AXOLOTL.replace("my/base", "meta-llama/llama-3.1-8b"))
    assert (preset.model.license, preset.model.gated) == ("llama3.1", True)
    assert preset.model.architecture is not None
    other, _, _ = migrated(tmp_path / "b.yaml", AXOLOTL)
    assert (other.model.name, other.model.license, other.model.architecture) == ("my/base", None, None)
