"""`task=verify`: asks the engine that will serve, and proves that it answers as the adapter on its base."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.config.paths import expand_home, short_path
from qlora.config.schema import Config
from qlora.errors import ConfigError, DamagedFile, RunError
from qlora.reporting.certificate import add_to_card
from qlora.reporting.manifest import write_json
from qlora.runtime import console
from qlora.runtime.atomic_files import read_record
from qlora.runtime.needs import Needs, Rows
from qlora.runtime.run_folder import RunFolder
from qlora.runtime.task_result import TaskResult
from qlora.runtime.trained import RUNS
from qlora.tasks.measured import load_model
from qlora.tasks.protocol import TaskJob
from qlora.tasks.used import describe_used

if TYPE_CHECKING:  # which imports torch
    from qlora.tasks.trained_side import TrainedSide
    from qlora.verify.comparison import Verdict
    from qlora.verify.engine import Engine, Served

CERTIFICATE = "certificate.json"


def needs(config: Config) -> Needs:
    """Returns what the comparison needs: held-out rows are its prompts, and its chats are made of them."""
    return Needs(torch=True, base=True, rows=Rows.held_out, saved_template=True, caches=True)


def run(job: TaskJob) -> TaskResult:
    """Writes `certificate.json` and a line in the model card; raises `RunError` with the cause where they differ."""
    from qlora.tasks.trained_side import TrainedSide
    from qlora.verify.comparison import compare, describe, to_record

    adapter, full = job.session.trained
    if adapter is None and full is None:
        raise ConfigError("adapter=none: there is nothing that was trained; give adapter=FOLDER of a finished run")
    trained = adapter or full
    assert trained is not None
    used = describe_used(job)
    path = _path(job, trained, used)
    job.create_folder()
    side = TrainedSide.of(job, load_model(job))
    engine = _open(job, path, side)
    try:
        served = engine.served
        total = len(side.chats) + len(side.probes)
        with console.progress(f"asking {served.name}", total) as update:
            verdict = compare(engine, side.probes, side.chats, side.endings, max_kl=job.config.verify.max_kl,
                              show=side.show, on_progress=update)  # fmt: skip
    finally:
        engine.close()
    record = to_record(served, verdict) | {"measured": used}
    certificate = job.folder.path / CERTIFICATE
    write_json(certificate, record)
    if not verdict.accepted:
        raise RunError(
            f"verify.engine={job.config.verify.engine}: {served.what} does not serve what was trained: "
            f"{'; and '.join(verdict.causes)}; {certificate} says all"
        )
    for card in (trained.parent / "README.md", trained / "README.md"):
        add_to_card(card, served.name, describe(served, verdict))
    metrics = {f"verify_{name}": record[name] for name in ("kl_mean", "kl_max", "top1_agreement")}
    metrics["verify_equal_chats"] = verdict.equal_chats / max(verdict.chats, 1)
    result = TaskResult("verify", metrics, {"certificate": str(certificate)}, more={"measured": used})
    write_json(job.folder.result("verify"), result.to_dict())
    _print(served, verdict, result)
    return result


def _path(job: TaskJob, trained: Path, used: Mapping[str, Any]) -> Path | None:
    """Returns what the engine loads; None: a server has it. Raises `ConfigError` where nothing is named or known."""
    verify = job.config.verify
    if verify.engine.startswith("http"):
        if verify.path is not None:
            raise ConfigError(
                "verify.path is loaded by verify.engine=transformers or llama-cpp; a server has its own model"
            )
        return None
    if verify.path is not None:
        return expand_home(verify.path, "verify.path")
    what, task, name, pattern = {
        "transformers": ("folder of a merged model", "merge", "merged", "merged"),
        "llama-cpp": ("GGUF file", "export", "gguf", "*.gguf"),
    }[verify.engine]
    beside = [path for folder in (trained.parent, job.folder.path) for path in sorted(folder.glob(pattern))]
    candidates = [*beside, *_written(trained, used["adapter"]["digest"], task, name)]
    existing = [path for path in candidates if path.exists() and "-adapter-" not in path.name]
    if not existing:
        raise ConfigError(
            f"verify.path is not set, and there is no {what} of {short_path(trained.parent)}; write one with qlora "
            f"{task} {short_path(trained.parent)}, or name one with verify.path"
        )
    return max(existing, key=lambda path: path.stat().st_mtime)


def _written(trained: Path, digest: str, task: str, name: str) -> Iterator[Path]:
    """Yields what a task wrote of the same weights into a folder of its own, beside the run or where runs lie."""
    for parent in {trained.absolute().parent.parent, RUNS.absolute()}:
        for folder in sorted(parent.glob("*/")):
            with contextlib.suppress(DamagedFile):  # of another run
                result = read_record(RunFolder(folder).result(task)) or {}
                measured = result.get("measured", {}).get("adapter") or {}
                if measured.get("digest") == digest and name in result["paths"]:
                    yield Path(result["paths"][name])


def _open(job: TaskJob, path: Path | None, side: TrainedSide) -> Engine:
    verify, session = job.config.verify, job.session
    if verify.lora is not None and verify.engine != "llama-cpp":
        raise ConfigError("verify.lora is read by verify.engine=llama-cpp; leave it out")
    if path is None:
        from qlora.verify.openai_server import OpenAIServer

        return OpenAIServer(verify.engine, session.tokenizer, top=verify.top, model=verify.model)
    if verify.engine == "llama-cpp":
        from qlora.verify.llama_cpp_engine import LlamaCppEngine

        lora = None if verify.lora is None else expand_home(verify.lora, "verify.lora")
        return LlamaCppEngine(path, session.tokenizer, lora=lora, top=verify.top, vocabulary=side.vocabulary,
                              context=side.context)  # fmt: skip
    from qlora.verify.transformers_engine import TransformersEngine

    trust = job.config.model.trust_remote_code
    return TransformersEngine(path, device=session.placement.device, trust_remote_code=trust)


def _print(served: Served, verdict: Verdict, result: TaskResult) -> None:
    divergence = verdict.divergence
    over = "" if divergence.compared is None else f" over the {divergence.compared} likeliest tokens"
    chats = "by their number of tokens" if verdict.counted_only else "token by token"
    rows: list[tuple[str, float | None, float | None, str]] = [
        ("kl_divergence", None, divergence.kl_mean, f"nats a token{over}, at most {verdict.max_kl:.2g}"),
        ("largest_kl_divergence", None, divergence.kl_max, f"of {divergence.tokens} positions"),
        ("same_likeliest_token", None, divergence.top1_agreement, f"share of {divergence.tokens} positions"),
        ("equal_chats", None, result.metrics["verify_equal_chats"], f"share of {verdict.chats} chats, {chats}"),
    ]
    if divergence.adapter_kl is not None:
        rows.append(("adapter_kl", None, divergence.adapter_kl, "what the adapter changes, in the same measure"))
    files = [(name, short_path(Path(path))) for name, path in result.paths.items()]
    console.summary(f"verified: {served.name} serves what was trained", rows, [], files, [])
    if verdict.chats == 0:
        console.say("  no server can ask with the tokens of the training, so the chat template was not compared")
    if verdict.endings == 0:
        console.say("  no held-out answer ends in a token of its own, so the end token was not tested")
