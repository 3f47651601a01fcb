"""Several raters: majority, STAPLE, SIMPLE, and every target, against numbers computed by hand, ITK and the limits."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from lesionbench.errors import SuiteError
from lesionbench.keyed import torch_generator
from lesionbench.raters import agreement, majority
from lesionbench.task import Task
from lightning_modules.losses import RegionBCE, SoftDice
from lightning_modules.metrics import q_dice
from lightning_modules.raters.multi_rater import MultiRater
from lightning_modules.raters.rater_targets import (
    AgreementClasses,
    AtLeast,
    DecoderPerRater,
    RandomRater,
    RaterTarget,
    Simple,
    SoftLabel,
    Staple,
)
from lightning_modules.raters.simple_fusion import simple
from lightning_modules.raters.staple import VotePatterns, staple


def task(raters: int) -> Task:
    return Task(("image",), {"background": 0, "lesion": 1}, raters=raters)


# four voxels, marked by all three raters, by two, by one and by none
THREE = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.int8)[:, :, None, None]


def encoded(target: RaterTarget, *cases: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """The target of a batch of cases with their own numbers of raters, as the data module hands them over; (B, K, voxels)."""
    most = max(len(c) for c in cases)
    padded = torch.stack([torch.cat([c, c.new_full((most - len(c), *c.shape[1:]), -1)]) for c in cases])
    present = torch.tensor([[r < len(c) for r in range(most)] for c in cases])
    names = [f"c{i}" for i in range(len(cases))]
    for name, case in zip(names, cases, strict=True):
        target.learn(name, case)
    return target.encode_raters(padded, present, names, torch_generator(seed)).flatten(2)


def blobs(raters: int, seed: int, shape=(24, 20, 18)) -> torch.Tensor:
    """Shifted balls of different size, one per rater, bool."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    balls = [((grid - rng.normal(0, 0.1, 3)[:, None, None, None]) ** 2).sum(axis=0) < rng.uniform(0.1, 0.4) for _ in range(raters)]
    return torch.from_numpy(np.stack(balls))


# fusion


def test_majority_counts_present_raters_and_gives_ties_to_the_background():
    raters = torch.tensor([[1, 1, 2, -1, 0], [1, 0, 2, -1, 0], [0, 0, 1, -1, 1], [0, 1, -1, -1, 1]], dtype=torch.int8)
    assert majority(raters).tolist() == [0, 0, 2, -1, 0]
    assert majority(THREE).flatten().tolist() == [1, 1, 0, 0]


def test_agreement_is_the_share_of_the_raters_who_are_there():
    absent = torch.full((1, 4, 1, 1), -1, dtype=torch.int8)
    share = agreement(torch.cat([THREE, absent]), task(4)).flatten()
    assert share.tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])


@pytest.mark.parametrize("raters", [2, 3, 5, 9])
def test_staple_is_itk_s(raters):
    import SimpleITK as sitk

    masks = blobs(raters, raters)
    ours = staple(masks)
    itk = sitk.STAPLEImageFilter()
    itk.SetForegroundValue(1)
    theirs = sitk.GetArrayFromImage(itk.Execute([sitk.GetImageFromArray(m.numpy().astype(np.uint8)) for m in masks]))
    assert np.abs(ours.posterior(masks).numpy() - theirs).max() < 1e-6
    assert ours.sensitivity.numpy() == pytest.approx(np.array(itk.GetSensitivity()), abs=1e-6)
    assert ours.specificity.numpy() == pytest.approx(np.array(itk.GetSpecificity()), abs=1e-6)


def test_staple_follows_two_equal_raters_and_not_a_random_one():
    good = blobs(1, 0)[0]
    noise = torch.rand(good.shape, generator=torch.Generator().manual_seed(0)) < float(good.float().mean())
    masks = torch.stack([good, good, noise])
    found = staple(masks)
    assert found.sensitivity[:2].min() > 0.999
    assert found.specificity[:2].min() > 0.999
    assert found.sensitivity[2] < 0.5
    assert torch.equal(found.posterior(masks) > 0.5, good)


def test_staple_by_hand_of_one_iteration():
    masks = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    found = staple(masks, iterations=1)
    # W = 1, 1/2, 0, 0; f = 3/8; p = (1.5/1.5, 1/1.5); q = (2/2.5, 1): bias and weights from these
    assert found.prior == 3 / 8
    assert found.sensitivity.tolist() == pytest.approx([1, 2 / 3])
    assert found.specificity.tolist() == pytest.approx([2 / 2.5, 1])
    third = found.posterior(masks)[1]  # first rater alone: f p1 (1 - p2) / (that + (1 - f) (1 - q1) q2)
    assert float(third) == pytest.approx(3 / 8 / 3 / (3 / 8 / 3 + 5 / 8 * 0.2), abs=1e-6)


def test_staple_does_not_know_the_order_of_raters_and_leaves_invalid_voxels_out():
    masks = blobs(4, 3)
    assert staple(masks.flip(0)).sensitivity.tolist() == pytest.approx(staple(masks).sensitivity.flip(0).tolist())
    valid = torch.zeros(masks.shape[1:], dtype=torch.bool)
    valid[:12] = True
    assert staple(masks, valid).sensitivity.tolist() == pytest.approx(staple(masks[:, :12]).sensitivity.tolist())


@pytest.mark.parametrize("value", [False, True])
def test_staple_of_raters_who_agree_everywhere(value):
    masks = torch.full((3, 4, 4), value)
    assert torch.equal(staple(masks).posterior(masks) > 0.5, masks[0])
    half = torch.zeros(3, 4, 4, dtype=torch.bool)
    half[:, :2] = True
    assert (staple(half).posterior(half) - half[0].float()).abs().max() < 1e-6


def test_vote_patterns_refuse_what_they_cannot_count():
    with pytest.raises(ValueError, match="1 to 20"):
        VotePatterns.of(torch.zeros(21, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="no valid"):
        VotePatterns.of(torch.zeros(2, 3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool))
    counted = VotePatterns.of(torch.tensor([[1, 1, 0], [0, 0, 1]], dtype=torch.bool))
    assert counted.votes.tolist() == [[1, 0], [0, 1]]
    assert counted.counts.tolist() == [2, 1]


def test_simple_drops_the_rater_who_is_elsewhere():
    masks = torch.zeros(5, 20, dtype=torch.bool)
    masks[:4, :10] = True
    masks[3, 9] = False
    masks[4, 12:] = True
    weights = simple(masks)
    assert weights[4] == 0
    assert float(weights.sum()) == pytest.approx(1)
    # majority = the first ten; Dice 1, 1, 1, 18/19, 0: the last goes; then the fourth falls below its mean - 1 std as well
    assert weights.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0, 0])
    dice = [1, 1, 1, 18 / 19]  # by at most sqrt(3) deviations of the four who are left
    assert simple(masks, deviations=1.8).tolist() == pytest.approx([*(d / sum(dice) for d in dice), 0])


def simple_voxel_by_voxel(masks: np.ndarray) -> np.ndarray:
    """SIMPLE as it is written down: over all voxels, a rater who is dropped stays out."""
    estimate, kept, weights = masks.mean(axis=0) > 0.5, np.ones(len(masks), bool), None
    while True:
        sizes = masks.sum(axis=1) + estimate.sum()
        dice = np.where(sizes > 0, 2 * (masks & estimate).sum(axis=1) / np.maximum(sizes, 1), 1)
        stays = kept & (dice >= dice[kept].mean() - dice[kept].std() - 1e-9)
        new = dice * stays if (dice * stays).any() else stays.astype(float)
        new /= new.sum()
        if weights is not None and (stays == kept).all() and np.allclose(new, weights, atol=1e-9):
            return new
        kept, weights = stays, new
        estimate = new @ masks > 0.5


@pytest.mark.parametrize("seed", [0, 1, 30, 76, 84])  # in the last three a dropped rater would come back
def test_simple_is_the_iteration_over_voxels(seed):
    rng = np.random.default_rng(seed)
    masks = rng.random((5, 12)) < rng.uniform(0.2, 0.8, (5, 1))
    assert simple(torch.from_numpy(masks)).numpy() == pytest.approx(simple_voxel_by_voxel(masks), abs=1e-6)


def test_simple_without_any_mark_keeps_everybody():
    assert simple(torch.zeros(3, 8, dtype=torch.bool)).tolist() == pytest.approx([1 / 3] * 3)
    assert simple(torch.eye(3, 8, dtype=torch.bool)).tolist() == pytest.approx([1 / 3] * 3)  # an empty majority


# agreement classes


def test_agreement_classes_count_raters():
    target = AgreementClasses(task(3))
    assert target.out_channels == 4
    assert encoded(target, THREE)[0, 0].tolist() == [3, 2, 1, 0]
    assert encoded(target, THREE[[2, 0, 1]])[0, 0].tolist() == [3, 2, 1, 0]


def test_decoding_gives_nested_masks_and_returns_what_was_encoded():
    target = AgreementClasses(task(3), keep_largest="off")
    levels = encoded(target, THREE)
    logits = 20.0 * nn.functional.one_hot(levels[:, 0], 4).movedim(-1, 1)
    for reading in target.decodings:
        u = target.read(target.activate(logits), reading)
        assert u.flatten().tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0], abs=1e-5)
    u = target.decode(target.activate(torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(1))))
    masks = torch.stack([u >= c / 3 - 1e-6 for c in (1, 2, 3)])
    assert (masks[0] >= masks[1]).all()
    assert (masks[1] >= masks[2]).all()
    assert torch.allclose(masks.float().sum(dim=0) / 3, u)


def test_the_three_readings_by_hand():
    target = AgreementClasses(task(2), keep_largest="off")
    maps = torch.tensor([[0.45, 0.1, 0.45], [0.2, 0.3, 0.5], [0.5, 0.5, 0.0]]).T[None, :, :, None]
    assert target.read(maps, "argmax").flatten().tolist() == [0, 1, 0]
    assert target.read(maps, "median").flatten().tolist() == [0.5, 0.5, 0]  # 0.2 + 0.3 reaches a half
    assert target.read(maps, "expectation").flatten().tolist() == pytest.approx([0.5, 0.65, 0.25])
    assert target.labels(torch.tensor([0.0, 0.5, 0.51, 1.0])[None, None]).tolist() == [[0, 0, 1, 1]]


def test_a_case_with_fewer_raters_is_stretched():
    five = torch.tensor([[1] * c + [0] * (5 - c) for c in range(6)], dtype=torch.int8).T
    assert encoded(AgreementClasses(task(6)), five)[0, 0].tolist() == [0, 1, 2, 4, 5, 6]  # 1.2, 2.4, 3.6, 4.8
    both = encoded(AgreementClasses(task(3)), THREE, THREE[:1])  # a batch of cases with three raters and one
    assert both[:, 0].tolist() == [[3, 2, 1, 0], [3, 3, 3, 0]]


def test_ignored_voxels_count_nowhere():
    raters = THREE.clone()
    raters[1, 0] = -1
    for target in (AgreementClasses(task(3)), AtLeast(task(3)), SoftLabel(task(3)), RandomRater(task(3)), DecoderPerRater(task(3))):
        found = encoded(target, raters)
        assert (found[:, :, 0] == -1).all()
        assert (found[:, :, 1:] >= 0).all()
    masks = blobs(3, 5).to(torch.int8)
    masks[1, 8:] = -1  # one rater says nothing of most of the case: fused from what all of them saw
    valid = torch.zeros(masks.shape[1:], dtype=torch.bool)
    valid[:8] = True
    there = masks.clamp(min=0).bool()
    for target, fused in (
        (Staple(task(3), soft=True), staple(there, valid).posterior(there)),
        (Simple(task(3)), torch.einsum("r,r...->...", simple(there, valid).float(), there.float()) > 0.5 + 1e-6),
    ):
        found = encoded(target, masks)[0, 0].reshape(valid.shape)
        assert (found[8:] == -1).all()
        assert torch.allclose(found[:8], fused[:8].float(), atol=1e-5)


def test_one_rater_is_ordinary_segmentation_and_equal_raters_are_too():
    target = AgreementClasses(task(1), keep_largest="off")
    assert target.out_channels == 2
    assert encoded(target, THREE[:1])[0, 0].tolist() == THREE[0].flatten().tolist()
    equal = encoded(AgreementClasses(task(4)), THREE[:1].expand(4, -1, -1, -1))
    assert set(equal.unique().tolist()) == {0, 4}
    truth, guess = (torch.rand(200, generator=torch.Generator().manual_seed(s)) > 0.5 for s in (1, 2))
    dice = 2 * float((truth & guess).sum()) / float(truth.sum() + guess.sum())
    assert q_dice(guess.float().numpy(), truth.float().numpy()) == pytest.approx(dice)


def test_paper_loss_is_monai_s_and_reaches_every_class():
    from monai.losses import DiceLoss

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 8, 8, generator=generator, requires_grad=True)
    levels = torch.randint(0, 4, (2, 1, 8, 8), generator=generator)
    ours = SoftDice(include_background=True, batch=True, squared=True)
    theirs = DiceLoss(softmax=True, to_onehot_y=True, include_background=True, squared_pred=True, batch=True)
    assert ours(logits, levels).item() == pytest.approx(theirs(logits, levels).item(), abs=1e-4)
    assert float(ours(50.0 * nn.functional.one_hot(levels[:, 0], 4).movedim(-1, 1), levels)) == pytest.approx(0, abs=1e-5)
    ours(logits, levels).backward()
    assert (logits.grad.abs().amax(dim=(0, 2, 3)) > 0).all()


# one component per class


def ring(radius: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(15) - 7, torch.arange(15) - 7, indexing="ij")
    return ((y**2 + x**2) <= radius**2).to(torch.int8)[..., None]


def test_largest_component_is_kept_of_classes_that_are_one_piece_in_every_training_case():
    two = ring(2)
    two[0, 0] = 1
    target = AgreementClasses(task(2))
    target.learn("a", torch.stack([ring(5), ring(3)]))  # one ring, one disk
    assert target.single() == [1, 2]
    target.learn("b", torch.stack([ring(5), two]))  # a corner drawn by one of two as well
    assert target.single() == [2]
    target.learn("c", torch.stack([ring(5), ring(3)]))  # what a later case looks like does not make up for it
    assert target.single() == [2]
    other = AgreementClasses(task(2))
    other.load(target.state())
    assert other.single() == [2]
    maps = torch.zeros(1, 3, 15, 15, 1)
    maps[:, 0] = 0.1
    maps[:, 2, 3:6, 3:6] = 1  # largest piece of class 2
    maps[:, 2, 10, 10] = maps[:, 1, 12, 1] = maps[:, 1, 1, 12] = 1
    u = other.decode(maps)[0, 0, :, :, 0]
    assert int((u == 1).sum()) == 9
    assert u[10, 10] == 0
    assert u[12, 1] == u[1, 12] == 0.5  # class 1 keeps all its pieces
    assert int((AgreementClasses(task(2), keep_largest="all").decode(maps) == 0.5).sum()) == 1
    assert int((AgreementClasses(task(2), keep_largest="off").decode(maps) > 0).sum()) == 12


# the other strategies


def test_levels_by_hand():
    def got(level, *cases):
        return encoded(AtLeast(task(3), level=level), *cases)[:, 0].tolist()

    assert got("majority", THREE) == [[1, 1, 0, 0]]
    assert got("consensus", THREE) == [[1, 0, 0, 0]]
    assert [got(k, THREE)[0] for k in (1, 2, 3)] == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert got("majority", THREE[:2]) == [[1, 1, 0, 0]]  # one of two is no majority
    assert got("consensus", THREE, THREE[:2]) == [[1, 0, 0, 0], [1, 1, 0, 0]]
    assert got(2, THREE[1:]) == [[1, 0, 0, 0]]  # one of two is less than two thirds


def test_soft_label_is_the_share():
    assert encoded(SoftLabel(task(3)), THREE, THREE[:2])[:, 0].tolist() == [pytest.approx([1, 2 / 3, 1 / 3, 0]), [1, 1, 0.5, 0]]


def test_fused_targets_come_from_the_whole_case_whatever_is_cut_from_it():
    masks = blobs(3, 5).to(torch.int8)
    for make in (partial(Staple, soft=True), Staple, Simple):
        target = make(task(4))
        whole = encoded(target, masks).reshape(masks.shape[1:])
        cut = target.encode_raters(masks[None, :, 8:16].flip(-1), torch.ones(1, 3, dtype=torch.bool), ["c0"])[0, 0]
        assert torch.equal(cut, whole[8:16].flip(-1))
    assert torch.allclose(
        encoded(Staple(task(3), soft=True), masks)[0, 0], staple(masks.bool()).posterior(masks.bool()).flatten(), atol=1e-5
    )
    assert torch.equal(encoded(Staple(task(3)), masks) > 0, encoded(Staple(task(3), soft=True), masks) > 0.5)
    weights = simple(masks.bool()).float()
    fused = torch.einsum("r,r...->...", weights, masks.float()) > 0.5 + 1e-6
    assert torch.equal(encoded(Simple(task(3)), masks)[0, 0] > 0, fused.flatten())


def test_random_rater_is_one_who_is_there_and_changes_with_the_generator():
    target = RandomRater(task(3))
    seen = {tuple(encoded(target, THREE, THREE[:1], seed=s)[0, 0].tolist()) for s in range(20)}
    assert seen == {tuple(r.flatten().tolist()) for r in THREE}
    assert all(encoded(target, THREE, THREE[:1], seed=s)[1, 0].tolist() == [1, 1, 1, 0] for s in range(20))
    assert torch.equal(encoded(target, THREE, seed=3), encoded(target, THREE, seed=3))


def test_decoder_per_rater_has_a_channel_for_each_and_averages_them():
    target = DecoderPerRater(task(3))
    assert (target.out_channels, target.loss_terms) == (3, 3)
    found = encoded(target, THREE, THREE[:2])
    assert torch.equal(found[0], THREE.flatten(1).float())
    assert torch.equal(found[1, :2], THREE[:2].flatten(1).float())
    assert (found[1, 2] == -1).all()
    maps = torch.tensor([0.9, 0.6, 0.3])[None, :, None, None]
    assert target.read(maps, "probability").item() == pytest.approx(0.6)
    assert target.read(maps, "binary").item() == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: AgreementClasses(task(0)), "raters"),
        (lambda: SoftLabel(Task(("t1",), {"background": 0, "a": 1, "b": 2}, raters=2)), "one region"),
        (lambda: AgreementClasses(task(3), decode="mean"), "mean"),
        (lambda: AgreementClasses(task(3), keep_largest="some"), "some"),
        (lambda: AtLeast(task(3), level=4), "1 to 3"),
        (lambda: AtLeast(task(3), level="most"), "majority"),
        (lambda: SoftLabel(task(3), decode="argmax"), "argmax"),
        (lambda: SoftLabel(task(3)).encode(THREE[:1]), "multi_rater"),
    ],
)
def test_errors_name_the_value(make, text):
    with pytest.raises(SuiteError, match=text):
        make()


# the method around them


class Pointwise(nn.Module):
    """One weight per output."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.layer = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, image):
        return self.layer(image)


def method(target, loss, network=Pointwise, raters=3, **options):
    return MultiRater(task(raters), network=network, loss=loss, inferer=lambda image, f, axis: f(image), target=target, **options)


def batch(raters: torch.Tensor, seed: int = 0) -> dict:
    image = torch.randn(len(raters), 1, *raters.shape[2:], generator=torch.Generator().manual_seed(seed))
    return {
        "image": image,
        "raters": raters,
        "rater_mask": (raters != -1).flatten(2).any(-1),
        "case": [f"c{i}" for i in range(len(raters))],
    }


def test_loss_and_readings_of_the_method():
    raters = torch.randint(0, 2, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    built = method(SoftLabel, RegionBCE(), decodings=["binary"])
    data = batch(raters)
    expected = nn.functional.binary_cross_entropy_with_logits(built(data["image"]), raters.float().mean(dim=1, keepdim=True))
    assert built.compute_loss(data).item() == pytest.approx(expected.item(), abs=1e-6)
    prediction = built.decode(torch.full((1, 1, 2, 2, 1), 0.7))
    assert prediction.regions.unique().tolist() == pytest.approx([0.7])
    assert prediction.members["binary"].regions.unique().tolist() == [1]
    assert prediction.labels.unique().tolist() == [1]
    with pytest.raises(SuiteError, match="median"):
        method(SoftLabel, RegionBCE(), decodings=["median"])
    with pytest.raises(SuiteError, match="softmax"):
        method(SoftLabel, SoftDice())


def test_every_decoder_learns_from_its_rater_only_and_the_loss_is_their_sum():
    from lightning_modules.networks import dynunet

    shape = {"dimensions": 2, "features": [4, 4, 4], "kernels": [3, 3, 3], "strides": [1, 2, 2]}
    built = method(DecoderPerRater, RegionBCE(), network=partial(dynunet, own_decoders=True, **shape))
    raters = torch.randint(0, 2, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    raters[:, 2] = -1  # nobody has the third rater
    data = batch(raters)
    loss = built.compute_loss(data)
    alone = [nn.functional.binary_cross_entropy_with_logits(built(data["image"])[:, r], raters[:, r].float()) for r in (0, 1)]
    assert loss.item() == pytest.approx(3 * sum(alone).item() / 2, rel=1e-5)
    loss.backward()
    encoder, *rest = built.network.networks
    assert all(p.grad is not None and p.grad.any() for p in encoder.input_block.parameters() if p.ndim > 1)
    assert rest[0].output_block.conv.conv.weight.grad.any()
    assert all(not p.grad.any() for p in rest[1].parameters())
    names = [n for n, _ in built.network.named_parameters()]
    assert not [n for n in names if n.startswith(("networks.1.", "networks.2.")) and ("input_block" in n or "downsamples" in n)]
    one = sum(p.numel() for p in method(partial(SoftLabel), RegionBCE(), network=partial(dynunet, **shape)).parameters())
    shared = sum(p.numel() for part in ("input_block", "downsamples", "bottleneck") for p in getattr(encoder, part).parameters())
    assert sum(p.numel() for p in built.parameters()) == 3 * one - 2 * shared
    with pytest.raises(SuiteError, match="own_decoders"):
        method(DecoderPerRater, RegionBCE(), network=partial(dynunet, **shape))
