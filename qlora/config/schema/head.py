"""What the model makes of a text: the group `head`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from qlora.config.registries.objectives import SHIPPED, Head
from qlora.config.schema.data import DataConfig, TrainOn
from qlora.config.schema.evaluation import EvaluationConfig, EvaluationName
from qlora.config.schema.lora import LoraConfig
from qlora.config.schema.loss import LossConfig
from qlora.config.schema.task import TaskName
from qlora.config.schema.values import HOLDS
from qlora.errors import ConfigError
from qlora.text import brief, listed

HeadDtype = StrEnum("HeadDtype", "fp32 bf16")
"""What a head multiplies in."""

Pooling = StrEnum("Pooling", "last mean")
"""What a vector is made of."""

READS = {"labels": (Head.classify,), "dtype": (Head.classify, Head.regress), "pooling": (Head.embed,)}
"""The settings of a head, with the heads that read them."""
WRITERS = (TaskName.chat, TaskName.serve, TaskName.merge, TaskName.export, TaskName.verify)
"""The tasks that need a model which predicts the next token."""


@dataclass(kw_only=True, slots=True)
class HeadConfig:
    """What the model makes of a text."""

    name: Head = Head.causal
    """`causal`: the next token. `classify`: one of several classes, from rows of a text and a label. `regress`:
    a number, or several, from rows of a text and numbers. `embed`: a unit vector, from rows of
    texts that belong together. A head is trained and saved with the adapter; `head=NAME` brings the loss of its
    name."""
    labels: Any = field(default=None, metadata={HOLDS: list[str] | None})
    """The classes of `classify`, in the order of the head's outputs, e.g. `[negative,positive]`; unset: those of the
    rows to train on, in the order in which the set names them, else sorted."""
    dtype: HeadDtype | None = None
    """What the head multiplies in: `fp32`, or `bf16`, which makes it compute as a plain model in 16 bits does. Its
    weights are trained and saved in 32 bits."""

    pooling: Pooling | None = None
    """What `embed` makes a vector of: the hidden state of a text's `last` token, or the `mean` of all of them."""

    def __post_init__(self) -> None:
        if self.labels is not None and not isinstance(self.labels, list):
            raise ConfigError(f"head.labels must be a list such as [a,b] or null, got {brief(self.labels)}")
        for name, readers in READS.items():
            value = getattr(self, name)
            if value is not None and self.name not in readers and not (name == "dtype" and self.name is Head.causal):
                named = " or ".join(f"head={reader.value}" for reader in readers)
                raise ConfigError(f"head.{name}={brief(value)} is read by {named}; choose that, or leave it out")
        if self.labels is not None:
            self._check_labels()

    def _check_labels(self) -> None:
        names = [str(name).lower() if isinstance(name, bool) else str(name) for name in self.labels]
        if len(set(names)) < max(len(names), 2) or not all(map(str.strip, names)):
            raise ConfigError(
                f"head.labels must be a list of at least two different names, e.g. [negative,positive], got "
                f"{brief(self.labels)}"
            )
        self.labels = names

    @property
    def pools_mean(self) -> bool:
        """Whether a vector is a mean over tokens."""
        return self.pooling is Pooling.mean

    @property
    def computes_bf16(self) -> bool:
        """Whether the head multiplies in 16 bits."""
        return self.dtype is HeadDtype.bf16


def planned_outputs(head: HeadConfig, loss: LossConfig, data: DataConfig) -> int:
    """Returns how many numbers the head makes of a text, as far as the config says it; 0: there is no matrix.

    Of classes that only the rows know it is 2, of their numbers 1.
    """
    if loss.head is Head.classify:
        return len(head.labels or ()) or 2
    if loss.head is Head.regress:
        return 1 if loss.is_preference else len(data.label_columns or ()) or 1
    return 0


def check_head(
    head: HeadConfig,
    loss: LossConfig,
    *,
    lora: LoraConfig,
    data: DataConfig,
    evaluation: EvaluationConfig,
    new_tokens: list[str],
    task: TaskName,
) -> None:
    """Refuses what a head cannot be trained with, and a head or a setting beside a loss that is not its own."""
    _check_pair(head, loss)
    if loss.reads_whole_texts and task in WRITERS:
        raise ConfigError(
            f"task={task.value} needs a model that predicts the next token, and head={head.name.value} is one that "
            "says something of whole texts; task=evaluate and task=predict use it, and so do plain transformers and "
            "PEFT (its model card says how)"
        )
    if data.label is not None and not loss.reads_whole_texts:
        raise ConfigError(
            f"data.label={brief(data.label)} is read with head=classify, head=regress or head=embed; choose one of "
            "them, or leave it out (the column of loss=kto is named by data.columns.label)"
        )
    if not loss.has_head:
        return
    name = f"loss={loss.name}" if head.name is Head.causal else f"head={head.name.value}"
    if data.packing and loss.reads_whole_texts:
        raise ConfigError(
            f"data.packing=true joins rows into one, and {name} reads the last token of each text; leave it out"
        )
    if not lora.enabled:
        raise ConfigError(
            f"{name} saves a head beside an adapter, and lora=none trains all weights; choose lora=all-linear"
        )
    if lora.start is not None:
        raise ConfigError(
            f"{name} begins with a fresh adapter and head, and lora.start={lora.start} names another adapter; merge "
            f"that one first (task=merge), and train {'a reward model' if loss.is_preference else 'the head'} on the "
            "merged model"
        )
    if loss.reads_whole_texts:
        _check_whole_texts(name, data=data, evaluation=evaluation, new_tokens=new_tokens)


def _check_pair(head: HeadConfig, loss: LossConfig) -> None:
    """Refuses a head with another head's loss."""
    if head.name is loss.head or (head.name is Head.causal and loss.is_preference):
        if head.dtype is not None and not loss.has_head:
            raise ConfigError(
                f"head.dtype={head.dtype.value} is that of a head, and head=causal trains none; leave it out"
            )
        return
    if head.name is Head.causal:
        raise ConfigError(
            f"loss={loss.name} is a loss of head={loss.head.value}; write head={loss.head.value}"
            f"{'' if loss.name == loss.head.value else f' loss={loss.name}'}"
        )
    fitting = [other for other, shipped in SHIPPED.items() if shipped.head is head.name]
    raise ConfigError(
        f"head={head.name.value} says something of whole texts, and loss={loss.name} is no loss of it; leave loss out, "
        f"which takes loss={head.name.value}{_others(fitting, head.name.value)}, or leave head out"
    )


def _others(fitting: list[str], first: str) -> str:
    others = [f"loss={name}" for name in fitting if name != first]
    return f", or write {listed(others)}" if others else ""


def _check_whole_texts(name: str, *, data: DataConfig, evaluation: EvaluationConfig, new_tokens: list[str]) -> None:
    """Refuses what is about answers, of which rows of whole texts have none."""
    if data.train_on is not TrainOn.assistant:
        raise ConfigError(
            f"data.train_on={data.train_on.value} says which tokens have a loss, and {name} has one for each text; "
            "leave it out"
        )
    for key in ("source_max_len", "target_max_len"):
        if (length := getattr(data, key)) is not None:
            raise ConfigError(
                f"data.{key}={length} cuts prompts and answers apart, and {name} reads whole texts; set "
                f"data.{key}=null, and data.max_length for the longest text"
            )
    if evaluation.metrics and evaluation.name is EvaluationName.rows:
        raise ConfigError(
            f"evaluation.metrics={brief(list(evaluation.metrics))} compares generated answers, and {name} writes none; "
            "choose evaluation=loss, which measures what the head says"
        )
    if evaluation.name is not EvaluationName.rows:
        raise ConfigError(
            f"evaluation={evaluation.name.value.replace('_', '-')} asks a model for its next token, and {name} says "
            "something of whole texts; choose evaluation=loss"
        )
    if new_tokens:
        raise ConfigError(
            f"model.new_tokens={brief(new_tokens)} trains rows of the output layer, and {name} has none; leave it out"
        )
