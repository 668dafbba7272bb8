"""`task=migrate` keeps what the other tool does where its config says nothing: twenty configs, compared key by key.

What each tool does is written down here from its source, in our keys, apart from the tables that translate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora.config.compose import compose
from qlora.config.saved_config import config_to_dict, flatten
from qlora.migrate import read
from qlora.migrate.recognise import DIALECTS

TRAINER = {
    "trainer.per_device_train_batch_size": 8, "trainer.per_device_eval_batch_size": 8,
    "trainer.gradient_accumulation_steps": 1, "trainer.learning_rate": 5e-5, "trainer.weight_decay": 0.0,
    "trainer.adam_beta1": 0.9, "trainer.adam_beta2": 0.999, "trainer.adam_epsilon": 1e-8, "trainer.max_grad_norm": 1.0,
    "trainer.num_train_epochs": 3.0, "trainer.max_steps": None, "trainer.lr_scheduler_type": "linear",
    "trainer.warmup_steps": 0, "trainer.optim": "adamw_torch_fused", "trainer.gradient_checkpointing": False,
    "trainer.logging_steps": 500, "trainer.eval_steps": None, "trainer.save_steps": 500,
    "trainer.save_total_limit": None, "trainer.group_by_length": False, "seed": 42, "tracking.backend": "none",
    "data.source_max_len": None, "data.target_max_len": None, "data.packing": False, "data.train_on": "assistant",
    "data.on_too_long": "truncate", "data.max_train_samples": None, "data.max_samples": None,
    "data.eval_dataset_size": 0, "lora.enabled": True, "lora.use_dora": False,
    "lora.use_rslora": False, "lora.dtype": "fp32", "lora.init": "default", "lora.loraplus_lr_ratio": None,
    "quantization.bits": 16, "quantization.compute_dtype": "auto", "evaluation.name": "rows", "task.predict": False,
}  # fmt: skip
"""Of transformers 5.23, and of every tool that says nothing else."""
AXOLOTL = TRAINER | {
    "trainer.per_device_train_batch_size": 1, "trainer.per_device_eval_batch_size": 1, "trainer.num_train_epochs": 1.0,
    "trainer.lr_scheduler_type": "cosine", "trainer.warmup_steps": 0.03, "trainer.save_steps": None,
    "trainer.save_total_limit": 4, "trainer.logging_steps": 1, "data.max_length": 512, "data.on_too_long": "drop",
    "lora.dropout": 0.0,
}  # fmt: skip
FACTORY = TRAINER | {
    "trainer.gradient_checkpointing": True, "lora.r": 8, "lora.alpha": 16, "lora.dropout": 0.0,
    "lora.target_modules": ["all-linear"], "data.max_length": 2048,
}  # fmt: skip
TORCHTUNE = TRAINER | {
    "trainer.per_device_train_batch_size": 1, "trainer.num_train_epochs": 1, "trainer.learning_rate": 1e-3,
    "trainer.lr_scheduler_type": "constant", "trainer.optim": "adamw_torch", "trainer.weight_decay": 0.01,
    "trainer.max_grad_norm": 0, "trainer.logging_steps": 1, "trainer.save_steps": None, "lora.r": 8, "lora.alpha": 16,
    "lora.dropout": 0.0, "quantization.compute_dtype": "bf16", "lora.dtype": "bf16", "data.max_length": None,
}  # fmt: skip
TORCHTUNE = {
    key: value for key, value in TORCHTUNE.items() if key not in ("seed", "trainer.per_device_eval_batch_size")
}
ORIGINAL = TRAINER | {
    "trainer.per_device_train_batch_size": 1, "trainer.gradient_accumulation_steps": 16, "trainer.learning_rate": 2e-4,
    "trainer.max_grad_norm": 0.3, "trainer.num_train_epochs": None, "trainer.max_steps": 10000,
    "trainer.lr_scheduler_type": "constant", "trainer.warmup_steps": 0.03, "trainer.optim": "paged_adamw_32bit",
    "trainer.gradient_checkpointing": True, "trainer.logging_steps": 10, "trainer.save_steps": 250,
    "trainer.save_total_limit": 40, "trainer.group_by_length": True, "data.source_max_len": 1024,
    "data.target_max_len": 256, "data.max_length": None, "lora.r": 64, "lora.alpha": 16, "lora.dropout": 0.0,
    "lora.target_modules": ["all-linear"], "quantization.bits": 4, "quantization.double_quant": True,
    "quantization.compute_dtype": "fp32",
}  # fmt: skip
TRL = TRAINER | {
    "trainer.learning_rate": 2e-5, "trainer.logging_steps": 10, "trainer.gradient_checkpointing": True, "lora.r": 16,
    "lora.alpha": 32, "lora.dropout": 0.05, "data.max_length": 1024, "data.train_on": "all", "quantization.bits": 32,
    "quantization.compute_dtype": "bf16",
}  # fmt: skip
SWIFT = TRAINER | {
    "trainer.per_device_train_batch_size": 1, "trainer.per_device_eval_batch_size": 1,
    "trainer.gradient_accumulation_steps": 16, "trainer.learning_rate": 1e-4, "trainer.weight_decay": 0.1,
    "trainer.adam_beta2": 0.95, "trainer.lr_scheduler_type": "cosine", "trainer.logging_steps": 5,
    "trainer.gradient_checkpointing": True, "tracking.backend": "tensorboard", "lora.r": 8, "lora.alpha": 32,
    "lora.dropout": 0.05, "lora.target_modules": ["all-linear"], "data.max_length": None, "data.on_too_long": "drop",
}  # fmt: skip
FULL = {"lora.r", "lora.alpha", "lora.dropout", "lora.target_modules", "lora.dtype"}
"""What is not read where all weights are trained."""
UNSAID = {"data.max_samples", "data.max_train_samples", "trainer.per_device_eval_batch_size"}
"""Keys whose defaults here are null, or matter to no training."""
NAMES = {"axolotl": "Axolotl", "factory": "LLaMA-Factory", "torchtune": "torchtune", "original": "qlora.py",
         "trl": "TRL", "swift": "ms-swift"}  # fmt: skip
CHAT = "qlora.data.formats.as_chat:from_alpaca"

AX = "base_model: Qwen/Qwen3-8B\nadapter: lora\nlora_r: 16\nlora_alpha: 32\nlora_target_linear: true\n"
AX_ROWS = "datasets:\n  - path: rows.jsonl\n    type: alpaca\n"
AX_LORA = {"lora.r": 16, "lora.alpha": 32, "lora.target_modules": ["all-linear"], "data.format": "alpaca-newline"}
LF = "model_name_or_path: Qwen/Qwen3-8B\nstage: sft\ndataset: rows\ntemplate: qwen3_nothink\n"
LF_DATA = {"data.format": CHAT, "data.template": "chatml", "data.path": "data/rows.json", "model.license": "apache-2.0"}
TUNE = """
model: {_component_: torchtune.models.llama3_1.lora_llama3_1_8b, lora_attn_modules: [q_proj, v_proj]}
tokenizer: {_component_: torchtune.models.llama3.llama3_tokenizer, path: /m/tokenizer.model}
checkpointer: {_component_: torchtune.training.FullModelHFCheckpointer, checkpoint_dir: /m}
dataset: {_component_: torchtune.datasets.alpaca_cleaned_dataset}
optimizer: {_component_: torch.optim.AdamW}
"""
TUNE_DATA = {
    "data.format": "qlora.data.formats.as_chat:from_alpaca_prompt",
    "data.template": "llama-3",
    "data.train_on": "all",
    "data.path": "yahma/alpaca-cleaned",
    "lora.target_modules": ["q_proj", "v_proj"],
}
SAMPLES = {"data.path": "rows.jsonl", "data.template": "auto"}
SW_DATA = SAMPLES | {"data.format": "qlora.data.formats.as_chat:from_any"}

CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "axolotl-lora": ("a.yaml", AX + AX_ROWS, AXOLOTL, AX_LORA | {"model.license": "apache-2.0"}),
    "axolotl-qlora": (
        "a.yaml",
        AX.replace("adapter: lora", "adapter: qlora\nload_in_4bit: true") + AX_ROWS + "bf16: true\nmax_steps: 1000\n",
        AXOLOTL,
        AX_LORA | {"quantization.bits": 4, "quantization.double_quant": True, "quantization.compute_dtype": "bf16",
                   "trainer.max_steps": 1000, "trainer.num_train_epochs": None, "trainer.warmup_steps": 30,
                   "trainer.save_steps": "1ep"},
    ),
    "axolotl-fp16": ("a.yaml", AX + AX_ROWS + "fp16: true\nval_set_size: 0.1\n", AXOLOTL,
                     AX_LORA | {"quantization.compute_dtype": "fp16", "data.eval_dataset_size": 0.1}),
    "axolotl-fp32": ("a.yaml", AX + AX_ROWS + "bf16: false\nmicro_batch_size: 2\n", AXOLOTL,
                     AX_LORA | {"quantization.bits": 32, "quantization.compute_dtype": "fp32",
                                "trainer.per_device_train_batch_size": 2, "trainer.per_device_eval_batch_size": 2}),
    "axolotl-full": (
        "a.yaml", "base_model: Qwen/Qwen3-8B\nexcess_length_strategy: truncate\n" + AX_ROWS, AXOLOTL,
        {"lora.enabled": False, "data.on_too_long": "truncate", "data.format": "alpaca-newline"},
    ),
    "axolotl-chats": (
        "a.yaml",
        AX + "chat_template: chatml\nspecial_tokens: {eos_token: '<|im_end|>', pad_token: '<pad>'}\ndatasets:\n"
        "  - path: chats.jsonl\n    type: chat_template\n    field_tools: functions\n    revision: abc\n"
        "    roles: {assistant: [gpt, model], user: [human]}\n",
        AXOLOTL,
        {"data.format": "messages", "data.template": "chatml", "data.columns.tools": "functions",
         "data.revision": "abc", "model.new_tokens": ["<|im_start|>", "<|im_end|>"]},
    ),
    "factory-lora": ("f.yaml", LF, FACTORY, LF_DATA),
    "factory-samples": ("f.yaml", LF + "max_samples: 40\nval_size: 0.1\n", FACTORY,
                        LF_DATA | {"data.max_samples": 40, "data.eval_dataset_size": 0.1}),
    "factory-full": ("f.yaml", LF + "finetuning_type: full\nbf16: true\n", FACTORY, LF_DATA | {
        "lora.enabled": False, "quantization.bits": 32, "quantization.compute_dtype": "bf16"}),
    "factory-texts": ("f.yaml", LF.replace("stage: sft", "stage: pt") + "quantization_bit: 4\n", FACTORY, {
        "data.format": "text", "data.packing": True, "data.train_on": "all", "quantization.bits": 4,
        "quantization.double_quant": True, "data.columns.text": "instruction"}),
    "factory-arguments": (
        "run.sh", "llamafactory-cli train --model_name_or_path Qwen/Qwen3-8B --stage sft --dataset rows \\\n"
        "  --template qwen3_nothink --lora_rank 4 --report_to wandb tensorboard", FACTORY,
        LF_DATA | {"lora.r": 4, "lora.alpha": 8, "tracking.backend": "wandb"},
    ),
    "torchtune-lora": ("t.yaml", TUNE, TORCHTUNE, TUNE_DATA),
    "torchtune-qlora": (
        "t.yaml",
        TUNE.replace("lora_llama3_1_8b", "qlora_llama3_1_8b") + "dtype: fp32\n"
        "lr_scheduler: {_component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup}\n",
        TORCHTUNE,
        TUNE_DATA | {"quantization.bits": 4, "quantization.compute_dtype": "fp32", "lora.dtype": "fp32",
                     "trainer.lr_scheduler_type": "cosine"},
    ),
    "original": ("q.sh", "python qlora.py --model_name_or_path huggyllama/llama-7b --do_eval \\", ORIGINAL,
                 {"data.path": "tatsu-lab/alpaca", "data.format": "alpaca", "data.eval_dataset_size": 1024,
                  "model.architecture.hidden_size": 4096}),
    "original-file": ("q.sh", "python qlora.py --bf16 --dataset rows.json --do_mmlu_eval --warmup_ratio 0.1", ORIGINAL,
                      {"data.format": "input-output", "quantization.compute_dtype": "bf16", "lora.dtype": "bf16",
                       "evaluation.name": "mmlu", "evaluation.shots": 5, "trainer.warmup_steps": 0.1}),
    "trl-full": ("t.yaml", "model_name_or_path: Qwen/Qwen2.5-0.5B\ndataset_name: rows.jsonl\n", TRL,
                 SAMPLES | {"lora.enabled": False}),
    "trl-qlora": (
        "t.yaml",
        "model_name_or_path: Qwen/Qwen2.5-0.5B\ndataset_name: rows.jsonl\nuse_peft: true\nload_in_4bit: true\n"
        "completion_only_loss: true\nmax_length: null\neval_strategy: steps\n",
        TRL,
        SAMPLES | {"quantization.bits": 4, "quantization.double_quant": False, "lora.dtype": "bf16",
                   "lora.target_modules": ["q_proj", "v_proj"], "data.train_on": "assistant", "data.max_length": None,
                   "trainer.eval_steps": 10, "data.eval_split": "test", "data.eval_dataset_size": 1},
    ),
    "trl-arguments": ("run.sh", "trl sft --model_name_or_path EleutherAI/pythia-160m --dataset_name rows.jsonl \\\n"
                      "  --use_peft --dtype bfloat16 --no_gradient_checkpointing --packing", TRL,
                      SAMPLES | {"quantization.bits": 16, "lora.target_modules": ["query_key_value"],
                                 "trainer.gradient_checkpointing": False, "data.packing": True}),
    "swift-lora": ("run.sh", "CUDA_VISIBLE_DEVICES=0 \\\nswift sft --model Qwen/Qwen3-8B --dataset rows.jsonl#50 \\\n"
                   "  --per_device_train_batch_size 4 # a comment", SWIFT,
                   SW_DATA | {"data.max_samples": 50, "trainer.per_device_train_batch_size": 4,
                              "trainer.gradient_accumulation_steps": 4}),
    "swift-full": ("args.txt", "--model Qwen/Qwen3-8B --tuner_type full --dataset rows.jsonl --torch_dtype bfloat16\n"
                   "--split_dataset_ratio 0.01 --loss_scale last_round", SWIFT,
                   SW_DATA | {"lora.enabled": False, "trainer.learning_rate": 1e-5, "data.eval_dataset_size": 0.01,
                              "quantization.compute_dtype": "bf16", "data.train_on": "last",
                              "trainer.eval_steps": 500}),
}  # fmt: skip


@pytest.mark.matrix(2)
@pytest.mark.parametrize("case", CASES)
def test_a_config_trains_as_the_other_tool_does(tmp_path: Path, case: str) -> None:
    name, text, defaults, changes = CASES[case]
    (tmp_path / name).write_text(text, encoding="utf-8")
    dialect, reading = read(tmp_path / name)
    assert dialect.name == NAMES[case.partition("-")[0]]
    expected = defaults | changes
    if not expected["lora.enabled"]:
        expected = {key: value for key, value in expected.items() if key not in FULL}
    values = dict(flatten(config_to_dict(compose(reading.overrides))))
    differ = {key: (values.get(key), value) for key, value in expected.items() if values.get(key) != value}
    assert not differ, "what the run does, and what the other tool does"
    said = {override.partition("=")[0] for override in reading.overrides}
    assert {key for key in TRAINER if key.startswith(("trainer.", "data."))} - UNSAID <= said, "no default is ours"


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_every_default_has_its_place(dialect: Any) -> None:
    assert dialect.version
    levels = {key.partition(".")[0] for key in dialect.defaults}
    assert not [key for key in levels if not dialect.knows(key)], "a default is one of the tool's own keys"
