"""Who is trained on and where samples are cut: patients stay together, seeds do not leak, every policy keeps its promised shares."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from datamodules.sampling import Sampling
from datamodules.split import Split
from lesionbench.case import Case
from lesionbench.errors import SuiteError
from lesionbench.keyed import key, numpy_generator, torch_generator, torch_seeded

PARTS = ("train", "val", "test")


def cases(patients: int = 20, visits: int = 2) -> list[Case]:
    """Every patient `visits` times; ids do not tell whose they are."""
    return [Case(id=f"c{(7 * n) % (patients * visits):03d}", images={}, patient=f"p{n % patients}") for n in range(patients * visits)]


def ids(part: list[Case]) -> set[str]:
    return {c.id for c in part}


def patients(part: list[Case]) -> set[str]:
    return {c.patient for c in part}


# split


@pytest.mark.parametrize(
    "split", [Split(), Split(seed=3, test=5, val=4), Split(folds=4, fold=2), Split(test=0.5, val=0, labeled=3), Split(test=0)]
)
def test_parts_are_disjoint_by_patient_and_complete(split):
    found = cases()
    parts = split.divide(found)
    assert sum(len(parts[p]) for p in PARTS) == len(found)
    assert ids(parts["train"]) | ids(parts["val"]) | ids(parts["test"]) == ids(found)
    for a, b in [("train", "val"), ("train", "test"), ("val", "test"), ("labeled", "unlabeled")]:
        assert not patients(parts[a]) & patients(parts[b])
    assert parts["labeled"] + parts["unlabeled"] == parts["train"]


def test_shares_and_numbers_count_patients():
    parts = Split(test=0.2, val=0.1).divide(cases())
    assert [len(patients(parts[p])) for p in PARTS] == [14, 2, 4]
    parts = Split(test=3, val=1).divide(cases())
    assert [len(patients(parts[p])) for p in PARTS] == [16, 1, 3]
    assert [len(Split(test=0.01, val=0.01).divide(cases(5, 1))[p]) for p in PARTS] == [3, 1, 1]  # a share is at least one patient


def test_a_split_depends_on_its_seed_and_on_nothing_else():
    first = Split(seed=1).divide(cases())
    np.random.seed(5)
    torch.manual_seed(5)
    again = Split(seed=1).divide(list(reversed(cases())))
    assert all(ids(again[p]) == ids(first[p]) for p in first)
    assert any(ids(Split(seed=s).divide(cases())["test"]) != ids(first["test"]) for s in (2, 3))


def test_folds_partition_the_patients():
    folds = [Split(folds=5, fold=f).divide(cases(23)) for f in range(5)]
    tested = [c.id for parts in folds for c in parts["test"]]
    assert len(tested) == len(set(tested)) == len(cases(23))
    assert {len(patients(parts["test"])) for parts in folds} == {4, 5}
    assert all(parts["val"] and not patients(parts["val"]) & patients(parts["test"]) for parts in folds)


def test_labeled_sets_are_nested_and_leave_the_other_parts_alone():
    parts = {n: Split(labeled=n).divide(cases()) for n in (0, 1, 4, 8, 14)}
    for small, large in [(0, 1), (1, 4), (4, 8), (8, 14)]:
        assert ids(parts[small]["labeled"]) < ids(parts[large]["labeled"])
        assert ids(parts[small]["test"]) == ids(parts[large]["test"])
    assert len(patients(parts[4]["labeled"])) == 4
    assert parts[14]["unlabeled"] == []
    assert Split().divide(cases())["labeled"] == Split().divide(cases())["train"]


def test_fewer_training_patients_are_the_first_ones():
    whole, few = Split().divide(cases()), Split(train=5).divide(cases())
    assert few["train"] == whole["train"][: len(few["train"])]
    assert len(patients(few["train"])) == 5
    assert ids(few["test"]) == ids(whole["test"])


def test_inner_folds_divide_the_training_patients_and_leave_the_other_parts_alone():
    whole = Split(seed=2, test=4, val=3).divide(cases())
    left_out = []
    for fold in range(3):
        parts = Split(seed=2, test=4, val=3, inner_folds=3, inner_fold=fold).divide(cases())
        assert (parts["test"], parts["val"]) == (whole["test"], whole["val"])
        assert parts["labeled"] == parts["train"]
        left_out.append(patients(whole["train"]) - patients(parts["train"]))
        assert patients(parts["train"]) < patients(whole["train"])
    assert sorted(map(len, left_out)) == [4, 4, 5]
    assert set.union(*left_out) == patients(whole["train"])
    with pytest.raises(SuiteError, match=r"inner_fold=3 of data\.split\.inner_folds=3"):
        Split(inner_folds=3, inner_fold=3).divide(cases())
    with pytest.raises(SuiteError, match="with 14 training patients"):
        Split(inner_folds=15).divide(cases())
    with pytest.raises(SuiteError, match=r"inner_fold=1 is a part of data\.split\.inner_folds, which is null"):
        Split(inner_fold=1).divide(cases())


def test_inner_folds_give_nobody_a_label_whom_the_whole_division_gives_none():
    whole = Split(test=4, val=3, labeled=6).divide(cases())
    for fold in range(2):
        parts = Split(test=4, val=3, labeled=6, inner_folds=2, inner_fold=fold).divide(cases())
        assert len(patients(parts["labeled"])) == 3
        assert patients(parts["labeled"]) < patients(whole["labeled"])
        assert patients(parts["unlabeled"]) < patients(whole["unlabeled"])
        assert patients(parts["labeled"]) | patients(parts["unlabeled"]) == patients(parts["train"])
        assert patients(parts["left_out"]) == patients(whole["train"]) - patients(parts["train"])


def test_all_cases_can_be_tested_where_nothing_is_trained():
    parts = Split(test="all", val=3, folds=5).divide(cases())
    assert {c.id for c in parts["test"]} == {c.id for c in cases()}
    assert not any(parts[name] for name in ("train", "val", "labeled", "unlabeled"))


def test_a_file_decides_alone(tmp_path):
    found = cases(6, 1)
    lists = {"train": ["c001", "c003"], "val": ["c002"], "test": ["c000", "c005"]}
    (tmp_path / "split.json").write_text(json.dumps(lists))
    parts = Split(file=str(tmp_path / "split.json"), seed=4, test=0.9, folds=2).divide(found)
    assert {p: ids(parts[p]) for p in PARTS} == {p: set(v) for p, v in lists.items()}  # c004 is in no list
    assert len(Split(file=str(tmp_path / "split.json"), labeled=1).divide(found)["unlabeled"]) == 1


def test_published_lists_keep_their_order_and_leave_out_who_is_not_there():
    cases = [Case(id=f"{p}{k}", images={}, patient=p) for p in "abcdef" for k in (1, 2)]
    lists = {"train": ["f", "x", "c", "a", "e"], "test": ["b", "y"]}
    for seed in (0, 1):
        parts = Split(seed=seed, val=0.25, labeled=1, test=0.9).divide(cases, lists)
        found = {name: [c.id for c in part] for name, part in parts.items()}
        assert found == {
            "train": ["f1", "f2", "c1", "c2", "a1", "a2"], "val": ["e1", "e2"], "test": ["b1", "b2"],
            "labeled": ["f1", "f2"], "unlabeled": ["c1", "c2", "a1", "a2"],
        }  # fmt: skip
    with_val = Split(val=0.5).divide(cases, {**lists, "val": ["d"]})
    assert [len(with_val[p]) for p in ("train", "val", "test")] == [8, 2, 2]
    with pytest.raises(SuiteError, match="labeled=5, but there are only 4"):
        Split(val=0, labeled=5).divide(cases, lists)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train": ["c000", "c999"]}', "not found among those with a label: .*c999"),
        ('{"train": ["c000"], "test": ["c000"]}', "in both train and test"),
        ('{"test": ["c000"]}', "'train' is empty"),
        ("[1, 2]", "expected a JSON object"),
        ('{"train": null}', "expected a JSON object"),
        ("{train", "expected a JSON object"),
        (None, "expected a JSON object"),
    ],
)
def test_wrong_files_are_refused(content, message, tmp_path):
    path = tmp_path / "split.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SuiteError, match=message):
        Split(file=str(path)).divide(cases(6, 1))


def test_a_patient_listed_on_both_sides_by_different_cases_is_refused(tmp_path):
    found = [Case("a1", {}, patient="a"), Case("a2", {}, patient="a"), Case("b", {}, patient="b")]
    (tmp_path / "split.json").write_text(json.dumps({"train": ["a1", "b"], "test": ["a2"]}))
    with pytest.raises(SuiteError, match="patient a is in both"):
        Split(file=str(tmp_path / "split.json")).divide(found)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (Split(test=4, val=1), "too few cases"),
        (Split(test=0.6, val=0.6), "too few cases"),
        (Split(folds=5, fold=5), "fold=5"),
        (Split(folds=5, fold=-1), "fold=-1"),
        (Split(folds=9), "folds=9"),
        (Split(labeled=99), "labeled=99"),
        (Split(labeled=-1), "data.split.labeled=-1: a number of patients"),
        (Split(labeled=0.1), "data.split.labeled=0.1: a number of patients"),
        (Split(train=-2), "data.split.train=-2: a number of patients"),
    ],
)
def test_impossible_splits_are_refused(split, message):
    with pytest.raises(SuiteError, match=message):
        split.divide(cases(5))


# sampling: one voxel of class 1, a plane of class 2, everything else background

SHAPE, CLASSES = (10, 12, 14), ("background", "one", "plane")
FOREGROUND = {
    1: np.array([[1, 2, 3]], np.int16),
    2: np.argwhere(np.ones((1, 12, 14), bool)).astype(np.int16) + np.array([7, 0, 0], np.int16),
}
DRAWS = 1500


def hits(policy: Sampling, patch=(1, 1, 1), foreground=FOREGROUND, axis: int = 2) -> Counter:
    """How often the middle voxel of a drawn box belongs to each class."""
    label = np.zeros(SHAPE, int)
    for c, voxels in FOREGROUND.items():
        label[tuple(voxels.T)] = c
    counts: Counter = Counter()
    for n in range(DRAWS):
        box = policy.box(numpy_generator("test", n), SHAPE, patch, foreground, CLASSES, axis)
        assert all(stop - start == p and start >= 0 and stop <= s for (start, stop), p, s in zip(box, patch, SHAPE, strict=True))
        counts[int(label[tuple(start + p // 2 for (start, _), p in zip(box, patch, strict=True))])] += 1
    return counts


def share(counts: Counter, *classes: int) -> float:
    return sum(counts[c] for c in classes) / DRAWS


def test_uniform_draws_every_place():
    assert share(hits(Sampling("uniform")), 1, 2) == pytest.approx(0.1, abs=0.03)
    boxes = [Sampling("uniform").box(numpy_generator(n), SHAPE, (3, 3, 3), {}, CLASSES, 2) for n in range(300)]
    assert {box[0][0] for box in boxes} == set(range(8))  # both ends included


@pytest.mark.parametrize("wanted", [0.0, 0.33, 1.0])
def test_foreground_keeps_its_share_and_treats_classes_alike(wanted):
    counts = hits(Sampling("foreground", share=wanted))
    by_chance = (1 - wanted) * 0.1
    assert share(counts, 1) == pytest.approx(wanted / 2, abs=0.04)  # one voxel against 168
    assert share(counts, 2) == pytest.approx(wanted / 2 + by_chance, abs=0.04)
    if wanted == 1:
        assert counts[0] == 0
    if wanted == 0:
        assert counts == hits(Sampling("foreground", share=0.0), foreground={})  # no voxel is ever asked for


def test_foreground_patches_hold_the_voxel_also_at_the_border():
    for n in range(200):
        box = Sampling("foreground", share=1.0).box(numpy_generator(n), SHAPE, (4, 5, 6), {1: FOREGROUND[1]}, CLASSES, 2)
        assert all(start <= v < stop for (start, stop), v in zip(box, (1, 2, 3), strict=True))


def test_foreground_patches_are_centered_where_there_is_room():
    for n in range(20):
        box = Sampling("foreground", share=1.0).box(numpy_generator(n), SHAPE, (3, 4, 5), {1: np.array([[5, 6, 7]])}, CLASSES, 2)
        assert box == ((4, 7), (4, 8), (5, 10))


def test_per_class_draws_by_weight():
    counts = hits(Sampling("per_class", weights={"one": 3, "plane": 1}))
    assert share(counts, 1) == pytest.approx(0.75, abs=0.04)
    assert counts[0] == 0
    assert hits(Sampling("per_class", weights={"one": 1, "plane": 0})) == {1: DRAWS}
    assert share(hits(Sampling("per_class")), 1) == pytest.approx(0.5, abs=0.04)  # no weights: all foreground classes alike
    assert (
        share(hits(Sampling("per_class", weights={"one": 9, "plane": 1}), foreground={2: FOREGROUND[2]}), 2) == 1
    )  # an absent class drops out


def test_per_class_background_is_a_uniform_draw():
    counts = hits(Sampling("per_class", weights={"background": 1, "one": 1}))
    assert share(counts, 1) == pytest.approx(0.5, abs=0.04)
    assert share(counts, 0) == pytest.approx(0.45, abs=0.04)
    assert hits(Sampling("per_class", weights={"background": 1}))[1] < 20


def test_per_class_names_an_unknown_class():
    with pytest.raises(SuiteError, match="did you mean 'plane'"):
        Sampling("per_class", weights={"plain": 1}).box(numpy_generator(0), SHAPE, (1, 1, 1), FOREGROUND, CLASSES, 2)


@pytest.mark.parametrize("axis", [0, 2])
@pytest.mark.parametrize("wanted", [0.0, 0.4, 1.0])
def test_positive_slices_have_exactly_the_share_asked_for(wanted, axis):
    foreground = {1: np.array([[1, 2, 3], [1, 2, 4]], np.int16), 2: np.array([[4, 2, 9]], np.int16)}
    positive = {0: {1, 4}, 2: {3, 4, 9}}[axis]
    patch = [10, 12, 14]
    patch[axis] = 1
    policy = Sampling("positive_slice", share=wanted)
    drawn = [policy.box(numpy_generator("slice", n), SHAPE, patch, foreground, CLASSES, axis)[axis][0] for n in range(DRAWS)]
    rate = sum(s in positive for s in drawn) / DRAWS
    assert rate == wanted if wanted in (0, 1) else rate == pytest.approx(wanted, abs=0.04)
    if 0 < wanted < 1:
        assert set(drawn) == set(range(SHAPE[axis]))  # each of both kinds is drawn


def slices(wanted: float, foreground: dict[int, np.ndarray], draws: int = 300) -> set[int]:
    """Every slice that `positive_slice` draws."""
    policy = Sampling("positive_slice", share=wanted)
    return {policy.box(numpy_generator(n), SHAPE, (10, 12, 1), foreground, CLASSES, 2)[2][0] for n in range(draws)}


def test_positive_slice_without_lesion_or_without_gap():
    assert slices(1.0, {}) == set(range(14))
    assert slices(1.0, {1: np.zeros((0, 3), np.int16)}) == set(range(14))
    assert slices(0.0, {2: FOREGROUND[2]}) == set(range(14))  # the plane meets every slice


def test_positive_slice_is_uniform_within_the_slice():
    policy = Sampling("positive_slice", share=1.0)
    boxes = [policy.box(numpy_generator(n), SHAPE, (4, 4, 1), {1: FOREGROUND[1]}, CLASSES, 2) for n in range(300)]
    assert {box[0][0] for box in boxes} == set(range(7))
    assert {box[2] for box in boxes} == {(3, 4)}


def test_lesion_center_is_the_middle_of_the_box_and_moves_as_far_as_asked():
    shape, lesion = (40, 30, 20), {1: np.array([[10, 12, 7], [20, 13, 8]], np.int16), 2: np.array([[15, 20, 9]], np.int16)}
    still = {Sampling("lesion_center").box(numpy_generator(n), shape, (16, 8, 6), lesion, CLASSES, 2) for n in range(20)}
    assert still == {((7, 23), (12, 20), (5, 11))}  # around the middle (15, 16, 8) of voxels 10..20, 12..20 and 7..9
    moved = [Sampling("lesion_center", jitter=2).box(numpy_generator(n), shape, (16, 8, 6), lesion, CLASSES, 2) for n in range(400)]
    counts = Counter(box[0][0] for box in moved)
    assert set(counts) == {5, 6, 7, 8, 9}
    assert min(counts.values()) > 40  # of 80 expected
    assert {box[1][0] for box in moved} == {10, 11, 12, 13, 14}
    corner = Sampling("lesion_center").box(numpy_generator(0), shape, (16, 8, 6), {1: np.array([[0, 29, 19]], np.int16)}, CLASSES, 2)
    assert corner == ((0, 16), (22, 30), (14, 20))
    nowhere = {Sampling("lesion_center").box(numpy_generator(n), shape, (16, 8, 6), {}, CLASSES, 2) for n in range(20)}
    assert len(nowhere) > 10


@pytest.mark.parametrize("name", ["uniform", "foreground", "per_class", "positive_slice", "lesion_center"])
def test_a_patch_larger_than_the_case_is_centered(name):
    for n in range(20):
        box = Sampling(name, share=1.0).box(numpy_generator(n), SHAPE, (15, 12, 4), FOREGROUND, CLASSES, 2)
        assert box[0] == (-3, 12)  # ten voxels in fifteen: three before, two after
        assert box[1] == (0, 12)
        assert 0 <= box[2][0] <= 10
        assert box[2][1] - box[2][0] == 4


def test_wrong_policies_are_refused():
    with pytest.raises(SuiteError, match="did you mean 'foreground'"):
        Sampling("forground")
    for wrong in (-0.1, 1.5):
        with pytest.raises(SuiteError, match=r"expected 0\.\.1"):
            Sampling(share=wrong)


# keyed randomness


def test_keys_are_the_same_in_every_process_and_on_every_machine():
    code = "from lesionbench.keyed import key; print(key(0, 'order', 1.5, None))"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7", "PATH": ""}
    )
    assert int(other.stdout) == key(0, "order", 1.5, None) == 8544971173155592378
    assert key("a", "bc") != key("ab", "c")
    assert len({key(n) for n in range(1000)}) == 1000
    assert all(0 <= key(n) < 2**63 for n in range(100))


def test_generators_belong_to_their_key():
    assert numpy_generator(1, "a").random() == numpy_generator(1, "a").random() != numpy_generator(2, "a").random()
    assert torch.equal(torch.rand(3, generator=torch_generator(1)), torch.rand(3, generator=torch_generator(1)))


def test_seeding_torch_for_a_library_leaves_its_own_stream_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with torch_seeded("augment", 1):
        first = torch.rand(2)
    with torch_seeded("augment", 1):
        assert torch.equal(torch.rand(2), first)
    with pytest.raises(ZeroDivisionError), torch_seeded("augment", 2):
        1 / 0  # noqa: B018
    assert torch.equal(torch.rand(4), expected)
