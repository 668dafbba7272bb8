"""Ways round the rules on code, secrets and folders that a fresh pair of eyes found."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from qlora import cli
from qlora.config.command import compose_command
from qlora.config.compose import compose
from qlora.errors import UserError
from qlora.models import tokenizer as tokenizers
from qlora.models.tokenizer import load_tokenizer
from qlora.runtime.command_folder import check_links
from qlora.secrets import hide


def options(folder: Path, text: str, name: str = "experiment/mine") -> Path:
    """Writes an option of somebody else's, and returns the folder of options."""
    file = folder / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"# @package _global_\n{text}")
    return folder


def refusal(folder: Path, *args: str) -> str:
    with pytest.raises(UserError) as error:
        compose_command(["experiment=mine", *args], folder, multirun=True)
    return str(error.value)


@pytest.mark.parametrize("group", ["/{folder}/x", "//proc/self/cwd/x", "/x/../x", "/./x", "/x//y"])
def test_an_option_lies_in_the_folders_of_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x/mine", "x/y/mine"):
        options(tmp_path, "hydra: {job: {env_set: {PATH: /evil}}}\n", name)
    options(tmp_path, f"defaults:\n  - {group.format(folder=tmp_path)}: mine\n")
    assert "names an option outside the folders of options" in refusal(tmp_path)


@pytest.mark.parametrize("params", ["${data.columns}", "${oc.create:{trusted: '[evil]'}}", "${oc.decode:'{a: 1}'}"])
def test_what_is_swept_is_written_in_the_file_itself(tmp_path: Path, params: str) -> None:
    quoted = json.dumps(params)
    text = f"data: {{columns: {{trusted: '[evil]'}}}}\nhydra: {{mode: MULTIRUN, sweeper: {{params: {quoted}}}}}\n"
    assert "hydra.sweeper.params" in refusal(options(tmp_path, text))


@pytest.mark.parametrize(
    "node",
    [
        "job_logging: {handlers: {console: {stream: 'ext://${hydra:job.name}'}}}",
        "job_logging: {root: {handlers: ['${oc.select:hydra.x,console}']}}",
        "hydra_logging: {formatters: {simple: {format: '${oc.env:HOME}'}}}",
        "callbacks: {x: {_target_: qlora.training.callbacks.EarlyStopping, y: '${hydra:job}'}}",
    ],
)
def test_what_is_called_later_is_written_in_the_file_itself(tmp_path: Path, node: str) -> None:
    text = refusal(options(tmp_path, f"hydra:\n  {node}\n"))
    assert "is looked at before a ${...} in it has a value" in text


@pytest.mark.matrix(1)
@pytest.mark.parametrize("kind", ["AutoConfig", "AutoModelForCausalLM", "LlamaConfig"])
def test_a_tokenizer_is_one_and_nobody_is_asked_about_its_code(tmp_path: Path, base: Path, kind: str) -> None:
    folder = shutil.copytree(base, tmp_path / "sent")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": kind}))
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}))
    (folder / "evil.py").write_text("raise SystemExit('it runs')")
    with pytest.raises(UserError, match=f"says tokenizer_class='{kind}', which is not a tokenizer"):
        load_tokenizer(compose([f"model.tokenizer={folder}"]).model)
    assert tokenizers.dynamic_module_utils.TIME_OUT_REMOTE_CODE == 0


@pytest.mark.matrix(1)
@pytest.mark.parametrize("name", [".hydra", "checkpoints", "adapter", "checkpoints/checkpoint-1", "result.json"])
def test_a_link_out_of_the_run_s_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "victim").mkdir()
    link = tmp_path / "sent" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match="is a link to"):
        check_links(tmp_path / "sent")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["qlora", "task=plan", "plan.device=a6000", f"hydra.run.dir={tmp_path}/sent"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "a run writes into its own folder alone" in capsys.readouterr().err
    assert not list((tmp_path / "victim").iterdir())
    link.unlink()
    (tmp_path / "sent" / "inside").mkdir()
    link.symlink_to(tmp_path / "sent" / "inside")
    check_links(tmp_path / "sent")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("Tr0ub4dor-and-3", "data: {columns: \"${oc.decode:'{${oc.env:${name}_PASSWORD}: input}'}\"}"),
        ("Tr0ub4dor-and-3", "data: {columns: {Tr0ub4dor-and-3: input}}"),
        ("12345678", "seed: '${oc.env:${name}_PASSWORD}'"),
    ],
)
def test_a_secret_is_found_as_a_key_and_as_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, text: str
) -> None:
    monkeypatch.setenv("MY_PASSWORD", value)
    said = refusal(options(tmp_path, f"name: MY\n{text}\n"))
    assert "the value of MY_PASSWORD" in said
    assert value not in said


@pytest.mark.parametrize(
    "text",
    [
        "https://host/x?X-Amz-Signature=PLANTEDPLANTED&a=1",
        "https://host/x?X-Amz-Security-Token=PLANTEDPLANTED",
        "Authorization: Bearer PLANTEDPLANTED",
        "https://me:PLANTED%2fPLANTED%3a@host/x",
        "in a path PLANTED/PLANTED%3A",
    ],
)
def test_secrets_in_addresses_and_headers_are_hidden(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MY_PASSWORD", "PLANTED/PLANTED:")
    assert "PLANTED" not in hide(text)


def test_a_message_about_a_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        compose_command([], "no\nfolder")
    assert "\n" not in str(error.value)


@pytest.mark.matrix(1)
@pytest.mark.parametrize(
    "word",
    ["hydra.job_logging.root.level=NOPE", "hydra.job_logging.version=2", "+hydra.job_logging.handlers.x=5"],
)
def test_a_log_that_cannot_be_set_up_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["qlora", "task=plan", "plan.device=a6000", word])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().err
    assert said.startswith("error: hydra.job_logging"), said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("node", ["run: {dir: x}", "sweep: {dir: x}", "sweep: {subdir: x}", "job: {name: x}"])
def test_folders_that_a_file_cannot_set_are_refused_in_it(tmp_path: Path, node: str) -> None:
    assert "is said on the command line alone" in refusal(options(tmp_path, f"hydra: {{{node}}}\n"))


def test_a_file_that_puts_a_name_into_trust_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package trusted\n'0': evil\n")
    assert "trusted" in refusal(tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1/0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        '{{ "a".encode("nope") }}',
        "{{ 2.0**99999 }}",
        '{{ "a"*(10**13) }}',
    ],
)
def test_whatever_a_template_computes_is_one_sentence(tmp_path: Path, template: str) -> None:
    from qlora.run import Run

    (tmp_path / "t.jinja").write_text(template)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    (tmp_path / "chat.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 4)
    args = [f"data.template={tmp_path}/t.jinja", "data=local", f"data.path={tmp_path}/chat.jsonl"]
    config = compose(["task=preview", *args, "data.eval_dataset_size=1", f"data.cache_dir={tmp_path}/cache"])
    with pytest.raises(UserError):
        Run(config, tmp_path / "run").execute()
