"""The toy slices: ranges, nesting, and that a slice depends on its seed and number alone."""

import numpy as np
import pytest

from datamodules import ToyBrains
from datamodules.simulated.toy_brains import LIFT, toy_brain


@pytest.mark.parametrize("index", range(4))
def test_slices_are_nested_brains_in_the_unit_interval(index):
    images, label = toy_brain(0, index)
    assert list(images) == ["t1", "t1ce", "t2", "flair"]
    brain = images["t1"] > 0
    assert 0.6 < brain.mean() < 0.75
    for image in images.values():
        assert image.shape == (32, 32)
        assert image.min() == 0
        assert image.max() <= 1
        assert ((image > 0) == brain).all()
    assert set(np.unique(label)) <= {0, 1, 2, 4}
    assert not label[~brain].any()
    for channel, (whole, core, ring) in LIFT.items():
        inside, edema = images[channel][label == 4].mean(), images[channel][label == 2].mean()
        assert inside - edema == pytest.approx(core + ring, abs=0.08), channel
        assert edema - images[channel][brain & (label == 0)].mean() == pytest.approx(whole, abs=0.08), channel


def test_same_seed_same_slice():
    (a, first), (b, second) = toy_brain(3, 5), toy_brain(3, 5)
    assert (first == second).all()
    assert all((a[c] == b[c]).all() for c in a)
    assert not (toy_brain(4, 5)[1] == first).all()


def test_cases_are_stacks_of_these_slices(tmp_path):
    data = ToyBrains(tmp_path, count=3, slices=2)
    data.materialize()
    data.materialize()  # a second time nothing happens
    cases = data.cases()
    assert [c.id for c in cases] == ["toy_0000", "toy_0001", "toy_0002"]
    import nibabel as nib

    flair = nib.load(cases[1].images["flair"]).get_fdata()
    assert flair.shape == (32, 32, 2)
    assert np.allclose(flair[..., 1], toy_brain(0, 3)[0]["flair"])
