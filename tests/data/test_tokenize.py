import random

import pytest
from transformers import AddedToken

from qlora.config.schema import DataConfig, TrainOn
from qlora.data.batching.row_encoder import Limits, build_encoder
from qlora.data.chat.conversations import Conversation
from qlora.data.chat.templates import Template, read_template
from qlora.data.formats.prompts import Segment
from qlora.data.formats.renderers import FORMATS
from qlora.data.pipeline import build_data
from qlora.errors import UserError
from tests.data.byte_tokenizer import build_byte_tokenizer

BOS, EOS, NO = 1, 2, -100


def ids(text):
    """The ids of a text, by the definition of the byte tokenizer."""
    return [3 + byte for byte in text.encode()]


def encode(base, *segments, **config):
    """Encodes one row; each segment is its text and whether it is trained."""
    encoder = build_encoder(DataConfig(name="toy", path="toy.json", **config), base)
    return encoder.encode([[Segment(*segment) for segment in segments]])[0]


def encode_row(base, name, row):
    encoder = build_encoder(DataConfig(name="toy", path="toy.json"), base)
    return encoder.encode(FORMATS[name].render(row))[0]


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
    encoded = encode_row(tokenizer, name, row)
    assert encoded.input_ids == [BOS, *ids(source), *ids(target), EOS]
    assert encoded.labels == [NO] * (1 + len(ids(source))) + [*ids(target), EOS]
    assert (encoded.source, encoded.target) == (1 + len(ids(source)), len(ids(target)) + 1)
    assert encoded.trained == len(ids(target)) + 1
    assert encoded.last_trained == EOS
    assert (encoded.cut_source, encoded.cut_target) == (False, False)


def test_prompt_tokens_carry_no_loss(tokenizer):
    row = encode(tokenizer, ("ab", False), ("c", True))
    assert row.labels == [NO, NO, NO, *ids("c"), EOS]
    assert row.turns[0].start == 3


def test_train_on_source_trains_the_prompt_but_not_bos(tokenizer):
    row = encode(tokenizer, ("ab", False), ("c", True), train_on_source=True)
    assert row.labels == [NO, *ids("abc"), EOS]
    assert row.turns[0].start == 3
    row = encode(tokenizer, ("a", False), ("b", True), ("c", False), train_on=TrainOn.all)
    assert row.labels == [NO, *ids("abc"), EOS]


def test_train_on_last_trains_the_last_answer_and_its_end(tokenizer):
    row = encode(tokenizer, ("a", False), ("b", True), ("c", False), ("d", True), ("e", False), train_on=TrainOn.last)
    assert row.labels == [NO, NO, NO, NO, *ids("d"), NO, EOS]
    assert (row.source, row.turns[0].start) == (2, 2)


def test_a_tokenizer_without_bos_begins_with_the_source(tokenizer_without_bos):
    row = encode(tokenizer_without_bos, ("ab", False), ("c", True))
    assert row.input_ids == [*ids("abc"), EOS]
    assert row.labels == [NO, NO, *ids("c"), EOS]


def test_a_tokenizer_without_eos_is_refused(tokenizer_without_eos):
    with pytest.raises(UserError, match="has no end token, so no answer could learn to stop; set eos_token"):
        encode(tokenizer_without_eos, ("a", True))


def test_a_long_source_loses_its_beginning_but_neither_bos_nor_its_end(tokenizer):
    row = encode(tokenizer, ("abcdef", False), ("x", True), source_max_len=4)
    assert row.input_ids == [BOS, *ids("def"), *ids("x"), EOS]
    assert (row.cut_source, row.cut_target, row.turns[0].start) == (True, False, 4)


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
    assert row.turns[0].start == 2


def test_the_end_is_trained_after_a_last_segment_that_is_not(tokenizer):
    row = encode(tokenizer, ("a", True), ("b", False))
    assert row.labels == [NO, *ids("a"), NO, EOS]


def test_a_long_document_loses_its_end(tokenizer):
    row = encode(tokenizer, ("a", True), ("b", False), ("cde", True), source_max_len=2, target_max_len=3)
    assert row.input_ids == [BOS, *ids("abc")]
    assert row.labels == [NO, *ids("a"), NO, *ids("c")]
    assert (row.cut_source, row.cut_target) == (False, True)


def test_a_document_of_exactly_the_limit_is_whole(tokenizer):
    row = encode(tokenizer, ("abc", True), source_max_len=1, target_max_len=4)
    assert row.input_ids == [BOS, *ids("abc"), EOS]
    assert not row.cut_target


@pytest.mark.parametrize("segments", [[], [("a", False)], [("a", False), ("b", False)]])
def test_a_row_without_an_answer_teaches_nothing_not_even_to_stop(segments, tokenizer):
    row = encode(tokenizer, *segments)
    assert (row.trained, row.last_trained) == (0, NO)
    assert row.input_ids == [BOS, *ids("".join(text for text, _ in segments))]


def test_special_tokens_in_text_are_read_as_plain_characters(tokenizer):
    row = encode(tokenizer, ("</s><s>", False), ("a</s>", True))
    assert row.input_ids == [BOS, *ids("</s><s>"), *ids("a</s>"), EOS]


def test_evaluation_rows_keep_prompt_reference_and_task(tokenizer, make_config):
    rows = [{"source": "Q: ", "target": " A ", "task": "add"}] * 2
    data = build_data(make_config(rows, source_max_len=2), tokenizer)
    (row,) = data.eval.to_list()
    assert row["prompt_ids"] == [BOS, *ids(" ")]
    assert (row["prompt"], row["reference"], row["task"]) == ("Q: ", "A", "add")


def test_training_on_all_tokens_leaves_the_prompt_of_evaluation_rows(tokenizer, make_config):
    rows = [{"input": "Q", "output": "A"}] * 2
    (row,) = build_data(make_config(rows, train_on=TrainOn.all), tokenizer).eval.to_list()
    assert row["prompt_ids"] == [BOS, *ids("Q")]
    assert "task" not in row


def test_of_a_chat_the_last_answer_is_asked_for(tokenizer, make_config):
    turns = [{"role": role, "content": said} for role, said in zip(("user", "assistant") * 2, "abcd", strict=True)]
    (row,) = build_data(make_config([{"messages": turns}] * 2), tokenizer).eval.to_list()
    asked = "### Human: a\n### Assistant: b{}### Human: c\n### Assistant:"
    assert row["prompt"] == "<s>" + asked.format("</s>")
    first, second = asked.split("{}")
    assert row["prompt_ids"] == [BOS, *ids(first), EOS, *ids(second)]
    assert row["reference"] == "d"


@pytest.mark.parametrize("messages", [False, True])
def test_a_row_without_an_answer_can_be_measured_where_all_is_trained(messages, tokenizer, make_config):
    row = {"messages": [{"role": "user", "content": "a"}]} if messages else {"segments": [["a", False]]}
    (row,) = build_data(make_config([row] * 2, train_on=TrainOn.all), tokenizer).eval.to_list()
    assert row["prompt_ids"] == row["input_ids"]
    assert row["reference"] == ""


# Lengths


@pytest.mark.parametrize(
    ("limits", "lead", "rest", "kept"),
    [
        (Limits(), 9, 9, (9, 9)),
        (Limits(max_length=18), 9, 9, (9, 9)),
        (Limits(max_length=10), 9, 3, (7, 3)),
        (Limits(max_length=10), 3, 9, (3, 7)),
        (Limits(max_length=10), 9, 9, (5, 5)),
        (Limits(source_max_len=2, target_max_len=3), 9, 9, (2, 3)),
        (Limits(source_max_len=8, target_max_len=3, max_length=10), 9, 9, (7, 3)),
        (Limits(max_length=1), 9, 9, (1, 0)),
        (Limits(max_length=1), 0, 9, (0, 1)),
        (Limits(max_length=2), 9, 9, (1, 1)),
    ],
)
def test_an_answer_keeps_at_least_half_of_a_row(limits, lead, rest, kept):
    assert limits.room(lead, rest) == kept


def base_with_turns(*, bos):
    special = {"bos_token": "<s>"} if bos else {}
    base = build_byte_tokenizer(eos_token="</s>", **special)
    base.add_tokens([AddedToken(token, special=True, normalized=False) for token in ("<|im_start|>", "<|im_end|>")])
    return base


def draw(rng):
    text = "".join(rng.choices("ab é\n", k=rng.randint(0, 8)))
    if rng.random() < 0.5:
        return [Segment(text[:n], rng.random() < 0.5) for n in rng.choices(range(9), k=rng.randint(0, 4))]
    turns = [
        {"role": role, "content": text[n:] + "x" * rng.randint(0, 1)}
        for n in range(rng.randint(1, 3))
        for role in ("user", "assistant")
    ]
    return Conversation(turns if rng.random() < 0.8 else turns[:-1], None)


@pytest.mark.matrix(8)
@pytest.mark.parametrize("train_on", TrainOn)
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("name", ["guanaco", "chatml", "plain", "llama-2"])
def test_rows_keep_to_any_limits(name, bos, train_on):
    rng, base = random.Random(f"{name} {bos} {train_on}"), base_with_turns(bos=bos)
    ends = {2, base.convert_tokens_to_ids("<|im_end|>")}
    template = Template(name, read_template(name))
    whole_config = {"source_max_len": None, "target_max_len": None, "train_on": train_on}
    encode_whole = build_encoder(DataConfig(name="toy", path="toy.json", **whole_config), base, template)
    for _ in range(250):
        keys = ("source_max_len", "target_max_len", "max_length")
        limits = {key: rng.choice((None, 1, 2, 3, rng.randint(4, 60))) for key in keys}
        example = draw(rng)
        config = DataConfig(name="toy", path="toy.json", train_on=train_on, **limits)
        (row,) = build_encoder(config, base, template).encode([example])
        (whole,) = encode_whole.encode([example])
        assert len(row.input_ids) == len(row.labels)
        assert row.labels[:1] in ([], [NO])
        assert all(label in (NO, token) for label, token in zip(row.labels, row.input_ids, strict=True))
        assert (row.source, row.target) == (whole.source, whole.target)
        # What is kept is the end of the question, after <bos>, and the beginning of the answers.
        lead, rest = Limits(**limits).room(whole.source, whole.target)
        assert len(row.input_ids) == lead + rest
        assert lead <= (limits["source_max_len"] or lead)
        assert rest <= (limits["target_max_len"] or rest)
        assert lead + rest <= (limits["max_length"] or lead + rest)
        first = [BOS] if whole.input_ids[:1] == [BOS] and lead else []
        kept = whole.input_ids[whole.source - lead + len(first) : whole.source + rest]
        assert row.input_ids == first + kept
        assert (row.cut_source, row.cut_target) == (lead < whole.source, rest < whole.target)
        # Labels stay with their tokens, and turns where they were.
        moved = [NO] * len(first) + whole.labels[whole.source - lead + len(first) : whole.source + rest]
        assert row.labels == [NO, *moved[1:]][: len(moved)]
        for turn, original in zip(row.turns, whole.turns, strict=False):
            assert turn.start == original.start - (whole.source - lead)
            assert turn == original._replace(start=turn.start)
            said = row.input_ids[turn.start :]
            assert said == whole.input_ids[original.start : original.start + len(said)]
        assert row.turns[0].start == lead
        answered = isinstance(example, list) and any(segment.trained for segment in example)
        if answered and not row.cut_target and len(row.input_ids) > 1:
            assert row.last_trained in ends


@pytest.mark.parametrize("name", ["guanaco", "chatml", "llama-2", "vicuna"])
def test_a_cut_answer_has_no_end_and_a_whole_one_has(name):
    base = base_with_turns(bos=True)
    ends = {2, base.convert_tokens_to_ids("<|im_end|>")}
    messages = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "vwxyz"}]
    for length in range(1, 12):
        config = DataConfig(name="toy", path="toy.json", target_max_len=length)
        encode = build_encoder(config, base, Template(name, read_template(name)))
        (row,) = encode.encode([Conversation(messages, None)])
        said = [label for label in row.labels if label != NO]
        answer = " vwxyz " if name == "llama-2" else "vwxyz" if name == "chatml" else " vwxyz"
        assert said[: len(answer)] == ids(answer)[:length]
        assert (row.last_trained in ends) == (length > len(answer))
