"""Turns rows of a file, of the hub or of a function into tokens with labels."""

from qlora.data.encode import column
from qlora.data.pipeline import Data, build_data
from qlora.data.report import DataReport

__all__ = ["Data", "DataReport", "build_data", "column"]
