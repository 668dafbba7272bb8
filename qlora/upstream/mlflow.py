"""A limit of MLflow that its public interface does not name."""

from __future__ import annotations


def max_param_length() -> int:
    """Returns the most characters that the value of a parameter may have; a longer one fails the whole request."""
    from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

    return int(MAX_PARAM_VAL_LENGTH)
