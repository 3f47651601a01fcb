"""The toy of context: what tells a class lies where it should and nowhere else, and an image depends on its settings and number alone."""

import nibabel as nib
import numpy as np
import pytest

from datamodules import ContextToy
from datamodules.simulated.context_toy import CUES, GENERATOR, NOISE
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


FAR = {"background": 24, "corner": 28, "mirror": 29, "order": 27}  # rows or columns between a lesion and its cue, as the docstrings say
each_far_cue = pytest.mark.parametrize("cue", FAR)
each_cue = pytest.mark.parametrize("cue", CUES)


def both(cue: str, number: int):
    """Image and label of a draw, and of the same draw with the other class."""
    first, second = (CUES[cue](numpy_generator("both", number), other=other) for other in (False, True))
    return *first, *second


def test_every_cue_is_far_or_one_of_scale():
    assert set(CUES) == {*FAR, "sizes"}


@each_far_cue
def test_around_a_lesion_nothing_depends_on_its_class(cue):
    """A reader that sees less than `FAR` pixels to each side gets the same for both classes, so that it can do no better than guess."""
    nearest = []
    for number in range(100):
        image, label, image_of_other, label_of_other = both(cue, number)
        assert np.array_equal(label > 0, label_of_other > 0)
        assert set((label + label_of_other)[label > 0]) == {3}  # every lesion has the other class
        lesion, cues = (np.argwhere(where) for where in (label > 0, image != image_of_other))
        nearest.append(int(np.abs(cues[:, None] - lesion).max(axis=2).min()))
    assert FAR[cue] <= min(nearest) <= FAR[cue] + 5


def test_an_order_leaves_the_brightness_of_the_image_as_it_is():
    for number in range(20):
        image, _, image_of_other, _ = both("order", number)
        assert image.mean() == pytest.approx(image_of_other.mean(), abs=1e-5)


def test_a_corner_tells_by_its_sign():
    for number in range(20):
        image, label = CUES["corner"](numpy_generator("corner", number))
        assert (image[:8, :8].mean() > 0) == (label.max() == 2)


def brightest(part: np.ndarray) -> tuple[int, int]:
    """Row and column of the middle of the brightest 7 x 7 pixels."""
    means = np.lib.stride_tricks.sliding_window_view(part, (7, 7)).mean(axis=(2, 3))
    row, column = np.unravel_index(means.argmax(), means.shape)
    return int(row) + 3, int(column) + 3


def test_a_marker_lies_across_and_tells_by_its_sign():
    sides = set()
    for number in range(50):
        image, label = CUES["mirror"](numpy_generator("mirror", number))
        across = np.argwhere(label).mean(axis=0).round().astype(int) * (1, -1) + (0, 63)
        marker = image[across[0] - 2 : across[0] + 3, across[1] - 2 : across[1] + 3].mean()
        assert abs(marker) > 1
        assert (marker > 0) == (label.max() == 2)
        sides.add(across[1] < 32)
    assert sides == {False, True}


def test_two_markers_tell_by_their_order():
    for number in range(50):
        image, label = CUES["order"](numpy_generator("order", number))
        bright, dark = brightest(image[40:])[1], brightest(-image[40:])[1]
        assert 15 <= abs(bright - dark) <= 31
        assert (bright < dark) == (label.max() == 2)


def test_lesions_of_two_sizes_have_the_same_core():
    places = set()
    for number in range(50):
        image, label, image_of_other, label_of_other = both("sizes", number)
        assert (label == 1).sum() < 90 < 190 < (label == 2).sum()
        for side, of_other, classes, classes_of_other in zip(
            *(np.split(array, 2, axis=1) for array in (image, image_of_other, label, label_of_other)), strict=True
        ):
            assert {int(classes.max()), int(classes_of_other.max())} == {1, 2}
            small = classes if classes.max() == 1 else classes_of_other
            row, column = np.round(np.argwhere(small).mean(axis=0)).astype(int)
            core = slice(row - 2, row + 3), slice(column - 2, column + 3)
            assert np.array_equal(side[core], of_other[core])
            assert not np.array_equal(side, of_other)
        places.add(int(label[:, :32].max()))
    assert places == {1, 2}


@each_cue
def test_images_are_those_of_their_draws(cue):
    first, again, next_one = (CUES[cue](numpy_generator("draw", number)) for number in (0, 0, 1))
    for array, same, different, kind in zip(first, again, next_one, (np.float32, np.uint8), strict=True):
        assert array.shape == (64, 64)
        assert array.dtype == kind
        assert np.array_equal(array, same)
        assert not np.array_equal(array, different)


@each_cue
def test_every_cue_makes_cases(cue, tmp_path):
    data = ContextToy(tmp_path, cue=cue, count=2)
    data.materialize()
    image, label = CUES[cue](numpy_generator("context", GENERATOR, cue, 0, 1))
    case = data.cases()[1]
    assert np.array_equal(nib.load(case.images["image"]).get_fdata()[..., 0], image)
    assert np.array_equal(nib.load(case.label).get_fdata()[..., 0], label)


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
