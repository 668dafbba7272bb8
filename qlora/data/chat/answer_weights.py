"""Which answers of an example the loss counts: not those that a switch leaves out, and empty ones as configured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from qlora.config.schema import OnEmpty, TrainOn
from qlora.data.chat.conversations import Conversation, Message, is_empty
from qlora.data.formats.prompts import Example, Segment
from qlora.errors import ConfigError, DataError


class Settled(NamedTuple):
    """An example with the answers that are to be trained."""

    example: Example | None
    """None: nothing is left to train, because answers are empty."""
    empty: int
    """Its empty answers: those that carry no loss, or, with `OnEmpty.train`, train an end token alone."""


def settle(example: Example, on_empty: OnEmpty, train_on: TrainOn) -> Settled:
    """Decides what becomes of empty answers; raises a `UserError` where they, or a turn's switch, are refused."""
    if isinstance(example, Conversation):
        return _settle_chat(example, on_empty, train_on)
    return _settle_segments(example, on_empty, train_on)


def _settle_chat(chat: Conversation, on_empty: OnEmpty, train_on: TrainOn) -> Settled:
    _check_switches(chat.messages, train_on)
    answers = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if train_on is TrainOn.last:
        answers = answers[-1:]
    trained = [index for index in answers if chat.messages[index].get("weight") != 0]
    empty = [index for index in trained if is_empty(chat.messages[index])]
    if empty and on_empty is OnEmpty.error:
        raise _refusal(f"turn {empty[0] + 1} of {len(chat.messages)} is an empty answer")
    dropped = on_empty is OnEmpty.drop
    if empty and dropped and (len(empty) == len(trained) or train_on is TrainOn.all):
        return Settled(None, len(empty))
    weights = dict.fromkeys(empty, int(not dropped))
    if train_on is TrainOn.last and not trained:  # an earlier answer does not take the place of the last one
        weights |= {index: 0 for index, message in enumerate(chat.messages) if message["role"] == "assistant"}
    if not weights:
        return Settled(chat, 0)
    messages = [message | ({"weight": weights[index]} if index in weights else {})
                for index, message in enumerate(chat.messages)]  # fmt: skip
    return Settled(Conversation(messages, chat.tools), len(empty))


def _check_switches(messages: Sequence[Message], train_on: TrainOn) -> None:
    """Refuses what no turn's switch can ask for, given what is trained."""
    for number, message in enumerate(messages, 1):
        weight, where = message.get("weight"), f"turn {number} of {len(messages)}"
        if weight == 0 and train_on is TrainOn.all:
            raise ConfigError(
                f"{where} asks not to be trained (weight 0, train=false or the like), but data.train_on=all trains "
                "every token; set data.train_on=assistant, or take the switch out"
            )
        if weight == 1 and train_on is not TrainOn.all and message["role"] != "assistant":
            raise ConfigError(
                f"{where}, of the role {message['role']}, asks to be trained (weight 1, train=true or the like), but "
                f"data.train_on={train_on.value} trains turns of the assistant alone; take the switch out, or set "
                "data.train_on=all"
            )


def _settle_segments(segments: list[Segment], on_empty: OnEmpty, train_on: TrainOn) -> Settled:
    rounds = _rounds(segments)
    empty = [index for index, answer in enumerate(rounds) if _is_blank(answer)]
    if train_on is TrainOn.last:
        empty = [index for index in empty if index == len(rounds) - 1]
    if empty and on_empty is OnEmpty.error:
        raise _refusal(
            "the answer is empty" if len(rounds) == 1 else f"answer {empty[0] + 1} of {len(rounds)} is empty"
        )
    if not empty or on_empty is OnEmpty.train:
        return Settled(segments, len(empty))
    if train_on is not TrainOn.assistant or len(empty) == len(rounds):
        return Settled(None, len(empty))
    # What follows the last answer that says something would carry no loss.
    last = max(index for index in range(len(rounds)) if index not in empty)
    said = [
        segment._replace(trained=segment.trained and index not in empty)
        for index, answer in enumerate(rounds[: last + 1])
        for segment in answer
    ]
    return Settled([*said[:-1], said[-1]._replace(ends=False)], len(empty))


def _rounds(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Returns the segments of each question and answer."""
    rounds: list[list[Segment]] = [[]]
    for segment in segments:
        rounds[-1].append(segment)
        if segment.ends:
            rounds.append([])
    return rounds


def _is_blank(segments: Sequence[Segment]) -> bool:
    """Tells whether something would be trained, but nothing is said in it."""
    answer = [segment.text for segment in segments if segment.trained]
    return bool(answer) and not "".join(answer).strip()


def _refusal(what: str) -> DataError:
    return DataError(f"{what} (data.on_empty=error); write one, or set data.on_empty=drop or train")
