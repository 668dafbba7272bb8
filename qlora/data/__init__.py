"""Turns rows of a file, of the hub or of a function into tokens with labels."""

from qlora.data.batching.token_store import column
from qlora.data.data_report import DataReport
from qlora.data.ingest.row_files import read_rows
from qlora.data.ingest.sources import load_hub
from qlora.data.pipeline import Data, build_data

__all__ = ["Data", "DataReport", "build_data", "column", "load_hub", "read_rows"]
