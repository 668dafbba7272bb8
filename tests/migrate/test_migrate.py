"""`task=migrate`: configs in the forms that other projects document become commands that compose and mean the same."""

from __future__ import annotations

import json
import shlex
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora.config.compose import compose
from qlora.config.fields import config_keys
from qlora.config.foreign_names import ORIGINAL_FLAGS
from qlora.config.options import group_names
from qlora.config.overrides import override_value, write_override
from qlora.config.schema import ComputeDtype, Config, EvaluationName, LoraInit, TaskName, TrainOn
from qlora.data.formats.as_chat import from_alpaca, from_alpaca_prompt, from_any, from_input_output
from qlora.errors import UserError
from qlora.migrate import migrate, read
from qlora.migrate.original import QLORA
from qlora.migrate.recognise import DIALECTS
from qlora.migrate.translation import Dialect, Move, Pick

SCRIPT = r"""#!/bin/bash
# Tunes a chat model on one card.
SIZE=7b
export WANDB_PROJECT=mine
python -u qlora.py \
    --model_name_or_path meta-llama/Llama-2-$SIZE-hf --use_auth \
    --output_dir ./output/mine-$SIZE \
    --dataset "my data/rows (1).json" --dataset_format alpaca \
    --do_train --do_eval --do_mmlu_eval --mmlu_dataset mmlu-fs \
    --evaluation_strategy steps --eval_steps 50 --save_strategy steps --save_steps=100 \
    --eval_dataset_size 200 --max_eval_samples 100 \
    --lora_r 16 --lora_alpha 32 --lora_modules all --lora_dropout 0.05 \
    --bits 4 --quant_type fp4 --double_quant False --bf16 \
    --lr_scheduler_type cosine --warmup_ratio 0.1 --learning_rate 1e-4 --adam8bit \
    --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --max_steps 500 \
    --max_memory_MB 24000 --deepspeed ds.json --data_seed 7 --temperature 0.7 && echo done
python qlora.py --model_name_or_path other
"""

AXOLOTL_YAML = """
base_model: mistralai/Mistral-7B-v0.1
model_type: MistralForCausalLM
load_in_4bit: true
adapter: qlora
datasets:
  - path: ./chats.jsonl
    ds_type: json
    type: chat_template
    field_messages: dialogue
    message_property_mappings: {role: from, content: value}
  - path: tatsu-lab/alpaca
    type: alpaca
    split: train
  - path: my/texts
    type: completion
    field: body
  - path: my/own
    type:
      field_instruction: question
      field_output: answer
      format: "Q: {instruction}"
chat_template: chatml
val_set_size: 0.02
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [q_proj, v_proj]
wandb_project: tuning
wandb_entity: us
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 2e-4
warmup_ratio: 0.03
bf16: auto
gradient_checkpointing: true
flash_attention: true
early_stopping_patience: 2
eval_steps: 40
saves_per_epoch: 2
weight_decay: 0.01
neftune_noise_alpha: 5
some_new_option: 3
special_tokens:
  pad_token: "<pad>"
"""

FACTORY_YAML = """
### model
model_name_or_path: Qwen/Qwen2.5-7B
quantization_bit: 4
double_quantization: false
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: q_proj,v_proj
use_dora: true
### dataset
dataset: first, second
template: qwen
cutoff_len: 1024
max_samples: 500
### output
output_dir: saves/mine
logging_steps: 10
report_to: tensorboard
### train
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
learning_rate: 1.0e-4
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
neftune_noise_alpha: 5
deepspeed: ds_z3.json
### eval
val_size: 0.1
eval_strategy: steps
eval_steps: 50
"""

TORCHTUNE_YAML = """
output_dir: /tmp/out
model:
  _component_: torchtune.models.llama3_1.qlora_llama3_1_8b
  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']
  apply_lora_to_mlp: True
  lora_rank: 16
  lora_alpha: 32
  lora_dropout: 0.1
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: /models/llama/original/tokenizer.model
  max_seq_len: 4096
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: /models/llama
  checkpoint_files: [a.safetensors]
dataset:
  _component_: torchtune.datasets.instruct_dataset
  source: json
  data_files: rows.json
  packed: True
  column_map: {input: question, output: answer}
seed: 3
epochs: 2
max_steps_per_epoch: 100
batch_size: 2
gradient_accumulation_steps: 8
optimizer:
  _component_: bitsandbytes.optim.PagedAdamW8bit
  lr: 3e-4
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 100
loss:
  _component_: torchtune.modules.loss.LinearCrossEntropyLoss
clip_grad_norm: 1.0
compile: True
device: cuda
dtype: bf16
enable_activation_checkpointing: True
metric_logger:
  _component_: torchtune.training.metric_logging.WandBLogger
  project: tuning
log_every_n_steps: 5
profiler: {_component_: torchtune.training.setup_torch_profiler, enabled: False, cpu: True}
"""


NONE_HELD_OUT = {"val_size", "val_set_size", "eval_dataset_size", "dataset_val"}
"""The keys that say how many rows are held out."""
BY_EPOCHS = {"saves_per_epoch", "epochs"}
"""The keys that count steps by epochs."""


def migrated(folder: Path, name: str, text: str) -> tuple[Config, dict[str, str]]:
    """Returns the config that a file becomes, and what of it was lost, by key."""
    (folder / name).write_text(text, encoding="utf-8")
    _, reading = read(folder / name)
    assert reading.config is not None
    return reading.config, {key: why for key, _, why in reading.lost}


def test_a_script_of_the_original(tmp_path: Path) -> None:
    config, lost = migrated(tmp_path, "finetune.sh", SCRIPT)
    assert config.model.name == "meta-llama/Llama-2-7b-hf"
    assert config.model.architecture is not None
    assert (config.data.path, config.data.format) == ("my data/rows (1).json", "alpaca")
    assert (config.data.source_max_len, config.data.target_max_len, config.data.max_length) == (1024, 256, None)
    assert (config.data.eval_dataset_size, config.data.max_eval_samples, config.data.split_seed) == (200, 100, 7)
    assert (config.quantization.bits, config.quantization.quant_type.value) == (4, "fp4")
    assert config.quantization.double_quant is False
    assert config.quantization.compute_dtype is ComputeDtype.bf16
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (16, 32, 0.05)
    assert config.lora.target_modules == ["all-linear"]
    trainer = config.trainer
    assert (trainer.optim, trainer.lr_scheduler_type, trainer.warmup_steps) == ("paged_adamw_8bit", "cosine", 0.1)
    assert (trainer.max_steps, trainer.eval_steps, trainer.save_steps) == (500, 50, 100)
    assert (trainer.learning_rate, trainer.per_device_train_batch_size) == (1e-4, 2)
    assert config.evaluation.name is EvaluationName.mmlu
    assert config.evaluation.shots == 5
    assert config.seed == 42, "transformers' own, which the original takes"
    assert (config.task.evaluate, config.task.predict) == (True, False)
    assert set(lost) == {"max_memory_MB", "deepspeed", "temperature"}


def test_the_originals_defaults_are_kept(tmp_path: Path) -> None:
    config, lost = migrated(tmp_path, "command.txt", "--model_name_or_path my/model --bits 16 --full_finetune\n")
    assert set(lost) == {"bf16"} | ({"eval_dataset_size"} - NONE_HELD_OUT)
    assert "32 bits" in lost["bf16"]
    assert (config.quantization.bits, config.lora.enabled) == (32, False)
    assert config.data.name == "alpaca"
    trainer = config.trainer
    assert (trainer.max_steps, trainer.save_steps, trainer.eval_steps) == (10000, 250, None)
    assert (trainer.gradient_accumulation_steps, trainer.learning_rate, trainer.max_grad_norm) == (16, 2e-4, 0.3)
    config, lost = migrated(
        tmp_path, "p.sh", "python qlora.py --do_train False --do_predict --output_dir x --top_p 0.9"
    )
    assert config.task.name is TaskName.predict
    assert set(lost) == {"output_dir", "top_p", "bf16"}


@pytest.mark.full
@pytest.mark.parametrize(("name", "text"), [("finetune.sh", SCRIPT), ("axolotl.yml", AXOLOTL_YAML)])
def test_a_byte_order_mark_changes_nothing(tmp_path: Path, name: str, text: str) -> None:
    assert migrated(tmp_path, name, f"\ufeff{text}") == migrated(tmp_path, name, text)


def test_an_axolotl_yaml(tmp_path: Path) -> None:
    config, lost = migrated(tmp_path, "axolotl.yml", AXOLOTL_YAML)
    assert (config.quantization.bits, config.quantization.double_quant) == (4, True)
    chats, alpaca, texts, own_rows = config.data.mix.values()
    assert (chats.path, chats.format, chats.columns) == (
        "./chats.jsonl",
        "conversations",
        {"conversations": "dialogue"},
    )
    assert (alpaca.path, alpaca.format) == ("tatsu-lab/alpaca", "alpaca-newline")
    assert (texts.format, texts.columns) == ("text", {"text": "body"})
    assert own_rows.columns == {"instruction": "question", "output": "answer"}
    assert (config.data.template, config.data.max_length, config.data.packing) == ("chatml", 2048, True)
    assert config.data.eval_dataset_size == 0.02
    assert config.lora.target_modules == ["q_proj", "v_proj"]
    trainer = config.trainer
    assert (trainer.num_train_epochs, trainer.max_steps, trainer.eval_steps) == (3, None, 40)
    assert (trainer.optim, trainer.weight_decay, trainer.warmup_steps) == ("adamw_bnb_8bit", 0.01, 0.03)
    assert trainer.group_by_length is False
    assert config.tracking.backend == "wandb"
    assert (config.tracking.project, config.tracking.entity) == ("tuning", "us")
    assert config.callbacks["early_stopping"]["patience"] == 2
    expected = {"saves_per_epoch", "neftune_noise_alpha", "some_new_option", "datasets[2].type", "datasets[3].type"}
    assert set(lost) - {"early_stopping_patience"} == expected - BY_EPOCHS
    assert lost["some_new_option"].startswith("Axolotl 0.18 has no such key")


def test_a_llama_factory_yaml_with_its_registry_of_sets(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    registry = {
        "first": {"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "turns"}},
        "second": {"hf_hub_url": "me/set", "columns": {"prompt": "instruction", "response": "answer"}, "subset": "en"},
    }
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(registry))
    config, lost = migrated(tmp_path, "sft.yaml", FACTORY_YAML)
    first, second = config.data.mix.values()
    assert (first.path, first.format) == (f"{tmp_path}/data/a.json", "conversations")
    assert first.columns == {"conversations": "turns"}
    assert (second.path, second.subset, second.columns) == ("me/set", "en", {"output": "answer"})
    assert second.format == "qlora.data.formats.as_chat:from_alpaca"
    assert (config.data.template, config.data.max_length, config.data.max_train_samples) == ("qwen", 1024, None)
    assert (first.max_samples, second.max_samples) == (500, 500)
    assert config.model.architecture is not None
    assert (config.quantization.bits, config.quantization.double_quant) == (4, False)
    assert (config.lora.r, config.lora.alpha, config.lora.use_dora) == (16, 32, True)
    assert config.lora.target_modules == ["q_proj", "v_proj"]
    assert (config.trainer.num_train_epochs, config.trainer.eval_steps, config.trainer.save_steps) == (2.0, 50, 500)
    assert config.tracking.backend == "tensorboard"
    assert set(lost) == {"neftune_noise_alpha", "deepspeed"}


FULL = "model_name_or_path: my/base\nfinetuning_type: full\npure_bf16: true\ndataset_dir: ONLINE\ndataset: my/rows\n"


@pytest.mark.parametrize(
    ("text", "optim", "arguments", "left"),
    [
        ("use_muon: true", "muon", {}, set()),
        ("use_galore: true", "galore_adamw",
         {"rank": 16, "update_proj_gap": 200, "scale": 2.0, "proj_type": "std"}, set()),
        ("use_galore: true\noptim: adafactor\ngalore_rank: 64\ngalore_layerwise: true\ngalore_target: mlp",
         "galore_adafactor", {"rank": 64, "update_proj_gap": 200, "scale": 2.0, "proj_type": "std"},
         {"galore_layerwise", "galore_target"}),
        ("use_apollo: true\napollo_rank: 1\napollo_scale: 128\napollo_scale_type: tensor", "apollo_adamw",
         {"rank": 1, "update_proj_gap": 200, "scale": 128.0, "proj": "random", "scale_type": "tensor"}, set()),
        ("use_badam: true", "adamw_torch_fused", {}, {"use_badam"}),
    ],
)  # fmt: skip
def test_the_optimizers_of_llama_factory(
    tmp_path: Path, text: str, optim: str, arguments: dict[str, Any], left: set[str]
) -> None:
    config, lost = migrated(tmp_path, "full.yaml", FULL + text)
    assert (config.trainer.optim, config.trainer.optim_args) == (optim, arguments)
    assert set(lost) == left | {"template"}


@pytest.mark.parametrize(
    ("flags", "optim", "arguments"),
    [
        ("--optimizer muon --optim_args momentum=0.9", "muon", {"momentum": 0.9}),
        ("--use_galore true --galore_rank 32", "galore_adamw",
         {"rank": 32, "update_proj_gap": 50, "scale": 1.0, "proj_type": "std"}),
    ],
)  # fmt: skip
def test_the_optimizers_of_ms_swift(tmp_path: Path, flags: str, optim: str, arguments: dict[str, Any]) -> None:
    text = f"swift sft --model my/base --use_hf true --dataset my/rows --tuner_type full {flags}\n"
    config, _ = migrated(tmp_path, "run.sh", text)
    assert (config.trainer.optim, config.trainer.optim_args) == (optim, arguments)


@pytest.mark.parametrize(
    ("name", "optim"),
    [("lion_pytorch", "lion_32bit"), ("ao_adamw_8bit", "adamw_torch_8bit"), ("muon", "muon"),
     ("schedule_free_adamw", "schedule_free_adamw"), ("dion", "adamw_torch_fused")],
)  # fmt: skip
def test_the_optimizers_of_axolotl(tmp_path: Path, name: str, optim: str) -> None:
    text = (
        f"base_model: my/base\nadapter: lora\noptimizer: {name}\nlr_scheduler: constant\ndatasets:\n  - path: my/rows\n"
    )
    config, lost = migrated(tmp_path, "a.yaml", f"{text}    type: alpaca\n")
    assert config.trainer.optim == optim
    assert ("optimizer" in lost) == (name == "dion")


def test_a_llama_factory_set_that_is_registered_nowhere_is_named(tmp_path: Path) -> None:
    config, lost = migrated(tmp_path, "sft.yaml", FACTORY_YAML.replace("first, second", "alone"))
    assert config.data.path == "data/alone.json"
    assert "alone" in lost["dataset"]


def test_a_torchtune_yaml(tmp_path: Path) -> None:
    config, lost = migrated(tmp_path, "qlora.yaml", TORCHTUNE_YAML)
    assert config.model.name == "/models/llama"
    assert (config.quantization.bits, config.quantization.compute_dtype) == (4, ComputeDtype.bf16)
    modules = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert config.lora.target_modules == modules
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (16, 32, 0.1)
    assert config.data.path == "rows.json"
    assert config.data.format == "qlora.data.formats.as_chat:from_input_output", "between the marks of Llama 3"
    assert config.data.template == "llama-3"
    assert config.data.columns == {"input": "question", "output": "answer"}
    assert (config.data.packing, config.data.max_length, config.data.train_on) == (True, 4096, TrainOn.assistant)
    trainer = config.trainer
    assert (trainer.max_steps, trainer.optim, trainer.learning_rate) == (200, "paged_adamw_8bit", 3e-4)
    assert (trainer.weight_decay, trainer.max_grad_norm, trainer.warmup_steps) == (0.01, 1.0, 100)
    assert trainer.compile is True
    assert (config.seed, config.tracking.backend) == (3, "wandb")
    assert set(lost) == {"dataset_val"} - NONE_HELD_OUT


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "a.yaml",
            "base_model: x\nrl: grpo\n",
            "rl=grpo trains by answers that the model generates, judged by rewards",
        ),
        ("b.yaml", "model_name_or_path: x\nstage: ppo\n", "stage=ppo"),
        ("c.yaml", "model: {_component_: a.b}\nquantizer: {_component_: c.d}\n", "trains nothing"),
        ("d.yaml", "hello: world\n", "neither a command of qlora.py nor a YAML of Axolotl"),
        ("e.yaml", "a: [1,\n", "not valid YAML"),
        (
            "rows.jsonl",
            '{"a": 1}\n{"b": 2}\n',
            "rows.jsonl holds rows, not a config; train on them with data=local data.path=",
        ),
        ("f.sh", "echo hello\n", "neither a command of qlora.py"),
        ("g.sh", "python qlora.py --dataset 'open\n", "cannot be read"),
        ("h.yaml", "- a\n- b\n", "neither a command of qlora.py"),
        ("i.yaml", "base_model: x\ndatasets: {path: y}\nsequence_len: long\n", "another form than Axolotl documents"),
        ("j.yaml", "base_model: x\nbase_model: y\n", "duplicate"),
    ],
)
def test_what_cannot_be_translated_is_one_sentence(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        migrated(tmp_path, name, text)
    assert said in str(error.value)


def test_a_missing_file_and_one_that_is_no_text_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read(tmp_path / "config.yaml")
    with pytest.raises(UserError, match="did you mean"):
        read(tmp_path / "confg.yaml")


@pytest.mark.full
def test_what_cannot_stand_together_is_left_out_by_name(tmp_path: Path) -> None:
    text = "base_model: x\nadapter: lora\nload_in_8bit: true\npeft_init_lora_weights: pissa\nlr_scheduler: cosine\n"
    config, lost = migrated(tmp_path, "a.yaml", text + "learning_rate: 1e-4\nlora_r: 8\nlora_alpha: 8\n")
    assert config.quantization.bits == 8
    assert config.lora.init is LoraInit.default
    assert "does not allow" in lost["lora.init"]


@pytest.mark.full
def test_the_task_prints_a_command_and_writes_an_experiment_that_says_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my axolotl.yml").write_text(AXOLOTL_YAML)
    result = migrate(compose(["task=migrate", f"from={tmp_path}/my axolotl.yml"]), tmp_path / "run").to_dict()
    said = capsys.readouterr().out
    command = said[said.index("qlora \\") : said.index("\n\n", said.index("qlora \\"))].replace("\\\n", " ")
    assert shlex.split(command)[1:] == result["overrides"] == shlex.split(result["command"])[1:]
    assert compose(["experiment=my-axolotl"], tmp_path / "run" / "conf") == compose(result["overrides"])
    assert "some_new_option=3" in said
    saved = json.loads((tmp_path / "run" / "migrate.json").read_text())
    assert saved["lost"] == result["lost"]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"conf", "migrate.json"}


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_tables_name_keys_that_exist(dialect: Dialect) -> None:
    keys = {*config_keys(), *group_names(), "hydra.run.dir"}
    named = [rule.key for rule in dialect.rules.values() if isinstance(rule, Move)]
    texts = [
        text
        for rule in dialect.rules.values()
        if isinstance(rule, Pick)
        for item in rule.choices.values()
        for text in item
    ]
    named += [text.partition("=")[0] for text in (*texts, *dialect.fixed)]
    assert not [key for key in named if key not in keys and not key.startswith("callbacks.")]


def test_every_flag_of_the_original_is_known() -> None:
    taken = {"model_name_or_path", "bits", "quant_type", "double_quant", "bf16", "fp16", "full_finetune", "dataset"}
    taken |= {"dataset_format", "do_train", "do_eval", "do_predict", "predict_with_generate", "adam8bit", "optim"}
    taken |= {"max_steps", "num_train_epochs", "lr_scheduler_type", "warmup_ratio", "eval_steps", "save_steps"}
    taken |= {"temperature", "top_k", "top_p", "typical_p", "report_to"}
    assert ORIGINAL_FLAGS.keys() <= taken | QLORA.rules.keys()


@pytest.mark.parametrize("seed", range(3))
def test_any_value_can_be_written_as_an_override_and_read_back(seed: int) -> None:
    stream = np.random.RandomState(seed)
    letters = string.ascii_letters + string.digits + " \"'\\$(){}[],:=~!@#%^&*+-./?<>|ü\t"
    for _ in range(300):
        text = "".join(stream.choice(list(letters), stream.randint(0, 12))).replace("${", "")
        assert override_value(write_override("key", text)) == text
        assert override_value(write_override("key", [text, 1, None])) == [text, 1, None]
        assert override_value(write_override("key", {"a": text, "b": 2.5})) == {"a": text, "b": 2.5}


def test_what_looks_like_a_reference_is_text() -> None:
    for text in ("${seed} \\ ${oc.env:HOME}", "a${b", "$HOME"):
        assert compose(["data=local", write_override("data.path", text)]).data.path == text


def test_alpaca_rows_become_conversations() -> None:
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3", "system": "Be brief.", "history": [["a", "b"]]}
    roles = [(message["role"], message["content"]) for message in from_alpaca(row)["messages"]]
    assert roles == [
        ("system", "Be brief."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "Add.\n1 and 2"),
        ("assistant", "3"),
    ]
    assert from_alpaca({"instruction": "Hi", "input": "", "output": "Ho"})["messages"][0]["content"] == "Hi"


def test_rows_of_other_formats_become_conversations() -> None:
    row = {"instruction": "Add.", "input": "1 and 2", "output": 3}
    question = from_alpaca_prompt(row)["messages"][0]["content"]
    assert question.startswith("Below is an instruction")
    assert question.endswith("### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n")
    assert [turn["content"] for turn in from_input_output(row)["messages"]] == ["1 and 2", 3]
    assert from_any({"query": "Hi", "response": "Ho"})["messages"][0] == {"role": "user", "content": "Hi"}
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    assert from_any(chat) is chat


def test_a_file_without_its_task_is_refused_with_it() -> None:
    with pytest.raises(UserError, match=r"^from=axolotl\.yaml is not read by task=train.*add task=migrate"):
        compose(["from=axolotl.yaml"])


@pytest.mark.full
def test_the_screen_says_when_nothing_was_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        "model_name_or_path: my/base\nstage: sft\ndataset: rows\ndataset_dir: ONLINE\ntemplate: chatml\nval_size: 5\n"
    )
    for more, lost in (("", 0), ("save_strategy: best\n", 1)):
        (tmp_path / "sft.yaml").write_text(f"{text}{more}output_dir: {tmp_path}/saves\ntrust_remote_code: true\n")
        result = migrate(compose(["task=migrate", f"from={tmp_path}/sft.yaml"]), tmp_path / f"run{lost}").to_dict()
        said = capsys.readouterr().out
        assert ("Every setting was translated, and every default kept." in said) is (lost == 0)
        assert (len(result["lost"]), result["defaults_of"]) == (lost, "LLaMA-Factory 0.9.6")
        assert "0.9.6" in said
        assert f"experiment=sft hydra.run.dir={tmp_path}/saves model.trust_remote_code=true" in said.replace("\n", " ")
