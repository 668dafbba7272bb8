"""Addresses of rows: what is no address of rows is refused, and a secret in one is written nowhere."""

import functools
import http.server
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from qlora.config.compose import compose
from qlora.errors import ConfigError
from tests.faults.runs import run

SECRET = "c2VjcmV0c2lnbmF0dXJl4711"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder to those who know the signature."""

    def do_GET(self) -> None:
        if f"sig={SECRET}" in self.path:
            super().do_GET()
        else:
            self.send_error(403)

    do_HEAD = do_GET

    def log_message(self, *args: Any) -> None: ...


def test_an_address_in_a_variable_is_read_and_never_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": f"What is {number}?", "output": "a " * (number % 5 + 1)} for number in range(40)]
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    handler = functools.partial(Handler, directory=str(tmp_path / "web"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MY_ROWS", f"http://127.0.0.1:{server.server_port}/rows.jsonl?sig={SECRET}")
    try:
        run(tmp_path / "run", "data=local", "data.path='env://MY_ROWS'", "data.streaming=true", "trainer.max_steps=2",
            "data.eval_dataset_size=4", "data.max_train_samples=null", f"data.cache_dir={tmp_path / 'cache'}",
            "tracking=tensorboard")  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
    written = [path for folder in ("run", "cache") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert any("checkpoint-2" in str(path) for path in written)
    for path in written:
        content = path.read_bytes()
        assert SECRET.encode() not in content, path
        assert str(server.server_port).encode() + b"/" not in content, path
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err
    assert "env://MY_ROWS" in (tmp_path / "run" / "README.md").read_text()


SECRETS = {
    "password": f"https://me:{SECRET}@host/rows.jsonl",
    "name alone": f"https://{SECRET}@host/rows.jsonl",
    "token": "https://host/rows.jsonl?token=abc",
    "signed for S3": f"https://b.s3.amazonaws.com/r.jsonl?X-Amz-Credential=x&X-Amz-Signature={SECRET}",
    "signed for Google": f"https://storage.googleapis.com/b/r.jsonl?X-Goog-Signature={SECRET}",
    "signed for Azure": f"https://b.blob.core.windows.net/c/r.jsonl?sv=2024&sig={SECRET}",
    "signed under another name": f"https://host/rows.jsonl?ticket={SECRET}",
    "signed without a name": f"https://host/rows.jsonl?{SECRET}",
    "signed behind a semicolon": f"https://host/rows.jsonl;{SECRET}",
    "short key": "https://host/rows.jsonl?key=abc",
    "short password": "https://host/rows.jsonl?user=me&pass=hunter2",
    "bucket with keys": f"s3://AKIAIOSFODNN7EXAMPLE:{SECRET}@bucket/rows.jsonl",
}


@pytest.mark.parametrize("key", ["data.path", "data.eval_path", "data.mix.a.path", "data.mix.a"])
@pytest.mark.parametrize("name", SECRETS)
def test_an_address_with_a_secret_is_refused_without_showing_it(name: str, key: str) -> None:
    others = ["data=mix"] if "mix" in key else ["data=local", "data.path=x.jsonl"]
    with pytest.raises(ConfigError) as error:
        compose([*others, f"{key}='{SECRETS[name]}'"])
    assert SECRET not in str(error.value)
    assert "Put the whole address into a variable of the environment and name it: " in str(error.value)
    assert "=env://NAME" in str(error.value)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("ftp://host/rows.jsonl", "rows are not read by ftp://"),
        ("htps://host/rows.jsonl", "rows are not read by htps:// (did you mean https"),
        ("file:///tmp/rows.jsonl", "a file of this machine is named without file://"),
        ("s3:///rows.jsonl", "it names no bucket; write s3://NAME/FILE"),
        ("https:///rows.jsonl", "it names no host; write https://NAME/FILE"),
        ("zip://rows.jsonl::https://host/rows.zip", "rows are not read by zip://"),
        ("https://host/a::https://host/b.jsonl", "addresses inside others (::) are not read"),
        ("env://NO-NAME", "must name a variable of the environment that holds an address: env://NAME"),
        ("env://", "must name a variable of the environment that holds an address: env://NAME"),
    ],
)
def test_an_address_that_cannot_be_read_is_refused_when_the_config_is_composed(path: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose(["data=local", f"data.path='{path}'"])
    assert sentence in str(error.value)
