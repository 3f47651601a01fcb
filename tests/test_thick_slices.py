"""Synthetic thick slices, and the intensity augmentation that they and others can use."""

import numpy as np
import pytest
import torch
import torchio
from scipy.ndimage import label as components

from datamodules import Split, ThickSlices
from datamodules.simulated.thick_slices import thick_slices
from datamodules.transforms.intensity import RandomScaleShift
from lesionbench.errors import SuiteError
from lesionbench.keyed import torch_seeded


def test_a_case_depends_on_its_seed_and_number_alone():
    image, truth = thick_slices(3, 5)
    again, _ = thick_slices(3, 5)
    assert np.array_equal(image, again)
    assert not np.array_equal(image, thick_slices(3, 6)[0])
    assert not np.array_equal(image, thick_slices(4, 5)[0])
    assert image.shape == truth.shape == (24, 24, 10)


def test_lesions_go_on_over_slices_and_look_alikes_do_not():
    """In noise-free volumes, what is bright without being lesion touches nothing bright on the next slice at the same place."""
    depths, alone = [], 0
    for index in range(20):
        image, truth = thick_slices(0, index, noise=0.0)
        slices = np.flatnonzero(truth.any(axis=(0, 1)))
        assert np.array_equal(slices, np.arange(slices[0], slices[-1] + 1))
        depths.append(len(slices))
        assert image[truth > 0].mean() - image[truth == 0].mean() > 0.5
        bright, count = components((image - np.median(image) > 0.9) & (truth == 0))
        alone += sum(len(np.flatnonzero((bright == n).any(axis=(0, 1)))) == 1 for n in range(1, count + 1) if (bright == n).sum() > 15)
    assert set(depths) == {4, 5}
    assert alone > 40  # 3 to 5 per case, some of them fused or too faint


def test_files_are_made_once_and_found(tmp_path):
    data = ThickSlices(tmp_path, count=4, split=Split(test=1, val=1))
    data.prepare_data()
    file = data.cases()[0].label
    stamp = file.stat().st_mtime_ns
    again = ThickSlices(tmp_path, count=3, split=Split(test=1, val=1))
    again.prepare_data()
    assert file.stat().st_mtime_ns == stamp
    assert [c.id for c in again.cases()] == ["thick_000", "thick_001", "thick_002"]
    assert ThickSlices(tmp_path, simulation_seed=1).root != data.root
    data.setup("test")
    case = next(iter(data.test_dataloader()))
    assert case["geometry"][0].network_spacing == (1, 1, 6)
    assert set(case["label"].unique().tolist()) == {0, 1}


def test_intensity_is_scaled_and_shifted_and_labels_are_not():
    image, label = torch.randn(2, 6, 6, 6), torch.randint(0, 3, (1, 6, 6, 6))
    subject = torchio.Subject(image=torchio.ScalarImage(tensor=image), label=torchio.LabelMap(tensor=label))
    found = []
    for seed in (0, 0, 1):
        with torch_seeded(seed):
            changed = RandomScaleShift(scale=0.2, shift=0.5)(subject)
        assert torch.equal(changed["label"].data, label)
        factor, offset = np.polyfit(image.flatten().numpy(), changed["image"].data.flatten().numpy(), 1)
        assert 0.8 <= factor <= 1.2
        assert -0.5 <= offset <= 0.5
        assert torch.allclose(changed["image"].data, image * factor + offset, atol=1e-5)
        found.append((factor, offset))
    assert found[0] == found[1] != found[2]
    with pytest.raises(SuiteError, match="negative"):
        RandomScaleShift(scale=-1)
