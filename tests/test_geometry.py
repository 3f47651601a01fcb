"""Whatever the axes on disk, arrays are right-anterior-superior inside and come back where they were; damaged files are refused."""

import gzip
import json
from dataclasses import replace
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
import torch

from lesionbench.errors import SuiteError
from lesionbench.geometry import Geometry, read_volume, resample, write_volume
from lesionbench.prediction import CaseResult, Prediction

SHAPE, SIZES = (7, 6, 5), (1.0, 2.0, 3.0)


def affines() -> dict[str, np.ndarray]:
    """All 48 ways in which three array axes can point, with another voxel size along each array axis."""
    found = {}
    for order, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        affine = np.eye(4)
        affine[:3, :3] = 0
        for native, (world, sign, size) in enumerate(zip(order, signs, SIZES, strict=True)):
            affine[world, native] = sign * size
        affine[:3, 3] = (11, -7, 5)
        found["".join(nib.aff2axcodes(affine))] = affine
    return found


AFFINES = affines()


def volume(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def world(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Position (3, X, Y, Z) in mm of every voxel."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    return np.einsum("wi,i...->w...", affine[:3, :3], index) + affine[:3, 3][:, None, None, None]


def test_there_are_48_orientations():
    assert len(AFFINES) == 48


@pytest.mark.parametrize("codes", AFFINES)
def test_canonical_axes_are_those_of_nibabel_and_lead_back(codes):
    affine, array = AFFINES[codes], volume()
    geometry = Geometry.of(affine, SHAPE)
    reference = nib.as_closest_canonical(nib.Nifti1Image(array, affine))
    assert np.array_equal(geometry.to_canonical(array), reference.get_fdata())
    assert geometry.canonical == geometry.resampled == reference.shape
    assert geometry.spacing == pytest.approx(reference.header.get_zooms())
    assert geometry.native_spacing == pytest.approx(SIZES)
    assert geometry.network_spacing == pytest.approx(geometry.spacing)
    canonical = torch.from_numpy(geometry.to_canonical(np.stack([array, -array], axis=-1)).copy()).movedim(-1, 0)
    assert np.array_equal(geometry.to_native(canonical).numpy(), np.stack([array, -array]))


@pytest.mark.parametrize("codes", AFFINES)
def test_crop_is_undone_and_the_outside_filled(codes):
    array = volume(1)
    geometry = Geometry.of(AFFINES[codes], SHAPE)
    geometry = replace(geometry, crop=tuple((1, n - 2) for n in geometry.canonical))
    inner = torch.from_numpy(geometry.to_canonical(array).copy())[tuple(slice(a, b) for a, b in geometry.crop)]
    back = geometry.to_native(inner[None], outside=-5)[0].numpy()
    kept = back != -5
    assert kept.sum() == inner.numel()
    assert np.array_equal(back[kept], array[kept])


@pytest.mark.parametrize("codes", AFFINES)
def test_every_voxel_comes_back_to_its_place_in_the_world(codes):
    """A map that holds each voxel's position is linear, so resampling keeps it away from the borders."""
    affine = AFFINES[codes]
    geometry = Geometry.of(affine, SHAPE)
    geometry = replace(geometry, resampled=tuple(2 * n - 1 for n in geometry.canonical))
    canonical = torch.from_numpy(np.stack([geometry.to_canonical(part) for part in world(affine, SHAPE)]))
    fine = resample(canonical, geometry.resampled)
    crop = tuple((1, n - 1) for n in geometry.resampled)
    geometry = replace(geometry, crop=crop)
    back = geometry.to_native(fine[(slice(None), *(slice(a, b) for a, b in crop))])
    inside = (slice(None), *(slice(2, n - 2) for n in SHAPE))
    assert back.shape == (3, *SHAPE)
    assert np.allclose(back[inside], world(affine, SHAPE)[inside], atol=1e-4)
    assert np.prod(geometry.network_spacing) == pytest.approx(np.prod(SIZES) * np.prod(SHAPE) / np.prod(geometry.resampled))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SPL", "AIR"])
@pytest.mark.parametrize("factor", [2, 3])
def test_labels_survive_a_finer_grid_exactly(codes, factor):
    labels = np.random.default_rng(2).integers(-1, 4, SHAPE).astype(np.int8)
    geometry = Geometry.of(AFFINES[codes], SHAPE)
    fine = tuple(factor * n for n in geometry.canonical)
    geometry = replace(geometry, resampled=fine, crop=tuple((0, n) for n in fine))
    inside = resample(torch.from_numpy(geometry.to_canonical(labels).copy())[None], fine, discrete=True)
    back = geometry.to_native(inside, discrete=True)[0]
    assert back.dtype == torch.int8
    assert np.array_equal(back.numpy(), labels)


def test_resampling_keeps_constants_and_types():
    for dtype in (torch.float32, torch.float16, torch.int8):
        constant = torch.full((2, 4, 5, 6), 3, dtype=dtype)
        for discrete in (False, True):
            moved = resample(constant, (7, 3, 6), discrete)
            assert moved.dtype == dtype
            assert moved.shape == (2, 7, 3, 6)
            assert (moved == 3).all()
    assert resample(constant, (4, 5, 6)) is constant


def test_resampling_keeps_the_field_of_view():
    """Voxels are boxes with their value at the center: two become one at the mean of their places, of three the middle one is the nearest."""
    line = torch.arange(12.0).reshape(1, 12, 1, 1)
    assert resample(line, (6, 1, 1)).flatten().tolist() == pytest.approx([0.5, 2.5, 4.5, 6.5, 8.5, 10.5])
    assert resample(line, (24, 1, 1)).flatten()[1:-1].tolist() == pytest.approx([(j + 0.5) / 2 - 0.5 for j in range(1, 23)])
    assert resample(line.to(torch.int8), (4, 1, 1), discrete=True).flatten().tolist() == [1, 4, 7, 10]


def test_oblique_affines_go_to_the_closest_axes():
    angle = np.deg2rad(20)
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    affine[:3, :3] = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, -1]]) @ affine[:3, :3]
    geometry, array = Geometry.of(affine, SHAPE), volume()
    assert geometry.spacing == pytest.approx((1, 2, 3))
    assert np.array_equal(geometry.to_canonical(array), array[:, :, ::-1])
    assert np.array_equal(geometry.to_native(torch.from_numpy(array[:, :, ::-1].copy())[None])[0].numpy(), array)


def test_geometry_survives_json():
    geometry = replace(Geometry.of(AFFINES["PIR"], SHAPE), resampled=(3, 4, 5), crop=((0, 2), (1, 4), (2, 5)))
    assert Geometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry


# files


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint16, np.float32])
@pytest.mark.parametrize("extension", [".nii", ".nii.gz"])
def test_files_keep_type_values_and_affine(dtype, extension, tmp_path):
    array = (np.arange(np.prod(SHAPE)).reshape(SHAPE) % 250).astype(dtype)
    path = write_volume(tmp_path / "new" / f"case{extension}", array, AFFINES["ASL"])
    found, affine, shape = read_volume(path)
    assert found.dtype == dtype
    assert np.array_equal(found, array)
    assert np.allclose(affine, AFFINES["ASL"])
    assert shape == SHAPE
    nothing, same, header_shape = read_volume(path, header_only=True)
    assert nothing is None
    assert np.allclose(same, affine)
    assert header_shape == SHAPE
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing half-written stays behind


def test_scaling_byte_order_and_double_precision_are_read_as_plain_numbers(tmp_path):
    array = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    scaled = nib.Nifti1Image(array, np.eye(4))
    scaled.header.set_slope_inter(0.5, 10)
    scaled.to_filename(tmp_path / "scaled.nii")
    found, _, _ = read_volume(tmp_path / "scaled.nii")
    stored = np.asarray(nib.load(tmp_path / "scaled.nii").dataobj)
    assert found.dtype == np.float32
    assert np.allclose(found, stored)
    for dtype, expected in [(">i2", np.int16), (">f4", np.float32), ("<f8", np.float32), (">f8", np.float32)]:
        header = nib.Nifti1Header(endianness=dtype[0])
        header.set_data_dtype(np.dtype(dtype))
        nib.Nifti1Image(array.astype(dtype), np.eye(4), header).to_filename(tmp_path / "other.nii")
        found, _, _ = read_volume(tmp_path / "other.nii")
        assert found.dtype == expected
        assert found.dtype.isnative
        assert np.array_equal(found, array)


def test_one_volume_in_four_dimensions_is_one_volume(tmp_path):
    array = volume()
    nib.Nifti1Image(array[..., None], np.eye(4)).to_filename(tmp_path / "four.nii")
    found, _, shape = read_volume(tmp_path / "four.nii")
    assert shape == SHAPE
    assert np.array_equal(found, array)
    nib.Nifti1Image(np.stack([array, array], axis=-1), np.eye(4)).to_filename(tmp_path / "two.nii")
    with pytest.raises(SuiteError, match=r"two.nii: expected one 3D volume, got shape \(7, 6, 5, 2\)"):
        read_volume(tmp_path / "two.nii")


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(SuiteError, match=r"gone.nii.gz: no such file"):
        read_volume(tmp_path / "gone.nii.gz")
    for name, content in {
        "empty.nii": b"",
        "empty.nii.gz": b"",
        "text.nii": b"not an image" * 100,
        "text.nii.gz": b"plain",
        "x.txt": b"x",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SuiteError, match=name):
            read_volume(tmp_path / name)


@pytest.mark.parametrize("extension", [".nii", ".nii.gz"])
def test_truncated_files_are_refused_wherever_they_end(extension, tmp_path):
    path = write_volume(tmp_path / f"case{extension}", np.random.default_rng(0).integers(0, 1000, SHAPE).astype(np.int16), np.eye(4))
    whole = path.read_bytes()
    for stop in [*range(0, len(whole), 29), len(whole) - 1]:
        path.write_bytes(whole[:stop])
        if extension == ".nii.gz" and len(whole) - stop <= 8:
            continue  # only the checksum is gone: every voxel is there
        with pytest.raises(SuiteError, match="case"):
            read_volume(path)


@pytest.mark.filterwarnings("ignore")
def test_damaged_headers_never_end_in_another_error(tmp_path):
    rng = np.random.default_rng(0)
    path = write_volume(tmp_path / "case.nii.gz", rng.integers(0, 1000, SHAPE).astype(np.int16), np.eye(4))
    whole = gzip.decompress(path.read_bytes())
    refused = []
    elsewhere = [*range(42), *range(48, 348)]  # random sizes could ask for more memory than there is
    # dim[0], dim[1], datatype, bitpix, vox_offset, magic, by their offsets in the header; then random bytes
    targeted = [
        {40: 200},
        {42: 255, 43: 255},
        {43: 127, 45: 127, 47: 127},
        {70: 99},
        {72: 3},
        {110: 127, 111: 127},
        {110: 255, 111: 255},
        {344: 0},
    ]
    for damage in [*targeted, *({int(p): int(rng.integers(256)) for p in rng.choice(elsewhere, 3)} for _ in range(150))]:
        content = bytearray(whole)
        for position, value in damage.items():
            content[position] = value
        for suffix, data in [(".nii", bytes(content)), (".nii.gz", gzip.compress(bytes(content), 1))]:
            damaged = tmp_path / f"damaged{suffix}"
            damaged.write_bytes(data)
            try:
                array, _, shape = read_volume(damaged)
                assert array.shape == shape
            except SuiteError as error:
                refused.append(str(error))
    assert len(refused) > 40
    assert all("damaged.nii" in message for message in refused)


# predictions


def test_prediction_maps_continuous_and_discrete_parts_of_every_member():
    maps = torch.rand(2, 3, 3, 3)
    member = Prediction(regions=maps, labels=torch.ones(3, 3, 3, dtype=torch.int8), table={"risk": 0.5})
    whole = Prediction(scores=maps[0], uncertainty={"entropy": maps[1]}, members={"a": replace(member, members={"b": Prediction()})})
    seen = []

    def doubled(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.ndim)
        return x * 2

    mapped = whole.map(doubled, lambda x: x + 3)
    assert set(seen) == {4}  # always (C, X, Y, Z)
    assert torch.equal(mapped.scores, maps[0] * 2)
    assert torch.equal(mapped.uncertainty["entropy"], maps[1] * 2)
    assert torch.equal(mapped.members["a"].regions, maps * 2)
    assert (mapped.members["a"].labels == 4).all()
    assert mapped.members["a"].table == {"risk": 0.5}
    assert mapped.regions is None
    assert [name for name, _ in mapped.flat()] == ["", "a", "a/b"]
    assert torch.equal(whole.scores, maps[0])


def test_a_case_result_knows_the_spacing_and_image_of_its_grid():
    geometry = Geometry.of(AFFINES["SPR"], SHAPE)
    geometry = replace(geometry, resampled=tuple(2 * n for n in geometry.canonical), crop=((1, 4), (0, 3), (2, 5)))
    image = torch.rand(2, 3, 3, 3)
    result = CaseResult("case", "patient", "site", Prediction(), None, image, geometry)
    assert result.spacing == pytest.approx(SIZES)
    assert result.image_on_grid().shape == (2, *SHAPE)
    network = replace(result, native=False)
    assert network.spacing == pytest.approx(tuple(s / 2 for s in geometry.spacing))
    assert network.image_on_grid() is image


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "complex64"])
@pytest.mark.parametrize("header_only", [False, True])
def test_colors_and_complex_numbers_are_named_for_what_they_are(tmp_path, kind, header_only):
    fields = [(name, "u1") for name in "RGBA"[: len(kind)]]
    array = np.zeros((2, 2, 2), np.complex64 if kind == "complex64" else fields)
    nib.Nifti1Image(array, np.eye(4)).to_filename(tmp_path / "x.nii.gz")
    said = (
        "complex numbers.*export the magnitude" if kind == "complex64" else f"colors .{'/'.join('RGBA'[: len(kind)])}.*export gray values"
    )
    with pytest.raises(SuiteError, match=rf"x\.nii\.gz: holds {said}"):
        read_volume(tmp_path / "x.nii.gz", header_only)


def test_a_case_result_moves_with_all_its_maps():
    """`Trainer.predict` moves what it returns with `.to`; without it Lightning refuses the frozen geometry inside."""
    maps = torch.rand(2, 3, 3, 3)
    members = {"a": Prediction(regions=maps)}
    prediction = Prediction(maps, maps[0].to(torch.int8), maps[1], {"entropy": maps[0]}, members, {"risk": 0.5})
    result = CaseResult("c", "p", "s", prediction, maps[0].to(torch.int8), maps, Geometry.of(AFFINES["SPR"], SHAPE), [{"dice": 1.0}])
    moved = result.to("meta")
    whole = moved.prediction
    parts = [moved.image, moved.truth, whole.regions, whole.labels, whole.scores, whole.uncertainty["entropy"], whole.members["a"].regions]
    assert {part.device.type for part in parts} == {"meta"}
    assert (moved.case, moved.geometry, moved.rows, whole.table) == (result.case, result.geometry, result.rows, {"risk": 0.5})
    assert result.image.device.type == "cpu"
