"""DICOM segmentations of predicted series: the same voxels, place, patient and frame of reference, read back by highdicom and by hand with pydicom."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from callbacks import NiftiWriter
from lesionbench import dicom_segmentation
from lesionbench.dicom_files import read_series
from lesionbench.dicom_segmentation import write_segmentation
from lesionbench.errors import SuiteError
from lesionbench.task import Task
from tests.fake_data import write_fake_folder
from tests.harness import SMALL, run, run_folders
from tests.test_dicom import PLAIN, SAGITTAL, TURN, VALUES, own_locale, save_series, scan  # noqa: F401

hd = pytest.importorskip("highdicom")
pydicom = pytest.importorskip("pydicom")

TASK = Task(channels=("flair",), classes={"background": (0,), "ncr": (1,), "ed": (2,), "et": (4,)})


def world(affine: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Positions of a mask's voxels in mm, sorted."""
    places = np.argwhere(mask) @ affine[:3, :3].T + affine[:3, 3]
    return places[np.lexsort(places.round(2).T)]


@pytest.mark.parametrize("axes", [PLAIN, TURN, SAGITTAL], ids=["axial", "turned", "sagittal"])
def test_every_voxel_lies_where_the_series_has_it(tmp_path, axes):
    series = save_series(tmp_path / "series", scan(axes), reverse=True)
    _, affine = read_series(series)
    labels = np.random.default_rng(0).integers(0, 4, VALUES.shape)
    labels[:, :, 1] = 0  # a slice without a class is left out of the file
    path = write_segmentation(tmp_path / "case.dcm", labels, TASK, series, made_by="Supervised")

    file = pydicom.dcmread(path)
    source = pydicom.dcmread(next(series.iterdir()))
    assert (file.Modality, file.SegmentationType, file.SOPClassUID.name) == ("SEG", "BINARY", "Segmentation Storage")
    assert (file.PatientID, file.StudyInstanceUID, file.FrameOfReferenceUID) == (
        "someone",
        source.StudyInstanceUID,
        source.FrameOfReferenceUID,
    )
    assert file.SeriesInstanceUID != source.SeriesInstanceUID
    told = [(s.SegmentNumber, s.SegmentLabel, s.SegmentedPropertyTypeCodeSequence[0].CodeMeaning) for s in file.SegmentSequence]
    assert told == [(1, "ncr", "Necrosis"), (2, "ed", "Edema"), (3, "et", "Tissue")]
    assert [s.SegmentDescription for s in file.SegmentSequence][2] == "et, value 4 in label maps"

    lps = np.diag([-1.0, -1, 1, 1])
    shared = file.SharedFunctionalGroupsSequence[0]
    spacing = [float(v) for v in shared.PixelMeasuresSequence[0].PixelSpacing]
    row, column = np.reshape([float(v) for v in shared.PlaneOrientationSequence[0].ImageOrientationPatient], (2, 3))
    for number in (1, 2, 3):  # by hand, frame by frame
        found = []
        for frame, group in zip(file.pixel_array, file.PerFrameFunctionalGroupsSequence, strict=True):
            if group.SegmentIdentificationSequence[0].ReferencedSegmentNumber == number:
                first = np.array([float(v) for v in group.PlanePositionSequence[0].ImagePositionPatient])
                found += [first + x * spacing[1] * row + y * spacing[0] * column for y, x in np.argwhere(frame)]
        found = np.array(found) @ lps[:3, :3]
        np.testing.assert_allclose(found[np.lexsort(found.round(2).T)], world(affine, labels == number), atol=1e-3)
    assert (
        len({tuple(g.PlanePositionSequence[0].ImagePositionPatient) for g in file.PerFrameFunctionalGroupsSequence}) == VALUES.shape[2] - 1
    )

    volume = hd.seg.segread(path).get_volume(combine_segments=True)
    read = np.array(volume.array)
    for number in (1, 2, 3):
        np.testing.assert_allclose(world(lps @ volume.affine, read == number), world(affine, labels == number), atol=1e-3)


def test_an_empty_mask_is_a_segmentation_too(tmp_path):
    series = save_series(tmp_path / "series", scan())
    file = pydicom.dcmread(write_segmentation(tmp_path / "none.dcm", np.zeros(VALUES.shape, int), TASK, series, made_by="Supervised"))
    assert not file.pixel_array.any()
    assert len(file.SegmentSequence) == 3


def test_prediction_writes_both_and_refuses_to_replace_either(tmp_path, capsys, monkeypatch):
    source = write_fake_folder(tmp_path / "source", 5, shape=(12, 10, 9))
    run(*SMALL, "epochs=1", "data.samples_per_epoch=4", f"data.root={source}", f"runs={tmp_path / 'runs'}")
    (folder,) = run_folders(tmp_path / "runs")
    for channel in ("t1", "flair"):
        save_series(tmp_path / "series" / "a" / channel, sitk.ReadImage(str(source / "images" / f"case_00_{channel}.nii.gz")))
    predict = ["job=predict", f"ckpt={folder / 'checkpoints' / 'last.ckpt'}", "trust=[tests]"]
    of_series = [*predict, f"input={tmp_path / 'series'}", f"out={tmp_path / 'out'}"]
    run(*of_series)
    out = tmp_path / "out" / "predictions"
    assert sorted(p.name for p in out.iterdir()) == ["a.dcm", "a.nii.gz"]
    mask, volume = nib.load(out / "a.nii.gz"), hd.seg.segread(out / "a.dcm").get_volume(combine_segments=True)
    known = np.asarray(mask.dataobj)
    values = sorted(set(np.unique(known)) - {0})
    for number, value in enumerate(values, start=1):
        np.testing.assert_allclose(
            world(np.diag([-1.0, -1, 1, 1]) @ volume.affine, volume.array == number), world(mask.affine, known == value), atol=1e-3
        )
    (out / "a.nii.gz").unlink()
    with pytest.raises(SuiteError, match=r"a\.dcm exists already"):
        run(*of_series)
    with pytest.raises(SuiteError, match=r"writer\.dicom=true: case case_00 is no DICOM series"):
        run(*predict, f"input={source / 'images'}", f"out={tmp_path / 'other'}", "writer.dicom=true")
    run(*of_series[:-1], f"out={tmp_path / 'plain'}", "writer.dicom=false")
    assert [p.name for p in (tmp_path / "plain" / "predictions").iterdir()] == ["a.nii.gz"]
    stripped(tmp_path / "series" / "a" / "t1", "FrameOfReferenceUID")
    with pytest.raises(SuiteError, match=r"writer\.dicom=true: .*a/t1: files without FrameOfReferenceUID"):
        run(*of_series[:-1], f"out={tmp_path / 'asked'}", "writer.dicom=true")
    capsys.readouterr()
    run(*of_series[:-1], f"out={tmp_path / 'nowhere'}")
    assert [p.name for p in (tmp_path / "nowhere" / "predictions").iterdir()] == ["a.nii.gz"]
    assert "a: no DICOM segmentation, since files of its series have no FrameOfReferenceUID" in capsys.readouterr().out
    monkeypatch.setattr(dicom_segmentation, "find_spec", lambda name: None)
    run(*of_series[:-1], f"out={tmp_path / 'without'}")
    assert [p.name for p in (tmp_path / "without" / "predictions").iterdir()] == ["a.nii.gz"]
    assert "written as NIfTI alone; for DICOM segmentations too: pip install" in capsys.readouterr().out
    with pytest.raises(SuiteError, match=r"writer\.dicom=true needs highdicom: pip install"):
        NiftiWriter(str(tmp_path), dicom=True)


def stripped(series, *names):
    for path in series.iterdir():
        file = pydicom.dcmread(path)
        for name in names:
            file.pop(name, None)
        file.save_as(path)
    return series


def test_what_a_series_lacks(tmp_path, capsys):
    bare = stripped(save_series(tmp_path / "bare", scan()), "PatientID", "SliceThickness", "PixelSpacing")
    assert dicom_segmentation.lacking(bare) == []
    measures = pydicom.dcmread(
        write_segmentation(tmp_path / "bare.dcm", VALUES * 0 + 1, TASK, bare, "Supervised")
    ).SharedFunctionalGroupsSequence[0]
    assert (measures.PixelMeasuresSequence[0].SliceThickness, measures.PixelMeasuresSequence[0].SpacingBetweenSlices) == (4, 4)
    emptied = save_series(tmp_path / "emptied", scan())
    for path in emptied.iterdir():
        file = pydicom.dcmread(path)
        file.PatientID = file.SliceThickness = file.PixelSpacing = None
        file.save_as(path)
    shared = pydicom.dcmread(
        write_segmentation(tmp_path / "e.dcm", VALUES * 0 + 1, TASK, emptied, "Supervised")
    ).SharedFunctionalGroupsSequence[0]
    assert list(shared.PixelMeasuresSequence[0].PixelSpacing) == list(measures.PixelMeasuresSequence[0].PixelSpacing) == [1, 1]
    nowhere = stripped(save_series(tmp_path / "series" / "a", scan()), "FrameOfReferenceUID")
    assert dicom_segmentation.lacking(nowhere) == ["FrameOfReferenceUID"]
    one = save_series(tmp_path / "one", scan())
    next(iter(stripped(save_series(tmp_path / "two", scan()), "StudyInstanceUID").iterdir())).replace(next(iter(one.iterdir())))
    assert dicom_segmentation.lacking(one) == ["StudyInstanceUID"]


def test_a_series_that_cannot_be_read_keeps_no_other_from_being_predicted(tmp_path):
    """What its files lack is not asked of it before: slices without a position."""
    source = write_fake_folder(tmp_path / "source", 5, shape=(12, 10, 9))
    run(*SMALL, "epochs=1", "data.samples_per_epoch=4", f"data.root={source}", f"runs={tmp_path / 'runs'}")
    (folder,) = run_folders(tmp_path / "runs")
    for name in ("whole", "nowhere"):
        for channel in ("t1", "flair"):
            save_series(tmp_path / "series" / name / channel, sitk.ReadImage(str(source / "images" / f"case_00_{channel}.nii.gz")))
    stripped(tmp_path / "series" / "nowhere" / "t1", "ImagePositionPatient")
    predict = [
        "job=predict",
        f"ckpt={folder / 'checkpoints' / 'last.ckpt'}",
        "trust=[tests]",
        f"input={tmp_path / 'series'}",
        "on_error=skip",
    ]
    with pytest.raises(
        SuiteError, match=r"1 of 2 case\(s\) were left out \(on_error=skip\):\n  nowhere: .*the header has no image position"
    ):
        run(*predict, f"out={tmp_path / 'out'}")
    assert sorted(p.name for p in (tmp_path / "out" / "predictions").iterdir()) == ["whole.dcm", "whole.nii.gz"]
