"""The wheel and the sdist hold what they must, and the wheel works away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import qlora

ROOT = Path(__file__).parent.parent
COPIED = ("qlora", "conf", "tests", "docs", "benchmarks", ".ci", "outputs")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, so that a build leaves nothing in the checkout, with a run that must not be shipped."""
    folder = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "runs", "sweeps", "dist", "build")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for file in ("pyproject.toml", "README.md", "LICENSE", "constraints.txt", ".gitignore"):
        shutil.copy(ROOT / file, folder)
    (folder / "outputs" / "runs" / "secret").mkdir(parents=True)
    (folder / "outputs" / "runs" / "secret" / "result.json").write_text("{}", encoding="utf-8")
    return folder


def build(source: Path, out: Path, kind: str) -> list[Path]:
    """Builds with hatchling as installed, without a network."""
    arguments = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(out)]
    done = subprocess.run(arguments, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(out.iterdir())


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    [path] = build(source, tmp_path_factory.mktemp("sdist"), "sdist")
    return path


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    [path] = build(source, tmp_path_factory.mktemp("wheel"), "wheel")
    return path


def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def files_below(folder: Path, prefix: str) -> set[str]:
    return {
        f"{prefix}/{path.relative_to(folder).as_posix()}"
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_the_package_with_its_options_model_and_data(wheel: Path, source: Path) -> None:
    names = wheel_names(wheel)
    assert {
        "qlora/conf/config.yaml",
        "qlora/demo/model/model.safetensors",
        "qlora/demo/data/train.jsonl",
        "qlora/demo/data/preferences.jsonl",
        "qlora/generation/few_rows.cu",
    } <= names
    plugin = "qlora/plugins/hydra_plugins/qlora_sweep.py"
    assert files_below(source / "qlora", "qlora") - {plugin} <= names
    assert "hydra_plugins/qlora_sweep.py" in names  # where Hydra looks for it
    assert files_below(source / "conf", "qlora/conf") <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_holds_nothing_else(wheel: Path) -> None:
    tops = {name.partition("/")[0] for name in wheel_names(wheel)}
    assert tops == {"qlora", "hydra_plugins", f"qlora-{qlora.__version__}.dist-info"}
    assert not [name for name in wheel_names(wheel) if "test" in Path(name).name or name.endswith(".pyc")]


def test_the_sdist_holds_the_sources_and_no_run(sdist: Path, source: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    promised = {"pyproject.toml", "README.md", "LICENSE", "constraints.txt", ".ci/run", "tests/test_packaging.py"}
    assert promised <= names
    assert files_below(source / "conf", "conf") | files_below(source / "docs", "docs") <= names
    assert not [name for name in names if name.startswith("outputs/runs") or "__pycache__" in name]


def test_a_wheel_from_the_sdist_is_the_same(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from Python 3.11.4 on
        archive.extractall(tmp_path, **safely)
    [again] = build(tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "out", "wheel")
    assert wheel_contents(again) == wheel_contents(wheel)


def wheel_contents(wheel: Path) -> dict[str, int]:
    with zipfile.ZipFile(wheel) as archive:
        return {item.filename: item.CRC for item in archive.infolist()}


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    done = subprocess.run([*pip, str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def run_installed(installed: Path, empty: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=empty, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_installed_wheel_is_what_runs_and_finds_its_own_options(installed: Path, tmp_path: Path) -> None:
    code = "import qlora, qlora.config.options as c; print(qlora.__file__); print(c.CONF_DIR)"
    module, conf = run_installed(installed, tmp_path, "-c", code).splitlines()
    assert Path(module) == installed / "qlora" / "__init__.py"
    assert Path(conf) == installed / "qlora" / "conf"


def test_the_installed_wheel_composes_and_helps_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    composed = run_installed(installed, tmp_path, "-m", "qlora", "--cfg", "job", "model=llama-7b", "data=oasst1")
    assert "name: huggyllama/llama-7b" in composed
    assert "max_steps: 1875" in composed
    assert "Groups (* is the default):" in run_installed(installed, tmp_path, "-m", "qlora", "--help")


def test_the_package_and_the_project_have_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" in project["dynamic"]  # the wheel has that of the package, as its name above shows
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {qlora.__version__}" in changes


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def is_torchs_own(name: str) -> bool:
    """Whether each build of torch asks for one version of a package, another than the next build."""
    return name == "triton" or (name.startswith(("nvidia-", "cuda-")) and name != "nvidia-ml-py")


def test_every_direct_dependency_has_a_tested_version_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requested = [
        *project["dependencies"],
        *(text for extra in project["optional-dependencies"].values() for text in extra),
    ]
    for requirement in map(Requirement, requested):
        if requirement.name != "qlora" and not is_torchs_own(requirement.name):
            assert requirement.specifier.contains(pinned()[requirement.name]), str(requirement)


def test_nothing_is_pinned_that_torch_pins_itself() -> None:
    assert not [name for name in pinned() if is_torchs_own(name)]
    for requirement in map(Requirement, metadata.requires("torch") or []):
        if (version := pinned().get(requirement.name)) is not None:
            assert requirement.specifier.contains(version), str(requirement)


def test_the_index_alone_is_asked_for_every_python_that_the_project_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    prefix = "Programming Language :: Python :: 3."
    versions = [f"3.{text.removeprefix(prefix)}" for text in project["classifiers"] if text.startswith(prefix)]
    assert f"for version in {' '.join(versions)}; do" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
