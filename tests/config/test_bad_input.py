"""Mistakes a user can make: each is answered by one sentence that names the key, the reason and the way out."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from qlora.config.compose import compose
from qlora.errors import UserError
from qlora.models.tokenizer import load_tokenizer
from qlora.run import Run
from qlora.session import Session

QUICK = [
    *("lora.r=4", "trainer.max_steps=1", "trainer.eval_steps=null", "trainer.warmup_steps=0"),
    "trainer.lr_scheduler_type=warmup_stable_decay",
    "++trainer.lr_scheduler_kwargs.num_decay_steps=1",
    *("data.max_train_samples=16", "data.max_eval_samples=4", "evaluation=loss", "task.predict=false"),
]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def refusal(folder: Path, *overrides: str) -> str:
    """Returns the sentence that a run of these overrides is refused with."""
    with pytest.raises(UserError) as error:
        Run(compose([*QUICK, *overrides]), folder / "run").execute()
    return str(error.value)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A whole model folder: a small Llama with the embedded tokenizer."""
    folder = tmp_path / "base"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=1600,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(compose([]).model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("lora.rnak=3", ["unknown key 'lora.rnak'", "did you mean lora.r", "qlora --help lora"]),
        ("lora.r=three", ["lora.r must be a whole number, got 'three'"]),
        ("lora=al-linear", ["lora has no such option", "did you mean all-linear?", "choose one of"]),
        ("trainer.max_steps=0", ["trainer.max_steps must be positive or null, got 0"]),
    ],
)
def test_a_key_a_value_or_an_option_that_does_not_exist(tmp_path: Path, override: str, parts: list[str]) -> None:
    text = refusal(tmp_path, override)
    assert not [part for part in parts if part not in text], text
    assert not (tmp_path / "run").exists()


def test_a_missing_data_file_suggests_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "my_rows.jsonl").write_text('{"input": "a", "output": "b"}\n')
    text = refusal(tmp_path, "data=local", f"data.path={tmp_path}/my_row.jsonl")
    assert text.startswith(f"data.path={tmp_path}/my_row.jsonl")
    assert "my_rows.jsonl" in text


def test_columns_that_fit_no_format_are_listed(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"frage": "a", "antwort": "b"}\n' * 8)
    text = refusal(tmp_path, "data=local", f"data.path={tmp_path}/rows.jsonl", "data.eval_dataset_size=2")
    assert "data.format" in text
    assert "frage" in text
    assert "antwort" in text


def test_more_held_out_rows_than_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"input": "a", "output": "b"}\n' * 8)
    text = refusal(tmp_path, "data=local", f"data.path={tmp_path}/rows.jsonl", "data.eval_dataset_size=100")
    assert "data.eval_dataset_size" in text
    assert "8" in text


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    ("remove", "parts"),
    [
        (["model.safetensors"], ["has a config but no weights", "model.weights=random"]),
        (["tokenizer.json", "tokenizer_config.json"], ["has no tokenizer", "model.tokenizer"]),
        (["config.json"], ["config.json is missing"]),
    ],
    ids=["weights", "tokenizer", "config"],
)
def test_a_model_folder_that_lacks_a_part(tmp_path: Path, base: Path, remove: list[str], parts: list[str]) -> None:
    for name in remove:
        (base / name).unlink()
    text = refusal(tmp_path, f"model.name={base}")
    assert text.startswith(f"model.name={base}")
    assert not [part for part in parts if part not in text], text


def test_weights_that_were_cut_off(tmp_path: Path, base: Path) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    text = refusal(tmp_path, f"model.name={base}")
    assert text.startswith("model.name")
    assert f"{weights} is damaged or incomplete" in text
    assert "copy it again" in text


def test_an_adapter_given_as_a_model(tmp_path: Path, base: Path) -> None:
    (base / "config.json").unlink()
    (base / "adapter_config.json").write_text("{}")
    assert "is an adapter, not a base model; give its base as model.name" in refusal(tmp_path, f"model.name={base}")


@pytest.mark.full
def test_an_adapter_of_another_base(tmp_path: Path, base: Path) -> None:
    Run(compose([*QUICK, f"model.name={base}"]), tmp_path / "trained").execute()
    text = refusal(tmp_path, "task=evaluate", "model.name=tiny", f"adapter={tmp_path / 'trained'}")
    assert text.startswith("adapter=")
    assert f"it was trained on {base}; give that base as model.name" in text


def test_a_checkpoint_that_is_not_written_as_it_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = PeftModel.save_pretrained

    def save_half(self: PeftModel, folder: str | Path, **options: Any) -> None:
        save(self, folder, **options)
        path = Path(folder) / "adapter_model.safetensors"
        weights = load_file(path)
        weights.popitem()
        save_file(weights, path)

    monkeypatch.setattr(PeftModel, "save_pretrained", save_half)
    text = refusal(tmp_path, "trainer.max_steps=2", "trainer.save_steps=1")
    folder = tmp_path / "run" / "checkpoints"
    assert text.startswith(f"{folder}/unfinished/checkpoint-1: the adapter was not saved as it is in memory (")
    assert "check the disk, and run the same command again" in text
    assert not list(folder.iterdir())


def test_an_adapter_folder_that_is_missing_or_empty(tmp_path: Path) -> None:
    trained = tmp_path / "trained"
    trained.mkdir()
    text = refusal(tmp_path, "task=evaluate", f"adapter={tmp_path}/traned")
    assert "no such folder; no run in" in text, "a folder without an adapter is no help"
    assert "holds no adapter; give adapter=FOLDER" in refusal(tmp_path, "task=predict", f"adapter={trained}")
    (trained / "adapter_config.json").write_text("{}")
    (trained / "adapter_model.safetensors").touch()
    text = refusal(tmp_path, "task=evaluate", f"adapter={tmp_path}/traned")
    assert f"no such folder (did you mean {trained}?)" in text


def test_a_run_that_is_named_without_its_folder_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "outputs" / "runs" / "mine"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "adapter_config.json").write_text("{}")
    (run / "adapter" / "adapter_model.safetensors").touch()
    for name in ("mine", "mien"):
        text = refusal(tmp_path, "task=merge", f"adapter={name}")
        assert text == f"adapter={name}: no such folder (did you mean outputs/runs/mine?)"
    assert refusal(tmp_path, "task=merge", "adapter=another") == "adapter=another: no such folder"
    (run / "result.json").write_text('{"task": "train", "status": "finished", "metrics": {}}')
    newest = "; the newest finished run is outputs/runs/mine"
    assert refusal(tmp_path, "task=merge", "adapter=another") == f"adapter=another: no such folder{newest}"


def test_a_hub_model_without_a_network(tmp_path: Path) -> None:
    text = refusal(tmp_path, "model.name=nobody/nothing")
    assert text.startswith("model.name=nobody/nothing is neither a folder here nor reachable on the hub")
    assert "model.name=FOLDER" in text
    assert "\n" not in text


def test_a_hub_data_set_without_a_network(tmp_path: Path) -> None:
    text = refusal(tmp_path, "data=alpaca")
    assert text.startswith("data.path=tatsu-lab/alpaca")
    assert "data=local data.path=FILE" in text


def test_4_bits_for_a_model_without_linear_layers(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    folder = tmp_path / "convolutions"
    config = MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=0, vocab_size=1600, bos_token_id=1)
    MambaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(compose([]).model).save_pretrained(folder)
    text = refusal(tmp_path, f"model.name={folder}")
    assert text.startswith("quantization.bits=4")
    assert "has no linear layers to quantize; use quantization=none" in text


@pytest.mark.full
def test_the_layers_of_gpt2_are_quantized_although_they_are_no_linear_class(tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=1600, n_positions=256)).save_pretrained(
        folder
    )
    load_tokenizer(compose([]).model).save_pretrained(folder)
    result = Run(compose([*QUICK, f"model.name={folder}"]), tmp_path / "run").execute()
    assert result["status"] == "finished"


@NO_GPU
def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    assert "device=cuda: torch" in (text := refusal(tmp_path, "device=cuda"))
    assert "use device=auto" in text


def test_target_modules_that_match_nothing(tmp_path: Path) -> None:
    text = refusal(tmp_path, "lora.target_modules=[q_prj]")
    assert "lora.target_modules ['q_prj'] match no linear layer (did you mean q_proj?)" in text


def test_a_base_quantized_by_another_method(tmp_path: Path, base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "aqlm", "bits": 4, "group_size": 128}
    (base / "config.json").write_text(json.dumps(config))
    text = refusal(tmp_path, f"model.name={base}")
    assert f"model.name={base} is quantized by aqlm" in text
    assert "Use the original 16-bit weights" in text


def test_a_vocabulary_too_small_for_the_tokenizer(tmp_path: Path) -> None:
    text = refusal(tmp_path, "model.weights=random", "model.tokenizer=tiny", "model.architecture.vocab_size=100")
    assert "model.architecture.vocab_size=100 is too small for the tokenizer's" in text


@pytest.mark.full
def test_a_folder_that_holds_another_run(tmp_path: Path, base: Path) -> None:
    Run(compose([*QUICK, f"model.name={base}"]), tmp_path / "run").execute()
    text = refusal(tmp_path, f"model.name={base}", "seed=7")
    assert "\n  seed: 0 -> 7\n" in text
    assert "hydra.run.dir=FOLDER" in text


def test_a_metric_that_cannot_be_imported(tmp_path: Path) -> None:
    text = refusal(tmp_path, "evaluation.metrics=['no_such_module:score']", "trusted=[no_such_module]")
    assert text.startswith("evaluation.metrics=no_such_module:score: there is no module no_such_module")
    assert "PYTHONPATH" in text


@pytest.mark.parametrize("task", ["train", "evaluate", "predict"])
def test_a_metric_is_looked_for_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    monkeypatch.setattr(Session, "load_base", lambda self: pytest.fail("the model was loaded"))
    monkeypatch.setitem(sys.modules, "evaluate", None)
    adapter = [] if task == "train" else ["adapter=none"]
    text = refusal(tmp_path, f"task={task}", *adapter, "evaluation.metrics=['evaluate:rouge']")
    assert text == "evaluation.metrics=evaluate:rouge needs the package evaluate; pip install 'qlora[eval]'"


@pytest.mark.matrix(1)
@pytest.mark.parametrize(
    "overrides",
    [
        ["task=predict", "adapter=none"],
        ["task=evaluate", "adapter=none", "evaluation=exact-match"],
        ["task=train", "evaluation=exact-match", "evaluation.generate_samples=3"],
        ["task=train", "task.predict=true"],
        ["task=train", "tracking=tensorboard"],
    ],
    ids=" ".join,
)
def test_answers_beyond_the_model_s_context_are_refused_before_it_is_loaded(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(Session, "load_base", lambda self: loaded.append("base") or pytest.skip("loaded"))
    chosen = [f"model.name={base}", "data.max_eval_samples=null", *overrides]
    text = refusal(tmp_path, *chosen, "generation.max_new_tokens=240")
    match = re.fullmatch(
        rf"generation\.max_new_tokens=240 on top of the longest prompt's (\d+) tokens is more than the 256 that {base} "
        r"reads; set generation\.max_new_tokens=(\d+) or data\.source_max_len=16",
        text,
    )
    assert match, text
    assert int(match[1]) + int(match[2]) == 256
    assert not loaded
    fitting = [f"generation.max_new_tokens={match[2]}"], ["generation.max_new_tokens=240", "data.source_max_len=16"]
    for number, lengths in enumerate(fitting):  # the ways out
        with pytest.raises(pytest.skip.Exception):
            Run(compose([*QUICK, *chosen, *lengths]), tmp_path / f"run_{number}").execute()


@pytest.mark.full
def test_a_length_that_no_prompt_could_make_fit_has_one_way_out(tmp_path: Path, base: Path) -> None:
    text = refusal(tmp_path, f"model.name={base}", "adapter=none", "task=predict", "generation.max_new_tokens=256")
    assert re.search(r"; set generation\.max_new_tokens=\d+$", text)


@pytest.mark.full
def test_where_nothing_is_answered_the_context_does_not_matter(tmp_path: Path, base: Path) -> None:
    Run(compose([*QUICK, f"model.name={base}", "generation.max_new_tokens=9999"]), tmp_path / "run").execute()


@pytest.mark.parametrize("node", ["{step:3}", "{_target_:no.such.Callback}"])
def test_a_callback_that_cannot_be_built(tmp_path: Path, node: str) -> None:
    assert refusal(tmp_path, f"+callbacks.mine={node}", "trusted=[no]").startswith("callbacks.mine")


def test_a_run_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match=r"cannot be written .*; choose another with hydra.run.dir=FOLDER"):
        Run(compose(QUICK), tmp_path / "run" / "below").execute()


# The same through the real command line


def command(folder: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "qlora", *overrides],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.matrix(1)
@pytest.mark.parametrize("override", ["lora.rnak=3", "trainer.max_steps=0", "lora.target_modules=[q_prj]"])
def test_the_command_line_says_one_sentence_and_exits_with_1(tmp_path: Path, override: str) -> None:
    done = command(tmp_path, *QUICK, override)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert override.split("=")[0] in lines[0]


def test_a_mistake_in_the_config_leaves_no_run_folder(tmp_path: Path) -> None:
    assert command(tmp_path, "lora.r=0").returncode == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_sentence_too(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = command(tmp_path, *QUICK, "hydra.run.dir=file/run")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "choose another" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_traceback_is_there_for_those_who_ask(tmp_path: Path) -> None:
    done = command(tmp_path, "lora.r=0", HYDRA_FULL_ERROR="1")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "ConfigError: lora.r must be positive" in done.stderr


@pytest.mark.full
def test_a_copied_model_trains_without_a_word(tmp_path: Path, base: Path) -> None:
    shutil.copytree(base, tmp_path / "copy")
    assert Run(compose([*QUICK, f"model.name={tmp_path / 'copy'}"]), tmp_path / "run").execute()["status"] == "finished"
