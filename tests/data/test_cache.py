import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from qlora.data.cache import UNFINISHED, Cache
from qlora.errors import UserError

PROGRAM = """
import sys, time
from pathlib import Path
from qlora.data.cache import Cache
def write(folder):
    (folder / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
Cache(Path(sys.argv[1])).entry("key", write)
"""


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def fill(folder):
    (folder / "file").write_text("whole")


def start_writing(root):
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(root)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    return process


def test_an_entry_is_written_once(cache):
    folder = cache.entry("key", fill)
    assert folder == cache.root / "key"
    assert (cache.entry("key", lambda _: pytest.fail("written twice")) / "file").read_text() == "whole"
    assert list(cache.root.iterdir()) == [folder]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_of_a_failed_entry(cache, error):
    def write(folder):
        fill(folder)
        raise error

    with pytest.raises(error):
        cache.entry("key", write)
    with pytest.raises(error), cache.temporary() as folder:
        write(folder)
    assert not list(cache.root.iterdir())


def test_of_two_writers_the_first_to_finish_wins(cache):
    def write(folder):
        (folder / "file").write_text("slow")
        Cache(cache.root).entry("key", fill)

    assert (cache.entry("key", write) / "file").read_text() == "whole"
    assert [path.name for path in cache.root.iterdir()] == ["key"]


def test_what_a_killed_process_left_goes_when_the_cache_is_opened_next(tmp_path):
    process = start_writing(tmp_path)
    Cache(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1, "the process lives"
    process.kill()
    process.wait()
    process.stdout.close()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(UNFINISHED)
    foreign = left.rename(tmp_path / left.name.replace(socket.gethostname(), "elsewhere"))
    start_pid = f"{UNFINISHED}~{socket.gethostname()}~{process.pid}~x"
    (tmp_path / start_pid).mkdir()
    assert (Cache(tmp_path).entry("key", fill) / "file").read_text() == "whole"
    assert sorted(tmp_path.iterdir()) == sorted([foreign, tmp_path / "key"])


def test_a_terminated_process_leaves_nothing(tmp_path):
    process = start_writing(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    process.stdout.close()
    assert not list(tmp_path.iterdir())


def test_a_forked_worker_that_is_terminated_leaves_its_parents_work_alone(cache):
    def write(folder):
        fill(folder)
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.write(writer, b"ready")
            time.sleep(60)
            os._exit(0)
        os.read(reader, 5)  # Python forgets a signal that comes before the fork is over
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM
        os.close(reader)
        os.close(writer)

    assert (cache.entry("key", write) / "file").read_text() == "whole"


def test_the_handling_of_sigterm_is_as_before_afterwards(cache):
    previous = signal.getsignal(signal.SIGTERM)
    cache.entry("key", fill)
    assert signal.getsignal(signal.SIGTERM) is previous


def test_a_temporary_folder_stays_until_the_process_exits(tmp_path):
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from qlora.data.cache import Cache\n"
        "with Cache(Path(sys.argv[1])).temporary() as folder:\n"
        "    (folder / 'file').write_text('a')\n"
        "if not os.fork():\n"
        "    sys.exit()\n"
        "os.wait()\n"
        "print((folder / 'file').read_text())\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "a\n"
    assert not list(tmp_path.iterdir())


def test_a_root_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache_dir=.*file/cache: cannot be written \(Not a directory\)"):
        Cache(tmp_path / "file" / "cache")


def test_a_full_disk_is_named(cache):
    def write(folder):
        raise OSError(28, os.strerror(28))

    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        cache.entry("key", write)


def test_a_killed_load_leaves_a_cache_that_works(tmp_path):
    rows = tmp_path / "rows.jsonl"
    with rows.open("w") as file:
        for number in range(100_000):
            file.write(json.dumps({"text": "x" * 1000, "n": str(number)}) + "\n")
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from qlora.data.cache import Cache\n"
        "from qlora.data.ingest.sources import load_rows\n"
        "load_rows(sys.argv[1], cache=Cache(Path(sys.argv[2])))\n"
    )
    root = tmp_path / "cache"
    process = subprocess.Popen([sys.executable, "-c", program, str(rows), str(root)])
    while not list(root.glob(f"{UNFINISHED}~*/part-0.arrow")):
        assert process.poll() is None, "it was to be caught while writing"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert [path.name.startswith(UNFINISHED) for path in root.iterdir()] == [True]
    Cache(root)
    assert not list(root.iterdir())
