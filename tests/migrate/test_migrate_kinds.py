"""Configs of other tools that train other adapters than plain LoRA."""

from __future__ import annotations

from pathlib import Path

from tests.migrate.test_migrate import migrated

AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
adapter: qlora
load_in_4bit: true
lora_r: 16
lora_alpha: 32
lora_target_linear: true
lora_rank_pattern: {down_proj: 8, ^model.layers.0.self_attn.q_proj: 4}
lora_alpha_pattern: {down_proj: 16}
peft_layers_to_transform: [0, 1]
datasets: [{path: rows.jsonl, type: alpaca}]
micro_batch_size: 1
gradient_accumulation_steps: 1
num_epochs: 1
learning_rate: 0.0002
"""
FACTORY = """
model_name_or_path: Qwen/Qwen2.5-7B
stage: sft
do_train: true
finetuning_type: oft
oft_block_size: 16
oft_target: q_proj,v_proj
dataset: first
template: qwen
learning_rate: 1.0e-4
"""


def test_axolotl_s_ranks_and_layers(tmp_path: Path) -> None:
    config, lost = migrated(tmp_path, "a.yaml", AXOLOTL)
    assert config.lora.rank_pattern == {"down_proj": 8, "model.layers.0.self_attn.q_proj": 4}
    assert config.lora.alpha_pattern == {"down_proj": 16}
    assert config.lora.layers == [0, 1]
    assert not {"lora_rank_pattern", "lora_alpha_pattern", "peft_layers_to_transform"} & lost.keys()


def test_axolotl_s_regular_expressions_are_named_as_lost(tmp_path: Path) -> None:
    _, lost = migrated(tmp_path, "a.yaml", AXOLOTL.replace("down_proj: 8", "'.*mlp': 8"))
    assert lost["lora_rank_pattern"].startswith("its regular expressions match ends of names: write lora.rank_pattern")


def test_llama_factory_s_oft(tmp_path: Path) -> None:
    config, lost = migrated(tmp_path, "f.yaml", FACTORY)
    assert (config.lora.kind, config.lora.options) == ("oft", {"oft_block_size": 16})
    assert config.lora.target_modules == ["q_proj", "v_proj"]
    assert not {name for name in lost if "oft" in name or "lora" in name or name == "finetuning_type"}


def test_ms_swift_s_vera_and_ia3(tmp_path: Path) -> None:
    command = (
        "swift sft --model Qwen/Qwen2.5-7B --dataset a.jsonl --train_type {} --vera_rank 128 --learning_rate 1e-3\n"
    )
    config, lost = migrated(tmp_path, "s.sh", command.format("vera"))
    assert (config.lora.kind, config.lora.r, config.lora.dropout) == ("vera", 128, 0.0)
    assert "tuner_type" not in lost
    config, _ = migrated(tmp_path, "i.sh", command.format("ia3"))
    assert config.lora.kind == "ia3"


def test_modules_that_train_whole(tmp_path: Path) -> None:
    config, lost = migrated(tmp_path, "a.yaml", AXOLOTL + "lora_modules_to_save: [embed_tokens, norm]\n")
    assert config.lora.modules_to_save == ["embed_tokens", ".*norm"]  # PEFT matches ends of names
    assert "lora_modules_to_save" not in lost
    oft, lost = migrated(tmp_path, "f.yaml", FACTORY + "additional_target: embed_tokens,lm_head\n")
    assert oft.lora.modules_to_save == ["embed_tokens", "lm_head"]
    full = FACTORY.replace("finetuning_type: oft", "finetuning_type: full") + "additional_target: lm_head\n"
    assert migrated(tmp_path, "g.yaml", full)[0].lora.modules_to_save == []
