"""Tasks narrow and merge consistently, labels survive every target's round trip, and disk values survive reading and writing."""

import json
import re
from itertools import product

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from lesionbench.errors import SuiteError
from lesionbench.geometry import read_volume, write_volume
from lesionbench.target import ClassSoftmax, RegionSigmoid, atoms, nesting
from lesionbench.task import IGNORE, Task
from lightning_modules.raters.rater_targets import AgreementClasses, AtLeast

BRATS = Task(
    ("t1", "t1ce", "t2", "flair"),
    {"background": 0, "ncr": 1, "ed": 2, "et": (4, 3)},
    {"WT": ("ncr", "ed", "et"), "TC": ("ncr", "et"), "ET": ("et",)},
    ignore=(9,),
)
TISSUE = Task(("t1",), {"background": 0, "csf": 10, "gm": 150, "wm": 250})
MIXED = Task(  # two trees side by side, the first filled completely by its inner regions
    ("ct",),
    {"background": 0, "core": 1, "rim": 2, "vessel": 3, "clot": 5},
    {"LESION": ("core", "rim"), "CORE": ("core",), "RIM": ("rim",), "VESSEL": ("vessel", "clot"), "CLOT": ("clot",)},
)
TASKS = {"brats": BRATS, "tissue": TISSUE, "mixed": MIXED}


def every_label(task: Task) -> torch.Tensor:
    """(1, 1, C, 2, 1): every class twice."""
    return torch.arange(len(task.classes)).repeat_interleave(2).reshape(1, 1, -1, 2, 1)


def logits_for(target, label: torch.Tensor, strength: float = 20.0) -> torch.Tensor:
    """Confident logits of a network that knows the answer."""
    encoded = target.encode(label)
    if isinstance(target, ClassSoftmax):
        encoded = torch.nn.functional.one_hot(encoded[:, 0], target.out_channels).movedim(-1, 1)
    return (encoded.float() * 2 - 1) * strength


# task


def test_region_masks_of_every_class_by_hand():
    masks = BRATS.region_masks(torch.tensor([[0, 1, 2, 3, IGNORE]]))
    expected = [[0, 1, 1, 1, 0], [0, 1, 0, 1, 0], [0, 0, 0, 1, 0]]
    assert masks.dtype == torch.bool
    assert masks.tolist() == [[[bool(v) for v in row]] for row in expected]


def test_regions_default_to_the_foreground_classes():
    assert TISSUE.regions == {"csf": ("csf",), "gm": ("gm",), "wm": ("wm",)}
    assert TISSUE.region_matrix.tolist() == [[False, True, False, False], [False, False, True, False], [False, False, False, True]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": {"lesion": 1, "background": 0}}, "must begin with 'background: 0'"),
        ({"classes": {"background": 1, "lesion": 0}}, "must begin with 'background: 0'"),
        ({"classes": {}}, "must begin with 'background: 0'"),
        ({"classes": {"background": 0, "a": 1, "b": (2, 1)}}, "belongs to two classes"),
        ({"ignore": (1,)}, "belongs to two classes"),
        ({"regions": {"X": ("lesoin",)}}, "did you mean 'lesion'"),
        ({"regions": {"X": ()}}, "task.regions.X"),
        ({"regions": {"X": ("background", "lesion")}}, "task.regions.X"),
        ({"classes": {"background": 0, "a": 1, "b": 2, "c": 3}, "regions": {"X": ("a", "b"), "Y": ("b", "c")}}, "X and Y overlap"),
        ({"unit": "cm"}, "Unknown task.unit 'cm'"),
    ],
)
def test_impossible_tasks_are_refused(changes, message):
    with pytest.raises(SuiteError, match=message):
        Task(**{"channels": ("t1",), "classes": {"background": 0, "lesion": 1}, **changes})


def test_disk_values_round_trip():
    disk = np.array([[0, 1, 2, 4, 3, 9]], dtype=np.int16)
    labels = BRATS.from_disk(disk)
    assert labels.dtype == np.int8
    assert labels.tolist() == [[0, 1, 2, 3, 3, IGNORE]]
    back = BRATS.to_disk(labels)
    assert back.dtype == np.uint8
    assert back.tolist() == [[0, 1, 2, 4, 4, 0]]  # the first value of a class is the one written; ignored voxels become background
    assert np.array_equal(BRATS.from_disk(disk.astype(np.float32)), labels)


def test_large_and_negative_disk_values_keep_their_value():
    task = Task(("ct",), {"background": 0, "a": -3, "b": 1000})
    written = task.to_disk(np.array([0, 1, 2], np.int8))
    assert written.tolist() == [0, -3, 1000]
    assert task.from_disk(written).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("value", "kind"),
    [(255, "uint8"), (256, "int16"), (32767, "int16"), (40000, "uint16"), (70000, "int32"), (-40000, "int32"), (2**24 + 1, "int32")],
)
def test_label_values_survive_a_file_in_the_smallest_type_that_holds_them(value, kind, tmp_path):
    task = Task(("t1",), {"background": 0, "a": value})
    written = task.to_disk(np.array([[[0, 1]]], np.int8))
    assert written.dtype == kind
    path = write_volume(tmp_path / "label.nii.gz", written, np.eye(4))
    assert nib.load(path).get_data_dtype() == kind
    assert sitk.GetArrayFromImage(sitk.ReadImage(str(path))).ravel().tolist() == [0, value]
    assert task.from_disk(read_volume(path)[0]).ravel().tolist() == [0, 1]


@pytest.mark.parametrize(("strange", "named"), [(7, "7"), (1.5, "1.5"), (-1, "-1"), (np.nan, "nan")])
def test_unknown_disk_values_are_named(strange, named):
    with pytest.raises(SuiteError, match=rf"\[{named}\].*ncr"):
        BRATS.from_disk(np.array([0, 1, strange]))


def test_task_survives_json():
    for task in TASKS.values():
        assert Task.from_dict(json.loads(json.dumps(task.to_dict()))) == task


def test_narrowing_to_one_region_merges_classes_and_their_disk_values():
    narrow = BRATS.narrowed(regions=["WT"])
    assert narrow.class_names == ("background", "ncr+ed+et")
    assert narrow.classes["ncr+ed+et"] == (1, 2, 4, 3)
    assert narrow.regions == {"WT": ("ncr+ed+et",)}
    assert narrow.from_disk(np.array([0, 1, 2, 3, 4, 9])).tolist() == [0, 1, 1, 1, 1, IGNORE]


def test_narrowing_to_an_inner_region_makes_the_rest_background():
    narrow = BRATS.narrowed(regions=["ET"])
    assert narrow.classes == {"background": (0, 1, 2), "et": (4, 3)}
    assert narrow.to_disk(narrow.from_disk(np.array([2, 1, 3]))).tolist() == [0, 0, 4]


def test_narrowing_keeps_order_whatever_the_order_asked_for():
    narrow = BRATS.narrowed(regions=["TC", "WT"])
    assert narrow.region_names == ("WT", "TC")
    assert narrow.class_names == ("background", "ncr+et", "ed")
    assert narrow.regions == {"WT": ("ncr+et", "ed"), "TC": ("ncr+et",)}
    assert BRATS.narrowed(channels=["flair", "t1"]).channels == ("flair", "t1")  # channels: as asked, that is the image's order


@pytest.mark.parametrize("name", TASKS)
def test_narrowing_leaves_the_masks_of_the_kept_regions_as_they_were(name):
    task = TASKS[name]
    disk = np.array([v for values in task.classes.values() for v in values])
    whole = dict(zip(task.region_names, task.region_masks(torch.from_numpy(task.from_disk(disk))), strict=True))
    for chosen in product([False, True], repeat=len(task.regions)):
        kept = [r for r, keep in zip(task.region_names, chosen, strict=True) if keep]
        if kept:
            narrow = task.narrowed(regions=kept)
            masks = narrow.region_masks(torch.from_numpy(narrow.from_disk(disk)))
            assert narrow.region_names == tuple(kept)
            assert all(torch.equal(mask, whole[r]) for r, mask in zip(kept, masks, strict=True))
            assert narrow.narrowed(regions=kept) == narrow
            atoms(narrow)  # a narrowed task tells its classes apart


def test_narrowing_to_unknown_names_says_what_exists():
    with pytest.raises(SuiteError, match="did you mean 'flair'"):
        BRATS.narrowed(channels=["flare"])
    with pytest.raises(SuiteError, match="Known: ET, TC, WT"):
        BRATS.narrowed(regions=["whole"])
    assert BRATS.narrowed() == BRATS


# targets


@pytest.mark.parametrize("kind", [ClassSoftmax, RegionSigmoid])
@pytest.mark.parametrize("name", TASKS)
def test_labels_survive_encode_activate_decode(kind, name):
    task = TASKS[name]
    target, label = kind(task), every_label(task)
    logits = logits_for(target, label)
    assert logits.shape[1] == target.out_channels
    regions = target.decode(target.activate(logits))
    assert regions.shape == (1, len(task.regions), *label.shape[2:])
    assert torch.equal(regions[0] > 0.5, task.region_masks(label[0, 0]))
    decoded = target.labels(regions)
    assert decoded.dtype == torch.int8
    assert torch.equal(decoded, label[:, 0].to(torch.int8))


@pytest.mark.parametrize("name", TASKS)
def test_softmax_labels_are_the_largest_class_whatever_the_logits(name):
    task = TASKS[name]
    target = ClassSoftmax(task)
    logits = torch.randn(2, len(task.classes), 6, 5, 4, generator=torch.Generator().manual_seed(0))
    regions = target.decode(target.activate(logits))
    assert torch.equal(target.labels(regions), logits.argmax(dim=1).to(torch.int8))


def test_softmax_region_probability_is_the_sum_over_its_classes():
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4]).reshape(1, 4, 1)
    target = ClassSoftmax(BRATS)
    regions = target.decode(target.activate(probabilities.log()))
    assert regions.flatten().tolist() == pytest.approx([0.9, 0.6, 0.4])


def test_softmax_ties_go_to_the_class_named_first():
    target = ClassSoftmax(TISSUE)
    half, quarter = 0.5, 0.25
    maps = torch.tensor([[half, half, 0, 0], [0, half, half, 0], [0, 0, half, half], [quarter] * 4]).T[None]
    assert target.labels(target.decode(maps)).tolist() == [[0, 1, 2, 0]]


def test_sigmoid_at_the_threshold_is_outside():
    regions = torch.tensor([[0.5, 0.5, 0.5], [0.51, 0.5, 0.5], [0.51, 0.51, 0.5], [0.51, 0.51, 0.51]]).T[None]
    assert RegionSigmoid(BRATS).labels(regions).tolist() == [[0, 2, 1, 3]]
    assert RegionSigmoid(BRATS, threshold=0.505).labels(regions - 0.01).tolist() == [[0, 0, 0, 0]]


def test_sigmoid_inner_regions_count_only_inside_their_holders():
    regions = torch.tensor([[0.1, 0.9, 0.9], [0.9, 0.1, 0.9], [0.1, 0.1, 0.9], [0.9, 0.9, 0.1]]).T[None]
    assert RegionSigmoid(BRATS).labels(regions).tolist() == [[0, 2, 0, 1]]


def test_sigmoid_siblings_go_to_the_more_probable():
    task = Task(("t1",), {"background": 0, "left": 1, "right": 2, "inner": 3}, {"L": ["left", "inner"], "R": ["right"], "I": ["inner"]})
    regions = torch.tensor([[0.6, 0.9, 0.1], [0.9, 0.6, 0.1], [0.7, 0.6, 0.9], [0.6, 0.7, 0.9], [0.4, 0.6, 0.1]]).T[None]
    assert RegionSigmoid(task).labels(regions).tolist() == [[2, 1, 3, 2, 2]]


HI, LO = 0.9, 0.1
VOTES = torch.tensor([[w, t, e] for e in (LO, HI) for t in (LO, HI) for w in (LO, HI)]).T[None]  # WT fastest: 000 100 010 110 001 ...


@pytest.mark.parametrize(
    ("decoding", "expected"),
    # classes: 0 background, 1 core, 2 edema, 3 enhancing
    [("nested", [0, 2, 0, 1, 0, 2, 0, 3]), ("paint", [0, 2, 1, 1, 3, 3, 3, 3]), ("supported", [0, 2, 1, 1, 0, 3, 3, 3])],
)
def test_each_decoding_by_hand_on_all_eight_answers(decoding, expected):
    assert RegionSigmoid(BRATS, decoding=decoding).labels(VOTES).tolist() == [expected]
    consistent = VOTES[..., [0, 1, 3, 7]]  # where regions nest, all agree
    assert RegionSigmoid(BRATS, decoding=decoding).labels(consistent).tolist() == [[0, 2, 1, 3]]


def test_supported_asks_only_of_regions_that_hold_no_other():
    two = Task(("t1",), {"background": 0, "rim": 1, "core": 2}, {"WT": ["rim", "core"], "C": ["core"]})
    alone = torch.tensor([0.1, 0.9]).reshape(1, 2, 1)
    assert [int(RegionSigmoid(two, decoding=d).labels(alone)) for d in ("nested", "paint", "supported")] == [0, 2, 0]
    apart = Task(("t1",), {"background": 0, "a": 1, "b": 2}, {"A": ["a"], "B": ["b"]})
    assert int(RegionSigmoid(apart, decoding="supported").labels(alone)) == 2  # nothing is around it that could be asked


def test_thresholds_of_regions():
    target = RegionSigmoid(BRATS, threshold={"ET": 0.7, "WT": 0.3})
    assert target.thresholds == (0.3, 0.5, 0.7)
    regions = torch.tensor([[0.35, 0.6, 0.65], [0.35, 0.45, 0.9], [0.25, 0.6, 0.9], [0.35, 0.6, 0.75]]).T[None]
    assert target.labels(regions).tolist() == [[1, 2, 0, 3]]
    assert torch.equal(
        RegionSigmoid(BRATS, threshold=0.4).labels(regions), RegionSigmoid(BRATS, {"WT": 0.4, "TC": 0.4, "ET": 0.4}).labels(regions)
    )


def test_a_sibling_below_its_own_threshold_is_no_rival():
    task = Task(("t1",), {"background": 0, "left": 1, "right": 2}, {"L": ["left"], "R": ["right"]})
    regions = torch.tensor([0.6, 0.7]).reshape(1, 2, 1)
    assert int(RegionSigmoid(task).labels(regions)) == 2
    assert int(RegionSigmoid(task, threshold={"R": 0.8}).labels(regions)) == 1


def test_a_background_channel_is_learned_and_left_out_of_the_answer():
    target = RegionSigmoid(BRATS, background=True)
    assert target.out_channels == 4
    label = torch.tensor([0, 2, 1, 3, -1]).reshape(1, 1, 5)
    encoded = target.encode(label)
    assert encoded[0].tolist() == [[0, 1, 1, 1, -1], [0, 0, 1, 1, -1], [0, 0, 0, 1, -1], [1, 0, 0, 0, -1]]
    maps, valid = target.as_maps(encoded)
    assert maps.shape == (1, 4, 5)
    assert valid[0, 3].tolist() == [1, 1, 1, 1, 0]
    regions = target.decode(maps)
    assert torch.equal(regions, RegionSigmoid(BRATS).decode(maps[:, :3]))
    assert target.labels(regions)[0, :4].tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0}, "threshold=0 "),
        ({"threshold": {"ET": 1.5}}, "threshold=1.5 (of ET)"),
        ({"threshold": {"et": 0.5}}, "Known: ET, TC, WT"),
        ({"decoding": "painted"}, "did you mean 'paint'"),
    ],
)
def test_what_a_region_target_refuses(options, message):
    with pytest.raises(SuiteError, match=re.escape(message)):
        RegionSigmoid(BRATS, **options)


def test_targets_that_make_the_same_labels_say_so():
    plain = RegionSigmoid(BRATS)
    assert plain.labeling == RegionSigmoid(BRATS, threshold={"WT": 0.5}, background=True).labeling
    different = [RegionSigmoid(BRATS, 0.4), RegionSigmoid(BRATS, decoding="paint"), ClassSoftmax(BRATS)]
    assert len({t.labeling for t in (plain, *different)}) == 4


def test_sigmoid_order_of_regions_does_not_matter():
    shuffled = Task(BRATS.channels, BRATS.classes, {r: BRATS.regions[r] for r in ("ET", "WT", "TC")}, ignore=BRATS.ignore)
    regions = torch.rand(1, 3, 50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(RegionSigmoid(BRATS).labels(regions), RegionSigmoid(shuffled).labels(regions[:, [2, 0, 1]]))


def test_a_region_filled_by_its_inner_regions_falls_back_to_its_first_class():
    regions = torch.tensor([0.9, 0.1, 0.1, 0.1, 0.1]).reshape(1, 5, 1)
    assert RegionSigmoid(MIXED).labels(regions).tolist() == [[1]]
    assert nesting(BRATS) == [(0, None, 2), (1, 0, 1), (2, 1, 3)]


def test_ignored_voxels_stay_ignored_in_every_target():
    label = torch.tensor([0, 3, IGNORE]).reshape(1, 1, 3)
    assert ClassSoftmax(BRATS).encode(label).tolist() == [[[0, 3, IGNORE]]]
    encoded = RegionSigmoid(BRATS).encode(label)
    assert encoded.shape == (1, 3, 3)
    assert encoded[0].tolist() == [[0, 1, -1], [0, 1, -1], [0, 1, -1]]


def test_softmax_needs_regions_that_tell_classes_apart():
    vague = Task(("t1",), {"background": 0, "a": 1, "b": 2}, {"ALL": ("a", "b")})
    with pytest.raises(SuiteError, match="tell every class apart"):
        ClassSoftmax(vague)
    assert ClassSoftmax(vague.narrowed(regions=["ALL"])).out_channels == 2
    assert RegionSigmoid(vague).out_channels == 1


def test_activation_is_float32_under_autocast_and_differentiable():
    for kind in (ClassSoftmax, RegionSigmoid):
        logits = torch.zeros(1, kind(BRATS).out_channels, 2, dtype=torch.bfloat16, requires_grad=True)
        maps = kind(BRATS).activate(logits)
        assert maps.dtype == torch.float32
        maps[:, 0].sum().backward()
        assert logits.grad.abs().sum() > 0


def test_hard_answers_and_maps_have_the_form_of_the_kind():
    logits = torch.tensor([[0.5, -1.0], [2.0, -0.5], [-3.0, 0.0], [1.0, -2.0]])[None]  # (1, K=4, 2 voxels)
    classes, regions = ClassSoftmax(BRATS), RegionSigmoid(BRATS)
    assert classes.harden(logits).tolist() == [[[1, 2]]]
    assert regions.harden(logits[:, :3]).tolist() == [[[1, 0], [1, 0], [0, 0]]]
    label = torch.tensor([3, IGNORE]).reshape(1, 1, 2)
    maps, valid = classes.as_maps(classes.encode(label))
    assert maps[..., 0].tolist() == [[0, 0, 0, 1]]
    assert valid.tolist() == [[[1, 0]]]
    maps, valid = regions.as_maps(regions.encode(label))
    assert maps.tolist() == [[[1, 0], [1, 0], [1, 0]]]
    assert valid[0].tolist() == [[1, 0]] * 3
    for target, encoded in ((classes, classes.encode(label)), (regions, regions.encode(label))):
        assert target.harden(logits[:, : target.out_channels]).shape == encoded.shape


def test_rater_targets_answer_by_their_kind_too():
    task = Task(("t1",), {"background": 0, "lesion": 1}, {"L": ["lesion"]}, raters=3)
    levels, most = AgreementClasses(task), AtLeast(task, level="majority")
    assert levels.harden(torch.tensor([0.0, 3.0, 1.0, 2.0]).reshape(1, 4, 1)).tolist() == [[[1]]]
    assert levels.as_maps(torch.tensor([[[2]]]))[0].flatten().tolist() == [0, 0, 1, 0]
    assert most.harden(torch.tensor([[[0.1]]])).tolist() == [[[1]]]
    assert most.as_maps(torch.tensor([[[0.25]]]))[0].tolist() == [[[0.25]]]


def test_a_target_of_a_third_kind_says_what_it_must_define():
    class Distances(RegionSigmoid):
        kind = "distance"

    with pytest.raises(TypeError, match=r"Distances of kind 'distance' must define harden\(\)"):
        Distances(BRATS).harden(torch.zeros(1, 3, 2))
    with pytest.raises(TypeError, match=r"must define as_maps\(\)"):
        Distances(BRATS).as_maps(torch.zeros(1, 3, 2))


def test_the_slice_axis_is_an_option_of_the_task():
    coronal = BRATS.narrowed(slice_axis=1)
    assert (BRATS.slice_axis, coronal.slice_axis, BRATS.narrowed().slice_axis) == (2, 1, 2)
    assert coronal.to_dict() == {**BRATS.to_dict(), "slice_axis": 1}
    both = BRATS.narrowed(channels=["t1"], regions=["WT"], inputs=["map"], slice_axis=0)
    assert both == BRATS.narrowed(channels=["t1"], regions=["WT"], inputs=["map"]).narrowed(slice_axis=0)
    with pytest.raises(SuiteError, match="slice_axis=3"):
        BRATS.narrowed(slice_axis=3)
