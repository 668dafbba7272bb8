"""Checks whether this machine can run what the config asks for; a short form begins every training run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from rich.text import Text

from qlora.config.schema import Config
from qlora.doctor.findings import Finding, Status, look
from qlora.doctor.gpu_libraries import check_bitsandbytes, check_quantizer, check_torch
from qlora.doctor.machine import check_disk, check_environment, check_hub, check_memory, check_rights, check_tracking
from qlora.doctor.trial_step import check_step, check_support
from qlora.doctor.versions import check_python, check_versions
from qlora.errors import ResourceError
from qlora.runtime import console

STYLES = {Status.ok: "green", Status.warning: "yellow", Status.error: "bold red"}
TESTED = "install the tested versions: pip install -c constraints.txt"


def examine(config: Config, folder: Path) -> Iterator[Finding]:
    """Yields what all checks find, in the order of the table; what needs torch is left out where that is broken."""
    yield from look("python", check_python, "install Python 3.11 or later")
    yield from look("versions", check_versions, TESTED)
    yield from look("quantization", partial(check_quantizer, config), TESTED)
    broken = False
    for finding in look("torch", partial(check_torch, config), TESTED):
        broken = broken or (finding.name == "torch" and finding.status is Status.error)
        yield finding
    if not broken:
        yield from look("bitsandbytes", partial(check_bitsandbytes, config), TESTED)
        yield from look("attention", partial(check_support, config), TESTED)
        yield from look("training step", partial(check_step, config), TESTED)
        yield from look("memory", partial(check_memory, config), "task=plan shows what the run needs")
    yield from look("disk", partial(check_disk, config, folder), "choose hydra.run.dir=FOLDER elsewhere")
    yield from look("write rights", partial(check_rights, config, folder), "choose hydra.run.dir=FOLDER elsewhere")
    yield from look("hub", partial(check_hub, config), TESTED)
    yield from look("tracking", partial(check_tracking, config), "tracking=none")
    yield from look("environment", check_environment, "unset what you did not mean")


def preflight(config: Config) -> None:
    """Prints the problems that are found at once; raises `ResourceError` where one is an error. Takes some 30 ms."""
    findings = [
        *look("versions", check_versions, TESTED),
        *look("quantization", partial(check_quantizer, config), TESTED),
        *look("torch", partial(check_torch, config), TESTED),
        *look("bitsandbytes", partial(check_bitsandbytes, config), TESTED),
    ]
    for finding in findings:
        if finding.status is not Status.ok:
            print_finding(finding)
    stop_at_errors(findings, "this machine cannot run it")


def count_findings(findings: Iterable[Finding]) -> dict[str, int]:
    """Returns how many findings there are of each kind."""
    findings = list(findings)
    return {status.value: sum(finding.status is status for finding in findings) for status in Status}


def print_finding(finding: Finding) -> None:
    """Prints a line of the table, and the fix below it."""
    mark = Text(f"  {finding.status.value:<9}", style=STYLES[finding.status])
    console.say(Text.assemble(mark, (f"{finding.name:<16}", "cyan"), finding.says), hang=27)
    if finding.fix:
        console.say(Text.assemble(" " * 27, ("fix: ", "dim"), finding.fix), hang=32)


def stop_at_errors(findings: list[Finding], what: str) -> None:
    """Raises `ResourceError` where a finding is an error; `what` begins its message."""
    errors = [finding for finding in findings if finding.status is Status.error]
    if errors:
        first = errors[0]
        more = f", and {len(errors) - 1} more above" if len(errors) > 1 else ""
        raise ResourceError(f"{what}: {first.name}: {first.says}; {first.fix}{more}")
