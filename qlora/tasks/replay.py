"""`task=replay`: repeats a finished training run in a new folder, and compares what both give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from qlora.config import saved_config
from qlora.config.paths import short_path
from qlora.config.schema import Config, TaskName
from qlora.errors import ConfigError, DamagedFile, DataError, RunError
from qlora.reporting.manifest import write_json
from qlora.runtime import console, distributed
from qlora.runtime.needs import Needs
from qlora.runtime.run_folder import RunFolder, is_below
from qlora.runtime.sweep_job import key_of
from qlora.runtime.task_result import TaskResult
from qlora.tasks import train
from qlora.tasks.protocol import TaskJob
from qlora.text import quoted

if TYPE_CHECKING:  # which imports torch
    from qlora.tasks.compare_runs import Comparison

SAID = ("task", "run", "trusted", "model.trust_remote_code")
"""What is always the command line's to say."""
OWN_KEYS = ("name", "tracking", "resume", "base")
"""The keys of a replay that replace those of the training."""


def needs(config: Config) -> Needs:
    """Returns what a replay needs before it knows the config of the training run that it repeats."""
    return Needs(torch=True, several_processes=True, deterministic=True, caches=True)


def run(job: TaskJob) -> TaskResult:
    """Repeats the training run of `run=`, prints and writes the comparison; raises `RunError` for a real difference.

    An override of the command that describes a training run is refused, for the saved config does that. Several
    processes repeat it together, as many as before; the main process compares.
    """
    from qlora.models.fingerprint import read_run_base
    from qlora.tasks.compare_runs import compare

    config = job.config
    assert config.run is not None, "Config checks it"
    if ignored := [text for text in job.overrides if not is_below(key_of(text), (*SAID, *OWN_KEYS))]:
        raise ConfigError(
            f"{ignored[0]} would not be read: task=replay trains with the saved config of run={config.run}; leave it "
            f"out, or train without task=replay (a replay reads {', '.join(OWN_KEYS)} alone)"
        )
    first = RunFolder(Path(config.run).expanduser())
    saved, manifest = _read_finished(first)
    if first.path.resolve() == job.folder.path.resolve():
        raise RunError(f"run={config.run}: it cannot be repeated in its own folder; choose another hydra.run.dir")
    if (previous := manifest.get("processes", 1)) != distributed.world_size():
        raise RunError(
            f"run={config.run}: it was trained by {previous} process{'es' if previous > 1 else ''}, and this is "
            f"{distributed.world_size()}, whose steps would hold other rows; start as many (torchrun --nproc-per-node "
            "N -m qlora task=replay ...)"
        )
    training = saved_config.restore_config(saved_config.with_trust_of(config, saved, first.config), first.config)
    training = replace(training, **{name: getattr(config, name) for name in OWN_KEYS})
    command = job.overrides or ["task=replay", f"run={quoted(config.run)}"]
    repeated = TaskJob(
        training,
        job.folder,
        list(manifest.get("overrides", [])),
        None,
        train.needs(training),
        command=command,
        typed=job.typed,
    )
    trained = read_run_base(first)
    assert trained is not None, "_read_finished checks it"
    repeated.session.check_base(f"run={config.run}", trained)
    result = train.run(repeated)
    if not distributed.is_main_process():
        return replace(result, objective=None)
    return _report(list(compare(first, job.folder)), first, job.folder)


def _read_finished(folder: RunFolder) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns config and manifest of a finished training run; raises `DataError` for a folder that holds none."""
    saved, manifest = saved_config.read_config(folder.config), folder.stored_manifest()
    if saved is None or manifest is None or folder.stored_result("train") is None:
        raise DataError(
            f"run={folder.path}: it holds no finished training run (config.yaml, manifest.json and result.json); give "
            "the folder of one"
        )
    for name in ("config", "data", "model"):
        if name not in manifest:
            raise DamagedFile(folder.manifest, f"{name} is missing")
    if (task := saved.get("task", {}).get("name")) != TaskName.train.value:
        raise DataError(f"run={folder.path}: only training runs can be repeated, not task={task}")
    return saved, manifest


def _report(comparisons: list[Comparison], first: RunFolder, second: RunFolder) -> TaskResult:
    """Prints and writes the comparison; raises `RunError` where a difference is not to be expected."""
    from qlora.tasks.compare_runs import Verdict

    styles = {Verdict.same: "green", Verdict.near: "yellow", Verdict.differs: "bold red"}
    wrong = [comparison for comparison in comparisons if comparison.verdict is Verdict.differs]
    console.say()
    console.say(Text(f"{second.path} beside {first.path}", style="bold"))
    for comparison in comparisons:
        mark = Text(f"  {comparison.verdict.value:<9}", style=styles[comparison.verdict])
        console.say(Text.assemble(mark, (f"{comparison.what:<15}", "cyan"), comparison.says), hang=26)
    path = second.result("replay")
    lines = [{"what": line.what, "verdict": line.verdict.value, "says": line.says} for line in comparisons]
    result = TaskResult(
        "replay",
        {f"replay_{kind.value}": sum(line.verdict is kind for line in comparisons) for kind in Verdict},
        {"replay": str(path)},
        more={"run": str(first.path), "comparisons": lines},
    )
    write_json(path, result.to_dict())
    console.say_rows([("replay", short_path(path))])
    if wrong:
        names = ", ".join(comparison.what for comparison in wrong)
        raise RunError(f"task=replay: {names}: not what {first.path} gave ({wrong[0].says})")
    return result
