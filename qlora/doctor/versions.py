"""Which versions of packages do not work together: what their authors require, and what they do not say."""

from __future__ import annotations

import functools
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from qlora.doctor.findings import Finding, Status, fail, fine, warn
from qlora.runtime.versions import LIBRARIES, installed_version

OPTIONAL = ("triton",)
OLDEST_PYTHON = (3, 11)


@dataclass(frozen=True)
class BadPair:
    """Versions that break each other although pip installs them together."""

    first: str
    second: str
    """A requirement each, e.g. `peft<0.18`; both hold for a bad pair."""
    status: Status
    says: str
    fix: str
    source: str


BAD_PAIRS = (
    BadPair(
        "transformers>=5.0", "peft<0.18", Status.error,
        "this PEFT imports HybridCache, which transformers 5 no longer has", "pip install -U peft",
        "https://github.com/huggingface/peft/issues/3333, https://github.com/huggingface/transformers/pull/41889",
    ),
    BadPair(
        "bitsandbytes<0.45", "triton>=3.2", Status.error,
        "this bitsandbytes imports triton.ops, which Triton 3.2 no longer has", "pip install -U bitsandbytes",
        "https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1492",
    ),
    BadPair(
        "torch>=2.9", "torch<2.10", Status.warning,
        "this torch has no attention over rows of different lengths, so trainer.fused_attention stays off",
        "pip install -U torch (2.10 or later)", "torch.nn.attention.varlen, see step/kernels/attention.py",
    ),
)  # fmt: skip
"""Each with its source. bitsandbytes' repacking of 4-bit weights on CPUs with AVX512-BF16, which drops gradients after
an evaluation, is worked around (`models/loading.py`), and task=doctor looks at the gradients themselves."""


def check_python() -> Iterator[Finding]:
    """Looks at the interpreter."""
    says = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info >= OLDEST_PYTHON:
        yield fine("python", says)
    else:
        yield fail("python", f"{says} is too old", f"install Python {'.'.join(map(str, OLDEST_PYTHON))} or later")


def check_versions() -> Iterator[Finding]:
    """Looks at the packages that a run needs: all there, as their authors require, and no known bad pair."""
    installed = {name: installed_version(name) for name in LIBRARIES}
    for name, version in installed.items():
        if version is None and name not in OPTIONAL:
            yield fail(name, "is not installed", f"pip install {name}")
    problems = list(_unmet()) + [pair for pair in BAD_PAIRS if _is_there(pair)]
    for problem in problems:
        if isinstance(problem, BadPair):
            names = [Requirement(text).name for text in (problem.first, problem.second)]
            pair = " with ".join(dict.fromkeys(f"{name} {installed[name]}" for name in names))
            says = f"{pair}: {problem.says} ({problem.source})"
            yield Finding("versions", problem.status, says, problem.fix)
        else:
            package, needed = problem
            there = installed.get(needed.name, installed_version(needed.name))
            yield warn("versions", f"{package} asks for {needed.name}{needed.specifier}, but {there} is installed",
                       f"pip install '{needed.name}{needed.specifier}'")  # fmt: skip
    if not problems:
        named = ", ".join(f"{name} {version}" for name, version in installed.items() if version is not None)
        yield fine("versions", named)


def _unmet() -> Iterator[tuple[str, Requirement]]:
    """Yields what a package of ours requires of another and does not get."""
    for package in ("qlora", *LIBRARIES):
        for requirement in _requirements(package):
            version = installed_version(requirement.name) if requirement.name in LIBRARIES else None
            if version is not None and not requirement.specifier.contains(version, prereleases=True):
                yield package, requirement


@functools.cache
def _requirements(package: str) -> tuple[Requirement, ...]:
    """Returns what an installed package requires here, without extras."""
    try:
        texts = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return ()
    installed = []
    for text in texts:
        if "extra ==" in text or not text.replace("_", "-").lower().startswith(
            tuple(name.replace("_", "-") for name in LIBRARIES)
        ):
            continue
        try:
            requirement = Requirement(text)
        except InvalidRequirement:  # no package of ours writes one; another's is its own affair
            continue
        requirement.name = next(
            (name for name in LIBRARIES if name.replace("_", "-") == requirement.name.replace("_", "-").lower()),
            requirement.name,
        )
        if requirement.marker is None or requirement.marker.evaluate():
            installed.append(requirement)
    return tuple(installed)


def _is_there(pair: BadPair) -> bool:
    return _holds(Requirement(pair.first)) and _holds(Requirement(pair.second))


def _holds(requirement: Requirement) -> bool:
    version = installed_version(requirement.name)
    if version is None:
        return False
    try:
        plain = Version(version).base_version  # 2.13.0+cpu is 2.13.0
    except InvalidVersion:
        return False
    return SpecifierSet(str(requirement.specifier)).contains(plain, prereleases=True)
