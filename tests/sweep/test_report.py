"""The report of a sweep, and `task=report` of any runs: which it finds, what it says varies, what it writes."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_runs import write_run, write_sweep

from qlora.config.compose import compose
from qlora.config.saved_config import dump_config
from qlora.errors import UserError
from qlora.models.model_files import EMBEDDED
from qlora.sweep.leaderboard import build_leaderboard, fit, table, to_markdown
from qlora.sweep.report_runs import collect, find_runs, report
from qlora.sweep.sweep_folder import read_sweep
from qlora.sweep.sweep_page import build_report, write_overview, write_report

AXES = {"lora.r": ["4", "8"], "seed": ["0", "1"]}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "sweeps" / "ranks", AXES, broken={3: ("failed", "ValueError: a bad row", "line 1\n")})


def names(folders: list[Path]) -> list[str]:
    return [folder.name for folder in folders]


def test_the_report_of_a_sweep_averages_seeds_and_links_each_of_them(sweep: Path) -> None:
    printed = build_report(read_sweep(sweep))
    assert [dict(line.values) for line in printed.lines] == [{"lora.r": "8"}, {"lora.r": "4"}]
    assert [[run.short for run in line.runs] for line in printed.lines] == [["open"], ["seed 0", "seed 1"]]
    assert [run.label for run in printed.lines[1].runs] == ["r=4 seed=0", "r=4 seed=1"]
    assert printed.lines[1].runs[0].folder == "lora.r=4,seed=0-00000000"
    [broken] = printed.unfinished
    assert (broken.status, broken.reason, broken.log) == ("failed", "ValueError: a bad row", ["line 1"])
    assert broken.curves["loss"].values
    assert printed.command == "qlora lora.r=8 seed=0"


def test_the_command_of_a_named_sweep_runs_the_best_job_alone(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "named", {"lora.r": ["4"]}, command=["sweep=lora-rank"])
    assert build_report(read_sweep(folder)).command == "qlora lora.r=4 sweep=lora-rank hydra.mode=RUN"


def test_the_overview_brings_all_files_of_a_sweep_up_to_date(sweep: Path) -> None:
    write_overview(sweep, "eval_loss")
    assert {path.name for path in sweep.iterdir() if path.is_file() and path.name[0] != "."} == {
        *("sweep.json", "leaderboard.md", "leaderboard.csv", "report.html")
    }
    assert "3 of 4" in (sweep / "report.html").read_text()


def test_a_damaged_file_of_one_job_does_not_stop_the_report(sweep: Path) -> None:
    (sweep / "lora.r=4,seed=0-00000000" / "history.json").write_text("[{")
    printed = build_report(read_sweep(sweep))
    assert printed.lines[1].runs[0].curves == {}
    assert printed.lines[1].runs[1].curves


def test_a_pattern_finds_runs_sweeps_and_folders_of_runs(sweep: Path, tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_run(tmp_path / "runs" / name)
    (tmp_path / "runs" / "empty").mkdir()
    assert names(find_runs(f"{tmp_path}/runs/*")) == ["a", "b"]
    assert names(find_runs(f"{tmp_path}/runs")) == ["a", "b"]
    assert names(find_runs(f"{tmp_path}/runs/a")) == ["a"]
    assert len(find_runs(f"{sweep}")) == 4
    assert len(find_runs(f"{tmp_path}/**")) == 6
    assert names(find_runs(f"{sweep}/*r=4*")) == ["lora.r=4,seed=0-00000000", "lora.r=4,seed=1-00000001"]
    assert names(find_runs(f"{tmp_path}/runs/*", without=tmp_path / "runs" / "a")) == ["b"]


def test_a_pattern_without_runs_is_answered_with_the_nearest_folder(sweep: Path) -> None:
    with pytest.raises(UserError) as error:
        find_runs(f"{sweep.parent}/rank/*")
    assert str(error.value) == (
        f"runs={sweep.parent}/rank/*: there is no run (did you mean {sweep}?); name folders of runs or of sweeps, "
        "e.g. runs='outputs/runs/*' or runs=outputs/sweeps/mine"
    )


def test_runs_of_no_sweep_vary_where_their_configs_differ(tmp_path: Path) -> None:
    write_run(tmp_path / "a", ["lora.r=4", "model=tiny"])
    write_run(tmp_path / "b", ["lora.r=8", "model=tiny"])
    write_run(tmp_path / "c", ["lora.r=8", "model=llama-7b", "trainer.learning_rate=0.0001"])
    actual = collect([tmp_path / name for name in "abc"], tmp_path / "report", "eval_loss")
    assert {"model.name", "lora.r", "trainer.learning_rate"} <= set(actual.varied)
    assert not [key for key in actual.varied if key.startswith("model.") and key != "model.name"]
    assert actual.jobs["a"].values["lora.r"] == "4"
    assert actual.jobs["c"].values["trainer.learning_rate"] == "0.0001"
    assert actual.common["seed"] == 0
    printed = build_report(actual, is_sweep=False)
    assert {run.label for run in printed.finished} == {"a", "b", "c"}


def test_old_runs_without_a_status_or_a_config_are_shown_too(tmp_path: Path) -> None:
    old = write_run(tmp_path / "old")
    for name in ("status.json", "progress.json", "manifest.json", "config.yaml", "history.json"):
        (old / name).unlink()
    shutil.rmtree(old / ".hydra")
    actual = collect(find_runs(f"{tmp_path}/*"), tmp_path / "report", "eval_loss")
    [run] = build_report(actual, is_sweep=False).finished
    assert (run.label, run.status, run.curves) == ("old", "finished", {})
    assert run.objective == run.metrics["eval_loss"]


def test_the_objective_is_that_of_the_runs_unless_another_is_given(tmp_path: Path) -> None:
    for number in range(2):
        write_run(tmp_path / f"run{number}", ["objective=eval_exact_match", f"lora.r={4 + number}"])
    folders = find_runs(f"{tmp_path}/run*")
    actual = collect(folders, tmp_path / "report", "eval_loss")
    assert actual.objective == "eval_exact_match"
    assert actual.maximizes
    assert collect(folders, tmp_path, "peak_memory_gb").objective == "peak_memory_gb"
    assert collect(folders, tmp_path, None).objective is None
    with pytest.raises(UserError, match=r"objective=eval_exact_mach: none of the 2 runs has it \(did you mean eval_"):
        collect(folders, tmp_path, "eval_exact_mach")


def test_a_report_needs_runs() -> None:
    with pytest.raises(UserError, match=r"^runs is not set; name what task=report shows"):
        compose(["task=report"])
    assert compose(["task=report", "runs=a/*", "objective=eval_mmlu_val_accuracy"]).runs == "a/*"


def test_a_run_in_python_is_no_report(tmp_path: Path) -> None:
    from qlora.run import Run

    with pytest.raises(UserError, match=r"^task=report is no run; start it on the command line: qlora task=report$"):
        Run(compose(["task=report", "runs=a"]), tmp_path).execute()


def test_the_report_is_written_into_its_own_folder(sweep: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = report(compose(["task=report", f"runs='{sweep}'"]), out)
    assert result.metrics == {"report_runs": 4, "report_finished": 3}
    assert {path.name for path in out.iterdir()} == {"report.html", "leaderboard.md", "leaderboard.csv", "report.json"}
    assert all(Path(path).is_file() for path in result.paths.values())
    assert "../sweeps/ranks/lora.r%3D4%2Cseed%3D0-00000000" in (out / "report.html").read_text()
    assert "<h1>ranks</h1>" in (out / "report.html").read_text()
    with (out / "leaderboard.csv").open() as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["finished"] * 3 + ["failed"]


@pytest.mark.full
def test_the_command_line_reports_without_torch_and_prints_the_table(sweep: Path, tmp_path: Path) -> None:
    code = "import sys; from qlora.cli import main; main(); sys.exit('torch' in sys.modules)"
    args = ["task=report", f"runs={sweep}/*", "name=mine"]
    environment = {**os.environ, "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-c", code, *args], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "lora.r" in done.stdout
    assert "a bad row" in done.stdout
    folder = tmp_path / "outputs" / "runs" / "mine"
    assert (folder / "report.html").is_file()
    assert json.loads((folder / "status.json").read_text())["status"] == "finished"
    again = subprocess.run(
        [sys.executable, "-c", code, *args[:1], f"runs={tmp_path}/nowhere"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 1
    assert again.stderr.startswith(f"error: runs={tmp_path}/nowhere: there is no run")
    assert len(again.stderr.splitlines()) == 1


# Runs of no sweep


def lines_of(tmp_path: Path, *names: str) -> list[list[str]]:
    """The names of the runs on each line of the table."""
    sweep = collect([tmp_path / name for name in names], tmp_path / "report", "eval_loss")
    board = build_leaderboard(sweep)
    head, lines = table(board)
    assert head[1] == "run"
    assert fit(board, 40)[0][0].split()[0] == "run"
    assert [line[1] for line in lines] == [board.names[str(row.jobs[0].folder)] + (
        f" and {len(row.jobs) - 1} more" if len(row.jobs) > 1 else "") for row in board.rows]  # fmt: skip
    return [sorted(job.name for job in row.jobs) for row in board.rows]


def test_runs_are_averaged_where_their_configs_are_equal_but_for_the_seed(tmp_path: Path) -> None:
    for name, overrides in {"a": ["seed=0"], "b": ["seed=1"], "c": ["seed=1", "lora.r=5"]}.items():
        write_run(tmp_path / name, overrides)
    assert sorted(lines_of(tmp_path, "a", "b", "c")) == [["a", "b"], ["c"]]


def test_a_run_whose_config_is_not_known_is_like_no_other(tmp_path: Path) -> None:
    for name in "abc":
        write_run(tmp_path / name, [f"seed={ord(name)}"])
    for name in "bc":
        (tmp_path / name / "config.yaml").unlink()
    assert sorted(lines_of(tmp_path, "a", "b", "c")) == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize("part", ["base", "data"])
def test_runs_on_other_rows_or_another_base_are_not_averaged(tmp_path: Path, part: str) -> None:
    for name in "abc":
        path = write_run(tmp_path / name, [f"seed={ord(name)}"]) / "result.json"
        measured = {"base": {"fingerprint": "x"}, "data": {"fingerprint": "y"}}
        measured[part]["fingerprint"] = "z" if name == "c" else "w"
        path.write_text(json.dumps({**json.loads(path.read_text()), "measured": measured}))
    assert sorted(lines_of(tmp_path, "a", "b", "c")) == [["a", "b"], ["c"]]


def test_at_most_eight_keys_have_a_column_and_the_rest_is_named(tmp_path: Path) -> None:
    changed = [f"data.{name}=7" for name in ("source_max_len", "target_max_len", "max_length", "max_train_samples")]
    changed += [
        f"trainer.{name}=7" for name in ("max_steps", "save_steps", "eval_steps", "gradient_accumulation_steps")
    ]
    changed += ["lora.r=7", "generation.max_new_tokens=7"]
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", changed)
    sweep = collect([tmp_path / "a", tmp_path / "b"], tmp_path / "report", "eval_loss")
    board = build_leaderboard(sweep)
    assert (len(board.columns), set(board.columns) | set(board.left_out)) == (8, set(board.keys))
    assert len(board.left_out) >= 1
    assert all(f"`{key}`" in to_markdown(board, "x") for key in board.left_out)
    (tmp_path / "report").mkdir()
    page = write_report(sweep, is_sweep=False).read_text()
    assert f"{len(board.left_out)} more keys differ" in page


def test_a_list_names_runs_in_its_order(sweep: Path, tmp_path: Path) -> None:
    for name in "ab":
        write_run(tmp_path / "runs" / name)
    assert names(find_runs(f"{tmp_path}/runs/b", f"{tmp_path}/runs/*")) == ["b", "a"]
    with pytest.raises(UserError, match=r"^runs=.*/runs/c: there is no run"):
        find_runs(f"{tmp_path}/runs/a", f"{tmp_path}/runs/c")
    for wrong in ("runs=[]", "runs={a: 1}", "runs=[a,[b]]"):
        with pytest.raises(UserError, match=r"^runs"):
            compose(["task=report", wrong])


def test_two_runs_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = [("2 + 2?", "4", "4"), ("<b>x</b>?", "y", "z"), ("again?", None, "no")]
    for name, overrides, change in (("a", ["lora.r=4"], ""), ("b", ["lora.r=8"], "!")):
        answers = [{"input": asked, "reference": expected, "prediction": answer + (change if number else "")}
                   for number, (asked, expected, answer) in enumerate(said)]  # fmt: skip
        write_run(tmp_path / name, overrides, answers=answers)
    config = compose(["task=report", f"runs=[{tmp_path}/a,{tmp_path}/b]"])
    pair = report(config, tmp_path / "report").to_dict()["side_by_side"]
    assert list(pair["names"]) == ["a", "b"]
    assert ("lora.r", "4", "8") in [tuple(line) for line in pair["settings"]]
    assert pair["shared"] == 3
    differing = [
        tuple(answer[key] for key in ("asked", "reference", "first", "second")) for answer in pair["differing"]
    ]
    assert differing == [("<b>x</b>?", "y", "z", "z!"), ("again?", None, "no", "no!")]
    printed = capsys.readouterr().out
    assert "a beside b" in printed
    assert "both answered 3 rows, 1 of them alike" in printed
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Side by side" in page
    assert "<b>x</b>?" not in page.replace("&lt;b&gt;x&lt;/b&gt;?", "")


def test_evaluations_stand_apart_and_an_unfinished_run_is_known_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "trained", ["lora.r=4"])
    for task, loss in (("evaluate", 0.001), ("predict", 0.002)):
        folder = tmp_path / task
        folder.mkdir()
        overrides = [f"task={task}", f"adapter={tmp_path}/trained/adapter"]
        (folder / "config.yaml").write_text(dump_config(compose(overrides)))
        result = {"objective": loss, "metrics": {"eval_loss": loss, "base_eval_loss": 3.0}, "task": task}
        (folder / f"{task}.json").write_text(json.dumps(result))
        status = {"status": "finished", "overrides": overrides, "result": f"{task}.json"}
        (folder / "status.json").write_text(json.dumps(status))
    write_run(tmp_path / "stopped", [f"data.path={'x' * 300}"], status="interrupted")
    result = report(compose(["task=report", f"runs={tmp_path}"]), tmp_path / "report")
    printed = capsys.readouterr().out
    ranked, _, apart = printed.partition("Evaluations and predictions\n")
    assert [line.split()[:2] for line in ranked.splitlines() if line[:1].isdigit()] == [["1", "trained"]]
    assert "  stopped: interrupted" in ranked.splitlines()
    assert [line.split()[:4] for line in apart.splitlines()[1:3]] == [
        ["evaluate", "evaluate", "trained", "0.001"],
        ["predict", "predict", "trained", "0.002"],
    ]
    assert "null" not in printed
    assert result.metrics == {"report_runs": 4, "report_finished": 3}
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("not ranked") == 1
    assert "| evaluate | evaluate | trained | 0.001 |" in (tmp_path / "report" / "leaderboard.md").read_text()


def test_three_runs_are_not_laid_side_by_side(tmp_path: Path) -> None:
    for name in "abc":
        write_run(tmp_path / name)
    config = compose(["task=report", f"runs={tmp_path}/?"])
    assert "side_by_side" not in report(config, tmp_path / "report").to_dict()


def test_what_follows_from_the_model_is_not_laid_side_by_side(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(EMBEDDED["tiny"], base)
    write_run(tmp_path / "a", ["lora.r=4"])
    write_run(tmp_path / "b", ["lora.r=4", f"model.name={base}"])
    config = compose(["task=report", f"runs=[{tmp_path}/a,{tmp_path}/b]"])
    pair = report(config, tmp_path / "report").to_dict()["side_by_side"]
    keys = [key for key, _, _ in pair["settings"]]
    assert "model.name" in keys
    assert not [key for key in keys if key.startswith(("model.architecture", "model.license"))]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<wbr>base</td>" in page
