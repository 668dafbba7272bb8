"""Claims about the demo's world, corpus, instruction rows and tokenizer."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from demo_world import templates
from demo_world.corpus import documents, probes
from demo_world.instructions import (
    HELD_OUT_PAIRS,
    HELD_OUT_PEOPLE,
    HELD_OUT_WORDS,
    eval_rows,
    prompt,
    train_rows,
)
from demo_world.operations import OPERATIONS
from demo_world.preferences import WORDS, eval_pairs, train_pairs
from demo_world.tokenizer import build_tokenizer
from demo_world.world import ATTRIBUTES, CATEGORIES, CYCLES, LIST_WORDS, OPPOSITE, PEOPLE

import qlora.demo.instructions as shipped
from qlora.config.compose import compose
from qlora.errors import UserError
from qlora.models.model_files import EMBEDDED

MODEL_FOLDER = EMBEDDED["tiny"]
TOOLS = Path(__file__).parents[2] / "tools"

Row = dict[str, str]
TRAIN = train_rows()
EVAL = eval_rows()
LONGEST_DOCUMENT = 126


def all_templates() -> Iterator[str]:
    """Yields each wording of an instruction without its input."""
    tables = (*templates.FACTS.values(), *templates.LISTS.values(), templates.ANTONYM, templates.CATEGORY)
    numeric = (templates.NEXT, templates.PREVIOUS, templates.ADD, templates.SUBTRACT)
    for wording in chain(*tables, *numeric):
        yield wording.partition("|")[0]


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """Holds 5,000 documents as they read."""
    return [" ".join(text for text, _ in document) for document in documents(5000, seed=7)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL_FOLDER)


def question(row: Row) -> tuple[str, str]:
    return row["instruction"], row["input"]


def test_documents_follow_from_the_seed_alone() -> None:
    assert list(documents(200, seed=3)) == list(documents(200, seed=3))
    assert list(documents(200, seed=3)) != list(documents(200, seed=4))
    assert probes(100, seed=3) == probes(100, seed=3)


def test_full_names_are_unique() -> None:
    assert len({person.name for person in PEOPLE}) == len(PEOPLE) == 120


def test_shipped_rows_are_what_the_generator_makes() -> None:
    assert shipped.train_rows() == TRAIN
    assert shipped.eval_rows() == EVAL
    assert {tuple(row) for row in [*shipped.train_rows(), *shipped.eval_rows()]} == {tuple(TRAIN[0])}


def test_the_pretraining_run_composes_where_its_generator_is_trusted() -> None:
    folder = TOOLS / "demo_world" / "conf"
    config = compose(["experiment=pretrain-tiny", "trusted=[demo_world]"], folder)
    assert (config.data.name, config.data.path) == ("demo-corpus", "demo_world.pretraining:training_rows")
    with pytest.raises(UserError, match="demo_world"):
        compose(["experiment=pretrain-tiny"], folder)


def test_no_question_is_asked_twice_or_in_both_sets() -> None:
    assert len(EVAL) == 300
    assert len({question(row) for row in TRAIN + EVAL}) == len(TRAIN) + len(EVAL)


def test_held_out_people_appear_in_no_training_row() -> None:
    training = json.dumps(TRAIN)
    assert len(HELD_OUT_PEOPLE) == 40
    assert not [person.name for person in HELD_OUT_PEOPLE if person.name in training]


def test_evaluation_facts_are_about_held_out_people_only() -> None:
    names = [person.name for person in HELD_OUT_PEOPLE]
    questions = [row["instruction"] for row in EVAL if row["task"] == "fact"]
    assert len(questions) == 100
    assert all(any(name in fact for name in names) for fact in questions)


def test_held_out_words_and_pairs_appear_in_no_training_row_of_their_task() -> None:
    held_out = {"category": set(HELD_OUT_WORDS), "antonym": set(chain(*HELD_OUT_PAIRS))}
    for row in TRAIN:
        items = set(re.findall(r"\w+", " ".join(question(row))))
        assert not items & held_out.get(row["task"], set()), row


def test_held_out_lists_and_sums_appear_in_no_training_row() -> None:
    def contents(rows: list[Row], tasks: set[str]) -> set[tuple[str, ...]]:
        chosen = [row for row in rows if row["task"] in tasks]
        return {(row["input"], *sorted(re.findall(r"\d+", row["instruction"])), row["output"]) for row in chosen}

    for task in ("add", "subtract"):
        assert not contents(TRAIN, {task}) & contents(EVAL, {task})
    lists = set(templates.LISTS)
    trained_inputs = {row["input"] for row in TRAIN if row["task"] in lists}
    assert not [row for row in EVAL if row["task"] in lists and row["input"] in trained_inputs]


def test_corpus_never_shows_an_instruction(corpus: list[str]) -> None:
    patterns = [re.sub(r"\\{\w\\}", r"\\w+(?: \\w+)?", re.escape(wording)) for wording in all_templates()]
    wordings = re.compile("|".join(patterns), re.IGNORECASE)
    forbidden = ("###", "Instruction", "Response", "Input", "Below")
    for document in corpus:
        assert not wordings.search(document), document
        assert not any(text in document for text in forbidden), document


def test_corpus_uses_every_word_and_mark_of_the_instructions_often(corpus: list[str]) -> None:
    pattern = re.compile(r"\w+|[^\w\s]")
    seen = Counter(pattern.findall(" ".join(corpus)))
    texts = [row["instruction"] + " " + row["input"] + " " + row["output"] for row in TRAIN + EVAL]
    needed = set(pattern.findall(" ".join([*texts, ":"])))
    assert not {text: seen[text] for text in needed if seen[text] < 10}


def test_documents_that_hold_no_story_end_in_an_answer_with_loss() -> None:
    for document in documents(2000, seed=5):
        text, trained = document[-1]
        assert trained or text.endswith((".", "?")), document


def test_segments_tokenize_as_the_whole_document_does(tokenizer: Any) -> None:
    for document in documents(500, seed=6):
        chunks = tokenizer([text for text, _ in document])["input_ids"]
        whole = " ".join(text for text, _ in document)
        assert list(chain(*chunks)) == tokenizer(whole)["input_ids"]
        assert len(list(chain(*chunks))) <= LONGEST_DOCUMENT


def test_shipped_tokenizer_is_what_the_builder_makes(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    built, shipped = (json.loads((folder / "tokenizer.json").read_text()) for folder in (tmp_path, MODEL_FOLDER))
    assert built == shipped


def test_tokenizer_adds_no_special_tokens_by_itself(tokenizer: Any) -> None:
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == 1570
    assert min(tokenizer("Mara lives in Alden.")["input_ids"]) > 2


@pytest.mark.parametrize(
    "text",
    [
        "pear fig, kiwi.",
        "one\ntwo\n\nthree\n- four\n  - five",
        "  spaces around  ",
        "naïve café, 你好 + tabs\there",
        prompt(EVAL[0]),
        prompt(EVAL[1]),
    ],
)
def test_decoding_gives_back_the_stripped_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode([1, *ids, 2], skip_special_tokens=True) == text.strip()


def test_words_of_the_world_are_one_token_and_names_two_at_most(tokenizer: Any) -> None:
    items = {*LIST_WORDS, *map(str.upper, LIST_WORDS), *OPPOSITE, *CATEGORIES, *map(str, range(21))}
    items.update(*ATTRIBUTES.values(), *CYCLES.values())
    items.update(person.name.split()[1] for person in PEOPLE)
    items.update(re.findall(r"[A-Za-z]+", re.sub(r"\{\w\}", "", " ".join(all_templates()))))
    assert not [word for word in items if len(tokenizer.tokenize(word)) > 1]
    first_names = {person.name.split()[0] for person in PEOPLE}
    assert not [name for name in first_names if len(tokenizer.tokenize(name)) > 2]


def expected_answer(row: Row) -> str | None:
    """Recomputes an answer from the words of a probe that belong to its list, where that is simple."""
    items = [word for word in re.findall(r"\b[a-z]+\b", row["source"]) if word in LIST_WORDS]
    numbers = [int(number) for number in re.findall(r"\d+", row["source"])]
    match row["task"]:
        case "copy":
            return " ".join(items)
        case "reverse":
            return " ".join(items[::-1])
        case "sort":
            return " ".join(sorted(items))
        case "first" | "second" | "third" | "last" as task:
            return items[{"first": 0, "second": 1, "third": 2, "last": -1}[task]]
        case "count":
            return str(len(items))
        case "upper":
            return " ".join(word.upper() for word in items)
        case "comma":
            return ", ".join(items)
        case "longest":
            return max(items, key=len)
        case "without":
            return " ".join(items[1:])
        case "add":
            return str(sum(numbers))
        case "subtract":
            return str(max(numbers) - min(numbers))
        case "fact":
            person = next(person for person in PEOPLE if person.name in row["source"])
            return row["target"] if row["target"] in person.values.values() else None
        case _:
            return row["target"]


def test_probe_and_row_answers_agree_with_a_second_computation() -> None:
    rows = probes(1000, seed=11)
    rows += [{"source": " ".join(question(row)), "target": row["output"], "task": row["task"]} for row in TRAIN + EVAL]
    wrong = [row for row in rows if expected_answer(row) != row["target"]]
    assert not wrong


def test_single_statement_documents_are_a_probe_and_its_answer() -> None:
    single = {tuple(text for text, _ in document) for document in documents(40_000, 2) if len(document) == 2}
    asked = [row for row in probes(2000, 2) if row["task"] in ("antonym", "category")]
    assert len({(row["source"], row["target"]) for row in asked} & single) > 20


def test_the_shipped_pairs_are_those_of_the_generator_and_small() -> None:
    assert shipped.preference_rows() == train_pairs()
    assert shipped.preference_eval_rows() == eval_pairs()
    assert sum(path.stat().st_size for path in shipped.DATA_FOLDER.glob("preferences*.jsonl")) < 100_000


def test_rejected_answers_are_those_to_another_list_longer_than_any_that_was_trained() -> None:
    lists = [len(row["input"].split()) for row in chain(TRAIN, EVAL) if row["task"] in templates.LISTS]
    assert max(lists) < WORDS
    for row in chain(train_pairs(), eval_pairs()):
        items = row["input"].split()
        assert len(items) == len(set(items)) == WORDS
        others = [[word for word in items if word != missed] for missed in items]
        others += [[*items, again] for again in items]
        assert row["chosen"] == OPERATIONS[row["task"]](items)
        assert row["rejected"] != row["chosen"]
        assert row["rejected"] in {OPERATIONS[row["task"]](other) for other in others}


def test_held_out_pairs_are_about_lists_that_no_training_pair_holds() -> None:
    assert not {row["input"] for row in train_pairs()} & {row["input"] for row in eval_pairs()}
    assert {row["task"] for row in train_pairs()} == {row["task"] for row in eval_pairs()}
