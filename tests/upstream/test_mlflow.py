"""The private parts of MLflow that `qlora.upstream.mlflow` uses exist and have the expected types."""

import pytest

pytest.importorskip("mlflow")

from qlora.upstream.mlflow import max_param_length


def test_the_limit_of_a_parameter_is_a_number_of_characters() -> None:
    assert 250 <= max_param_length() <= 100_000
