"""Turns rows of a file, of the hub or of a function into tokens with labels."""

from qlora.data.encode import column
from qlora.data.files import read_rows
from qlora.data.pipeline import Data, build_data
from qlora.data.report import DataReport
from qlora.data.sources import load_hub

__all__ = ["Data", "DataReport", "build_data", "column", "load_hub", "read_rows"]
