"""DICOM series as input of job=predict: the grid that ITK reads, the same masks as for NIfTI, and what is no even stack is refused by name."""

import locale
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from datamodules.readers.folder_files import find_series
from lesionbench.dicom_files import read_series, series_in
from lesionbench.errors import SuiteError
from lesionbench.geometry import read_volume
from tests.fake_data import write_fake_folder
from tests.harness import SMALL, run, run_folders

PLAIN = np.eye(3)
TURN = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
SAGITTAL = np.array([[0, 0, -1.0], [1, 0, 0], [0, -1, 0]])
VALUES = np.arange(5 * 6 * 4, dtype=np.int16).reshape(5, 6, 4)


@pytest.fixture(autouse=True)
def own_locale():
    """SimpleITK sets the process's locale to C when it writes DICOM with a position (`findings/simpleitk_dicom_locale.sh`), as the helper does."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


def test_reading_leaves_the_locale_of_the_process_as_it_is(tmp_path):
    before = locale.setlocale(locale.LC_ALL)
    folder = save_series(tmp_path / "series", scan())
    locale.setlocale(locale.LC_ALL, before)
    series_in(folder)
    read_series(folder)
    assert locale.setlocale(locale.LC_ALL) == before


def save_series(
    folder: Path, image: sitk.Image, uid: str = "1.2.826.0.1.3680043.2.1125.1", reverse: bool = False, first: int = 0, **changed
) -> Path:
    """A file for each slice, named in reverse order on request; `changed` are positions by slice, mm along the normal."""
    folder.mkdir(parents=True, exist_ok=True)
    axes = np.reshape(image.GetDirection(), (3, 3))
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    count = image.GetSize()[2]
    for n in range(count):
        position = np.array(image.TransformIndexToPhysicalPoint((0, 0, n))) + axes[:, 2] * changed.get(f"slice_{n}", 0.0)
        plane = image[:, :, n]
        tags = {
            "0008|0060": "MR", "0008|0016": "1.2.840.10008.5.1.4.1.1.4", "0008|0018": f"{uid}.{first + n + 1}", "0020|000d": "1.2.826.0.1.3680043.2.1125.9",
            "0020|000e": uid, "0020|0013": str(n + 1), "0010|0020": "someone", "0020|0052": f"{uid}.77",
            "0020|0032": "\\".join(f"{v:.6f}" for v in position), "0020|0037": "\\".join(f"{v:.8f}" for v in axes[:, :2].T.ravel()),
            "0018|0050": f"{image.GetSpacing()[2]:.6f}",
        }  # fmt: skip
        for tag, value in tags.items():
            plane.SetMetaData(tag, value)
        number = count - n if reverse else n
        writer.SetFileName(str(folder / f"{first + number:03d}.dcm"))
        writer.Execute(plane)
    return folder


def scan(axes=PLAIN, values=VALUES, spacing=(0.9, 1.5, 4.0)) -> sitk.Image:
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.T))
    image.SetSpacing(spacing)
    image.SetOrigin((-31.5, 12.25, 7.0))
    image.SetDirection(np.asarray(axes, dtype=float).ravel().tolist())
    return image


@pytest.mark.parametrize("axes", [np.eye(3), TURN, SAGITTAL, np.diag([-1.0, -1, 1])], ids=["axial", "turned", "sagittal", "rotated"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_series_lies_where_the_volume_lay(tmp_path, axes, reverse):
    image = scan(axes)
    array, affine = read_series(save_series(tmp_path / "series", image, reverse=reverse))
    sitk.WriteImage(image, str(tmp_path / "truth.nrrd"))
    truth, expected, _ = read_volume(tmp_path / "truth.nrrd")
    np.testing.assert_array_equal(array, truth)
    np.testing.assert_allclose(affine, expected, atol=1e-4)


def test_what_is_no_even_stack_is_refused_by_name(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("nothing")
    with pytest.raises(SuiteError, match=r"empty: holds no DICOM series"):
        read_series(tmp_path / "empty")
    gap = save_series(tmp_path / "gap", scan())
    (gap / "002.dcm").unlink()
    with pytest.raises(SuiteError, match=r"gap: 001\.dcm and 003\.dcm lie 8 mm apart, slices elsewhere 4 mm; is a slice missing"):
        read_series(gap)
    with pytest.raises(SuiteError, match=r"lie at one place; the series holds several volumes"):
        read_series(save_series(tmp_path / "twice", scan(), slice_2=-4.0))
    with pytest.raises(SuiteError, match=r"uneven: .* lie .* mm apart"):
        read_series(save_series(tmp_path / "uneven", scan(), slice_1=0.2))
    mixed = save_series(tmp_path / "mixed", scan())
    save_series(mixed, scan(), uid="1.2.826.0.1.3680043.2.1125.2", first=10)
    with pytest.raises(SuiteError, match=r"mixed: holds 2 DICOM series"):
        read_series(mixed)
    localizer = save_series(tmp_path / "localizer", scan())
    save_series(localizer, scan(SAGITTAL)[:, :, :1], first=10)
    with pytest.raises(SuiteError, match=r"lies in another direction than .*; the folder mixes stacks|holds 2 DICOM series"):
        read_series(localizer)
    with pytest.raises(SuiteError, match=r"one: the series has one slice"):
        read_series(save_series(tmp_path / "one", scan()[:, :, :1]))


def test_folders_are_cases_and_channels(tmp_path):
    for case in ("a", "b"):
        for channel in ("T1", "FLAIR", "localizer"):
            save_series(tmp_path / case / channel, scan())
    cases = find_series(tmp_path, ["flair", "t1"])
    assert [(c.id, list(c.images)) for c in cases] == [("a", ["flair", "t1"]), ("b", ["flair", "t1"])]
    assert [c.id for c in find_series(tmp_path / "a", ["t2"])] == ["FLAIR", "T1", "localizer"]
    with pytest.raises(SuiteError, match=r"in no folder named for a channel; expected <case>/dwi/, <case>/adc/"):
        find_series(tmp_path, ["dwi", "adc"])
    assert series_in(tmp_path) == []


def test_predictions_of_series_are_those_of_the_volumes(tmp_path):
    source = write_fake_folder(tmp_path / "source", 5, shape=(12, 10, 9))
    run(*SMALL, "epochs=1", "data.samples_per_epoch=4", f"data.root={source}", f"runs={tmp_path / 'runs'}")
    (folder,) = run_folders(tmp_path / "runs")
    for n in range(2):
        for channel in ("t1", "flair"):
            save_series(
                tmp_path / "series" / f"case_{n:02d}" / channel, sitk.ReadImage(str(source / "images" / f"case_{n:02d}_{channel}.nii.gz"))
            )
    predict = [
        "job=predict",
        f"ckpt={folder / 'checkpoints' / 'last.ckpt'}",
        "trust=[tests]",
        "writer.probabilities=true",
        "writer.dicom=false",
    ]
    run(*predict, f"input={tmp_path / 'series'}", f"out={tmp_path / 'of_series'}")
    run(*predict, f"input={source / 'images'}", f"out={tmp_path / 'of_nifti'}")
    written = sorted((tmp_path / "of_series" / "predictions").iterdir())
    assert len(written) == 4
    for path in written:
        ours, theirs = (sitk.ReadImage(str(p)) for p in (path, tmp_path / "of_nifti" / "predictions" / path.name))
        place = np.array([theirs.TransformPhysicalPointToIndex(ours.TransformIndexToPhysicalPoint(i)) for i in ((0, 0, 0), (3, 5, 2))])
        assert ours.GetSize() == theirs.GetSize() or sorted(ours.GetSize()) == sorted(theirs.GetSize())
        for index, other in zip(((0, 0, 0), (3, 5, 2)), place.tolist(), strict=True):
            assert ours[index] == pytest.approx(theirs[other], abs=1e-5)
    shutil.rmtree(tmp_path / "series" / "case_01" / "flair")
    with pytest.raises(SuiteError, match=r"1 of 2 cases lack channels:\n  case_01: flair"):
        run(*predict, f"input={tmp_path / 'series'}", f"out={tmp_path / 'again'}")


def test_a_broken_series_is_left_out_where_the_rest_goes_on(tmp_path, capsys):
    source = write_fake_folder(tmp_path / "source", 5, shape=(12, 10, 9))
    run(*SMALL, "epochs=1", "data.samples_per_epoch=4", f"data.root={source}", f"runs={tmp_path / 'runs'}")
    (folder,) = run_folders(tmp_path / "runs")
    for name in ("whole", "torn"):
        for channel in ("t1", "flair"):
            save_series(tmp_path / "series" / name / channel, sitk.ReadImage(str(source / "images" / f"case_00_{channel}.nii.gz")))
    (tmp_path / "series" / "torn" / "flair" / "004.dcm").unlink()
    predict = [
        "job=predict",
        f"ckpt={folder / 'checkpoints' / 'last.ckpt'}",
        "trust=[tests]",
        f"input={tmp_path / 'series'}",
        "writer.dicom=false",
    ]
    with pytest.raises(SuiteError, match=r"torn/flair: 003\.dcm and 005\.dcm lie .* is a slice missing"):
        run(*predict, f"out={tmp_path / 'stops'}")
    with pytest.raises(SuiteError, match=r"1 of 2 case\(s\) were left out \(on_error=skip\):\n  torn: .*is a slice missing"):
        run(*predict, f"out={tmp_path / 'goes_on'}", "on_error=skip")
    assert [p.name for p in (tmp_path / "goes_on" / "predictions").iterdir()] == ["whole.nii.gz"]
