"""The toy of blobs: what is in an image, which images a draw changes, what the gap does."""

import numpy as np
import pytest

from datamodules import Blobs, Preprocessing, Split
from datamodules.simulated.blobs import blob
from lesionbench.geometry import read_volume
from lesionbench.keyed import numpy_generator

OPTIONS = {
    "count": 14, "view": "slice", "patch": (48, 48), "preprocessing": Preprocessing(crop="none", normalize="none"), "check": False,
}  # fmt: skip


def made(root, **options) -> Blobs:
    data = Blobs(root, **{**OPTIONS, "split": Split(test=4, val=2, labeled=2), **options})
    data.prepare_data()
    data.setup()
    return data


def content(data, part) -> dict[str, bytes]:
    return {case.id: read_volume(next(iter(case.images.values())))[0].tobytes() for case in data.parts[part]}


def test_an_image_is_normalized_and_the_object_is_as_large_as_described():
    for number in range(20):
        image, mask = blob(numpy_generator("test", number))
        assert image.shape == mask.shape == (48, 48)
        assert abs(image.mean()) < 1e-5
        assert image.std() == pytest.approx(1, abs=1e-5)
        assert 0.6 * np.pi * 6**2 < mask.sum() < 1.5 * np.pi * 11**2
        assert image[mask].mean() > image[~mask].mean()


def test_look_alikes_lie_beside_the_object():
    """Somewhere outside the object, images are as bright as inside: brightness alone does not tell."""
    found = [blob(numpy_generator("test", number)) for number in range(20)]
    assert np.mean([(image[~mask] > np.median(image[mask])).sum() > 10 for image, mask in found]) > 0.7


def test_same_settings_same_files_and_held_out_images_stay(tmp_path):
    one, again, other = made(tmp_path / "a"), made(tmp_path / "b"), made(tmp_path / "a", draw=1)
    for part in ("labeled", "unlabeled", "val", "test"):
        assert content(one, part) == content(again, part)
        assert (content(one, part) == content(other, part)) == (part in ("val", "test"))
        assert list(content(one, part)) == list(content(other, part))
    assert [len(one.parts[part]) for part in ("labeled", "unlabeled", "val", "test")] == [2, 6, 2, 4]


def test_the_gap_is_in_the_labeled_images_alone(tmp_path, monkeypatch):
    asked = []

    def recorded(rng, contrast=(0.8, 1.6)):
        asked.append(contrast)
        return blob(rng, contrast)

    monkeypatch.setattr("datamodules.simulated.blobs.blob", recorded)
    plain, gap = made(tmp_path), made(tmp_path, gap=True)
    assert asked[:14] == [(0.8, 1.6)] * 14
    labeled = {int(case.id.rpartition("_")[2]) for case in gap.parts["labeled"]}
    assert [n for n, contrast in enumerate(asked[14:]) if contrast == (1.25, 1.6)] == sorted(labeled)
    assert content(plain, "test") == content(gap, "test")
    assert content(plain, "labeled") != content(gap, "labeled")
