"""What needs two GPUs: training runs in two processes through NCCL, a sharded base, and one spread by a device map.

Run as a script, this file is one of the processes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qlora.config.compose import compose
from qlora.models.loading import load_base
from qlora.models.model_files import locate
from qlora.run import Run
from qlora.runtime import distributed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

ROOT = Path(__file__).parents[2]

COMMON = [
    *("recipe=none", "data=demo", "data.max_train_samples=100", "data.max_eval_samples=16", "evaluation=loss"),
    *("lora.r=8", "lora.dropout=0", "trainer.max_steps=8", "trainer.per_device_train_batch_size=4"),
    *("trainer.logging_steps=1", "trainer.eval_steps=4", "trainer.save_steps=4", "generation.max_new_tokens=4"),
    *("trainer.optim=paged_adamw_32bit", "trainer.learning_rate=2e-4"),
]
# Two processes with 2 micro-batches each, and one with 4.
CASES = {
    "plain": ["trainer.compile=false", "trainer.fused_linear=false"],
    "fast": [],
    "packed": ["data.packing=true", "data.pack_length=128", "trainer.compile=false"],
}
SHARDED = {
    "sharded": [*CASES["plain"], "trainer.parallel=fsdp"],
    "sharded fast": ["trainer.parallel=fsdp"],
    "sharded fp8": ["trainer.parallel=fsdp", "quantization.compute=fp8"],
    "sharded16": [*CASES["plain"], "trainer.parallel=fsdp", "quantization=none"],
}


SINGLE = {**CASES, "fp8": ["quantization.compute=fp8"]}


def base_of(name: str, base: Path, saved: Path) -> Path:
    """Returns the base of a case; of those that are sharded in 4 bits the stored one."""
    return saved if name.startswith("sharded") and name != "sharded16" else base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a drawn model of four wide layers: 0.8 billion weights."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(locate("tiny"))
    tokenizer.save_pretrained(folder)
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 4, "num_attention_heads": 32}
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(tokenizer), **ids, dtype=torch.bfloat16))
    model.to(torch.bfloat16).save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    return folder


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in 4 bits: a base is quantized on the CPU before it is sharded, where bytes come out otherwise."""
    folder = tmp_path_factory.mktemp("stored")
    run = Run(compose([*COMMON, f"model.name={base}"]), tmp_path_factory.mktemp("loading")).session
    run.load_base().save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)
    torch.cuda.empty_cache()
    return folder


def train(base: Path, folder: Path, accumulated: int, *overrides: str) -> dict[str, Any]:
    chosen = [*COMMON, f"model.name={base}", f"trainer.gradient_accumulation_steps={accumulated}", *overrides]
    return Run(compose(chosen), folder, overrides=chosen).execute()


def launch(program: list[str], *args: str) -> str:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", *program, *args],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "4"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def losses(folder: Path) -> np.ndarray:
    history = json.loads((folder / "history.json").read_text())
    return np.array([entry["loss"] for entry in history if "loss" in entry])


@pytest.fixture(scope="module")
def together(base: Path, saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the runs of two processes."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "output.txt").write_text(launch(TORCHRUN, __file__, str(base), str(saved), str(folder)))
    return folder


@pytest.mark.parametrize(
    ("shared", "single"),
    [
        *(("plain", "plain"), ("fast", "fast"), ("packed", "packed"), ("sharded", "plain"), ("sharded fast", "fast")),
        ("sharded fp8", "fp8"),
    ],
)
def test_two_gpus_train_what_one_trains(
    base: Path, saved: Path, together: Path, tmp_path: Path, shared: str, single: str
) -> None:
    train(base_of(shared, base, saved), tmp_path, 4, *SINGLE[single])
    one, two = losses(tmp_path), losses(together / shared)
    print(shared, one, two)
    assert two == pytest.approx(one, rel=0.02)  # in bf16
    assert min(one[4:]) < one[0]


def test_a_sharded_base_takes_half_the_memory_in_4_and_in_16_bits(together: Path) -> None:
    told = [json.loads(line) for line in (together / "output.txt").read_text().splitlines() if line.startswith("{")]
    held = {(item["name"], item["rank"]): item["bytes"] for item in told}
    print(held)
    for name, bits in (("sharded", 4), ("sharded16", 16)):
        whole = 4 * (4 * 4096**2 + 3 * 4096 * 11008) * bits / 8
        for rank in (0, 1):
            assert held[name, rank] == pytest.approx(whole / 2, rel=0.02)
    assert min(losses(together / "sharded16")[4:]) < losses(together / "sharded16")[0]


def test_accelerate_launches_the_same_command(base: Path, tmp_path: Path) -> None:
    chosen = [*COMMON, *CASES["plain"], f"model.name={base}", "trainer.gradient_accumulation_steps=2"]
    program = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--mixed_precision", "no"]
    output = launch(program, "-m", "qlora", *chosen, f"hydra.run.dir={tmp_path / 'run'}")
    assert "4 x 2 accumulated x 2 processes = 16 rows a step" in output
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "finished"


@pytest.mark.skipif(shutil.which("srun") is None, reason="needs SLURM")
def test_srun_starts_torchrun_on_a_machine(base: Path, tmp_path: Path) -> None:
    args = [*COMMON, *CASES["plain"], f"model.name={base}", "trainer.gradient_accumulation_steps=2"]
    command = ["srun", "--ntasks", "1", "--gpus", "2", sys.executable, "-m", *TORCHRUN, "-m", "qlora", *args]
    done = subprocess.run([*command, f"hydra.run.dir={tmp_path / 'run'}"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "4 x 2 accumulated x 2 processes = 16 rows a step" in done.stdout


FALL = """
import os
import signal
from transformers import TrainerCallback

class Fall(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def killed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes of which one was killed in its sixth step, and which torchrun started again."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "fall.py").write_text(FALL)
    chosen = [*COMMON, *CASES["plain"], f"model.name={base}", "trainer.gradient_accumulation_steps=2"]
    fall = ["+callbacks.fall._target_=fall.Fall", "trusted=[fall]", f"hydra.run.dir={folder / 'run'}"]
    program = [*TORCHRUN, "--max-restarts", "1", "-m", "qlora"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        (folder / "output.txt").write_text(launch(program, *chosen, *fall))
    return folder


def test_a_killed_process_is_started_again_with_the_others_from_the_last_checkpoint(
    killed: Path, together: Path
) -> None:
    assert "resuming from checkpoint-4" in (killed / "output.txt").read_text()
    assert json.loads((killed / "run" / "result.json").read_text())["status"] == "finished"
    assert losses(killed / "run") == pytest.approx(losses(together / "plain"), rel=0.02)


@pytest.mark.parametrize("processes", [1, 4])
def test_a_checkpoint_of_two_processes_is_refused_by_others_until_they_are_forced(
    together: Path, base: Path, tmp_path: Path, processes: int
) -> None:
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} CUDA devices")
    folder = shutil.copytree(together / "plain", tmp_path / "run")
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "checkpoint-8")
    args = ["-m", "qlora", *COMMON, *CASES["plain"], f"model.name={base}", f"hydra.run.dir={folder}"]
    program = [*TORCHRUN[:-1], str(processes)]
    with pytest.raises(AssertionError, match=f"written by 2 processes, and this run has {processes}"):
        launch(program, *args, "trainer.gradient_accumulation_steps=2")
    steps = f"trainer.gradient_accumulation_steps={4 // processes}"
    output = launch(program, *args, steps, "resume=force")
    assert "resuming from checkpoint-4" in output
    assert losses(folder) == pytest.approx(losses(together / "plain"), rel=0.02)


def test_one_process_spreads_the_base_over_two_gpus_within_its_limits(base: Path, tmp_path: Path) -> None:
    spread = ["model.device_map=auto", "model.max_memory=500MiB", *CASES["plain"]]
    config = compose([*COMMON, f"model.name={base}", *spread])
    run = Run(config, tmp_path / "model").session
    model = load_base(config.model, config.quantization, placement=run.placement, model_config=run.model_config)
    assert set(model.hf_device_map.values()) == {0, 1}
    del model, run
    torch.cuda.empty_cache()
    train(base, tmp_path / "spread", 4, *spread)
    train(base, tmp_path / "alone", 4, *CASES["plain"])
    assert losses(tmp_path / "spread") == pytest.approx(losses(tmp_path / "alone"), rel=0.02)


def main(base: Path, saved: Path, folder: Path) -> None:
    distributed.init_process_group()
    for name, overrides in {**CASES, **SHARDED}.items():
        print(f"training {name}", file=sys.stderr, flush=True)
        train(base_of(name, base, saved), folder / name, 2, *overrides)
        if name in ("sharded", "sharded16"):
            run = Run(compose([*COMMON, f"model.name={base}", *overrides]), folder / name).session
            local = [item.to_local().nbytes for item in run.build_model().parameters() if isinstance(item, DTensor)]
            print(json.dumps({"name": name, "rank": distributed.rank(), "bytes": sum(local)}), flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
