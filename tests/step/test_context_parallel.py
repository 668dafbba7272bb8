"""Two processes that share each row learn what one alone does: losses, gradients of the adapter, and whole runs.

Run as a script, this file is one of the processes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qlora.config.compose import compose
from qlora.config.schema import Config
from qlora.errors import UserError
from qlora.run import Run
from qlora.runtime import distributed, long_rows
from qlora.runtime.row_processes import RowProcesses, row_processes
from qlora.step.kernels.sharded_rows import STARTS, take_share
from qlora.training.device_checks import check_processes
from tests.step.test_fast import OWN, batch, build, build_step, learn
from tests.test_many import COMMON, adapter, launch, losses

TWO = "trainer.context_parallel=2"
ATTENDING = "trainer.fused_attention=true"
MODELS = {"llama": {}, "mistral": OWN["mistral"]}
RUNS = {
    "rows": [],
    "packs": ["data.packing=true", "data.pack_length=95", "trainer.per_device_train_batch_size=1",
              "trainer.group_by_length=false", "trainer.gradient_checkpointing=true"],
}  # fmt: skip


def rows_of(kind: str) -> dict[str, torch.Tensor]:
    """Returns a batch whose tokens are no multiple of four chunks."""
    rows = batch(packed=kind == "packs")
    return {name: value[:, :23].contiguous() for name, value in rows.items()}


def learn_shared(model_type: str, kind: str, long: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Returns loss and gradients of a batch, summed over the processes."""
    long_rows.LONG, long_rows.CHUNK = (10, 7) if long else (16_384, 8_192)
    model, config = build(model_type, (ATTENDING, TWO), **MODELS[model_type])
    step = build_step(model, config)
    step.checkpointed = step.offloaded = len(step.layers) if long else 0
    with step:
        loss, gradients = learn(model, take_share(rows_of(kind), row_processes(2)), num_items_in_batch=31)
    total = torch.tensor(loss)
    for value in (total, *gradients.values()):
        torch.distributed.all_reduce(value)
    return total.item(), gradients


CASES = [(model, kind, long) for model in MODELS for kind in ("rows", "packs") for long in (False, True)]


def train(folder: Path, accumulated: int, *overrides: str) -> None:
    chosen = [*COMMON, f"trainer.gradient_accumulation_steps={accumulated}", ATTENDING, "trainer.fused_loss=true",
              "trainer.num_train_epochs=null", "trainer.max_steps=4", "trainer.eval_steps=null",
              *overrides]  # fmt: skip
    Run(compose(chosen), folder, overrides=chosen).execute()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what two processes have computed."""
    folder = tmp_path_factory.mktemp("shared")
    done = launch(__file__, str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize(("model_type", "kind", "long"), CASES)
def test_shared_rows_have_the_loss_and_gradients_of_one_process(
    model_type: str, kind: str, long: bool, together: Path
) -> None:
    loss, gradients = torch.load(together / f"{model_type}-{kind}-{long}.pt")
    model, config = build(model_type, (ATTENDING,), **MODELS[model_type])
    with build_step(model, config):
        expected, others = learn(model, rows_of(kind), num_items_in_batch=31)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == others.keys()
    for name, gradient in others.items():
        assert (gradients[name] - gradient).norm() < 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_of_two_processes_is_that_of_one(kind: str, together: Path, tmp_path: Path) -> None:
    train(tmp_path / kind, 2, *RUNS[kind])
    np.testing.assert_allclose(losses(together / kind), losses(tmp_path / kind), rtol=1e-4)
    ours, theirs = adapter(together / kind), adapter(tmp_path / kind)
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=1e-5)
    manifest = json.loads((together / kind / "manifest.json").read_text())
    assert manifest["processes"] == 2


def test_each_process_has_a_front_and_its_mirror_image() -> None:
    whole = {"input_ids": torch.arange(1, 17)[None], "labels": torch.arange(1, 17)[None]}
    shares = [take_share(whole, RowProcesses(2, index)) for index in (0, 1)]
    assert shares[0]["input_ids"].tolist() == [[1, 2, 3, 4, 13, 14, 15, 16]]
    assert shares[1]["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12]]
    assert shares[0]["labels"].tolist() == [[-100, 2, 3, 4, 5, 14, 15, 16, -100]]
    assert shares[1]["labels"].tolist() == [[-100, 6, 7, 8, 9, 10, 11, 12, 13]]
    assert shares[0]["position_ids"].tolist() == [[0, 1, 2, 3, 12, 13, 14, 15]]
    assert shares[0][STARTS].tolist() == [0, 16]


def check_launch(config: Config) -> None:
    check_processes(config.trainer, config.model)


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        check_launch(compose([TWO, *overrides]))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer.parallel=fsdp"], "trainer.parallel=fsdp exclude each other: each process must hold the whole base"),
        (["trainer.fused_attention=false"], "trainer.fused_attention=false exclude each other: that part attends"),
        (["trainer.fused_loss=false"], "trainer.fused_loss=false exclude each other"),
        (["trainer.memory_budget=8GB"], "trainer.memory_budget exclude each other: its formula counts rows of one"),
        (["loss=dpo", "data=demo-preferences"], "loss.name=dpo exclude each other: only the loss of single tokens"),
        (["trainer.neftune_noise_alpha=5"], "neftune_noise_alpha=5.0 exclude each other"),
        ([], "trainer.context_parallel=2 has that many processes share a row, and this is one alone; launch a "),
        (["trainer.context_parallel=0"], "trainer.context_parallel must be positive, got 0"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_shared_rows_is_refused(overrides: list[str], said: str) -> None:
    assert said in refusal(*overrides)


def test_an_uneven_number_of_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "and 3 were launched, 1 too many; launch a multiple of 2" in refusal()


def test_a_model_with_caps_is_refused() -> None:
    model, config = build("gemma2", (ATTENDING,))
    config.trainer.context_parallel = 2
    with pytest.raises(UserError, match=r"context_parallel=2 needs trainer.fused_attention: gemma2 has caps, sinks"):
        build_step(model, config)


def main(folder: Path) -> None:
    """Computes everything in this process, which is one of two."""
    distributed.init_process_group()
    for model_type, kind, long in CASES:
        result = learn_shared(model_type, kind, long)
        if distributed.is_main_process():
            torch.save(result, folder / f"{model_type}-{kind}-{long}.pt")
    long_rows.LONG, long_rows.CHUNK = 16_384, 8_192
    for kind, overrides in RUNS.items():
        train(folder / kind, 2, TWO, *overrides)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
