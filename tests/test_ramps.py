"""Ramps by hand, and how a method counts."""

import math
from types import SimpleNamespace

import pytest

from lesionbench.errors import SuiteError
from lesionbench.task import Task
from lightning_modules.base import Method
from lightning_modules.ramps import Ramp, batches, gaussian_ramp, linear_ramp, whole_batches


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


def test_lengths_in_batches_and_as_shares():
    assert (batches(0.25, 10), batches(0, 10), batches(3, 10)) == (2.5, 0, 3)
    assert (whole_batches(0.25, 10), whole_batches(0, 10), whole_batches(3, 10)) == (2, 0, 3)


def test_a_method_counts_its_progress_in_batches():
    method = Method(Task(("t1",), {"background": 0, "lesion": 1}))
    method.__dict__["_trainer"] = SimpleNamespace(num_training_batches=5, max_epochs=4)
    method.iteration = 4
    assert method.total_iterations == 20
    assert (method.progress(), method.progress(8), method.progress(0.5)) == (0.2, 0.5, 0.4)
    assert (method.warmup_factor(10), method.warmup_factor(0.5), method.warmup_factor(3), method.warmup_factor(0)) == (0.5, 0.5, 1, 1)
