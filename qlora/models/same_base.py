"""Whether the base of the config is the one that an adapter, or a run, was trained on."""

from __future__ import annotations

import logging
from typing import Any

from qlora.config.schema import Config, SameBase, Weights
from qlora.errors import DataError
from qlora.models import random_weights
from qlora.models.fingerprint import Base, find_difference, fingerprint_random, fingerprint_weights
from qlora.models.weight_files import fetch_weights
from qlora.runtime.device import Placement
from qlora.upstream.transformers_models import commit_hash

log = logging.getLogger(__name__)


def identify_base(config: Config, model_config: Any, placement: Placement) -> Base:
    """Returns the base that the config names, with a fingerprint of its weights; those on the hub are downloaded."""
    model, scaling = config.model, config.model.rope_scaling
    if model.weights is Weights.random:
        settings = random_weights.random_base_settings(model, placement, config.seed)
        return Base(model.name, fingerprint=fingerprint_random(settings), random=settings, rope_scaling=scaling)
    files = fetch_weights(model)
    revision = commit_hash(model_config) or model.revision
    return Base(model.name, revision, None if files is None else fingerprint_weights(files), rope_scaling=scaling)


def check_base(user: str, trained: Base, present: Base, same_base: SameBase, *, otherwise: str = "") -> bool:
    """Returns whether `present` is the base that `user` was trained on, as far as it is known.

    Raises `DataError` if it is another one; `otherwise` adds a way out to its message. With `base=force`, and where
    there is no fingerprint to compare, that is a warning.
    """
    difference = find_difference(trained, present)
    if difference is None:
        return True
    what = f"{user} does not fit {difference.what}"
    if not difference.is_certain:
        log.warning("%s may not fit %s; %s", user, difference.what, difference.remedy)
    elif same_base is SameBase.force:
        log.warning("base=force: %s", what)
    else:
        raise DataError(f"{what}; {difference.remedy}{otherwise}, or use it in spite of that with base=force")
    return not difference.is_certain
