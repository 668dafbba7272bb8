"""Code in folders that somebody sends: models, adapters, checkpoints; and which commit of the hub was read."""

from __future__ import annotations

import inspect
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetInfo
from promises import QUICK, Bomb, refusal
from transformers import trainer

from qlora import adapters
from qlora.config.compose import compose
from qlora.data.ingest.sources import hub_commit
from qlora.errors import UserError
from qlora.models.model_config import load_model_config
from qlora.run import Run


def test_a_pickle_in_place_of_weights_is_refused_unread(tmp_path: Path, base: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    with pytest.raises(UserError, match=r"weights in pytorch_model\.bin alone; only safetensors are loaded"):
        Run(compose([f"model.name={base}", *QUICK]), tmp_path / "run").train()
    assert not (tmp_path / "mark").exists()


def test_a_pickle_beside_the_weights_is_not_read(tmp_path: Path, base: Path) -> None:
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt"):
        (base / name).write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    run = Run(compose([f"model.name={base}", *QUICK]), tmp_path / "run").session
    run.load_base()
    assert not (tmp_path / "mark").exists()


def test_an_adapter_in_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    run = Run(compose(QUICK), tmp_path / "run").session
    model = run.add_adapter(run.load_base())
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    with pytest.raises(UserError):
        adapters.check_adapter_folder(folder)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_bomb_in_a_checkpoint_does_not_go_off(tmp_path: Path, file: str) -> None:
    """transformers reads these by `torch.load(weights_only=True)`; if that ever changes, this fails."""
    (tmp_path / file).write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / file, weights_only=True)
    loads = re.findall(r"torch\.load\((?:[^()]|\([^()]*\))*\)", inspect.getsource(trainer))
    assert loads
    assert all("weights_only=True" in load for load in loads)
    assert not (tmp_path / "mark").exists()


CODE = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineModel"}


def test_code_of_a_model_runs_only_when_it_is_allowed(tmp_path: Path, base: Path) -> None:
    mark = tmp_path / "mark"
    (base / "modeling_mine.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MineModel(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": CODE}
    (base / "config.json").write_text(json.dumps(config))
    overrides = [f"model.name={base}", *QUICK]
    with pytest.raises(UserError, match=r"comes with Python code.*model\.trust_remote_code=true"):
        _ = Run(compose(overrides), tmp_path / "run").session.model_config
    assert not mark.exists()
    load_model_config(compose([*overrides, "model.trust_remote_code=true"]).model)
    assert mark.exists()


def test_revisions_are_pinned_and_recorded() -> None:
    config = compose(["data=alpaca", "data.revision=abc", "model.revision=def"])
    assert (config.data.revision, config.model.revision) == ("abc", "def")
    assert "data.revision=abc is not read beside data.mix" in refusal("data=mix", "data.mix.a=x", "data.revision=abc")
    assert compose(["data=mix", "data.mix.a={path:x/y,revision:abc}"]).data.mix["a"].revision == "abc"
    commit = "0123456789abcdef0123456789abcdef01234567"
    checksums = {f"hf://datasets/me/set@{commit}/data/train.parquet": {"num_bytes": 1}}
    rows = Dataset.from_list([{"a": 1}], info=DatasetInfo(download_checksums=checksums))
    assert hub_commit(rows.rename_columns({"a": "b"})) == commit
    assert hub_commit(Dataset.from_list([{"a": 1}])) is None
