"""Has transformers load a model from what is computed of its files, tensor by tensor; none of it is documented.

transformers opens the files as slices by name, each of which is read when its tensor is needed; in between, another
mapping of the same kind can take their place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers import modeling_utils

LOADS = "convert_and_load_state_dict_in_model"


def read_slice(part: Any) -> Tensor:
    """Returns the tensor of a slice as transformers opens it."""
    tensor: Tensor = part[...]
    return tensor


@contextlib.contextmanager
def reading_files_as(view: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Iterator[None]:
    """Inside, `from_pretrained` loads the tensors of `view(slices)`; a tensor is what has `[...]`."""
    load = getattr(modeling_utils, LOADS)

    def load_viewed(*, state_dict: Mapping[str, Any], **options: Any) -> Any:
        return load(state_dict=view(state_dict), **options)

    setattr(modeling_utils, LOADS, load_viewed)
    try:
        yield
    finally:
        setattr(modeling_utils, LOADS, load)
