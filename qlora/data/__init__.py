"""Turns rows of a file, of the hub or of a function into tokens with labels."""

from qlora.data.pipeline import Data, DataReport, build_data

__all__ = ["Data", "DataReport", "build_data"]
