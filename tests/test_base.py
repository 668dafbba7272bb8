"""The base of an adapter is known and checked wherever the adapter is used, and by the run that resumes."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora.config.compose import compose
from qlora.errors import UserError
from qlora.run import Run
from qlora.tasks import build_job, run_job
from tests.models.bases import write

QUICK = [
    *("lora.r=4", "trainer.max_steps=2", "trainer.save_steps=1", "trainer.eval_steps=null", "trainer.warmup_steps=0"),
    *("trainer.learning_rate=1e-2", "trainer.per_device_train_batch_size=4", "data.max_train_samples=16"),
    *("data.max_eval_samples=4", "evaluation=loss", "task.predict=false", "merge.prompts=2", "trainer=paper"),
    *("trainer.gradient_accumulation_steps=1", "device=cpu", "quantization.compute_dtype=fp32"),
    *("generation.max_new_tokens=4", "merge.dtype=fp32"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a small model with random weights and the embedded tokenizer."""
    return write("qwen2", tmp_path_factory.mktemp("bases") / "first", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def other(base: Path) -> Path:
    """Another model of the same shape and tokens."""
    folder = shutil.copytree(base, base.with_name("second"))
    put_other_weights(folder)
    return folder


@pytest.fixture(scope="module")
def trained(base: Path) -> Path:
    """The folder of a finished training on `base`."""
    folder = base.with_name("run")
    run(folder, f"model.name={base}")
    return folder


def put_other_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight + 0.01 for name, weight in weights.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    return Run(compose([*QUICK, *overrides]), folder, overrides=[*QUICK, *overrides]).execute()


def refusal(folder: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        run(folder, *overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def hashes(now: Path, trained: Path) -> str:
    """The words for two fingerprints: of a run's base that is used, and of the one that was trained on."""
    fingerprints = [json.loads((folder / "base.json").read_text())["fingerprint"].partition(":")[2][:8]
             for folder in (now, trained)]  # fmt: skip
    return f"fingerprint {fingerprints[0]}, not {fingerprints[1]}"


@pytest.mark.full
@pytest.mark.parametrize("task", ["evaluate", "predict", "chat", "merge"])
def test_another_base_of_the_same_shape_is_refused_by_every_task(
    base: Path, other: Path, trained: Path, tmp_path: Path, task: str
) -> None:
    text = refusal(tmp_path, f"task={task}", f"adapter={trained}", f"model.name={other}")
    start, end = text.split("fingerprint ")
    assert start == f"adapter={trained}/adapter does not fit model.name={other}, whose weights are others ("
    assert end.partition("): ")[2] == (
        f"it was trained on {base}; give that base as model.name, or use it in spite of that with base=force"
    )
    assert not (tmp_path / "merged").exists()


def test_training_s_own_measures_of_an_adapter_are_refused_on_another_base(
    other: Path, trained: Path, tmp_path: Path
) -> None:
    assert "whose weights are others" in refusal(
        tmp_path, "task.train=false", f"adapter={trained}", f"model.name={other}"
    )
    assert not (tmp_path / "result.json").exists()


@pytest.mark.full
def test_force_uses_another_base_with_a_warning(
    base: Path, other: Path, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = ["task=evaluate", f"adapter={trained}"]
    expected = run(tmp_path / "a", *overrides, f"model.name={base}")
    assert not caplog.records
    forced = run(tmp_path / "b", *overrides, f"model.name={other}", "base=force")
    assert forced["metrics"]["base_eval_loss"] != expected["metrics"]["base_eval_loss"]
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.getMessage().startswith(f"base=force: adapter={trained}/adapter does not fit model.name={other}")


@pytest.mark.matrix(1)
@pytest.mark.parametrize("path", ["adapter", "checkpoints/checkpoint-1"])
def test_a_copied_adapter_folder_knows_its_base_and_plain_peft_loads_it(
    base: Path, other: Path, trained: Path, tmp_path: Path, path: str, recwarn: pytest.WarningsRecorder
) -> None:
    folder = shutil.copytree(trained / path, tmp_path / "copy")
    assert json.loads((folder / "base.json").read_text())["name"] == str(base)
    overrides = ["task=evaluate", f"adapter={folder}", "evaluation.baseline=false"]
    assert f"it was trained on {base}" in refusal(tmp_path / "out", *overrides, f"model.name={other}")
    assert run(tmp_path / "out", *overrides, f"model.name={base}")["metrics"]["eval_loss"]
    recwarn.clear()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    assert not [warning for warning in recwarn if "base" in str(warning.message)]


@pytest.mark.full
def test_a_base_that_moved_was_cut_in_shards_or_is_quantized_otherwise_is_the_same(
    base: Path, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moved = shutil.copytree(base, tmp_path / "moved", ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(moved, max_shard_size="100KB")
    overrides = ["task=evaluate", f"adapter={trained}", f"model.name={moved}", "evaluation.baseline=false"]
    for quantization in ("nf4", "fp32"):
        run(tmp_path / "out", *overrides, f"quantization={quantization}")
    assert run(trained, f"model.name={moved}")["metrics"], "the run is finished, and returns its result"
    assert not caplog.records


def without_record(trained: Path, copy: Path, name: str | None) -> Path:
    """A copy of an adapter as plain PEFT saves it, on a base of a name."""
    folder = shutil.copytree(trained / "adapter", copy)
    (folder / "base.json").unlink()
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": name}))
    return folder


def test_an_adapter_of_plain_peft_is_known_by_the_name_of_its_base(
    base: Path, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = ["task=evaluate", f"model.name={base}", "evaluation.baseline=false"]
    folder = without_record(trained, tmp_path / "same", str(base))
    run(tmp_path / "out", *overrides, f"adapter={folder}")
    assert not caplog.records
    for name, known in (("org/other", "it was trained on org/other"), (None, "nothing says what it was trained on")):
        caplog.clear()
        folder = without_record(trained, tmp_path / str(name).replace("/", "-"), name)
        run(tmp_path / "out", *overrides, f"adapter={folder}")
        assert [record.getMessage() for record in caplog.records] == [
            f"adapter={folder} may not fit model.name={base}, for there is no fingerprint of its weights to compare: "
            f"{known}; make sure that the weights are the same"
        ]


def as_of_an_older_version(trained: Path, copy: Path) -> Path:
    """A copy of a run whose manifest has a digest of files, and whose adapter says nothing of its base."""
    shutil.copytree(trained, copy)
    (copy / "adapter" / "base.json").unlink()
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["model"] = {"fingerprint": "0" * 64, "revision": None}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


@pytest.mark.full
def test_a_run_of_an_older_version_is_known_by_the_name_of_its_base(
    base: Path, other: Path, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = as_of_an_older_version(trained, tmp_path / "old")
    for folder in (base, other):
        caplog.clear()
        run(tmp_path / "out", "task=evaluate", f"adapter={old}", f"model.name={folder}", "evaluation.baseline=false")
        [text] = [record.getMessage() for record in caplog.records]
        assert text.startswith(f"adapter={old}/adapter may not fit model.name={folder}, for there is no fingerprint")
        assert f"it was trained on {base}" in text


def test_the_manifest_says_what_the_folder_of_the_adapter_does(trained: Path) -> None:
    model = json.loads((trained / "manifest.json").read_text())["model"]
    saved = json.loads((trained / "adapter" / "base.json").read_text())
    assert saved == {key: model[key] for key in saved}
    (copied := trained.with_name("without")).mkdir()
    shutil.copytree(trained / "adapter", copied / "adapter", ignore=shutil.ignore_patterns("base.json"))
    shutil.copy(trained / "manifest.json", copied)
    text = refusal(copied / "out", "task=evaluate", f"adapter={copied}", "model.tokenizer=tiny")
    assert f"it was trained on {saved['name']}; give that base" in text


@pytest.mark.full
def test_a_run_whose_base_was_swapped_in_its_place_is_neither_resumed_nor_run_again(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copied = shutil.copytree(base, tmp_path / "own")
    overrides = [f"model.name={copied}", "trainer.deterministic=true"]
    first = run(tmp_path / "run", *overrides)
    for name in ("result.json", "adapter"):
        shutil.move(tmp_path / "run" / name, tmp_path / f"kept-{name}")
    put_other_weights(copied)
    text = refusal(tmp_path / "run", *overrides)
    assert text.startswith(
        f"the run in {tmp_path}/run does not fit model.name={copied}, whose weights have changed since the training"
    )
    assert text.endswith(
        "; restore the previous files, or choose another folder (hydra.run.dir=FOLDER or name=NAME), or use it in "
        "spite of that with base=force"
    )
    assert "with base=force" in refusal(tmp_path / "run", *overrides, "resume=force")
    second = run(tmp_path / "run", *overrides, "base=force")
    assert second["metrics"]["base_eval_loss"] != first["metrics"]["base_eval_loss"], "it is measured anew"
    assert "base=force: the run in " in caplog.text
    run(tmp_path / "out", *overrides, "task=evaluate", f"adapter={tmp_path}/run")  # the adapter is the new base's now
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (
        manifest["model"]["fingerprint"] == json.loads((tmp_path / "run/adapter/base.json").read_text())["fingerprint"]
    )


@pytest.mark.full
def test_a_replay_on_another_base_is_refused_before_it_trains(base: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(base, tmp_path / "own")
    run(tmp_path / "run", f"model.name={copied}", "trainer.save_steps=null")
    put_other_weights(copied)
    overrides = ["task=replay", f"run={tmp_path}/run", "device=cpu"]
    with pytest.raises(UserError) as error:
        run_job(build_job(compose(overrides), tmp_path / "again"))
    assert str(error.value).startswith(
        f"run={tmp_path}/run does not fit model.name={copied}, whose weights have changed since the training"
    )
    assert not (tmp_path / "again").exists()
    with pytest.raises(UserError, match=r"task=replay: base, .*: not what .* gave"):
        run_job(build_job(compose([*overrides, "base=force"]), tmp_path / "again"))


@pytest.mark.full
def test_a_whole_model_needs_no_base(base: Path, other: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", f"model.name={base}", "lora=none", "quantization=fp32", "trainer.save_steps=null")
    overrides = [f"adapter={tmp_path}/run", f"model.name={other}", "quantization=fp32"]
    assert run(tmp_path / "out", *overrides, "task=evaluate")["metrics"]["eval_loss"]
