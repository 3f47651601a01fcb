"""The toy of conflicting contrasts: where which contrast is bright, and that an image depends on its seed and number alone."""

import numpy as np
import pytest

from datamodules import ModalityToy
from datamodules.simulated.modality_toy import CHANNELS, WITHOUT_RIM, conflict

MANY = [conflict(0, n) for n in range(40)]


def lift(channel: str, label: int) -> float:
    """Mean brightness of a class over that of the edema, or of the edema over the background: 1.15 where the class shows, on average."""
    reference = 2 if label == 4 else 0
    found = [i[channel][m == label].mean() - i[channel][m == reference].mean() for i, m in MANY if (m == label).any()]
    return float(np.mean(found))


@pytest.mark.parametrize("channel", CHANNELS)
def test_contrasts_show_what_they_should(channel):
    tumor, rim = {"flair": (1.0, 0.0), "t2": (1.0, 0.0), "t1": (0.05, 0.0), "t1ce": (0.0, 1.0)}[channel]
    assert lift(channel, 2) == pytest.approx(tumor, abs=0.2)
    assert lift(channel, 4) == pytest.approx(rim, abs=0.25)


def test_no_contrast_alone_tells_the_tumor():
    """Bright voxels outside of the tumor in FLAIR or in T2 are many, in both few."""
    bright = {c: np.mean([((i[c] > 0.9) & (m == 0)).sum() / ((i[c] > 0.9) & (m > 0)).sum() for i, m in MANY]) for c in ("flair", "t2")}
    both = np.mean([((i["flair"] > 0.9) & (i["t2"] > 0.9) & (m == 0)).sum() / (m > 0).sum() for i, m in MANY])
    assert min(bright.values()) > 0.3
    assert both < 0.05


def test_enhancing_tumor_lies_inside_and_is_missing_sometimes():
    assert np.mean([not (label == 4).any() for _, label in MANY]) == pytest.approx(WITHOUT_RIM, abs=0.15)
    for images, label in MANY:
        assert set(np.unique(label)) <= {0, 2, 4}
        rim = np.argwhere(label == 4)
        around = np.array([label[max(x - 1, 0) : x + 2, max(y - 1, 0) : y + 2].min() for x, y in rim])
        assert len(rim) == 0 or (around > 0).mean() > 0.7  # its border is mostly edema
        assert all(image.shape == (48, 48) and image.dtype == np.float32 for image in images.values())


def test_same_seed_same_image():
    assert all((conflict(3, 5)[0][c] == conflict(3, 5)[0][c]).all() for c in CHANNELS)
    assert not (conflict(4, 5)[1] == conflict(3, 5)[1]).all()


def test_cases_are_made_once_and_by_their_number(tmp_path):
    few, more = ModalityToy(tmp_path, count=2, simulation_seed=7), ModalityToy(tmp_path, count=3, simulation_seed=7)
    few.materialize()
    stamp = (few.root / "labels" / "conflict_000.nii.gz").stat().st_mtime_ns
    more.materialize()
    assert (few.root / "labels" / "conflict_000.nii.gz").stat().st_mtime_ns == stamp
    assert [len(d.cases()) for d in (few, more)] == [2, 3]
    assert ModalityToy(tmp_path, simulation_seed=8).root != few.root
    import nibabel as nib

    assert np.allclose(nib.load(more.cases()[1].images["t1ce"]).get_fdata()[..., 0], conflict(7, 1)[0]["t1ce"])
