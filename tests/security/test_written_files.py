"""Names that would lead out of a run's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from promises import QUICK

from qlora.config.compose import compose
from qlora.errors import UserError
from qlora.run import Run
from qlora.runtime.console import LogFile


@pytest.mark.matrix(4)
@pytest.mark.parametrize("name", ["../../x", "..", ".", "a/b", "", "a\\0b".replace("\\0", "\0"), "a\nb", "n" * 300])
def test_a_name_cannot_leave_the_folder_of_runs(name: str) -> None:
    with pytest.raises(UserError, match=r"name|hydra\.(run|sweep)\.dir"):
        compose([f'name="{name}"'])


@pytest.mark.full
def test_names_inside_data_and_models_do_not_become_paths(tmp_path: Path, base: Path) -> None:
    row = {"instruction": "../../evil", "input": "/etc/evil", "output": "../evil", "id": "../../evil"}
    lines = [json.dumps({**row, "output": f"../evil{number}"}) + "\n" for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "chat_template.jinja").unlink(missing_ok=True)
    settings["chat_template"] = [{"name": "../../../evil", "template": "x"}, {"name": "default", "template": "y"}]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    previous = set(tmp_path.rglob("*"))
    args = ["data=local", f"data.path={tmp_path}/rows.jsonl", "data.eval_dataset_size=4", "recipe=none"]
    folder = tmp_path / "runs" / "inner" / "mine"
    Run(compose([f"model.name={base}", *QUICK, *args]), folder).train()
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    written = set(tmp_path.rglob("*")) - previous
    assert {path for path in written if folder not in path.parents} == {folder, *list(folder.parents)[:2]}
    with pytest.raises(UserError):
        compose(["model.name=a/../../b", "task=push", "repo=../x/y"])


def test_a_log_that_is_a_link_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("")
    (tmp_path / "train.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"train\.log is a link to another file"):
        LogFile(str(tmp_path / "train.log"))
    assert (tmp_path / "elsewhere").read_text() == ""
