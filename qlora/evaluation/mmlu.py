"""MMLU (arXiv 2009.03300): multiple-choice questions, answered by the likelihood of the letters A to D."""

from __future__ import annotations

import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from qlora.config.schema import EvaluationConfig, MmluSplit
from qlora.errors import ConfigError, DataError
from qlora.evaluation.choices import ChoiceEncoder, ChoiceReader, Prompt, build_groups, measure_choices
from qlora.evaluation.measure import Measurement
from qlora.evaluation.statistics import Score
from qlora.runtime.console import progress
from qlora.text import listed

log = logging.getLogger(__name__)

Row = Mapping[str, Any]

LETTERS = ("A", "B", "C", "D")
COLUMNS = ("subject", "input", "output")
HUB_SET, HUB_SUBSET = "cais/mmlu", "all"
HUB_SPLITS = {MmluSplit.val: "validation", MmluSplit.test: "test"}
SHOTS = 5
"""Solved questions that the hub's set has for each subject, in its split `dev`."""

ENCODED_TOGETHER = 256
"""Questions that are tokenized at once: enough for all cores, few enough for little memory."""

SHOT_END = re.compile(r"(?<=\nAnswer: [ABCD]\n\n)(?!\Z)")
"""A solved question ends here; blank lines alone also stand inside of questions."""


class Question(NamedTuple):
    """One question as a model reads it."""

    subject: str
    text: str
    """Everything up to where the answer begins: heading, solved questions, the question, its choices, `Answer:`."""
    answer: str
    """The right letter."""


def load_questions(
    config: EvaluationConfig,
    *,
    read_file: Callable[[str], Iterable[tuple[Row, str]]],
    load_split: Callable[[str], Iterable[Row]],
) -> list[Question]:
    """Returns the first `max_samples` questions of `path`, or of the hub's set behind its solved ones.

    `read_file` yields a file's rows, each with where it stands; `load_split` gives a split of the hub's set. Raises
    `DataError` for a row that is not a question, and if there are none.
    """
    if config.path is not None:
        rows = islice(read_file(config.path), config.max_samples)
        questions = [read_question(row, source) for row, source in rows]
    else:
        asked = islice(load_split(HUB_SPLITS[config.split]), config.max_samples)
        solved = load_split("dev") if config.shots != 0 else ()
        questions = render_questions(asked, solved, SHOTS if config.shots is None else config.shots)
    if not questions:
        raise DataError(f"evaluation.path={config.path}: it holds no questions")
    return questions


def read_question(row: Row, source: str) -> Question:
    """Returns a row of a file with `subject`, `input` and `output`; `source` begins the message of an error."""
    for name in COLUMNS:
        if name not in row:
            raise DataError(
                f"{source}: no column {name!r}; a question needs {', '.join(COLUMNS)}, and this one has "
                f"{listed(row) or 'none'}"
            )
    subject, text, answer = (row[name] for name in COLUMNS)
    for name, value in (("subject", subject), ("input", text)):
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{source}: {name!r} must be a text and not empty, got {value!r}")
    letter = answer.strip() if isinstance(answer, str) else answer
    if letter not in LETTERS:
        raise DataError(f"{source}: 'output' must be the letter of the right choice, A, B, C or D, got {answer!r}")
    return Question(subject, text, letter)


def render_questions(asked: Iterable[Row], solved: Iterable[Row], shots: int) -> list[Question]:
    """Returns rows of the hub's set (`question`, `subject`, `choices`, `answer`) in the layout of MMLU's authors.

    The first `shots` rows of `solved` on the same subject precede each question, with their answers.
    """
    examples: dict[str, list[str]] = {}
    for row in solved:
        examples.setdefault(row["subject"], []).append(f"{_ask(row)} {LETTERS[row['answer']]}\n\n")
    questions = []
    for row in asked:
        # Two blanks, as the authors' own code writes it.
        heading = f"The following are multiple choice questions (with answers) about  {_spoken(row['subject'])}.\n\n"
        examples_text = "".join(examples.get(row["subject"], [])[:shots])
        questions.append(Question(row["subject"], heading + examples_text + _ask(row), LETTERS[row["answer"]]))
    return questions


def _spoken(subject: str) -> str:
    return subject.replace("_", " ")


def _ask(row: Row) -> str:
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True))
    return f"{row['question']}{choices}\nAnswer:"


class Mmlu:
    """Asks a model every question: the letter A, B, C or D that is likeliest behind the question is its answer."""

    at_each_evaluation = True

    def __init__(
        self,
        questions: Sequence[Question],
        *,
        split: str,
        tokenizer: PreTrainedTokenizerBase,
        source_max_len: int,
        context: int | None,
        pad_token_id: int,
        batch_size: int,
        device: torch.device,
    ) -> None:
        """Tokenizes the questions; `context` is the most tokens that the model reads.

        A longer prompt loses solved questions, the first first, and then the beginning of its own question. Raises
        `ConfigError` where `source_max_len` or the context is too small for any.
        """
        self.questions, self.split = list(questions), split
        self.pad_token_id, self.batch_size, self.device = pad_token_id, batch_size, device
        self.prompts = Fitter(ChoiceEncoder(tokenizer, LETTERS), source_max_len, context).encode(
            [question.text for question in questions]
        )
        self._groups = build_groups(self.prompts)

    def measure(self, model: torch.nn.Module) -> Measurement:
        """Returns the accuracy (the mean of the subjects'), that of each subject, the loss, and a record a question.

        The loss is the mean negative log-likelihood of the right answer in nats.
        """
        with progress("MMLU", sum(len(group.rows) for group in self._groups)) as advance:
            likelihoods = measure_choices(
                ChoiceReader(model, self.pad_token_id, self.device),
                self._groups,
                shape=(len(self.questions), len(LETTERS)),
                batch_size=self.batch_size,
                on_progress=advance,
            )
        records = [
            {
                "subject": question.subject,
                "prediction": LETTERS[int(scores.argmax())],
                "reference": question.answer,
                "log_likelihoods": dict(zip(LETTERS, scores.tolist(), strict=True)),
                "prompt_tokens": len(prompt.ids),
            }
            for question, prompt, scores in zip(self.questions, self.prompts, likelihoods, strict=True)
        ]
        return self._score(records)

    def _score(self, records: list[dict[str, Any]]) -> Measurement:
        subjects = [re.sub(r"\W+", "_", record["subject"]) for record in records]
        right = [float(record["prediction"] == record["reference"]) for record in records]
        losses = [-record["log_likelihoods"][record["reference"]] for record in records]
        scores = {"accuracy": Score(right, subjects), "loss": Score(losses)}
        for subject in dict.fromkeys(subjects):
            answers = [value for value, name in zip(right, subjects, strict=True) if name == subject]
            scores[f"accuracy_{subject}"] = Score(answers)
        scores = {f"mmlu_{self.split}_{name}": score for name, score in scores.items()}
        return Measurement({name: score.estimate().value for name, score in scores.items()}, scores, records=records)


class Parts(NamedTuple):
    """A prompt's text in what can be left out of it one by one."""

    heading: str
    shots: list[str]
    """Solved questions."""
    question: str

    @classmethod
    def of(cls, text: str) -> Parts:
        """Splits a prompt; only one with solved questions has a heading apart from the question."""
        *shots, question = SHOT_END.split(text)
        if not shots:
            return cls("", [], question)
        heading, blank, first = shots[0].partition("\n\n")
        if not first or "\n" in heading:  # the first paragraph is a question itself
            return cls("", shots, question)
        return cls(heading + blank, [first, *shots[1:]], question)

    @property
    def text(self) -> str:
        """The prompt without what was left out."""
        return self.heading + "".join(self.shots) + self.question


class Fitter:
    """Tokenizes prompts so that they fit into `source_max_len` and, with their answers, into the model's context."""

    def __init__(self, encoder: ChoiceEncoder, source_max_len: int, context: int | None) -> None:
        """Raises `ConfigError` if not even the last word of a question fits."""
        self.encoder, self.source_max_len, self.context = encoder, source_max_len, context or sys.maxsize
        [shortest] = encoder.encode(["Answer:"])
        if self._excess(shortest) > 0:
            raise ConfigError(
                f"{self._limit} leaves no room for a question: its last word, Answer:, takes {len(shortest.ids)} "
                "tokens by itself; 2048 is enough for five solved questions before it"
            )

    def encode(self, texts: Sequence[str]) -> list[Prompt]:
        """Returns the prompts in order, and logs how many had to be shortened."""
        prompts: list[Prompt] = []
        shortened: Counter[str] = Counter()
        for start in range(0, len(texts), ENCODED_TOGETHER):
            prompts += self._encode(texts[start : start + ENCODED_TOGETHER], shortened)
        if shortened:
            log.info(
                "MMLU: %s of %s prompts are longer than %s: %s lose solved questions, %s the beginning of their own",
                *(f"{count:,}" for count in (shortened.total(), len(texts))),
                self._limit,
                *(f"{shortened[kind]:,}" for kind in ("shots", "question")),
            )
        return prompts

    def _encode(self, texts: Sequence[str], shortened: Counter[str]) -> list[Prompt]:
        parts = [Parts.of(text) for text in texts]
        prompts = self.encoder.encode(texts)
        with_fewer: set[int] = set()
        while again := [index for index, part in enumerate(parts) if part.shots and self._excess(prompts[index]) > 0]:
            with_fewer.update(again)
            for index in again:
                del parts[index].shots[0]
            encoded = self.encoder.encode([parts[index].text for index in again])
            for index, prompt in zip(again, encoded, strict=True):
                prompts[index] = prompt
        for index, prompt in enumerate(prompts):
            if (excess := self._excess(prompt)) > 0:
                first = len(self.encoder.bos)
                ids = np.concatenate([prompt.ids[:first], prompt.ids[first + excess :]])
                prompts[index] = prompt._replace(ids=ids)
                shortened["question"] += 1
            elif index in with_fewer:
                shortened["shots"] += 1
        return prompts

    def _excess(self, prompt: Prompt) -> int:
        return len(prompt.ids) - min(self.source_max_len, self.context - prompt.rest)

    @property
    def _limit(self) -> str:
        if self.context < self.source_max_len:
            return f"the model's context of {self.context:,} tokens"
        return f"evaluation.source_max_len={self.source_max_len}"
