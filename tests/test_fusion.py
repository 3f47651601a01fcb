"""Fusing several answers about a case: mean, vote and STAPLE against hand values, and what members keep to themselves."""

import numpy as np
import pytest
import torch

from datamodules.readers.brats_files import brats_task
from lesionbench.target import ClassSoftmax, RegionSigmoid
from lesionbench.task import Task
from lightning_modules.raters.fusion import FUSIONS, Mean, Staple, Vote
from lightning_modules.raters.staple import VotePatterns, staple, staple_of, vote_codes

LESION = Task(channels=("flair",), classes={"background": 0, "lesion": 1})
BRATS = brats_task("2020")


def fused(fusion, *answers, weights=None, task=LESION):
    """Each answer: probabilities (R, *spatial) as nested lists or a tensor; labels by nested thresholds."""
    for place, answer in enumerate(answers):
        regions = torch.as_tensor(answer, dtype=torch.float32)
        labels = RegionSigmoid(task).labels(regions[None])[0]
        fusion.add(regions, labels, 1.0 if weights is None else weights[place], f"m{place + 1}")
    return fusion.result()


def labels_of(result, task=LESION):
    return RegionSigmoid(task).labels(result.regions[None])[0]


# hand values


def test_mean_against_vote_by_hand():
    """Members say .9 .4 .4 of the first voxel and .51 .51 0 of the second."""
    answers = [[[[[0.9, 0.51]]]], [[[[0.4, 0.51]]]], [[[[0.4, 0.0]]]]]
    mean, vote = fused(Mean(LESION), *answers), fused(Vote(LESION), *answers)
    assert mean.regions.flatten().tolist() == pytest.approx([1.7 / 3, 0.34])
    assert vote.regions.flatten().tolist() == pytest.approx([1 / 3, 2 / 3])
    assert labels_of(mean).flatten().tolist() == [1, 0]
    assert labels_of(vote).flatten().tolist() == [0, 1]
    spread = np.std([[0.9, 0.4, 0.4], [0.51, 0.51, 0.0]], axis=1)
    assert mean.disagreement.flatten().tolist() == pytest.approx(spread.tolist(), abs=1e-5)
    assert vote.disagreement.flatten().tolist() == pytest.approx([np.sqrt(2) / 3] * 2, abs=1e-5)


def test_argmax_of_the_mean_differs_from_that_of_both():
    """Classes background, ncr, ed: .1/.5/.4 and .5/.1/.4 give .3/.3/.4."""
    task = Task(channels=("flair",), classes={"background": 0, "a": 1, "b": 2})
    target = ClassSoftmax(task)
    classes = torch.tensor([[0.1, 0.5, 0.4], [0.5, 0.1, 0.4]]).reshape(2, 3, 1, 1, 1)
    regions = target.decode(classes)
    assert target.labels(regions).flatten().tolist() == [1, 0]
    mean = Mean(task)
    for one in regions:
        mean.add(one, target.labels(one[None])[0])
    assert target.labels(mean.result().regions[None]).item() == 2


def test_weights_and_ties():
    answers = [[[[[0.9]]]], [[[[0.1]]]]]
    assert fused(Mean(LESION), *answers, weights=[3, 1]).regions.item() == pytest.approx(0.7)
    assert fused(Vote(LESION), *answers, weights=[3, 1]).regions.item() == pytest.approx(0.75)
    tie = fused(Vote(LESION), *answers)
    assert tie.regions.item() == 0.5
    assert labels_of(tie).item() == 0
    weighted = fused(Mean(LESION), *answers, weights=[3, 1]).disagreement.item()
    assert weighted == pytest.approx(np.sqrt(0.75 * 0.2**2 + 0.25 * 0.6**2), abs=1e-5)


def test_disagreement_is_the_root_of_the_mean_variance_over_regions():
    generator = torch.Generator().manual_seed(0)
    answers = torch.rand(4, 3, 5, 4, 3, generator=generator)
    result = fused(Mean(BRATS), *answers, task=BRATS)
    assert torch.allclose(result.regions, answers.mean(0), atol=1e-6)
    assert torch.allclose(result.disagreement, answers.var(0, correction=0).mean(0).sqrt(), atol=1e-4)
    assert (result.regions <= answers.amax(0) + 1e-6).all()
    assert (result.regions >= answers.amin(0) - 1e-6).all()


@pytest.mark.parametrize("name", FUSIONS)
def test_one_model_is_itself_and_agrees_with_itself(name):
    labels = torch.randint(0, 4, (6, 5, 4), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    regions = BRATS.region_masks(labels).float()
    result = fused(FUSIONS[name](BRATS), regions, task=BRATS)
    assert torch.equal(labels_of(result, BRATS), labels)
    assert not result.disagreement.any()
    if name == "mean":
        probabilities = torch.rand(3, 6, 5, 4)
        assert torch.equal(fused(Mean(BRATS), probabilities, task=BRATS).regions, probabilities)


# STAPLE


def test_staple_without_and_with_equal_marks():
    empty = torch.zeros(1, 3, 3, 3)
    nothing = fused(Staple(LESION), empty, empty, empty)
    assert not nothing.regions.any()
    assert torch.isfinite(nothing.regions).all()
    mask = empty.clone()
    mask[0, 1] = 1
    assert torch.equal(labels_of(fused(Staple(LESION), mask, mask, mask)), mask[0].to(torch.int8))


def test_a_mark_of_one_of_three_is_dropped():
    answers = torch.zeros(3, 1, 12, 12, 12)
    answers[:, :, :6] = 1
    answers[0, :, 8, 5, 5] = 1
    assert labels_of(fused(Staple(LESION), *answers))[8, 5, 5] == 0
    alone = torch.zeros(3, 1, 4, 4, 4)
    alone[0, 0, 1, 1, 1] = 1
    result = fused(Staple(LESION), *alone)
    assert labels_of(result).sum() == 0
    assert torch.isfinite(result.regions).all()


def cube(generator, miss, false, shape=24):
    """A rater who misses and adds voxels independently: (1, *spatial)."""
    truth = torch.zeros(shape, shape, shape, dtype=torch.bool)
    truth[6:18, 6:18, 6:18] = True
    flips = torch.rand(truth.shape, generator=generator)
    return (torch.where(truth, flips >= miss, flips < false)[None]).float(), truth


def overlap(labels, truth):
    marked = labels == 1
    return 2 * float((marked & truth).sum()) / float(marked.sum() + truth.sum())


@pytest.mark.parametrize(("poor", "most"), [((0.35, 0.05), 0.94), ((0.45, 0.10), 0.88)])
def test_staple_beats_the_vote_with_one_good_and_two_poor_raters_of_independent_errors(poor, most):
    generator = torch.Generator().manual_seed(0)
    raters = [cube(generator, *errors) for errors in ((0.02, 0.005), poor, poor)]
    truth = raters[0][1]
    together, vote = (fused(f, *(r for r, _ in raters)) for f in (Staple(LESION, margin=None), Vote(LESION)))
    assert overlap(labels_of(together), truth) > 0.95
    assert overlap(labels_of(vote), truth) < most
    found = [together.table[f"staple_sensitivity_lesion_m{m}"] for m in (1, 2, 3)]
    assert found == pytest.approx([0.98, 1 - poor[0], 1 - poor[0]], abs=0.1)
    assert together.table["staple_specificity_lesion_m1"] > together.table["staple_specificity_lesion_m2"]


def test_staple_follows_the_poor_raters_where_their_errors_are_the_same():
    """Two poor raters with one and the same error outvote the good one: errors that are not independent are beyond STAPLE."""
    generator = torch.Generator().manual_seed(0)
    (good, truth), (poor, _) = cube(generator, 0.02, 0.005), cube(generator, 0.35, 0.05)
    together = labels_of(fused(Staple(LESION, margin=None), good, poor, poor))
    assert overlap(together, truth) < 0.8
    assert torch.equal(together, poor[0].to(torch.int8))


def test_order_of_models_does_not_matter():
    generator = torch.Generator().manual_seed(2)
    raters = [cube(generator, *errors)[0] for errors in ((0.02, 0.005), (0.3, 0.05), (0.2, 0.1))]
    one, other = fused(Staple(LESION), *raters), fused(Staple(LESION), *raters[::-1])
    assert torch.allclose(one.regions, other.regions, atol=1e-5)
    assert one.table["staple_sensitivity_lesion_m1"] == pytest.approx(other.table["staple_sensitivity_lesion_m3"])


def test_regions_stay_nested():
    generator = torch.Generator().manual_seed(3)
    for name, fusion in FUSIONS.items():
        answers = [torch.rand(3, 8, 7, 6, generator=generator).sort(0, descending=True).values for _ in range(4)]
        result = fused(fusion(BRATS), *answers, task=BRATS)
        wt, tc, et = result.regions
        assert (wt >= tc - 1e-6).all(), name
        assert (tc >= et - 1e-6).all(), name


def test_margin_bounds_what_staple_looks_at():
    mask = torch.zeros(1, 20, 20, 20)
    mask[0, 5:8, 5:8, 5:8] = 1
    fusion = Staple(LESION, margin=2)
    fusion.add(mask, mask[0].to(torch.int8), name="m1")
    assert fusion._box(0) == (slice(3, 10),) * 3
    assert Staple(LESION, margin=None)._box is not None
    corner = Staple(LESION, margin=9)
    corner.add(mask, mask[0].to(torch.int8), name="m1")
    assert corner._box(0) == (slice(0, 17),) * 3


@pytest.mark.parametrize("raters", [1, 3, 8, 9, 12])
def test_codes_say_what_masks_say(raters):
    masks = torch.rand(raters, 6, 5, 4, generator=torch.Generator().manual_seed(raters)) < 0.4
    codes = vote_codes(iter(masks), raters)
    whole, counted = staple(masks), staple_of(VotePatterns.of_codes(codes, raters))
    assert torch.equal(whole.weights, counted.weights)
    assert torch.allclose(whole.posterior(masks), counted.posterior_of(codes), atol=1e-6)


# memory


def test_mean_and_vote_hold_two_sums_whatever_the_number_and_staple_a_bit_of_each():
    def stateless(fusion):
        tensors = [v for v in vars(fusion).values() if isinstance(v, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors) + sum(b.nbytes for b in getattr(fusion, "_bits", []))

    shape, sizes = (16, 16, 16), {}
    for name, fusion in FUSIONS.items():
        one = fusion(BRATS)
        sizes[name] = []
        for number in range(6):
            labels = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(number)).to(torch.int8)
            one.add(BRATS.region_masks(labels).float(), labels, name=str(number))
            sizes[name].append(stateless(one))
    assert set(sizes["mean"]) == set(sizes["vote"]) == {16**3 * 4 * 4}  # three regions and their squares, four bytes each
    assert sizes["staple"] == [n * 3 * 16**3 // 8 for n in range(1, 7)]
