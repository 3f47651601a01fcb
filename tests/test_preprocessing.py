import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from datamodules.preprocessing import Preprocessing, dataset_statistics, foreground, normalize_patch, preprocess
from lesionbench.case import Case
from lesionbench.errors import SuiteError
from lesionbench.task import Task

TASK = Task(channels=("t1", "flair"), classes={"background": (0,), "core": (1,), "edema": (4, 2)}, ignore=(9,))
RAS = np.diag([1.0, 1.0, 1.0, 1.0])
LPS = np.array([[-1.0, 0, 0, 10], [0, -2, 0, 20], [0, 0, 3, 0], [0, 0, 0, 1]])
PERMUTED = np.array([[0, 0, -2.0, 7], [3, 0, 0, 5], [0, -1.5, 0, 1], [0, 0, 0, 1]])  # axes are anterior, inferior, left


def write(path, array, affine=RAS):
    nib.Nifti1Image(array, affine).to_filename(path)
    return path


def make_case(folder, images, label=None, raters=(), affine=RAS, name="case"):
    return Case(
        id=name,
        images={channel: write(folder / f"{name}_{channel}.nii.gz", array, affine) for channel, array in images.items()},
        label=None if label is None else write(folder / f"{name}_label.nii.gz", label, affine),
        raters=[write(folder / f"{name}_rater{i}.nii.gz", array, affine) for i, array in enumerate(raters)],
    )


def blob(shape=(12, 16, 20), dtype=np.int16):
    """Two channels and a label with a border of zeros around an off-center box."""
    rng = np.random.default_rng(0)
    images = {}
    for channel in TASK.channels:
        images[channel] = np.zeros(shape, dtype)
        images[channel][2:9, 3:12, 4:18] = rng.integers(1, 900, (7, 9, 14))
    label = np.zeros(shape, np.uint8)
    label[3:7, 4:9, 6:12] = 4
    label[4:6, 5:7, 7:10] = 1
    label[8, 11, 17] = 9
    return images, label


@pytest.mark.parametrize("affine", [RAS, LPS, PERMUTED])
def test_native_grid_comes_back_exactly_where_nothing_was_resampled(tmp_path, affine):
    images, label = blob()
    prepared = preprocess(make_case(tmp_path, images, label, affine=affine), TASK, Preprocessing())
    assert sorted(prepared.label.shape) == [7, 9, 14]
    back = prepared.geometry.to_native(torch.from_numpy(prepared.image).float())
    assert np.array_equal(back.numpy(), np.stack([images["t1"], images["flair"]]))
    label_back = prepared.geometry.to_native(torch.from_numpy(prepared.label)[None], discrete=True)[0].numpy()
    assert np.array_equal(label_back, np.select([label == 1, label == 4, label == 9], [1, 2, -1]))


def test_axes_inside_are_right_anterior_superior(tmp_path):
    images, _ = blob()
    prepared = preprocess(make_case(tmp_path, images, affine=PERMUTED), TASK, Preprocessing(crop="none"))
    # native axes are (anterior, inferior, left) with sizes (12, 16, 20)
    assert np.array_equal(prepared.image[0], images["t1"].transpose(2, 0, 1)[::-1, :, ::-1])
    assert prepared.geometry.spacing == (2.0, 3.0, 1.5)
    assert prepared.label is None


def test_every_volume_is_resampled_to_the_wanted_size(tmp_path):
    images, label = blob()
    prepared = preprocess(make_case(tmp_path, images, label, affine=PERMUTED), TASK, Preprocessing(size=[10, 8, 24], crop="none"))
    assert prepared.image.shape == (2, 10, 8, 24)
    assert prepared.label.shape == prepared.geometry.resampled == (10, 8, 24)
    assert prepared.geometry.network_spacing == pytest.approx((20 * 2 / 10, 12 * 3 / 8, 16 * 1.5 / 24))
    assert prepared.geometry.to_native(torch.from_numpy(prepared.image)).shape == (2, 12, 16, 20)


@pytest.mark.parametrize("affine", [LPS, PERMUTED])
def test_resampling_keeps_the_field_of_view_and_the_label_values(tmp_path, affine):
    images, label = blob()
    ball = sum((g - c) ** 2 for g, c in zip(np.meshgrid(*map(np.arange, label.shape), indexing="ij"), (6, 8, 10), strict=True)) < 16
    label = np.where(ball, 2, 0).astype(np.uint8)
    prepared = preprocess(make_case(tmp_path, images, label, affine=affine), TASK, Preprocessing(spacing=(1, 1, 1), margin=3))
    canonical = prepared.geometry.canonical
    assert prepared.geometry.resampled == tuple(round(n * s) for n, s in zip(canonical, prepared.geometry.spacing, strict=True))
    assert prepared.geometry.network_spacing == pytest.approx((1, 1, 1))
    assert prepared.image.dtype == np.float32
    assert set(np.unique(prepared.label)) == {0, 2}
    volume = prepared.label.astype(bool).sum() / (ball.sum() * np.prod(prepared.geometry.spacing))
    assert volume == pytest.approx(1, abs=0.02)  # mm3 are kept
    back = prepared.geometry.to_native(torch.from_numpy(prepared.label)[None], discrete=True)[0].numpy()
    assert (back.astype(bool) == ball).mean() > 0.99


def test_downsampling_averages_neighbors_and_rounds_the_shape(tmp_path):
    ramp = np.broadcast_to(np.arange(1, 9, dtype=np.int16)[:, None, None], (8, 7, 4)).copy()
    case = make_case(tmp_path, {"t1": ramp, "flair": ramp})
    prepared = preprocess(case, TASK, Preprocessing(spacing=(2, 2, 1)))
    assert prepared.geometry.resampled == (4, 4, 4)  # round(3.5) to even
    assert np.allclose(prepared.image[0, :, 0, 0], [1.5, 3.5, 5.5, 7.5])
    nearest = preprocess(case, TASK, Preprocessing(spacing=(2, 2, 1), interpolation="nearest")).image[0, :, 0, 0]
    assert np.array_equal(nearest, [2, 4, 6, 8])  # values of the file, no averages


@pytest.mark.parametrize("affine", [RAS, LPS, PERMUTED])
def test_center_crop_is_in_the_middle_of_the_resampled_volume_and_comes_back_onto_the_grid(tmp_path, affine):
    images, label = blob((11, 16, 21))
    sides = {"R": 11, "A": 16, "S": 21} if affine is not PERMUTED else {"R": 21, "A": 11, "S": 16}
    settings = Preprocessing(crop="center", crop_size=[4, None, 99])
    prepared = preprocess(make_case(tmp_path, images, label, affine=affine), TASK, settings)
    start = (sides["R"] - 4) // 2  # 3 of 11, so that 3 are cut off before and 4 behind; 8 of 21
    assert prepared.geometry.crop == ((start, start + 4), (0, sides["A"]), (0, sides["S"]))
    whole = preprocess(make_case(tmp_path, images, label, affine=affine, name="whole"), TASK, Preprocessing(crop="none"))
    assert np.array_equal(prepared.image, whole.image[:, start : start + 4])
    assert np.array_equal(prepared.label, whole.label[start : start + 4])
    kept = whole.label.copy()
    kept[:start], kept[start + 4 :] = 0, 0
    back, expected = (g.to_native(torch.from_numpy(a)[None]) for g, a in [(prepared.geometry, prepared.label), (whole.geometry, kept)])
    assert torch.equal(back, expected)
    again = Preprocessing.from_dict(json.loads(json.dumps(settings.to_dict())))
    assert again == settings
    assert Preprocessing.from_dict({k: v for k, v in Preprocessing().to_dict().items() if k != "crop_size"}) == Preprocessing()


def test_center_crop_counts_resampled_voxels(tmp_path):
    images, _ = blob((12, 16, 20))
    case = make_case(tmp_path, images, affine=np.diag([2.0, 2.0, 2.0, 1.0]))
    prepared = preprocess(case, TASK, Preprocessing(spacing=[1, 2, 4], crop="center", crop_size=[10, 10, 4]))
    assert prepared.geometry.resampled == (24, 16, 10)
    assert prepared.geometry.crop == ((7, 17), (3, 13), (3, 7))


def test_crop_is_the_box_of_any_channel_plus_margin_within_the_volume(tmp_path):
    t1, flair = np.zeros((10, 10, 10), np.int16), np.zeros((10, 10, 10), np.int16)
    t1[3, 4, 5] = 7
    flair[6, 4, 9] = -2
    case = make_case(tmp_path, {"t1": t1, "flair": flair})
    assert preprocess(case, TASK, Preprocessing()).geometry.crop == ((3, 7), (4, 5), (5, 10))
    assert preprocess(case, TASK, Preprocessing(margin=4)).geometry.crop == ((0, 10), (0, 9), (1, 10))
    assert preprocess(case, TASK, Preprocessing(crop="none")).geometry.crop == ((0, 10),) * 3


def test_margins_by_axis_and_the_box_around_the_label(tmp_path):
    image, label = np.ones((10, 10, 10), np.int16), np.zeros((10, 10, 10), np.int16)
    label[3:5, 4, 5:8] = 1
    case = make_case(tmp_path, {"t1": image, "flair": image}, label)
    assert preprocess(case, TASK, Preprocessing(crop="label")).geometry.crop == ((3, 5), (4, 5), (5, 8))
    prepared = preprocess(case, TASK, Preprocessing(crop="label", margin=[1, 0, 10]))
    assert prepared.geometry.crop == ((2, 6), (4, 5), (0, 10))
    assert np.array_equal(prepared.label, label[2:6, 4:5])
    assert preprocess(replace(case, label=None), TASK, Preprocessing(crop="label")).geometry.crop == ((0, 10),) * 3
    raters = replace(case, label=None, raters=[case.label, case.label])
    assert preprocess(raters, TASK, Preprocessing(crop="label")).geometry.crop == ((3, 5), (4, 5), (5, 8))
    settings = Preprocessing(crop="label", margin=[1, 0, 10])
    assert Preprocessing.from_dict(settings.to_dict()) == settings
    for wrong in ([1, 2], [1, 2, -1], -1):
        with pytest.raises(SuiteError, match=r"data.preprocessing.margin: one or three numbers"):
            Preprocessing(margin=wrong)


def test_a_size_may_leave_an_axis_alone(tmp_path):
    images, label = blob()
    depth = label.shape[2]
    prepared = preprocess(make_case(tmp_path, images, label), TASK, Preprocessing(crop="none", size=[12, 20, None]))
    assert prepared.image.shape == (2, 12, 20, depth)
    assert prepared.label.shape == (12, 20, depth)
    assert Preprocessing.from_dict(Preprocessing(size=[12, 20, None]).to_dict()).size == (12, 20, None)
    with pytest.raises(SuiteError, match="three numbers of voxels, each or all null"):
        Preprocessing(size=[12, None, 0])


def test_volume_without_foreground_is_kept_whole_and_stays_finite(tmp_path):
    zeros = np.zeros((4, 5, 6), np.int16)
    prepared = preprocess(make_case(tmp_path, {"t1": zeros, "flair": zeros}), TASK, Preprocessing())
    assert prepared.image.shape == (2, 4, 5, 6)
    for kind in ("zscore", "zscore_all", "minmax", "percentile", "none"):
        assert not normalize_patch(prepared.image, prepared.stats, Preprocessing(normalize=kind)).any()


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        (lambda x: x, np.int16),
        (lambda x: x.astype(np.uint8) % 200, np.int16),
        (lambda x: x.astype(np.float64), np.int16),  # whole numbers written as floats lose nothing
        (lambda x: x.astype(np.float32) + np.float32(0.5), np.float32),
        (lambda x: x.astype(np.uint16) + np.uint16(40_000), np.float32),
        (lambda x: x.astype(np.int32) - np.int32(40_000), np.float32),
    ],
)
def test_image_is_stored_as_int16_only_where_nothing_is_lost(tmp_path, change, dtype):
    images, _ = blob()
    images["flair"] = change(images["flair"])
    prepared = preprocess(make_case(tmp_path, images), TASK, Preprocessing(crop="none"))
    assert prepared.image.dtype == dtype
    assert np.array_equal(prepared.image[1], images["flair"])
    same_grid = preprocess(make_case(tmp_path, images), TASK, Preprocessing(crop="none", spacing=(1, 1, 1)))
    assert same_grid.image.dtype == dtype  # asked for, but nothing to resample


def line_case(folder):
    """Channel t1 is 0, 2, 4, 6, 0 and flair 0, 0, 10, 30, 50 along x: foreground is voxels 1..4."""
    t1 = np.array([0, 2, 4, 6, 0], np.int16).reshape(5, 1, 1)
    flair = np.array([0, 0, 10, 30, 50], np.int16).reshape(5, 1, 1)
    return make_case(folder, {"t1": t1, "flair": flair})


@pytest.mark.parametrize(
    ("kind", "t1", "flair"),
    [
        # foreground t1: 2 4 6 0 -> mean 3, std sqrt(5); flair: 0 10 30 50 -> mean 22.5, variance 368.75
        ("zscore", [0, -1 / 5**0.5, 1 / 5**0.5, 3 / 5**0.5, -3 / 5**0.5], np.array([0, -22.5, -12.5, 7.5, 27.5]) / 368.75**0.5),
        # all: mean 2.4, variance 5.44; mean 18, variance 376
        ("zscore_all", np.array([-2.4, -0.4, 1.6, 3.6, -2.4]) / 5.44**0.5, np.array([-18, -18, -8, 12, 32]) / 376**0.5),
        ("minmax", [0, 1 / 3, 2 / 3, 1, 0], [0, 0, 0.2, 0.6, 1]),
        # sorted t1 0 2 4 6: 0.5 % at 0.015 * 2 = 0.03, 99.5 % at 6 - 0.03; flair: 0.015 * 10 = 0.15 and 50 - 0.015 * 20 = 49.7
        ("percentile", [0, 1.97 / 5.94, 3.97 / 5.94, 1, 0], [0, 0, 9.85 / 49.55, 29.85 / 49.55, 1]),
        ("none", [0, 2, 4, 6, 0], [0, 0, 10, 30, 50]),
        ("dataset", [0, 0.5, 1.5, 2.5, -0.5], [0, -1, 0, 2, 4]),  # mean 1, std 2 and mean 10, std 10
    ],
)
def test_normalization_equals_hand_computed_values(tmp_path, kind, t1, flair):
    settings = Preprocessing(crop="none", normalize=kind)
    prepared = preprocess(line_case(tmp_path), TASK, settings)
    before = prepared.image.copy()
    out = normalize_patch(prepared.image, prepared.stats, settings, {"mean": [1, 10], "std": [2, 10]})
    assert out.dtype == np.float32
    assert np.allclose(out[:, :, 0, 0], [t1, flair], atol=1e-6)
    assert np.array_equal(prepared.image, before)


def test_percentiles_are_those_of_the_settings(tmp_path):
    everything = Preprocessing(crop="none", normalize="percentile", percentiles=(0, 100))
    prepared = preprocess(line_case(tmp_path), TASK, everything)
    expected = normalize_patch(prepared.image, prepared.stats, Preprocessing(crop="none", normalize="minmax"))
    assert np.allclose(normalize_patch(prepared.image, prepared.stats, everything), expected, atol=1e-6)
    with pytest.raises(SuiteError, match="percentiles"):
        Preprocessing(percentiles=(99, 1))


def test_normalizing_a_patch_equals_the_patch_of_the_normalized_case(tmp_path):
    images, _ = blob()
    prepared = preprocess(make_case(tmp_path, images), TASK, Preprocessing())
    part = (slice(None), slice(1, 5), slice(0, 4), slice(3, 9))
    for kind in ("zscore", "zscore_all", "minmax", "percentile", "none"):
        settings = Preprocessing(normalize=kind)
        whole = normalize_patch(prepared.image, prepared.stats, settings)
        assert np.array_equal(normalize_patch(prepared.image[part], prepared.stats, settings), whole[part])


def test_zscore_gives_unit_foreground_and_zero_background(tmp_path):
    images, _ = blob()
    settings = Preprocessing(crop="none")
    prepared = preprocess(make_case(tmp_path, images), TASK, settings)
    out = normalize_patch(prepared.image, prepared.stats, settings)
    inside = foreground(prepared.image)
    assert not out[:, ~inside].any()
    assert np.allclose(out[:, inside].mean(axis=1), 0, atol=1e-5)
    assert np.allclose(out[:, inside].std(axis=1), 1, atol=1e-5)


def test_constant_channel_becomes_zero(tmp_path):
    image = np.full((4, 4, 4), 7.1, np.float32)
    prepared = preprocess(make_case(tmp_path, {"t1": image, "flair": image}), TASK, Preprocessing())
    for kind in ("zscore", "zscore_all", "minmax", "percentile"):
        assert not normalize_patch(prepared.image, prepared.stats, Preprocessing(normalize=kind)).any()


def test_dataset_statistics_pool_voxels_and_leave_missing_channels_out(tmp_path):
    one = preprocess(line_case(tmp_path), TASK, Preprocessing())
    t1 = np.array([8, 8, 5], np.int16).reshape(3, 1, 1)
    other = preprocess(make_case(tmp_path, {"t1": t1}, name="b"), TASK, Preprocessing(allow_missing=True))
    pooled = dataset_statistics([json.loads(json.dumps(p.stats)) for p in (one, other)])
    values = np.array([2, 4, 6, 0, 8, 8, 5])
    assert pooled["mean"] == pytest.approx([values.mean(), 22.5])
    assert pooled["std"] == pytest.approx([values.std(), 368.75**0.5])
    with pytest.raises(SuiteError, match="training"):
        dataset_statistics([])
    with pytest.raises(SuiteError, match="dataset"):
        normalize_patch(one.image, one.stats, Preprocessing(normalize="dataset"))


def test_missing_channel_is_zero_after_every_normalization(tmp_path):
    images, _ = blob()
    case = make_case(tmp_path, {"flair": images["flair"]})
    with pytest.raises(SuiteError, match=r"case case: no file for channel\(s\) t1.*flair"):
        preprocess(case, TASK, Preprocessing())
    prepared = preprocess(case, TASK, Preprocessing(allow_missing=True))
    assert prepared.channel_mask == (False, True)
    assert not prepared.image[0].any()
    for kind in ("zscore", "zscore_all", "minmax", "percentile", "dataset", "none"):
        out = normalize_patch(prepared.image, prepared.stats, Preprocessing(normalize=kind), {"mean": [5, 5], "std": [2, 2]})
        assert not out[0].any()
        assert out[1].any()
    with pytest.raises(SuiteError, match="t1, flair"):
        preprocess(Case("empty", {}), TASK, Preprocessing(allow_missing=True))


def test_clip_makes_air_the_background_and_keeps_zero_units_inside(tmp_path):
    ct = np.full((6, 6, 6), -1000, np.int16)
    ct[1:5, 1:5, 1:5] = np.arange(64, dtype=np.int16).reshape(4, 4, 4) - 1  # -1 .. 62, with one voxel of 0
    ct[1, 1, 1] = 2000
    task = Task(channels=("ct",), classes={"background": (0,), "stroke": (1,)})
    settings = Preprocessing(clip=(-20, 60), normalize="minmax")
    prepared = preprocess(make_case(tmp_path, {"ct": ct}), task, settings)
    assert prepared.geometry.crop == ((1, 5),) * 3
    assert prepared.image.dtype == np.int16
    assert (prepared.image.min(), prepared.image.max()) == (0, 60)
    whole = preprocess(make_case(tmp_path, {"ct": ct}), task, Preprocessing(clip=(-20, 60), crop="none", normalize="minmax"))
    out = normalize_patch(whole.image, whole.stats, settings)
    assert out[0, 0, 0, 0] == 0
    assert out[0, 1, 1, 1] == 1
    assert out[0, 1, 2, 1] == pytest.approx(3 / 60)


def test_resampled_air_stays_exactly_air(tmp_path):
    air = np.full((12, 6, 26), -1024, np.int16)
    task = Task(channels=("ct",), classes={"background": (0,), "stroke": (1,)})
    settings = Preprocessing(clip=(-1000, 100), spacing=(2.4, 0.2, 26 / 24))  # interpolating -1000 on this grid is off by a rounding
    prepared = preprocess(make_case(tmp_path, {"ct": air}), task, settings)
    assert prepared.image.shape == (1, 5, 30, 24)
    assert prepared.stats["count"] == [0]
    assert (prepared.image == -1000).all()


def test_raters_are_stacked_and_labels_can_be_left_out(tmp_path):
    images, label = blob()
    other = np.where(label == 1, 2, label).astype(np.uint8)
    case = make_case(tmp_path, images, label, raters=[label, other, label])
    prepared = preprocess(case, TASK, Preprocessing())
    assert prepared.raters.shape == (3, *prepared.label.shape)
    assert prepared.raters.dtype == np.int8
    assert np.array_equal(prepared.raters[0], prepared.label)
    assert np.array_equal(prepared.raters[1], np.where(prepared.label == 1, 2, prepared.label))
    bare = preprocess(case, TASK, Preprocessing(), with_label=False)
    assert bare.label is None
    assert bare.raters is None


def test_errors_name_case_file_and_value(tmp_path):
    images, label = blob()
    broken = {**images, "flair": images["flair"].astype(np.float32)}
    broken["flair"][3, 4, 5] = np.nan
    with pytest.raises(SuiteError, match=r"case nan: .*nan_flair.nii.gz: 1 voxel.* nan at \(3, 4, 5\)"):
        preprocess(make_case(tmp_path, broken, name="nan"), TASK, Preprocessing())
    with pytest.raises(SuiteError, match=r"case cut: .*cut_label.nii.gz has shape \(11, 16, 20\).*\(12, 16, 20\)"):
        preprocess(make_case(tmp_path, images, label[1:], name="cut"), TASK, Preprocessing())
    with pytest.raises(SuiteError, match=r"case odd: .*odd_label.nii.gz: unknown label value\(s\) \[7\]"):
        preprocess(make_case(tmp_path, images, np.where(label == 1, 7, label).astype(np.uint8), name="odd"), TASK, Preprocessing())
    case = make_case(tmp_path, images, name="axes")
    write(case.images["flair"], images["flair"], np.diag([-1.0, 1, 1, 1]))
    with pytest.raises(SuiteError, match=r"case axes: .*axes_flair.nii.gz has axes LAS, the first image RAS"):
        preprocess(case, TASK, Preprocessing())


def test_settings_survive_a_checkpoint_and_refuse_nonsense():
    settings = Preprocessing(spacing=[1, 1.5, 2], margin=3, normalize="minmax", clip=(0, 80), allow_missing=True)
    assert Preprocessing.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    with pytest.raises(SuiteError, match="did you mean 'zscore'"):
        Preprocessing(normalize="z_score")
    with pytest.raises(SuiteError, match="did you mean 'foreground'"):
        Preprocessing(crop="forground")
    for wrong in (
        {"size": (8, 8)},
        {"size": (8, 8, 0)},
        {"size": (8, 8, 8), "spacing": (1, 1, 1)},
        {"spacing": (1, 1)},
        {"spacing": (1, 1, 0)},
        {"clip": (5, 5)},
        {"margin": -1},
        {"crop": "center"},
        {"crop_size": (8, 8, 8)},
        {"crop_size": (8, 0, 8), "crop": "center"},
    ):
        with pytest.raises(SuiteError, match=next(iter(wrong))):
            Preprocessing(**wrong)


def test_real_case_keeps_its_labels(real_data):
    folder = sorted((real_data / "brats18").iterdir())[0]
    files = {c: next(folder.glob(f"*_{c}.nii*")) for c in ("t1", "t1ce", "t2", "flair")}
    label = next(folder.glob("*_seg.nii*"))
    task = Task(channels=tuple(files), classes={"background": (0,), "ncr": (1,), "ed": (2,), "et": (4,)})
    prepared = preprocess(Case(folder.name, files, label), task, Preprocessing())
    assert prepared.image.dtype == np.int16
    back = prepared.geometry.to_native(torch.from_numpy(prepared.label)[None], discrete=True)[0].numpy()
    assert np.array_equal(task.to_disk(back), np.asarray(nib.load(label).dataobj))
