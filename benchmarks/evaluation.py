"""Times MMLU and the answering of rows, each beside a plain loop that takes one item at a time.

    python benchmarks/evaluation.py [--model FOLDER] [--mmlu FILE ...] [--items N] [--rows N] [--json F] [-- KEY=VALUE]

Both sides have the same model in the same process and the same tokens. Words behind a double dash are those of qlora's
command line, e.g. -- quantization=nf4, or -- data=local data.path=FILE for the rows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from data_pipeline import EMBEDDED, Words, describe_machine, describe_versions, write_rows  # noqa: E402

SUBJECTS, SHOTS = 4, 5
"""Subjects of the invented questions, and solved ones before each."""
ANSWER_TOKENS = 32
"""Tokens of each generated answer: an untuned model may stop at once, or never."""


# Questions


def invented_questions(count: int) -> Iterator[dict[str, str]]:
    """Yields questions in MMLU's layout behind solved ones, short enough for a context of 512 tokens."""
    vocab = Words(0)
    names = [vocab.exactly(2) for _ in range(SUBJECTS)]
    solved = {name: "".join(f"{_question(vocab)} {vocab.random.choice('ABCD')}\n\n" for _ in range(SHOTS))
              for name in names}  # fmt: skip
    for number in range(count):
        name = names[number * SUBJECTS // count]
        heading = f"The following are multiple choice questions (with answers) about  {name}.\n\n"
        text = heading + solved[name] + _question(vocab)
        yield {"subject": name, "input": text, "output": vocab.random.choice("ABCD")}


def _question(vocab: Words) -> str:
    choices = "".join(f"\n{letter}. {vocab.exactly(1)}" for letter in "ABCD")
    return f"{vocab.some(6, 0.4, 10)}?{choices}\nAnswer:"


# Measuring


class Clock:
    """Seconds that passed and that the cores were busy."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait
        wait()
        self.started, self.busy = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        self.wait()
        return {"seconds": time.perf_counter() - self.started, "processor": time.process_time() - self.busy}


def measure_mmlu(what: str, run: Any, model: Any, wait: Callable[[], None]) -> list[dict[str, Any]]:
    """Asks every question in qlora's way and in that of the original: alone, with the logits of all its tokens."""
    import torch

    suite, device = run.suite, run.placement.device
    clock = Clock(wait)
    ours = [record["prediction"] for record in suite.measure(model).records]
    results = [{"what": what, "system": "qlora", **clock.read()}]
    clock, plain = Clock(wait), []
    for prompt in suite.prompts:
        ids = torch.tensor(prompt.ids, dtype=torch.long, device=device)[None]
        letters = [answer[0] for answer in prompt.answers]
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
            plain.append("ABCD"[int(logits[0, -1, letters].argmax())])
    results.append({"what": what, "system": "one question at a time", **clock.read()})
    tokens = sum(len(prompt.ids) for prompt in suite.prompts)
    same = sum(a == b for a, b in zip(ours, plain, strict=True)) / len(plain)
    return [{**result, "items": len(plain), "tokens": tokens, "same": same} for result in results]


def measure_answers(run: Any, model: Any, wait: Callable[[], None]) -> list[dict[str, Any]]:
    """Answers every held-out row in qlora's batches, and one row at a time; tokens are those of the answers."""
    from qlora.evaluation.generation import generate

    measurer = run.measurer
    measurer.predict(model, 1)  # what the first call builds is not counted
    clock = Clock(wait)
    records = measurer.predict(model, None)
    results = [{"what": "answers", "system": "qlora", **clock.read(),
                "tokens": sum(record["answer_tokens"] for record in records)}]  # fmt: skip
    clock, answers = Clock(wait), []
    for row in measurer.rows:
        answers += generate(
            run.config.generation,
            model,
            measurer.tokenizer,
            prompts=[row["prompt_ids"]],
            pad_token_id=measurer.pad_token_id,
            device=measurer.device,
        )
    results.append({"what": "answers", "system": "one row at a time", **clock.read(),
                    "tokens": sum(answer.tokens for answer in answers)})  # fmt: skip
    pairs = zip(records, answers, strict=True)
    same = sum(record["prediction"] == answer.text for record, answer in pairs) / len(answers)
    return [{**result, "items": len(answers), "same": same} for result in results]


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """Loads the model once and measures everything; returns the device too."""
    os.environ["QLORA_CACHE"] = str(folder / "cache")
    import torch

    from qlora.config.compose import compose
    from qlora.evaluation.measure import evaluation_mode
    from qlora.run import Run

    files = arguments.mmlu or [write_rows(invented_questions(arguments.items or 200), folder / "invented.jsonl")]
    own_model = any(word.startswith("model=") for word in arguments.overrides)
    overrides = [
        *("task=evaluate", "adapter=none", "evaluation=mmlu", "quantization=fp32"),
        *([] if own_model else [f"model.name={arguments.model.resolve()}"]),
        *(f"generation.{limit}_new_tokens={ANSWER_TOKENS}" for limit in ("min", "max")),
        f"data.max_eval_samples={arguments.rows or 1}",
        *([f"evaluation.max_samples={arguments.items}"] if arguments.items else []),
        *arguments.overrides,
    ]
    runs = [Run(compose([*overrides, f"evaluation.path={path}"]), folder / "run").session for path in files]
    suites = [run.suite for run in runs]  # before the model: a broken file fails at once
    assert all(suites)
    run = runs[0]
    model, device = run.load_trained(), run.placement.device
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    results: list[dict[str, Any]] = []
    with evaluation_mode(model), run.placement.autocast():
        with torch.inference_mode():
            model(input_ids=torch.ones(1, 8, dtype=torch.long, device=device))  # what the first pass sets up
        for path, run in zip(files, runs, strict=True):
            results += measure_mmlu(f"MMLU, {path.name.partition('.')[0]}", run, model, wait)
            _report(results)
        if arguments.rows:
            results += measure_answers(run, model, wait)
            _report(results)
    return str(run.placement), results


def _report(results: list[dict[str, Any]]) -> None:
    for result in results[-2:]:
        print(f"{result['what']}, {result['system']}: {result['seconds']:.1f} s", file=sys.stderr)


# Reporting


def to_table(results: list[dict[str, Any]]) -> str:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "what": lambda r: r["what"],
        "system": lambda r: r["system"],
        "items": lambda r: f"{r['items']:,}",
        "tokens": lambda r: f"{r['tokens']:,}",
        "seconds": lambda r: f"{r['seconds']:.1f}",
        "CPU, s": lambda r: f"{r['processor']:.1f}",
        "items/s": lambda r: f"{r['items'] / r['seconds']:,.1f}",
        "tokens/s": lambda r: f"{r['tokens'] / r['seconds']:,.0f}",
        "same answers": lambda r: f"{r['same']:.1%}",
    }
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(show(result) for show in columns.values()) for result in results]
    return "\n".join(f"| {line} |" for line in lines)


def speedups(results: list[dict[str, Any]]) -> str:
    pairs = zip(islice(results, 0, None, 2), islice(results, 1, None, 2), strict=True)
    shares = [f"{ours['what']} {ours['items'] / ours['seconds'] * plain['seconds'] / plain['items']:.1f}"
              for ours, plain in pairs]  # fmt: skip
    return f"times as fast as one at a time: {'; '.join(shares)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EMBEDDED, help="a model's folder")
    parser.add_argument("--mmlu", type=Path, nargs="+", help="files of questions; without: invented ones")
    parser.add_argument("--items", type=int, help="the first that many questions; without: all, or 200 invented ones")
    parser.add_argument("--rows", type=int, default=64, help="rows to answer; 0: none")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as on qlora's own command line")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qlora-benchmark-") as name:
        device, results = measure(arguments, Path(name))
    header = f"{datetime.date.today()}, {describe_machine()}, {device}, {describe_versions()}"
    print("\n\n".join([header, to_table(results), speedups(results)]))
    if arguments.json:
        arguments.json.write_text(json.dumps({"about": header, "results": results}, indent=2))


if __name__ == "__main__":
    main()
