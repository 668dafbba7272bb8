"""`task=push`: uploads what `adapter` names, its model card and what was measured, to the hub."""

from __future__ import annotations

from pathlib import Path

from qlora.config.paths import short_path
from qlora.config.schema import Config
from qlora.errors import ConfigError
from qlora.models.hub import push
from qlora.reporting.manifest import write_json
from qlora.reporting.model_card import card_on_hub
from qlora.runtime import console
from qlora.runtime.needs import Needs
from qlora.runtime.task_result import TaskResult
from qlora.tasks.protocol import TaskJob
from qlora.tasks.used import describe_used

BESIDE = ("loss.png", "metrics.json")
"""What a finished run has beside its adapter."""


def needs(config: Config) -> Needs:
    """Returns what an upload needs; it uses no base, so the adapter may be of any."""
    return Needs(torch=True, caches=True)


def run(job: TaskJob) -> TaskResult:
    """Uploads to the repository `repo`; the address of the commit goes to `push.json`."""
    assert job.config.repo is not None, "Config checks it"
    adapter, full = job.session.trained
    folder = adapter or full
    if folder is None:
        raise ConfigError("adapter=none: there is nothing to push; give adapter=FOLDER of an adapter or a run")
    job.create_folder()
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    files |= {name: folder.parent / name for name in BESIDE if (folder.parent / name).is_file()}
    if isinstance(card := files.get("README.md"), Path):
        files["README.md"] = card_on_hub(card.read_text(encoding="utf-8"), job.config.repo).encode()
    url = push(
        files,
        repo=job.config.repo,
        private=job.config.task.private,
        message=f"{folder.name} of {folder.absolute().parent.name}, by qlora",
    )
    console.say_rows([("pushed", f"{len(files)} files of {short_path(folder)}"), ("commit", url)])
    result = TaskResult("push", {}, {"commit": url}, more={"measured": describe_used(job)})
    write_json(job.folder.result("push"), result.to_dict())
    return result
