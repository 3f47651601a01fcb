"""ATLAS: both layouts, merged masks, the published test scans."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from datamodules import Atlas, Split
from datamodules.readers.atlas_files import NAMED_SPLITS, find_atlas, merge_masks
from lesionbench.errors import SuiteError
from lesionbench.geometry import write_volume
from tests.fake_data import ATLAS_TEST, LPS, write_fake_atlas

BOX = np.zeros((4, 4, 3))


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    return write_fake_atlas(tmp_path_factory.mktemp("atlas1"))


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    return write_fake_atlas(tmp_path_factory.mktemp("atlas2"), release="2.0")


def touch(path: Path) -> Path:
    return write_volume(path, BOX, LPS)


# layouts


def test_release_1_2_of_cohorts(old):
    found = find_atlas(old, "1.2")
    assert len(found) == 31
    case, masks = found[1]
    assert (case.id, case.patient, case.site, list(case.images)) == ("c0001s0001t01", "c0001s0001", "c0001", ["t1"])
    assert [m.name for m in masks] == ["c0001s0001t01_LesionSmooth_1_stx.nii.gz", "c0001s0001t01_LesionSmooth_stx.nii.gz"]
    assert next(c for c, _ in found if c.id == "c0010s0002t02").patient == "c0010s0002"


def test_release_1_2_of_sites_and_time_points(tmp_path):
    for time in ("t01", "t02"):
        touch(tmp_path / "Site3" / "031768" / time / "031768_t1w_deface_stx.nii.gz")
        touch(tmp_path / "Site3" / "031768" / time / "031768_LesionSmooth_2_stx.nii.gz")
    touch(tmp_path / "Site3" / "031769" / "t01" / "031769_t1w_deface_stx.nii.gz")
    touch(tmp_path / "Site3" / "031769" / "t01" / "031768_LesionSmooth_stx.nii.gz")  # another subject's
    found = find_atlas(tmp_path, "1.2")
    assert [(c.id, c.patient, c.site, len(m)) for c, m in found] == [
        ("031768_t01", "031768", "Site3", 1),
        ("031768_t02", "031768", "Site3", 1),
        ("031769_t01", "031769", "Site3", 0),
    ]


def test_release_2_0(new):
    found = find_atlas(new, "2.0")
    assert [(c.id, c.patient, c.site, len(m)) for c, m in found] == [
        ("sub-r009s000", "sub-r009s000", "R009", 1),
        ("sub-r009s001", "sub-r009s001", "R009", 2),
        ("sub-r009s002", "sub-r009s002", "R009", 1),
        ("sub-r009s003_ses-2", "sub-r009s003", "R009", 2),
        ("sub-r009s004", "sub-r009s004", "R009", 0),
    ]


def test_what_is_wrong_is_said(tmp_path, new):
    with pytest.raises(SuiteError, match="no such folder"):
        find_atlas(tmp_path / "nowhere", "1.2")
    with pytest.raises(SuiteError, match=r"1\.2"):
        find_atlas(new, "1.3")
    with pytest.raises(SuiteError, match="LesionSmooth"):
        find_atlas(new, "1.2")
    for place in "ab":
        touch(tmp_path / place / "c0003s0002t01_t1w_stx.nii.gz")
    with pytest.raises(SuiteError, match="c0003s0002t01"):
        find_atlas(tmp_path, "1.2")
    with pytest.raises(SuiteError, match="named split"):
        Atlas(new, named_split="wong")
    with pytest.raises(SuiteError, match="one of them"):
        Atlas(new, named_split="wong2021", split=Split(file="split.json"))


# labels


def test_masks_are_merged(old):
    data = Atlas(old)
    data.materialize()
    case = next(c for c in data.cases() if c.id == "c0001s0001t01")
    parts = [np.asarray(nib.load(m).dataobj) for c, masks in find_atlas(old, "1.2") if c.id == case.id for m in masks]
    merged = nib.load(case.label)
    assert np.array_equal(np.asarray(merged.dataobj), ((parts[0] + parts[1].astype(int)) > 0).astype(np.uint8))
    assert all(0 < (p > 0).sum() < np.asarray(merged.dataobj).sum() for p in parts)
    assert np.allclose(merged.affine, LPS)
    assert case.label.is_relative_to(data.cache_root)
    assert not [f for f in data.findings(progress=False) if f.level == "error"]


def test_merging_again_does_nothing_unless_a_mask_is_newer(tmp_path):
    import os

    masks = [write_volume(tmp_path / f"{n}.nii.gz", np.eye(4)[:, :, None] * n, LPS) for n in (0, 1)]
    out = merge_masks(masks, tmp_path / "out.nii.gz")
    before = out.stat().st_mtime_ns
    assert merge_masks(masks, out).stat().st_mtime_ns == before
    write_volume(masks[0], np.ones((4, 4, 1)), LPS)
    os.utime(masks[0], ns=(before + 10**9,) * 2)
    assert np.asarray(nib.load(merge_masks(masks, out)).dataobj).all()
    with pytest.raises(SuiteError, match="one grid"):
        merge_masks([masks[0], touch(tmp_path / "other.nii.gz")], tmp_path / "new.nii.gz")


def test_scans_without_masks_are_in_no_part(new):
    data = Atlas(new, release=2.0, split=Split(test=1, val=0))
    data.materialize()
    parts = data.divided(data.cases())
    assert len(data.cases()) == 5
    assert sorted(c.id for part in ("train", "test") for c in parts[part]) == [f"sub-r009s00{n}" for n in range(3)] + ["sub-r009s003_ses-2"]


# the published split


def test_published_test_scans(old):
    assert sorted(NAMED_SPLITS["wong2021"]) == sorted(ATLAS_TEST.split())
    assert len(set(NAMED_SPLITS["wong2021"])) == 27
    data = Atlas(old, named_split="wong2021", split=Split(val=1))
    parts = data.divided(data.cases())
    assert {c.id for c in parts["test"]} == set(NAMED_SPLITS["wong2021"])
    assert sorted(c.id for part in ("train", "val") for c in parts[part]) == [f"c0001s{n:04d}t01" for n in range(4)]
    assert len(parts["val"]) == 1


def test_other_scans_of_a_test_patient_do_not_train(tmp_path):
    root = write_fake_atlas(tmp_path, count=2)
    for end in ("t1w", "LesionSmooth"):
        touch(root / "standard" / "c0010s0002t01" / f"c0010s0002t01_{end}_stx.nii.gz")
    data = Atlas(root, named_split="wong2021", split=Split(val=0))
    parts = data.divided(data.cases())
    assert "c0010s0002t01" not in {c.id for part in ("train", "val", "test") for c in parts[part]}


def test_published_split_needs_its_scans(old, new):
    data = Atlas(new, release="2.0", named_split="wong2021")
    cases = data.cases()
    with pytest.raises(SuiteError, match="27 of its 27"):
        data.divided(cases)
    few = Atlas(old, named_split="wong2021", split=Split(val=0), limit_cases=6)
    assert {name: len(part) for name, part in few.divided(few.cases()).items() if name in ("train", "test")} == {"train": 4, "test": 2}
