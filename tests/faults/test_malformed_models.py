"""Mutated folders of models, tokenizers and adapters: each works, or is refused with one sentence that names it."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qlora.config.compose import compose
from qlora.errors import UserError
from qlora.models.model_files import EMBEDDED
from qlora.planning.training_plan import find_shape
from qlora.reporting.modelfile import find_form
from qlora.run import Run
from qlora.runtime import console

SHORT, FULL, CHUNK = 9, 2000, 100
PATIENCE = 120
"""Seconds; a case that takes longer hangs."""

ODD = (
    *(None, True, False, 0, 1, -1, 3, 0.5, 65536, 2**31, 2**63, 10**30, 1e308, -1e308, float("nan"), float("inf")),
    *("", "x", "llama", "../../x", "\x1b[2J", "\ud800", "a" * 10_000, "${oc.env:HOME}", "{{ 1/0 }}", "{% for %}"),
    *([], {}, [1], [None], ["x"], [[]], {"a": None}, {"": {}}, {"content": 3}, {"type": "x"}, [{"type": "Sequence"}]),
)
WHOLE = ("", "{", "[", "null", "3", '"x"', "[]", "{}", "[" * 100_000, "\ufeff{}", '{"a": 1} x', '{"a": ' * 5000)
NEW = ("x", "", "peft_type", "model_type", "auto_map", "quantization_config", "_name_or_path", "text_config", "dtype")
Mutation = Callable[[random.Random, bytes], bytes]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model with its tokenizer, the same in several files of weights, and an adapter on it."""
    folder = tmp_path_factory.mktemp("folders")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED["tiny"])
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    config = LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name, size in (("model", "5GB"), ("shards", "100KB")):
        model.save_pretrained(folder / name, max_shard_size=size)
        tokenizer.save_pretrained(folder / name)
        (folder / name / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    rows = [json.dumps({"instruction": f"What is {number}?", "output": "a b"}) for number in range(6)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    run = Run(compose(overrides(folder, folder / "model")), folder / "run").session
    adapter = run.add_adapter(run.load_base())
    for parameter in adapter.parameters():
        parameter.data += 0.01 if parameter.requires_grad else 0
    adapter.save_pretrained(folder / "adapter")
    shutil.copy(folder / "model" / "tokenizer_config.json", folder / "adapter")
    shutil.copy(folder / "model" / "tokenizer.json", folder / "adapter")
    from qlora.models.fingerprint import write_base

    write_base(run.base, folder / "adapter")
    return {name: folder / name for name in ("model", "shards", "adapter")}


def overrides(folder: Path, model: Path) -> list[str]:
    return [
        *(f"model.name={model}", "data=local", f"data.path={folder}/rows.jsonl", "data.eval_dataset_size=1"),
        *("recipe=none", "trainer.max_steps=1", "evaluation=loss", "evaluation.baseline=false", "task.predict=false"),
        *(f"data.cache_dir={folder}/cache", "data.max_length=64", "trainer.per_device_train_batch_size=1", "lora.r=2"),
        *("device=cpu", "data.num_proc=1", "lora.dropout=0"),
    ]


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the places of all values in a tree, inner nodes too; of long lists and objects a few."""
    yield path
    entries = list(node.items() if isinstance(node, dict) else enumerate(node)) if isinstance(node, dict | list) else []
    for key, inner in entries[:12] + entries[-3:]:
        yield from leaves(inner, (*path, key))


def change_value(draw: random.Random, raw: bytes) -> bytes:
    tree = json.loads(raw)
    path = draw.choice(list(leaves(tree))[1:] or [()])
    if not path:
        return json.dumps(draw.choice(ODD)).encode()
    node = tree
    for key in path[:-1]:
        node = node[key]
    act = draw.randrange(8)
    if act == 0:
        del node[path[-1]]
    elif act == 1 and isinstance(node, dict):
        node[draw.choice(NEW)] = draw.choice(ODD)
    else:
        node[path[-1]] = draw.choice(ODD)
    return json.dumps(tree, indent=2).encode()


def cut(draw: random.Random, raw: bytes) -> bytes:
    return raw[: draw.randrange(len(raw) + 1)]


def flip(draw: random.Random, raw: bytes) -> bytes:
    changed = bytearray(raw)
    for _ in range(draw.choice((1, 3, 10)) if changed else 0):
        changed[draw.randrange(min(len(changed), 4000))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def replace(draw: random.Random, raw: bytes) -> bytes:
    return draw.choice(WHOLE).encode() if draw.random() < 0.5 else json.dumps(draw.choice(ODD)).encode()


def mutate(folder: Path, draw: random.Random) -> list[str]:
    """Damages one or two files of a folder, mostly its JSON; returns what was done."""
    done = []
    for _ in range(draw.choice((1, 1, 2))):
        files = sorted(path for path in folder.iterdir() if path.is_file())
        texts = [path for path in files if path.suffix == ".json"]
        if not files:
            break
        path = draw.choice(texts if texts and draw.random() < 0.85 else files)
        raw = path.read_bytes()
        mutation: Mutation = draw.choice((change_value,) * 6 + (cut, flip, replace))
        if draw.random() < 0.04:
            path.unlink()
        elif draw.random() < 0.02:
            path.unlink()
            path.mkdir()
        else:
            try:
                path.write_bytes(mutation(draw, raw))
            except (ValueError, RecursionError):  # the mutation before left no JSON
                path.write_bytes(cut(draw, raw))
        done.append(f"{path.name}: {mutation.__name__}")
    return done


def use(kind: str, folder: Path, work: Path, folders: dict[str, Path]) -> None:
    """Does with a folder what the tasks do before a training run."""
    if kind == "adapter":
        config = compose([*overrides(work, folders["model"]), "task=evaluate", f"adapter={folder}"])
        model = Run(config, work / "out").session.load_trained()
    else:
        config = compose(overrides(work, folder))
        run = Run(config, work / "out").session
        find_shape(config)
        find_form(run.tokenizer)
        _ = run.is_trainable, run.data
        model = run.add_adapter(run.load_base())
    model(input_ids=torch.tensor([[1, 2, 3]]))


def examine(seed: int, work: Path, folders: dict[str, Path]) -> str:
    """Mutates a folder and uses it; returns what became of it."""
    draw = random.Random(seed)
    kind = draw.choice(list(folders))
    folder = work / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folders[kind], folder)
    done = mutate(folder, draw)
    signal.alarm(PATIENCE)
    try:
        use(kind, folder, work, folders)
        outcome = "runs"
    except UserError as error:
        text = str(error)
        assert "Traceback" not in text, f"{seed}: {text}"
        assert len(text) < 1500, f"{seed}: {len(text)} characters: {text[:300]}"
        assert "\n" not in console.printable(text).strip(), f"{seed}: {text!r}"
        assert any(name in text for name in (str(folder), "adapter", "model.")), f"{seed}: {text}"
        outcome = "refused"
    except BaseException as error:
        raise AssertionError(f"seed {seed}: {kind}: {done}: {type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
        shutil.rmtree(work / "out", ignore_errors=True)
    return outcome


@pytest.fixture
def work(tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(folders["model"].parent / "rows.jsonl", tmp_path)
    return tmp_path


@pytest.mark.full
def test_mutated_folders_are_used_or_refused_with_one_sentence(work: Path, folders: dict[str, Path]) -> None:
    outcomes = Counter(examine(seed, work, folders) for seed in range(SHORT))
    assert min(outcomes["refused"], outcomes["runs"]) >= 2, f"the mutations make both: {outcomes}"


@pytest.mark.full
@pytest.mark.parametrize("start", range(0, FULL, CHUNK))
def test_two_thousand_mutated_folders(start: int, work: Path, folders: dict[str, Path]) -> None:
    failures = []
    for seed in range(start, start + CHUNK):
        try:
            examine(seed, work, folders)
        except AssertionError as error:
            failures.append(str(error)[:600])
    assert not failures, "\n\n".join(failures)
