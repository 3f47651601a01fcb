"""What is written for nnU-Net: the same voxels, classes and folds, read back by the suite and accepted by nnU-Net itself."""

import json

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from datamodules.export import description
from datamodules.folder import Folder
from datamodules.nnunet import NNUNet
from datamodules.readers.brats_files import brats_task
from datamodules.split import Split
from lesionbench.errors import SuiteError
from lesionbench.geometry import read_volume
from lesionbench.task import Task
from tests.fake_data import write_fake_brats, write_fake_folder
from tests.harness import run

SHAPE = (12, 10, 9)


def verified(folder, monkeypatch):
    """nnU-Net's own word on the folder, where it is installed."""
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(folder.parent))
    module = pytest.importorskip("nnunetv2.experiment_planning.verify_dataset_integrity", reason="nnU-Net is not installed")
    module.verify_dataset_integrity(str(folder), num_processes=1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """BraTS, whose regions are nested and whose label 4 leaves a gap."""
    home = tmp_path_factory.mktemp("export")
    root = write_fake_brats(home / "brats", "2021", shape=SHAPE, missing=[(5, "seg")])
    out = home / "Dataset021_BraTS"
    run("job=export_dataset", "benchmark=brats2021", "data.split.folds=2", f"data.root={root}", f"out={out}")
    return root, out


def test_images_labels_and_regions(exported):
    root, out = exported
    found = json.loads((out / "dataset.json").read_text())
    assert found["channel_names"] == {"0": "t1", "1": "t1ce", "2": "t2", "3": "flair"}
    assert found["labels"] == {"background": 0, "WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}
    assert found["regions_class_order"] == [2, 1, 3]  # edema, necrosis on it, enhancing tumor on both
    assert (found["numTraining"], found["file_ending"]) == (5, ".nii.gz")
    for n in range(6):
        name, part = f"BraTS2021_{n:05d}", "Tr" if n < 5 else "Ts"
        for number, channel in enumerate(("t1", "t1ce", "t2", "flair")):
            source = root / name / f"{name}_{channel}.nii.gz"
            assert (out / f"images{part}" / f"{name}_{number:04d}.nii.gz").read_bytes() == source.read_bytes()
        if n < 5:
            truth, label = (read_volume(p)[0] for p in (root / name / f"{name}_seg.nii.gz", out / "labelsTr" / f"{name}.nii.gz"))
            np.testing.assert_array_equal(label, np.select([truth == 4, truth == 2, truth == 1], [3, 2, 1]))
    assert sorted(p.name for p in (out / "labelsTr").iterdir()) == [f"BraTS2021_{n:05d}.nii.gz" for n in range(5)]


def test_the_suite_reads_it_back_with_the_same_folds(exported):
    root, out = exported
    from datamodules.brats import BraTS

    for fold in (0, 1):
        ours = BraTS(root, layout="2021", split=Split(folds=2, fold=fold, val=1))
        theirs = NNUNet(out, split=Split(fold=fold, val=1))
        assert theirs.task.region_values() == {"WT": {1, 2, 3}, "TC": {1, 3}, "ET": {3}}
        wanted, found = (d.divided(d.cases()) for d in (ours, theirs))
        assert {c.id for c in found["test"]} == {c.id for c in wanted["test"]}
        assert {c.id for p in ("train", "val") for c in found[p]} == {c.id for p in ("train", "val") for c in wanted[p]}


def test_nnunet_accepts_it(exported, monkeypatch):
    verified(exported[1], monkeypatch)


def test_single_classes_an_ignored_value_and_other_formats(tmp_path, monkeypatch):
    root = write_fake_folder(tmp_path / "folder", 4, shape=SHAPE)
    for path in (root / "images").glob("*.nii.gz"):
        image = sitk.ReadImage(str(path))
        for key in image.GetMetaDataKeys():
            image.EraseMetaData(key)
        sitk.WriteImage(image, str(path.with_name(path.name.replace(".nii.gz", ".mha"))))
        path.unlink()
    label = root / "labels" / "case_00.nii.gz"
    array, affine, _ = read_volume(label)
    array = array.copy()
    array[0, 0, 0] = 255
    nib.Nifti1Image(array[..., None], affine).to_filename(label)  # a trailing axis, which nnU-Net does not take
    out = tmp_path / "Dataset001_Folder"
    options = [
        "data=folder",
        "experiment=supervised/folder",
        "data.channels=[t1,flair]",
        "data.classes={background:0,stroke:1}",
        "data.ignore=[255]",
    ]
    run("job=export_dataset", *options, "data.split.folds=null", f"data.root={root}", f"out={out}")
    found = json.loads((out / "dataset.json").read_text())
    assert (found["labels"], "regions_class_order" in found) == ({"background": 0, "stroke": 1, "ignore": 2}, False)
    written = nib.load(out / "labelsTr" / "case_00.nii.gz")
    assert (written.shape, written.dataobj[0, 0, 0]) == (SHAPE, 2)
    plain = Folder(root, channels=["t1", "flair"], classes={"background": 0, "stroke": 1}, ignore=[255])
    for case in plain.cases():
        for number, path in enumerate(case.images.values()):
            (ours, grid, _), (theirs, there, _) = read_volume(path), read_volume(out / "imagesTr" / f"{case.id}_{number:04d}.nii.gz")
            np.testing.assert_array_equal(ours, theirs)
            np.testing.assert_allclose(grid, there, atol=1e-5)
    assert len(json.loads((out / "splits_final.json").read_text())) == 1
    verified(out, monkeypatch)


def test_descriptions_of_tasks():
    after = description(brats_task("2024"))
    assert after["labels"] == {"background": 0, "WT": [1, 2, 3], "TC": [1, 3], "ET": [3], "NETC": [1], "SNFH": [2], "RC": [4]}
    order = dict(zip(list(after["labels"])[1:], after["regions_class_order"], strict=True))
    assert {name: order[name] for name in ("ET", "NETC", "SNFH", "RC")} == {"ET": 3, "NETC": 1, "SNFH": 2, "RC": 4}
    tissue = Task(("t1",), {"background": 0, "csf": 10, "gm": 20})
    assert description(tissue)["labels"] == {"background": 0, "csf": 1, "gm": 2}


def test_what_cannot_be_written_is_said_before_anything_is(tmp_path):
    root = write_fake_folder(tmp_path / "rated", 3, raters=2, shape=SHAPE)
    options = ["job=export_dataset", "experiment=supervised/folder", "data.channels=[t1,flair]", "data.raters=2", f"data.root={root}"]
    for path in (root / "labels").glob("case_0?.nii.gz"):
        path.unlink()
    with pytest.raises(SuiteError, match=r"3 case\(s\) have raters and no label .*data\.labels=<folder>"):
        run(*options, f"out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SuiteError, match=r"job=export_dataset needs out=<new folder>"):
        run(*options)
    with pytest.raises(SuiteError, match=r"out=.*rated is not empty"):
        run(*options, f"out={root}")
    with pytest.raises(SuiteError, match=r"Unknown layout 'nnunet1'; did you mean 'nnunet'"):
        run(*options, "layout=nnunet1", f"out={tmp_path / 'out'}")
