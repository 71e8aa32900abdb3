"""Annotated shapes are checked in the tests: the hook of `tests/conftest.py` is in place where there are any."""

import pytest
import torch
from jaxtyping import TypeCheckError

from lowrank_kit.spectral.eigenpairs import eigh
from lowrank_kit.spectral.factors import LowRankFactors


def test_a_call_with_another_shape_is_refused():
    with pytest.raises(TypeCheckError):
        eigh(torch.zeros(2, 3, dtype=torch.float64))


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(TypeCheckError):
        LowRankFactors(torch.zeros(4, 2), torch.zeros(3, 5))
