"""Rows that lie elsewhere: read whole or as a stream, from real servers, and no secret of an address is written."""

import functools
import gzip
import http.server
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.json
import pyarrow.parquet
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from qlora.config.compose import compose
from qlora.config.overrides import write_override
from qlora.config.schema import DataConfig
from qlora.config.typed_forms import read_forms
from qlora.data.batching.item_stream import ItemStream
from qlora.data.pipeline import StreamLength, build_data
from qlora.errors import ConfigError, UserError

SECRET = "c2VjcmV0c2lnbmF0dXJl4711"
ROWS = [{"input": f"row {index}", "output": f"out {index}"} for index in range(50)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; what is below `signed/` for those who know the signature, and of `cut/` only a part."""

    def do_GET(self) -> None:
        if self.path.startswith("/signed/") and f"sig={SECRET}" not in self.path:
            self.send_error(403)
        elif self.path.startswith("/cut/"):
            self.send_response(200)
            self.send_header("Content-Length", str(len(TEXT)))
            self.end_headers()
            self.wfile.write(TEXT[:700].encode())
        elif self.path.startswith("/fault/"):
            self.send_error(500)
        elif self.path.startswith("/moved/"):
            target = f"ftp://host/rows.jsonl?ticket={SECRET}" if "away" in self.path else f"{self.path}?t={SECRET}"
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()
        else:
            super().do_GET()

    do_HEAD = do_GET

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("web")
    (folder / "signed").mkdir()
    for name in ("rows.jsonl", "signed/rows.jsonl"):
        (folder / name).write_text(TEXT)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(TEXT.encode()))
    pyarrow.parquet.write_table(pyarrow.json.read_json(folder / "rows.jsonl"), folder / "rows.parquet")
    (folder / "broken.jsonl").write_text(TEXT + "{broken")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def in_memory() -> Iterator[str]:
    files = fsspec.filesystem("memory")
    for number in range(2):
        half = ROWS[number * 25 : number * 25 + 25]
        files.pipe(f"/set/part-{number}.jsonl", "".join(json.dumps(row) + "\n" for row in half).encode())
    files.pipe("/set/README.md", b"about")
    yield "memory://set"
    files.rm("/set", recursive=True)


@pytest.fixture
def read_stream(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable[[str], list[str]]:
    def read(path: str) -> list[str]:
        config = DataConfig(name="toy", path=path, streaming=True, eval_dataset_size=0, max_length=64, shuffle_buffer=1,
                            cache_dir=str(tmp_path / "cache"))  # fmt: skip
        items = build_data(config, tokenizer, need_eval=False, length=StreamLength(5, 10, 0)).stream
        assert isinstance(items, ItemStream)
        rows = [name for index in range(50) for name, _ in items.named_rows(index)]
        items.save(tmp_path, 50)
        assert SECRET not in "".join(path.read_bytes().decode(errors="replace") for path in tmp_path.glob("stream*"))
        return rows

    return read


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_rows_of_a_web_server_are_read_whole_and_as_a_stream(
    web: str, load: Callable[..., Dataset], read_stream: Callable[[str], list[str]], name: str
) -> None:
    assert load(f"{web}/{name}").to_list() == ROWS
    assert read_stream(f"{web}/{name}") == [f"data.path={web}/{name}, row {number}" for number in range(1, 51)]


@pytest.mark.parametrize("path", ["memory://set", "memory://set/*.jsonl", "memory://set/part-*"])
def test_folders_and_patterns_elsewhere_are_read_in_order(
    in_memory: str, load: Callable[..., Dataset], read_stream: Callable[[str], list[str]], path: str
) -> None:
    assert load(path).to_list() == ROWS
    assert len(set(read_stream(path))) == 50


def test_a_copy_is_removed_when_it_is_read(web: str, load: Callable[..., Dataset], cache: Any) -> None:
    load(f"{web}/rows.jsonl")
    assert not list(cache.root.glob(".unfinished*"))


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A server of S3's own protocol."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "tester",
                            "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}.items():  # fmt: skip
            patch.setenv(name, value)
        import s3fs

        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        files = s3fs.S3FileSystem()
        files.mkdir("rows")
        files.pipe("rows/set/a.jsonl", TEXT.encode())
        files.pipe("rows/set/b.jsonl.gz", gzip.compress(TEXT.encode()))
        yield "s3://rows/set"
        s3fs.S3FileSystem.clear_instance_cache()
    server.terminate()
    server.wait()


def test_rows_of_a_bucket_are_read_whole_and_as_a_stream(
    bucket: str, load: Callable[..., Dataset], read_stream: Callable[[str], list[str]]
) -> None:
    assert load(f"{bucket}/a.jsonl").to_list() == ROWS
    assert load(bucket).to_list() == ROWS + ROWS
    assert len(read_stream(f"{bucket}/b.jsonl.gz")) == 50


def test_a_missing_bucket_is_answered_with_a_sentence(bucket: str, load: Callable[..., Dataset]) -> None:
    with pytest.raises(UserError) as error:
        load("s3://nowhere/rows.jsonl")
    assert str(error.value).startswith("data.path=s3://nowhere/rows.jsonl: ")
    assert SECRET not in str(error.value)


def test_an_address_in_a_variable_is_read_whole_and_as_a_stream(
    web: str, load: Callable[..., Dataset], read_stream: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_ROWS", f"{web}/signed/rows.jsonl?sig={SECRET}")
    assert load("env://MY_ROWS").to_list() == ROWS
    assert read_stream("env://MY_ROWS")[0] == "data.path=env://MY_ROWS, row 1"
    monkeypatch.setenv("MY_ROWS", f"{web}/signed/rows.jsonl?sig=wrong{SECRET[2:]}")
    with pytest.raises(UserError) as error:
        load("env://MY_ROWS")
    assert str(error.value).startswith("data.path=env://MY_ROWS: ")
    assert SECRET[2:] not in str(error.value)


ANSWERS = {
    "nothing there": ("{web}/none.jsonl", "data.path={web}/none.jsonl: there is no such file"),
    "no form": ("{web}/rows", "data.path={web}/rows: its file name must end in a form that is read"),
    "cut off": ("{web}/cut/rows.jsonl", "data.path={web}/cut/rows.jsonl: cannot be read ("),
    "a broken line": ("{web}/broken.jsonl", "data.path={web}/broken.jsonl, line 51: broken JSON"),
    "a server at fault": (
        "{web}/fault/rows.jsonl",
        "data.path={web}/fault/rows.jsonl: cannot be read (HTTP status 500)",
    ),
    "moved elsewhere": (
        "{web}/moved/away.jsonl",
        "data.path={web}/moved/away.jsonl: cannot be read (NonHttpUrlRedirect",
    ),
    "moved in circles": ("{web}/moved/r.jsonl", "data.path={web}/moved/r.jsonl: cannot be read (TooManyRedirects)"),
    "nobody listens": ("http://127.0.0.1:9/rows.jsonl", "data.path=http://127.0.0.1:9/rows.jsonl: cannot be read ("),
    "no variable": (
        "env://NOT_SET_HERE",
        "data.path=env://NOT_SET_HERE: the variable NOT_SET_HERE of the environment is",
    ),
    "a variable of no address": (
        "env://HOME",
        "data.path=env://HOME: the address in HOME cannot be read: it is "
        "no address, which begins with one of s3://, gs://, https://, hf://",
    ),
    "nothing in memory": ("memory://none/rows.jsonl", "data.path=memory://none/rows.jsonl: there is no such file"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_what_cannot_be_read_is_answered_with_a_sentence(
    web: str, load: Callable[..., Dataset], read_stream: Callable[[str], list[str]], case: str
) -> None:
    path, sentence = (text.replace("{web}", web) for text in ANSWERS[case])
    for read in (load, read_stream):
        with pytest.raises(UserError) as error:
            read(path)
        assert str(error.value).startswith(sentence)
        assert SECRET not in str(error.value)


def test_a_package_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora.config.addresses.find_spec", lambda name: None)
    for path, extra in {"s3://bucket/rows.jsonl": "s3", "gs://bucket/rows.jsonl": "gcs"}.items():
        with pytest.raises(ConfigError, match=rf"is read by a package that is not installed; .*qlora\[{extra}\]"):
            compose(["data=local", f"data.path={path}"])


def test_an_address_with_a_short_query_is_read(web: str, load: Callable[..., Dataset]) -> None:
    assert compose(["data=local", f"data.path='{web}/rows.jsonl?download=true'"]).data.path is not None
    assert len(load(f"{web}/rows.jsonl?download=true")) == 50


def test_an_address_is_typed_like_a_file() -> None:
    for path in ("https://host/rows.jsonl", "s3://bucket/set/", "hf://datasets/org/name/rows.parquet", "env://MY_ROWS",
                 "https://host/rows.jsonl?download=true", "gs://bucket/set/*.parquet"):  # fmt: skip
        assert compose(read_forms([write_override("data", path)]).overrides).data.path == path
