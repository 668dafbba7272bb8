"""What the trained model answers, for an engine to be compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jinja2 import TemplateError
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora.adapters import adapter_off
from qlora.data.batching.row_encoder import RowEncoder
from qlora.errors import UserError
from qlora.evaluation.measure import evaluation_mode
from qlora.quantization.method import find_method
from qlora.runtime import console
from qlora.session import Session
from qlora.tasks.protocol import TaskJob
from qlora.text import prompt_core
from qlora.verify.comparison import Chat
from qlora.verify.engine import Message
from qlora.verify.reference import Ending, Probe, Row, take_endings, take_probes

PROMPT_TOKENS = 256
"""The length that each prompt is cut to."""
CHAT_TOKENS = 512
"""The longest chat that is compared."""
SPARE = 3
"""The rows that are read for each chat: some are too long."""
SYSTEM = "Be brief."


@dataclass(frozen=True)
class TrainedSide:
    """The prompts with what the adapter on its base answers, the chats, and the finished answers."""

    probes: list[Probe]
    chats: list[Chat]
    endings: list[Ending]
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, job: TaskJob, model: PreTrainedModel | PeftModel) -> TrainedSide:
        """Asks a loaded model, in float32 where the base is quantized, as the engine's weights are compared with it."""
        session, verify = job.session, job.config.verify
        held_out = session.measurer.rows
        chosen = held_out.select(range(min(max(verify.prompts, SPARE * verify.chats), len(held_out))))
        rows = [
            Row(list(ids[:PROMPT_TOKENS]), list(labels[:PROMPT_TOKENS]))
            for ids, labels in zip(chosen["input_ids"], chosen["labels"], strict=True)
        ]
        console.say(f"noting what the trained model answers to {min(verify.prompts, len(rows))} prompts")
        device = session.placement.device
        with evaluation_mode(model), _exact(session, model):
            off = partial(adapter_off, model) if isinstance(model, PeftModel) else None
            probes = take_probes(model, rows[: verify.prompts], device=device, adapter_off=off)
            endings = take_endings(model, rows, end_ids=session.chat_encoder.end_ids, device=device)
        chats = _chats(
            session.chat_encoder, list(zip(chosen["prompt"], chosen["reference"], strict=True)), verify.chats
        )
        return cls(probes, chats, endings, session.tokenizer)

    def show(self, token: int) -> str:
        """Returns a token as its text in quotes."""
        return repr(self.tokenizer.decode([token]))

    @property
    def vocabulary(self) -> int:
        """The number of tokens that have a probability."""
        return len(self.probes[0].trained)

    @property
    def context(self) -> int:
        """The tokens that an engine must be able to read."""
        prompts = [probe.ids for probe in self.probes]
        prompts += [chat.ids for chat in self.chats]
        prompts += [ending.ids for ending in self.endings]
        return max(map(len, prompts)) + 64


@contextlib.contextmanager
def _exact(session: Session, model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Computes in float32, but for a base of 16 bits, which would take twice its memory."""
    method = find_method(session.config.quantization)
    if not method.is_quantized and session.placement.param_dtype is not torch.float32:
        with session.placement.autocast():
            yield
        return
    method.prepare(model.float(), torch.float32)
    yield


def _chats(encoder: RowEncoder, rows: Iterable[tuple[str, str | None]], count: int) -> list[Chat]:
    """Returns chats of one and two questions, with a system message where the template has a place for one."""
    special = [token for token in encoder.base.all_special_tokens if token]
    texts = [(_plain(prompt_core(prompt), special), _plain(answer or "", special)) for prompt, answer in rows]
    texts = [pair for pair in texts if pair[0]]
    chats: list[Chat] = []
    for index, (question, answer) in enumerate(texts):
        following, _ = texts[(index + 1) % len(texts)]
        turns: list[Message] = [{"role": "user", "content": question}]
        longer: list[Message] = [{"role": "system", "content": SYSTEM}, *turns] if index % 3 == 2 else turns
        if index % 3 == 1 and answer:
            longer = [*turns, {"role": "assistant", "content": answer}, {"role": "user", "content": following}]
        if len(chats) < count and (chat := _encode(encoder, longer) or _encode(encoder, turns)) is not None:
            chats.append(chat)
    return chats


def _encode(encoder: RowEncoder, messages: list[Message]) -> Chat | None:
    """Returns a chat in the tokens of the training; None: it is too long, or no server can ask with these tokens.

    Training splits some texts where a turn begins, a server reads them as one.
    """
    assert encoder.template is not None
    try:
        ids = encoder.encode_prompt(messages)
        text = encoder.base.apply_chat_template(
            messages, chat_template=encoder.template.text, add_generation_prompt=True, tokenize=False
        )
    except (UserError, TemplateError):  # the template has no place for a system message
        return None
    served = encoder.base(str(text), add_special_tokens=False)["input_ids"]
    return Chat(messages, ids) if served == ids and len(ids) <= CHAT_TOKENS else None


def _plain(text: str, special: Sequence[str]) -> str:
    """Returns a text without special tokens: servers take those for what they are, training does not."""
    for token in special:
        text = text.replace(token, " ")
    return text.strip()
