"""Searches by Optuna: their trials, results and files, their resumption after every kind of end, and their errors."""

from __future__ import annotations

import csv
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from qlora import cli
from qlora.config.command import check_overrides
from qlora.config.compose import compose
from qlora.config.saved_config import config_to_dict
from qlora.errors import UserError
from qlora.sweep.jobs import identity
from tests.sweep.faults import SUFFER

optuna = pytest.importorskip("optuna")

from qlora.sweep.space import Space, build_space  # noqa: E402

# A program like qlora whose runs take no time: the loss is a bowl around the learning rate 1e-3, and falls with the
# rank and the steps; rank 64 fails, and rank 128 diverges. FAULTS says what befalls trials, by their numbers.
FAKE = (
    SUFFER
    + """
import math, time, types
from pathlib import Path

class FakeTraining:
    def __init__(self, job):
        self.config, self.folder = job.config, job.folder.path

    def execute(self):
        from qlora.errors import Pruned
        print("start", flush=True)
        if self.config.lora.r == 64 and not os.environ.get("MENDED"):
            raise ValueError("rank 64")
        time.sleep(float(os.environ.get("SECONDS", 0)))
        loss = (math.log10(self.config.trainer.learning_rate) + 3) ** 2 + 1 / self.config.lora.r
        if link := os.environ.get("QLORA_TRIAL"):
            from qlora.runtime.search_trial import TrialLink
            trial = TrialLink.from_text(link).open()
            for step in (10, 20, 30):
                trial.report(loss + 1 / step, step)
                suffer(trial.number)
                if trial.should_prune():
                    raise Pruned(f"eval_loss {loss + 1 / step:.3f} at step {step} of 40")
        loss = math.nan if self.config.lora.r == 128 else loss
        metrics = {"eval_loss": loss, "train_runtime": self.config.lora.r}
        result = {"objective": metrics[self.config.objective], "metrics": metrics}
        (self.folder / "result.json").write_text(json.dumps(result))
        return types.SimpleNamespace(**result)

from qlora import cli
from qlora.runtime.needs import Needs
sys.modules["qlora.tasks.train"] = types.SimpleNamespace(
    needs=lambda config: Needs(), run=lambda job: FakeTraining(job).execute()
)
from qlora.sweep import launcher

def command(config, folder, words, real=launcher.command):
    python, _, _, *rest = real(config, folder, words)
    return [python, __file__, *rest]

launcher.command = command
cli.main()
"""
)

RATE = "trainer.learning_rate=tag(log,interval(1e-5,1e-1))"
RATES = "trainer.learning_rate=1e-1,1e-2,1e-3"


def start(folder: Path, *args: str, **environment: str) -> subprocess.Popen[str]:
    (folder / "fake.py").write_text(FAKE)
    slots = [] if any(word.startswith("hydra/launcher=") for word in args) else ["hydra.launcher.n_jobs=2"]
    command = [sys.executable, "fake.py", "-m", "hydra/sweeper=optuna", "name=s", *slots, *args]
    return subprocess.Popen(
        command, cwd=folder, env=os.environ | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def search(folder: Path, *args: str, **environment: str) -> tuple[int, str, str]:
    process = start(folder, *args, **environment)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def study(folder: Path, name: str = "s") -> Any:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{folder}/outputs/sweeps/{name}/study.db")


def states(folder: Path, name: str = "s") -> dict[str, int]:
    return dict(Counter(trial.state.name for trial in study(folder, name).trials))


def starts(folder: Path) -> dict[str, int]:
    """How often each job began."""
    logs = (folder / "outputs/sweeps/s").glob("*/stdout.log")
    return {path.parent.name: path.read_text().count("start") for path in logs}


def results(folder: Path, name: str = "s") -> dict[str, Any]:
    return yaml.safe_load((folder / "outputs/sweeps" / name / "optimization_results.yaml").read_text())


def test_a_search_resumes_where_it_ended_and_draws_new_points(tmp_path: Path) -> None:
    code, output, errors = search(tmp_path, RATE, "lora.r=choice(8,16)", "hydra.sweeper.n_trials=2")
    assert code == 0, output + errors
    assert states(tmp_path) == {"COMPLETE": 2}
    code, output, errors = search(tmp_path, RATE, "lora.r=choice(8,16)", "hydra.sweeper.n_trials=2")
    assert "0 jobs to run, 2 finished already" in output, errors
    code, output, errors = search(tmp_path, RATE, "lora.r=choice(8,16)", "hydra.sweeper.n_trials=3")
    assert code == 0, output + errors
    assert list(starts(tmp_path).values()) == [1] * 3
    trials = study(tmp_path).trials
    assert len({str(trial.params) for trial in trials}) == 3
    best = min(trials, key=lambda trial: trial.value)
    actual = results(tmp_path)
    assert (actual["best_params"], actual["best_value"]) == (best.params, best.value)
    program, *args = shlex.split(actual["command"])
    assert program == "qlora"
    assert actual["job"].endswith(identity(config_to_dict(compose(args))))
    assert f"again    {actual['command']}" in output


@pytest.mark.full
def test_a_named_search_is_one_word_and_its_best_trial_runs_alone(tmp_path: Path) -> None:
    code, output, errors = search(tmp_path, "sweep=search", "lora.r=16", "hydra.sweeper.n_trials=1")
    assert code == 0, output + errors
    actual = results(tmp_path)
    assert actual["best_params"].keys() == {"trainer.learning_rate", "lora.dropout"}
    _, *args = shlex.split(actual["command"])
    assert "hydra.mode=RUN" in args
    assert check_overrides(args).lora.r == 16
    assert actual["job"].endswith(identity(config_to_dict(compose(args))))


@pytest.mark.full
@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.full)])
def test_what_a_stopped_search_had_begun_is_tried_again_with_the_same_values(tmp_path: Path, how: int) -> None:
    args = [RATE, "hydra.sweeper.n_trials=5"]
    process = start(tmp_path, *args, SECONDS="2")
    end = time.monotonic() + 120
    while not list(tmp_path.glob("outputs/sweeps/s/*/result.json")) or states(tmp_path).get("RUNNING") != 2:
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(how)
    process.communicate()
    begun = [trial.params for trial in study(tmp_path).trials if trial.state.name == "RUNNING"]
    code, output, errors = search(tmp_path, *args)
    assert code == 0, output + errors
    assert states(tmp_path)["COMPLETE"] == 5
    done = [trial.params for trial in study(tmp_path).trials if trial.state.name == "COMPLETE"]
    assert all(params in done for params in begun)


@pytest.mark.full
def test_a_job_that_had_finished_meanwhile_reports_its_value(tmp_path: Path) -> None:
    assert search(tmp_path, RATES, "hydra.sweeper.sampler=grid", "hydra.sweeper.n_trials=1")[0] == 0
    asked = study(tmp_path)
    trial = asked.ask()  # as if the search had been killed before it was told
    trial.suggest_categorical("trainer.learning_rate", [0.1, 0.01, 0.001])
    trial.set_user_attr("job", asked.trials[0].user_attrs["job"])
    code, output, errors = search(tmp_path, RATES, "hydra.sweeper.n_trials=2")
    assert code == 0, output + errors
    assert [trial.value for trial in study(tmp_path).trials] == [asked.trials[0].value] * 2
    assert list(starts(tmp_path).values()) == [1]


@pytest.mark.full
def test_failed_trials_are_told_do_not_count_and_end_a_search_that_has_too_many(tmp_path: Path) -> None:
    args = [RATE, "lora.r=choice(8,64)", "hydra.sweeper.sampler=random", "hydra.sweeper.n_trials=3"]
    code, output, errors = search(tmp_path, *args)
    actual = states(tmp_path)
    assert code == 1, output + errors
    assert actual["COMPLETE"] == 3
    board = "outputs/sweeps/s/leaderboard.md says why; the same command resumes the search"
    noun = "trial" if actual["FAIL"] == 1 else "trials"
    assert errors.strip().endswith(f"error: {actual['FAIL']} {noun} failed: {board}")
    assert "failed, ValueError: rank 64" in (tmp_path / "outputs/sweeps/s/leaderboard.md").read_text()
    args = [RATE, "lora.r=choice(64)", "hydra.sweeper.max_failures=1", "name=t", "hydra.launcher.n_jobs=1"]
    code, output, errors = search(tmp_path, *args)
    assert code == 1
    assert states(tmp_path, "t") == {"FAIL": 2}
    assert "2 trials failed, more than hydra.sweeper.max_failures=1 allows, so the search stopped: " in errors


@pytest.mark.full
def test_a_grid_has_every_point_once_and_runs_failed_ones_again(tmp_path: Path) -> None:
    args = ["trainer.learning_rate=1e-1,1e-3", "lora.r=8,64", "hydra.sweeper.sampler=grid"]
    code, output, errors = search(tmp_path, *args)
    assert code == 1, output + errors
    assert states(tmp_path) == {"COMPLETE": 2, "FAIL": 2}
    code, output, errors = search(tmp_path, *args, MENDED="1")
    assert code == 0, output + errors
    assert "2 jobs to run, 2 finished already" in output
    assert states(tmp_path) == {"COMPLETE": 4, "FAIL": 2}
    assert sorted(starts(tmp_path).values()) == [1, 1, 2, 2]


@pytest.mark.full
def test_values_that_exclude_each_other_fail_their_trial_alone(tmp_path: Path) -> None:
    args = ["quantization=none,nf4", "lora=all-linear,pissa", "hydra.sweeper.sampler=grid"]
    code, output, errors = search(tmp_path, *args)
    assert code == 1, output + errors
    assert states(tmp_path) == {"COMPLETE": 3, "FAIL": 1}
    sentence = "quantization=nf4 lora=pissa: failed, lora.init=pissa rewrites the base weights"
    assert sentence in output
    assert sentence in (tmp_path / "outputs/sweeps/s/leaderboard.md").read_text()


@pytest.mark.full
def test_points_that_are_drawn_again_start_no_job_and_a_diverged_one_is_the_worst(tmp_path: Path) -> None:
    args = ["lora.r=choice(8,128)", "hydra.sweeper.sampler=random", "hydra.sweeper.n_trials=8"]
    code, output, errors = search(tmp_path, *args)
    assert code == 0, output + errors
    assert list(starts(tmp_path).values()) == [1, 1]
    values = {(trial.params["lora.r"], trial.value) for trial in study(tmp_path).trials}
    assert {rank: math.isfinite(value) for rank, value in values} == {8: True, 128: False}
    assert states(tmp_path) == {"COMPLETE": 8}


@pytest.mark.full
def test_several_objectives_leave_a_front(tmp_path: Path) -> None:
    args = ["lora.r=choice(8,16)", "trainer.learning_rate=1e-1,1e-3", "hydra.sweeper.sampler=grid"]
    code, output, errors = search(tmp_path, *args, "hydra.sweeper.objectives=[eval_loss,train_runtime]")
    assert code == 0, output + errors
    solutions = results(tmp_path)["solutions"]
    assert {(item["params"]["lora.r"], item["params"]["trainer.learning_rate"]) for item in solutions} == {
        (8, 0.001), (16, 0.001)
    }  # fmt: skip
    assert study(tmp_path).metric_names == ["eval_loss", "train_runtime"]
    best = {trial.user_attrs["job"] for trial in study(tmp_path).best_trials}
    with (tmp_path / "outputs/sweeps/s/leaderboard.csv").open() as file:
        assert {row["job"]: row["front"] for row in csv.DictReader(file)} == {
            job: "yes" if job in best else "no" for job in told(tmp_path)
        }
    assert "1 *  16  0.001" in output
    assert "<h2>Best compromises</h2>" in (tmp_path / "outputs/sweeps/s/report.html").read_text()
    code, _, errors = search(tmp_path, *args)
    assert code == 1
    assert "is to minimize eval_loss, minimize train_runtime, not to minimize eval_loss; choose another" in errors


@pytest.mark.full
@pytest.mark.parametrize(
    ("pruner", "engine"),
    [
        (["median", "hydra.sweeper.pruner_kwargs.n_startup_trials=1"], "hydra.launcher.n_jobs=1"),
        pytest.param(
            *(["hyperband", "hydra.sweeper.pruner_kwargs.reduction_factor=2"], "hydra/launcher=basic"),
            marks=pytest.mark.full,
        ),
    ],
)
def test_trials_that_fall_behind_end_early(tmp_path: Path, pruner: list[str], engine: str) -> None:
    args = ["trainer.learning_rate=1e-3,1e-2,1e-1,1e-5", "hydra.sweeper.sampler=grid", "trainer.max_steps=40",
             "trainer.eval_steps=10", f"hydra.sweeper.pruner={pruner[0]}", pruner[1], engine]  # fmt: skip
    code, output, errors = search(tmp_path, *args)
    assert code == 0, output + errors
    actual = states(tmp_path)
    assert actual["PRUNED"] == 3 if pruner[0] == "median" else actual["PRUNED"] >= 1
    overview = json.loads((tmp_path / "outputs/sweeps/s/sweep.json").read_text())
    assert overview["counts"] == {"finished": actual["COMPLETE"], "pruned": actual["PRUNED"]}
    assert "pruned, eval_loss " in (tmp_path / "outputs/sweeps/s/leaderboard.md").read_text()
    assert len(list(tmp_path.glob("outputs/sweeps/s/*/result.json"))) == actual["COMPLETE"]
    assert search(tmp_path, *args)[0] == 0
    assert states(tmp_path) == actual


PRUNING = [
    *("hydra.sweeper.pruner=median", "hydra.sweeper.pruner_kwargs.n_startup_trials=2"),
    *("trainer.max_steps=40", "trainer.eval_steps=10"),
]


def told(folder: Path) -> dict[str, str]:
    """What the study knows last of each job."""
    return {trial.user_attrs["job"]: trial.state.name for trial in study(folder).trials}


@pytest.mark.full
def test_four_faults_are_told_beside_pruned_trials_and_are_tried_again_alone(tmp_path: Path) -> None:
    rates = "trainer.learning_rate=1e-3,2e-3,5e-4,3e-3,1e-1,1e-5,2e-5,5e-2,4e-3,3e-4,2e-1,5e-3"
    args = [rates, "hydra.sweeper.sampler=grid", *PRUNING]
    reasons = {
        1: "ValueError: a bad row",
        4: "SystemExit: 0",
        5: "killed (SIGKILL): the system does so when memory runs out",
        9: "MemoryError()",
    }
    failures = dict(zip(reasons, ("raise", "exit", "kill", "memory"), strict=True))
    code, output, errors = search(tmp_path, *args, FAULTS=json.dumps(failures))
    assert code == 1, output + errors
    assert errors.strip().endswith(
        "error: 4 trials failed: outputs/sweeps/s/leaderboard.md says why; the same command resumes the search"
    )
    actual = states(tmp_path)
    assert actual.keys() == {"COMPLETE", "PRUNED", "FAIL"}
    assert actual["COMPLETE"] + actual["PRUNED"] == 8
    jobs = {job["job"]: job for job in json.loads((tmp_path / "outputs/sweeps/s/sweep.json").read_text())["jobs"]}
    failed = {number: trial.user_attrs["job"] for number, trial in enumerate(study(tmp_path).trials)
              if trial.state.name == "FAIL"}  # fmt: skip
    assert {number: jobs[name]["reason"] for number, name in failed.items()} == reasons
    state = {"finished": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}
    assert {name: state[job["status"]] for name, job in jobs.items()} == told(tmp_path)
    board = (tmp_path / "outputs/sweeps/s/leaderboard.md").read_text()
    assert all(f"failed, {reason}" in board and f"failed, {reason}" in output for reason in reasons.values())
    previous, good = starts(tmp_path), [trial.params for trial in study(tmp_path).trials if trial.state.name != "FAIL"]
    code, output, errors = search(tmp_path, *args)
    assert code == 0, output + errors
    assert {job for job, count in starts(tmp_path).items() if count > previous[job]} == set(failed.values())
    assert len(told(tmp_path)) == 12
    assert set(told(tmp_path).values()) == {"COMPLETE", "PRUNED"}
    assert [trial.params for trial in study(tmp_path).trials if trial.state.name != "FAIL"][:8] == good


@pytest.mark.full
def test_a_search_that_faults_had_stopped_resumes_to_the_requested_number_of_trials(tmp_path: Path) -> None:
    args = [RATE, *PRUNING, "hydra.sweeper.n_trials=5", "hydra.sweeper.max_failures=1"]
    code, output, errors = search(tmp_path, *args, FAULTS=json.dumps({0: "kill", 2: "raise"}))
    assert code == 1, output + errors
    assert "2 trials failed, more than hydra.sweeper.max_failures=1 allows, so the search stopped: " in errors
    previous = starts(tmp_path)
    assert 2 <= len(previous) < 5
    code, output, errors = search(tmp_path, *args)
    assert code == 0, output + errors
    actual = states(tmp_path)
    assert (actual.pop("FAIL"), sum(actual.values())) == (2, 5)
    assert actual.keys() <= {"COMPLETE", "PRUNED"}
    assert len(starts(tmp_path)) == 7
    assert all(starts(tmp_path)[job] == count for job, count in previous.items())


@pytest.mark.full
@pytest.mark.slow
def test_a_real_study_prunes_a_training(tmp_path: Path) -> None:
    args = [
        *("lora.r=4", "lora.dropout=0", "trainer.max_steps=4", "trainer.per_device_train_batch_size=4"),
        *("trainer.lr_scheduler_type=constant", "trainer.lr_scheduler_kwargs={}", "trainer.warmup_steps=0"),
        *("trainer.logging_steps=1", "trainer.eval_steps=2", "data.max_eval_samples=8", "data.max_train_samples=64"),
        *("evaluation=loss", "evaluation.baseline=false", "task.predict=false", "name=real"),
        *("hydra/sweeper=optuna", "hydra.sweeper.sampler=grid", "trainer.learning_rate=5e-3,1e-6"),
        *("hydra.sweeper.pruner=median", "hydra.sweeper.pruner_kwargs.n_startup_trials=1"),
    ]
    command = [sys.executable, "-m", "qlora", "-m", *args]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = study(tmp_path, "real").trials
    assert (first.state.name, second.state.name) == ("COMPLETE", "PRUNED")
    assert list(first.intermediate_values) == [2, 4]
    assert list(second.intermediate_values) == [2]
    assert first.value == first.intermediate_values[4]
    assert "trainer.learning_rate=1e-06: pruned, eval_loss 11" in done.stdout
    assert not (tmp_path / "outputs/sweeps/real" / second.user_attrs["job"] / "adapter").exists()


def test_a_resumed_training_reports_what_it_had_measured_and_its_end_is_not_pruned(tmp_path: Path) -> None:
    from qlora.errors import Pruned
    from qlora.runtime.search_trial import TrialLink
    from qlora.training.pruning import PruningCallback

    url = f"sqlite:///{tmp_path}/study.db"
    asked = optuna.create_study(study_name="s", storage=url)
    good, bad = asked.ask(), asked.ask()
    for step in (10, 20, 30, 40):
        good.report(1.0, step)
    asked.tell(good, 1.0)
    link = TrialLink(
        url, None, "s", bad._trial_id, "eval_loss", "median", {"n_startup_trials": 1, "n_warmup_steps": 20}
    )
    callback = PruningCallback(TrialLink.from_text(link.to_text()))
    state = SimpleNamespace(log_history=[{"loss": 4, "step": 9}, {"eval_loss": 3, "step": 10}], max_steps=30)
    callback.on_train_begin(None, state, None)
    assert asked.trials[1].intermediate_values == {10: 3}
    state.global_step = 30
    callback.on_evaluate(None, state, None, metrics={"eval_loss": 2.5})
    state.global_step, state.max_steps = 40, 50
    with pytest.raises(Pruned, match=r"^eval_loss 2\.500 at step 40 of 50$"):
        callback.on_evaluate(None, state, None, metrics={"eval_loss": 2.5})


# The space


def space(*overrides: str, params: dict[str, str] | None = None, conditions: dict[str, str] | None = None) -> Space:
    return build_space(overrides, params or {}, conditions or {}, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("override", "described"),
    [
        ("lora.r=8,16", "CategoricalDistribution(choices=(8, 16))"),
        ("lora.r=choice(8,16,8)", "CategoricalDistribution(choices=(8, 16))"),
        ("lora.target_modules=all-linear,[q,k]", "CategoricalDistribution(choices=('all-linear', '[q,k]'))"),
        ("trainer.eval_steps=null,5", "CategoricalDistribution(choices=(None, 5))"),
        ("lora.rslora=true,false", "CategoricalDistribution(choices=(True, False))"),
        ("lora.dropout=interval(0,0.1)", "FloatDistribution(high=0.1, log=False, low=0.0, step=None)"),
        (RATE, "FloatDistribution(high=0.1, log=True, low=1e-05, step=None)"),
        ("lora.r=int(interval(1,8))", "IntDistribution(high=8, log=False, low=1, step=1)"),
        ("lora.r=tag(log,int(interval(1,64)))", "IntDistribution(high=64, log=True, low=1, step=1)"),
        ("trainer.warmup_steps=range(0,100,10)", "IntDistribution(high=90, log=False, low=0, step=10)"),
        ("trainer.warmup_steps=range(30,0,-10)", "IntDistribution(high=30, log=False, low=10, step=10)"),
        ("lora.dropout=range(0,0.3,0.1)", "FloatDistribution(high=0.2, log=False, low=0.0, step=0.1)"),
    ],
)  # fmt: skip
def test_hydra_s_words_are_distributions(override: str, described: str) -> None:
    [parameter] = space(override).parameters
    assert str(parameter.distribution) == described


def test_a_value_is_written_so_that_the_same_one_is_read_back() -> None:
    asked = space(
        RATE, "lora.dropout=range(0,0.5,0.1)", "lora.r=8,16", "lora.target_modules=all-linear,[q_proj,k_proj]"
    )
    values = {"trainer.learning_rate": 0.00012345678901234567, "lora.dropout": 0.1 + 0.2, "lora.r": 8,
              "lora.target_modules": "[q_proj,k_proj]"}  # fmt: skip
    config = compose(asked.overrides(values))
    assert config.trainer.learning_rate == values["trainer.learning_rate"]
    assert (config.lora.dropout, config.lora.r, config.lora.target_modules) == (0.3, 8, ["q_proj", "k_proj"])


def test_a_parameter_under_a_condition_is_tried_with_its_parent_only() -> None:
    params = {"lora.loraplus_lr_ratio": "interval(1,32)", "lora": "choice(all-linear,loraplus)"}
    asked = space(params=params, conditions={"lora.loraplus_lr_ratio": "lora=loraplus"})
    assert [parameter.name for parameter in asked.parameters] == ["lora", "lora.loraplus_lr_ratio"]
    sampler = optuna.samplers.RandomSampler(seed=0)
    memory = optuna.create_study(sampler=sampler)
    proposed = [asked.suggest(memory.ask()) for _ in range(20)]
    assert {tuple(values) for values in proposed} == {("lora",), ("lora", "lora.loraplus_lr_ratio")}
    assert all(("lora.loraplus_lr_ratio" in values) == (values["lora"] == "loraplus") for values in proposed)
    assert [asked.overrides(point) for point in asked.examples()] == [
        ["lora=all-linear"],
        ["lora=loraplus", "lora.loraplus_lr_ratio=1.0"],
        ["lora=loraplus", "lora.loraplus_lr_ratio=1.0"],
        ["lora=loraplus", "lora.loraplus_lr_ratio=32.0"],
    ]
    params["lora.loraplus_lr_ratio"] = "4,16"
    conditions = {"lora.loraplus_lr_ratio": "lora=loraplus"}
    assert len(list(space(params=params, conditions=conditions).points())) == 3
    fixed = space("lora=loraplus", params=params, conditions=conditions)
    assert [list(point.values()) for point in fixed.points()] == [[4], [16]]
    with pytest.raises(UserError, match="there is nothing to search"):
        space("lora=dora", "lora.r=8", params=params, conditions=conditions)


# Mistakes


def refused(folder: Path, monkeypatch: pytest.MonkeyPatch, *args: str) -> str:
    """Returns the sentence that ends the command."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    arguments = ["-m", "hydra/sweeper=optuna", "name=s", *args]
    monkeypatch.setattr(sys, "argv", ["qlora", *arguments])
    with pytest.raises(UserError) as caught:
        cli.run(arguments)
    assert not list(folder.glob("outputs/sweeps/*/*/"))
    return str(caught.value)


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["lora.dropout=interval(0.1,0)"], "lora.dropout=interval(0.1,0) is empty: an interval runs from its lower"),
        (["lora.r=range(8,8)"], "lora.r=range(8,8) is empty: a range runs from its start up to its stop"),
        (["lora.r=interval(8,64)"], "lora.r must be a whole number; write int(interval(8,64))"),
        (["lora.dropout=tag(log,interval(0,0.1))"], "a logarithmic scale needs bounds above 0, got 0"),
        (["lora.r=tag(log,range(8,64,8))"], "a logarithmic scale only for whole numbers above 0 in steps of 1"),
        (["lora.r=tag(log,choice(8,64))"], "a list of values has no scale; leave tag(log,...) out"),
        (["lora.dropout=tag(lg,interval(0.1,0.2))"], "the tag 'lg' is unknown"),
        (["lora.r=8"], "hydra/sweeper=optuna: there is nothing to search"),
        (["lora.rr=8,16"], "unknown key 'lora.rr'"),
        (["lora.r=8,0"], "lora.r must be positive, got 0"),
        ([RATE, "hydra.sweeper.sampler=tpee"],
         "hydra.sweeper.sampler must be one of tpe, random, grid, cmaes, got 'tpee'; did you mean tpe?"),
        ([RATE, "hydra.sweeper.pruner=medien"], "hydra.sweeper.pruner must be one of none, median, hyperband, got"),
        ([RATE, "hydra.sweeper.n_trails=3"],
         "unknown key 'hydra.sweeper.n_trails' (did you mean hydra.sweeper.n_trials?)"),
        ([RATE, "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials must be positive or null, got 0"),
        ([RATE, "hydra.sweeper.direction=up"], "hydra.sweeper.direction must be minimize or maximize, got 'up'"),
        ([RATE, "hydra.sweeper.direction=[minimize,maximize]"], "has 2 values for 1 objectives (eval_loss)"),
        ([RATE, "hydra.sweeper.sampler_kwargs.startup=3"],
         "hydra.sweeper.sampler_kwargs.startup: tpe has no such argument"),
        ([RATE, "hydra.sweeper.pruner=median", "hydra.sweeper.pruner_kwargs.n_startup_trials=-1"],
         "hydra.sweeper.pruner_kwargs does not suit median: Number of startup trials cannot be negative"),
        ([RATE, "hydra.sweeper.storage=postgresql://me:secret@localhost/x"],
         "hydra.sweeper.storage holds a password in an address, which would stand in the command and in the folders of "
         "all jobs; put the whole URL into a variable of the environment and give its name: "
         "'hydra.sweeper.storage=${oc.env:NAME}'"),
        ([RATE, "hydra.sweeper.storage=mssql+pymssql://me@localhost/x"],
         "hydra.sweeper.storage=mssql+pymssql://me@localhost/x cannot be used (Failed to import DB access module"),
        ([RATE, "hydra.sweeper.storage=sqlite:////no/such/folder/study.db"],
         "cannot be used (unable to open database file); give the URL of a database"),
        ([RATE, "objective=eval_lss"], "objective='eval_lss' is not a metric of this run"),
        ([RATE, "objective=null"], "objective=null: a search needs a metric to optimize"),
        ([RATE, "hydra.sweeper.objectives=[eval_loss,eval_lss]"], "hydra.sweeper.objectives: 'eval_lss' is not a"),
        ([RATE, "task.evaluate=false"], "objective=eval_loss is not measured by these jobs; it needs task.evaluate"),
        ([RATE, "objective=base_eval_loss", "evaluation.baseline=false"], "it needs evaluation.baseline=true"),
        ([RATE, "task.train=false", "objective=train_loss"], "it needs task.train=true"),
        ([RATE, "hydra.sweeper.sampler=grid"], "trainer.learning_rate is an interval of real numbers, which has no"),
        ([RATE, "hydra.sweeper.pruner=median", "hydra.sweeper.objectives=[eval_loss,train_runtime]"],
         "hydra.sweeper.pruner=median compares trials by a single objective, got eval_loss, train_runtime"),
        ([RATE, "hydra.sweeper.pruner=median", "objective=eval_exact_match"],
         "needs an objective that is measured during training (eval_loss, eval_perplexity), got eval_exact_match"),
        ([RATE, "hydra.sweeper.pruner=median", "trainer.eval_steps=null"], "but trainer.eval_steps is not set"),
        ([RATE, "hydra.sweeper.sampler=cmaes", "hydra.sweeper.objectives=[eval_loss,train_runtime]"],
         "hydra.sweeper.sampler=cmaes supports a single objective"),
        ([RATE, "hydra.sweeper.conditions={lora.alpha: 'lora=dora'}"],
         "hydra.sweeper.conditions: lora.alpha is not searched"),
        ([RATE, "lora.r=8,16", "hydra.sweeper.conditions={lora.r: 'lora=dora'}"],
         "hydra.sweeper.conditions: lora.r depends on lora, which is neither searched nor set"),
        ([RATE, "lora=dora,loraplus", "lora.r=8,16", "hydra.sweeper.conditions={lora.r: 'lora=rslora'}"],
         "lora.r depends on lora=rslora, which the search never tries; it tries dora, loraplus"),
        ([RATE, "lora.r=8,16", "hydra.sweeper.conditions={lora.r: 'dora'}"],
         "must hold an override such as lora=loraplus"),
        (["seed=0,1", "lora.r=8,16", "hydra.sweeper.conditions={lora.r: 'seed=0', seed: 'lora.r=8'}"],
         "hydra.sweeper.conditions: seed and lora.r depend on each other"),
    ],
)  # fmt: skip
def test_a_mistake_ends_before_any_job(
    args: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sentence in refused(tmp_path, monkeypatch, *args)


@pytest.mark.full
def test_without_optuna_a_search_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['optuna'] = None; from qlora.cli import main; main()"
    args = [sys.executable, "-c", code, "-m", "hydra/sweeper=optuna", "name=s", RATE]
    done = subprocess.run(args, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    sentence = "error: hydra/sweeper=optuna needs Optuna, which is not installed: pip install 'qlora[optuna]'"
    assert (done.returncode, done.stderr.strip()) == (1, sentence)


def test_an_interval_needs_a_search() -> None:
    with pytest.raises(UserError, match="a grid cannot walk through an interval; add hydra/sweeper=optuna"):
        check_overrides(["lora.dropout=interval(0,0.1)"], multirun=True)
    with pytest.raises(UserError, match=r"hydra\.sweeper\.n_trials is a key of hydra/sweeper=optuna; choose that too"):
        check_overrides(["lora.r=8,16", "hydra.sweeper.n_trials=3"], multirun=True)


@pytest.mark.full
def test_choices_that_a_study_was_not_begun_with_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "outputs/sweeps/s"
    folder.mkdir(parents=True)
    begun = optuna.create_study(study_name="s", storage=f"sqlite:///{folder}/study.db")
    begun.set_metric_names(["eval_loss"])
    begun.ask().suggest_categorical("lora.r", [8, 16])
    sentence = refused(tmp_path, monkeypatch, "lora.r=8,16,32")
    assert sentence.startswith(
        "lora.r: the study in outputs/sweeps/s started with choice(8,16), and now it is choice(8,16,32), which "
        "Optuna cannot mix; choose another folder with name=NAME"
    )


@pytest.mark.full
def test_a_study_of_another_config_is_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = f"sqlite:///{tmp_path}/shared.db"
    other = optuna.create_study(study_name="s", storage=storage)
    other.set_metric_names(["eval_loss"])
    other.set_user_attr("shared", json.dumps({"lora.r": 8, "seed": 3}))
    sentence = refused(tmp_path, monkeypatch, RATE, "lora.r=8", f"hydra.sweeper.storage={storage}")
    assert "holds a study 's' of another config; changed:\n  seed: 3 -> 0\nchoose another name with" in sentence
