"""What a run was made of, written whole or not at all."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from qlora.errors import UserError
from qlora.reporting import manifest
from qlora.reporting.manifest import build_manifest, write_json


def test_a_manifest_names_config_versions_machine_command_and_time() -> None:
    built = build_manifest({"seed": 1}, data={"rows": 3}, model={"name": "tiny"})
    assert built == json.loads(json.dumps(built))
    assert built["config"] == {"seed": 1}
    assert (built["data"], built["model"]) == ({"rows": 3}, {"name": "tiny"})
    names = {"python", "torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "hydra", "omegaconf"}
    assert set(built["versions"]) == names | {"qlora"}
    assert built["versions"]["torch"]
    assert built["hardware"]["cores"] > 0
    assert built["hardware"]["memory_gb"] > 0
    assert built["hardware"]["cpu"]
    age = datetime.now(UTC) - datetime.fromisoformat(built["started"])
    assert 0 <= age.total_seconds() < 60


def test_a_manifest_needs_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    built = build_manifest({}, data={}, model={})
    assert built["code"] == {"commit": None, "dirty": None, "sha256": manifest.code_digest()}
    assert built["project"] == {"commit": None, "changes": None, "diff_sha256": None, "untracked": None}


def test_the_commit_is_that_of_the_package_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "qlora"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setattr(manifest, "CODE", package)
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        command = ("git", "-C", str(tmp_path), *who, *arguments)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "somebody's own repository, with the package merely installed in it")
    assert manifest.code_state() == {"commit": None, "dirty": None}
    git("add", ".")
    git("commit", "-q", "-m", "code")
    assert manifest.code_state() == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (package / "__init__.py").write_text("changed = 1\n")
    assert manifest.code_state()["dirty"] is True


def test_the_command_line_can_be_typed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(manifest.CODE / "__main__.py"), "lora.target_modules=[a, b]"])
    assert manifest.command_line() == "python -m qlora 'lora.target_modules=[a, b]'"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/qlora", "lora.r=8"])
    assert manifest.command_line() == "qlora lora.r=8"


class Colour(Enum):
    red = "red"


def test_json_is_written_whole_in_its_own_types(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "new" / "a.json"
    value: dict[Any, Any] = {"p": Path("x"), Colour.red: Colour.red, "t": (1, torch.tensor(2.5)), "n": float("nan")}
    write_json(path, value)
    assert json.loads(path.read_text()) == {"p": "x", "red": "red", "t": [1, 2.5], "n": "nan"}
    write_json(path, {"ü": None})
    assert "ü" in path.read_text(encoding="utf-8")
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": True})

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match=r"a\.json cannot be written \(No space left on device\).*hydra\.run\.dir"):
        write_json(path, {"new": True})
    assert json.loads(path.read_text()) == {"old": True}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_folder_without_permission_is_a_config_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        write_json(tmp_path / "a.json", {})


def test_a_file_where_the_folder_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_json(tmp_path / "file" / "a.json", {})
