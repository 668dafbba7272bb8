"""What SECURITY.md promises: one test or more for each promise."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetInfo
from transformers import LlamaConfig, LlamaForCausalLM

from qlora.compose import check_overrides, compose
from qlora.data.sources import hub_commit
from qlora.doctor.surroundings import check_environment
from qlora.errors import ConfigError
from qlora.models import adapters, loading
from qlora.models.tokenizer import load_tokenizer
from qlora.reporting.manifest import build_manifest
from qlora.run import Run
from qlora.secrets import HIDDEN, find_secret, hide, hide_all
from qlora.training.trainer import build_arguments

ROOT = Path(__file__).parent.parent
QUICK = [
    *("lora.r=4", "trainer.max_steps=2", "trainer.per_device_train_batch_size=4", "trainer.logging_steps=1"),
    *("trainer.eval_steps=null", "trainer.lr_scheduler_kwargs.num_decay_steps=1", "trainer.warmup_steps=0"),
    *("data.max_eval_samples=4", "data.max_train_samples=16", "generation.max_new_tokens=4", "device=cpu"),
    "trainer.save_steps=1",
]
SECRETS = {
    "HF_TOKEN": "hf_plantedplantedplantedplanted",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "OPENAI_API_KEY": "sk-planted-0123456789abcdefghij",
    "MY_SERVICE_PASSWORD": "correct horse battery",
}


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        check_overrides(overrides)
    return str(error.value)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in json.loads((folder / "history.json").read_text()) if "loss" in row]


# Network, telemetry, secrets: one run in a process of its own

CHILD = """
import os, socket, sys
from pathlib import Path

attempts = []

def refuse(*args, **kwargs):
    attempts.append(repr(args))
    raise OSError("the network is blocked")

connect = socket.socket.connect

def local_only(self, address):
    if self.family == socket.AF_UNIX or (isinstance(address, tuple) and address[0] in ("127.0.0.1", "::1")):
        return connect(self, address)  # wandb's own process
    return refuse(address)

socket.socket.connect, socket.getaddrinfo = local_only, refuse
sys.argv = ["qlora", *sys.argv[1:]]
from qlora.cli import main
code = 0
try:
    main()
except SystemExit as end:
    code = end.code or 0
import huggingface_hub.constants as hub, importlib.util
print("TELEMETRY", hub.HF_HUB_DISABLE_TELEMETRY, os.environ["DO_NOT_TRACK"], importlib.util.find_spec("kernels"))
print("ATTEMPTS", attempts)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run with the network blocked, secrets planted in the environment, a git repository with a secret around it."""
    folder = tmp_path_factory.mktemp("child")
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    (folder / "settings.py").write_text("x = 1\n")
    for words in (("init", "-q"), ("add", "settings.py"), (*who, "commit", "-q", "-m", "first")):
        subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True)
    planted = f"x = 2\ntoken = '{SECRETS['HF_TOKEN']}'\nPASSWORD = 'only-in-the-diff'\nplain = 'stays'\n"
    (folder / "settings.py").write_text(planted)
    (folder / "logs_it.py").write_text(
        "import logging, os\n"
        "from transformers import TrainerCallback\n"
        "class LogsIt(TrainerCallback):\n"
        "    def on_train_begin(self, args, state, control, **kwargs):\n"
        "        logging.getLogger('qlora.mine').warning('the key is %s', os.environ['OPENAI_API_KEY'])\n"
        "        try:\n"
        "            raise RuntimeError(os.environ['MY_SERVICE_PASSWORD'])\n"
        "        except RuntimeError:\n"
        "            logging.getLogger('qlora.mine').exception('failed')\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "WANDB_"))}
    environment |= SECRETS | {"PYTHONPATH": f"{folder}:{ROOT}:{ROOT}/qlora/plugins", "HF_HOME": str(folder / "hf")}
    words = [*QUICK, "hydra.run.dir=run", "tracking=wandb", "tracking.mode=offline", "trusted=[logs_it]"]
    words.append("callbacks.logs._target_=logs_it.LogsIt")
    command = [sys.executable, "-c", CHILD, *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done


def test_a_run_with_the_network_blocked_tries_nothing_and_gives_the_same_losses(
    child: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder, done = child
    assert "ATTEMPTS []" in done.stdout
    Run(compose(QUICK), tmp_path).train()
    assert losses(folder / "run") == losses(tmp_path)


def test_telemetry_is_off_and_no_kernels_are_fetched(child: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    assert "TELEMETRY True 1 None" in child[1].stdout
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "WANDB_ERROR_REPORTING", "MLFLOW_DISABLE_TELEMETRY"):
        assert os.environ[name]


def test_no_secret_reaches_a_file_or_the_screen(child: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = child
    files = [path for path in (folder / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for name, secret in SECRETS.items():
        found = [str(path) for path in files if secret.encode() in path.read_bytes()]
        assert not found, f"{name} in {found}"
        assert secret not in done.stdout + done.stderr, name
    log = (folder / "run" / "train.log").read_text()
    assert f"the key is {HIDDEN}" in log
    assert f"RuntimeError: {HIDDEN}" in log, "in a traceback, too"
    project = json.loads((folder / "run" / "manifest.json").read_text())["project"]
    assert "only-in-the-diff" not in json.dumps(project)
    assert project["changes"] == [{"file": "settings.py", "added": 4, "removed": 1}]
    assert "diff" not in project
    assert "logs_it.py" in project["untracked"]


def test_a_run_writes_to_its_folder_alone(child: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    there = {path.name for path in child[0].iterdir()}
    assert there <= {"run", "hf", ".git", "settings.py", "logs_it.py", "__pycache__"}


# Secrets in configs


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("tracking.uri=https://me:planted@server/path", "tracking.uri"),
        ("name=hf_plantedplantedplantedplanted", "name"),
        ("tracking.tags=[a,sk-planted-0123456789abcdefghij]", "tracking.tags"),
        ("data.path=https://user:planted@host/rows.jsonl", "data.path"),
        ("hydra.run.dir=out/hf_plantedplantedplantedplanted", "hydra.run.dir"),
        ("++callbacks.a.key=ghp_0123456789abcdefghijABCDEFGHIJ012345", "callbacks.a.key"),
        ("tracking.project=${oc.env:MY_SERVICE_PASSWORD}", "tracking.project"),
        ("model.name=x/AKIAIOSFODNN7EXAMPLE", "model.name"),
    ],
)
def test_a_secret_in_a_config_is_refused_and_not_shown(
    override: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SERVICE_PASSWORD", SECRETS["MY_SERVICE_PASSWORD"])
    text = refusal(override)
    assert text.startswith(key)
    assert "environment" in text
    assert not re.search(r"planted|ghp_|AKIA|battery", text.partition(";")[0])


def test_texts_without_secrets_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    for text in ("hf://datasets/a/b", "https://host:8080/x", "tokenizer: abc", "sk-1", "s3://bucket/key", "a@b.c:d"):
        assert find_secret(text) is None
        assert hide(text) == text
    assert hide_all({"a": ["https://u:p@h", 1]}) == {"a": [f"https://{HIDDEN}@h", 1]}
    key = "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----"
    assert hide(f"before {key} after") == f"before {HIDDEN} after"


def test_a_manifest_hides_what_a_notebook_was_started_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["start.py", "--key", "hf_plantedplantedplantedplanted"])
    assert "planted" not in json.dumps(build_manifest({}, data={}, model={}))


def test_what_changes_a_run_behind_its_config_is_shown_without_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://me:planted@mirror")
    [found] = check_environment()
    assert hide(found.says).startswith(f"HF_ENDPOINT=https://{HIDDEN}@mirror")


# Code


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["data=local", "data.path=os:getcwd"], "data.path=os:getcwd"),
        (["data=local", "data.path=a.jsonl", "data.format=mine.rows:convert"], "data.format=mine.rows:convert"),
        (["data=mix", "data.mix.x=posix:system"], "data.mix.x.path=posix:system"),
        (["evaluation.metrics=['subprocess:run']"], "evaluation.metrics[0]=subprocess:run"),
        (["callbacks.x._target_=os.system"], "callbacks.x._target_=os.system"),
        (["callbacks.x._target_=torch.load"], "callbacks.x._target_=torch.load"),
        (["callbacks.x={_target_:qlora.training.callbacks.EarlyStopping,patience:{_target_:os.getpid}}"],
         "callbacks.x.patience._target_=os.getpid"),
        (["hydra/launcher=processes", "hydra.launcher._target_=os.system"], "hydra.launcher._target_=os.system"),
        (["+hydra.callbacks.x._target_=subprocess.Popen"], "hydra.callbacks.x._target_=subprocess.Popen"),
        (["+hydra.job_logging.handlers.x.class=a.Popen"], "hydra.job_logging.handlers.x.class=a.Popen"),
    ],
)  # fmt: skip
def test_code_of_packages_that_are_not_trusted_does_not_run(words: list[str], key: str) -> None:
    text = refusal(*words)
    assert text.startswith(key)
    assert "trusted=[" in text


def test_code_named_by_somebody_s_yaml_does_not_run_either(tmp_path: Path) -> None:
    (tmp_path / "hydra" / "job_logging").mkdir(parents=True)
    (tmp_path / "hydra" / "job_logging" / "mine.yaml").write_text(
        "version: 1\nhandlers:\n  x:\n    (): os.system\n    command: ls\n"
    )
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ncallbacks:\n  x:\n    _target_: os.system\n    command: ls\n"
    )
    for words, key in (["hydra/job_logging=mine"], "hydra.job_logging"), (["experiment=mine"], "callbacks.x._target_"):
        with pytest.raises(ConfigError, match=rf"{re.escape(key)}.*os\.system.*trusted=\[os\]"):
            check_overrides(words, tmp_path)


def test_a_user_extends_the_trusted_packages() -> None:
    config = compose(["data=local", "data.path=mine:rows", "data.format=mine.rows:convert", "trusted=[mine]"])
    assert config.data.path == "mine:rows"


def test_a_callback_must_be_one(tmp_path: Path) -> None:
    words = ["callbacks.x._target_=transformers.AutoModelForCausalLM.from_pretrained", *QUICK]
    with pytest.raises(ConfigError, match=r"callbacks\.x"):
        Run(compose(words), tmp_path).train()
    with pytest.raises(ConfigError, match=r"callbacks\.x\._target_=transformers\.LlamaConfig is no TrainerCallback"):
        Run(compose(["callbacks.x._target_=transformers.LlamaConfig", *QUICK]), tmp_path).train()


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                         vocab_size=1600, max_position_embeddings=256, bos_token_id=1, eos_token_id=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(compose([]).model).save_pretrained(folder)
    return folder


def test_a_pickle_in_place_of_weights_is_refused_unread(tmp_path: Path, base: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    with pytest.raises(ConfigError, match=r"weights in pytorch_model\.bin alone; only safetensors are loaded"):
        Run(compose([f"model.name={base}", *QUICK]), tmp_path / "run").train()
    assert not (tmp_path / "mark").exists()


def test_a_pickle_beside_the_weights_is_not_read(tmp_path: Path, base: Path) -> None:
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt"):
        (base / name).write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    run = Run(compose([f"model.name={base}", *QUICK]), tmp_path / "run")
    run.load_base()
    assert not (tmp_path / "mark").exists()


def test_an_adapter_in_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    run = Run(compose(QUICK), tmp_path / "run")
    model = run.add_adapter(run.load_base())
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    with pytest.raises(ConfigError):
        adapters.check_adapter_folder(folder)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_bomb_in_a_checkpoint_does_not_go_off(tmp_path: Path, file: str) -> None:
    """transformers reads these by `torch.load(weights_only=True)`; if that ever changes, this fails."""
    (tmp_path / file).write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / file, weights_only=True)
    import inspect

    from transformers import trainer

    loads = re.findall(r"torch\.load\((?:[^()]|\([^()]*\))*\)", inspect.getsource(trainer))
    assert loads
    assert all("weights_only=True" in load for load in loads)
    assert not (tmp_path / "mark").exists()


CODE = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineModel"}


def test_code_of_a_model_runs_only_when_it_is_allowed(tmp_path: Path, base: Path) -> None:
    mark = tmp_path / "mark"
    (base / "modeling_mine.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MineModel(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": CODE}
    (base / "config.json").write_text(json.dumps(config))
    words = [f"model.name={base}", *QUICK]
    with pytest.raises(ConfigError, match=r"brings Python code of its own along.*model\.trust_remote_code=true"):
        _ = Run(compose(words), tmp_path / "run").model_config
    assert not mark.exists()
    loading.load_model_config(compose([*words, "model.trust_remote_code=true"]).model)
    assert mark.exists()


def test_code_of_the_hub_for_attention_needs_the_same_leave() -> None:
    text = refusal("model.attn_implementation=kernels-community/flash-attn2")
    assert "model.trust_remote_code=true" in text


# Revisions


def test_revisions_are_pinned_and_recorded() -> None:
    config = compose(["data=alpaca", "data.revision=abc", "model.revision=def"])
    assert (config.data.revision, config.model.revision) == ("abc", "def")
    assert "data.revision=abc is not read beside data.mix" in refusal("data=mix", "data.mix.a=x", "data.revision=abc")
    assert compose(["data=mix", "data.mix.a={path:x/y,revision:abc}"]).data.mix["a"].revision == "abc"
    commit = "0123456789abcdef0123456789abcdef01234567"
    checksums = {f"hf://datasets/me/set@{commit}/data/train.parquet": {"num_bytes": 1}}
    rows = Dataset.from_list([{"a": 1}], info=DatasetInfo(download_checksums=checksums))
    assert hub_commit(rows.rename_columns({"a": "b"})) == commit
    assert hub_commit(Dataset.from_list([{"a": 1}])) is None


# Paths


@pytest.mark.parametrize("name", ["../../x", "..", ".", "a/b", "", "a\\0b".replace("\\0", "\0"), "a\nb", "n" * 300])
def test_a_name_cannot_leave_the_folder_of_runs(name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        compose([f'name="{name}"'])


def test_names_inside_data_and_models_do_not_become_paths(tmp_path: Path, base: Path) -> None:
    row = {"instruction": "../../evil", "input": "/etc/evil", "output": "../evil", "id": "../../evil"}
    lines = [json.dumps({**row, "output": f"../evil{number}"}) + "\n" for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "chat_template.jinja").unlink(missing_ok=True)
    settings["chat_template"] = [{"name": "../../../evil", "template": "x"}, {"name": "default", "template": "y"}]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    before = set(tmp_path.rglob("*"))
    words = ["data=local", f"data.path={tmp_path}/rows.jsonl", "data.eval_dataset_size=4", "recipe=none"]
    folder = tmp_path / "runs" / "inner" / "mine"
    Run(compose([f"model.name={base}", *QUICK, *words]), folder).train()
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    written = set(tmp_path.rglob("*")) - before
    assert {path for path in written if folder not in path.parents} == {folder, *list(folder.parents)[:2]}
    with pytest.raises(ConfigError):
        compose(["model.name=a/../../b", "task=push", "repo=../x/y"])


def test_a_checkpoint_of_transformers_is_written_without_reports(tmp_path: Path) -> None:
    config = compose(QUICK)
    arguments = build_arguments(config.trainer, output_dir=tmp_path, device=torch.device("cpu"),
                                compute=torch.float32, seed=0)  # fmt: skip
    assert arguments.report_to == []
    assert arguments.push_to_hub is False


def test_every_promise_has_its_test() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)`", text)
    own = set(re.findall(r"^def (test_\w+)", Path(__file__).read_text(encoding="utf-8"), re.MULTILINE))
    assert len(named) >= 10
    assert set(named) <= own
