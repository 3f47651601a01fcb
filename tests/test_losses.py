import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from lesionbench.errors import SuiteError
from lesionbench.target import ClassSoftmax, RegionSigmoid
from lesionbench.task import Task
from lightning_modules.losses import (
    CrossEntropy,
    DeepSupervision,
    DiceCE,
    DiceTopK,
    Focal,
    GeneralizedDice,
    RegionBCE,
    RegionBCEDice,
    RegionDice,
    RegionFocal,
    RegionTopK,
    RegionTopKDice,
    SoftDice,
    TopK,
)

CONF = Path(__file__).parent.parent / "conf"
SOFTMAX = {
    "ce": CrossEntropy(),
    "ce_weights": CrossEntropy([0.5, 2, 1]),
    "ce_balanced": CrossEntropy("balanced"),
    "dice": SoftDice(),
    "dice_batch": SoftDice(include_background=True, batch=True, squared=True, smooth=0),
    "dice_ce": DiceCE(weights=[1, 2, 3]),
    "focal": Focal(weights="balanced"),
    "focal_root": Focal(gamma=0.5),
    "generalized_dice": GeneralizedDice(),
    "generalized_dice_square": GeneralizedDice(2),
    "topk": TopK(0.5),
    "dice_topk": DiceTopK(0.5),
}
SIGMOID = {
    "bce": RegionBCE(),
    "dice": RegionDice(),
    "dice_batch": RegionDice(batch=True, squared=True, smooth=0),
    "bce_dice": RegionBCEDice(),
    "focal": RegionFocal(alpha=0.25),
    "topk": RegionTopK(0.5),
    "topk_channel": RegionTopK(0.5, "per_channel"),
    "topk_sample": RegionTopK(0.5, "per_sample"),
    "topk_dice": RegionTopKDice(0.5),
}
EVERY = [pytest.param(loss, id=f"{loss.kind}-{name}") for group in (SOFTMAX, SIGMOID) for name, loss in group.items()]


def example(loss, shape=(3, 4, 5), batch=2, ignored=True):
    """Random logits (batch, 3, *shape) and a target of the loss's kind with some ignored voxels."""
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(batch, 3, *shape, generator=g)
    label = torch.randint(0, 3, (batch, 1, *shape), generator=g)
    if ignored:
        label[torch.rand(label.shape, generator=g) < 0.3] = -1
    return logits, label if loss.kind == "softmax" else regions_of(label)


def regions_of(label):
    masks = torch.cat([label >= 1, label >= 2, label == 1], dim=1).float()
    return torch.where(label == -1, -1.0, masks)


def log_odds(p):
    p = torch.tensor(p, dtype=torch.float32)
    return p.log() - (1 - p).log()


# what holds for every loss


@pytest.mark.parametrize("loss", EVERY)
def test_ignored_voxels_change_nothing_and_get_no_gradient(loss):
    logits, target = example(loss)
    ignored = (target[:, :1] == -1).expand_as(logits)
    changed = torch.where(ignored, logits * 9 + 20, logits).requires_grad_()
    value = loss(changed, target)
    assert value == loss(logits, target)
    (gradient,) = torch.autograd.grad(value, changed)
    assert (gradient[ignored] == 0).all()
    assert (gradient[~ignored] != 0).any()


@pytest.mark.parametrize("loss", EVERY)
def test_ignored_slices_equal_a_smaller_image(loss):
    logits, target = example(loss, ignored=False)
    hidden = target.clone()
    hidden[:, :, 2:] = -1
    assert loss(logits, hidden).item() == pytest.approx(loss(logits[:, :, :2], target[:, :, :2]).item(), rel=1e-5)


@pytest.mark.parametrize("loss", EVERY)
def test_an_unlabeled_sample_adds_nothing(loss):
    logits, target = example(loss)
    target[1] = -1
    assert loss(logits, target).item() == pytest.approx(loss(logits[:1], target[:1]).item(), rel=1e-5)


@pytest.mark.parametrize("loss", EVERY)
def test_all_ignored_is_zero_with_a_gradient_path(loss):
    logits, target = example(loss)
    logits.requires_grad_()
    value = loss(logits, torch.full_like(target, -1))
    value.backward()
    assert value == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("loss", EVERY)
@pytest.mark.parametrize("scale", [1, 1e4])
def test_finite_without_foreground(loss, scale):
    logits, target = example(loss)
    logits = (logits * scale).requires_grad_()
    value = loss(logits, torch.zeros_like(target))
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("loss", EVERY)
def test_better_logits_give_a_lower_loss_down_to_zero(loss):
    _, target = example(loss)
    truth = F.one_hot(target[:, 0].clamp_min(0).long(), 3).movedim(-1, 1) if loss.kind == "softmax" else target.clamp_min(0)
    values = [loss(a * (2.0 * truth - 1), target).item() for a in (-3, 0, 3, 30)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("loss", EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computed_in_float32_under_autocast(loss, dtype):
    logits, target = example(loss)
    low = logits.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(low, target)
    assert value.dtype == torch.float32
    assert value == loss(low.float(), target)


@pytest.mark.parametrize("loss", EVERY)
def test_2d(loss):
    logits, target = example(loss)
    flat = loss(logits.flatten(3), target.flatten(3))
    assert flat.item() == pytest.approx(loss(logits, target).item(), rel=1e-5)


def test_targets_of_the_suite_fit():
    task = Task(("t1",), {"background": 0, "a": 1, "b": 2}, {"outer": ("a", "b"), "inner": ("b",)})
    label = torch.tensor([0, 1, 2, -1]).reshape(1, 1, 2, 2)
    for target, loss, perfect in [
        (ClassSoftmax(task), DiceCE(), torch.tensor([[9.0, -9, -9, 0], [-9, 9, -9, 0], [-9, -9, 9, 0]])),
        (RegionSigmoid(task), RegionBCEDice(), torch.tensor([[-9.0, 9, 9, 0], [-9, -9, 9, 0]])),
    ]:
        assert loss(perfect.reshape(1, -1, 2, 2) * 4, target.encode(label)) < 1e-4


# hand-computed values


def test_cross_entropy_by_hand():
    logits = torch.tensor([[0.8, 0.5], [0.2, 0.5]]).log().reshape(1, 2, 1, 2)
    target = torch.tensor([0, 1]).reshape(1, 1, 1, 2)
    losses = -math.log(0.8), -math.log(0.5)
    assert CrossEntropy()(logits, target).item() == pytest.approx(sum(losses) / 2)
    assert CrossEntropy([1, 3])(logits, target).item() == pytest.approx((losses[0] + 3 * losses[1]) / 4)


def test_cross_entropy_equals_torch():
    logits, target = example(CrossEntropy())
    weights = torch.tensor([0.2, 1.0, 3.0])
    expected = F.cross_entropy(logits, target[:, 0], weights, ignore_index=-1)
    assert CrossEntropy(weights.tolist())(logits, target).item() == pytest.approx(expected.item(), rel=1e-6)


def test_balanced_weights_give_each_present_class_the_same_share():
    logits = torch.randn(1, 3, 1, 6, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 0, 0, 0, 2, -1]).reshape(1, 1, 1, 6)  # class 1 is absent
    values = F.cross_entropy(logits, target[:, 0], ignore_index=-1, reduction="none")[0, 0]
    expected = (values[:4].mean() + values[4]) / 2
    assert CrossEntropy("balanced")(logits, target).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0], "balanced"])
def test_focal_without_focus_is_cross_entropy(weights):
    logits, target = example(Focal())
    assert Focal(0, weights)(logits, target).item() == pytest.approx(CrossEntropy(weights)(logits, target).item(), rel=1e-6)


def test_focal_by_hand():
    logits = torch.tensor([[0.9, 0.4], [0.1, 0.6]]).log().reshape(1, 2, 1, 2)
    target = torch.zeros(1, 1, 1, 2, dtype=torch.long)
    expected = (0.1**2 * -math.log(0.9) + 0.6**2 * -math.log(0.4)) / 2
    assert Focal(2.0)(logits, target).item() == pytest.approx(expected, rel=1e-5)


def test_topk_of_everything_is_cross_entropy():
    logits, target = example(TopK())
    assert TopK(1.0)(logits, target).item() == pytest.approx(CrossEntropy()(logits, target).item(), rel=1e-6)


def test_topk_takes_the_worst_labeled_voxels():
    p = [0.9, 0.1, 0.5, 0.8, 0.01]
    logits = torch.tensor([p, [1 - x for x in p]]).log().reshape(1, 2, 1, 5)
    target = torch.tensor([0, 0, 0, 0, -1]).reshape(1, 1, 1, 5)
    assert TopK(0.5)(logits, target).item() == pytest.approx(-(math.log(0.1) + math.log(0.5)) / 2, rel=1e-5)
    assert TopK(0.01)(logits, target).item() == pytest.approx(-math.log(0.1), rel=1e-5)


def test_soft_dice_by_hand():
    p = torch.tensor([0.8, 0.5, 0.4, 0.1])  # class 1
    logits = torch.stack([1 - p, p]).log().reshape(1, 2, 2, 2)
    target = torch.tensor([1, 1, 0, 0]).reshape(1, 1, 2, 2)
    # class 1: overlap 1.3, sum p 1.8, sum g 2; class 0: overlap 1.5, sum p 2.2, sum g 2
    foreground, background = 2.6 / 3.8, 3.0 / 4.2
    assert SoftDice(smooth=0)(logits, target).item() == pytest.approx(1 - foreground, rel=1e-5)
    assert SoftDice(True, smooth=0)(logits, target).item() == pytest.approx(1 - (foreground + background) / 2, rel=1e-5)
    assert SoftDice(smooth=1)(logits, target).item() == pytest.approx(1 - 3.6 / 4.8, rel=1e-5)
    # squared: 0.64 + 0.25 + 0.16 + 0.01 = 1.06
    assert SoftDice(squared=True, smooth=0)(logits, target).item() == pytest.approx(1 - 2.6 / 3.06, rel=1e-5)


def test_batch_dice_sums_over_the_batch():
    p = torch.tensor([[0.8, 0.4], [0.2, 0.6]])  # two samples of two voxels
    logits = torch.stack([1 - p, p], dim=1).log().reshape(2, 2, 1, 2)
    target = torch.tensor([[1, 0], [0, 0]]).reshape(2, 1, 1, 2)
    assert SoftDice(batch=True, smooth=0)(logits, target).item() == pytest.approx(1 - 1.6 / 3.0, rel=1e-5)
    assert SoftDice(smooth=0)(logits, target).item() == pytest.approx(1 - (1.6 / 2.2 + 0) / 2, rel=1e-5)


def test_absent_and_unpredicted_class_has_dice_one():
    logits = torch.zeros(1, 3, 2, 2)
    logits[:, 2] = -1e4
    target = torch.zeros(1, 1, 2, 2, dtype=torch.long)
    target[..., 0] = 1
    alone = 1 - (2 * 1.0) / (2 + 2)  # class 1: p = 1/2 everywhere
    assert SoftDice()(logits, target).item() == pytest.approx(alone / 2, rel=1e-4)


def test_region_losses_by_hand():
    p = torch.tensor([[0.9, 0.6, 0.2], [0.7, 0.3, 0.5]])  # two regions, three voxels, the last ignored
    g = torch.tensor([[1.0, 0.0, -1], [1.0, 1.0, -1]])
    logits, target = log_odds(p.tolist()).reshape(1, 2, 1, 3), g.reshape(1, 2, 1, 3)
    terms = [-math.log(x) for x in (0.9, 0.4, 0.7, 0.3)]
    bce = sum(terms) / 4
    dice = 1 - (1.8 / 2.5 + 2.0 / 3.0) / 2
    assert RegionBCE()(logits, target).item() == pytest.approx(bce, rel=1e-5)
    assert RegionDice(smooth=0)(logits, target).item() == pytest.approx(dice, rel=1e-5)
    assert RegionBCEDice(2, 0.5, smooth=0)(logits, target).item() == pytest.approx(2 * bce + 0.5 * dice, rel=1e-5)
    assert RegionFocal(0)(logits, target).item() == pytest.approx(bce, rel=1e-5)
    weights = [0.25 * 0.1**2, 0.75 * 0.6**2, 0.25 * 0.3**2, 0.25 * 0.7**2]
    focal = sum(w * t for w, t in zip(weights, terms, strict=True)) / 4
    assert RegionFocal(2, 0.25)(logits, target).item() == pytest.approx(focal, rel=1e-5)


def test_two_classes_and_one_region_agree():
    logits, _ = example(SoftDice())
    label = torch.randint(-1, 2, (2, 1, 3, 4, 5), generator=torch.Generator().manual_seed(1))
    margin = logits[:, 1:2] - logits[:, :1]
    for classes, region in [(SoftDice(), RegionDice()), (CrossEntropy(), RegionBCE()), (Focal(1.5), RegionFocal(1.5))]:
        assert classes(logits[:, :2], label).item() == pytest.approx(region(margin, label.float()).item(), rel=1e-5)


def test_compound_losses_are_the_weighted_sums():
    logits, target = example(DiceCE())
    dice = SoftDice(True, True, True, 0.1)(logits, target)
    ce, topk = CrossEntropy([1, 2, 3])(logits, target), TopK(0.2)(logits, target)
    got = DiceCE([1, 2, 3], 0.3, 0.7, True, True, True, 0.1)(logits, target)
    assert got.item() == pytest.approx((0.3 * dice + 0.7 * ce).item(), rel=1e-6)
    got = DiceTopK(0.2, 0.3, 0.7, True, True, True, 0.1)(logits, target)
    assert got.item() == pytest.approx((0.3 * dice + 0.7 * topk).item(), rel=1e-6)


def test_wrong_settings_are_named():
    logits, target = example(CrossEntropy())
    with pytest.raises(SuiteError, match="2 numbers, but the task has 3 classes"):
        CrossEntropy([1, 2])(logits, target)
    with pytest.raises(SuiteError, match="balanced"):
        CrossEntropy("balance")
    with pytest.raises(SuiteError, match="fraction=10"):
        TopK(10)


# top-k over regions


def ten_voxels():
    """One region of ten voxels; binary cross-entropies .6931 .1269 .1269 .0181 .0181 1.3133 1.3133 .0486 .0486 .4741."""
    logits = torch.tensor([0, 2, -2, 4, -4, 1, -1, 3, -3, 0.5]).reshape(1, 1, 10)
    return logits, torch.tensor([1.0, 1, 0, 1, 0, 0, 1, 1, 0, 1]).reshape(1, 1, 10)


@pytest.mark.parametrize(("share", "expected"), [(0.2, 1.3133), (0.3, 1.1066), (0.5, 0.7841), (1.0, 0.4181)])
def test_region_topk_by_hand(share, expected):
    logits, target = ten_voxels()
    assert RegionTopK(share)(logits, target).item() == pytest.approx(expected, abs=1e-4)
    assert RegionTopK(1.0)(logits, target).item() == pytest.approx(RegionBCE()(logits, target).item(), rel=1e-6)


def test_region_topk_moves_the_chosen_voxels_alone():
    logits, target = ten_voxels()
    logits.requires_grad_()
    (worst,) = torch.autograd.grad(RegionTopK(0.3)(logits, target), logits)
    (every,) = torch.autograd.grad(RegionBCE()(logits, target), logits)
    chosen = torch.zeros(10, dtype=torch.bool)
    chosen[[0, 5, 6]] = True
    assert torch.equal(worst[0, 0] != 0, chosen)
    assert torch.allclose(worst[0, 0, chosen], every[0, 0, chosen] * 10 / 3)


def test_region_topk_pools():
    logits = torch.tensor([[[0.0, 4], [-1, -3]], [[2, 2], [2, 2]]])  # (2 samples, 2 regions, 2 voxels), all of them true
    target = torch.ones_like(logits)
    losses = torch.nn.functional.softplus(-logits)
    assert RegionTopK(0.25)(logits, target).item() == pytest.approx(losses.flatten().topk(2).values.mean().item(), rel=1e-6)
    assert RegionTopK(0.25, "per_channel")(logits, target).item() == pytest.approx((losses[0, 0, 0] + losses[0, 1, 1]).item() / 2, rel=1e-6)
    assert RegionTopK(0.25, "per_sample")(logits, target).item() == pytest.approx((losses[0, 1, 1] + losses[1, 0, 0]).item() / 2, rel=1e-6)
    with pytest.raises(SuiteError, match=r"loss\.pool"):
        RegionTopK(0.25, "per_voxel")


def test_topk_falls_with_its_share_and_is_what_tells_the_compounds_apart():
    logits, target = example(RegionTopK())
    values = [RegionTopK(k)(logits, target).item() for k in (0.05, 0.1, 0.3, 0.6, 1.0)]
    assert values == sorted(values, reverse=True)
    difference = RegionTopKDice(0.1)(logits, target) - RegionBCEDice()(logits, target)
    assert difference.item() == pytest.approx((RegionTopK(0.1)(logits, target) - RegionBCE()(logits, target)).item(), rel=1e-5)
    weighed = RegionTopKDice(0.2, "per_sample", 0.3, 0.7, True, True, 0.1)(logits, target)
    parts = 0.3 * RegionTopK(0.2, "per_sample")(logits, target) + 0.7 * RegionDice(True, True, 0.1)(logits, target)
    assert weighed.item() == pytest.approx(parts.item(), rel=1e-6)


def test_batch_dice_by_hand():
    """A hits 8 of 10 and 10 voxels, B one false and one missed voxel: the mean Dice is 0.4, that of both together 16/22."""
    truth, drawn = torch.zeros(2, 1, 20), torch.zeros(2, 1, 20)
    truth[0, 0, :10], drawn[0, 0, 2:12] = 1, 1
    truth[1, 0, 0], drawn[1, 0, 1] = 1, 1
    logits = (drawn - 0.5) * 80
    assert RegionDice(smooth=0)(logits, truth).item() == pytest.approx(1 - 0.4, abs=1e-5)
    assert RegionDice(batch=True, smooth=0)(logits, truth).item() == pytest.approx(1 - 16 / 22, abs=1e-5)


def test_weights_of_the_heads_of_nnunet():
    heads = [torch.zeros(1, 1, 16 // 2**i) for i in range(4)]
    for size, weight in zip((16, 8, 4, 2), (0.5333, 0.2667, 0.1333, 0.0667), strict=True):
        loss = DeepSupervision(lambda logits, target, size=size: logits.new_tensor(float(logits.shape[-1] == size)))
        assert loss({"logits": heads[0], "deep": heads[1:]}, torch.zeros(1, 1, 16)).item() == pytest.approx(weight, abs=5e-5)


# deep supervision


def test_deep_supervision_by_hand():
    target = torch.zeros(1, 1, 4, 4, dtype=torch.long)
    target[..., 2:] = 1
    full, half, quarter = (torch.zeros(1, 2, n, n, requires_grad=True) for n in (4, 2, 1))
    with torch.no_grad():
        half[:, 1, :, 1] = math.log(3)  # right column: p = 3/4, the left one stays 1/2
    outputs = {"logits": full, "deep": [half, quarter]}
    coarse = (math.log(2) + math.log(4 / 3)) / 2
    expected = (4 * math.log(2) + 2 * coarse + math.log(2)) / 7
    loss = DeepSupervision(CrossEntropy())
    assert loss(outputs, target).item() == pytest.approx(expected, rel=1e-6)
    assert DeepSupervision(CrossEntropy(), [1, 3, 0])(outputs, target).item() == pytest.approx((math.log(2) + 3 * coarse) / 4, rel=1e-6)
    loss(outputs, target).backward()
    assert all((head.grad != 0).any() for head in (full, half, quarter))


def test_deep_supervision_keeps_ignored_and_region_masks():
    loss = DeepSupervision(RegionBCE())
    target = torch.full((1, 2, 4, 4), -1.0)
    target[:, 0, :, :2], target[:, 1, :, :2] = 1, 0
    half = torch.zeros(1, 2, 2, 2, requires_grad=True)
    loss({"logits": torch.zeros(1, 2, 4, 4), "deep": [half]}, target).backward()
    assert (half.grad[..., 1] == 0).all()
    assert (half.grad[0, :, :, 0].sign() == torch.tensor([[-1.0], [1.0]])).all()


def test_deep_supervision_never_mixes_target_values():
    seen = []

    class Record(torch.nn.Module):
        def forward(self, logits, target):
            seen.append(target)
            return logits.sum()

    target = torch.randint(-1, 2, (1, 2, 8, 6), generator=torch.Generator().manual_seed(0)).float()
    DeepSupervision(Record())({"logits": torch.zeros(1, 2, 8, 6), "deep": [torch.zeros(1, 2, 4, 3)]}, target)
    assert torch.equal(seen[0], target)
    corners = [target[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    assert any(torch.equal(seen[1], corner) for corner in corners)


def test_deep_supervision_without_heads_is_the_loss():
    for inner in (DiceCE(), RegionBCEDice()):
        logits, target = example(inner)
        loss = DeepSupervision(inner, [1, 0.5])
        assert loss.kind == inner.kind
        assert loss(logits, target) == inner(logits, target) == loss({"logits": logits, "features": None}, target)
    with pytest.raises(SuiteError, match="2 numbers, but the network returns 3 heads"):
        loss({"logits": logits, "deep": [logits, logits]}, target)


def configured(name, *overrides):
    with initialize_config_dir(str(CONF), version_base=None):
        return compose(overrides=[f"+model/loss={name}", *overrides]).model.loss


def test_the_deeply_supervised_loss_is_a_choice():
    loss = instantiate(configured("deep_supervision", "model/loss@model.loss.loss=region_bce_dice", "model.loss.loss.bce_weight=3"))
    assert isinstance(loss.loss, RegionBCEDice)
    assert loss.loss.bce_weight == 3
    assert loss.kind == "sigmoid"


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "model" / "loss").glob("*.yaml")))
def test_configured_losses(name):
    config = configured(name)
    loss = instantiate(config)
    assert loss.kind == ("sigmoid" if name.startswith("region") else "softmax")
    assert loss(*example(loss)) > 0
    if config.get("weights", 0) is None and name != "deep_supervision":
        config.weights = [1, 2, 4]
        assert instantiate(config)(*example(loss)) != loss(*example(loss))
