"""Tokenizers: the padding token, repaired special tokens, and new tokens whose rows alone are trained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from qlora import adapters
from qlora.config.compose import compose
from qlora.config.schema import Config
from qlora.errors import UserError
from qlora.models import loading
from qlora.models.model_config import load_model_config
from qlora.models.new_tokens import resize_embeddings
from qlora.models.tokenizer import (
    load_saved_tokenizer,
    load_tokenizer,
    pad_token_id,
    repair_special_tokens,
    save_tokenizer,
)
from qlora.quantization.placement import find_placement
from qlora.runtime.device import find_device

REAL = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"


def toy(**special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of eight words; `special` names the roles, e.g. `eos_token="</s>"`."""
    vocabulary = ("<unk>", "<s>", "</s>", "<pad>", "a", "b", "c", "d")
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def real(name: str) -> PreTrainedTokenizerBase:
    if not (REAL / name).is_dir():
        pytest.skip(f"no {name} tokenizer beside this checkout")
    return AutoTokenizer.from_pretrained(REAL / name)


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}, 3),
        ({"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}, 0),
        ({"pad_token": "</s>", "unk_token": "<unk>", "eos_token": "</s>"}, 0),
        ({"pad_token": "</s>", "unk_token": "</s>", "bos_token": "<s>", "eos_token": "</s>"}, 1),
        ({"unk_token": "<unk>", "bos_token": "<unk>", "eos_token": "<unk>"}, 1),
        ({}, 0),
    ],
    ids=["own", "unknown", "pad-is-end", "begin", "all-are-end", "none"],
)
def test_padding_takes_a_token_that_is_there_and_never_the_end(special: dict[str, str], expected: int) -> None:
    tokenizer = toy(**special)
    size = len(tokenizer)
    assert pad_token_id(tokenizer) == expected
    assert pad_token_id(tokenizer) != tokenizer.eos_token_id
    assert len(tokenizer) == size
    assert tokenizer.pad_token == special.get("pad_token")


@pytest.mark.parametrize("name", ["llama", "gpt2", "pythia"])
def test_real_tokenizers_pad_without_a_new_token(name: str) -> None:
    tokenizer = real(name)
    size, pad = len(tokenizer), tokenizer.pad_token
    assert 0 <= pad_token_id(tokenizer) < size
    assert pad_token_id(tokenizer) != tokenizer.eos_token_id
    assert (len(tokenizer), tokenizer.pad_token) == (size, pad)


@pytest.mark.parametrize("lost", ["", None])
def test_lost_begin_and_end_tokens_come_back_by_the_models_ids(lost: str | None) -> None:
    tokenizer = toy(bos_token=lost, eos_token=lost)
    repair_special_tokens(tokenizer, SimpleNamespace(bos_token_id=1, eos_token_id=2))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert len(tokenizer) == 8


def test_an_early_llama_conversion_is_repaired() -> None:
    tokenizer = real("llama")
    tokenizer.bos_token = tokenizer.eos_token = ""
    repair_special_tokens(tokenizer, LlamaConfig(bos_token_id=1, eos_token_id=2))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 32000)


def test_a_healthy_tokenizer_stays_as_it_is() -> None:
    tokenizer = toy(bos_token="<s>", eos_token="</s>")
    repair_special_tokens(tokenizer, SimpleNamespace(bos_token_id=4, eos_token_id=5))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


@pytest.mark.parametrize("result", [None, -1, 999, [2, 3]])
def test_an_id_that_names_no_single_token_repairs_nothing(result: object) -> None:
    tokenizer = toy()
    repair_special_tokens(tokenizer, SimpleNamespace(bos_token_id=result, eos_token_id=result))
    assert tokenizer.bos_token is None
    assert tokenizer.eos_token is None


def saved(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_the_tokenizer_of_a_training_keeps_its_own_template(tmp_path: Path) -> None:
    trained, here = toy(**ROLES), toy(**ROLES)
    trained.chat_template, here.chat_template = "as trained", "the base's own"
    result = load_saved_tokenizer(saved(tmp_path, trained), compose([]).model, here)
    assert result is not None
    assert result.chat_template == "as trained"


def test_an_adapter_without_a_tokenizer_is_taken_as_it_is(tmp_path: Path) -> None:
    assert load_saved_tokenizer(tmp_path, compose([]).model, toy(**ROLES)) is None


def test_a_padding_token_of_its_own_is_no_other_tokenizer(tmp_path: Path) -> None:
    trained, here = toy(**ROLES), toy(**ROLES)
    trained.add_special_tokens({"pad_token": "[PAD]"})
    assert load_saved_tokenizer(saved(tmp_path / "trained", trained), compose([]).model, here) is not None
    assert load_saved_tokenizer(saved(tmp_path / "here", here), compose([]).model, trained) is not None


def test_a_token_of_another_id_is_named_with_the_way_out(tmp_path: Path) -> None:
    trained = toy(**ROLES)
    trained.add_tokens(["<call>", "<answer>"])
    folder = saved(tmp_path, trained)
    with pytest.raises(UserError) as raised:
        load_saved_tokenizer(folder, compose([]).model, toy(**ROLES))
    assert str(raised.value) == (
        f"adapter={folder} was trained with another tokenizer than model.name=tiny: token '<call>' is 8 there and "
        f"missing here; give the base it was trained on, or model.tokenizer={folder}"
    )
    other = toy(**ROLES)
    other.add_tokens(["<answer>", "<call>"])
    with pytest.raises(UserError, match=r"than model\.tokenizer=mine: token '<call>' is 8 there and 9 here; give"):
        load_saved_tokenizer(folder, compose(["model.tokenizer=mine"]).model, other)


def test_another_end_token_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path, toy(**ROLES))
    with pytest.raises(UserError, match=r"its eos_token is '</s>' there and 'd' here; give the base"):
        load_saved_tokenizer(folder, compose([]).model, toy(**ROLES | {"eos_token": "d"}))


NEW = ["<call>", "<answer>"]


def new_token_config(folder: Path, *, tied: bool, rows: int, overrides: list[str]) -> Config:
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=rows, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder)
    return compose(
        [f"model.name={folder}", "model.tokenizer=tiny", "model.new_tokens=['<call>','<answer>']", "lora.r=4",
         "lora.dropout=0", "quantization.compute_dtype=fp32", *overrides]
    )  # fmt: skip


def load(config: Config, tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    placement = find_placement(config.quantization, find_device(config.device))
    model_config = load_model_config(config.model)
    base = loading.load_base(config.model, config.quantization, placement=placement, model_config=model_config)
    resize_embeddings(base, tokenizer.convert_tokens_to_ids(NEW))
    return base


@pytest.mark.matrix(1)
@pytest.mark.parametrize("quantization", ["nf4", "fp32"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("grows", [True, False], ids=["grows", "spare-rows"])
def test_new_tokens_train_their_rows_alone_and_plain_peft_reads_them(
    tmp_path: Path, quantization: str, tied: bool, grows: bool
) -> None:
    size = len(load_tokenizer(compose([]).model))
    rows = size if grows else size + 8
    overrides = [f"quantization={quantization}"]
    config = new_token_config(tmp_path / "base", tied=tied, rows=rows, overrides=overrides)
    tokenizer = load_tokenizer(config.model)
    assert len(tokenizer) == size + 2
    base = load(config, tokenizer)
    assert base.get_input_embeddings().weight.shape[0] == (size + 2 if grows else rows)
    previous = base.get_input_embeddings().weight.clone(), base.get_output_embeddings().weight.clone()

    ids = tokenizer.convert_tokens_to_ids(config.model.new_tokens)
    assert ids == [size, size + 1]
    torch.manual_seed(1)
    model = adapters.add_lora(config.lora, base, tensors=list, new_token_ids=ids, batches=[])
    beside = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert [tuple(p.shape) for p in beside.values()] == [(2, 64)] * (1 if tied else 2)

    batch = torch.tensor([[1, 5, ids[0], 9, ids[1], 20, 21, 2]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model.train()(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapters.save_adapter(model, tmp_path / "adapter", tokenizer=tokenizer)
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=batch).logits
        merged = model.merge_and_unload() if quantization == "fp32" else None
        again = PeftModel.from_pretrained(load(config, tokenizer), tmp_path / "adapter").eval()
        torch.testing.assert_close(again(input_ids=batch).logits, expected)
    if merged is not None:
        for old, layer in zip(previous, (merged.get_input_embeddings(), merged.get_output_embeddings()), strict=True):
            moved = (layer.weight != old).any(1).nonzero().flatten().tolist()
            assert moved == ids
    assert len(AutoTokenizer.from_pretrained(tmp_path / "adapter")) == len(tokenizer)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 100_000, "no whole embedding in it"


def test_an_adapter_with_new_tokens_asks_for_them_again(tmp_path: Path) -> None:
    size = len(load_tokenizer(compose([]).model))
    config = new_token_config(tmp_path / "base", tied=True, rows=size, overrides=["quantization=fp32"])
    tokenizer = load_tokenizer(config.model)
    model = adapters.add_lora(
        config.lora, load(config, tokenizer), tensors=list, new_token_ids=[size, size + 1], batches=[]
    )
    model.save_pretrained(tmp_path / "adapter")
    bare = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=rf"trained the embedding of token {size + 1}, but .* set model.new_tokens"):
        adapters.load_adapter(bare, tmp_path / "adapter", "base")


def test_a_new_token_is_one_token_in_text() -> None:
    tokenizer = load_tokenizer(compose(["model.new_tokens=['<call>','<answer>']"]).model)
    assert set(tokenizer.convert_tokens_to_ids(NEW)) <= set(tokenizer("x <call> y <answer> z").input_ids)


def test_a_known_token_is_not_added_twice() -> None:
    size = len(load_tokenizer(compose([]).model))
    assert len(load_tokenizer(compose(["model.new_tokens=['</s>','<new>','<new>']"]).model)) == size + 1


def test_a_new_token_in_angle_brackets_is_one_special_token_wherever_it_stands() -> None:
    tokenizer = load_tokenizer(compose(["model.new_tokens=['<|im_end|>','zyzzyva']"]).model)
    mark, word = tokenizer.convert_tokens_to_ids(["<|im_end|>", "zyzzyva"])
    assert tokenizer("hat<|im_end|>coat zyzzyva hat")["input_ids"].count(mark) == 1
    assert tokenizer("coat zyzzyva hat")["input_ids"].count(word) == 1
    assert tokenizer.decode([mark, word], skip_special_tokens=True).strip() == "zyzzyva"


@pytest.mark.parametrize("legacy", [True, False])
def test_a_saved_llama_tokenizer_splits_text_behind_special_tokens_as_before(tmp_path: Path, legacy: bool) -> None:
    vocabulary = ("<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "▁b")
    vocabulary = {word: index for index, word in enumerate(vocabulary)}
    tokenizer = LlamaTokenizer(vocabulary, [("▁", "a"), ("▁", "b")], legacy=legacy)
    expected = tokenizer("a</s>b")["input_ids"]
    assert (vocabulary["▁b"] in expected) is legacy, "what the saved one must keep"
    for number in range(2):  # saved, and saved again
        save_tokenizer(tokenizer, tmp_path / str(number))
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / str(number))
        assert tokenizer("a</s>b")["input_ids"] == expected


@pytest.mark.parametrize("name", ["llama", "gpt2", "pythia"])
def test_a_saved_real_tokenizer_splits_text_behind_special_tokens_as_before(tmp_path: Path, name: str) -> None:
    tokenizer = real(name)
    save_tokenizer(tokenizer, tmp_path)
    text = f"One.{tokenizer.eos_token}\n\nTwo{tokenizer.bos_token}three {tokenizer.eos_token} four"
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]
