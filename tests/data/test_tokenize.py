import pytest
from datasets import Dataset

from qlora.data.formats import FORMATS, Segment
from qlora.data.tokenize import build_tokenizer, tokenize
from qlora.errors import ConfigError
from qlora.schema import DataConfig

BOS, EOS, NO = 1, 2, -100


def ids(text):
    """The ids of a text, by the definition of the byte tokenizer."""
    return [3 + byte for byte in text.encode()]


def encode(base, *segments, **config):
    """Encodes one row; each segment is its text and whether it is trained."""
    encoder = build_tokenizer(DataConfig(name="toy", path="toy.json", **config), base)
    return encoder.encode([[Segment(*segment) for segment in segments]])[0]


def encode_rows(base, name, rows, *, for_eval=False, **config):
    encoder = build_tokenizer(DataConfig(name="toy", path="toy.json", **config), base)
    return tokenize(Dataset.from_list(rows), FORMATS[name], encoder, for_eval=for_eval)


ALPACA = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
GOLDEN = {
    "alpaca with input": (
        "alpaca",
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        ALPACA.format(", paired with an input that provides further context")
        + "\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response: ",
        "3",
    ),
    "alpaca without input": (
        "alpaca",
        {"instruction": "Greet.", "input": "", "output": "Hi"},
        ALPACA.format("") + "\n\n### Instruction:\nGreet.\n\n### Response: ",
        "Hi",
    ),
    "oasst1": ("text", {"text": "### Human: Hi### Assistant: Ho"}, "", "### Human: Hi### Assistant: Ho"),
    "hh-rlhf": ("chosen", {"chosen": "\n\nHuman: a", "rejected": "b"}, "", "\n\nHuman: a"),
    "input-output": ("input-output", {"input": "a ", "output": " b"}, "a ", " b"),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_rows_become_the_tokens_that_their_format_defines(case, tokenizer):
    name, row, source, target = GOLDEN[case]
    (encoded,) = encode_rows(tokenizer, name, [row]).to_list()
    assert encoded["input_ids"] == [BOS, *ids(source), *ids(target), EOS]
    assert encoded["labels"] == [NO] * (1 + len(ids(source))) + [*ids(target), EOS]
    assert encoded["length"] == len(encoded["input_ids"])
    assert not encoded["cut_source"]
    assert not encoded["cut_target"]


def test_prompt_tokens_carry_no_loss(tokenizer):
    row = encode(tokenizer, ("ab", False), ("c", True))
    assert row.labels == [NO, NO, NO, *ids("c"), EOS]
    assert row.prompt_length == 3


def test_train_on_source_trains_the_prompt_but_not_bos(tokenizer):
    row = encode(tokenizer, ("ab", False), ("c", True), train_on_source=True)
    assert row.labels == [NO, *ids("abc"), EOS]
    assert row.prompt_length == 3
    row = encode(tokenizer, ("a", False), ("b", True), ("c", False), train_on_source=True)
    assert row.labels == [NO, *ids("abc"), EOS]


def test_a_tokenizer_without_bos_begins_with_the_source(tokenizer_without_bos):
    row = encode(tokenizer_without_bos, ("ab", False), ("c", True))
    assert row.input_ids == [*ids("abc"), EOS]
    assert row.labels == [NO, NO, *ids("c"), EOS]


def test_a_tokenizer_without_eos_is_refused(tokenizer_without_eos):
    with pytest.raises(ConfigError, match="has no end token, so no answer could learn to stop; set eos_token"):
        encode(tokenizer_without_eos, ("a", True))


def test_a_long_source_loses_its_beginning_but_neither_bos_nor_its_end(tokenizer):
    row = encode(tokenizer, ("abcdef", False), ("x", True), source_max_len=4)
    assert row.input_ids == [BOS, *ids("def"), *ids("x"), EOS]
    assert (row.cut_source, row.cut_target, row.prompt_length) == (True, False, 4)


def test_a_source_of_exactly_the_limit_is_whole(tokenizer):
    row = encode(tokenizer, ("abc", False), ("x", True), source_max_len=4)
    assert row.input_ids == [BOS, *ids("abc"), *ids("x"), EOS]
    assert not row.cut_source


def test_room_for_bos_alone_leaves_no_source(tokenizer):
    row = encode(tokenizer, ("abc", False), ("x", True), source_max_len=1)
    assert row.input_ids == [BOS, *ids("x"), EOS]
    assert row.cut_source


def test_a_cut_target_has_no_end_token(tokenizer):
    row = encode(tokenizer, ("a", False), ("xyz", True), target_max_len=3)
    assert row.input_ids == [BOS, *ids("a"), *ids("xyz")]
    assert row.cut_target


def test_a_target_of_exactly_the_limit_keeps_its_end_token(tokenizer):
    row = encode(tokenizer, ("a", False), ("xy", True), target_max_len=3)
    assert row.input_ids == [BOS, *ids("a"), *ids("xy"), EOS]
    assert not row.cut_target


def test_loss_follows_the_segments_of_a_document(tokenizer):
    row = encode(tokenizer, ("a", False), ("b", True), ("c", False), ("d", True))
    assert row.input_ids == [BOS, *ids("abcd"), EOS]
    assert row.labels == [NO, NO, *ids("b"), NO, *ids("d"), EOS]
    assert row.prompt_length == 2


def test_the_end_is_trained_after_a_last_segment_that_is_not(tokenizer):
    row = encode(tokenizer, ("a", True), ("b", False))
    assert row.labels == [NO, *ids("a"), NO, EOS]


def test_a_long_document_loses_its_end(tokenizer):
    row = encode(tokenizer, ("a", True), ("b", False), ("cde", True), source_max_len=2, target_max_len=2)
    assert row.input_ids == [BOS, *ids("abc")]
    assert row.labels == [NO, *ids("a"), NO, *ids("c")]
    assert (row.cut_source, row.cut_target) == (False, True)


def test_a_document_of_exactly_both_limits_is_whole(tokenizer):
    row = encode(tokenizer, ("abc", True), source_max_len=2, target_max_len=3)
    assert row.input_ids == [BOS, *ids("abc"), EOS]
    assert not row.cut_target


@pytest.mark.parametrize(
    "segments", [[], [["a", False]], [["a", False], ["b", False]], [["abcd", False], ["", False], ["e", True]]]
)
def test_rows_without_trained_tokens_are_left_out(segments, tokenizer):
    rows = [{"segments": segments}, {"segments": [["x", True]]}]
    encoded = tokenize(
        Dataset.from_list(rows, on_mixed_types="use_json"),
        FORMATS["segments"],
        build_tokenizer(DataConfig(name="toy", path="toy.json", source_max_len=2, target_max_len=2), tokenizer),
    )
    assert encoded["input_ids"][:] == [[BOS, *ids("x"), EOS]]


def test_special_tokens_in_text_are_read_as_plain_characters(tokenizer):
    row = encode(tokenizer, ("</s><s>", False), ("a</s>", True))
    assert row.input_ids == [BOS, *ids("</s><s>"), *ids("a</s>"), EOS]


def test_evaluation_rows_keep_prompt_reference_and_task(tokenizer):
    rows = [{"source": "Q: ", "target": " A ", "task": "add"}]
    (row,) = encode_rows(tokenizer, "segments", rows, for_eval=True, source_max_len=2).to_list()
    assert row["prompt_ids"] == [BOS, *ids(" ")]
    assert (row["prompt"], row["reference"], row["task"]) == ("Q: ", "A", "add")


def test_training_on_the_source_leaves_the_prompt_of_evaluation_rows(tokenizer):
    rows = [{"input": "Q", "output": "A"}]
    (row,) = encode_rows(tokenizer, "input-output", rows, for_eval=True, train_on_source=True).to_list()
    assert row["prompt_ids"] == [BOS, *ids("Q")]
    assert "task" not in row


def test_several_processes_encode_the_same_rows_in_the_same_order(tokenizer, monkeypatch, capfd):
    rows = [{"text": "x" * (i % 7)} for i in range(40)]
    alone = encode_rows(tokenizer, "text", rows).to_list()
    monkeypatch.setattr("qlora.data.tokenize.PARALLEL_ROWS", 10)
    monkeypatch.setattr("qlora.data.tokenize.MAX_PROCESSES", 2)
    assert encode_rows(tokenizer, "text", rows).to_list() == alone
    assert capfd.readouterr() == ("", "")


def test_tokenizing_prints_nothing_and_caches_nothing(tokenizer, capfd, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    encoded = encode_rows(tokenizer, "text", [{"text": "longer than the model's length " * 9}])
    assert encoded.cache_files == []
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
