"""The corpus as rows of the `segments` format: what `data=demo-corpus` trains and measures on."""

from collections.abc import Iterator
from typing import Any, Final

from demo_world.corpus import documents, probes

TRAINING_SEED: Final = 1
PROBE_SEED: Final = 2
PROBES: Final = 2000
MANY: Final = 2**62


def training_rows() -> Iterator[dict[str, Any]]:
    """Yields documents without end; `data.max_train_samples` says how many to take."""
    for document in documents(MANY, TRAINING_SEED):
        yield {"segments": [list(segment) for segment in document]}


def probe_rows() -> list[dict[str, str]]:
    """Returns questions in the corpus' own form, which the base must answer before it may be shipped."""
    return probes(PROBES, PROBE_SEED)
