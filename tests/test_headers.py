"""Headers that say things twice, in other units, or a little differently: what counts, and that masks lie where their images lie."""

from itertools import product

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from datamodules import integrity
from datamodules.preprocessing import Preprocessing, preprocess
from lesionbench.case import Case
from lesionbench.errors import SuiteError
from lesionbench.geometry import TOLERANCE, Geometry, displacement, header_doubt, read_header, read_volume, write_native
from lesionbench.task import Task
from lightning_modules.metrics.surface import surface_metrics

SHAPE = (15, 15, 6)
SIZES = (1.316, 1.316, 10.0)
TASK = Task(("t1",), {"background": 0, "lesion": 1})


def turned(degrees, sizes=SIZES):
    """Axes turned in the plane by so many degrees."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.diag(sizes)
    affine[:3, 3] = (-9, 4, 7)
    return affine


def save(path, array=None, sform=None, qform=None, codes=(1, 1), pixdim=None, units=2):
    """A volume with just this header."""
    image = nib.Nifti1Image(np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE) if array is None else array, None)
    header = image.header
    header.set_qform(qform, codes[1] if qform is not None else 0)
    header.set_sform(sform, codes[0] if sform is not None else 0)
    if pixdim is not None:
        header["pixdim"][1:4] = pixdim
    header["xyzt_units"] = units
    image = nib.Nifti1Image(np.asarray(image.dataobj), None, header)
    image.to_filename(path)
    return path


def sizes(path):
    return np.linalg.norm(read_volume(path)[1][:3, :3], axis=0)


# what counts


@pytest.mark.parametrize("qform", [None, turned(0), turned(30)])
def test_voxel_sizes_of_a_unit_sform_are_those_of_pixdim(tmp_path, qform):
    """Two slices apart is 20 mm in truth, and 15 x 15 x 6 voxels of 1.316 x 1.316 x 10 mm are 20 x 20 x 6 at 1 x 1 x 10 mm."""
    unit = np.eye(4) if qform is None else qform / [*SIZES, 1]
    image = save(tmp_path / "image.nii.gz", sform=unit, qform=qform, pixdim=SIZES)
    truth, found = np.zeros((2, *SHAPE), np.uint8)
    truth[5:9, 5:9, 2], found[5:9, 5:9, 3] = 1, 1
    label = save(tmp_path / "label.nii.gz", truth, sform=unit, qform=qform, pixdim=SIZES)
    assert sizes(image) == pytest.approx(SIZES, rel=1e-6)
    case = preprocess(Case("a", {"t1": image}, label), TASK, Preprocessing(crop="none", spacing=(1, 1, 10)))
    assert case.image.shape == (1, 20, 20, 6)
    assert surface_metrics(found, truth, case.geometry.native_spacing, ["hd95"])["hd95"] == pytest.approx(10)
    assert sitk.ReadImage(str(image)).GetSpacing() == pytest.approx(SIZES, rel=1e-6)  # another program
    assert "sform 1 x 1 x 1, pixdim 1.316 x 1.316 x 10: pixdim counts" in header_doubt(image)


def test_two_measured_sizes_and_sizes_that_nobody_set(tmp_path):
    other = save(tmp_path / "other.nii.gz", sform=turned(0, (2, 2, 2)), qform=turned(0), codes=(2, 1))
    assert sizes(other) == pytest.approx(SIZES, rel=1e-6)
    unset = save(tmp_path / "unset.nii.gz", sform=turned(0), pixdim=(1, 1, 1))
    assert sizes(unset) == pytest.approx(SIZES, rel=1e-6)
    assert "sform counts" in header_doubt(unset)
    for name, options in {
        "agree": {"sform": turned(10), "qform": turned(10)},
        "rounded": {"sform": turned(10), "qform": turned(10), "pixdim": (1.32, 1.32, 10)},
        "qform only": {"qform": turned(20)},
        "neither": {"pixdim": SIZES},
        "sheared": {"sform": turned(0) + 0.01 * np.eye(4)[:, [1, 0, 2, 3]], "qform": turned(0)},
    }.items():
        path = save(tmp_path / f"{name}.nii.gz", **options)
        np.testing.assert_allclose(read_volume(path)[1], nib.load(path).affine, err_msg=name)
        assert header_doubt(path) == "", name


@pytest.mark.parametrize(("code", "factor"), [(0, 1), (1, 1000), (2, 1), (3, 0.001), (8 + 1, 1000), (16 + 3, 0.001)])
def test_units_become_millimeters(tmp_path, code, factor):
    path = save(tmp_path / "a.nii.gz", sform=turned(30), qform=turned(30), units=code)
    assert sizes(path) == pytest.approx(np.multiply(SIZES, factor))
    assert read_volume(path)[1][:3, 3] == pytest.approx(np.multiply((-9, 4, 7), factor))
    assert read_volume(path, header_only=True)[1] == pytest.approx(read_volume(path)[1])
    assert sitk.ReadImage(str(path)).GetSpacing() == pytest.approx(tuple(np.multiply(SIZES, factor)))


def test_the_check_names_both_sizes_and_the_file(tmp_path):
    image = save(tmp_path / "image.nii.gz", sform=np.eye(4), pixdim=SIZES)
    (finding,) = [
        f
        for f in integrity.check_cases([Case("a", {"t1": image})], TASK, splits={"predict": ["a"]}, progress=False)
        if "header" in f.message
    ]
    assert (finding.level, finding.file, finding.message) == (integrity.WARNING, image, integrity.TWO_HEADERS)
    assert "1.316 x 1.316 x 10" in finding.value


# masks lie where their images lie


def grid(path):
    image = sitk.ReadImage(str(path))
    return np.array([*image.GetSpacing(), *image.GetOrigin(), *image.GetDirection(), *image.GetSize()])


@pytest.mark.parametrize("turn", [0, 30])
@pytest.mark.parametrize("sheared", [False, True])
def test_masks_lie_on_the_grid_of_the_image_in_every_program(tmp_path, turn, sheared):
    """All pairs of codes, with forms that differ; a rigid qform with a sheared sform is read by SimpleITK, and so is its mask."""
    sform = turned(turn, (1.4, 1.3, 10))
    if sheared:
        sform[0, 1] += 0.3
    for codes in product(range(6), repeat=2):
        image = save(tmp_path / "image.nii.gz", sform=sform, qform=turned(0), codes=codes, units=codes[0] % 4)
        try:
            expected = grid(image)
        except RuntimeError:  # SimpleITK reads no sheared sform
            expected = None
        _, affine, shape = read_volume(image)
        mask = np.zeros(SHAPE, np.uint8)
        mask[1, 2, 3] = 1
        path = write_native(tmp_path / "mask.nii.gz", mask, Geometry.of(affine, shape, read_header(image)))
        ours, theirs = nib.load(path), nib.load(image)
        np.testing.assert_array_equal(ours.affine, theirs.affine, err_msg=f"{codes}")
        assert ours.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(np.asarray(ours.dataobj), mask)
        for field in ("qform_code", "sform_code", "xyzt_units", "pixdim", "srow_x", "quatern_b"):
            np.testing.assert_array_equal(ours.header[field], theirs.header[field], err_msg=f"{codes} {field}")
        if expected is not None:
            np.testing.assert_array_equal(grid(path), expected, err_msg=f"{codes}")


def test_nifti_2_scaled_and_four_dimensional_inputs(tmp_path):
    image = nib.Nifti2Image(np.zeros((*SHAPE, 1), np.int16), turned(10))
    image.header["descrip"] = b"scanner"
    image.header.set_slope_inter(0.5, 3)
    image.to_filename(tmp_path / "image.nii.gz")
    _, affine, shape = read_volume(tmp_path / "image.nii.gz")
    values = np.linspace(0, 1, np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    geometry = Geometry.from_dict(Geometry.of(affine, shape, read_header(tmp_path / "image.nii.gz")).to_dict())
    found = nib.load(write_native(tmp_path / "prob.nii.gz", values, geometry))
    assert isinstance(found, nib.Nifti2Image)
    assert (found.shape, bytes(found.header["descrip"]).rstrip(b"\0")) == (SHAPE, b"scanner")
    np.testing.assert_array_equal(np.asarray(found.dataobj), values)
    np.testing.assert_allclose(found.affine, turned(10), atol=1e-6)


# what counts as one grid


def test_displacement_by_hand():
    moved = np.eye(4)
    moved[0, 3] = 0.3
    assert displacement(np.eye(4), moved, (10, 10, 10)) == pytest.approx(0.3)
    assert displacement(np.diag([0.5, 1, 1, 1]), moved @ np.diag([0.5, 1, 1, 1]), (10, 10, 10)) == pytest.approx(0.6)
    grown = np.diag([1.001, 1, 1, 1])
    assert displacement(np.eye(4), grown, (241, 2, 2)) == pytest.approx(0.24)


@pytest.mark.parametrize(
    ("change", "one"),
    [
        (lambda a: a + np.array([[0, 0, 0, 0.002], *[[0.0] * 4] * 3]), True),  # origins 0.002 mm apart
        (lambda a: turned(45 + 1e-5), True),  # beside 45 degrees, where the nearest axes change
        (lambda a: turned(45 + 1), False),
        (lambda a: a + np.array([[0, 0, 0, 0.2], *[[0.0] * 4] * 3]), False),
        (lambda a: a * [1, 1, -1, 1], False),
    ],
)
def test_check_and_preparation_have_one_tolerance(tmp_path, change, one):
    first = save(tmp_path / "t1.nii.gz", sform=turned(45), qform=turned(45))
    other = change(turned(45))
    second = save(tmp_path / "t2.nii.gz", np.arange(1350, 0, -1, dtype=np.int16).reshape(SHAPE), sform=other)
    task = Task(("t1", "t2"), {"background": 0, "lesion": 1})
    case = Case("a", {"t1": first, "t2": second})
    assert (displacement(turned(45), other, SHAPE) <= TOLERANCE) == one
    errors = [f for f in integrity.check_cases([case], task, splits={"predict": ["a"]}, progress=False) if f.level == integrity.ERROR]
    assert bool(errors) != one
    if one:
        found = preprocess(case, task, Preprocessing(crop="none")).image
        np.testing.assert_array_equal(found[0], 1350 - found[1])  # voxel by voxel
    else:
        with pytest.raises(SuiteError, match=r"t2.nii.gz .*voxels apart"):
            preprocess(case, task, Preprocessing(crop="none"))


def test_a_small_rotation_of_a_large_volume_moves_its_far_end(tmp_path):
    """0.05 degrees move voxel 240 by 0.21 mm."""
    c, s = np.cos(np.radians(0.05)), np.sin(np.radians(0.05))
    rotation = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    assert displacement(np.eye(4), rotation, (241, 2, 2)) == pytest.approx(0.21, abs=0.002)


# what the user says counts


@pytest.mark.parametrize(("header", "expected"), [("sform", (2, 3, 4)), ("qform", SIZES), ("pixdim", SIZES), ("auto", SIZES)])
def test_the_form_that_is_asked_for_counts(tmp_path, header, expected):
    """A sform of other voxel sizes and axes than the qform, in meters."""
    sform, qform = turned(90, (2, 3, 4)), turned(30)
    path = save(tmp_path / "a.nii.gz", sform=sform, qform=qform, codes=(2, 1), units=1)
    _, affine, _ = read_volume(path, header=header)
    assert np.linalg.norm(affine[:3, :3], axis=0) == pytest.approx(np.multiply(expected, 1000))
    wanted = {"sform": sform, "qform": qform, "auto": qform, "pixdim": np.diag([*SIZES, 1])}[header]
    np.testing.assert_allclose(affine, np.diag([1000, 1000, 1000, 1]) @ wanted, rtol=1e-5, atol=1e-2)
    case = preprocess(Case("a", {"t1": path}), TASK, Preprocessing(crop="none", header=header))
    assert sorted(case.geometry.native_spacing) == pytest.approx(sorted(np.multiply(expected, 1000)))
    found = integrity.check_cases([Case("a", {"t1": path})], TASK, splits={"predict": ["a"]}, progress=False, header=header)
    assert any(f.message == integrity.TWO_HEADERS for f in found) == (header == "auto")


def test_a_form_that_is_not_there_is_named(tmp_path):
    path = save(tmp_path / "a.nii.gz", qform=turned(30))
    with pytest.raises(SuiteError, match=r"a\.nii\.gz: has no sform \(code 0\), which data\.preprocessing\.header=sform asks for"):
        read_volume(path, header="sform")
    with pytest.raises(SuiteError, match=r"Unknown header \(data\.preprocessing\.header\) 'sfrom'; did you mean 'sform'"):
        Preprocessing(header="sfrom")


@pytest.mark.parametrize(
    "other", [turned(0) + np.array([[0, 0, 0, 5.0], *[[0.0] * 4] * 3]), turned(0) * [1, 1, -1, 1]], ids=["moved", "mirrored"]
)
def test_the_first_images_grid_may_count_for_all(tmp_path, other):
    """An origin 5 mm off, or an axis the other way round: refused, and after a look taken voxel by voxel."""
    values = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    first = save(tmp_path / "t1.nii.gz", values, sform=turned(0))
    second, label = (
        save(tmp_path / "t2.nii.gz", values[::-1].copy(), sform=other),
        save(tmp_path / "label.nii.gz", (values % 2).astype(np.uint8), sform=other),
    )
    task, case = Task(("t1", "t2"), {"background": 0, "lesion": 1}), Case("a", {"t1": first, "t2": second}, label)

    def levels(grid):
        found = integrity.check_cases([case], task, progress=False, grid=grid)
        return {f.level for f in found if f.message in (integrity.AFFINE, integrity.ORIENTATION)}

    with pytest.raises(SuiteError, match=r"t2\.nii\.gz .* data\.preprocessing\.grid=first"):
        preprocess(case, task, Preprocessing(crop="none"))
    taken = preprocess(case, task, Preprocessing(crop="none", grid="first"))
    np.testing.assert_array_equal(taken.image[1], taken.image[0][::-1])
    np.testing.assert_array_equal(taken.label, taken.image[0] % 2)
    assert (levels("same"), levels("first")) == ({integrity.ERROR}, {integrity.WARNING})
    with pytest.raises(SuiteError, match=r"Unknown grid \(data\.preprocessing\.grid\) 'frist'; did you mean 'first'"):
        Preprocessing(grid="frist")
