"""Whose config a file is, is told by its keys; a file of no dialect is refused with a way on."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.errors import UserError
from qlora.migrate.recognise import recognise


def told(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return recognise(folder / name)[0].name


@pytest.mark.parametrize(
    ("name", "text", "tool"),
    [
        ("a.yaml", "base_model: x\nmicro_batch_size: 2\n", "Axolotl"),
        ("b.yaml", "model_name_or_path: x\nlearning_rate: 1e-4\nlora_rank: 8\n", "LLaMA-Factory"),
        ("c.yaml", "model_name_or_path: x\nlearning_rate: 1e-4\nlora_r: 8\ndataset_name: y\n", "TRL"),
        ("d.yaml", "model: x\ntuner_type: lora\ndataset: [a, b]\n", "ms-swift"),
        ("e.yaml", "model: {_component_: a.b}\nbatch_size: 2\n", "torchtune"),
        ("f.txt", "--model_name_or_path x --bits 4 --max_steps 10", "qlora.py"),
        ("g.txt", "--model_name_or_path x --use_peft --dataset_name y", "TRL"),
        ("h.txt", "--model x --tuner_type lora\n--dataset 'a#5'", "ms-swift"),
        ("i.txt", "--stage sft --model_name_or_path x --finetuning_type lora", "LLaMA-Factory"),
        ("j.sh", "accelerate launch trl/scripts/sft.py --model_name_or_path x --dataset_name y", "TRL"),
        ("k.sh", "export N=8\nNPROC_PER_NODE=$N swift pt --model x --dataset y", "ms-swift"),
        ("l.sh", "python sft.py --model_name_or_path x --dataset_name y --use_peft", "TRL"),
        ("m.sh", "torchrun qlora.py --lora_r 8", "qlora.py"),
        ("n.sh", "accelerate launch trl/scripts/dpo.py --model_name_or_path x --dataset_name y", "TRL's dpo"),
        ("o.sh", "trl reward --model_name_or_path x --dataset_name y", "TRL's reward"),
        ("p.sh", "swift rlhf --rlhf_type kto --model x --dataset y", "ms-swift"),
        ("q.yaml", "model_name_or_path: x\ndataset_name: y\nloss_type: [sigmoid]\nuse_peft: true\n", "TRL's dpo"),
        ("r.yaml", "model_name_or_path: x\ndataset_name: y\ndesirable_weight: 1.3\nuse_peft: true\n", "TRL's kto"),
        ("s.yaml", "model_name_or_path: x\ndataset_name: y\ncpo_alpha: 0\nuse_peft: true\n", "TRL's cpo"),
    ],
)
def test_a_file_is_told_by_its_keys(tmp_path: Path, name: str, text: str, tool: str) -> None:
    assert told(tmp_path, name, text) == tool


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", "base_model: x\n", "neither a command"),
        ("b.yaml", "base_model: x\nmerge_method: ties\nmodels: []\n", "mergekit (merge_method)"),
        ("c.yaml", "model_type: llm\nbase_model: x\ninput_features: []\nadapter: {type: lora}\n", "Ludwig"),
        ("d.yaml", "task: llm-sft\nbase_model: x\nproject_name: y\nlog: wandb\nbackend: local\n", "neither a command"),
        ("e.yaml", "model_name_or_path: x\nuse_peft: true\ndataset_mixer: {y: 1}\n", "the alignment handbook"),
        ("f.yaml", "model_name_or_path: x\nlearning_rate: 1e-4\n", "may be of LLaMA-Factory, TRL"),
        ("g.txt", "--model_name_or_path x --learning_rate 1e-4", "may be of qlora.py, TRL, LLaMA-Factory"),
        ("h.txt", "--pretrain x --train_batch_size 8 --zero_stage 3", "neither a command"),
        ("i.json", '{"base_model_name_or_path": "x", "r": 8}', "a finished adapter"),
        ("j.py", "from unsloth import FastLanguageModel\n", "is a program"),
        ("k.ipynb", "{}", "docs/migrate.md"),
        ("rows.jsonl", '{"a": 1}\n{"a": 2}\n', "rows.jsonl holds rows, not a config; train on them with data=local"),
        ("rows.json", '[{"a": 1}]', "holds rows"),
        ("rows.yaml", '{"a": 1}\n{"a": 2}\n', "rows.yaml, line 2: this is not valid YAML"),
        ("l.sh", "axolotl train config.yml --bf16 true", "give from=config.yml"),
        ("m.sh", "llamafactory-cli train sft.yaml", "give from=sft.yaml"),
        ("n.sh", "trl sft --config sft.yaml --lora_r 8", "give from=sft.yaml"),
        ("o.sh", "trl grpo --model_name_or_path x", "trl grpo is no training on answers"),
        ("p.sh", "swift infer --model x", "swift infer is no training on answers"),
        (
            "q.yaml",
            "model_name_or_path: x\nuse_peft: true\ndataset_name: y\nbeta: 0.1\n",
            "beta is read by trl dpo, kto",
        ),
        ("q.sh", "tune run lora_finetune_single_device --config llama3/8B", "reads its settings in a file"),
    ],
)
def test_another_file_is_refused_with_a_way_on(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        told(tmp_path, name, text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_arguments_are_read_as_a_shell_reads_them(tmp_path: Path) -> None:
    text = (
        "# don't mind\nswift sft --model x --dataset a#5 'b c' --report_to none --lora_alpha=4 \\\n  --packing # no\n"
    )
    (tmp_path / "run.sh").write_text(text + "swift sft --model other\n")
    _, arguments = recognise(tmp_path / "run.sh")
    assert arguments == {
        "model": "x",
        "dataset": ["a#5", "b c"],
        "report_to": "none",
        "lora_alpha": 4,
        "packing": True,
    }
