"""Which tokens the rows of a data set hold."""

from __future__ import annotations

from collections.abc import Collection

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset


def first_used(rows: Dataset, ids: Collection[int]) -> int | None:
    """Returns the first token of `rows` that is one of `ids`; None: they hold none of them."""
    searched = pa.array(sorted(ids))
    columns = [name for name in ("input_ids", "rejected_ids") if name in rows.column_names]
    for batch in rows.select_columns(columns).with_format("arrow").iter(10_000):
        for name in columns:
            tokens = pc.list_flatten(batch[name])
            used = tokens.filter(pc.is_in(tokens, value_set=searched.cast(tokens.type)))
            if len(used):
                return int(used[0].as_py())
    return None
