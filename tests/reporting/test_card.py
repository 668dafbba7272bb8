"""The model card parses on the hub, and its code is the training's own quantization."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from qlora.config.compose import compose
from qlora.config.schema import Config
from qlora.models.model_files import EMBEDDED
from qlora.reporting.model_card import write_model_card

RESULT = {
    "metrics": {"base_eval_loss": 3.2, "eval_loss": 0.4, "base_eval_exact_match": 0.02, "eval_exact_match": 0.97},
}


def write(folder: Path, overrides: list[str], base_model: str | None = None, **options: Any) -> tuple[str, ModelCard]:
    config: Config = compose(overrides)
    result = {**RESULT, "paths": {"adapter": str(folder / "adapter")}}
    name = base_model or config.model.name
    path = write_model_card(folder, config=config, result=result, base_model=name, command="qlora lora.r=8", **options)
    assert path == folder / "README.md"
    return path.read_text(encoding="utf-8"), ModelCard.load(path)


def code_of(text: str) -> str:
    actual = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert actual is not None
    ast.parse(actual[1])
    return actual[1]


def test_the_front_matter_names_base_library_licence_data_and_tags(tmp_path: Path) -> None:
    _, card = write(tmp_path, ["model=llama-7b", "data=alpaca"])
    assert card.data.base_model == "huggyllama/llama-7b"
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.license == "other"
    assert card.data.license_name
    assert card.data.datasets == ["tatsu-lab/alpaca"]
    assert {"qlora", "lora", "4-bit"} <= set(card.data.tags)


def test_what_is_not_on_the_hub_is_not_claimed_to_be_there(tmp_path: Path) -> None:
    _, card = write(tmp_path, [])
    assert card.data.license == "mit"
    assert card.data.get("base_model") is None
    assert card.data.get("datasets") is None


def test_a_mixture_s_card_says_its_size_and_what_computes_a_token(tmp_path: Path) -> None:
    size = "30,532.1 M parameters, 3,353.0 M of them active (8 of 128 experts a token)"
    text, _ = write(tmp_path, ["model=qwen3-30b-a3b"], mixture=size)
    assert f"| base | {size} |" in text
    assert "| base | " not in write(tmp_path, [])[0]


def test_numbers_stand_before_and_after(tmp_path: Path) -> None:
    text, _ = write(tmp_path, [])
    assert "| loss | 3.200 | 0.400 |" in text
    assert "| exact match | 2.0 % | 97.0 % |" in text


def test_the_command_and_the_versions_are_given(tmp_path: Path) -> None:
    text, _ = write(tmp_path, ["trainer.learning_rate=0.003"])
    assert "```bash\nqlora lora.r=8\n```" in text
    assert "torch " in text
    assert "0.003" in text


@pytest.mark.matrix(1)
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_the_code_quantizes_as_the_training_did(quantization: str, tmp_path: Path) -> None:
    import torch
    from transformers import BitsAndBytesConfig

    overrides = [f"quantization={quantization}", "model=llama-7b", "data=alpaca"]
    text, _ = write(tmp_path, overrides, compute_dtype="float16")
    code = code_of(text)
    call = re.search(r"quantization = (BitsAndBytesConfig\(.*?\n\))", code, re.DOTALL)
    assert call is not None
    built = eval(call[1], {"BitsAndBytesConfig": BitsAndBytesConfig, "torch": torch})
    config = compose(overrides).quantization
    if config.bits == 8:
        assert (built.load_in_8bit, built.llm_int8_threshold) == (True, config.int8_threshold)
        return
    assert built.load_in_4bit
    assert built.bnb_4bit_quant_type == config.quant_type.value
    assert built.bnb_4bit_use_double_quant == config.double_quant
    assert built.bnb_4bit_compute_dtype is torch.float16


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["quantization=none"],
        ["quantization=fp32", "lora=none"],
        ["model.revision=abc", "model.new_tokens=[a]"],
        ["model.weights=random", "quantization=fp32", "lora=none"],
    ],
)
def test_the_code_is_valid_and_loads_this_folders_weights(overrides: list[str], tmp_path: Path) -> None:
    text, _ = write(tmp_path, overrides, example_prompt='say "hi"\n')
    code = code_of(text)
    assert ("PeftModel" in code) == ("lora=none" not in overrides)
    assert r"""prompt = 'say "hi"\n'""" in code
    assert ('folder = "adapter"' in code) == ("lora=none" not in overrides)
    if "model.revision=abc" in overrides:
        assert 'revision="abc"' in code
        assert "resize_token_embeddings" in code


def test_a_drawn_base_is_named_as_such_and_drawn_again_by_a_command(tmp_path: Path) -> None:
    text, card = write(tmp_path, ["model=llama-7b", "model.weights=random", "seed=3"])
    assert "A LoRA adapter for random weights in the shape of [huggyllama/llama-7b](" in text
    assert card.data.get("base_model") is None
    assert "initialised at random from seed 3" in text
    assert "\nqlora lora.r=8 task=chat adapter=adapter  # seen from the folder of this card\n" in text
    assert "from_pretrained" not in text


@pytest.mark.parametrize("quantization", ["nf4", "fp32"])
def test_the_code_runs_with_transformers_and_peft_alone(
    quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    base = tmp_path / "base"
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED["tiny"])
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(base)
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(target_modules="all-linear"))
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    overrides = [f"model.name={base}", f"quantization={quantization}", "generation.max_new_tokens=2"]
    text, _ = write(tmp_path, overrides, example_prompt="stone owl")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code_of(text), names)
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]


def test_a_card_says_what_is_not_known(tmp_path: Path) -> None:
    text, _ = write(tmp_path, [])
    assert "one seed" in text
    assert "invented world" in text


@pytest.mark.matrix(3)
@pytest.mark.parametrize(
    ("overrides", "row"),
    [
        (["trainer.max_steps=1"], "| length | 1 step |"),
        (["trainer.max_steps=2000"], "| length | 2,000 steps |"),
        (["trainer.max_steps=null", "trainer.num_train_epochs=1"], "| length | 1 epoch |"),
        (["trainer.max_steps=null", "trainer.num_train_epochs=0.5"], "| length | 0.5 epochs |"),
        (["trainer.per_device_train_batch_size=1"], "| batch | 1 row x "),
        (["data.source_max_len=null", "data.target_max_len=256"], "| tokens a row | answer up to 256 |"),
        (
            ["data.source_max_len=1024", "data.target_max_len=null", "data.max_length=2048"],
            "| tokens a row | prompt up to 1,024, row up to 2,048 |",
        ),
        (["data.source_max_len=null", "data.target_max_len=null"], "| tokens a row | no limit |"),
        (["trainer.lr_scheduler_type=constant"], "| learning rate | 0.002, constant |"),
        (["trainer.lr_scheduler_type=linear", "trainer.warmup_steps=1"], "0.002, linear, warm-up over 1 step |"),
        (["trainer.lr_scheduler_type=linear", "trainer.warmup_steps=0.03"], "linear, warm-up over 3 % of the steps |"),
        (["trainer.lr_scheduler_type=linear", "trainer.warmup_steps=0"], "| learning rate | 0.002, linear |"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_settings_say_what_is_set_and_nothing_that_is_not(tmp_path: Path, overrides: list[str], row: str) -> None:
    plain = ["trainer.lr_scheduler_kwargs=null"] if "lr_scheduler_type" in overrides[0] else []
    text, _ = write(tmp_path, ["trainer.learning_rate=2e-3", "trainer.warmup_steps=20", *plain, *overrides])
    assert row in text.replace("\\_", "_")
    assert "None" not in text
