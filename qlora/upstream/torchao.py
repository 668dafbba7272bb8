"""torchao, which transformers imports wherever it is installed."""

from __future__ import annotations

import logging

REPORTS = ("torchao", "torch.utils._pytree")
"""The loggers of its import: it names kernels of other machines, and torch (2.13) how it registers its enums."""


def import_quietly() -> None:
    """Lets an import of torchao report errors alone: its warnings are of no concern to a run."""
    for name in REPORTS:
        logging.getLogger(name).setLevel(logging.ERROR)
