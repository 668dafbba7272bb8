"""Compares training with 8-bit products of the base weights with bf16 and float32: gradients, and whole training runs.

    python benchmarks/fp8_quality.py --model FOLDER --data FILE [--steps N] [--seeds 0 1 2] [--json FILE] [-- KEY=VALUE]

The base is quantized once, from what its files hold, and stored: all precisions have the same 4-bit weights, which a
base that is rounded to 16 bits before would not give. Gradients of the adapter on one batch are compared with those in
float32: their cosine, and the norm of the difference over the norm. The training runs differ in the precision and the
seed only; the table gives the mean of the held-out loss over the seeds, its standard error, and the largest distance
of two seeds in float32. On a CPU the 8-bit products are emulated: the same rounding, without the speed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data_pipeline import describe_machine, describe_versions  # noqa: E402

MODES = {
    "fp32": ["quantization.compute_dtype=fp32"],
    "bf16": ["quantization.compute_dtype=bf16", "trainer.fused_linear=true"],
    "fp8": ["quantization.compute_dtype=bf16", "quantization.compute=fp8", "trainer.fused_linear=true"],
}


def overrides(arguments: argparse.Namespace) -> list[str]:
    """Returns what all training runs have in common."""
    return [
        *(f"model.name={arguments.model}", "data=local", f"data.path={arguments.data}", "data.max_length=256"),
        *("data.eval_dataset_size=64", "quantization=nf4", "lora.r=16", "lora.dropout=0", "evaluation=loss"),
        *("evaluation.baseline=false", "task.predict=false", "trainer.per_device_train_batch_size=8"),
        *("trainer.gradient_accumulation_steps=1", "trainer.learning_rate=1e-3", "trainer.logging_steps=1"),
        *(f"trainer.max_steps={arguments.steps}", "trainer.eval_steps=null", "trainer.save_steps=null"),
        *("trainer.gradient_checkpointing=false", *arguments.overrides),
    ]


def store(chosen: list[str], folder: Path) -> list[str]:
    """Stores the base in 4 bits in `folder`; returns the overrides that train on it."""
    from qlora.config.compose import compose
    from qlora.run import Run

    with contextlib.redirect_stdout(sys.stderr):
        run = Run(compose([*chosen, *MODES["fp32"]]), folder / "unused").session
        run.load_base().save_pretrained(folder)
        run.tokenizer.save_pretrained(folder)
    return [*chosen, "model.weights=pretrained", f"model.name={folder}"]


def gradients(chosen: list[str]) -> Any:
    """Returns the gradients of an adapter whose B matrices are not zero on one batch, float64 [parameters]."""
    import torch

    from qlora.config.compose import compose
    from qlora.run import Run
    from qlora.tasks.build_trainer import build_step

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        run = Run(compose(chosen), folder).session
        model = run.add_adapter(run.load_base()).train()
        step = build_step(run, model)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                values = torch.randn(parameter.shape, generator=generator) / 50
                parameter.data.copy_(values)
        batch = run.collate([run.data.train[index] for index in range(8)])  # type: ignore[index]
        batch = {name: tensor.to(run.placement.device) for name, tensor in batch.items()}
        with step:
            with run.placement.autocast():
                loss = model(**batch).loss
            loss.backward()
        return torch.cat([p.grad.double().flatten().cpu() for p in model.parameters() if p.grad is not None])


def train(chosen: list[str], folder: Path) -> dict[str, Any]:
    """Trains in a process of its own; returns the held-out loss and the losses of the steps."""
    command = [sys.executable, "-m", "qlora", *chosen, f"hydra.run.dir={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit((done.stderr or done.stdout).strip().splitlines()[-1])
    history = json.loads((folder / "history.json").read_text())
    result = json.loads((folder / "result.json").read_text())
    return {
        "eval_loss": result["metrics"]["eval_loss"],
        "losses": [entry["loss"] for entry in history if "loss" in entry],
    }


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the numbers of all modes."""
    import torch

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="qlora-benchmark-") as name:
        common = store(overrides(arguments), Path(name) / "base")
        exact = gradients([*common, *MODES["fp32"]])
        for mode, local in MODES.items():
            gradient = gradients([*common, *local])
            cosine = float(torch.nn.functional.cosine_similarity(gradient, exact, dim=0))
            error = float((gradient - exact).norm() / exact.norm())
            print(f"{mode}, gradient: cosine {cosine:.5f}, error {error:.4f}", file=sys.stderr, flush=True)
            runs = {}
            for seed in arguments.seeds:
                runs[seed] = train([*common, *local, f"seed={seed}"], Path(name) / f"{mode}-{seed}")
                print(f"{mode}, seed {seed}: {runs[seed]['eval_loss']:.4f}", file=sys.stderr, flush=True)
            results[mode] = {
                "gradient_cosine": cosine,
                "gradient_error": error,
                "runs": runs,
            }
    return results


def to_table(results: dict[str, Any]) -> str:
    """Returns a table with a line a mode."""
    lines = [
        "| products | gradient: cosine | gradient: error | held-out loss | standard error |",
        "|---|---:|---:|---:|---:|",
    ]
    for mode, gradient in results.items():
        losses = [run["eval_loss"] for run in gradient["runs"].values()]
        error = statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else float("nan")
        gradient = f"{gradient['gradient_cosine']:.5f} | {gradient['gradient_error']:.4f}"
        lines.append(f"| {mode} | {gradient} | {statistics.mean(losses):.4f} | {error:.4f} |")
    losses = [run["eval_loss"] for run in results["fp32"]["runs"].values()]
    apart = max(
        abs(results["fp8"]["runs"][seed]["eval_loss"] - results["fp32"]["runs"][seed]["eval_loss"])
        for seed in results["fp8"]["runs"]
    )
    lines += [
        "",
        f"Seeds in float32 lie up to {max(losses) - min(losses):.4f} apart, fp8 and float32 of one seed {apart:.4f}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of a model")
    parser.add_argument("--data", required=True, help="a file of rows")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="a file for the numbers and the curves")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as on qlora's own command line")
    arguments = parser.parse_args()
    results = compare(arguments)
    about = f"{datetime.date.today()}, {describe_machine()}, {describe_versions()}"
    if arguments.json:
        arguments.json.write_text(json.dumps({"about": about, "results": results}, indent=2), encoding="utf-8")
    print("\n\n".join([about, to_table(results)]))


if __name__ == "__main__":
    main()
