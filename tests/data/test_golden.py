"""The named sets in tokens: a row or two in each published layout, against the original's definition written out."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from transformers import AutoTokenizer

import qlora
from qlora.config.options import CONF_DIR
from qlora.config.schema import DataConfig
from qlora.data.batching.row_encoder import build_encoder
from qlora.data.formats.recognise import choose_format
from qlora.data.formats.renderers import FORMATS, WITH_REFORMULATIONS

EMBEDDED = Path(qlora.__file__).parent / "demo" / "model"
LLAMA = Path(__file__).parents[3] / "shared" / "data" / "tokenizers" / "llama"
SOURCE_MAX, TARGET_MAX = 64, 24

WITH_INPUT = """Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response: """
WITHOUT_INPUT = """Below is an instruction that describes a task. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response: """

TRAILS = {
    "instruction": "Name the longest trail of the valley in which the two rivers meet, and say how long it is.",
    "input": "",
    "output": "The longest one is the Mill Trail, which takes five hours there and six hours back again by the river.",
    "text": "a rendered copy of the three columns, as tatsu-lab/alpaca has it",
}
COUNT = {"instruction": "Count the words.", "input": "one two  three", "output": "3", "text": "..."}
DIALOGUE = "\n\nHuman: May I feed the ducks?\n\nAssistant: Peas are better for them than bread."
GUANACO = "### Human: What is a fjord?### Assistant: A long inlet between cliffs.### Human: Thanks!"

# Name of the set: rows as published, each with the sources and targets that the original makes of it.
SETS = {
    "alpaca": [
        (TRAILS, [(WITHOUT_INPUT.format(**TRAILS), TRAILS["output"])]),
        (COUNT, [(WITH_INPUT.format(**COUNT), "3")]),
    ],
    "alpaca-clean": [
        ({"output": "3", "input": "a {b} c", "instruction": "Count."},
         [(WITH_INPUT.format(instruction="Count.", input="a {b} c"), "3")]),
        ({"output": "Hello!", "input": "", "instruction": "Greet."},
         [(WITHOUT_INPUT.format(instruction="Greet."), "Hello!")]),
    ],
    "chip2": [
        ({"text": "<human>: What can I pack for a picnic?\n<bot>: Bread, cheese\nand apples.",
          "metadata": {"source": "unified_chip2"}},
         [("What can I pack for a picnic?", "Bread, cheese\nand apples.")]),
    ],
    "self-instruct": [
        ({"prompt": "Make a list of three birds.\n\nOutput:", "completion": " 1. Owl\n2. Wren\n3. Rook"},
         [("Make a list of three birds.\n\nOutput:", " 1. Owl\n2. Wren\n3. Rook")]),
        ({"prompt": "Is 7 odd?\n\nOutput:", "completion": " Yes<|endoftext|>"},
         [("Is 7 odd?\n\nOutput:", " Yes")]),
    ],
    "hh-rlhf": [({"chosen": DIALOGUE, "rejected": f"{DIALOGUE} No."}, [("", DIALOGUE)])],
    "longform": [
        ({"input": "Write about moss.", "output": "Moss grows in the shade.\n", "source": "C4", "subset": "c4"},
         [("Write about moss.", "Moss grows in the shade.\n")]),
    ],
    "oasst1": [({"text": GUANACO}, [("", GUANACO)])],
    "unnatural-instructions": [
        ({"instruction": "You are given a word. Say whether it is a colour.",
          "instances": [
              {"instruction_with_input": "You are given a word. Say whether it is a colour.\nWord: teal",
               "input": "Word: teal", "constraints": "The output should be 'yes' or 'no'.", "output": "yes"},
              {"instruction_with_input": "You are given a word. Say whether it is a colour.\nWord: oak",
               "input": "Word: oak", "constraints": "The output should be 'yes' or 'no'.", "output": "no"},
          ],
          "reformulations": [
              {"instruction": "Is {INPUT} a colour?", "instruction_with_input": "Is teal a colour?",
               "input": "teal", "output": "yes"},
          ]},
         [("You are given a word. Say whether it is a colour.\nWord: teal", "yes"),
          ("You are given a word. Say whether it is a colour.\nWord: oak", "no")]),
    ],
    "flan": [
        ({"inputs": "Is 'wet' the same as 'damp'?\nOPTIONS:\n- yes\n- no", "targets": "yes", "task": "wic"},
         [("Is 'wet' the same as 'damp'?\nOPTIONS:\n- yes\n- no", "yes")]),
    ],
}  # fmt: skip
CASES = [(name, row, expected) for name, rows in SETS.items() for row, expected in rows]


def load(name):
    return OmegaConf.to_container(OmegaConf.load(CONF_DIR / "data" / f"{name}.yaml"))


def rename(row, columns):
    """Returns a row as `data.columns` reads it: the format's names first, then those of the set."""
    return {name: row[column] for name, column in columns.items()} | {
        name: cell for name, cell in row.items() if name not in columns.values()
    }


def reference(base, source, target):
    """The original: bos and source, target and eos, tokenized apart; here a long source loses its beginning."""
    source_ids = base.encode(source, add_special_tokens=False) if source else []
    target_ids = [*base.encode(target, add_special_tokens=False), base.eos_token_id][:TARGET_MAX]
    kept = source_ids[-(SOURCE_MAX - 1) :]
    labels = [-100] * (1 + len(kept)) + target_ids
    return [base.bos_token_id, *kept, *target_ids], labels


@pytest.fixture(
    params=[
        EMBEDDED,
        pytest.param(LLAMA, marks=pytest.mark.skipif(not LLAMA.is_dir(), reason="no shared/data beside the checkout")),
    ],
    ids=["embedded", "llama"],
)
def base(request):
    return AutoTokenizer.from_pretrained(request.param)


def encode(base, examples):
    config = DataConfig(name="toy", path="toy.json", source_max_len=SOURCE_MAX, target_max_len=TARGET_MAX)
    return [(row.input_ids, row.labels) for row in build_encoder(config, base).encode(examples)]


@pytest.mark.matrix(8)
@pytest.mark.parametrize(("name", "row", "expected"), CASES, ids=[case[0] for case in CASES])
def test_a_named_set_has_the_original_s_tokens_and_labels(base, name, row, expected):
    config = load(name)
    examples = FORMATS[config["format"]].render(rename(row, config.get("columns", {})))
    assert encode(base, examples) == [reference(base, *texts) for texts in expected]


@pytest.mark.parametrize("name", SETS)
def test_auto_would_read_a_named_set_in_the_same_way(name):
    config = load(name)
    rows = [rename(row, config.get("columns", {})) for row, _ in SETS[name]]
    assert choose_format("auto", list(rows[0]), rows).name == config["format"]


def test_reformulations_have_the_original_s_tokens(base):
    ((row, expected),) = SETS["unnatural-instructions"]
    expected = [*expected, ("Is teal a colour?", "yes")]
    assert encode(base, WITH_REFORMULATIONS.render(row)) == [reference(base, *texts) for texts in expected]


@pytest.mark.skipif(not LLAMA.is_dir(), reason="no shared/data beside the checkout")
def test_llama_s_ids_of_a_chip2_row_are_these():
    examples = FORMATS["human-bot"].render({"text": "<human>: Hello world\n<bot>: Hello"})
    ids, labels = [1, 15043, 3186, 15043, 2], [-100, -100, -100, 15043, 2]
    assert encode(AutoTokenizer.from_pretrained(LLAMA), examples) == [(ids, labels)]


def test_the_sets_with_rows_here_are_options():
    assert set(SETS) <= {file.stem for file in (CONF_DIR / "data").glob("*.yaml")}
