"""Ramps by hand."""

import math

import pytest

from lesionbench.errors import SuiteError
from lightning_modules.ramps import Ramp, gaussian_ramp, linear_ramp


def test_shapes_by_hand():
    assert gaussian_ramp(0) == pytest.approx(math.exp(-5))
    assert gaussian_ramp(0.5) == pytest.approx(math.exp(-1.25))
    assert gaussian_ramp(1) == gaussian_ramp(7) == 1
    assert [linear_ramp(p) for p in (-1, 0, 0.25, 1, 2)] == [0, 0, 0.25, 1, 1]


@pytest.mark.parametrize(("length", "half"), [(0.4, 20), (40, 20)])
def test_length_is_a_count_or_a_share(length, half):
    ramp = Ramp("linear", length)
    assert ramp(0, 100) == 0
    assert ramp(half, 100) == 0.5
    assert ramp(40, 100) == ramp(100, 100) == 1


def test_without_a_ramp_the_weight_is_whole_from_the_start():
    assert Ramp("none")(0, 100) == Ramp("gaussian", 0)(0, 100) == 1


def test_refuses_unknown_shapes_and_negative_lengths():
    with pytest.raises(SuiteError, match="gausian"):
        Ramp("gausian")
    with pytest.raises(SuiteError, match="length"):
        Ramp("linear", -1)
