"""`task=export`: writes what `adapter` names as a GGUF file, for llama.cpp and what is built on it."""

from __future__ import annotations

from pathlib import Path

from qlora.config.paths import expand_home, short_path
from qlora.config.schema import Config, ExportFormat, GgufType
from qlora.errors import ConfigError
from qlora.reporting.manifest import write_json
from qlora.runtime import console
from qlora.runtime.needs import Needs, Rows
from qlora.runtime.task_result import TaskResult
from qlora.tasks.protocol import TaskJob
from qlora.tasks.used import describe_used

ENDING = ".gguf"


def needs(config: Config) -> Needs:
    """Returns what writing needs: a merge is compared on held-out rows, an adapter or a base alone on none."""
    merges = config.export.format is ExportFormat.gguf and config.adapter != "none"
    rows = Rows.held_out if merges else Rows.none
    return Needs(torch=True, base=True, rows=rows, saved_template=True, caches=True)


def run(job: TaskJob) -> TaskResult:
    """Writes the file and, where Ollama can serve it, a `Modelfile` beside it."""
    _check(job.config)
    from qlora.export.gguf_package import load_gguf
    from qlora.tasks.exported_file import write_adapter, write_model

    load_gguf(f"export.format={job.config.export.format.value}")
    adapter, full = job.session.trained
    if job.config.export.format is ExportFormat.gguf:
        written = write_model(job, _path(job, adapter or full))
    elif adapter is None:
        what = f"{short_path(full)} is a whole model" if full is not None else "adapter=none names no adapter"
        raise ConfigError(f"export.format=gguf-adapter: {what}; use export.format=gguf")
    else:
        written = write_adapter(job, _path(job, adapter))
    metrics = {"export_gb": written.file.stat().st_size / 1e9, **written.metrics}
    paths = {"gguf": written.file, "base": written.base, "modelfile": written.modelfile}
    result = TaskResult("export", metrics, {name: str(path) for name, path in paths.items() if path is not None},
                        more={"measured": describe_used(job)})  # fmt: skip
    write_json(job.folder.result("export"), result.to_dict())
    rows: list[tuple[str, float | None, float | None, str]] = [
        (name, None, value, "") for name, value in metrics.items()
    ]
    files = [(name, short_path(Path(path))) for name, path in result.paths.items()]
    console.summary(f"exported: {short_path(written.file)}", rows, [], files, written.commands)
    for line in written.notes:
        console.say(f"  {line}")
    return result


def _check(config: Config) -> None:
    """Refuses, before anything is loaded, what cannot be written here."""
    export = config.export
    if export.path is not None and not export.path.endswith(ENDING):
        raise ConfigError(f"export.path must name a file that ends in {ENDING}, got {export.path!r}")
    if export.type is not GgufType.q4_k_m:
        return
    if export.format is ExportFormat("gguf-adapter"):
        raise ConfigError("export.type=q4_k_m is for whole models; an adapter is written in f16 or q8_0")
    from qlora.export.quantize import find_quantizer

    find_quantizer()


def _path(job: TaskJob, trained: Path | None) -> Path:
    """Returns the file to write: `export.path`, or one in the run's folder that is named after what was trained."""
    export = job.config.export
    if export.path is not None:
        return expand_home(export.path, "export.path").absolute()
    if trained is None:
        name = Path(job.config.model.name).name
    else:
        name = trained.absolute().parent.name if trained.name in ("adapter", "model", "merged") else trained.name
    kind = "adapter-" if export.format is not ExportFormat.gguf else ""
    return job.folder.path / f"{name}-{kind}{export.type.value}{ENDING}"
