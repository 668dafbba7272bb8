"""What does not go with streamed rows is refused when the config is composed, with what would work."""

import pytest

from qlora.config.compose import compose
from qlora.errors import ConfigError

STREAM = ["data=local", "data.path=rows.jsonl", "data.streaming=true"]
LONG = [*STREAM, "trainer.max_steps=100"]
MIX = ["data=mix", "data.mix.a.path=a.jsonl", "data.mix.b.path=b.jsonl"]
MIXED = [*MIX, "data.streaming=true", "trainer.max_steps=100"]

REFUSED = {
    "no steps": (STREAM, "data.streaming=true and trainer.num_train_epochs=3.0 exclude each other: the number of "
                         "streamed rows is not known; set trainer.max_steps, e.g. to 1000"),
    "epochs": ([*STREAM, "trainer.num_train_epochs=2"], "trainer.num_train_epochs=2.0 exclude each other"),
    "planned epochs": ([*STREAM, "task=plan"], "set trainer.max_steps, e.g. to 1000"),
    "grouping": ([*LONG, "trainer.group_by_length=true"],
                 "data.streaming=true and trainer.group_by_length=true exclude each other: it sorts all rows by length "
                 "before the first step; set it to false"),
    "evaluation by epochs": ([*LONG, "trainer.eval_steps=0.5ep"], "trainer.eval_steps=0.5ep is a share of an epoch"),
    "checkpoints by epochs": ([*LONG, "trainer.save_steps=1ep"], "set a number of steps, e.g. 250"),
    "workers": ([*LONG, "trainer.dataloader_num_workers=2"], "the rows are read in the training process"),
    "preferences": ([*LONG, "loss=dpo"], "data.streaming=true and loss.name=dpo exclude each other"),
    "labels": ([*LONG, "loss=kto"], "data.streaming=true and loss.name=kto exclude each other"),
    "a head": ([*LONG, "head=classify"], "data.streaming=true and loss.name=classify exclude each other"),
    "rows drawn from all": ([*LONG, "data.max_train_samples=9"], "take the first ones with data.max_samples"),
    "a share held out": ([*LONG, "data.eval_dataset_size=0.1"], "set a number of rows, the first ones of the stream"),
    "no length": ([*LONG, "data.max_length=null"], "data.streaming=true needs the longest length of a row beforehand"),
    "no buffer": ([*LONG, "data.shuffle_buffer=0"], "data.shuffle_buffer must be positive (1: the order of the"),
    "stop of one": ([*LONG, "data.stop=all"], "data.stop=all says which of several sets ends a pass, and there is one"),
    "weight": ([*MIXED, "data.mix.a.weight=2"], "set data.mix.a.probability in its place"),
    "probability of one": ([*MIXED, "data.mix.a.probability=0.5"], "data.mix.b.probability is not set, and other sets"),
    "sum": ([*MIXED, "data.mix.a.probability=0.5", "data.mix.b.probability=0.4"],
            "the probabilities of data.mix add up to 0.9 (a: 0.5, b: 0.4); they must add up to 1"),
    "zero": ([*MIXED, "data.mix.a.probability=0", "data.mix.b.probability=1"],
             "data.mix.a.probability must be above 0 and at most 1, got 0"),
    "negative": ([*MIXED, "data.mix.a.probability=-1", "data.mix.b.probability=2"], "must be above 0 and at most 1"),
    "not a number": ([*MIXED, "data.mix.a.probability=nan", "data.mix.b.probability=1"], "must be above 0 and at most"),
    "a share in percent": ([*MIXED, "data.mix.a.probability=70%"], "a.probability must be a number or null, got '70%'"),
    "a weight in words": ([*MIX, "data.mix.a.weight=twice"], "data.mix.a.weight must be a number, got 'twice'"),
    "no path": ([*MIX, "data.mix.a.path=null"], "data.mix.a.path must be a text, got 'null'"),
    "size": ([*MIXED, "data.mix.a.probability=0.5", "data.mix.b.probability=0.5", "data.mix.b.max_samples=9"],
             "data.mix.b.max_samples=9 and data.mix.a.probability both say how much of a set is shown"),
    "unread probability": ([*MIX, "data.mix.a.probability=0.5"],
                           "data.mix.a.probability=0.5 is only read with data.streaming=true; to show rows of a set "
                           "more or less often, set data.mix.a.weight"),
    "unread stop": ([*MIX, "data.stop=first"], "data.stop=first is only read with data.streaming=true"),
    "unread buffer": (["data.shuffle_buffer=9"], "data.shuffle_buffer=9 is only read with data.streaming=true"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_a_stream_cannot_follow_is_refused(name: str) -> None:
    overrides, sentence = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        compose(overrides)
    assert sentence in str(error.value)


def test_defaults_that_need_all_rows_give_way_to_a_stream() -> None:
    trainer = compose(LONG).trainer
    assert (trainer.group_by_length, trainer.eval_steps, trainer.save_steps) == (False, 250, 250)
    assert (trainer.num_train_epochs, trainer.max_steps) == (None, 100)
    trainer = compose(["data=local", "data.path=rows.jsonl"]).trainer
    assert (trainer.group_by_length, trainer.eval_steps, trainer.save_steps) == (True, "0.5ep", "0.5ep")
    assert compose(["data=alpaca", "data.streaming=true"]).trainer.group_by_length is False


def test_a_stream_may_be_used_by_tasks_that_do_not_train() -> None:
    assert compose([*STREAM, "task=evaluate", "adapter=none"]).data.streaming


def test_probabilities_are_equal_where_none_is_set() -> None:
    assert compose(MIXED).data.probabilities == [0.5, 0.5]


def test_thirds_may_be_rounded() -> None:
    mix = [f"data.mix.{name}.{part}" for name in "abc" for part in (f"path={name}.jsonl", "probability=0.3333")]
    config = compose(["data=mix", "data.streaming=true", "trainer.max_steps=5", *mix])
    assert config.data.probabilities == [1 / 3] * 3
