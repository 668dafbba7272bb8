"""Examples in text, and the prompts around their questions: which parts the loss counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import NamedTuple

from qlora.data.chat.conversations import Conversation


class Segment(NamedTuple):
    """A piece of text, and whether the loss counts its tokens."""

    text: str
    trained: bool
    system: str = ""
    """What the system says, with an empty line behind; it stands before the text and is tokenized with it."""
    ends: bool = False
    """Whether the end token follows, as behind an answer before the last one; the last one always gets it."""

    @property
    def whole(self) -> str:
        """The text with what the system says."""
        return self.system + self.text


Example = list[Segment] | Conversation


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt."""

    chosen: Example
    rejected: Example
    unordered: bool = False
    """Whether the scores of the answers do not put the chosen one first."""

    @property
    def is_equal(self) -> bool:
        """Whether both answers say the same."""
        return self.chosen == self.rejected


@dataclass(frozen=True, slots=True)
class Labelled:
    """An answer, and whether it is a good one."""

    example: Example
    desirable: bool


@dataclass(frozen=True, slots=True)
class WholeText:
    """A text, and what a head says of it: a class, or numbers."""

    text: str
    label: str | None = None
    values: tuple[float, ...] = ()
    partners: tuple[str, ...] = ()
    """Other texts: the first one belongs to it, the others do not."""


AnyExample = Example | Pair | Labelled | WholeText


def sides(example: AnyExample) -> tuple[Example, ...]:
    """Returns the examples in one of any kind."""
    if isinstance(example, Pair):
        return (example.chosen, example.rejected)
    if isinstance(example, WholeText):
        return tuple([Segment(text, False)] for text in (example.text, *example.partners))
    return (example.example,) if isinstance(example, Labelled) else (example,)


@dataclass(frozen=True, slots=True)
class Prompt:
    """The words around a question; rows are rendered with them, and the chat template of an adapter is written of them.

    A message of a chat is a question, or a question, `between` and its input.
    """

    name: str
    prefix: str = ""
    behind: str = ""
    between: str = ""
    """What stands between a question and its input; "" where there are no inputs."""
    prefix_both: str = ""
    """What then stands before both, in place of `prefix`."""
    in_text: bool = False
    """Whether it stands in a text that continues with the next question, without end tokens between the turns."""

    def ask(self, question: str, context: str = "") -> str:
        """Returns the prompt for a question, and for its input if it has one."""
        asked = self.prefix_both + question + self.between + context if context else self.prefix + question
        return asked + self.behind

    def fits(self, example: Sequence[Segment]) -> bool:
        """Tells whether an example asks in these words."""
        lead = "".join(segment.text for segment in takewhile(lambda segment: not segment.trained, example))
        if not lead and self.in_text:  # trained as a whole
            whole = "".join(segment.text for segment in example)
            return whole.startswith(self.prefix) and self.behind in whole
        prefixes = (self.prefix, self.prefix_both) if self.between else (self.prefix,)
        return lead.startswith(prefixes) and lead.endswith(self.behind)


# Stanford Alpaca's, as the original qlora.py has it, the space at the end included.
ALPACA = Prompt(
    "alpaca",
    prefix="Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n",
    behind="\n\n### Response: ",
    between="\n\n### Input:\n",
    prefix_both="Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n",
)
# As Axolotl and torchtune have it.
ALPACA_NEWLINE = replace(ALPACA, name="alpaca-newline", behind="\n\n### Response:\n")
QUESTION = Prompt("question-answer", prefix="Question: ", behind="\nAnswer: ")
VERBATIM = Prompt("verbatim")
PROMPTS = (
    ALPACA,
    ALPACA_NEWLINE,
    QUESTION,
    Prompt("guanaco", prefix="### Human: ", behind="### Assistant:", in_text=True),
    Prompt("hh-rlhf", prefix="\n\nHuman: ", behind="\n\nAssistant:", in_text=True),
    VERBATIM,
)
"""In the order in which they are looked for in rows; the last one fits all."""


def find_prompt(examples: Iterable[Example]) -> Prompt:
    """Returns the words in which all of the examples ask, conversations left out."""
    rendered = [example for example in examples if not isinstance(example, Conversation)]
    return next((prompt for prompt in PROMPTS if rendered and all(map(prompt.fits, rendered))), VERBATIM)
