"""Every shipped YAML: it composes, its numbers are the paper's, its shapes are the models'."""

from __future__ import annotations

import atexit
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from qlora.config.command import check_overrides
from qlora.config.compose import compose, compose_dict
from qlora.config.help import reference
from qlora.config.options import CONF_DIR, group_names
from qlora.config.registries.objectives import SHIPPED, WHOLE_TEXTS
from qlora.config.schema import described_settings

QUANTIZED = Path(tempfile.mkdtemp(prefix="qlora-tests-"))
(QUANTIZED / "config.json").write_text('{"quantization_config": {"quant_method": "awq", "bits": 4}}')
atexit.register(shutil.rmtree, QUANTIZED, ignore_errors=True)

# What an option needs besides its own name.
NEEDS = {
    ("lora", "none"): ["quantization=none"],
    ("lora", "pissa"): ["quantization=none"],
    ("lora", "olora"): ["quantization=none"],
    ("task", "push"): ["repo=me/mine"],
    ("task", "report"): ["runs=outputs/runs/*"],
    ("task", "migrate"): ["from=finetune.sh"],
    ("task", "replay"): ["run=outputs/runs/mine"],
    ("quantization", "stored"): [f"model.name={QUANTIZED}"],
    ("evaluation", "lm-eval"): ["evaluation.tasks=[arc_easy]"],
}
EXTRAS = {"hqq": "hqq", "torchao-int": "torchao"}
"""The packages that options need, by their names without bits."""
OPTIONS = [(group, file.stem) for group in group_names() for file in sorted((CONF_DIR / group).glob("*.yaml"))]
MODELS = [name for group, name in OPTIONS if group == "model"]
SWEEPS = [name for group, name in OPTIONS if group == "sweep"]

# Their options set several groups, or depend on one another.
ALONE = ("lora", "quantization", "experiment", "head")
LOSSES_OF_HEADS = {("loss", name) for name, loss in SHIPPED.items() if loss.rows in WHOLE_TEXTS}
ON_WHOLE_TEXTS = ["data=local", "data.path=rows.jsonl", "evaluation=loss"]
NEEDS |= {(group, name): ON_WHOLE_TEXTS for group, name in OPTIONS if group == "head" and name != "causal"}


def mixed() -> list[list[str]]:
    """Returns every option of the other groups, those of different groups side by side to compose less often."""
    groups = [group for group in group_names() if group not in (*ALONE, "sweep")]
    columns = [
        [f"{group}={name}" for owner, name in OPTIONS if owner == group and (owner, name) not in LOSSES_OF_HEADS]
        for group in groups
    ]
    rows = [[choice for choice in row if choice] for row in itertools.zip_longest(*columns)]
    return [[*row, *(need for choice in row for need in NEEDS.get(tuple(choice.split("=")), []))] for row in rows]


# Paper, table 9 (B.2): batch, learning rate, steps, source length, target length. An empty prompt is one token long;
# the scripts give it 16.
PAPER = {
    ("7b", "alpaca"): (16, 2e-4, 10000, 384, 128),
    ("7b", "oasst1"): (16, 2e-4, 1875, 16, 512),
    ("7b", "hh-rlhf"): (16, 2e-4, 10000, 16, 768),
    ("7b", "longform"): (16, 2e-4, 4000, 512, 1024),
    ("33b", "alpaca"): (32, 1e-4, 5000, 384, 128),
    ("33b", "oasst1"): (16, 1e-4, 1875, 16, 512),
    ("33b", "hh-rlhf"): (32, 1e-4, 5000, 16, 768),
    ("33b", "longform"): (32, 1e-4, 2343, 512, 1024),
    ("65b", "alpaca"): (64, 1e-4, 2500, 384, 128),
    ("65b", "oasst1"): (16, 1e-4, 1875, 16, 512),
    ("65b", "hh-rlhf"): (64, 1e-4, 2500, 16, 768),
    ("65b", "longform"): (32, 1e-4, 2343, 512, 1024),
}
PAPER |= {("13b", data): row for (size, data), row in PAPER.items() if size == "7b"}
SAME_AS = {"2-7b": "7b", "2-13b": "13b", "2-70b": "65b"}

# Billions of parameters, as the models' own pages state them; a preset need not be listed.
BILLIONS = {
    "tiny": 0.003, "llama-7b": 6.74, "llama-13b": 13.02, "llama-33b": 32.53, "llama-65b": 65.29,
    "llama-2-7b": 6.74, "llama-2-13b": 13.02, "llama-2-70b": 68.98, "llama-3.1-8b": 8.03, "llama-3.1-70b": 70.55,
    "llama-3.2-1b": 1.24, "llama-3.2-3b": 3.21, "pythia-160m": 0.162, "pythia-1.4b": 1.415, "pythia-6.9b": 6.857,
    "pythia-12b": 11.85, "qwen2.5-0.5b": 0.494, "qwen2.5-1.5b": 1.54, "qwen2.5-7b": 7.62, "qwen2.5-14b": 14.77,
    "qwen2.5-32b": 32.76, "qwen3-0.6b": 0.596, "qwen3-1.7b": 1.72, "qwen3-4b": 4.02, "qwen3-8b": 8.19,
    "qwen3-14b": 14.77, "qwen3-32b": 32.76, "mistral-7b": 7.25, "gemma-2-2b": 2.61, "gemma-2-9b": 9.24,
    "gemma-3-1b": 1.0, "phi-3.5-mini": 3.82, "phi-4": 14.66, "smollm2-135m": 0.135, "smollm2-360m": 0.362,
    "smollm2-1.7b": 1.71, "gemma-3-4b-it": 3.88, "gemma-3-12b-it": 11.77, "phi-4-mini": 3.84,
    "qwen3-30b-a3b": 30.53, "gpt-oss-20b": 20.91, "gpt-oss-120b": 116.8, "qwen3-235b-a22b": 235.1,
    "lfm2-1.2b": 1.17, "deepseek-v2-lite": 15.7, "mistral-small-3-24b": 23.6, "mistral-nemo": 12.2,
}  # fmt: skip


def load(group: str, name: str) -> DictConfig:
    node = OmegaConf.load(CONF_DIR / group / f"{name}.yaml")
    assert isinstance(node, DictConfig)
    return node


@pytest.mark.matrix(8)
@pytest.mark.parametrize(("group", "name"), [option for option in OPTIONS if option[0] in ALONE])
def test_an_option_composes_alone(group: str, name: str) -> None:
    if (package := EXTRAS.get(name.rstrip("0123456789"))) is not None:
        pytest.importorskip(package)
    compose([f"{group}={name}", *NEEDS.get((group, name), [])])


@pytest.mark.matrix(3)
@pytest.mark.parametrize("choices", mixed(), ids=" ".join)
def test_options_of_different_groups_compose_together(choices: list[str]) -> None:
    compose([*choices, "data.path=rows.jsonl"])


@pytest.mark.matrix(1)
@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_starts_several_jobs_and_each_is_valid(name: str) -> None:
    if name == "quantizers":
        for package in EXTRAS.values():
            pytest.importorskip(package)
    composed = compose_dict([f"sweep={name}"])
    assert composed.hydra.mode.name == "MULTIRUN"
    assert composed.hydra.sweeper.params
    check_overrides([f"sweep={name}", "seed=1,2"])


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_file_begins_with_a_comment_that_says_what_it_is(group: str, name: str) -> None:
    lines = (CONF_DIR / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = lines[1] if lines[0].startswith("# @package") else lines[0]
    assert comment.startswith("# ")
    assert comment.endswith(".")


def test_every_file_of_the_tree_is_an_option() -> None:
    known = {CONF_DIR / group / f"{name}.yaml" for group, name in OPTIONS} | {CONF_DIR / "config.yaml"}
    others = {path for path in CONF_DIR.rglob("*.*") if path.is_file() and "hydra" not in path.parts} - known
    assert not {path for path in others if path.suffix in (".yaml", ".yml")}


@pytest.mark.matrix(4)
@pytest.mark.parametrize(("size", "data"), sorted(PAPER))
def test_the_paper_s_table_comes_out_of_model_and_data(size: str, data: str) -> None:
    config = compose([f"model=llama-{size}", f"data={data}"])
    trainer, rows = config.trainer, config.data
    batch = trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps
    lengths = (rows.source_max_len, rows.target_max_len)
    assert (batch, trainer.learning_rate, trainer.max_steps, *lengths) == PAPER[size, data]
    small = size in ("7b", "13b")
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (64, 16, 0.1 if small else 0.05)
    assert config.lora.target_modules == ["all-linear"]
    assert (trainer.eval_steps, trainer.save_steps) == (187, 500 if small else 200)
    assert (trainer.optim, trainer.adam_beta2, trainer.max_grad_norm) == ("paged_adamw_32bit", 0.999, 0.3)
    assert (trainer.lr_scheduler_type, trainer.group_by_length) == ("constant", True)
    assert (config.quantization.bits, config.quantization.quant_type.value) == (4, "nf4")
    assert config.quantization.double_quant


@pytest.mark.parametrize("size", sorted(SAME_AS))
def test_llama_2_trains_by_the_numbers_of_the_same_size(size: str) -> None:
    ours = compose([f"model=llama-{size}", "data=oasst1"])
    first = compose([f"model=llama-{SAME_AS[size]}", "data=oasst1"])
    assert (ours.trainer, ours.lora, ours.data) == (first.trainer, first.lora, first.data)


@pytest.mark.matrix(2)
@pytest.mark.parametrize("size", ["7b", "13b", "33b", "65b"])
def test_guanaco_is_llama_on_oasst1(size: str) -> None:
    guanaco, pair = compose([f"experiment=guanaco-{size}"]), compose([f"model=llama-{size}", "data=oasst1"])
    assert guanaco.name == f"guanaco-{size}"
    guanaco.name = None
    assert guanaco == pair


def test_a_recipe_follows_the_last_choice_of_model_and_data() -> None:
    config = compose(["experiment=guanaco-33b", "data=longform"])
    assert (config.trainer.max_steps, config.data.target_max_len) == (2343, 1024)
    config = compose(["experiment=guanaco-33b", "model=llama-7b"])
    assert (config.trainer.learning_rate, config.trainer.max_steps) == (2e-4, 1875)


def test_the_command_line_wins_over_recipe_and_experiment() -> None:
    config = compose(["experiment=guanaco-65b", "trainer.max_steps=5", "lora.dropout=0.3", "name=mine"])
    assert (config.trainer.max_steps, config.lora.dropout, config.name) == (5, 0.3, "mine")


@pytest.mark.parametrize("lora", ["attention", "dora", "rslora"])
def test_another_adapter_keeps_its_modules_under_a_recipe(lora: str) -> None:
    config = compose(["model=llama-65b", f"lora={lora}"])
    alone = compose(["recipe=none", f"lora={lora}"])
    alone.lora.dropout = 0.05
    assert config.lora == alone.lora


def test_recipe_none_leaves_the_options_as_they_stand() -> None:
    config = compose(["model=llama-65b", "data=oasst1", "recipe=none"])
    assert (config.trainer.max_steps, config.trainer.gradient_accumulation_steps) == (10000, 16)
    assert config.data.target_max_len == 256


def test_a_recipe_can_be_lent_to_another_model_with_its_pairs() -> None:
    config = compose(["model=mistral-7b", "recipe=llama-7b", "data=oasst1"])
    assert (config.model.name, config.trainer.max_steps) == ("mistralai/Mistral-7B-v0.3", 1875)


PRESET = """# A model of my own.
name: me/mine
license: apache-2.0
architecture:
  model_type: llama
  hidden_size: 512
  intermediate_size: 1024
  num_hidden_layers: 2
  num_attention_heads: 8
  vocab_size: 32000
  max_position_embeddings: 2048
"""
ROWS = """# Rows of my own.
name: mine
path: me/rows
format: alpaca
"""


def qlora(*args: str, folder: Path, conf: Path = CONF_DIR) -> str:
    """Returns what a command prints, with `conf` in place of the shipped options."""
    code = (
        "import sys, pathlib; from qlora.config import options; "
        "options.CONF_DIR = pathlib.Path(sys.argv.pop(1)); from qlora.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(conf), *args], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.matrix(1)
@pytest.mark.parametrize("is_shipped", [True, False], ids=["shipped", "of the user's own"])
def test_a_model_and_a_data_set_are_one_file_each(tmp_path: Path, is_shipped: bool) -> None:
    folder, flags, conf = tmp_path / "conf", ["--config-dir", str(tmp_path / "conf")], CONF_DIR
    if is_shipped:
        shutil.copytree(CONF_DIR, folder)
        flags, conf = [], folder
    for group, text in (("model", PRESET), ("data", ROWS)):
        (folder / group).mkdir(parents=True, exist_ok=True)
        (folder / group / "new.yaml").write_text(text, encoding="utf-8")
    choice = [*flags, "model=new", "data=new"]
    assert "name: me/mine" in qlora(*choice, "--cfg", "job", folder=tmp_path, conf=conf)
    assert "me/mine" in qlora(*choice, "task=plan", "plan.device=t4", folder=tmp_path, conf=conf)
    for group, comment in (("model", "A model of my own."), ("data", "Rows of my own.")):
        assert re.search(rf"\n  new +{comment}\n", qlora("--help", group, *flags, folder=tmp_path, conf=conf))


def test_the_reference_of_all_keys_names_no_preset_or_data_set() -> None:
    names = set(re.findall(r"`([\w.-]+)`", reference()))
    assert not names & ({name for group, name in OPTIONS if group in ("model", "recipe")} - {"tiny", "none"})
    assert "qlora --help data" in reference()


def test_a_user_s_own_model_brings_its_own_recipe(tmp_path: Path) -> None:
    for folder, text in (("model", "name: me/mine\n"), ("recipe", "# @package _global_\ntrainer: {max_steps: 7}\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.yaml").write_text(text, encoding="utf-8")
    assert compose(["model=mine"], tmp_path).trainer.max_steps == 7


@pytest.mark.matrix(20)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_s_shape_has_the_advertised_parameters(name: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    shape = described_settings(OmegaConf.to_container(load("model", name).architecture))
    config = transformers.AutoConfig.for_model(shape.pop("model_type"), **shape)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    billions = sum(weight.numel() for weight in model.parameters()) / 1e9
    assert billions == pytest.approx(BILLIONS.get(name, billions), rel=0.02)


def test_the_models_whose_size_is_known_are_presets() -> None:
    assert set(BILLIONS) <= set(MODELS)


CHATTING = {
    name: base for name in MODELS if (base := re.sub(r"-(instruct|it)(-\d+)?$", "", name)) in MODELS and base != name
}
"""The presets that learned to chat, with the base that they began as."""


@pytest.mark.parametrize(("name", "base"), CHATTING.items())
def test_a_model_that_learned_to_chat_has_the_shape_of_its_base(name: str, base: str) -> None:
    may_differ = ("max_position_embeddings", "rope_theta")
    tuned, plain = load("model", name), load("model", base)
    assert {**tuned.architecture, **dict.fromkeys(may_differ)} == {**plain.architecture, **dict.fromkeys(may_differ)}
    assert (tuned.license, tuned.get("gated")) == (plain.license, plain.get("gated"))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_states_its_licence(name: str) -> None:
    model = load("model", name)
    assert model.license
    assert bool(model.get("gated")) == model.license.startswith(("llama2", "llama3", "gemma"))
