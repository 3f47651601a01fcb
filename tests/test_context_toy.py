"""The toy of context: what tells a class lies where it should and nowhere else, and an image depends on its settings and number alone."""

import nibabel as nib
import numpy as np
import pytest

from datamodules import ContextToy
from datamodules.simulated.context_toy import CUES, NOISE
from lesionbench.errors import SuiteError
from lesionbench.keyed import numpy_generator

MANY = [CUES["background"](numpy_generator("many", n)) for n in range(200)]


def test_lesions_are_discs_on_the_near_side_of_either_class():
    classes = [int(label.max()) for _, label in MANY]
    assert set(classes) == {1, 2}
    assert np.mean(classes) == pytest.approx(1.5, abs=0.1)
    for image, label in MANY:
        assert image.shape == label.shape == (64, 64)
        assert image.dtype == np.float32
        assert len(np.unique(label)) == 2
        rows = np.flatnonzero(label.any(axis=1))
        assert rows.min() >= 2
        assert rows.max() <= 22
        assert 40 < (label > 0).sum() < 120


def test_the_class_shows_far_away_and_nowhere_else():
    """Logistic regression is not needed: means over what a part of the image shows."""
    sign = np.array([2 * int(label.max()) - 3 for _, label in MANY])
    parts = {
        "far": [image[45:].mean() for image, _ in MANY],
        "near": [image[:45][label[:45] == 0].mean() for image, label in MANY],
        "lesion": [image[label > 0].mean() for image, label in MANY],
        "size": [(label > 0).sum() for _, label in MANY],
    }
    correlation = {part: np.corrcoef(values, sign)[0, 1] for part, values in parts.items()}
    assert correlation.pop("far") > 0.99
    assert max(map(abs, correlation.values())) < 0.2
    lesion, near = np.array(parts["lesion"]), np.array(parts["near"])
    assert (lesion - near).mean() == pytest.approx(1, abs=0.02)
    assert np.mean([image[:45][label[:45] == 0].std() for image, label in MANY]) == pytest.approx(NOISE, rel=0.02)


def test_cases_are_made_once_and_by_their_number(tmp_path):
    few, more = ContextToy(tmp_path, count=2, simulation_seed=7), ContextToy(tmp_path, count=3, simulation_seed=7)
    few.materialize()
    stamp = (few.root / "labels" / "background_0000.nii.gz").stat().st_mtime_ns
    more.materialize()
    assert (few.root / "labels" / "background_0000.nii.gz").stat().st_mtime_ns == stamp
    assert [len(d.cases()) for d in (few, more)] == [2, 3]
    assert ContextToy(tmp_path, simulation_seed=8).root != few.root
    assert ContextToy(tmp_path, count=9, simulation_seed=7).root == few.root
    first, second = (nib.load(case.images["image"]).get_fdata()[..., 0] for case in more.cases()[:2])
    assert not np.allclose(first, second)


def test_an_unknown_cue_is_named(tmp_path):
    with pytest.raises(SuiteError, match=r"data\.cue 'backgrund'; did you mean 'background'"):
        ContextToy(tmp_path, cue="backgrund")
