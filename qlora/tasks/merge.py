"""`task=merge`: makes one model of the base and the adapter, if it answers as they do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qlora.config.saved_config import config_to_dict, flatten, read_config
from qlora.config.schema import Config
from qlora.errors import ConfigError
from qlora.reporting.manifest import write_json
from qlora.runtime.needs import Needs, Rows
from qlora.runtime.task_result import TaskResult
from qlora.tasks.measured import load_model
from qlora.tasks.protocol import TaskJob
from qlora.tasks.used import describe_used

if TYPE_CHECKING:  # which imports torch
    from peft import PeftModel

    from qlora.tasks.merged_model import Merge

MACHINE_KEY = "quantization.compute_dtype"
"""`auto` may be another precision on another machine."""


def needs(config: Config) -> Needs:
    """Returns what merging needs; held-out rows are the prompts of the comparison."""
    return Needs(torch=True, base=True, rows=Rows.held_out, saved_template=True, caches=True)


def run(job: TaskJob) -> TaskResult:
    """Writes the model to `merged/` and the comparison to `merge_report.json`."""
    from qlora.tasks.merged_model import REPORT

    session, folder = job.session, job.folder
    adapter, full = session.trained
    if adapter is None:
        what = f"adapter={job.config.adapter or full}: it is a whole model" if full else "adapter=none"
        raise ConfigError(
            f"{what}, so there is nothing to merge; give adapter=FOLDER of an adapter or of a finished run"
        )
    check_quantization(job, adapter)
    job.create_folder()
    merge = build_merge(job, job.config)
    report = folder.path / REPORT
    comparison = merge.run(folder.merged, report)
    metrics = {f"merge_{name}": comparison[name] for name in ("kl_mean", "kl_max", "top1_agreement")}
    result = TaskResult("merge", metrics, {"merged": str(folder.merged), "report": str(report)},
                        more={"measured": describe_used(job)})  # fmt: skip
    write_json(folder.result("merge"), result.to_dict())
    merge.print_summary(folder.merged, comparison, list(result.paths.items()))
    return result


def build_merge(job: TaskJob, config: Config) -> Merge:
    """Returns what merges the adapter of a job by the group `merge` of `config`, and compares on held-out rows."""
    from qlora.tasks.merged_model import PROMPT_TOKENS, Merge

    session = job.session
    held_out = session.measurer.rows
    rows = held_out.select(range(min(config.merge.prompts, len(held_out))))
    session.tokenizer.chat_template = session.saved_template or session.data.template.text
    return Merge(
        config=config,
        load=lambda: _load(job),
        tensors=session.tensors,
        model_config=session.model_config,
        tokenizer=session.tokenizer,
        prompts=[ids[:PROMPT_TOKENS] for ids in rows["input_ids"]],
        placement=session.placement,
        name=session.run_name,
    )


def _load(job: TaskJob) -> PeftModel:
    from peft import PeftModel

    model = load_model(job)
    assert isinstance(model, PeftModel)
    return model


def check_quantization(job: TaskJob, adapter: Path) -> None:
    """Raises `ConfigError` if the adapter was trained on other bits, which the comparison would not show."""
    saved = read_config(adapter.parent / job.folder.config.name)
    if saved is None:
        return
    trained, present = (dict(flatten({"quantization": config.get("quantization", {})}))
                        for config in (saved, config_to_dict(job.config)))  # fmt: skip
    if changed := [key for key in trained if trained[key] != present.get(key) and key != MACHINE_KEY]:
        overrides = " ".join(f"{key}={str(trained[key]).lower()}" for key in changed)
        raise ConfigError(
            f"adapter={job.config.adapter}: it was trained on other base weights than the config asks for, and it "
            f"must be compared on those it was trained on; set {overrides}"
        )
