"""What a person reads while a run goes on; libraries are silent unless asked."""

from __future__ import annotations

import logging
import os
import warnings


class OwnLines(logging.Filter):
    """Lets this project's lines through to the console, and every library's errors."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether `record` belongs on the console."""
        own = record.name.split(".")[0] in ("qlora", "__main__")
        return own or record.levelno >= logging.ERROR or logging.getLogger().level <= logging.DEBUG


def quiet_libraries(*, verbose: bool = False) -> None:
    """Sends library chatter and warnings to `train.log` only; `verbose` (`hydra.verbose=true`) leaves it alone."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if verbose:
        return
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    logging.captureWarnings(True)
    warnings.simplefilter("default")
