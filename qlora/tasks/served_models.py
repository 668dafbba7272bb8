"""Loads what `task=serve` answers with: one base, what `adapter` names, and further adapters beside it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel

from qlora.adapters import load_adapter
from qlora.adapters.adapter_files import check_adapter_folder
from qlora.adapters.code_files import check_code_files
from qlora.adapters.several import attach_adapter, check_sharing
from qlora.config.schema import Config, TrainOn
from qlora.config.schema.serve import BASE, NAME
from qlora.config.trained_run import PARTS, find_run, read_run
from qlora.data.batching.row_encoder import RowEncoder, build_encoder
from qlora.data.chat.templates import choose_saved_template
from qlora.errors import ConfigError, DataError
from qlora.evaluation.generation import end_token_ids
from qlora.models.fingerprint import read_base
from qlora.models.tokenizer import load_saved_tokenizer
from qlora.runtime.run_folder import find_adapter
from qlora.serving.served_model import Limits, ServedModel, as_it_is, switch_off, switch_to
from qlora.upstream.peft import base_of
from qlora.upstream.torch_models import weight_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora.session import Session

FIRST = "default"
"""What PEFT calls the first adapter."""


@dataclass(frozen=True)
class Further:
    """An adapter of `serve.adapters`, before anything is loaded."""

    name: str
    folder: Path
    encoder: RowEncoder

    @property
    def key(self) -> str:
        """The key that names it."""
        return f"serve.adapters.{self.name}"


@dataclass(frozen=True)
class Chosen:
    """What is to be served, by the names that clients use."""

    session: Session
    name: str | None
    """Of what `adapter` names; None: that is the base alone."""
    further: list[Further]

    @property
    def adapters(self) -> dict[str, Path]:
        """The folders of all adapters."""
        adapter = self.session.trained[0]
        first = {self.name: adapter} if self.name is not None and adapter is not None else {}
        return first | {further.name: further.folder for further in self.further}

    @property
    def names(self) -> list[str]:
        """All names, what clients get who name none first."""
        full = self.session.trained[1] is not None
        first = [self.name] if self.name is not None else []
        return [*first, *(further.name for further in self.further), *([] if full else [BASE])]


def choose_models(session: Session) -> Chosen:
    """Finds what the config names; raises a `UserError` where it cannot be served, before any weights are read."""
    config, (adapter, full) = session.config, session.trained
    name = config.serve.name
    if adapter is None and full is None:
        if name is not None:
            raise ConfigError(f"serve.name={name} names what adapter= trained, and this is the base; leave it out")
    elif name is None:
        name = _folder_name(config, session)
    if full is not None and config.serve.adapters:
        raise ConfigError(
            f"adapter={full} is a model of its own, which has no adapters; serve.adapters need the base that they were "
            "trained on (adapter=none, or an adapter of it)"
        )
    further = [_read_further(session, key, Path(text).expanduser()) for key, text in config.serve.adapters.items()]
    if name in config.serve.adapters:
        raise ConfigError(f"two adapters are named {name!r}; give the first another name with serve.name")
    chosen = Chosen(session, name, further)
    if len(chosen.adapters) > 1:
        for label, folder in chosen.adapters.items():
            check_sharing(folder, f"serve.adapters.{label}" if label in config.serve.adapters else "adapter")
    return chosen


def load_models(chosen: Chosen, context: int) -> tuple[PreTrainedModel | PeftModel, list[ServedModel]]:
    """Loads base and adapters; returns the model in memory, and what clients can ask for."""
    session, base_name = chosen.session, chosen.session.config.model.name
    if session.trained == (None, None) and chosen.further:
        first = chosen.further[0]
        model: Any = load_adapter(session.load_base(), first.folder, base_name, key=first.key)
        loaded = {first.name: FIRST}
    else:
        model = session.load_trained()
        loaded = {chosen.name: FIRST} if chosen.name is not None else {}
    for number, further in enumerate(chosen.further):
        if further.name not in loaded:
            loaded[further.name] = f"further_{number}"
            attach_adapter(model, further.folder, base_name, name=loaded[further.name], key=further.key)
    encoders = {further.name: further.encoder for further in chosen.further}
    base: Any = base_of(model) if isinstance(model, PeftModel) else model
    limits = Limits(context, len(weight_of(base.get_input_embeddings())))

    def served(name: str) -> ServedModel:
        encoder = encoders.get(name, session.chat_encoder)
        ends = {*end_token_ids(model, session.tokenizer), encoder.writer.end_id} - {None}
        return ServedModel(
            name, encoder, sorted(end for end in ends if end is not None), _switch(model, loaded.get(name)),
            session.config.generation, limits,
        )  # fmt: skip

    return model, [served(name) for name in chosen.names]


def _switch(model: Any, adapter: str | None) -> Callable[[], AbstractContextManager[None]]:
    if not isinstance(model, PeftModel):
        return as_it_is
    return switch_off(model) if adapter is None else switch_to(model, adapter)


def _folder_name(config: Config, session: Session) -> str:
    """Returns the name of the run that `adapter` names, or of its folder."""
    path = Path(config.adapter).expanduser() if config.adapter is not None else session.folder.path
    path = path.resolve()
    name = (path.parent if path.name in PARTS else path).name
    if NAME.fullmatch(name) is None or name == BASE:
        raise ConfigError(f"the folder {name!r} is no name that clients can ask for; set serve.name=NAME")
    return name


def _read_further(session: Session, name: str, folder: Path) -> Further:
    """Reads the folder of an adapter, but for its weights."""
    key, config = f"serve.adapters.{name}", session.config
    if not folder.is_dir():
        raise ConfigError(f"{key}={folder}: no such folder")
    adapter, _ = find_adapter(folder)
    if adapter is None:
        raise DataError(f"{key}={folder} holds no adapter; give the folder of an adapter or of a finished run")
    check_adapter_folder(adapter, key)
    session.check_base(f"{key}={folder}", read_base(adapter))
    check_code_files(adapter, config.model)
    saved = load_saved_tokenizer(adapter, config.model, session.tokenizer)
    run = find_run(str(folder))
    trained = read_run(run, config.task.name, str(folder)).values.get("data", {}) if run is not None else {}
    template = choose_saved_template(saved, session.tokenizer, trained.get("template") or config.data.template)
    train_on = TrainOn(trained["train_on"]) if "train_on" in trained else config.data.train_on
    return Further(name, adapter, build_encoder(replace(config.data, train_on=train_on), session.tokenizer, template))
