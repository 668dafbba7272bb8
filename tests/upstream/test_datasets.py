"""What `qlora.upstream.datasets` uses of `datasets` still means the same."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, load_from_disk

from qlora.upstream.datasets import fingerprint, is_packaged_reader, set_fingerprint


def test_a_fingerprint_names_the_content_and_follows_every_change() -> None:
    rows = Dataset.from_dict({"text": ["a", "b"]})
    initial = fingerprint(rows)
    assert initial
    assert fingerprint(rows.select([0])) != initial
    set_fingerprint(rows, "ours")
    assert fingerprint(rows) == "ours"
    assert fingerprint(rows.select([0])) == fingerprint(rows.select([0])) != "ours"


def test_saved_rows_take_a_fingerprint_of_ours(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path)
    rows = load_from_disk(tmp_path)
    set_fingerprint(rows, "ours")
    assert fingerprint(rows) == "ours"


def test_the_names_of_file_readers_are_known() -> None:
    assert all(map(is_packaged_reader, ("json", "csv", "parquet", "text")))
    assert not is_packaged_reader("tatsu-lab/alpaca")
