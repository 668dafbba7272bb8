"""Packs hold every row once, hardly any room is lost, and a packed row trains as it does alone."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qlora.data.batching.collate import Collator
from qlora.data.batching.packing import PackedRows, efficiency, pack
from qlora.data.batching.token_store import column
from qlora.data.formats.prompts import ALPACA
from qlora.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"
BUDGET = 24


def best_fit_decreasing(lengths: list[int], budget: int) -> int:
    """Counts the packs that the textbook's row by row algorithm opens."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        room = min(fitting, default=budget)
        if fitting:
            rooms.remove(room)
        rooms.append(room - length)
    return len(rooms)


# pack


@pytest.mark.parametrize("seed", range(40))
def test_every_row_is_in_one_pack_and_no_pack_is_over_budget(seed: int):
    random = np.random.default_rng(seed)
    budget = int(random.integers(1, 100))
    lengths = random.integers(1, budget + 1, random.integers(1, 200))
    packs = pack(lengths, budget)
    assert np.sort(np.concatenate(packs)).tolist() == list(range(len(lengths)))
    assert all(0 < lengths[rows].sum() <= budget for rows in packs)
    assert len(packs) == best_fit_decreasing(lengths.tolist(), budget)


def test_a_row_goes_where_the_least_room_is_left():
    assert [sorted(rows.tolist()) for rows in pack(np.array([6, 7, 3, 4]), 10)] == [[1, 2], [0, 3]]


def test_packing_is_deterministic():
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    first, second = (pack(lengths.copy(), 128) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_rows_give_no_packs():
    assert pack(np.array([], dtype=np.int64), 8) == []


def test_a_row_longer_than_the_packs_is_refused_with_the_way_out():
    with pytest.raises(UserError, match=r"data\.pack_length=8 is shorter than the longest row, 9 tokens; raise it"):
        pack(np.array([3, 9]), 8)


def test_efficiency_counts_the_last_pack_as_a_whole_one():
    lengths = np.array([6, 4, 5])
    assert efficiency(pack(lengths, 10), lengths, 10) == 15 / 20


def test_a_million_rows_are_packed_within_seconds():
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 0.8, 1_000_000).astype(np.int64), 1, 2048)
    started = time.process_time()
    packs = pack(lengths, 2048)
    assert time.process_time() - started < 10  # about 0.5 on a desktop
    assert efficiency(packs, lengths, 2048) > 0.999


def alpaca_texts() -> list[tuple[str, str]]:
    rows = json.loads((SHARED / "alpaca_data.json").read_text())
    return [(ALPACA.ask(row["instruction"], row["input"]), row["output"]) for row in rows]


def guanaco_texts() -> list[tuple[str, str]]:
    return [("", json.loads(line)["text"]) for line in (SHARED / "guanaco_text.jsonl").read_text().splitlines()]


@pytest.mark.matrix(1)
@pytest.mark.skipif(not (SHARED / "tokenizers" / "llama").exists(), reason="needs the shared data")
@pytest.mark.parametrize("texts", [alpaca_texts, guanaco_texts])
def test_packs_of_real_rows_are_98_percent_full(texts: Any):
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "llama")
    sources, targets = zip(*texts(), strict=True)
    ids = [tokenizer(list(part), add_special_tokens=False)["input_ids"] for part in (sources, targets)]
    whole = np.array([len(source) + len(target) + 2 for source, target in zip(*ids, strict=True)])  # <bos>, <eos>
    for budget in (2048, 1024, 512):
        lengths = np.minimum(whole, budget)
        assert efficiency(pack(lengths, budget), lengths, budget) >= 0.98


# PackedRows


def make_rows(vocabulary: int, lengths: tuple[int, ...] = (9, 4, 7, 1, 5, 12, 2, 11, 3)) -> Dataset:
    """Rows of random tokens of which the first third is a prompt."""
    random = np.random.default_rng(0)
    ids = [random.integers(1, vocabulary, length).tolist() for length in lengths]
    labels = [[-100] * (len(row) // 3) + row[len(row) // 3 :] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "length": list(lengths), "other": ids})


def test_a_pack_is_its_rows_with_positions_that_restart_and_no_label_across_a_border():
    rows = make_rows(100)
    packs = pack(column(rows, "length"), BUDGET)
    packed = PackedRows(rows, packs)
    assert len(packed) == len(packs) >= 2
    for item, indices in zip(packed, packs, strict=True):
        assert set(item) == {"input_ids", "labels", "position_ids"}
        expected = [rows[int(index)] for index in indices]
        assert item["input_ids"].tolist() == [token for row in expected for token in row["input_ids"]]
        assert item["labels"].tolist() == [label for row in expected for label in [-100, *row["labels"][1:]]]
        assert item["position_ids"].tolist() == [position for row in expected for position in range(row["length"])]
    assert packed.lengths.tolist() == [len(item["input_ids"]) for item in packed]
    assert packed[-1]["input_ids"].tolist() == packed[len(packed) - 1]["input_ids"].tolist()
    with pytest.raises(IndexError):
        packed[len(packed)]


def test_packs_follow_the_order_of_selected_rows_and_of_a_memory_mapped_file(tmp_path: Path):
    rows = make_rows(100)
    rows.save_to_disk(tmp_path)
    chosen = Dataset.load_from_disk(tmp_path).select([8, 1, 6, 0])
    packed = PackedRows(chosen, [np.array([3, 0]), np.array([1, 2])])
    expected = [rows["input_ids"][i] + rows["input_ids"][j] for i, j in ((0, 8), (1, 6))]
    assert [item["input_ids"].tolist() for item in packed] == expected
    assert packed.lengths.tolist() == [12, 6]
    assert packed.sums(np.array([1, 20, 300, 4000])).tolist() == [4001, 320]


# What a model learns from packs

TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 120,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = TINY | {"intermediate_size": 64, "num_key_value_heads": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen3": GROUPED | {"head_dim": 8},
    "mistral": GROUPED | {"sliding_window": 5},
    "gemma2": GROUPED | {"head_dim": 8, "sliding_window": 5},
    "gpt_neox": TINY | {"intermediate_size": 64},
    "gpt2": TINY | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
TRAINED = ("stories260K", "TinyStories-656K")


def build_model(name: str, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name in TRAINED:
        if not (SHARED / "models" / name).exists():
            pytest.skip("needs the shared models")
        return AutoModelForCausalLM.from_pretrained(
            SHARED / "models" / name, attn_implementation=attention, dtype=torch.float32
        )
    config = AutoConfig.for_model(name, **SHAPES[name])
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def token_losses(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the loss of every token that has a label, row after row."""
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none")


def gradients(model: PreTrainedModel, losses: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    losses.mean().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.matrix(12)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*SHAPES, *TRAINED])
def test_packed_rows_have_the_losses_and_gradients_of_the_rows_alone(name: str, attention: str, checkpointing: bool):
    if (name, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers has Gemma 2 without sdpa: its logits are capped")
    model = build_model(name, attention).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    rows = make_rows(min(model.config.vocab_size, 120))
    packs = pack(column(rows, "length"), BUDGET)
    assert any(len(indices) > 2 for indices in packs)
    batch = Collator(0)(list(PackedRows(rows, packs)))
    assert len(packs) > 2
    assert (batch["input_ids"][:, -1] == 0).any(), "one pack is padded"

    packed = token_losses(model, batch)
    packed_gradients = gradients(model, packed)
    order = [int(index) for indices in packs for index in indices]
    alone = torch.cat([token_losses(model, Collator(0)([rows[index]])) for index in order])

    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=0)
    alone_gradients = gradients(model, alone)
    assert packed_gradients.keys() == alone_gradients.keys()
    for weight, gradient in alone_gradients.items():
        torch.testing.assert_close(packed_gradients[weight], gradient, atol=2e-5, rtol=1e-3)


def test_a_cache_switches_the_borders_off_so_training_must_not_have_one():
    """Upstream behaviour that `check_packing` and the trainer rely on."""
    model = build_model("llama", "sdpa").eval()
    batch = Collator(0)(list(PackedRows(rows := make_rows(120), pack(column(rows, "length"), BUDGET))))
    del batch["labels"]
    with torch.no_grad():
        kept, lost = (model(**batch, use_cache=cache).logits for cache in (False, True))
    assert (kept - lost).abs().max() > 1e-3
