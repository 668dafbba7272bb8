"""No secret gets into a config, a job's folder, a manifest, or a run that resumes with somebody else's config."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from qlora.config.command import check_overrides, compose_command
from qlora.config.compose import compose
from qlora.config.saved_config import config_to_dict, dump_config, read_config, read_overrides, restore_config
from qlora.errors import UserError
from qlora.reporting.manifest import build_manifest
from qlora.secrets import HIDDEN, NAMES, find_secret, hide, hide_in_diff

PASSWORD = "planted-horse-battery"
FILE = Path("run/config.yaml")
URL = f"postgresql+psycopg://opt:{PASSWORD}@127.0.0.1:5432/optuna"


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PASSWORD", PASSWORD)
    monkeypatch.setenv("STORE", URL)
    monkeypatch.setenv("POINTER", "MY_PASSWORD")


def refusal(*overrides: str, **options: bool) -> str:
    with pytest.raises(UserError) as error:
        compose_command(overrides, **options)
    return str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "PGPASSWORD",
            "HFTOKEN",
            "HF_TOKEN",
            "MYSQL_PWD",
            "SSHPASS",
            "DB_PASS",
            "OPENAI_KEY",
            "APIKEY",
            "wandb_api_key",
        ),
        *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "REDISCLI_AUTH", "GH_PAT", "SECRET_KEY_BASE", "API_KEY_2"),
        *("DB_PASSWORDS", "AZURE_STORAGE_CONNECTION_STRING", "GPG_PASSPHRASE", "GOOGLE_APPLICATION_CREDENTIALS"),
    ],
)
def test_a_variable_of_a_secret_is_known_by_its_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "some thing/else")
    assert hide("before some thing/else after") == f"before {HIDDEN} after"
    assert hide("http://h/some%20thing%2Felse") == f"http://h/{HIDDEN}", "as an address spells it"
    assert find_secret("some thing/else") == f"the value of {name}"


def test_other_variables_hold_no_secret() -> None:
    plain = "PWD OLDPWD PATH SSH_ASKPASS GIT_ASKPASS SSH_AUTH_SOCK COMPASS TOKENIZERS_PARALLELISM KEYBOARD GPG_KEY HOME"
    assert [name for name in plain.split() if NAMES.search(name)] == []


def test_a_password_is_found_wherever_an_address_holds_it() -> None:
    for text in (URL, "mysql://u:pa/ss@host/db", "https://u:p@ss@host", "postgresql://h/d?user=u&password=geheim1"):
        assert find_secret(text) == "a password in an address", text
    for text in ("http://host:8080/user@x", "hf://datasets/a/b", "s3://bucket/key?versionId=3", "sqlite:////data/s.db"):
        assert find_secret(text) is None, text


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("hydra.run.dir='out/${oc.env:MY_PASSWORD}'", "hydra.run.dir"),
        ("hydra.sweep.dir='${oc.decode:${oc.env:MY_PASSWORD}}'", "hydra.sweep.dir"),
        ("hydra.job.name='${hydra:runtime.cwd}-${oc.env:MY_PASSWORD}'", "hydra.job.name"),
        ("hydra.job.id='x${oc.env:MY_PASSWORD}'", "hydra.job.id"),
        ("name='${oc.env:STORE}'", "name"),
        ("hydra.run.dir='out/${oc.env:${oc.env:POINTER}}'", "hydra.run.dir"),
        ("hydra.job.name='${oc.env:NO_SUCH,hf_plantedplantedplantedplanted}'", "hydra.job.name"),
    ],
)
def test_an_interpolation_brings_no_secret_into_any_node(override: str, key: str) -> None:
    text = refusal(override)
    assert text.startswith(f"{key} holds ")
    assert PASSWORD not in text
    assert "plantedplanted" not in text


def test_a_secret_in_a_file_for_hydra_s_own_node_is_refused(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nhydra:\n  job:\n    id: hf_plantedplantedplantedplanted\n"
    )
    with pytest.raises(
        UserError, match=r"mine\.yaml sets hydra\.job\.id \(\[hidden\]\), and what Hydra runs or writes is"
    ):
        check_overrides(["experiment=mine"], tmp_path)


SEARCH = ("hydra/sweeper=optuna", "trainer.learning_rate=tag(log,interval(1e-4,1e-2))")


def test_the_address_of_a_study_comes_from_a_variable_by_its_name() -> None:
    check_overrides([*SEARCH, "hydra.sweeper.storage='${oc.env:STORE}'"], multirun=True)
    text = refusal(*SEARCH, f"hydra.sweeper.storage={URL}", multirun=True)
    assert "'hydra.sweeper.storage=${oc.env:NAME}'" in text
    assert PASSWORD not in text
    mixed = refusal(*SEARCH, "hydra.sweeper.storage='postgresql://u:${oc.env:MY_PASSWORD}@h/d'", multirun=True)
    assert "'hydra.sweeper.storage=${oc.env:NAME}'" in mixed
    output = refusal(*SEARCH, "hydra.sweeper.storage='${oc.env:STORE}'", multirun=True, printed=True)
    assert output == "hydra.sweeper.storage holds the value of STORE, which --resolve would print; leave it out"


def test_a_trial_is_handed_the_name_of_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optuna = pytest.importorskip("optuna")
    from qlora.runtime.search_trial import TrialLink
    from qlora.sweep.search import _link_override

    url = f"sqlite:///{tmp_path}/study.db?password={PASSWORD}"
    study = optuna.create_study(study_name="s", storage=f"sqlite:///{tmp_path}/study.db")
    trial = study.ask()
    link = TrialLink(None, "STORE", "s", trial._trial_id, "eval_loss", "none", {})
    for text in (link.to_text(), *_link_override(link), str(pickle.dumps(link))):
        assert PASSWORD not in text
        assert "STORE" in text
    monkeypatch.setenv("STORE", url.partition("?")[0])
    assert TrialLink.from_text(link.to_text()).open().number == trial.number
    monkeypatch.delenv("STORE")
    with pytest.raises(UserError, match=r"the job does not have the variable STORE; export it where jobs run"):
        link.open()


def test_a_database_that_cannot_be_reached_is_told_without_its_password() -> None:
    pytest.importorskip("optuna")
    from qlora.runtime.search_trial import hide_password, open_storage

    for url in (f"nosuch://u:{PASSWORD}@h/d", f"postgresql:/u:{PASSWORD}@h", f"u {PASSWORD}"):
        with pytest.raises(UserError) as error:
            open_storage(url)
        assert PASSWORD not in str(error.value) + hide_password(url)


# Stored configs


def test_a_stored_config_learns_nothing_of_this_machine(tmp_path: Path) -> None:
    config = config_to_dict(compose([]))
    odd = [r"${oc.env:MY_PASSWORD}", r"\${oc.env:HOME}", r"\\${oc.env:HOME}", "a ${seed} b", "${", "${oc.env:"]
    for text in odd:
        saved = {**config, "tracking": {**config["tracking"], "project": text}}
        (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml({"x": "y"}))
        assert restore_config(saved, FILE).tracking.project == text, "what looks like an interpolation is text"
    with pytest.raises(UserError, match=r"^run/config\.yaml: tracking\.project holds the value of MY_PASSWORD"):
        restore_config({**config, "tracking": {**config["tracking"], "project": PASSWORD}}, FILE)


def test_a_stored_config_comes_back_as_it_was(tmp_path: Path) -> None:
    config = compose(["seed=3", "name=a"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert restore_config(read_config(tmp_path / "config.yaml") or {}, FILE) == config


def test_the_overrides_of_a_run_are_reported_as_they_were_typed(tmp_path: Path) -> None:
    path = tmp_path / "overrides.yaml"
    path.write_text("- data.path=${oc.env:MY_PASSWORD}\n- seed=1\n")
    assert read_overrides(path) == ["data.path=${oc.env:MY_PASSWORD}", "seed=1"]


# Uncommitted changes

LINES = {
    'SECRET_KEY = "planted-abcdefgh1234"': "planted",
    'os.environ["API_KEY"] = "planted12345678"': "planted",
    "AWS_SECRET_ACCESS_KEY=planted/efgh+1234": "planted",
    'private_key = "planted12345"': "planted",
    'config["password"] = "planted12345"': "planted",
    'token: str = "planted12345"': "planted",
    "api_key = 'planted,comma0123456'": "comma",
    'password="planted as a phrase"': "phrase",
    'headers = {"Authorization": "Bearer planted123"}': "planted",
    'login("planted1", kind="token")': "planted",
    'url = "db.example/x"  # password planted123': "planted123",
    "export PGPASSWORD=pla1": "pla1",
    "  password: planted # comment": "planted",
    "mysql -u root --password plantedx": "plantedx",
    "machine host login me password planted": "planted",
    'auth = ("me", "planted")': "planted",
    'client_secret="planted""more"': "more",
    'password = "planted\\"quoted"': "quoted",
    'password = "planted unterminated': "unterminated",
    "encryptionKey: planted00": "planted",
    "dsn = 'host=h user=u plant=ed'": "plant=ed",
    "const sessionCookie = `planted ${x}`": "planted",
    'X = "Ab3dEf6hIj9kLm2nOp5qRs8tUv1wXyZ0"': "Ab3dEf",
}


@pytest.mark.parametrize(("line", "secret"), LINES.items())
def test_nothing_secret_is_left_on_a_suspicious_line(line: str, secret: str) -> None:
    for sign in "+- ":
        hidden = hide_in_diff(f"@@ -1 +1 @@\n{sign}{line}")
        assert secret not in hidden
        assert HIDDEN in hidden
        assert hidden.splitlines()[1].startswith(sign)


def test_a_value_below_its_name_is_hidden_and_the_rest_of_a_diff_stays() -> None:
    diff = (
        "diff --git a/a.py b/a.py\n@@ -1 +1 @@\n+plain = 'stays'\n"
        "+PASSWORD = (\n+    'planted'\n+    'more'\n+)\n+x = 1\n"
        '+KEY = """\n+planted\n+"""\n+y = "stays"\n+secret: |\n+  planted\n+  planted\n+z: 3\n'
        "-- name: DB_PASSWORD\n-  value: planted\n--- password = planted\n+TOKEN = \\\n+'planted'\n+'end'\n"
        "diff --git a/.env b/.env\n--- a/.env\n@@ -1 +1 @@\n+planted\n"
        "diff --git a/home/.pgpass b/home/.pgpass\n@@ -1 +1 @@ planted password planted\n+host:5432:db:me:planted"
    )
    hidden = hide_in_diff(diff)
    assert "planted" not in hidden
    assert "more" not in hidden
    assert [line for line in hidden.splitlines() if HIDDEN not in line] == [
        *("diff --git a/a.py b/a.py", "@@ -1 +1 @@", "+plain = 'stays'", "+PASSWORD = (", "+)", "+x = 1"),
        *('+y = "stays"', "+secret: |", "+z: 3", "-- name: DB_PASSWORD", "+TOKEN = \\", "+'end'"),
        *("diff --git a/.env b/.env", "--- a/.env", "@@ -1 +1 @@"),
        "diff --git a/home/.pgpass b/home/.pgpass",
    ]


def test_a_manifest_holds_of_changes_what_says_nothing_of_their_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)

    def git(*args: str) -> bytes:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *who, *args], check=True, capture_output=True).stdout

    (tmp_path / "ä b.py").write_text("x = 1\n")
    (tmp_path / "data.bin").write_bytes(b"\0\1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    git("config", "diff.external", "false")
    (tmp_path / "ä b.py").write_bytes(b"x = 2\nthing = 'only-here'\npassword = 'planted \xff'\n")
    (tmp_path / "data.bin").write_bytes(b"\0\2")
    (tmp_path / "new.txt").touch()
    state = build_manifest({}, data={}, model={})["project"]
    assert "only-here" not in json.dumps(state)
    assert {"file": "ä b.py", "added": 3, "removed": 1} in state["changes"]
    assert {"file": "data.bin", "added": None, "removed": None} in state["changes"]
    assert state["untracked"] == ["new.txt"]
    raw = git("diff", "HEAD", "--no-ext-diff").decode(errors="replace").strip()
    assert state["diff_sha256"] == hashlib.sha256(raw.encode()).hexdigest()
    asked = build_manifest({"manifest": {"diff": True}}, data={}, model={})["project"]
    assert "only-here" in asked["diff"]
    assert "planted" not in asked["diff"]
    assert compose(["manifest.diff=true"]).manifest.diff
