"""One study, several commands: they search together, any of them may be killed, and a folder may move."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora.config.compose import compose
from qlora.config.schema import Config
from qlora.sweep.engine_config import SearchSettings
from qlora.sweep.jobs import Status, write_status
from qlora.sweep.sweep_folder import Sweep
from tests.sweep.servers import postgres
from tests.sweep.test_optuna import RATE, results, search, start

optuna = pytest.importorskip("optuna")

from qlora.runtime.search_trial import open_storage  # noqa: E402
from qlora.sweep import presence  # noqa: E402
from qlora.sweep.goals import Goal  # noqa: E402
from qlora.sweep.space import build_space  # noqa: E402
from qlora.sweep.study import Study  # noqa: E402
from qlora.sweep.trials import Planned, Search  # noqa: E402


@pytest.fixture(scope="module")
def base() -> Config:
    return compose()


@pytest.fixture
def journal(tmp_path: Path) -> str:
    return f"journal://{tmp_path}/study.log"


def command(base: Config, folder: Path, storage: str | None, *overrides: str, **settings: Any) -> Search:
    """A command's view of the study; the config of a job is known by its seed."""
    folder.mkdir(parents=True, exist_ok=True)

    def composed(overrides: list[str]) -> Config:
        return dataclasses.replace(base, seed=sum(map(ord, "".join(overrides))))

    space = build_space(overrides or (RATE,), {}, {}, None)  # type: ignore[arg-type]
    sweep = Sweep(folder, "eval_loss", is_shared=storage is not None)
    goals = [Goal("eval_loss", "minimize")]
    return Search(Study(SearchSettings(storage=storage, **settings), space, goals, sweep, base), composed)


def finish(search: Search, planned: Planned, loss: float = 1.0) -> None:
    """Does what the process of a job does."""
    job = planned.job
    job.folder.mkdir(parents=True, exist_ok=True)
    write_status(job.folder, Status.finished, overrides=job.overrides)
    job.status, job.metrics = Status.finished, {"eval_loss": loss}
    search.ended(job)


def counts(storage: str) -> dict[str, int]:
    study = optuna.load_study(study_name="s", storage=open_storage(storage))
    return dict(Counter(trial.state.name for trial in study.trials))


def test_two_commands_draw_other_points_and_no_trial_too_many(base: Config, tmp_path: Path, journal: str) -> None:
    first, second = (command(base, tmp_path / name / "s", journal, n_trials=5, sampler="random") for name in "ab")
    with first.study.presence.announce(), second.study.presence.announce():
        planned = [(one, job) for one in (first, second) * 3 if (job := one.next()) is not None]
        assert len(planned) == 5
        assert len({tuple(job.overrides) for _, job in planned}) == 5
        assert first.left == second.left == 0
        assert first.may_come()
        for one, job in planned:
            finish(one, job)
        assert not first.may_come()
    assert counts(journal) == {"COMPLETE": 5}


def test_two_commands_share_the_points_of_a_grid(base: Config, tmp_path: Path, journal: str) -> None:
    args = ["lora.r=4,8,16", "lora.dropout=0.1,0.2"]
    first, second = (command(base, tmp_path / name / "s", journal, *args, sampler="grid") for name in "ab")
    with first.study.presence.announce(), second.study.presence.announce():
        planned = [(one, job) for one in (first, second) * 4 if (job := one.next()) is not None]
        assert len({tuple(job.overrides) for _, job in planned}) == len(planned) == 6


def test_a_command_that_falls_silent_loses_its_trial_to_one_other(
    base: Config, tmp_path: Path, journal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = command(base, tmp_path / "a" / "s", journal, n_trials=2).next()
    assert lost is not None
    first, second = (command(base, tmp_path / name / "s", journal, n_trials=2) for name in "bc")
    with first.study.presence.announce(), second.study.presence.announce():
        first.recover()
        assert (first.left, first.may_come()) == (1, True)
        monkeypatch.setattr(presence, "SILENT_SECONDS", 0.0)
        time.sleep(0.01)
        first.recover()
        second.recover()
        begun = [one.next() for one in (first, second, first, second)]
        assert [job.overrides for job in begun if job is not None].count(lost.overrides) == 1
        assert [job is not None for job in begun] == [True, True, False, False]


def test_an_interrupted_command_leaves_its_trials_to_the_others_at_once(
    base: Config, tmp_path: Path, journal: str
) -> None:
    ended = command(base, tmp_path / "a" / "s", journal, n_trials=1)
    with ended.study.presence.announce():
        left = ended.next()
    other = command(base, tmp_path / "b" / "s", journal, n_trials=1)
    with other.study.presence.announce():
        other.recover()
        again = other.next()
        assert left is not None
        assert again is not None
        assert again.overrides == left.overrides
        finish(other, again)
        finish(ended, left)  # late, and no longer asked for
    assert counts(journal) == {"COMPLETE": 1, "FAIL": 1}


@pytest.mark.full
def test_a_folder_that_was_moved_resumes_with_its_study(tmp_path: Path) -> None:
    args = [RATE, "hydra.launcher.n_jobs=1"]
    code, output, errors = search(tmp_path, *args, "hydra.sweeper.n_trials=1")
    assert code == 0, output + errors
    (tmp_path / "outputs").rename(tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "elsewhere/sweeps/s", tmp_path / "outputs/sweeps/other")
    code, output, errors = search(tmp_path, *args, "name=other", "hydra.sweeper.n_trials=2")
    assert code == 0, output + errors
    assert "1 job to run, 1 finished already" in output
    assert len(list((tmp_path / "outputs/sweeps/other").glob("*/result.json"))) == 2


@pytest.fixture
def database() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.mark.full
@pytest.mark.slow
def test_two_commands_on_one_postgresql_study_lose_nothing_by_kill_9(tmp_path: Path, database: str) -> None:
    kill_and_resume([tmp_path / "a", tmp_path / "b"], database, 4)


@pytest.mark.full
@pytest.mark.parametrize("folder_names", [["a", "b"], ["a", "a"]])
def test_two_commands_on_one_study_lose_nothing_by_many_kills(
    tmp_path: Path, journal: str, database: str, folder_names: list[str]
) -> None:
    for storage in (journal, database):
        folders = [tmp_path / storage.partition(":")[0] / folder_name for folder_name in folder_names]
        kill_and_resume(folders, storage, 20, kills=5)


def kill_and_resume(folders: list[Path], storage: str, trials: int, *, kills: int = 1) -> None:
    """Kills the commands in all folders several times while jobs run, and lets them resume together to the end."""
    args = [RATE, f"hydra.sweeper.n_trials={trials}", "hydra.launcher.n_jobs=1", f"hydra.sweeper.storage='{storage}'"]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    lost: list[dict[str, float]] = []
    for _ in range(kills):
        ended = states(storage).get("COMPLETE", 0)
        running = [start(folder, *args, SECONDS="1") for folder in folders]
        wait_for(
            lambda ended=ended: (now := states(storage)).get("RUNNING", 0) > 1 and now.get("COMPLETE", 0) > ended,
            running,
        )
        for process in running:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        study = optuna.load_study(study_name="s", storage=open_storage(storage))
        lost += [trial.params for trial in study.trials if trial.state.name == "RUNNING"]
    running = [start(folder, *args) for folder in folders]
    for process in running:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, output + errors
    study = optuna.load_study(study_name="s", storage=open_storage(storage))
    done = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    assert len(done) == trials
    assert lost
    assert all(params in [trial.params for trial in done] for params in lost if params)
    assert len({str(trial.params) for trial in done}) == trials
    jobs = {path.parent.name for folder in folders for path in folder.glob("outputs/sweeps/s/*/result.json")}
    assert {trial.user_attrs["job"] for trial in done} == jobs
    assert results(folders[0])["best_value"] == min(trial.value for trial in done)


def states(storage: str) -> dict[str, int]:
    try:
        return counts(storage)
    except KeyError:  # there is no study yet
        return {}


def wait_for(happens: Callable[[], bool], running: list[subprocess.Popen[str]]) -> None:
    end = time.monotonic() + 240
    while not happens():
        ended = [process.communicate() for process in running if process.poll() is not None]
        assert not ended, "".join(sum(ended, ()))
        assert time.monotonic() < end
        time.sleep(0.1)
