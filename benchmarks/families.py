"""Trains a tiny random model of every causal type that the installed transformers knows, and says what works.

    python benchmarks/families.py                       # every type that benchmarks/families.json lacks
    python benchmarks/families.py --types llama gemma2  # these, again
    python benchmarks/families.py --table               # only writes the table into docs/models.md

Each type runs in a process of its own with a time limit, on a CPU. What is compared:

- trains: loads in nf4 and trains two steps with the defaults; the trained adapter changes the answers
- packs: the losses of the tokens of a pack are those of each row alone (1e-4 of a loss), and differ where the positions
  do not restart; "no" is a refusal, and right only where the losses differ
- merges: `task=merge`, with its own limit
- plain PEFT: the adapter on the base in 32 bits gives the same logits through transformers and PEFT alone
- planned: the parameters that `task=plan` counts are those of the model
- fast parts: those that `auto` switches on with CUDA; those that a CPU can compute give the loss of the plain step
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from tiny_models import tiny_config, write_config, write_tiny  # noqa: E402

RESULTS = ROOT / "benchmarks" / "families.json"
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
SECONDS = 400
"""The time limit of a type."""
CHECKS = ("trains", "packs", "merges", "plain PEFT", "planned")
YES, WRONG = "yes", "WRONG"
QUICK = [
    *("device=cpu", "data=demo", "recipe=none", "lora.r=4", "evaluation=loss", "task.predict=false"),
    *("data.max_train_samples=16", "data.max_eval_samples=4", "trainer.max_steps=2"),
    *("trainer.per_device_train_batch_size=4", "trainer.gradient_accumulation_steps=1", "trainer.save_steps=null"),
    *("trainer.eval_steps=null", "trainer.optim=adamw_torch", "trainer.learning_rate=0.02", "trainer.warmup_steps=0"),
    *("lora.dropout=0", "data.source_max_len=48", "data.target_max_len=16"),
]
"""The defaults, but for what makes them quick and the adapter large after two steps."""
PACKED = ["data.packing=true", "data.pack_length=128"]
LOSS, LOGITS, SEEN = 1e-4, 1e-3, 1e-3
"""How far losses and logits may be apart; what a leak between rows changes at least in the tiny models."""
WAYS_OUT = ("trainer.gradient_checkpointing=false", "quantization.experts=none", "quantization=none")
"""What is tried where a sentence about the defaults names it."""
ALL = "all"
ON_CPU = ("fused_linear", "fused_loss", "fused_experts")
"""The parts of the fast step whose plain twins run on a CPU."""


# One type, in a process of its own


def examine(kind: str, folder: Path) -> dict[str, str]:
    """Returns what works with a tiny model of a type: `yes`, or the sentence of an error; `error`: a traceback."""
    row: dict[str, str] = {}
    model = Examined(kind, folder)
    if refused := attempt(row, "refused", model.refused):
        return row | {"refused": refused}
    row["trains"] = told = attempt(row, "trains", model.trains)
    while told != YES and (way := next((way for way in WAYS_OUT if way in told and way not in model.overrides), None)):
        model.overrides.append(way)
        row["with"] = " ".join(model.overrides)
        told = attempt(row, "trains", model.trains)
    if told != YES:
        return row | {"trains": told}
    for name in (*CHECKS[1:], "fast parts"):
        row[name] = attempt(row, name, getattr(model, name.replace(" ", "_")))
    return row


def attempt(row: dict[str, str], name: str, step: Callable[[], str]) -> str:
    """Returns the result of a check, or the sentence of a mistake; what is wrong goes into `error` of the row."""
    from qlora.errors import UserError

    try:
        return step()
    except UserError as error:
        return str(error)
    except AssertionError as error:
        row["error"] = f"{name}: {error}"
    except Exception:
        row["error"] = f"{name}: {traceback.format_exc()}"
    return WRONG


class Examined:
    """A type, and the checks of it in their order."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder, self.base = kind, folder, folder / "base"
        self.does_pack = False
        self.overrides: list[str] = []
        """What the sentence of an error said was the way out."""

    def config(self, *overrides: str) -> Any:
        from qlora.config.compose import compose

        return compose([*QUICK, f"model.name={self.base}", *self.overrides, *overrides])

    @property
    def exact(self) -> list[str]:
        """What makes the base compute in 32 bits."""
        return ["quantization=fp32"] if "quantization=none" in self.overrides else ["quantization.compute_dtype=fp32"]

    def session(self, name: str, *overrides: str) -> Any:
        from qlora.run import Run

        return Run(self.config(*overrides), self.folder / name).session

    def refused(self) -> str:
        """Returns "" unless its config alone says that it is no decoder of text."""
        from transformers import AutoConfig

        from qlora.models.causal import check_is_causal

        write_config(self.kind, self.base)
        check_is_causal(AutoConfig.from_pretrained(self.base), f"model.name={self.base}")
        write_tiny(self.kind, self.base)
        return ""

    def trains(self) -> str:
        from qlora.run import Run

        Run(self.config(), self.folder / "run").execute()
        return YES

    def packs(self) -> str:
        """Compares what the guard says with the losses of rows in packs and alone."""
        from qlora.errors import ConfigError
        from qlora.models.outputs import switch_cache
        from qlora.models.packing_guard import check_packing

        session = self.session("packed", *PACKED, *self.exact)
        model = session.build_model().eval()
        randomise(model)
        switch_cache(model, on=False)
        sentence = ""
        try:
            check_packing(model, session.placement, batch_size=2)
        except ConfigError as error:
            sentence = str(error)
        packed, alone, joined = packed_losses(session, model)
        apart, leak = distance(packed, alone), distance(joined, alone)
        if sentence:
            assert apart > LOSS, f"packing is refused ({sentence}), though packs have the losses of their rows"
            return sentence
        assert apart <= LOSS * float(alone.max()), f"packing changes the loss of a token by {apart:.2g}"
        assert leak > SEEN, f"rows that see each other change the loss of a token by {leak:.1g}: nothing is proved"
        self.does_pack = True
        return YES

    def merges(self) -> str:
        from qlora.run import Run

        adapter = f"adapter={self.folder / 'run' / 'adapter'}"
        Run(self.config("task=merge", adapter, "merge.dtype=fp32"), self.folder / "merged").execute()
        return YES

    def plain_PEFT(self) -> str:  # the name of a column
        """Compares the logits of the adapter here and through transformers and PEFT alone."""
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        adapter = self.folder / "run" / "adapter"
        session = self.session("here", "quantization=fp32", f"adapter={adapter}", "task=evaluate")
        here = session.load_trained().eval()
        base = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        ids = torch.arange(40).add(5)[None]
        with torch.no_grad():
            bare = base.eval()(input_ids=ids, use_cache=False).logits
            there = PeftModel.from_pretrained(base, adapter).eval()(input_ids=ids, use_cache=False).logits
            mine = here(input_ids=ids, use_cache=False).logits
        apart, moved = (float((mine - other).abs().max()) for other in (there, bare))
        assert apart <= LOGITS, f"logits differ by {apart:.2g} from plain PEFT"
        assert moved > 10 * LOGITS, f"the adapter moves logits by {moved:.2g} only: nothing is proved"
        return YES

    def planned(self) -> str:
        import torch
        from transformers import AutoModelForCausalLM

        from qlora.planning.training_plan import build_plan

        counted = build_plan(self.config("task=plan", "plan.device=a6000")).training.shape.parameters
        text = tiny_config(self.kind).get_text_config()
        with torch.device("meta"):
            parameters = AutoModelForCausalLM.from_config(text).parameters()
        actual = sum(parameter.numel() for parameter in parameters)
        assert counted == actual, f"the plan counts {counted:,} parameters of {actual:,}"
        return YES

    def fast_parts(self) -> str:
        """Returns the parts that `auto` switches on with CUDA, once those that a CPU computes equal the plain step."""
        from qlora.models.outputs import switch_cache
        from qlora.tasks.build_trainer import build_step

        session = self.session("plain", *self.exact)
        model = session.build_model().eval()
        randomise(model)
        switch_cache(model, on=False)
        parts = parts_with_cuda(session, model)
        computed = [name for name in ON_CPU if parts.get(name) == "on"]
        batch = session.collate([session.data.train[index] for index in range(4)])
        plain = loss_in(build_step(session, model), model, batch)
        switches = [f"trainer.{name}=true" for name in computed if name != "fused_experts"]
        fast_session = self.session("fast", *switches, *self.exact)
        fast_session.__dict__["data"] = session.data
        fast = loss_in(build_step(fast_session, model), model, batch)
        assert abs(fast - plain) <= LOSS * max(1, plain), f"the fast step has the loss {fast}, the plain one {plain}"
        if parts.get("fused_attention") == "on":
            packs = self.session("packs", *PACKED, *self.exact)
            for name, apart in attention_differences(packs, model, batch, packed=self.does_pack).items():
                assert apart <= LOSS * 10, f"fused_attention changes the loss of {name} by {apart:.2g}"
        on = [name for name, state in parts.items() if state == "on"]
        off = [f"{name}: {state}" for name, state in parts.items() if state != "on"]
        return "; ".join([", ".join(on) or "none", *off])


def randomise(model: Any) -> None:
    """Gives adapters B matrices that are not zero."""
    import torch

    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 20)


def loss_in(step: Any, model: Any, batch: dict[str, Any]) -> float:
    """Returns the loss of a batch inside a fast step."""
    with step:
        return float(model(**{name: tensor.clone() for name, tensor in batch.items()}).loss)


def packed_losses(session: Any, model: Any) -> tuple[Any, Any, Any]:
    """Returns the losses of a pack's tokens, those of its rows each alone, and those with positions that run on."""
    import torch

    packs = session.data.packed
    index = longest_pack(packs)
    rows = [session.data.train[member] for member in packs.members(index)]
    pack = learn_all(session.collate([packs[index]]))
    joined = {**pack, "position_ids": torch.arange(pack["input_ids"].shape[1])[None]}
    with torch.no_grad():
        whole, leaking = (token_losses(model, batch) for batch in (pack, joined))
        alone = torch.cat([token_losses(model, learn_all(session.collate([row]))) for row in rows])
    return whole, alone, leaking


def learn_all(batch: dict[str, Any]) -> dict[str, Any]:
    """Returns a batch in which every token of a row but the first has a label, prompts included."""
    first = batch["position_ids"] == 0 if "position_ids" in batch else batch["attention_mask"] == 0
    first[:, 0] = True
    return {**batch, "labels": batch["input_ids"].masked_fill(first, -100)}


def longest_pack(packs: Any) -> int:
    """Returns the index of the pack with the most rows."""
    return max(range(len(packs)), key=lambda number: len(packs.members(number)))


def token_losses(model: Any, batch: dict[str, Any]) -> Any:
    """Returns the loss of each token of a batch that has a label."""
    import torch

    batch = dict(batch)
    labels = batch.pop("labels")[:, 1:].reshape(-1)
    logits = model(**batch, use_cache=False).logits.double()[:, :-1].reshape(len(labels), -1)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")[labels != -100]


def distance(a: Any, b: Any) -> float:
    """Returns the largest difference of two losses of a token."""
    return float((a - b).abs().max())


def context_with_cuda(session: Any, model: Any, packs: Any = None) -> Any:
    """Returns the context of a step of this model on an NVIDIA GPU."""
    import torch

    from qlora.runtime.device import Placement
    from qlora.step.layers import find_layers
    from qlora.step.part import StepContext
    from qlora.upstream.peft import base_of

    config, base = session.config, base_of(model)
    cuda = Placement(torch.device("cuda"), torch.bfloat16, torch.bfloat16)
    return StepContext(model, base, find_layers(base), config.trainer, config.quantization, cuda, packs,
                       session.objective)  # fmt: skip


def attention_differences(session: Any, model: Any, batch: dict[str, Any], *, packed: bool) -> dict[str, float]:
    """Returns how far the plain twin of `fused_attention` is from the model's own, on rows and on a pack."""
    import torch

    from qlora.step.part import Packs
    from qlora.step.parts.attention import FusedAttention
    from qlora.upstream.peft import base_of
    from qlora.upstream.transformers_model import attention_of, set_attention

    data, config, batch = session.data.packed, base_of(model).config, learn_all(batch)
    expected = {"rows": (batch, None, token_losses(model, batch))}
    if packed:
        _, alone, _ = packed_losses(session, model)
        pack = learn_all(session.collate([data[longest_pack(data)]]))
        limits = Packs(session.config.data.pack_width, data.most_rows, data.longest_row)
        expected["a pack"] = (pack, limits, alone)
    differences, former = {}, attention_of(config)
    for name, (inputs, packs, loss) in expected.items():
        part = FusedAttention(context_with_cuda(session, model, packs))
        part.prepare()
        with torch.no_grad():
            laid_out = part.lay_out(dict(inputs), packs)
            try:
                losses = token_losses(model, laid_out)
            finally:
                set_attention(config, former)
        differences[name] = distance(losses, loss)
    return differences


def parts_with_cuda(session: Any, model: Any) -> dict[str, str]:
    """Returns the states of the parts that a step on an NVIDIA GPU has, with `auto` throughout."""
    from qlora.step.parts import PARTS, find_part

    context = context_with_cuda(session, model)
    with mock.patch.object(importlib.util, "find_spec", return_value=object()):  # Triton, which a CPU may lack
        for name in PARTS:
            part = find_part(name)(context)
            if name in ("fp8", "flash_attention") or part.request() is None:
                continue  # which depend on the GPU
            context.states[part.label] = part.unsupported_reason() or "on"
    return context.states


# All types


def examine_apart(kind: str, seconds: int, cache: Path) -> dict[str, Any]:
    """Runs `examine` in a process of its own, forked so that the libraries are imported once."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        process = multiprocessing.get_context("fork").Process(target=run_one, args=(kind, Path(folder), file, cache))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            row: dict[str, Any] = {"error": f"more than {seconds} seconds"}
        elif file.exists():
            row = json.loads(file.read_text(encoding="utf-8"))
        else:
            row = {"error": f"the process ended with {process.exitcode}"}
        text = json.dumps(row).replace(f"{folder}/base", "BASE").replace(folder, "FOLDER")
    return {**json.loads(text), "seconds": round(time.monotonic() - started)}


def run_one(kind: str, folder: Path, file: Path, cache: Path) -> None:
    """Writes what `examine` returns into a file."""
    os.environ["QLORA_CACHE"] = str(cache)
    with (folder / "output.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        file.write_text(json.dumps(examine(kind, folder)), encoding="utf-8")


def read_results(file: Path) -> dict[str, dict[str, Any]]:
    """Returns what is known so far, by type."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def save_result(file: Path, kind: str, row: dict[str, Any]) -> None:
    """Adds the result of a type to the file."""
    results = {**read_results(file), kind: {**row, "transformers": version("transformers")}}
    temporary_file = file.with_suffix(".part")
    temporary_file.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n", encoding="utf-8")
    temporary_file.replace(file)


def causal_types() -> list[str]:
    """Returns the types that transformers lists as causal."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


# The table


def table(results: dict[str, dict[str, Any]]) -> str:
    """Returns the page's part: counts, a row for each type that trains, and why the others do not."""
    trained = {kind: row for kind, row in results.items() if "packs" in row}
    lines = [
        f"Measured with transformers {' and '.join(sorted({row['transformers'] for row in results.values()}))} by "
        f"`python {Path(__file__).relative_to(ROOT)}`: of its {len(results)} causal types {len(trained)} train, "
        f"{sum(fast_parts(row) == ALL for row in trained.values())} of them with all fast parts, and "
        f"{sum(row['packs'] == YES for row in trained.values())} pack.",
        "",
        f"| {' | '.join(('type', *CHECKS, 'fast parts'))} |",
        "|---" * (len(CHECKS) + 2) + "|",
    ]
    for kind, row in trained.items():
        trains = f"with `{row['with']}`" if "with" in row else YES
        cells = [YES if row[check] == YES else "no" for check in CHECKS[1:]]
        lines.append(f"| {' | '.join((f'`{kind}`', trains, *cells, fast_parts(row)))} |")
    lines += ["", "Each of the others ends in one sentence:", ""]
    reasons: dict[str, list[str]] = {}
    for kind, row in results.items():
        if kind not in trained:
            reasons.setdefault(reason(kind, row), []).append(f"`{kind}`")
    lines += [f"- {why}: {', '.join(kinds)}" for why, kinds in sorted(reasons.items())]
    return "\n".join(lines)


def reason(kind: str, row: dict[str, Any]) -> str:
    """Returns why a type does not train, without its name."""
    text = row.get("refused") or row.get("trains") or row["error"]
    text = text.removeprefix("model.name=BASE").removeprefix(": ").partition("; ")[0]
    return " ".join(text.partition(f"model: {kind} ")[2].split() or text.split())


def fast_parts(row: dict[str, Any]) -> str:
    """Returns `all`, or which parts are off."""
    off = [part.partition(":")[0].strip() for part in row["fast parts"].split(";")[1:]]
    return f"without {', '.join(off)}" if off else ALL


def write_page(results: dict[str, dict[str, Any]]) -> None:
    """Puts the table between the marks of the page."""
    text = PAGE.read_text(encoding="utf-8")
    above, _, rest = text.partition(BEGIN)
    _, _, below = rest.partition(END)
    PAGE.write_text(f"{above}{BEGIN}\n{table(results)}\n{END}{below}", encoding="utf-8")


def main() -> int:
    """Examines the types that are asked for, and writes the table; returns 1 where one ended with a traceback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", help="examine these, known or not")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="the time limit of a type")
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument(
        "--json", type=Path, default=RESULTS, help="the file of results; with another the table is printed"
    )
    args = parser.parse_args()
    if not args.table:
        os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        import torch

        import qlora.tasks.build_trainer  # noqa: F401  # imported before processes are forked

        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as cache:
            for kind in args.types or [kind for kind in causal_types() if kind not in read_results(args.json)]:
                row = examine_apart(kind, args.seconds, Path(cache))
                save_result(args.json, kind, row)
                print(f"{kind}: {row}", flush=True)
    results = read_results(args.json)
    if args.json == RESULTS:
        write_page(results)
    else:
        print(table(results))
    return int(any("error" in row for row in results.values()))


if __name__ == "__main__":
    sys.exit(main())
