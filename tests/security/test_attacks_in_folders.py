"""An attacker's list: folders of models, adapters, tasks, sweeps and runs that somebody sent, none of which runs."""

from __future__ import annotations

import contextlib
import functools
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2.exceptions import SecurityError
from promises import QUICK, Bomb
from transformers import TrainerCallback

from qlora import adapters
from qlora.adapters.code_files import check_code_files
from qlora.config.compose import compose
from qlora.config.overrides import open_entries
from qlora.config.saved_config import config_to_dict, dump_config
from qlora.config.user_code import import_class, import_function
from qlora.data.ingest.sources import load_hub
from qlora.errors import UserError
from qlora.evaluation.lm_harness import LmHarness
from qlora.evaluation.metrics import find_metrics
from qlora.models.tokenizer import load_tokenizer
from qlora.run import Run
from qlora.tasks import build_job, run_job

MARKING = "import pathlib\npathlib.Path({mark!r}).touch()\ndef f(*args, **kwargs):\n    return []\n"

# Tasks of lm-eval, each of which would leave a mark, and what the refusal says of them.
TASK = """
task: evil
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
TASKS = {
    "process_docs: !function utils.f": "add trusted=[utils]",
    "class: !function utils.f": "add trusted=[utils]",
    "custom_dataset: !function utils.f": "add trusted=[utils]",
    "doc_to_text: !function os.system": "add trusted=[os]",
    "process_docs: !function {absolute}.f": "not trusted",
    "include: {elsewhere}/more.yaml": "add trusted=[elsewhere_utils]",
    "metric_list: [{{metric: {elsewhere}/evil_metric}}]": "names a script of an unknown author",
    "dataset_path: iceberg\ndataset_kwargs: {{catalog_properties: {{py-io-impl: utils.f}}}}": "must be one of json",
    "doc_to_text: \"{{{{cycler.__init__.__globals__.os.system('touch {mark}')}}}}\"": "unsafe",
    "doc_to_choice: \"{{{{lipsum.__globals__['os'].system('touch {mark}')}}}}\"": "unsafe",
}


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "MARK"


def build_harness(folder: Path, trusted: list[str]) -> LmHarness:
    config = compose(["evaluation=lm-eval", "evaluation.tasks=[evil]", f"evaluation.path={folder}"])
    tokenizer = load_tokenizer(config.model)
    return LmHarness(config.evaluation, tokenizer=tokenizer, batch_size=2, device=torch.device("cpu"), trusted=trusted)


def test_a_folder_of_tasks_does_not_stand_for_a_package_that_is_trusted(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
    folder, installed = tmp_path / "tasks", tmp_path / "installed"
    folder.mkdir()
    installed.mkdir()
    (folder / "my_rows.py").write_text(MARKING.format(mark=str(mark)))
    (installed / "my_rows.py").write_text("def f(rows):\n    return rows.select([])\n")
    monkeypatch.syspath_prepend(installed)
    monkeypatch.delitem(sys.modules, "my_rows", raising=False)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "choices": ["b", "c"], "answer": 0}) + "\n")
    (folder / "evil.yaml").write_text(TASK.format(rows=rows) + "process_docs: !function my_rows.f\n")
    with pytest.raises(UserError, match="trusted"):
        build_harness(folder, [])
    with contextlib.suppress(UserError):  # it has no rows
        build_harness(folder, ["my_rows"])
    assert sys.modules["my_rows"].__file__ == str(installed / "my_rows.py")
    assert not mark.exists()


@pytest.mark.full
def test_nothing_of_a_folder_of_tasks_runs(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = pytest.importorskip("lm_eval.tasks")
    from lm_eval import utils

    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
    folder, elsewhere = tmp_path / "tasks", tmp_path / "elsewhere"
    folder.mkdir()
    (elsewhere / "evil_metric").mkdir(parents=True)
    for file in (folder / "utils.py", elsewhere / "elsewhere_utils.py", elsewhere / "evil_metric" / "evil_metric.py"):
        file.write_text(MARKING.format(mark=str(mark)))
    (elsewhere / "more.yaml").write_text("process_docs: !function elsewhere_utils.f\n")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "choices": ["b", "c"], "answer": 0}) + "\n")
    names = {"elsewhere": elsewhere, "mark": mark, "absolute": str(folder / "utils").replace("/", ".")}
    base, environment = TASK.format(rows=rows), utils.env
    model = Run(compose(["quantization=fp32"]), "unused").session.load_base().eval()
    for line, says in TASKS.items():
        line = line.format(**names)
        replaced = tuple(f"{added.partition(':')[0]}:" for added in line.splitlines())
        kept = [kept_line for kept_line in base.splitlines() if not kept_line.startswith(replaced)]
        (folder / "evil.yaml").write_text("\n".join([*kept, line]))
        with pytest.raises((UserError, SecurityError)) as error:
            build_harness(folder, []).measure(model)
        assert says in str(error.value), (line, str(error.value))
        assert not mark.exists(), line
    assert utils.env is environment
    (folder / "evil.yaml").write_text(base + "process_docs: !function utils.f\n")
    with pytest.raises(UserError):  # it has no rows
        build_harness(folder, ["utils"])
    assert mark.exists(), "who is trusted runs"


def test_a_metric_of_the_library_is_none_of_the_working_directory(tmp_path: Path, mark: Path) -> None:
    pytest.importorskip("evaluate")
    for path in (tmp_path / "evil" / "evil.py", tmp_path / "evaluate-metric" / "worse" / "worse.py"):
        path.parent.mkdir(parents=True)
        path.write_text(MARKING.format(mark=str(mark)))
    for name in ("evil", "worse"):
        with pytest.raises(UserError, match=rf"evaluate:{name}: the library would run the code of .*{name}"):
            find_metrics([f"evaluate:{name}"])
    with pytest.raises(UserError, match="is unknown"):
        compose(["evaluation.metrics=['evaluate:somebody/evil']"])
    assert not mark.exists()


def test_what_a_module_imports_cannot_be_named(tmp_path: Path, mark: Path) -> None:
    (tmp_path / "mine.py").write_text("import os\nfrom os import system\nimport shutil\n")
    for name in (
        "mine:system",
        "qlora.runtime.atomic_files.shutil:copyfile",
        "qlora.runtime.atomic_files:shutil",
        "mine:os",
    ):
        with pytest.raises(UserError, match=f"x={name}"):
            import_function(name, "x")
    for name in (
        *(
            "qlora.runtime.atomic_files.shutil.copyfile",
            "qlora.models.loading.torch.load",
            "qlora.run.Run",
            "qlora.run",
            "system",
        ),
        "transformers.dynamic_module_utils.get_class_from_dynamic_module",
        *("transformers.AutoModelForCausalLM.from_pretrained", "transformers.pipeline", "transformers.nothing.X"),
    ):
        with pytest.raises(UserError, match=f"x={name}"):
            import_class(name, "x", TrainerCallback)
    assert import_class("transformers.EarlyStoppingCallback", "x", TrainerCallback).__name__ == "EarlyStoppingCallback"


@pytest.mark.full
def test_a_tokenizer_s_code_does_not_run(tmp_path: Path, base: Path, mark: Path) -> None:
    (base / "tokenization_evil.py").write_text(MARKING.format(mark=str(mark)))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "tokenization_evil.Evil"]}}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"model\.trust_remote_code=true"):
        load_tokenizer(compose([f"model.tokenizer={base}"]).model)
    (base / "custom_generate").mkdir()
    (base / "custom_generate" / "generate.py").write_text(MARKING.format(mark=str(mark)))
    model = Run(compose([f"model.name={base}", "model.tokenizer=tiny", *QUICK]), tmp_path / "run").session.load_base()
    model.generate(torch.tensor([[1]]), max_new_tokens=1)
    assert not mark.exists()


def test_code_in_an_adapter_s_folder_is_not_that_of_the_base(tmp_path: Path, base: Path) -> None:
    trusting = compose([f"model.name={base}", "model.trust_remote_code=true"]).model
    folder = tmp_path / "adapter"
    folder.mkdir()
    (base / "modeling.py").write_text("x = 1\n")
    (folder / "modeling.py").write_text("x = 1\n")
    check_code_files(folder, trusting)
    (folder / "modeling.py").write_text("x = 2\n")
    with pytest.raises(UserError, match=r"adapter=.* comes with other Python code than its base \(modeling\.py\)"):
        check_code_files(folder, trusting)
    (folder / "modeling.py").unlink()
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["somebody/evil--x.Y", null]}}')
    with pytest.raises(UserError, match=r"\(somebody/evil, by tokenizer_config\.json\)"):
        check_code_files(folder, trusting)


def test_an_adapter_names_no_module(tmp_path: Path) -> None:
    settings = {"peft_type": "LORA", "megatron_config": {"x": 1}, "megatron_core": "evilmod"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="megatron_config"):
        adapters.check_adapter_folder(tmp_path)


def test_a_pickle_in_the_study_of_a_sweep_does_not_go_off(mark: Path) -> None:
    optuna = pytest.importorskip("optuna")
    pytest.importorskip("cmaes")
    from qlora.upstream.optuna import SafeCmaEsSampler

    def objective(trial: Any) -> float:
        return float(trial.suggest_float("x", 0, 1) + trial.suggest_float("y", 0, 1))

    def run(study: Any) -> None:
        study.sampler = SafeCmaEsSampler(seed=1, n_startup_trials=1, warn_independent_sampling=False)
        study.optimize(objective, n_trials=12)

    study = optuna.create_study()
    run(study)
    run(study)  # resumes from what is stored
    state = pickle.dumps(Bomb(mark)).hex()
    trial = study.ask()
    study._storage.set_trial_system_attr(trial._trial_id, "cma:optimizer:0", state)
    study.tell(trial, objective(trial))
    with pytest.raises(UserError, match=r"a sampler's state that would run pathlib"):
        run(study)
    assert not mark.exists()


@pytest.mark.parametrize("path", ["pandas", "iceberg", "webdataset", "eval"])
def test_a_data_set_of_the_hub_is_no_reader(path: str) -> None:
    with pytest.raises(UserError, match="is a reader of the package datasets"):
        load_hub(path, None, "train", failure=f"data.path={path}: not available", remedy="x")


@pytest.mark.parametrize("files", ["reference::/x.json", "https://host/x.pkl", "/x.pkl", "../x.pkl", "~/x"])
def test_files_of_a_data_set_lie_in_it(files: str) -> None:
    with pytest.raises(UserError, match=r"data\.data_files=.* must name files inside"):
        load_hub("me/set", None, "train", files, failure="data.path=me/set: not available", remedy="x")


@pytest.mark.full
def test_a_run_that_trusts_itself_is_not_run_again(tmp_path: Path, mark: Path) -> None:
    (tmp_path / "evilmod.py").write_text(MARKING.format(mark=str(mark)))
    folder = tmp_path / "sent"
    folder.mkdir()
    config = compose([*QUICK, "data=local", "data.path=evilmod:f", "trusted=[evilmod]"])
    (folder / "config.yaml").write_text(dump_config(config))
    manifest = {"config": config_to_dict(config), "processes": 1, "data": {}, "model": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "result.json").write_text(json.dumps({"metrics": {}, "objective": None, "status": "finished"}))
    overrides = ["task=replay", f"run={folder}"]
    with pytest.raises(UserError, match=r"sent/config\.yaml sets trusted=\[evilmod\].*to this command"):
        run_job(build_job(compose(overrides), tmp_path / "again"))
    text = (folder / "config.yaml").read_text().replace("- evilmod\n", "").replace("trusted:", "trusted: []")
    (folder / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"data\.path=evilmod:f: code of the package 'evilmod'"):
        run_job(build_job(compose(overrides), tmp_path / "again"))
    assert "evilmod" not in sys.modules
    assert not mark.exists()


def test_a_sweep_hands_trust_to_its_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_TRUSTED", "mine,model.trust_remote_code")
    overrides = open_entries(["seed=0,1", "trusted=[other]"])
    assert overrides == ["seed=0,1", "trusted=[other]", 'trusted=["other", "mine"]', "model.trust_remote_code=true"]
    assert open_entries(overrides) == overrides
