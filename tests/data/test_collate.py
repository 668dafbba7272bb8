import torch

from qlora.data.collate import Collator

ROWS = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "length": 3},
    {"input_ids": [8], "labels": [8], "length": 1},
]


def test_batches_are_padded_on_the_right_and_padding_carries_no_loss():
    batch = Collator(9)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_token_equal_to_the_padding_keeps_attention_and_loss():
    batch = Collator(8)(ROWS)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"][1].tolist() == [8, -100, -100]


def test_width_is_rounded_up_to_a_multiple():
    assert Collator(0, multiple_of=8)(ROWS)["labels"].shape == (2, 8)
    assert Collator(0, multiple_of=3)(ROWS)["labels"].shape == (2, 3)
