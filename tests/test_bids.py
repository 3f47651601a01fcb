"""BIDS folders in the layouts of ISLES 2022 and ATLAS R2.0, and one of sessions, derivatives and tables."""

from pathlib import Path

import numpy as np
import pytest

from datamodules.bids import BIDS
from datamodules.readers.bids_files import find_bids
from datamodules.split import Split
from lesionbench.errors import SuiteError
from lesionbench.geometry import write_volume
from tests.fake_data import LPS, fake_case
from tests.harness import SMALL, rows, run, run_folders

SHAPE = (12, 10, 9)


def write(root: Path, *names: str, label: str | None = None, seed: int = 0) -> None:
    """One case: images at these paths, and its label."""
    images, truth = fake_case(tuple(names), (1,), SHAPE, (seed,))
    for name, array in images.items():
        write_volume(root / name, array, LPS)
    if label:
        write_volume(root / label, truth.astype(np.uint8), LPS)


def write_isles(root: Path, count: int = 6) -> Path:
    for n in range(1, count + 1):
        case = f"sub-strokecase{n:04d}"
        raw, name = f"{case}/ses-0001", f"{case}_ses-0001"
        names = (f"{raw}/dwi/{name}_dwi.nii.gz", f"{raw}/dwi/{name}_adc.nii.gz", f"{raw}/anat/{name}_FLAIR.nii.gz")
        write(root, *names, label=f"derivatives/{case}/ses-0001/{name}_msk.nii.gz", seed=n)
    return root


def test_isles_2022(tmp_path):
    cases = find_bids(write_isles(tmp_path), {"dwi": "dwi", "adc": "adc"}, "msk")
    assert [c.id for c in cases] == [f"sub-strokecase{n:04d}_ses-0001" for n in range(1, 7)]
    for case in cases:
        assert [p.name for p in case.files] == [f"{case.id}_dwi.nii.gz", f"{case.id}_adc.nii.gz", f"{case.id}_msk.nii.gz"]
        assert case.patient == case.id.partition("_")[0]


def test_atlas_r2_below_cohorts_with_masks_beside_the_images(tmp_path):
    for cohort, subject in (("R001", "r001s001"), ("R027", "r027s002")):
        name = f"sub-{subject}_ses-1_space-MNI152NLin2009aSym"
        home = f"Training/{cohort}/sub-{subject}/ses-1/anat"
        write(tmp_path, f"{home}/{name}_T1w.nii.gz", label=f"{home}/{name}_label-L_desc-T1lesion_mask.nii.gz")
    cases = find_bids(tmp_path, {"t1": "space-MNI152NLin2009aSym_T1w"}, "label-L_desc-T1lesion_mask")
    assert [c.id for c in cases] == ["sub-r001s001_ses-1", "sub-r027s002_ses-1"]
    assert all(c.label.name.endswith("_label-L_desc-T1lesion_mask.nii.gz") for c in cases)


def test_sessions_tables_and_derivatives(tmp_path):
    for subject, session in (("01", "a"), ("01", "b"), ("02", "a")):
        name = f"sub-{subject}_ses-{session}"
        write(tmp_path, f"sub-{subject}/ses-{session}/anat/{name}_T1w.nii.gz", f"derivatives/prep/sub-{subject}/{name}_T1w.nii.gz")
        for rater in ("one", "two"):
            write(tmp_path, label=f"derivatives/{rater}/sub-{subject}/{name}_mask.nii.gz")
    write(tmp_path, "sub-03/anat/sub-03_T1w.nii.gz")
    (tmp_path / "participants.tsv").write_text("participant_id\tage\tsite\tsex\nsub-01\t61\tnorth\tF\nsub-02\tn/a\tsouth\tM\n")
    (tmp_path / "sub-01" / "sub-01_sessions.tsv").write_text("session_id\tdays\nses-a\t0\nses-b\t90\n")
    with pytest.raises(
        SuiteError, match=r"two files for channel t1 \(T1w\): .*give a longer end, or a folder before it: derivatives/NAME:T1w"
    ):
        find_bids(tmp_path, {"t1": "T1w"}, None)
    with pytest.raises(SuiteError, match=r"two files for the label \(mask\)"):
        find_bids(tmp_path, {"t1": "derivatives/prep:T1w"}, "mask")
    cases = find_bids(tmp_path, {"t1": "derivatives/prep:T1w"}, "derivatives/two:mask")
    assert [(c.id, c.patient, c.site) for c in cases] == [
        ("sub-01_ses-a", "sub-01", "north"), ("sub-01_ses-b", "sub-01", "north"), ("sub-02_ses-a", "sub-02", "south"),
    ]  # fmt: skip
    assert [c.attributes for c in cases] == [{"age": 61, "sex": "F", "days": 0}, {"age": 61, "sex": "F", "days": 90}, {"sex": "M"}]
    assert all("two" in str(c.label) and "prep" in str(c.images["t1"]) for c in cases)
    data = BIDS(tmp_path, images={"t1": "derivatives/prep:T1w"}, label="derivatives/two:mask", split=Split(test=1, val=0))
    parts = data.divided(data.cases())
    assert {c.patient for c in parts["train"]}.isdisjoint(c.patient for c in parts["test"])


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(SuiteError, match="BIDS data: no such folder"):
        find_bids(tmp_path / "none", {"t1": "T1w"}, None)
    (tmp_path / "images").mkdir()
    with pytest.raises(SuiteError, match=r"no image named sub-<label>_\.\.\., it holds images; expected sub-01/anat"):
        find_bids(tmp_path, {"t1": "T1w"}, None)
    write_isles(tmp_path, 2)
    with pytest.raises(SuiteError, match=r"no image ends with T1w \(data\.images\); names there end with FLAIR, adc, dwi, msk"):
        find_bids(tmp_path, {"t1": "T1w"}, "msk")
    next(tmp_path.rglob("*0002_ses-0001_adc.nii.gz")).unlink()
    with pytest.raises(SuiteError, match=r"1 of 2 cases lack channels:\n  sub-strokecase0002_ses-0001: adc"):
        find_bids(tmp_path, {"dwi": "dwi", "adc": "adc"}, "msk")
    assert len(find_bids(tmp_path, {"dwi": "dwi", "adc": "adc"}, "msk", allow_missing=True)) == 2


def test_one_command_trains_on_it(tmp_path):
    small = [option for option in SMALL if not option.startswith("data.channels")]
    run(
        *small, "data=bids", "epochs=1", "data.samples_per_epoch=4", "data.images={dwi:dwi,adc:adc}", "data.label=msk",
        f"data.root={write_isles(tmp_path / 'isles')}", f"runs={tmp_path / 'runs'}",
    )  # fmt: skip
    (folder,) = run_folders(tmp_path / "runs")
    assert {row["region"] for row in rows(folder)} == {"lesion"}
