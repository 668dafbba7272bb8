"""What the tokenizers of well-known models do; needs `shared/data` beside the checkout."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qlora.config.schema import DataConfig, ModelConfig
from qlora.data.batching.row_encoder import build_encoder
from qlora.data.formats.prompts import Segment
from qlora.data.pipeline import build_data
from qlora.models.local_tokenizer import load_local_tokenizer
from qlora.models.tokenizer import load_tokenizer

REAL = Path(__file__).parents[3] / "shared" / "data"
NAMES = ("llama", "gpt2", "pythia")
FOLDERS = (*(f"tokenizers/{name}" for name in NAMES), "models/TinyStories-656K", "models/stories260K")

pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="no shared/data beside the checkout")


@pytest.fixture(params=NAMES)
def real(request):
    return AutoTokenizer.from_pretrained(REAL / "tokenizers" / request.param)


def encode(base, *segments):
    encoder = build_encoder(DataConfig(name="toy", path="toy.json"), base)
    return encoder.encode([[Segment(*segment) for segment in segments]])[0]


def test_special_tokens_in_text_become_no_control_tokens(real):
    text = " ".join(real.all_special_tokens)
    row = encode(real, (text, False), (f"a{real.eos_token}b{real.bos_token}", True))
    inner = row.input_ids[1:-1]
    assert not set(inner) & set(real.all_special_ids)
    assert row.input_ids[0] == real.bos_token_id
    assert row.input_ids[-1] == real.eos_token_id
    assert real.decode(inner[row.turns[0].start - 1 :]).strip() == f"a{real.eos_token}b{real.bos_token}"


def test_plain_text_has_the_ids_of_a_plain_call(real):
    row = encode(real, ("Below is a task.\n\n### Response: ", False), ("Yes, of course!\n", True))
    ids = real(["Below is a task.\n\n### Response: ", "Yes, of course!\n"], add_special_tokens=False)["input_ids"]
    assert row.input_ids == [real.bos_token_id, *ids[0], *ids[1], real.eos_token_id]


def test_the_call_leaves_the_tokenizer_as_it_was(real):
    original = real(real.eos_token)["input_ids"]
    encode(real, (real.eos_token, True))
    assert real(real.eos_token)["input_ids"] == original


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("alpaca_data.json", "alpaca"),
        ("mmlu/zero_shot_mmlu_val.json", "input-output"),
        ("guanaco_text.jsonl", "text"),
        ("hh_rlhf_harmless.jsonl.gz", "chosen"),
    ],
)
def test_published_files_are_recognised_and_built(file, name):
    base = AutoTokenizer.from_pretrained(REAL / "tokenizers" / "llama")
    limits = {"source_max_len": 1024, "target_max_len": 256, "max_length": None}
    config = DataConfig(name=name, path=str(REAL / file), eval_dataset_size=10, max_train_samples=200, **limits)
    data = build_data(config, base)
    assert data.report.format == name
    assert (data.report.train_rows, data.report.eval_rows) == (200, 10)
    assert data.report.max_length <= config.source_max_len + config.target_max_len


@pytest.mark.full
def test_all_containers_of_the_same_rows_give_the_same_tokens(real):
    paths = [
        REAL / "containers" / f"alpaca_300.{suffix}" for suffix in ("json", "jsonl", "jsonl.gz", "csv", "csv.gz", "tsv")
    ]
    configs = [DataConfig(name="alpaca", path=str(path), eval_dataset_size=10) for path in paths]
    assert len({build_data(config, real).report.fingerprint for config in configs}) == 1


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_plan_counts_the_tokens_that_training_reads(folder):
    config = ModelConfig(name=str(REAL / folder), new_tokens=["<|im_start|>", "🙂"])
    trained, planned = load_tokenizer(config), load_local_tokenizer(REAL / folder, config.new_tokens)
    texts = ("### Human: hello 🙂\n### Assistant: é", "<|im_start|>user\nx", " leading and trailing ", "🙃")
    assert [planned(text)["input_ids"] for text in texts] == [trained(text)["input_ids"] for text in texts]
