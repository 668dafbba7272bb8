"""`task=doctor`: checks whether this machine can run what the config asks for."""

from __future__ import annotations

from dataclasses import asdict

from qlora.config.schema import Config
from qlora.doctor import count_findings, examine, print_finding, stop_at_errors
from qlora.runtime import console
from qlora.runtime.needs import Needs
from qlora.runtime.task_result import TaskResult
from qlora.tasks.lora_start import with_start
from qlora.tasks.protocol import TaskJob
from qlora.text import plural


def needs(config: Config) -> Needs:
    """Returns what the checks need: they import torch themselves, for it may be what is broken."""
    return Needs(folder=False)


def run(job: TaskJob) -> TaskResult:
    """Checks everything, and prints the table; writes nothing. Raises `UserError` where something is an error."""
    findings = []
    console.start_screen([])
    for finding in examine(with_start(job.config, job.overrides), job.folder.path):
        findings.append(finding)
        print_finding(finding)
    counts = count_findings(findings)
    console.say()
    console.say(
        ", ".join(f"{count} ok" if name == "ok" else plural(count, name) for name, count in counts.items() if count)
    )
    stop_at_errors(findings, "task=doctor")
    lines = [asdict(finding) | {"status": finding.status.value} for finding in findings]
    return TaskResult(
        "doctor", {f"doctor_{name}": count for name, count in counts.items()}, {}, more={"findings": lines}
    )
