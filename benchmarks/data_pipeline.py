"""Times the data pipeline from a raw file to a full pass of ready batches, beside what else prepares such rows.

    python benchmarks/data_pipeline.py [--tokenizer FOLDER] [--alpaca FILE] [--memory] [--json FILE]

Every measurement is a process of its own with empty caches. TRL comes with `pip install 'qlora[benchmark]'`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from typing import Any

BATCH = 16
MAX_LENGTH = {"alpaca": 1024, "chats": 2048}
"""Tokens a row may have, for every system."""
SYSTEMS = ("qlora", "trl", "collator")
MEMORY_ROWS = (100_000, 1_000_000)
EMBEDDED = Path(__file__).parent.parent / "qlora" / "demo" / "model"
LIBRARIES = ("torch", "transformers", "datasets", "tokenizers", "pyarrow", "trl")

PROMPT = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{context}### Response: "
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|assistant|>\n"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}\n{% else %}"
    "<|user|>\n{{ message['content'] + eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""Zephyr's, which needs no tokens of its own, for TRL and qlora alike; TRL finds answers by the word `generation`."""


# Rows


def alpaca_rows(count: int, real: list[dict[str, str]] | None) -> Iterator[dict[str, str]]:
    """Yields rows as Alpaca's: invented ones, or the real ones again and again, each time with a number of its own."""
    if real:
        for index in range(count):
            row = real[index % len(real)]
            note = f" ({index // len(real)})" if index >= len(real) else ""
            yield {name: row[name] + note * (name != "input") for name in ("instruction", "input", "output")}
        return
    vocab = Words(0)
    for _ in range(count):
        context = vocab.some(13, 0.7, 100) if vocab.random.random() < 0.4 else ""
        yield {"instruction": vocab.some(9, 0.4, 40), "input": context, "output": vocab.some(23, 1.1, 370)}


def chat_rows(count: int, real: list[dict[str, str]] | None, tokenizer: Path) -> Iterator[dict[str, Any]]:
    """Yields chats of 6 to 20 turns and 500 to 2,000 tokens, with the texts of real rows where there are some."""
    vocab = Words(1)
    real_text = " ".join(row["output"] for row in real or ()).split()
    letters = _characters_per_token(" ".join(real_text[:5000]) or vocab.exactly(5000), tokenizer)
    for _ in range(count):
        turns = 2 * vocab.random.randint(3, 10)
        length = vocab.random.randint(500, 1950) * letters
        shares = [vocab.random.uniform(0.1, 0.4) if turn % 2 == 0 else 1 for turn in range(turns)]
        messages = []
        for turn, fraction in enumerate(shares):
            requested = max(int(fraction / sum(shares) * length / 6), 1)  # about six characters a word with its space
            start = vocab.random.randrange(max(len(real_text) - requested, 1))
            content = " ".join(real_text[start : start + requested]) or vocab.exactly(requested)
            messages.append({"role": ("user", "assistant")[turn % 2], "content": content})
        yield {"messages": messages}


class Words:
    """Draws invented words with the frequencies of a language (Zipf's law)."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        syllables = [a + b + c for a in "bcdfglmnprst" for b in "aeiou" for c in ("", "n", "r")]
        parts = random.Random(7)
        self.vocab = ["".join(parts.choices(syllables, k=1 + index // 100 % 3)) for index in range(4000)]
        self.weights = list(accumulate(1 / (rank + 3) for rank in range(len(self.vocab))))

    def exactly(self, count: int) -> str:
        return " ".join(self.random.choices(self.vocab, cum_weights=self.weights, k=count))

    def some(self, median: float, spread: float, most: int) -> str:
        """Returns a text whose number of words is drawn from a log-normal distribution."""
        return self.exactly(min(max(round(median * self.random.lognormvariate(0, spread)), 1), most))


def _characters_per_token(text: str, tokenizer: Path) -> float:
    import tokenizers

    tokens = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode(text)
    return len(text) / len(tokens.ids)


def write_rows(rows: Iterable[dict[str, Any]], path: Path) -> Path:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


# The systems: each returns, after imports, a function that prepares the rows and returns the batches


@dataclass(frozen=True, slots=True)
class Task:
    """What a process measures."""

    system: str
    kind: str
    """`alpaca` or `chats`."""
    path: str
    tokenizer: str
    folder: str
    """For the system's caches and outputs."""
    processes: int | None = None
    whole_pass: bool = True
    """Whether to go through all batches; else the first is the last."""


Prepare = Callable[[], Iterable[dict[str, Any]]]


def build_qlora(task: Task) -> Prepare:
    import torch

    from qlora.config.compose import compose
    from qlora.config.schema import DataConfig
    from qlora.data.batching.collate import Collator, count_work
    from qlora.data.pipeline import build_data
    from qlora.models.tokenizer import pad_token_id
    from qlora.objectives import build_objective
    from qlora.runtime import console
    from qlora.runtime.device import Placement
    from qlora.step.fast_step import FastStep
    from qlora.training.meter import Meter
    from qlora.training.stopping import Stop
    from qlora.training.trainer import QLoraTrainer

    console.quiet_libraries()  # as the command `qlora` does
    tokenizer, model = _tokenizer(task), _tiny_model(task)
    chosen, cpu = compose([]), Placement(torch.device("cpu"), torch.float32, torch.float32)
    objective = build_objective(chosen.loss)
    config = DataConfig(
        name=task.kind,
        path=task.path,
        source_max_len=None,
        target_max_len=None,
        max_length=MAX_LENGTH[task.kind],
        eval_dataset_size=1,
        cache_dir=f"{task.folder}/qlora",
        num_proc=task.processes,
    )

    def prepare() -> Iterable[dict[str, Any]]:
        data = build_data(config, tokenizer, need_eval=False)
        trainer = QLoraTrainer(
            model=model,
            arguments=_arguments(task),
            rows=data.train,
            lengths=[],
            collate=Collator(pad_token_id(tokenizer)),
            count=partial(count_work, pad_token_id=pad_token_id(tokenizer)),
            measure=lambda model, step: {},
            verify=lambda folder, model: None,
            loraplus_lr_ratio=None,
            meter=Meter(torch.device("cpu"), peak_memory_gb=lambda: 0.0),
            step=FastStep(model, chosen.trainer, chosen.quantization, cpu, None, objective),
            objective=objective,
            budget=None,
            watchdog=chosen.watchdog,
            name_rows=data.named_rows,
            stop=Stop(),
            metadata={},
            callbacks=[],
        )
        return trainer.get_train_dataloader()

    return prepare


def build_trl(task: Task) -> Prepare:
    """TRL as its documentation has it: prompt and completion, or messages with `assistant_only_loss`."""
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer, model = _tokenizer(task), _tiny_model(task)

    def pair(row: dict[str, str]) -> dict[str, str]:
        return {"prompt": _prompt(row), "completion": row["output"]}

    def prepare() -> Iterable[dict[str, Any]]:
        rows = load_dataset("json", data_files=task.path, split="train")
        if task.kind == "alpaca":
            rows = rows.map(pair, remove_columns=rows.column_names, num_proc=task.processes)
        config = SFTConfig(
            output_dir=f"{task.folder}/trl",
            max_length=MAX_LENGTH[task.kind],
            assistant_only_loss=task.kind == "chats",
            dataset_num_proc=task.processes,
            per_device_train_batch_size=BATCH,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to="none",
        )
        trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
        return trainer.get_train_dataloader()

    return prepare


def build_collator(task: Task) -> Prepare:
    """The original qlora.py: texts in the data set, tokens in the collator, at every batch of every epoch."""
    import torch
    from datasets import Dataset
    from torch.nn.utils.rnn import pad_sequence
    from transformers import Trainer

    tokenizer, model = _tokenizer(task), _tiny_model(task)
    limit = MAX_LENGTH[task.kind]
    pad = tokenizer.pad_token_id or tokenizer.unk_token_id or 0

    def render(row: dict[str, Any]) -> dict[str, str]:
        if task.kind == "alpaca":
            return {"input": _prompt(row), "output": row["output"]}
        says = {"user": "### Human: ", "assistant": "### Assistant: "}  # as the original has OASST1: one text
        return {"input": "", "output": "\n".join(says[turn["role"]] + turn["content"] for turn in row["messages"])}

    def collate(rows: list[dict[str, str]]) -> dict[str, Any]:
        options = {"max_length": limit, "truncation": True, "add_special_tokens": False}
        sources = tokenizer([f"{tokenizer.bos_token}{row['input']}" for row in rows], **options)["input_ids"]
        targets = tokenizer([f"{row['output']}{tokenizer.eos_token}" for row in rows], **options)["input_ids"]
        ids = [torch.tensor(source + target) for source, target in zip(sources, targets, strict=True)]
        labels = [torch.tensor([-100] * len(s) + t) for s, t in zip(sources, targets, strict=True)]
        padded = pad_sequence(ids, batch_first=True, padding_value=pad)
        return {
            "input_ids": padded,
            "attention_mask": padded.ne(pad),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }

    def prepare() -> Iterable[dict[str, Any]]:
        rows = Dataset.from_json(path_or_paths=task.path)
        rows = rows.map(render, remove_columns=rows.column_names)
        trainer = Trainer(model=model, args=_arguments(task), train_dataset=rows, data_collator=collate)
        return trainer.get_train_dataloader()

    return prepare


def _tokenizer(task: Task) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(task.tokenizer)
    if task.kind == "chats":
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _tiny_model(task: Task) -> Any:
    """Returns a model that is never run: trainers want one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=33_000)
    )


def _arguments(task: Task) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=f"{task.folder}/trainer",
        per_device_train_batch_size=BATCH,
        remove_unused_columns=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )


def _prompt(row: dict[str, str]) -> str:
    context = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
    paired = ", paired with an input that provides further context" if context else ""
    return PROMPT.format(paired=paired, instruction=row["instruction"], context=context)


# Measuring


def run_task(task: Task, launched: float) -> dict[str, float]:
    """Measures in this process; times in seconds."""
    build = {"qlora": build_qlora, "trl": build_trl, "collator": build_collator}[task.system]
    prepare = build(task)
    started, used, rows, tokens, trained, first = time.time(), _processor_time(), 0, 0, 0, 0.0
    for batch in prepare():
        first = first or time.time() - started
        rows += len(batch["input_ids"])
        tokens += int(batch["attention_mask"].sum())
        trained += int((batch["labels"] != -100).sum())
        if not task.whole_pass:
            break
    return {
        "imports": started - launched,
        "first_batch": first,
        "whole_pass": time.time() - started,
        "processor": _processor_time() - used,
        "rows": rows,
        "tokens": tokens,
        "trained_tokens": trained,
    }


def _processor_time() -> float:
    """Returns the seconds that this process and its ended children kept a core busy."""
    return sum(os.times()[:4])


def measure(task: Task) -> dict[str, float]:
    """Measures in a fresh process; adds its peak memory in MiB."""
    folder = Path(task.folder)
    folder.mkdir(parents=True, exist_ok=True)
    caches = {"HF_HOME": f"{folder}/hf", "HF_DATASETS_CACHE": f"{folder}/hf/datasets", "HF_HUB_OFFLINE": "1"}
    environment = os.environ | caches | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    result = folder / "result.json"
    arguments = [sys.executable, __file__, "--task", json.dumps(asdict(task)), str(time.time()), str(result)]
    with (folder / "output.txt").open("w+", encoding="utf-8") as output:
        process = subprocess.Popen(arguments, env=environment, stdout=output, stderr=subprocess.STDOUT)
        memory = Memory(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        shared = memory.finish()
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{task.system} failed:\n{output.read()[-3000:]}")
    unit = 1024**2 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS
    maximum = usage.ru_maxrss / unit
    return {**json.loads(result.read_text(encoding="utf-8")), "largest_process": maximum, **shared}


class Memory(threading.Thread):
    """Adds up the memory of a process and its children, four times a second, where Linux prints.

    `all_processes` is the proportional set size: a page that several processes share counts once. `own_memory` leaves
    out pages of files on disk, which the system gives to others when they are needed.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak, self.ended = pid, {"all_processes": 0.0, "own_memory": 0.0}, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.ended.wait(0.25):
            sizes = [_proportional(pid) for pid in _tree(self.pid)]
            for index, name in enumerate(self.peak):
                self.peak[name] = max(self.peak[name], sum(size[index] for size in sizes) / 1024)

    def finish(self) -> dict[str, float]:
        self.ended.set()
        self.join()
        return self.peak if self.peak["all_processes"] else {}


def _tree(pid: int) -> list[int]:
    pids = [pid]
    with suppress(OSError):
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            pids += [below for child in children.read_text().split() for below in _tree(int(child))]
    return pids


def _proportional(pid: int) -> tuple[int, int]:
    """Returns the proportional set size of a process in KiB, and that of it which is no file's."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0, 0
    sizes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return sizes["Pss"], sizes.get("Pss_Anon", 0)


def measure_systems(kind: str, path: Path, systems: list[str], tokenizer: Path, folder: Path) -> list[dict[str, Any]]:
    """Measures one set with every system, one after the other."""
    plans: list[tuple[str, str, int | None]] = []
    if "qlora" in systems:
        plans += [("qlora, cold", "qlora", None), ("qlora, second start", "qlora", None)]
    if "trl" in systems:
        plans += [("TRL", "trl", None), ("TRL, dataset_num_proc=2", "trl", 2)]
    if "collator" in systems:
        plans += [("tokenizing collator", "collator", None)]
    results = []
    for name, system, processes in plans:
        local = folder / f"{kind}-{system}-{processes}"
        result = measure(Task(system, kind, str(path), str(tokenizer), str(local), processes))
        results.append({"set": kind, "system": name, **result})
        print(f"{kind}, {name}: {result['whole_pass']:.1f} s", file=sys.stderr)
    return results


def measure_memory(real: list[dict[str, str]] | None, tokenizer: Path, folder: Path) -> list[dict[str, Any]]:
    """Measures the cold preparation of two sizes of one set."""
    results = []
    for count in MEMORY_ROWS:
        path = write_rows(alpaca_rows(count, real), folder / f"{count}.jsonl")
        local = folder / f"memory-{count}"
        result = measure(Task("qlora", "alpaca", str(path), str(tokenizer), str(local), whole_pass=False))
        results.append({"prepared_rows": count, **result})
        print(f"{count} rows: {result['first_batch']:.1f} s", file=sys.stderr)
    return results


# Reporting


def describe_machine() -> str:
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"


def describe_versions(*more: str) -> str:
    lines = [f"Python {platform.python_version()}"]
    for name in (*LIBRARIES, *more):
        with suppress(PackageNotFoundError):
            lines.append(f"{name} {version(name)}")
    return ", ".join(lines)


def to_table(results: list[dict[str, Any]]) -> str:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "set": lambda r: r["set"],
        "system": lambda r: r["system"],
        "first batch, s": lambda r: f"{r['first_batch']:.2f}",
        "with imports, s": lambda r: f"{r['first_batch'] + r['imports']:.1f}",
        "whole pass, s": lambda r: f"{r['whole_pass']:.1f}",
        "CPU, s": lambda r: f"{r['processor']:.1f}",
        "rows/s": lambda r: f"{r['rows'] / r['whole_pass']:,.0f}",
        "tokens": lambda r: f"{r['tokens']:,}",
        "largest process, MiB": lambda r: f"{r['largest_process']:,.0f}",
        "all processes, MiB": lambda r: f"{r['all_processes']:,.0f}" if "all_processes" in r else "",
    }
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(show(result) for show in columns.values()) for result in results]
    return "\n".join(f"| {line} |" for line in lines)


def to_memory_table(results: list[dict[str, Any]]) -> str:
    small, large = results
    names = [name for name in ("largest_process", "all_processes", "own_memory") if small.get(name)]
    headings = [f"{size:,} rows, MiB" for size in MEMORY_ROWS]
    lines = [" | ".join(["memory of preparing", *headings, "ratio"]), " | ".join(["---"] * 4)]
    for name in names:
        cells = [f"{small[name]:,.0f}", f"{large[name]:,.0f}", f"{large[name] / small[name]:.2f}"]
        lines.append(" | ".join([name.replace("_", " "), *cells]))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000, help="Alpaca rows; 0: none")
    parser.add_argument("--chats", type=int, default=5_000, help="long chats; 0: none")
    parser.add_argument("--alpaca", type=Path, help="a file in Alpaca's form to draw the rows from")
    parser.add_argument("--tokenizer", type=Path, default=EMBEDDED, help="a tokenizer's folder")
    parser.add_argument("--only", default=",".join(SYSTEMS), help="systems to measure, of these")
    parser.add_argument("--memory", action="store_true", help="also the memory of 100,000 and 1,000,000 rows")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    arguments = parser.parse_args()
    systems = arguments.only.split(",")
    if unknown := set(systems) - set(SYSTEMS):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(SYSTEMS)}")
    real = json.loads(arguments.alpaca.read_text(encoding="utf-8")) if arguments.alpaca else None
    tokenizer = arguments.tokenizer.resolve()
    header = f"{datetime.date.today()}, {describe_machine()}, {describe_versions()}"
    with tempfile.TemporaryDirectory(prefix="qlora-benchmark-") as name:
        folder, results, memory = Path(name), [], []
        if arguments.rows:
            path = write_rows(alpaca_rows(arguments.rows, real), folder / "alpaca.jsonl")
            results += measure_systems("alpaca", path, systems, tokenizer, folder)
        if arguments.chats:
            path = write_rows(chat_rows(arguments.chats, real, tokenizer), folder / "chats.jsonl")
            results += measure_systems("chats", path, systems, tokenizer, folder)
        if arguments.memory:
            memory = measure_memory(real, tokenizer, folder)
    tables = [show(measured) for show, measured in ((to_table, results), (to_memory_table, memory)) if measured]
    print("\n\n".join([header, *tables]))
    if arguments.json:
        arguments.json.write_text(json.dumps({"about": header, "results": results + memory}, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--task"]:
        values, launched, target = sys.argv[2:]
        measured = run_task(Task(**json.loads(values)), float(launched))
        Path(target).write_text(json.dumps(measured), encoding="utf-8")
    else:
        main()
