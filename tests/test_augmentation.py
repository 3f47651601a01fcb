"""Placements put patches where they say, intensity transforms do what their formula says, and maps keep their values."""

import math

import numpy as np
import pytest
import torch
import torchio
from scipy.ndimage import gaussian_filter

from datamodules.preprocessing import Preprocessing
from datamodules.transforms import intensity, placement
from datamodules.transforms.area_crop import RandomAreaCrop
from datamodules.transforms.augmentation import chain
from datamodules.transforms.placement import Placement, RandomPlacement
from datamodules.transforms.quarter_turns import RandomQuarterTurns
from lesionbench.errors import SuiteError
from tests.test_samples import At, assert_same, dataset, module, root, store, whole

__all__ = ["root", "store"]

CROPPED = (12, 10, 8)  # what the foreground crop leaves of the cases of `root`


def quarter_turn(axis: int) -> np.ndarray:
    return placement._rotation(axis, math.pi / 2)


def cube(*shape: int) -> torch.Tensor:
    return torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))


# placement


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_quarter_turn_moves_voxels_and_nothing_else(axis):
    values = cube(5, 5, 5)
    turned = Placement(quarter_turn(axis)).resample(values, (5, 5, 5), linear=True)
    plane = [1 + i for i in range(3) if i != axis]
    assert torch.allclose(turned, torch.rot90(values, -1, plane), atol=1e-5)


def test_scaling_by_two_reads_every_second_voxel():
    place = Placement(np.diag([2.0, 2.0, 2.0]))
    assert place.margin((5, 5, 3)) == [2, 2, 1]
    assert place.grown(((10, 15), (0, 5), (4, 7))) == ((8, 17), (-2, 7), (3, 8))
    values = cube(9, 9, 5)
    assert torch.allclose(place.resample(values, (5, 5, 3), linear=True), values[:, ::2, ::2, ::2], atol=1e-5)


def test_magnifying_needs_no_margin_and_keeps_the_center():
    place = Placement(np.diag([0.5, 0.5, 0.5]))
    assert place.margin((7, 7, 7)) == [0, 0, 0]
    ramp = torch.arange(7.0).reshape(1, 7, 1, 1).expand(1, 7, 7, 7)
    shown = place.resample(ramp, (7, 7, 7), linear=True)
    assert torch.allclose(shown[0, :, 3, 3], 3 + 0.5 * (torch.arange(7.0) - 3), atol=1e-5)


def test_a_turned_patch_covers_the_corners_of_its_grown_box():
    turn = Placement(placement._rotation(2, math.pi / 4))
    assert turn.margin((11, 11, 4)) == [3, 3, 0]  # 5 * sqrt(2) - 5 = 2.07


@pytest.mark.parametrize("matrix", [None, np.eye(3)])
def test_mirroring_is_the_same_with_and_without_a_turn(matrix):
    drawn = RandomPlacement(p_rotation=0 if matrix is None else 1, degrees=0, p_scaling=0, mirror_axes=(0, 2))
    values = cube(4, 5, 3)
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        place = drawn.draw()
        signs = place.mirrored if matrix is None else tuple(np.flatnonzero(np.diag(place.matrix) < 0))
        moved = values if matrix is None else place.resample(values, (4, 5, 3), linear=False)
        moved = torch.from_numpy(place.mirror(moved.numpy()).copy())
        assert torch.allclose(moved, values.flip([1 + a for a in signs]))
        seen.add(signs)
    assert seen == {(), (0,), (2,), (0, 2)}


def test_placements_stay_in_the_plane_of_slices():
    torch.manual_seed(0)
    for _ in range(10):
        matrix = RandomPlacement(p_rotation=1, p_scaling=1, mirror_axes=(), elongation=0.5).draw(slice_axis=1).matrix
        assert np.allclose(matrix[1], [0, 1, 0])
        assert np.allclose(matrix[:, 1], [0, 1, 0])


def test_probabilities_and_ranges_of_placements():
    torch.manual_seed(0)
    drawn = [RandomPlacement(degrees=30, scales=(0.7, 1.4), mirror_axes=()).draw() for _ in range(4000)]
    assert sum(p.matrix is not None for p in drawn) / 4000 == pytest.approx(1 - 0.8 * 0.8, abs=0.03)
    volumes = [np.cbrt(np.linalg.det(p.matrix)) for p in drawn if p.matrix is not None]
    assert 0.7 <= min(volumes) < 0.72
    assert 1.38 < max(volumes) <= 1.4
    for name, value in [
        ("scales", (1.2, 0.8)),
        ("p_rotation", 1.5),
        ("p_scaling", -0.1),
        ("elongation", 2),
        ("p_elastic", 3),
        ("deformation", (0.3, 0.2)),
    ]:
        with pytest.raises(SuiteError, match=name):
            RandomPlacement(**{name: value})


def test_a_warp_moves_voxels_by_shares_of_the_side():
    """A constant warp of 0.2 along the first axis of a side of 5 voxels moves everything by one voxel."""
    warp = torch.zeros(3, 4, 4, 4)
    warp[0] = 0.2
    place = Placement(np.eye(3), warp=warp)
    assert place.margin((5, 5, 5)) == [1, 0, 0]
    assert place.grown(((3, 8), (0, 5), (0, 5))) == ((2, 9), (0, 5), (0, 5))
    values = cube(7, 5, 5)
    assert torch.allclose(place.resample(values, (5, 5, 5), linear=True), values[:, 2:], atol=1e-5)


def test_elastic_deformations_are_smooth_and_as_large_as_they_say():
    drawn = RandomPlacement(p_rotation=0, p_scaling=0, mirror_axes=(), p_elastic=1, deformation=(0.2, 0.2))
    largest = []
    for seed in range(40):
        torch.manual_seed(seed)
        place = drawn.draw()
        assert np.array_equal(place.matrix, np.eye(3))
        largest += place.warp.abs().amax(dim=(1, 2, 3)).tolist()
        steps = [place.warp.diff(dim=axis).abs().max() for axis in (1, 2, 3)]
        assert max(steps) < 1 / 23  # no point overtakes its neighbor: nothing is folded
    assert min(largest) == pytest.approx(0.2 / 8, abs=0.005)
    assert max(largest) == pytest.approx(0.2 / 2, abs=0.005)
    torch.manual_seed(0)
    flat = drawn.draw(slice_axis=1).warp
    assert flat.shape == (3, 24, 1, 24)
    assert not flat[1].any()
    torch.manual_seed(0)
    share = [RandomPlacement(p_rotation=0, p_scaling=0, p_elastic=0.3).draw().warp is not None for _ in range(1000)]
    assert sum(share) / 1000 == pytest.approx(0.3, abs=0.05)


def test_without_deformation_every_draw_stays_what_it_was():
    torch.manual_seed(1)
    before = [RandomPlacement().draw() for _ in range(5)]
    state = torch.get_rng_state()
    torch.manual_seed(1)
    after = [RandomPlacement(p_elastic=0, deformation=(0.1, 0.2)).draw() for _ in range(5)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(a.mirrored == b.mirrored and np.array_equal(a.matrix, b.matrix) for a, b in zip(before, after, strict=True))


def test_placed_samples_show_the_voxels_they_should(root, store):
    """Image, label and maps stay together, and nothing is filled with zeros while the volume goes on."""
    place = RandomPlacement(degrees=12, scales=(0.8, 1.0), p_rotation=1, p_scaling=1, p_elastic=1, deformation=(0, 0.1))
    options = {"extra_maps": {"place": "nearest", "twin": "nearest", "soft": "linear"}, "maps": store, "sampling": At(3, 3, 2)}
    data = module(root, augmentation=chain(placement=place), **options)
    for batch in data.train_dataloader():
        assert torch.equal(batch["twin"], batch["label"])
        assert batch["place"].dtype == torch.int32
        index = batch["place"] - 70000 - 1
        assert (index >= 0).all()
        for b, case_id in enumerate(batch["case"]):
            label = whole(data, case_id)["label"].flatten()
            assert torch.equal(batch["label"][b], label[index[b].long()])
            coordinates = np.stack(np.unravel_index(index[b, 0].numpy(), CROPPED))
            assert np.abs(coordinates.reshape(3, -1).mean(1) - [5.5, 5, 3.5]).max() < 0.6  # turned about the same center
        assert torch.allclose(batch["soft"], (index + 1) / 8, atol=CROPPED[1] * CROPPED[2] / 8)


def test_outside_the_volume_is_background(root, store):
    place = RandomPlacement(degrees=0, scales=(2, 2), p_rotation=0, p_scaling=1, mirror_axes=())
    data = module(
        root, patch=CROPPED, augmentation=chain(placement=place), extra_maps={"place": "nearest"}, maps=store, sampling=At(0, 0, 0)
    )
    sample = dataset(data)[(0, 0)]
    border = torch.ones(CROPPED, dtype=torch.bool)
    border[3:9, 2:8, 2:6] = False
    assert not sample["place"][0][border].any()
    assert not sample["label"][0][border].any()
    assert not sample["brain_mask"][0][border].any()


@pytest.mark.parametrize("view", ["patch", "slice", "slab"])
def test_placements_depend_on_seed_and_position_alone(root, view):
    both = [module(root, view=view, augmentation=chain(placement=RandomPlacement(p_rotation=1)), num_workers=n) for n in (0, 2)]
    for one, other in zip(*(list(d.train_dataloader()) for d in both), strict=True):
        assert_same(one, other)
    plain = next(iter(module(root, view=view).train_dataloader()))
    first = next(iter(both[0].train_dataloader()))
    assert first["case"] == plain["case"]
    assert first["image"].shape == plain["image"].shape
    assert not torch.equal(first["image"], plain["image"])


# intensities


def applied(transform, values: torch.Tensor, mask: torch.Tensor | None = None, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    maps = {} if mask is None else {"brain_mask": torchio.LabelMap(tensor=mask)}
    subject = torchio.Subject(image=torchio.ScalarImage(tensor=values.clone()), soft=torchio.ScalarImage(tensor=values.clone()), **maps)
    result = chain(only=transform)(subject)
    assert torch.equal(result["soft"].data, values)  # maps that go with the image keep their values
    return result["image"].data


def test_brightness_multiplies_each_channel_by_its_own_factor():
    values = cube(4, 4, 4) + 1
    ratio = applied(intensity.RandomBrightness(), values) / values
    assert torch.allclose(ratio, ratio[:, :1, :1, :1].expand_as(ratio))
    assert ratio[0, 0, 0, 0] != ratio[1, 0, 0, 0]
    factors = [float(applied(intensity.RandomBrightness(), torch.ones(1, 1, 1, 1), seed=s)) for s in range(400)]
    assert 0.75 <= min(factors) < 0.77
    assert 1.23 < max(factors) <= 1.25
    assert sum(f < 1 for f in factors) / 400 == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(("low", "high"), [(0.5, 1.0), (0.5, 0.9), (1.0, 1.5), (1.1, 1.5)])
def test_factors_of_a_range_on_one_side_of_1_are_uniform_in_it(low, high):
    transform = intensity.RandomBrightness(factors=(low, high))
    factors = sorted(float(applied(transform, torch.ones(1, 1, 1, 1), seed=s)) for s in range(200))
    assert low <= factors[0] <= factors[-1] <= high
    assert factors[100] == pytest.approx((low + high) / 2, abs=0.1 * (high - low) + 0.01)


def test_additive_brightness_shifts_each_channel_by_a_normal_number():
    values = cube(4, 4, 4)
    shift = applied(intensity.RandomAdditiveBrightness(), values) - values
    assert torch.allclose(shift, shift[:, :1, :1, :1].expand_as(shift), atol=1e-6)
    assert shift[0, 0, 0, 0] != shift[1, 0, 0, 0]
    shifts = torch.stack([applied(intensity.RandomAdditiveBrightness(std=0.2), torch.ones(1, 1, 1, 1), seed=s) - 1 for s in range(400)])
    assert abs(float(shifts.mean())) < 0.03
    assert float(shifts.std()) == pytest.approx(0.2, abs=0.02)


def test_factors_on_one_side_of_one():
    torch.manual_seed(0)
    assert all(1.2 <= intensity._around_one(1.2, 1.4) <= 1.4 for _ in range(50))
    assert all(0.5 <= intensity._around_one(0.5, 1.0) <= 1.0 for _ in range(50))


def test_contrast_stretches_about_the_mean_within_the_range():
    values = torch.tensor([0.0, 4.0, 6.0, 10.0]).reshape(1, 4, 1, 1)
    assert applied(intensity.RandomContrast(factors=(1.2, 1.2)), values).flatten().tolist() == pytest.approx([0, 3.8, 6.2, 10])
    assert applied(intensity.RandomContrast(factors=(0.5, 0.5)), values).flatten().tolist() == pytest.approx([2.5, 4.5, 5.5, 7.5])


@pytest.mark.parametrize("invert", [False, True])
def test_gamma_by_hand_and_with_its_moments_kept(invert):
    values = torch.tensor([1.0, 2.0, 3.0, 5.0]).reshape(1, 4, 1, 1)
    result = applied(intensity.RandomPower(gamma=(2.0, 2.0), invert=invert), values).flatten()
    x = -values.flatten() if invert else values.flatten()
    bent = ((x - x.min()) / 4) ** 2
    expected = (bent - bent.mean()) / bent.std(correction=0) * x.std(correction=0) + x.mean()
    assert torch.allclose(result, -expected if invert else expected, atol=1e-5)
    assert torch.allclose(torch.stack([result.mean(), result.std()]), torch.stack([values.mean(), values.std()]), atol=1e-5)
    constant = torch.full((1, 3, 3, 3), 2.0)
    assert torch.allclose(applied(intensity.RandomPower(), constant), constant)


def test_low_resolution_of_half_shows_pairs():
    values = torch.arange(8.0).reshape(1, 8, 1, 1)
    result = applied(intensity.RandomLowResolution(zoom=(0.5, 0.5)), values)
    assert result.flatten().tolist() == pytest.approx([1, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7])  # between the samples 1, 3, 5, 7
    assert torch.equal(applied(intensity.RandomLowResolution(zoom=(1.0, 1.0)), values), values)


def test_blur_is_gaussian_and_leaves_thin_axes():
    values = cube(9, 8, 1)
    result = applied(intensity.RandomChannelBlur(std=(0.7, 0.7)), values)
    assert np.allclose(result[1], gaussian_filter(values[1].numpy(), (0.7, 0.7, 0), truncate=6), atol=1e-6)


@pytest.mark.parametrize(
    "name", ["RandomChannelBlur", "RandomBrightness", "RandomAdditiveBrightness", "RandomContrast", "RandomLowResolution", "RandomPower"]
)
def test_channels_are_chosen_one_by_one(name):
    values = cube(6, 6, 6)
    changed = torch.tensor([[bool((a != b).any()) for a, b in zip(applied(getattr(intensity, name)(p_channel=0.5), values, seed=s), values, strict=True)] for s in range(60)])  # fmt: skip
    assert changed.float().mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.2)
    assert (changed[:, 0] != changed[:, 1]).any()
    assert torch.equal(applied(getattr(intensity, name)(p=0), values), values)


def test_background_is_set_outside_the_mask():
    values, mask = cube(3, 3, 3) + 1, torch.zeros(1, 3, 3, 3, dtype=torch.int16)
    mask[0, 1] = 1
    result = applied(intensity.MaskBackground(value=-1.0), values, mask)
    assert torch.equal(result[:, 1], values[:, 1])
    assert (result[:, [0, 2]] == -1).all()


def preset(name: str):
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    return instantiate(OmegaConf.load(f"conf/augmentation/{name}.yaml"))


PRESETS = {  # degrees, scales, (rotation, scaling, elongation, elastic), noise p, blur, brightness, additive (p, p_channel), contrast, gamma
    "nnunet": (30, (0.7, 1.4), (0.2, 0.2, 0, 0), 0.1, (0.5, 1.0), (0.75, 1.25), None, (0.75, 1.25), (0.7, 1.5)),
    "nnunet_da3": (30, (0.65, 1.6), (0.3, 0.3, 0.3, 0.3), 0.15, (0.5, 1.5), (0.7, 1.3), (0.3, 1.0), (0.65, 1.5), (0.5, 1.6)),
    "nnunet_da4": (90, (0.65, 1.6), (0.3, 0.3, 0.3, 0.2), 0.15, (0.5, 1.5), (0.7, 1.3), (0.3, 0.5), (0.65, 1.5), (0.5, 1.6)),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_values_of_nnunet(name):
    degrees, scales, chances, noise, blur, brightness, additive, contrast, gamma = PRESETS[name]
    augmentation = preset(name)
    place = augmentation.placement
    assert (place.degrees, place.scales, place.mirror_axes) == (degrees, scales, (0, 1, 2))
    assert (place.p_rotation, place.p_scaling, place.elongation, place.p_elastic) == chances
    assert place.deformation == (0, 0.25)
    found = list(augmentation.transforms)
    kinds = [type(t).__name__ for t in found]
    middle = ["RandomAdditiveBrightness"] if additive else []
    assert kinds == ["RandomNoise", "RandomChannelBlur", "RandomBrightness", *middle, "RandomContrast", "RandomLowResolution", "RandomPower", "RandomPower", "MaskBackground"]  # fmt: skip
    one = dict(zip(kinds, found, strict=True))
    assert (one["RandomNoise"].probability, one["RandomNoise"].std_range) == (noise, (0, 0.1))
    assert (one["RandomChannelBlur"].probability, one["RandomChannelBlur"].p_channel, one["RandomChannelBlur"].std) == (0.2, 0.5, blur)
    assert (one["RandomBrightness"].probability, one["RandomBrightness"].factors) == (0.15, brightness)
    assert (one["RandomContrast"].probability, one["RandomContrast"].factors) == (0.15, contrast)
    low = one["RandomLowResolution"]
    assert (low.probability, low.p_channel, low.zoom) == (0.25, 0.5, (0.5, 1.0))
    assert [(t.invert, t.probability, t.gamma) for t in found if type(t).__name__ == "RandomPower"] == [(True, 0.1, gamma), (False, 0.3, gamma)]  # fmt: skip
    if additive:
        shift = one["RandomAdditiveBrightness"]
        assert (shift.probability, shift.p_channel, shift.std) == (*additive, 0.2)


@pytest.mark.parametrize("name", PRESETS)
def test_the_whole_chain_runs_on_every_view(root, name):
    augmentation = preset(name)
    for transform in augmentation.transforms:
        transform.probability = 1.0
    for view, patch in [("patch", (6, 5, 4)), ("slice", (6, 5)), ("slab", (6, 5)), ("voxels", None)]:
        data = module(root, view=view, patch=patch, augmentation=augmentation, preprocessing=Preprocessing(crop="none"))
        for batch in data.train_dataloader():
            assert torch.isfinite(batch["image"]).all()
            outside = ~batch["brain_mask"]
            if view in ("patch", "slice"):
                assert (batch["image"].masked_select(outside) == 0).all()


# quarter turns


def test_quarter_turns_are_exact_and_take_the_label_along():
    turn = RandomQuarterTurns(axes=(0, 1))
    image = torch.arange(2 * 4 * 4 * 3, dtype=torch.float32).reshape(2, 4, 4, 3)
    label = (image[:1] % 5 == 0).to(torch.int16)
    seen = set()
    for seed in range(24):
        torch.manual_seed(seed)
        subject = turn(torchio.Subject(image=torchio.ScalarImage(tensor=image), label=torchio.LabelMap(tensor=label)))
        (k,) = [k for k in range(4) if torch.equal(subject["image"].data, torch.rot90(image, k, (1, 2)))]
        assert torch.equal(subject["label"].data, torch.rot90(label, k, (1, 2)))
        seen.add(k)
    assert seen == {0, 1, 2, 3}


def test_quarter_turns_keep_the_shape_of_oblong_samples():
    image = torch.arange(4 * 6 * 3, dtype=torch.float32).reshape(1, 4, 6, 3)
    results = []
    for seed in range(16):
        torch.manual_seed(seed)
        results.append(RandomQuarterTurns()(torchio.Subject(image=torchio.ScalarImage(tensor=image)))["image"].data)
    assert all(any(torch.equal(r, torch.rot90(image, k, (1, 2))) for k in (0, 2)) for r in results)
    assert len({float(r.flatten()[0]) for r in results}) == 2
    with pytest.raises(SuiteError, match=r"axes=\[0, 3\]"):
        RandomQuarterTurns(axes=(0, 3))


# crops of a share of the area


def test_an_area_crop_keeps_the_share_and_the_place():
    """A ramp along each axis tells which box was cut: its extent is the side, and image and maps show the same one."""
    torch.manual_seed(0)
    ramps = torch.meshgrid(torch.arange(64.0), torch.arange(48.0), torch.arange(2.0), indexing="ij")
    subject = torchio.Subject(image=torchio.ScalarImage(tensor=torch.stack(ramps)), label=torchio.LabelMap(tensor=torch.stack(ramps[:2])))
    areas, starts = [], []
    for _ in range(60):
        after = RandomAreaCrop((0.85, 0.95))(subject)
        image, label = after.image.data, after.label.data
        assert after.spatial_shape == (64, 48, 2)
        assert torch.allclose(image[2], ramps[2], atol=1e-5)  # the third axis stays
        sides = [(image[a].amax() - image[a].amin() + 1) / n for a, n in ((0, 64), (1, 48))]
        areas.append(float(sides[0] * sides[1]))
        starts.append(float(image[0].amin()))
        assert (label - image[:2]).abs().max() <= 1
        assert torch.equal(label, label.round())
    assert 0.82 < min(areas) < 0.87
    assert 0.93 < max(areas) < 0.97
    assert min(starts) == 0
    assert max(starts) > 3


def test_shares_of_an_area_crop_are_judged():
    for area in ((0.9, 0.8), (0.0, 0.5), (0.5, 1.5)):
        with pytest.raises(SuiteError, match="share"):
            RandomAreaCrop(area)
