"""How many rows a training run would show in a pass, without tokens: for the plan, which loads nothing else."""

from __future__ import annotations

from qlora.config.paths import cache_root
from qlora.config.schema import DataConfig
from qlora.data.cache import Cache
from qlora.data.ingest.sources import is_file_path, load_rows
from qlora.text import parse_size


def count_training_rows(config: DataConfig) -> int | None:
    """Returns the rows of local files that are not held out; None: they are elsewhere, or packs are what counts.

    Rows that would be dropped once they are tokens are among them. Raises a `UserError` for files that cannot be read.
    """
    sources = [(part.path, part.split, part.weight) for part in config.mix.values()] or [
        (config.path, config.split, 1.0)
    ]
    if config.packing or not all(path is not None and is_file_path(path) for path, _, _ in sources):
        return None
    cache, most = Cache(cache_root(config.cache_dir)), parse_size(config.max_row_bytes) or 0
    counts = [len(load_rows(str(path), cache=cache, split=split, max_row_bytes=most)) for path, split, _ in sources]
    total = sum(counts)
    held_out = config.held_out_count(total) if config.splits_off else 0
    fraction = max(total - held_out, 0) / max(total, 1)
    rows = sum(round(count * fraction * weight) for count, (_, _, weight) in zip(counts, sources, strict=True))
    return rows if config.max_train_samples is None else min(rows, config.max_train_samples)
