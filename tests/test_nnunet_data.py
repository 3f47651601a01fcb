"""nnU-Net's raw format and the Decathlon's: what a dataset.json says is what is trained on, and what it gets wrong is named."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from datamodules.decathlon import Decathlon
from datamodules.nnunet import NNUNet
from datamodules.readers.folder_files import find_folder
from datamodules.split import Split
from lesionbench.errors import SuiteError
from lesionbench.geometry import read_volume
from tests.fake_data import LPS, fake_case
from tests.harness import SMALL, rows, run, run_folders

SHAPE = (12, 10, 9)
PLAIN = {"background": 0, "edema": 1, "core": 2, "rim": 3}
REGIONS = {"background": 0, "whole_tumor": [1, 2, 3], "tumor_core": [2, 3], "rim": 3}


def described(root: Path, **changes) -> Path:
    path = root / "dataset.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in {**known, **changes}.items() if v is not None}))
    return root


def write_nnunet(root: Path, count: int = 6, ending: str = ".nii.gz", labels=PLAIN, values=(1, 2, 3)) -> Path:
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    for n in range(count):
        images, label = fake_case(("T1", "FLAIR"), values, SHAPE, (0, n))
        for number, array in enumerate(images.values()):
            save(root / "imagesTr" / f"case_{n:03d}_{number:04d}{ending}", array)
        save(root / "labelsTr" / f"case_{n:03d}{ending}", label)
    channels = {"0": "T1", "1": "FLAIR"}
    return described(root, channel_names=channels, labels=labels, numTraining=count, file_ending=ending)


def save(path: Path, array: np.ndarray) -> None:
    nifti = path if path.name.endswith((".nii.gz", ".nii")) else path.with_name("temporary.nii")
    nib.Nifti1Image(array, LPS).to_filename(nifti)
    if nifti != path:
        image = sitk.ReadImage(str(nifti))
        for key in image.GetMetaDataKeys():
            image.EraseMetaData(key)
        sitk.WriteImage(image, str(path))
        nifti.unlink()


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_a_raw_data_set_is_read_whatever_its_ending(tmp_path, ending):
    data = NNUNet(write_nnunet(tmp_path, ending=ending))
    assert (data.task.channels, dict(data.task.classes)) == (
        ("T1", "FLAIR"),
        {"background": (0,), "edema": (1,), "core": (2,), "rim": (3,)},
    )
    assert data.task.region_values() == {"edema": {1}, "core": {2}, "rim": {3}}
    cases = data.cases()
    assert [c.id for c in cases] == [f"case_{n:03d}" for n in range(6)]
    for n, case in enumerate(cases):
        images, label = fake_case(("T1", "FLAIR"), (1, 2, 3), SHAPE, (0, n))
        for channel in ("T1", "FLAIR"):
            np.testing.assert_array_equal(read_volume(case.images[channel])[0], images[channel])
        np.testing.assert_array_equal(read_volume(case.label)[0], label)
    narrowed = NNUNet(tmp_path, task={"channels": ["FLAIR"], "regions": ["rim"]})
    assert [list(c.images) for c in narrowed.cases()] == [["FLAIR"]] * 6
    assert narrowed.cases()[0].images["FLAIR"].name == f"case_000_0001{ending}"


def test_regions_and_an_ignored_value(tmp_path):
    task = NNUNet(write_nnunet(tmp_path, labels={**REGIONS, "ignore": 4})).task
    assert task.region_values() == {"whole_tumor": {1, 2, 3}, "tumor_core": {2, 3}, "rim": {3}}
    assert dict(task.classes) == {"background": (0,), "label_1": (1,), "label_2": (2,), "rim": (3,)}
    assert task.from_disk(np.array([0, 1, 2, 3, 4])).tolist() == [0, 1, 2, 3, -1]


def test_names_that_come_twice_get_their_number(tmp_path):
    described(write_nnunet(tmp_path), channel_names={"0": "MR", "1": "MR"})
    assert NNUNet(tmp_path).task.channels == ("MR_0", "MR_1")


def test_folds_are_those_of_the_file_where_there_is_one(tmp_path):
    write_nnunet(tmp_path)
    ids = [f"case_{n:03d}" for n in range(6)]
    folds = [{"train": ids[2:], "val": ids[:2]}, {"train": ids[:4], "val": ids[4:]}]
    drawn = NNUNet(tmp_path, split=Split(folds=2, fold=1, val=1)).divided(NNUNet(tmp_path).cases())
    (tmp_path / "splits_final.json").write_text(json.dumps(folds))
    for fold in (0, 1):
        data = NNUNet(tmp_path, split=Split(fold=fold, val=1))
        parts = {name: [c.id for c in part] for name, part in data.divided(data.cases()).items()}
        assert parts["test"] == folds[fold]["val"]
        assert (parts["train"], parts["val"]) == (folds[fold]["train"][:-1], folds[fold]["train"][-1:])
    with pytest.raises(SuiteError, match=r"data\.split\.fold=2: .*splits_final\.json has 2 folds"):
        NNUNet(tmp_path, split=Split(fold=2)).divided(data.cases())
    without = NNUNet(tmp_path, splits=False, split=Split(folds=2, fold=1, val=1))
    assert without.divided(without.cases()) == drawn
    (tmp_path / "attributes.csv").write_text("case,patient\n" + "".join(f"{i},p{n // 2}\n" for n, i in enumerate(ids)))
    data = NNUNet(tmp_path, split=Split(fold=1, val=0))
    assert [c.patient for c in data.divided(data.cases())["test"]] == ["p2", "p2"]
    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": ids[1:], "val": ids[:1]}]))
    with pytest.raises(SuiteError, match=r"splits_final\.json: patient p0 is in train and val of fold 0"):
        NNUNet(tmp_path).divided(NNUNet(tmp_path).cases())
    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": [*ids[1:], "nobody"], "val": ids[:1]}]))
    with pytest.raises(SuiteError, match=r"1 case\(s\) that are not there: nobody; data\.splits=false"):
        NNUNet(tmp_path).divided(NNUNet(tmp_path).cases())


def test_files_may_be_listed(tmp_path):
    write_nnunet(tmp_path / "raw")
    moved = tmp_path / "elsewhere"
    (tmp_path / "raw" / "imagesTr").rename(moved)
    listed = {
        f"case_{n:03d}": {"images": [f"../elsewhere/case_{n:03d}_{c:04d}.nii.gz" for c in (0, 1)], "label": f"labelsTr/case_{n:03d}.nii.gz"}
        for n in range(6)
    }
    described(tmp_path / "raw", dataset=listed)
    cases = NNUNet(tmp_path / "raw").cases()
    assert [c.id for c in cases] == sorted(listed)
    assert all(path.is_file() for case in cases for path in case.files)
    described(tmp_path / "raw", dataset={"case_000": {"images": ["a.nii.gz"], "label": "b.nii.gz"}})
    with pytest.raises(SuiteError, match=r"dataset\.case_000 needs images, a list of 2 files"):
        NNUNet(tmp_path / "raw").cases()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, r"expected a JSON object with channel_names, labels, file_ending; it lacks labels"),
        ({"file_ending": ".png"}, r"file_ending \.png is not read here; known: \.nii\.gz"),
        ({"labels": {"edema": 1}}, r"labels have no background of value 0"),
        ({"labels": {"background": 0, "edema": "one"}}, r"label edema is 'one', expected a whole number"),
        ({"labels": {"background": 0, "a": [1, 2], "b": [2, 3]}}, r"dataset\.json: task\.regions: a and b overlap"),
        ({"channel_names": {"1": "T1", "2": "FLAIR"}}, r"channels are numbered from 0, here \['1', '2'\]"),
        ({"channel_names": {"0": "T1", "x": "FLAIR"}}, r"channel number 'x' is no whole number"),
        ({"channel_names": {"0": "T1", "1": "FLAIR", "2": "T2"}}, r"6 of 6 cases lack channels:\n  case_000: T2"),
    ],
)
def test_what_a_description_gets_wrong_is_named(tmp_path, changes, message):
    described(write_nnunet(tmp_path), **changes)
    with pytest.raises(SuiteError, match=message):
        NNUNet(tmp_path).cases()


def test_a_folder_without_description_or_cases(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(SuiteError, match=r"no dataset\.json; the folder holds images\. A data set of nnU-Net"):
        NNUNet(tmp_path)
    described(tmp_path, channel_names={"0": "T1"}, labels=PLAIN, file_ending=".nii.gz")
    with pytest.raises(SuiteError, match=r"no case in imagesTr; expected imagesTr/<case>_0000\.nii\.gz"):
        NNUNet(tmp_path).cases()


def write_decathlon(root: Path, count: int = 6, channels: int = 2) -> Path:
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    for n in range(count):
        images, label = fake_case(tuple("abcd"[:channels]), (1, 2, 3), SHAPE, (0, n))
        array = np.stack(list(images.values()), axis=-1) if channels > 1 else next(iter(images.values()))
        save(root / "imagesTr" / f"BRATS_{n:03d}.nii.gz", array)
        save(root / "labelsTr" / f"BRATS_{n:03d}.nii.gz", label)
    names = ["FLAIR", "T1w", "t1gd", "T2w"][:channels]
    training = [{"image": f"./imagesTr/BRATS_{n:03d}.nii.gz", "label": f"./labelsTr/BRATS_{n:03d}.nii.gz"} for n in range(count)]
    return described(
        root,
        modality={str(n): name for n, name in enumerate(names)},
        labels={str(v): k for k, v in PLAIN.items()},
        training=training,
        test=["./imagesTs/BRATS_900.nii.gz"],
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_decathlon_channels_lie_where_the_image_lies(tmp_path, channels):
    data = Decathlon(write_decathlon(tmp_path, channels=channels))
    assert data.task.channels == ("FLAIR", "T1w", "t1gd")[:channels]
    assert data.task.region_values() == {"edema": {1}, "core": {2}, "rim": {3}}
    data.materialize()
    for n, case in enumerate(data.cases()):
        images, _ = fake_case(tuple("abcd"[:channels]), (1, 2, 3), SHAPE, (0, n))
        for (name, array), path in zip(images.items(), case.images.values(), strict=True):
            found, affine, _ = read_volume(path)
            np.testing.assert_array_equal(found, array, err_msg=name)
            np.testing.assert_array_equal(affine, LPS)
            if channels > 1:
                assert sitk.ReadImage(str(path)).GetDimension() == 3
    written = {p: p.stat().st_mtime_ns for c in data.cases() for p in c.images.values()}
    Decathlon(tmp_path).materialize()
    assert {p: p.stat().st_mtime_ns for p in written} == written


def test_decathlon_errors(tmp_path):
    root = write_decathlon(tmp_path)
    described(root, modality={"0": "FLAIR", "1": "T1w", "2": "T2w"})
    with pytest.raises(SuiteError, match=r"BRATS_000\.nii\.gz: holds 2 channel\(s\), dataset\.json names 3: FLAIR, T1w, T2w"):
        Decathlon(root).materialize()
    (root / "labelsTr" / "BRATS_003.nii.gz").unlink()
    with pytest.raises(SuiteError, match=r"training names 1 file\(s\) that are not there: .*labelsTr/BRATS_003\.nii\.gz"):
        Decathlon(root).cases()


@pytest.mark.parametrize(("name", "write"), [("nnunet", write_nnunet), ("decathlon", write_decathlon)])
def test_one_command_trains_on_it(tmp_path, name, write):
    root = write(tmp_path / "raw", count=8)
    small = [option for option in SMALL if not option.startswith("data.channels")]
    run(*small, f"data={name}", "epochs=1", "data.samples_per_epoch=4", f"data.root={root}", f"runs={tmp_path / 'runs'}")
    (folder,) = run_folders(tmp_path / "runs")
    assert {row["region"] for row in rows(folder)} == {"edema", "core", "rim"}


def test_a_folder_that_is_something_else_says_what(tmp_path):
    for name, write in [("nnunet", write_nnunet), ("decathlon", write_decathlon)]:
        with pytest.raises(SuiteError, match=rf"no folder images/, but a dataset\.json of .*: data={name} reads it; expected"):
            find_folder(write(tmp_path / name, count=1), ["T1"])
    (tmp_path / "bare" / "imagesTr").mkdir(parents=True)
    with pytest.raises(SuiteError, match=r"but imagesTr/: data=nnunet and data=decathlon"):
        find_folder(tmp_path / "bare", ["T1"])
    (tmp_path / "bids" / "sub-01" / "ses-1" / "anat").mkdir(parents=True)
    with pytest.raises(SuiteError, match=r"sub-\*/anat as in BIDS: data=bids reads it"):
        find_folder(tmp_path / "bids", ["T1"])
