"""NRRD, MetaImage and Analyze beside NIfTI: the same voxels on the same grid, in and out, and broken files named."""

import shutil
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hydra.errors import InstantiationException

from datamodules.folder import Folder
from datamodules.readers.folder_files import find_folder, find_images
from lesionbench.errors import SuiteError
from lesionbench.geometry import ENDINGS, WRITTEN, Geometry, read_header, read_volume, stem_of, write_native
from tests.fake_data import write_fake_folder
from tests.harness import SMALL, run, run_folders

SHAPE, SIZES, ORIGIN = (5, 6, 7), (0.9, 1.5, 4.0), (-31.5, 12.25, 7.0)
VALUES = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
TURN = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])


def directions():
    """All orders and signs of axes, and each of them turned."""
    for order, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        axes = np.zeros((3, 3))
        axes[order, range(3)] = signs
        yield from (axes, TURN @ axes)


def itk_image(axes, values=VALUES):
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.T))
    image.SetSpacing(SIZES)
    image.SetOrigin(ORIGIN)
    image.SetDirection(axes.ravel().tolist())
    return image


def grid(path):
    image = sitk.ReadImage(str(path))
    return np.array([*image.GetSpacing(), *image.GetOrigin(), *image.GetDirection()])


@pytest.mark.parametrize("ending", [".nrrd", ".nhdr", ".mha", ".mhd"])
def test_what_itk_writes_is_read_on_the_grid_that_nibabel_reads_from_its_nifti(tmp_path, ending):
    path, nifti = tmp_path / f"a{ending}", tmp_path / "a.nii"
    for axes in directions():
        image = itk_image(axes)
        sitk.WriteImage(image, str(path))
        sitk.WriteImage(image, str(nifti))
        array, affine, shape = read_volume(path)
        np.testing.assert_array_equal(array, VALUES)
        assert (array.dtype, shape) == (np.int16, SHAPE)
        np.testing.assert_allclose(affine, nib.load(nifti).affine, atol=1e-5)
        nothing, again, sides = read_volume(path, header_only=True)
        assert (nothing, sides) == (None, SHAPE)
        np.testing.assert_array_equal(affine, again)


@pytest.mark.parametrize("ending", WRITTEN)
def test_what_is_written_lies_on_the_grid_of_the_image_in_every_program(tmp_path, ending):
    mask = (VALUES % 3 == 0).astype(np.uint8)
    for axes in directions():
        sitk.WriteImage(itk_image(axes), str(tmp_path / "image.mha"))
        _, affine, shape = read_volume(tmp_path / "image.mha")
        path = write_native(tmp_path / f"mask{ending}", mask, Geometry.of(affine, shape))
        np.testing.assert_allclose(grid(path), grid(tmp_path / "image.mha"), atol=1e-5)
        array, ours, _ = read_volume(path)
        np.testing.assert_array_equal(array, mask)
        assert array.dtype == np.uint8
        np.testing.assert_allclose(ours, affine, atol=1e-5)
    scanned = nib.Nifti1Image(VALUES, affine)
    scanned.header["descrip"] = b"scanner"
    scanned.to_filename(tmp_path / "scan.nii.gz")
    path = write_native(tmp_path / f"of_nifti{ending}", mask, Geometry.of(affine, SHAPE, read_header(tmp_path / "scan.nii.gz")))
    np.testing.assert_allclose(read_volume(path)[1], affine, atol=1e-5)
    assert ending not in (".nii.gz", ".nii") or b"scanner" in bytes(nib.load(path).header["descrip"])


def test_types_and_trailing_axes(tmp_path):
    for dtype in (np.uint8, np.uint16, np.int32, np.float32, np.float64):
        sitk.WriteImage(itk_image(np.eye(3), VALUES.astype(dtype)), str(tmp_path / "a.nrrd"))
        array = read_volume(tmp_path / "a.nrrd")[0]
        assert array.dtype == (np.float32 if dtype == np.float64 else dtype)
        np.testing.assert_array_equal(array, VALUES.astype(dtype))
    sitk.WriteImage(sitk.JoinSeries([itk_image(np.eye(3))]), str(tmp_path / "four.nrrd"))
    array, affine, shape = read_volume(tmp_path / "four.nrrd")
    assert shape == SHAPE
    np.testing.assert_array_equal(array, VALUES)
    np.testing.assert_allclose(affine[:3, :3], np.diag(SIZES) * [-1, -1, 1])


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(SuiteError, match=r"none\.mha: no such file"):
        read_volume(tmp_path / "none.mha")
    sitk.WriteImage(itk_image(np.eye(3)), str(tmp_path / "cut.nrrd"))
    (tmp_path / "cut.nrrd").write_bytes((tmp_path / "cut.nrrd").read_bytes()[:-100])
    sitk.WriteImage(itk_image(np.eye(3)), str(tmp_path / "lost.mhd"))
    (tmp_path / "lost.raw").unlink()
    (tmp_path / "text.nrrd").write_text("not an image")
    for name in ("cut.nrrd", "lost.mhd", "text.nrrd"):
        with pytest.raises(SuiteError, match=rf"{name}: cannot be read as .*truncated"):
            read_volume(tmp_path / name)
    sitk.WriteImage(sitk.Compose(itk_image(np.eye(3)), itk_image(np.eye(3))), str(tmp_path / "vector.nrrd"))
    with pytest.raises(SuiteError, match=r"vector\.nrrd: holds 2 values in every voxel"):
        read_volume(tmp_path / "vector.nrrd")
    sitk.WriteImage(sitk.JoinSeries([itk_image(np.eye(3))] * 2), str(tmp_path / "times.mha"))
    with pytest.raises(SuiteError, match=r"times\.mha: expected one 3D volume, got shape \(5, 6, 7, 2\)"):
        read_volume(tmp_path / "times.mha")


def converted(source, target, ending):
    """A folder data set with its files in another format; Analyze by nibabel, the others by SimpleITK."""
    for path in source.rglob("*.nii.gz"):
        new = target / path.relative_to(source).parent / f"{stem_of(path)}{ending}"
        new.parent.mkdir(parents=True, exist_ok=True)
        if ending == ".img":
            image = nib.load(path)
            nib.AnalyzeImage(np.asarray(image.dataobj).astype(np.int16), image.affine).to_filename(new)
        else:
            image = sitk.ReadImage(str(path))
            for key in image.GetMetaDataKeys():
                image.EraseMetaData(key)  # of NIfTI; MetaImage would warn of each
            sitk.WriteImage(image, str(new))
    if (source / "attributes.csv").exists():
        shutil.copy(source / "attributes.csv", target)
    return target


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_fake_folder(tmp_path_factory.mktemp("source"), 5, shape=(12, 10, 9))


@pytest.mark.parametrize("ending", [e for e in ENDINGS if e != ".nii.gz"])
def test_a_folder_of_any_format_is_the_same_data_set(source, tmp_path, ending):
    plain, other = (Folder(root, channels=["t1", "flair"]) for root in (source, converted(source, tmp_path / "other", ending)))
    assert [c.id for c in other.cases()] == [c.id for c in plain.cases()]
    assert all(len(find_images(d.root, ["t1", "flair"])) == 5 for d in (plain, other))
    other.prepare_data()
    plain.prepare_data()
    for ours, theirs in zip(other.cases(), plain.cases(), strict=True):
        first, second = other.store.open(ours), plain.store.open(theirs)
        if ending != ".img":  # which has no orientation
            np.testing.assert_array_equal(first.read(None), second.read(None))
            np.testing.assert_array_equal(first.label(None), second.label(None))
        assert first.geometry.ending == ending
        assert sorted(first.shape) == sorted(second.shape)


def test_two_formats_of_one_image_are_refused(source, tmp_path):
    both = shutil.copytree(source, tmp_path / "both")
    sitk.WriteImage(sitk.ReadImage(str(both / "images" / "case_00_t1.nii.gz")), str(both / "images" / "case_00_t1.mha"))
    with pytest.raises(SuiteError, match=r"two files for one channel: .*case_00_t1\.mha and .*case_00_t1\.nii\.gz"):
        find_folder(both, ["t1", "flair"])


def test_predictions_come_in_the_format_of_the_input_or_in_the_one_asked_for(source, tmp_path):
    run(*SMALL, "epochs=1", "data.samples_per_epoch=4", f"data.root={source}", f"runs={tmp_path / 'runs'}")
    (folder,) = run_folders(tmp_path / "runs")
    predict = ["job=predict", f"ckpt={folder / 'checkpoints' / 'last.ckpt'}", "trust=[tests]"]
    masks = {}
    for name, ending in [("nifti", ".nii.gz"), ("meta", ".mhd"), ("nrrd", ".nrrd")]:
        images = converted(source, tmp_path / name, ending) / "images" if name != "nifti" else source / "images"
        run(*predict, f"input={images}", f"out={tmp_path / 'out' / name}")
        written = sorted((tmp_path / "out" / name / "predictions").iterdir())
        answered = {".mhd": ".mha"}.get(ending, ending)
        assert [p.name for p in written] == [f"case_{n:02d}{answered}" for n in range(5)]
        masks[name] = [read_volume(path)[0] for path in written]
        np.testing.assert_allclose(grid(written[0]), grid(images / f"case_00_t1{ending}"), atol=1e-5)
    for name in ("meta", "nrrd"):
        assert all(np.array_equal(a, b) for a, b in zip(masks[name], masks["nifti"], strict=True))
    run(*predict, f"input={source / 'images'}", f"out={tmp_path / 'asked'}", "writer.format=.nrrd")
    assert {p.suffix for p in (tmp_path / "asked" / "predictions").iterdir()} == {".nrrd"}
    with pytest.raises(SuiteError, match=r"case_00\.nrrd exists already"):
        run(*predict, f"input={source / 'images'}", f"out={tmp_path / 'asked'}")
    with pytest.raises(InstantiationException, match=r"Unknown writer\.format 'nrrd'; did you mean '\.nrrd'"):
        run(*predict, f"input={source / 'images'}", f"out={tmp_path / 'new'}", "writer.format=nrrd")
    assert not (tmp_path / "new").exists()
