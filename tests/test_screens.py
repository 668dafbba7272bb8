"""What each task prints fits a terminal of 80 columns, and breaks between words."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from qlora import cli

CHATS = [
    {"messages": [{"role": "user", "content": f"Say {count} again."}, {"role": "assistant", "content": f"{count}"}]}
    for count in range(60)
]
FEW = "lora.r=4 trainer.max_steps=2 trainer.gradient_accumulation_steps=1 data.max_eval_samples=2 trainer.eval_steps=1"
SCREENS = {
    "train": f"data=chats.jsonl name=a-name-of-some-length {FEW} evaluation=exact-match generation.max_new_tokens=2",
    "evaluate": "evaluate outputs/runs/a-name-of-some-length name=measured",
    "report": "report outputs/runs",
    "preview": "preview data=chats.jsonl task.ids=true",
    "plan": "plan model=llama-65b plan.device=rtx-3090 trainer.per_device_train_batch_size=8",
    "doctor": "doctor",
    "migrate": "migrate axolotl.yaml",
}
"""The commands in their order: later ones use what the first one has trained."""


def test_every_screen_fits_80_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    axolotl = {"base_model": "NousResearch/Llama-3.2-1B", "adapter": "qlora", "load_in_4bit": True, "lora_r": 32,
               "datasets": [{"path": "a/b", "type": "alpaca"}], "micro_batch_size": 2}  # fmt: skip
    (tmp_path / "axolotl.yaml").write_text(json.dumps(axolotl))
    said = {}
    for task, command in SCREENS.items():
        capfd.readouterr()
        cli.run(shlex.split(command))
        out, errors = capfd.readouterr()
        said[task] = "\n".join([out, re.sub(r".*\r", "", errors)])  # bars of libraries redraw their line
        long = [line for line in said[task].splitlines() if len(line) > 80 and " " in line.strip(" \\")]
        assert not long, (task, long)
        if task != "migrate":  # whose command may hold `KEY=null`
            assert not re.search(r"\b(None|nan|null)\b|\b0 of them\b", out), (task, out)
        assert str(tmp_path) not in out, (task, out)
    chat = "qlora chat outputs/runs/a-name-of-some-length"
    for line in (chat, chat.replace("chat", "merge"), "qlora board"):
        assert f"  {line}\n" in said["train"]
    for name in ("evaluate.json", "evaluate.jsonl", "config.yaml"):
        assert f"outputs/runs/measured/{name}\n" in said["evaluate"]
