"""`job=check` says everything at once, also where files do not go together, and what there is; warnings stay with the run."""

import json

import nibabel as nib
import numpy as np
import pytest

from datamodules.overview import overview
from datamodules.readers.brats_files import brats_task, find_brats
from lesionbench.case import Case
from lesionbench.errors import SuiteError
from lesionbench.geometry import write_volume
from lesionbench.task import Task
from tests.fake_data import write_fake_brats, write_fake_folder
from tests.harness import SMALL, run, run_folders

FOLDER = ["job=check", "experiment=supervised/folder", "data.channels=[t1,flair]"]


def test_all_findings_of_a_folder_come_at_once(tmp_path, capsys):
    root = write_fake_folder(tmp_path, 5, shape=(12, 10, 9))
    (root / "images" / "case_01_flair.nii.gz").unlink()
    (root / "labels" / "case_04.nii.gz").rename(root / "labels" / "case_4.nii.gz")
    label = nib.load(root / "labels" / "case_02.nii.gz")
    nib.Nifti1Image(np.asarray(label.dataobj) * 7, label.affine).to_filename(root / "labels" / "case_02.nii.gz")
    (root / "attributes.csv").write_text("case,patient,site\ncase_00,p1,north\ncase_01,p1,north\ncase_1,p2,south\n")
    with pytest.raises(SuiteError, match=r"\d error\(s\) in"):
        run(*FOLDER, f"data.root={root}")
    said = capsys.readouterr().out
    for expected in (
        "labels that belong to no case: 1 image files (case_4.nii.gz)",
        "attributes.csv: 1 row(s) belong to no case",
        "case_1 (did you mean case_01?)",
        "missing channel: add the file",
        "case_01: flair",
        "label holds values of no class",
        "5 case(s) of 4 patient(s): 4 with a label, 1 without",
        "sites: north (2)",
        "shape: 12 x 10 x 9 (5)",
        "class lesion: in 3 of 3 case(s)",
        "1 case(s) have a file that cannot be read",
    ):
        assert expected in said, expected


def test_gaps_of_brats_cases_are_found_beside_other_faults(tmp_path, capsys):
    root = write_fake_brats(tmp_path, "2021", shape=(12, 10, 9), missing=[(0, "t2"), (3, "seg")])
    path = root / "BraTS2021_00001" / "BraTS2021_00001_flair.nii.gz"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(SuiteError, match=r"2 error\(s\)"):
        run("job=check", "benchmark=brats2021", "model=supervised", "trainer=cpu", f"data.root={root}")
    said = capsys.readouterr().out
    for expected in ("BraTS2021_00000: t2", "BraTS2021_00001_flair.nii.gz", "6 case(s) of 6 patient(s): 5 with a label, 1 without"):
        assert expected in said, expected


def test_an_overview_by_hand(tmp_path):
    cases = []
    for n, (shape, size) in enumerate([((4, 5, 6), 1), ((4, 5, 6), 1), ((6, 4, 5), 2)]):
        label = np.zeros(shape, np.uint8)
        label.ravel()[: 10 * n] = 1
        image = write_volume(tmp_path / f"{n}.nii.gz", np.ones(shape, np.int16), np.diag([size, size, 3, 1]))
        cases.append(
            Case(str(n), {"t1": image}, write_volume(tmp_path / f"{n}_label.nii.gz", label, np.diag([size, size, 3, 1])), patient="p")
        )
    cases.append(Case("3", {"t1": image}, raters=[cases[1].label, cases[2].label]))
    task = Task(("t1",), {"background": 0, "lesion": 1, "scar": 2}, ignore=(9,))
    assert overview(cases, task).splitlines() == [
        "4 case(s) of 2 patient(s): 3 with a label, 1 with raters, 0 without",
        "shape: 4 x 5 x 6 (2), 6 x 4 x 5 (2)",
        "voxel size, mm: 1 x 1 x 3 (2), 2 x 2 x 3 (2)",
        "class lesion: in 3 of 4 case(s); 10 voxels in the median one, 10 to 20",
        "class scar: in 0 of 4 case(s)",
    ]


def test_sites_and_many_sizes_are_summed_up(tmp_path):
    cases = find_brats(write_fake_brats(tmp_path, "2018", shape=(8, 8, 6)))
    said = overview(cases, brats_task("2018"))
    assert "sites: 2013 (2), CBICA (2), TCIA01 (2)" in said or "sites: CBICA (2)" in said
    for n in range(6):
        image = nib.load(cases[n].images["t1"])
        nib.Nifti1Image(np.asarray(image.dataobj), np.diag([1 + n, 1, 1, 1])).to_filename(cases[n].images["t1"])
    assert "voxel size, mm: 6 different, most often" in overview(cases, brats_task("2018"))
    assert "1 x 1 x 1 to 6 x 1 x 1" in overview(cases, brats_task("2018"))


def test_warnings_stay_with_the_run_and_are_reported(tmp_path, capsys):
    root = write_fake_folder(tmp_path / "data", 6, shape=(12, 10, 9))
    label = nib.load(root / "labels" / "case_03.nii.gz")
    nib.Nifti1Image(np.zeros(label.shape, np.uint8), label.affine).to_filename(root / "labels" / "case_03.nii.gz")
    options = [o for o in SMALL if o != "data.check=false"]
    for again in range(2):  # the second run finds the files checked already
        run(*options, "epochs=1", "data.samples_per_epoch=4", f"data.root={root}", f"runs={tmp_path / 'runs'}")
        folder = run_folders(tmp_path / "runs")[again]
        warned = json.loads((folder / "summary.json").read_text())["data_warnings"]
        assert "warning x 1: empty label" in warned
        assert "case_03" in warned
        assert "The integrity check of the data: warning x 1: empty label" in capsys.readouterr().out
    run("job=compare", f"compare.runs=[{tmp_path / 'runs'}]", "report=html", f"out={tmp_path / 'out'}")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("The integrity check of the data: warning x 1: empty label") == 1
