"""An attacker's list: configs and YAML files of somebody else, each of which would run a program if it were followed.

Every one leaves a mark where it succeeds, so a sentence alone does not count."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf
from promises import ROOT

from qlora.config.command import check_overrides
from qlora.config.compose import compose, register
from qlora.config.options import CONF_DIR
from qlora.config.saved_config import with_trust_of
from qlora.config.trust import TESTED_HYDRA
from qlora.errors import UserError
from qlora.training.callbacks import build_callbacks

HEAD = "# @package _global_\n"
STOP = "qlora.training.callbacks.EarlyStopping"
MODULE = """
import pathlib
pathlib.Path("MARK").touch()
from transformers import TrainerCallback
class C(TrainerCallback):
    pass
def rows(*args, **kwargs):
    pathlib.Path("MARK").touch()
    return [{"input": "a", "output": "b"}]
"""

# The body of an experiment file, and what the refusal says.
EXPERIMENTS = {
    "nested target": (
        f"callbacks: {{x: {{_target_: {STOP}, patience: {{_target_: qlora.reporting.manifest._output, _args_: "
        "[touch, MARK]}}}",
        "callbacks.x.patience._target_=",
    ),
    "target in a list": (
        f"callbacks: {{x: {{_target_: {STOP}, patience: [1, {{_target_: os.system, command: touch MARK}}]}}}}",
        "callbacks.x.patience[1]._target_=",
    ),
    "positional arguments": (f"callbacks: {{x: {{_target_: {STOP}, _args_: [1]}}}}", "callbacks.x._args_="),
    "partial": (f"callbacks: {{x: {{_target_: {STOP}, _partial_: true}}}}", "callbacks.x._partial_="),
    "target by interpolation": (
        "name: os.system\ncallbacks: {x: {_target_: '${name}', command: touch MARK}}",
        "callbacks.x._target_=os.system",
    ),
    "arguments by interpolation": (
        f"callbacks: {{y: {{_target_: {STOP}, a: {{_target_: os.system, command: touch MARK}}}}, "
        f"x: {{_target_: {STOP}, patience: '${{callbacks.y.a}}'}}}}",
        "_target_=os.system",
    ),
    "trust of its own": ("trusted: [evilmod]\ncallbacks: {x: {_target_: evilmod.C}}", "sets trusted (evilmod)"),
    "trust by interpolation": (
        "name: evilmod\ntrusted: ['${name}']\ncallbacks: {x: {_target_: evilmod.C}}",
        "sets trusted",
    ),
    "a node by interpolation": (
        f"callbacks: {{x: {{_target_: {STOP}, m: {{name: tiny, trust_remote_code: true}}}}}}\nmodel: "
        "${callbacks.x.m}",
        "sets model (",
    ),
    "remote code": ("model: {trust_remote_code: true}", "sets model.trust_remote_code (True)"),
    "remote code in words": ("model: {trust_remote_code: 'yes'}", "sets model.trust_remote_code (yes)"),
    "rows": ("data: {path: 'evilmod:rows'}", "data.path=evilmod:rows"),
    "a format": ("data: {format: 'evilmod:rows'}", "data.format=evilmod:rows"),
    "rows of a trusted package": (
        "data: {path: 'transformers.testing_utils:run_command'}",
        "data.path=transformers.testing_utils:run_command",
    ),
    "rows of ours": ("data: {path: 'qlora.reporting.manifest:_output'}", "data.path=qlora.reporting.manifest:_output"),
    "the library of metrics as rows": ("data: {path: 'evaluate:load'}", "data.path=evaluate:load"),
    "a metric": ("evaluation: {metrics: ['os:system']}", "evaluation.metrics[0]=os:system"),
    "a resolver": ("name: '${eval:1}'", "${eval:...} calls no function"),
    "a resolver behind another": ("name: \"${oc.decode:'\\\\${eval:1}'}\"", "eval"),
    "a callback of Hydra's": (
        "hydra: {callbacks: {x: {_target_: subprocess.Popen, args: [touch, MARK]}}}",
        "hydra.callbacks.x._target_=subprocess.Popen",
    ),
    "an argument of a callback of Hydra's": (
        "hydra: {callbacks: {x: {_target_: hydra.experimental.callbacks.LogJobReturnCallback}}}",
        "hydra.callbacks.x._target_=hydra",
    ),
    "a launcher": ("hydra: {launcher: {_target_: os.system}}", "hydra.launcher._target_=os.system is not a launcher"),
    "a sweeper": ("hydra: {sweeper: {_target_: os.system}}", "hydra.sweeper._target_=os.system is not a sweeper"),
    "an argument of a sweeper": (
        "defaults: [{override /hydra/sweeper: optuna}]\nhydra: {sweeper: {sampler_kwargs: {x: {_target_: os.system, "
        "command: touch MARK}}}}",
        "sets hydra.sweeper.sampler_kwargs.x._target_ (os.system)",
    ),
    "an argument of a launcher by interpolation": (
        "defaults: [{override /hydra/sweeper: optuna}]\ncallbacks: {x: {_target_: os.system, command: touch MARK}}\n"
        "hydra: {sweeper: {pruner_kwargs: {x: '${callbacks.x}'}}}",
        "hydra.sweeper.pruner_kwargs.x._target_=os.system",
    ),
    "commands of SLURM": (
        "defaults: [{override /hydra/launcher: submitit_local}]\nhydra: {launcher: {submitit_folder: /tmp/x}}",
        "sets hydra.launcher.submitit_folder",
    ),
    "the environment": ("hydra: {job: {env_set: {LD_PRELOAD: evil.so}}}", "sets hydra.job.env_set.LD_PRELOAD"),
    "the environment, copied": ("hydra: {job: {env_copy: [PATH]}}", "sets hydra.job.env_copy"),
    "the environment by interpolation": ("hydra: {job: {env_set: '${callbacks}'}}", "sets hydra.job.env_set"),
    "a whole node by interpolation": ("hydra: {job: '${callbacks}'}", "sets hydra.job"),
    "words of the command": ("hydra: {overrides: {task: ['trusted=[evilmod]']}}", "sets hydra.overrides.task"),
    "where options lie": ("hydra: {searchpath: ['pkg://evilmod']}", "hydra.searchpath"),
    "a handler of the log": (
        "hydra: {job_logging: {handlers: {x: {class: evilmod.C}}}}",
        "hydra.job_logging.handlers.x.class=evilmod.C",
    ),
    "a factory of the log": (
        "hydra: {hydra_logging: {filters: {x: {(): os.system}}}}",
        "hydra.hydra_logging.filters.x.()=os.system",
    ),
    "an object of the log": (
        "hydra: {job_logging: {handlers: {x: {class: logging.StreamHandler, stream: 'ext://evilmod.C'}}}}",
        "hydra.job_logging.handlers.x.stream=evilmod.C",
    ),
    "a file of the log": (
        "hydra: {job_logging: {formatters: {x: {format: 'touch MARK'}}, handlers: {x: {class: logging.FileHandler, "
        "filename: .bashrc}}}}",
        "sets hydra.job_logging.handlers.x.filename",
    ),
    "a log without a root": ("hydra: {job_logging: {version: 1, root: null}}", None),
    "swept trust": ("hydra: {sweeper: {params: {trusted: '[evilmod]'}}}", "sweeps trusted"),
    "swept trust, added": ("hydra: {sweeper: {params: {'++trusted': '[evilmod]'}}}", "sweeps trusted"),
    "swept remote code": ("hydra: {sweeper: {params: {model.trust_remote_code: 'true'}}}", "sweeps model.trust_remote"),
    "swept keys of Hydra's": ("hydra: {sweeper: {params: {hydra.job.env_set.A: '1'}}}", "sweeps hydra.job.env_set"),
    "swept options of Hydra's": ("hydra: {sweeper: {params: {hydra/launcher: mine}}}", "sweeps hydra/launcher"),
}
assert len(EXPERIMENTS) >= 40


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module in it that leaves a mark where it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evilmod", raising=False)
    (tmp_path / "evilmod.py").write_text(MODULE)
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def eval_is_a_resolver() -> object:
    """What a package that is imported beside us may have registered."""
    OmegaConf.register_new_resolver("eval", lambda text: Path("MARK").touch(), replace=True)
    yield
    OmegaConf.clear_resolver("eval")


@pytest.mark.usefixtures("eval_is_a_resolver")
@pytest.mark.matrix(8)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_nothing_of_an_attacker_s_experiment_runs(here: Path, name: str) -> None:
    body, says = EXPERIMENTS[name]
    (here / "conf" / "experiment" / "evil.yaml").write_text(HEAD + body)
    try:
        composed = check_overrides(["experiment=evil"], here / "conf", multirun="params" in body)
        assert says is None, "accepted"
        build_callbacks(OmegaConf.to_container(composed.callbacks))  # type: ignore[arg-type]
    except UserError as error:
        text = str(error)
        assert says is not None, text
        assert says in text
        assert "\n" not in text
    assert not (here / "MARK").exists()
    assert "evilmod" not in sys.modules


@pytest.mark.matrix(12)
@pytest.mark.parametrize(
    ("file", "body", "args", "says"),
    [
        ("hydra/launcher/mine", "_target_: os.system", ["hydra/launcher=mine"], "hydra.launcher._target_=os.system"),
        ("hydra/launcher/mine", "defaults: [slurm]\nsetup: [touch MARK]", ["hydra/launcher=mine"],
         "sets hydra.launcher.setup"),
        ("hydra/launcher/mine", "defaults: [slurm]\npartition: \"a\\ntouch MARK\"", ["hydra/launcher=mine"],
         "sets hydra.launcher.partition"),
        ("hydra/launcher/mine", "defaults: [slurm]\nadditional_parameters: {wrap: touch MARK}",
         ["hydra/launcher=mine"], "sets hydra.launcher.additional_parameters.wrap"),
        ("hydra/launcher/mine", "# @package _group_\ndefaults: [slurm]\nsetup: [touch MARK]",
         ["hydra/launcher=mine"], "hydra.launcher is not set by the option that was chosen for it"),
        ("hydra/launcher/mine", "defaults: [ray]\nray: {init: {runtime_env: {py_executable: touch MARK}}}",
         ["hydra/launcher=mine"], "sets hydra.launcher.ray.init.runtime_env.py_executable"),
        ("hydra/launcher/mine", "defaults: [ray]\nray: {init: {address: 'ray://elsewhere:1'}}",
         ["hydra/launcher=mine"], "sets hydra.launcher.ray.init.address"),
        ("hydra/sweeper/mine", "_target_: os.system", ["hydra/sweeper=mine"], "hydra.sweeper._target_=os.system"),
        ("hydra/job_logging/mine", "version: 1\nhandlers: {x: {(): os.system}}", ["hydra/job_logging=mine"],
         "hydra.job_logging.handlers.x.()=os.system"),
        ("hydra/job_logging/mine", "version: 1\nhandlers: {x: {class: logging.StreamHandler}}",
         ["hydra/job_logging=mine"], "hydra.job_logging has no root"),
        ("hydra/job_logging/mine", "version: 1\nroot: {handlers: [x]}\nhandlers: {x: {(): os.system}}",
         ["hydra/job_logging=mine"], "hydra.job_logging.handlers.x.()=os.system"),
        ("hydra/callbacks/mine", "x: {_target_: os.system}", ["hydra/callbacks=mine"], "hydra.callbacks.x._target_"),
        ("hydra/callbacks/mine", "x: {_target_: os.system}", ["+hydra/callbacks=mine"],
         "hydra/callbacks is chosen twice"),
        ("hydra/env/mine", "# @package _global_\nhydra: {job: {env_set: {A: b}}}", ["hydra/env=mine"],
         "sets hydra.job.env_set.A"),
        ("schema", "trusted: [evilmod]", [], "is taken by qlora itself"),
        ("hydra/config", "callbacks: {x: {_target_: os.system}}", [], "is taken by qlora itself"),
        ("callbacks/mine", "x: {_target_: os.system}", ["callbacks=mine"], "callbacks.x._target_=os.system"),
        ("callbacks/mine", "# @package hydra.job.env_set\nA: b", ["callbacks=mine"], "sets hydra.job.env_set.A"),
        ("model/mine", "name: tiny\ntrust_remote_code: true", ["model=mine"], "sets model.trust_remote_code"),
        ("model/mine", "# @package _global_\ntrusted: [evilmod]", ["model=mine"], "sets trusted"),
        ("recipe/mine", "# @package _global_\ntrusted: [evilmod]", ["recipe=mine"], "sets trusted"),
        ("recipe/tiny_vicuna", "trusted: [evilmod]", ["data=vicuna"], "sets trusted"),
        ("sweep/mine", "# @package _global_\nhydra: {sweeper: {params: {trusted: '[evilmod]'}}}", ["sweep=mine"],
         "sweeps trusted"),
        ("../outside/mine", "trusted: [evilmod]", ["recipe=../../outside/mine"], ""),
        ("experiment/mine", "# @package _global_\ndefaults: [{/../outside: mine}]", ["experiment=mine"], ""),
    ],
)  # fmt: skip
def test_no_option_of_any_group_runs_anything(here: Path, file: str, body: str, args: list[str], says: str) -> None:
    path = here / "conf" / f"{file}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(body)
    (here / "outside").mkdir(exist_ok=True)
    (here / "outside" / "mine.yaml").write_text("# @package _global_\ntrusted: [evilmod]\n")
    with pytest.raises(UserError) as error:
        check_overrides(args, here / "conf")
    assert says in str(error.value)
    if " sets " in str(error.value):
        assert f"/{path.name} " in str(error.value), "the file is named"
    assert not (here / "MARK").exists()


def test_a_file_that_leads_out_of_the_shipped_options_is_somebody_s(here: Path) -> None:
    (here / "mine.yaml").write_text("# @package _global_\ntrusted: [evilmod]\n")
    (here / "conf" / "experiment" / "mine.yaml").write_text(
        f"{HEAD}defaults:\n  - /{os.path.relpath(here, CONF_DIR)}: mine\n"
    )
    with pytest.raises(UserError):
        check_overrides(["experiment=mine"], here / "conf")


def test_no_line_break_reaches_a_script_of_a_launcher(here: Path) -> None:
    """A scheduler's script is made of lines; what follows a line break would be a command."""
    for args in (['hydra.job.name="a\ntouch MARK"'], ['hydra.sweep.dir="a\ntouch MARK"']):
        with pytest.raises(UserError, match="holds a line break"):
            check_overrides(args)


def test_every_way_to_compose_is_checked(here: Path) -> None:
    """Hydra's own entry and its launchers compose without `check_overrides`, jobs of a combination never seen before
    among them."""
    (here / "conf" / "recipe").mkdir()
    (here / "conf" / "recipe" / "tiny_vicuna.yaml").write_text("trusted: [evilmod]\n")
    register()
    path = create_config_search_path(str(CONF_DIR))
    path.prepend("command-line", f"file://{here / 'conf'}", SearchPathQuery(provider="schema"))
    GlobalHydra.instance().clear()
    try:
        loader = Hydra.create_main_hydra2("qlora", path).config_loader
        master = loader.load_configuration("config", ["seed=0,1"], RunMode.MULTIRUN)
        with pytest.raises(UserError, match="sets trusted"):
            loader.load_sweep_config(master, ["data=vicuna"])
        with pytest.raises(UserError, match="sets trusted"):
            hydra_compose("config", overrides=["data=vicuna"])
    finally:
        GlobalHydra.instance().clear()


def test_what_is_typed_counts_and_what_the_environment_says(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["data=local", "data.path=evilmod:rows"]
    assert compose([*args, "trusted=[evilmod]"]).trusted == ["evilmod"]
    monkeypatch.setenv("QLORA_TRUSTED", "evilmod, model.trust_remote_code")
    config = compose([*args, "trusted=[mine]"])
    assert config.trusted == ["mine", "evilmod"]
    assert config.model.trust_remote_code
    assert not compose(["model.trust_remote_code=false"]).model.trust_remote_code
    assert not (here / "MARK").exists(), "composing imports nothing"


def test_a_key_that_is_trusted_may_be_set_by_a_file(here: Path) -> None:
    (here / "conf" / "experiment" / "mine.yaml").write_text(f"{HEAD}hydra: {{job: {{env_set: {{A: b}}}}}}\n")
    args = ["experiment=mine", "trusted=[hydra.job.env_set]"]
    assert check_overrides(args, here / "conf").trusted == ["hydra.job.env_set"]
    with pytest.raises(UserError, match=r"add .*or trusted=\[hydra\.job\.env_set\.A\]"):
        check_overrides(["experiment=mine"], here / "conf")
    check_overrides(["experiment=mine", "trusted=[hydra.job.env_set.A]"], here / "conf")


def test_options_that_name_no_code_are_read_as_ever(here: Path) -> None:
    folder = here / "conf" / "hydra" / "launcher"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        "defaults: [slurm]\npartition: gpu\naccount: me\nconstraint: a100&nvlink\ntimeout_min: 60\n"
    )
    (here / "conf" / "sweep").mkdir()
    (here / "conf" / "sweep" / "mine.yaml").write_text(
        f"{HEAD}defaults: [{{override /hydra/sweeper: optuna}}]\nhydra:\n  sweeper:\n    n_trials: 3\n"
        "    storage: ${oc.env:STORE,null}\n    params: {lora.r: 'choice(8,16)'}\n"
    )
    (here / "conf" / "experiment" / "mine.yaml").write_text(
        f"{HEAD}hydra:\n  job_logging:\n    root: {{level: DEBUG}}\n  verbose: true\n"
        f"callbacks:\n  x:\n    _target_: {STOP}\n    patience: 2\n"
    )
    args = ["hydra/launcher=mine", "hydra.launcher.setup=[module load cuda]", "sweep=mine", "experiment=mine"]
    composed = check_overrides(args, here / "conf", multirun=True)
    [callback] = build_callbacks(OmegaConf.to_container(composed.callbacks))  # type: ignore[arg-type]
    assert callback.patience == 2  # type: ignore[attr-defined]


@pytest.mark.full
def test_a_stored_config_trusts_what_the_command_does() -> None:
    file = Path("run/config.yaml")
    saved = {"trusted": ["evilmod"], "model": {"trust_remote_code": True}}
    with pytest.raises(UserError, match=r"run/config\.yaml sets trusted=\[evilmod\] and model\.trust_remote_code=true"):
        with_trust_of(compose([]), saved, file)
    trusting = compose(["trusted=[other,evilmod]", "model.trust_remote_code=true"])
    assert with_trust_of(trusting, saved, file)["trusted"] == ["other", "evilmod"]
    for odd in ({"model": "${callbacks.x}"}, {"model": {}, "trusted": "${name}"}, {}):
        with pytest.raises(UserError, match="it is damaged"):
            with_trust_of(compose([]), odd, file)
    with pytest.raises(UserError, match=r"model\.trust_remote_code=true to this command"):
        with_trust_of(compose([]), {"model": {"trust_remote_code": "${callbacks.x.y}"}}, file)


def test_hydra_is_the_version_that_was_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"hydra-core=={TESTED_HYDRA}" in (ROOT / "constraints.txt").read_text("utf-8")
    assert f'"hydra-core=={TESTED_HYDRA}"' in (ROOT / "pyproject.toml").read_text("utf-8")
    monkeypatch.setattr("hydra.__version__", "1.3.2")
    with pytest.raises(UserError, match=rf"hydra-core 1\.3\.2 is installed.*pip install hydra-core=={TESTED_HYDRA}"):
        compose([])
