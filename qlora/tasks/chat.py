"""`task=chat`: a conversation in the terminal, with what was trained or with the untuned base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora.config.paths import short_path
from qlora.config.schema import Config
from qlora.runtime import console
from qlora.runtime.needs import Needs
from qlora.runtime.task_result import TaskResult
from qlora.tasks.conversation import run_chat
from qlora.tasks.protocol import TaskJob
from qlora.tasks.used import differs_line

if TYPE_CHECKING:  # which import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from qlora.session import Session
    from qlora.tasks.chat_model import ChatModel


def needs(config: Config) -> Needs:
    """Returns what a conversation needs; it reads no rows and writes no folder."""
    return Needs(torch=True, base=True, saved_template=True, folder=False, caches=True)


def run(job: TaskJob) -> TaskResult:
    """Talks with what `adapter` names, until `/exit` or the end of the input."""
    session = job.session
    model = session.load_trained()
    lines = session.describe(model).lines
    del lines["folder"]
    trained = session.trained[0] or session.trained[1]
    lines["adapter"] = short_path(trained) if trained is not None else "none: the untuned base answers"
    lines["template"] = session.chat_encoder.writer.template.name
    console.start_screen(list((lines | differs_line(job)).items()))
    chat = run_chat(build_chat_model(session, model))
    tokens = sum(reply.tokens for reply in chat.replies)
    metrics = {
        "chat_answers": len(chat.replies),
        "chat_tokens": tokens,
        "chat_tokens_per_second": tokens / max(chat.seconds, 1e-9),
    }
    return TaskResult("chat", metrics, {"conversation": str(chat.file)} if chat.file else {})


def build_chat_model(session: Session, model: PreTrainedModel | PeftModel) -> ChatModel:
    """Returns what answers with a loaded model; samples follow from `seed`."""
    from transformers import set_seed

    from qlora.tasks.chat_model import ChatModel

    set_seed(session.config.seed)
    return ChatModel(
        model=model,
        encoder=session.chat_encoder,
        generation=session.config.generation,
        pad_token_id=session.pad_token_id,
        device=session.placement.device,
        autocast=session.placement.autocast,
        dtype=session.placement.compute_dtype,
    )
