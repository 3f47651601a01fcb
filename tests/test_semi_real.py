"""Semi-real strokes: masks painted into brains, one case per mask and brain, split by mask, trained and tested in brains of choice."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from datamodules import LesionInsertion, SemiReal, Split
from datamodules.simulated.lesion_insertion import brain, insert_lesion
from lesionbench.errors import SuiteError
from lesionbench.geometry import write_volume
from tests.fake_data import write_fake_masks

COARSE = LesionInsertion(spacing=4.0)
STILL = LesionInsertion(spacing=4.0, deformation=0, contrast=0, noise=0, bias=0, strength=(1, 1), patchiness=0)


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    return write_fake_masks(tmp_path_factory.mktemp("masks"))


def other_brain(folder):
    """A second T1: the template turned into other array axes, another voxel size and another scale of intensities."""
    into = brain(None, 1.0)
    t1 = ndimage.gaussian_filter(into.t1, 0.84)[::2, ::2, ::2][::-1] * 700
    affine = np.linalg.inv(into.to_voxel) @ np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] += affine[:3, 0] * (t1.shape[0] - 1)
    affine[:3, 0] *= -1
    return write_volume(folder / "masks" / "other.nii.gz", t1.astype(np.float32), affine)


def test_a_lesion_is_where_its_mask_is_and_dark(masks):
    path = masks / "masks" / "lesion_1.nii.gz"
    t1, label, affine = insert_lesion(replace(STILL, spacing=2.0), brain(None, 2.0), path, "icbm152")
    source = nib.load(path)
    theirs = np.argwhere(np.asarray(source.dataobj) > 0)
    ours = np.argwhere(label > 0)
    center, truth = (nib.affines.apply_affine(a, p).mean(axis=0) for a, p in ((affine, ours), (source.affine, theirs)))
    assert np.abs(center - truth).max() < 1
    assert len(ours) == pytest.approx(len(theirs), rel=0.1)
    shell = ndimage.binary_dilation(label > 0, iterations=2) & ~ndimage.binary_dilation(label > 0)
    assert t1[ndimage.binary_erosion(label > 0)].mean() < 0.6 * t1[shell & (t1 > 0)].mean()
    assert t1[t1 > 0].min() >= 1
    assert (t1.dtype, label.dtype) == (np.int16, np.uint8)


def test_a_case_depends_on_settings_mask_and_brain_only(masks):
    paths = [masks / "masks" / f"lesion_{n}.nii.gz" for n in (0, 1)]
    into = brain(None, 4.0)
    first = insert_lesion(COARSE, into, paths[0], "a")
    insert_lesion(COARSE, into, paths[1], "a")
    again = insert_lesion(COARSE, into, paths[0], "a")
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    for other in (insert_lesion(COARSE, into, paths[0], "b"), insert_lesion(LesionInsertion(seed=1, spacing=4.0), into, paths[0], "a")):
        assert not np.array_equal(first[0] > 0, other[0] > 0)  # its own deformation


def test_brains_are_put_on_one_scale(masks):
    path = other_brain(masks)
    shapes = [insert_lesion(STILL, brain(p, 4.0), masks / "masks" / "lesion_0.nii.gz", "x") for p in (None, path)]
    same = np.corrcoef(*(t1[t1 > 0] / t1.max() for t1, _, _ in shapes))[0, 1]
    assert same > 0.95
    assert np.array_equal(shapes[0][1], shapes[1][1])
    path.unlink()
    with pytest.raises(SuiteError, match="white matter"):
        brain(write_volume(masks / "dark.nii.gz", np.zeros((8, 8, 8)), np.eye(4)), 4.0)


def test_cases_are_made_once_and_split_by_mask(masks, tmp_path):
    other = other_brain(masks)
    options = {"masks": masks / "masks", "brains": {"icbm152": None, "other": other}, "insertion": COARSE, "check": False}
    data = SemiReal(tmp_path, split=Split(test=1, val=1), **options)
    assert len(data.cases()) == 8  # 4 masks in 2 brains; the brain's own file is no mask
    data.prepare_data()
    data.setup("fit")
    patients = {part: {c.patient for c in data.parts[part]} for part in ("train", "val", "test")}
    assert [len(patients[p]) for p in ("train", "val", "test")] == [2, 1, 1]
    assert [len(data.parts[p]) for p in ("train", "val", "test")] == [4, 2, 2]
    files = sorted((data.root / "images").iterdir())
    stamps = [f.stat().st_mtime_ns for f in files]
    data.materialize()
    assert [f.stat().st_mtime_ns for f in files] == stamps
    crossed = SemiReal(tmp_path, split=Split(test=1, val=1), train_brains=["other"], test_brains=["icbm152"], **options)
    parts = crossed.divided(crossed.cases())
    assert {c.site for part in ("train", "val", "labeled") for c in parts[part]} == {"other"}
    assert {c.site for c in parts["test"]} == {"icbm152"}
    assert not {c.patient for c in parts["train"]} & {c.patient for c in parts["test"]}
    other.unlink()


def test_what_is_wrong_is_said(masks, tmp_path):
    with pytest.raises(SuiteError, match="train_brains"):
        SemiReal(tmp_path, masks=masks / "masks", brains={"icbm152": None}, train_brains=["colin"])
    with pytest.raises(SuiteError, match="no such folder"):
        SemiReal(tmp_path, masks=tmp_path / "none", brains={"icbm152": None}).cases()
    with pytest.raises(SuiteError, match="no NIfTI"):
        SemiReal(tmp_path, masks=tmp_path, brains={"icbm152": None}).cases()
    empty = write_volume(tmp_path / "empty.nii.gz", np.zeros((4, 4, 4)), np.eye(4))
    with pytest.raises(SuiteError, match="empty lesion mask"):
        insert_lesion(COARSE, brain(None, 4.0), empty, "x")
    for wrong in ({"spacing": 9}, {"strength": (0.8, 0.2)}, {"noise": -1}):
        with pytest.raises(SuiteError, match=next(iter(wrong))):
            LesionInsertion(**wrong)


def test_real_masks_in_two_brains(real_data, tmp_path):
    folder = real_data / "stroke_masks"
    data = SemiReal(tmp_path, masks=folder, brains={"icbm152": None, "colin27": folder / "ch2.nii.gz"}, insertion=COARSE, limit_cases=4)
    assert len(data.find_cases()) == 120
    data.materialize()
    for case in data.cases():
        t1, label = (np.asarray(nib.load(p).dataobj) for p in (case.images["t1"], case.label))
        real = (np.asarray(nib.load(case.attributes["mask"]).dataobj) > 0).sum()
        assert label.sum() * 64 == pytest.approx(real, rel=0.35)  # deformed, and cut at the brain's surface
        assert t1[label > 0].mean() < t1[(t1 > 0) & (label == 0)].mean()
