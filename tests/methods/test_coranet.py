"""CoraNet: formulas against numbers by hand, what each term's gradient reaches, masks, clock, deployment."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from lesionbench.checkpoint import build_method, initialize_from
from lesionbench.errors import SuiteError
from lesionbench.target import ClassSoftmax, RegionSigmoid
from lesionbench.task import Task
from lightning_modules import CoraNet, Supervised
from lightning_modules.inferers import SliceWise
from lightning_modules.losses import CrossEntropy, DiceCE, RegionBCE
from lightning_modules.losses.cost_sensitive import cost_cross_entropy, masked_consistency
from lightning_modules.networks import MultiHeadUNet, basic_unet
from lightning_modules.semi_supervised.certainty_masks import (
    Aleatoric,
    AugmentationMask,
    ConservativeRadical,
    DropoutMask,
    SoftmaxThreshold,
)
from tests.harness import composed

BINARY = Task(("image",), {"background": 0, "object": 1}, {"OBJECT": ("object",)})
THREE = Task(("image",), {"background": 0, "a": 1, "b": 2}, {"A": ("a",), "B": ("b",)})
UNET = partial(MultiHeadUNet, features=(4, 6), norm="instance")


def method(task=BINARY, network=UNET, **options):
    torch.manual_seed(0)
    regions = options.get("target") is RegionSigmoid
    defaults = {"mask": ConservativeRadical(), "loss": RegionBCE() if regions else CrossEntropy(), "inferer": SliceWise(4)}
    return CoraNet(task, network=network, optimizer=partial(torch.optim.Adam, lr=1e-2), **{**defaults, **options})


def labeled(task=BINARY, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {"image": torch.randn(2, 1, 8, 8, generator=g), "label": torch.randint(len(task.classes), (2, 1, 8, 8), generator=g)}


def unlabeled(task=BINARY, seed=1, share=0.3, channels=1):
    """Image, stored label and stored mask; the share of uncertain voxels is about that."""
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(len(task.classes), (2, 1, 8, 8), generator=g).to(torch.int8)
    uncertain = torch.rand(2, channels, 8, 8, generator=g) < share
    return {"image": torch.randn(2, 1, 8, 8, generator=g), "pseudo_label": label, "uncertain": uncertain}


COSTS = [(5.0, 1.0), (1.0, 5.0)]  # of background and object (Eq. 1)


def has_gradient(module):
    return any(p.grad is not None and (p.grad != 0).any() for p in module.parameters())


def parts(model):
    """Trunk, main head, conservative head, radical head."""
    network = model.network
    trunk = nn.ModuleList(child for name, child in network.named_children() if name != "branches")
    return trunk, *network.branches.heads


# masks


def maps_of(decisions):
    """Certain two-class maps (1, 2, n) with these decisions."""
    return nn.functional.one_hot(torch.tensor([decisions]), 2).movedim(-1, 1).float()


def test_uncertain_is_where_conservative_and_radical_decide_differently():
    mask = ConservativeRadical()
    con, rad = maps_of([0, 0, 1, 1]), maps_of([0, 1, 1, 1])
    uncertain = mask.uncertain({"conservative": con, "radical": rad}, "softmax")
    assert uncertain.tolist() == [[[False, True, False, False]]]
    assert torch.equal(mask.uncertain({"conservative": rad, "radical": con}, "softmax"), uncertain)


def test_every_region_has_a_mask_of_its_own():
    con = torch.tensor([[[0.1, 0.9, 0.2], [0.4, 0.6, 0.9]]])
    rad = torch.tensor([[[0.6, 0.9, 0.3], [0.4, 0.6, 0.1]]])
    uncertain = ConservativeRadical().uncertain({"conservative": con, "radical": rad}, "sigmoid")
    assert uncertain.tolist() == [[[True, False, False], [False, False, True]]]


def test_several_classes_under_a_softmax_are_uncertain_where_the_arg_max_differs():
    con = torch.tensor([[[0.5, 0.2], [0.3, 0.5], [0.2, 0.3]]])
    rad = torch.tensor([[[0.4, 0.2], [0.5, 0.3], [0.1, 0.5]]])
    assert ConservativeRadical().uncertain({"conservative": con, "radical": rad}, "softmax").tolist() == [[[True, True]]]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_thresholds_of_the_softmax(kind):
    p = torch.tensor([0.95, 0.75, 0.5, 0.3, 0.1])[None, None]
    maps = torch.cat([1 - p, p], dim=1) if kind == "softmax" else p
    assert SoftmaxThreshold(0.8).uncertain({"probabilities": maps}, kind)[0, 0].tolist() == [False, True, True, True, False]


# costs


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("cost", "optimum"), [((1, 1), 0.2), ((5, 1), 0.0476), ((1, 5), 0.5556)])
def test_the_best_constant_prediction_under_costs(kind, cost, optimum):
    """q w1 / (q w1 + (1 - q) w0) for a fifth of object pixels."""
    target = (torch.arange(10) < 2).long()[None, None]
    bias = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([bias], max_iter=50)

    def loss():
        optimizer.zero_grad()
        value = cost_cross_entropy(constant(bias, kind), target, *cost, kind)
        value.backward()
        return value

    optimizer.step(loss)
    assert float(bias.detach().sigmoid()) == pytest.approx(optimum, abs=1e-3)


def constant(bias, kind):
    logits = bias.expand(1, 1, 10)
    return torch.cat([torch.zeros_like(logits), logits], dim=1) if kind == "softmax" else logits


def test_conservative_decides_from_five_sixths_and_radical_from_one_sixth():
    """Heads fitted to known posteriors cross 1/2 there, so the conservative object lies in the radical one."""
    posterior = torch.tensor([0.1, 0.16, 0.18, 0.5, 0.8, 0.82, 0.85, 0.95])
    decisions = []
    for costs in ConservativeRadical(5).costs():
        logits = torch.zeros(8, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=100)

        def loss(costs=costs, logits=logits, optimizer=optimizer):
            optimizer.zero_grad()
            both = [  # every posterior as that share of object pixels
                share * cost_cross_entropy(z[None, None, None], torch.full((1, 1, 1), k), *costs, "sigmoid", by_weight=False)
                for z, p in zip(logits, posterior, strict=True)
                for k, share in ((1, p), (0, 1 - p))
            ]
            total = sum(both)
            total.backward()
            return total

        optimizer.step(loss)
        decisions.append(logits.detach() > 0)
    assert decisions[0].tolist() == (posterior > 5 / 6).tolist()
    assert decisions[1].tolist() == (posterior > 1 / 6).tolist()


def test_cost_cross_entropy_by_hand():
    logits = torch.zeros(1, 2, 4)
    logits[0, 1] = torch.tensor([math.log(3), 0.0, math.log(3), 0.0])  # p(object) 3/4, 1/2, 3/4, 1/2
    target = torch.tensor([[[1, 1, 0, -1]]])
    each = [math.log(4 / 3), math.log(2), 5 * math.log(4)]
    assert float(cost_cross_entropy(logits, target, 5, 1)) == pytest.approx(sum(each) / 7)
    assert float(cost_cross_entropy(logits, target, 5, 1, by_weight=False)) == pytest.approx(sum(each) / 3)
    sigmoid = (logits[:, 1:] - logits[:, :1], target)
    assert float(cost_cross_entropy(*sigmoid, 5, 1, "sigmoid")) == pytest.approx(sum(each) / 7)


def test_masked_consistency_by_hand():
    student, teacher = torch.tensor([[[0.2, 0.5], [0.8, 0.5]]]), torch.tensor([[[0.5, 0.4], [0.5, 0.6]]])
    mask = torch.tensor([[[True, False]]])
    whole, inside = 2 * 0.09 + 2 * 0.01, 2 * 0.09
    assert float(masked_consistency(student, teacher)) == pytest.approx(whole / 2)
    assert float(masked_consistency(student, teacher, mask)) == pytest.approx(inside / 2)
    assert float(masked_consistency(student, teacher, mask, norm="mask")) == pytest.approx(inside)
    for norm in ("all_pixels", "mask"):
        assert float(masked_consistency(student, teacher, mask & False, norm=norm)) == 0
    region = masked_consistency(student[:, 1:], teacher[:, 1:], mask, "sigmoid")  # a region is the two classes that it is
    assert float(region) == pytest.approx(inside / 2)


# gradients


def test_supervised_loss_reaches_every_head():
    model = method()
    batch = labeled()
    loss = model.supervised(model.network(batch["image"]), batch)
    out = model.network(batch["image"])
    label = batch["label"]
    each = [
        nn.functional.cross_entropy(z, label[:, 0], torch.tensor(w), reduction="none") for z, w in zip(out["heads"], COSTS, strict=True)
    ]
    torch.testing.assert_close(loss, nn.functional.cross_entropy(out["logits"], label[:, 0]) + sum(e.mean() for e in each))
    loss.backward()
    assert all(has_gradient(part) for part in parts(model))
    assert not has_gradient(model.teacher)


def test_costs_are_not_divided_by_their_sum_unless_asked():
    """Of a slice that is all background the conservative head's loss is five times the main one's, as in Eq. 1; divided by the weights, equal."""
    batch = {**labeled(), "label": torch.zeros(2, 1, 8, 8, dtype=torch.long)}
    logits = torch.randn(2, 2, 8, 8)
    plain = nn.functional.cross_entropy(logits, batch["label"][:, 0])
    for cost_norm, factor in (("voxels", 1 + 5 + 1), ("weights", 3)):
        model = method(cost_norm=cost_norm)
        torch.testing.assert_close(model.supervised({"logits": logits, "heads": [logits, logits]}, batch), factor * plain)


@pytest.mark.parametrize("term", ["self_training", "consistency"])
@pytest.mark.parametrize("heads", ["main", "all"])
def test_terms_on_unlabeled_images_reach_the_main_head_only_unless_asked(term, heads):
    model = method(certain_heads=heads, uncertain_heads=heads)
    with torch.no_grad():
        for p in model.teacher.parameters():
            p.mul_(0.9)  # otherwise the teacher agrees and there is nothing to learn from it
    batch = unlabeled()
    getattr(model, term)(model.network(batch["image"]), batch).backward()
    trunk, main, *others = parts(model)
    assert has_gradient(trunk)
    assert has_gradient(main)
    assert all(has_gradient(head) == (heads == "all") for head in others)
    assert not has_gradient(model.teacher)
    assert all(p.grad is None for head in others for p in head.parameters()) == (heads == "main")


@pytest.mark.parametrize(("task", "target", "channels"), [(BINARY, ClassSoftmax, 1), (THREE, ClassSoftmax, 1), (THREE, RegionSigmoid, 2)])
def test_self_training_sees_certain_pixels_only(task, target, channels):
    model, batch = method(task, target=target), unlabeled(task, channels=channels)
    logits = torch.randn(2, model.target.out_channels, 8, 8, requires_grad=True)
    model.self_training(logits, batch).backward()
    uncertain = batch["uncertain"].expand_as(logits)
    assert (logits.grad[uncertain] == 0).all()
    assert (logits.grad[~uncertain] != 0).all()


def test_self_training_is_the_mean_over_certain_pixels():
    model, batch = method(), unlabeled()
    logits = torch.randn(2, 2, 8, 8)
    each = nn.functional.cross_entropy(logits, batch["pseudo_label"][:, 0].long(), reduction="none")
    torch.testing.assert_close(model.self_training(logits, batch), each[~batch["uncertain"][:, 0]].mean())
    model.certain = "all"
    torch.testing.assert_close(model.self_training(logits, batch), each.mean())


@pytest.mark.parametrize(
    ("choice", "inside", "outside"), [("uncertain_only", True, False), ("certain_only", False, True), ("all", True, True)]
)
def test_consistency_sees_the_pixels_it_is_told_to(choice, inside, outside):
    model, batch = method(uncertain=choice), unlabeled()
    with torch.no_grad():
        for p in model.teacher.parameters():
            p.mul_(0.5)
    logits = torch.randn(2, 2, 8, 8, requires_grad=True)
    model.consistency(logits, batch).backward()
    where = batch["uncertain"].expand_as(logits)
    assert (logits.grad[where] != 0).all() == inside
    assert (logits.grad[where] == 0).all() != inside
    assert (logits.grad[~where] != 0).all() == outside
    assert (logits.grad[~where] == 0).all() != outside


def test_an_empty_mask_and_a_full_one_give_zero_and_stay_finite():
    model, batch = method(certain_heads="all"), unlabeled()
    for value, term in [(True, "self_training"), (False, "consistency")]:
        batch["uncertain"] = torch.full((2, 1, 8, 8), value)
        model.zero_grad()
        loss = getattr(model, term)(model.network(batch["image"]), batch)
        assert loss.item() == 0
        loss.backward()
        assert not has_gradient(model.network)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_swapped_costs_of_the_other_heads_by_hand():
    batch = unlabeled()
    for swapped, costs in [("same", [(5, 1), (1, 5)]), ("swapped", [(1, 5), (5, 1)])]:
        model = method(certain_heads="all", pseudo_weights=swapped)
        out = model.network(batch["image"])
        target = batch["pseudo_label"].long().masked_fill(batch["uncertain"], -1)
        certain = target[:, 0] != -1
        expected = nn.functional.cross_entropy(out["logits"], target[:, 0], ignore_index=-1)
        for logits, (w0, w1) in zip(out["heads"], costs, strict=True):
            each = nn.functional.cross_entropy(logits, target[:, 0], torch.tensor([w0, w1]).float(), ignore_index=-1, reduction="none")
            expected = expected + each.sum() / certain.sum()
        torch.testing.assert_close(model.self_training(out, batch), expected)


def test_two_classes_are_the_same_problem_under_a_softmax_and_as_a_region():
    """With logits 0 and z under the softmax, and z under the sigmoid."""
    g = torch.Generator().manual_seed(3)
    z, batch = torch.randn(2, 1, 8, 8, generator=g), unlabeled()
    classes, region = method(), method(target=RegionSigmoid)
    both = torch.cat([torch.zeros_like(z), z], dim=1)
    torch.testing.assert_close(classes.self_training(both, batch), region.self_training(z, batch))
    answer = torch.randn(2, 1, 8, 8, generator=g)
    pair = torch.cat([torch.zeros_like(answer), answer], dim=1)
    classes.teacher.forward, region.teacher.forward = (lambda image: pair), (lambda image: answer)
    torch.testing.assert_close(classes.consistency(both, batch), region.consistency(z, batch))
    heads = {"logits": z, "heads": [2 * z, -z]}
    double = {"logits": both, "heads": [2 * both, -both]}
    label = labeled()
    torch.testing.assert_close(classes.supervised(double, label), region.supervised(heads, label))


def test_consistency_over_all_heads_is_their_mean():
    model, batch = method(uncertain_heads="all", uncertain="all"), unlabeled()
    with torch.no_grad():
        for p in model.teacher.parameters():
            p.mul_(0.5)
    out, answer = model.network(batch["image"]), model.teacher(batch["image"])
    pairs = [(out["logits"], answer["logits"]), *zip(out["heads"], answer["heads"], strict=True)]
    each = [(s.softmax(1) - t.softmax(1)).square().sum(1).mean() for s, t in pairs]
    torch.testing.assert_close(model.consistency(out, batch), sum(each) / 3)


def test_noise_is_on_the_teacher_s_images_only():
    model, batch = method(uncertain="all", noise=0.3), unlabeled()
    clean, noisy = (model.network(x)["logits"].softmax(1) for x in (batch["image"], model.noisy(batch["image"], "teacher", 0.3, 0.6)))
    expected = (clean - noisy).square().sum(1).mean()
    assert expected > 0
    torch.testing.assert_close(model.consistency(model.network(batch["image"]), batch), expected)


# teacher


def test_teacher_follows_by_the_rate_without_a_warm_up():
    model = method()
    with torch.no_grad():
        for p in model.teacher.network.parameters():
            p.zero_()
        for p in model.network.parameters():
            p.fill_(1.0)
    model.teacher.update()
    assert all(torch.allclose(p, torch.tensor(0.01)) for p in model.teacher.network.parameters())
    model.teacher.update()
    assert all(torch.allclose(p, torch.tensor(0.0199)) for p in model.teacher.network.parameters())


@pytest.mark.parametrize("reset", [True, False])
def test_teacher_starts_as_a_copy_of_the_pretrained_student(reset):
    model = method(reset_teacher=reset)
    with torch.no_grad():
        for p in model.network.parameters():
            p.add_(1.0)
    model.on_warm_start_end()
    same = [torch.equal(a, b) for a, b in zip(model.network.parameters(), model.teacher.network.parameters(), strict=True)]
    assert all(same) == reset


# alpha = 1


@pytest.mark.parametrize(("alpha", "identical", "empty"), [(1, True, True), (1, False, False), (5, True, False)])
def test_equal_costs_and_equal_heads_never_disagree(alpha, identical, empty):
    model = method(mask=ConservativeRadical(alpha))
    heads = model.network.branches.heads
    if identical:
        heads[2].load_state_dict(heads[1].state_dict())
    optimizer, batch = torch.optim.Adam(model.network.parameters(), 1e-2), labeled()
    for _ in range(5):
        optimizer.zero_grad()
        model.supervised(model.network(batch["image"]), batch).backward()
        optimizer.step()
    model.eval()
    uncertain = model.mask.uncertain(model.mask.maps(model, torch.randn(4, 1, 8, 8)), "softmax")
    assert bool(uncertain.any()) != empty


# other masks


def eval_method(mask, network=UNET, **options):
    return method(mask=mask, network=network, **options).eval()


@torch.no_grad()
def test_dropout_mask_is_the_mean_of_passes():
    model = eval_method(DropoutMask(0.8, passes=3), partial(UNET, dropout=0.5))
    image = torch.randn(1, 1, 8, 8)
    torch.manual_seed(1)
    maps = model.mask.maps(model, image)
    assert torch.equal(maps["probabilities"], model.network(image).softmax(1))
    model.network.bottom.train()
    model.network.branches.heads[0][-2].train()
    torch.manual_seed(1)
    torch.testing.assert_close(maps["mean"], sum(model.network(image).softmax(1) for _ in range(3)) / 3)


class Pointwise(nn.Module):
    """A branched network that answers for every pixel alone: whatever is undone rightly leaves no trace."""

    def __init__(self, in_channels, out_channels, *, heads=1, dimensions=2):
        super().__init__()
        from lightning_modules.networks.contract import describe
        from lightning_modules.networks.multi_head import Heads

        describe(self, dimensions, 4)
        self.branches = Heads(lambda: (nn.Conv2d, nn.Conv3d)[dimensions - 2](in_channels, out_channels, 1), heads)

    def forward(self, image):
        return self.branches(image)


@torch.no_grad()
@pytest.mark.parametrize("dimensions", [2, 3])
def test_augmentation_mask_undoes_what_it_does(dimensions):
    network = partial(Pointwise, dimensions=dimensions)
    flat = torch.full((2, 1, *[16] * dimensions), 0.7)
    ramp = torch.linspace(-3, 3, 16).view(-1, *[1] * (dimensions - 1)).expand_as(flat)
    for mask in (AugmentationMask(passes=4, scale=None), AugmentationMask(passes=4, scale=None, flip=False, crop=0.5)):
        model = eval_method(mask, network)
        maps = mask.maps(model, ramp)  # mirroring and boxes are undone to the last pixel
        torch.testing.assert_close(maps["mean"], maps["probabilities"])
    mask = AugmentationMask(passes=4)
    maps = mask.maps(eval_method(mask, network), flat)
    torch.testing.assert_close(maps["mean"], maps["probabilities"])
    model = eval_method(mask, network)
    assert not torch.equal(mask.maps(model, ramp)["mean"], mask.maps(model, ramp)["probabilities"])  # scaling is not free


@torch.no_grad()
def test_augmentation_mask_counts_each_pixel_by_its_own_passes():
    mask = AugmentationMask(passes=7, flip=False, scale=None, crop=0.5)
    model = eval_method(mask, Pointwise)
    seen = []
    model.network.branches.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape[2:])))
    maps = mask.maps(model, torch.randn(1, 1, 16, 24))
    assert seen == [(16, 24), *[(8, 12)] * 7]
    torch.testing.assert_close(maps["mean"].sum(1), torch.ones(1, 16, 24))


def test_aleatoric_head_without_spread_is_cross_entropy_and_certain():
    for target in (ClassSoftmax, RegionSigmoid):
        model, batch = method(mask=Aleatoric(samples=4), target=target), labeled()
        assert len(model.network.branches.heads) == 2
        encoded = model.training_target(batch)
        logits = torch.randn(2, model.target.out_channels, 8, 8)
        still = {"logits": logits, "heads": [torch.full_like(logits, -40.0)]}
        torch.testing.assert_close(model.mask.head_loss(model, still, encoded), model.loss(logits, encoded))
        wide = {"logits": logits, "heads": [torch.full_like(logits, 5.0)]}
        assert float(model.mask.head_loss(model, wide, encoded)) != pytest.approx(float(model.loss(logits, encoded)), rel=1e-3)
        for out, certain in ((still, True), (wide, False)):
            fixed = SimpleNamespace(network=Fixed(out), target=model.target)
            share = model.mask.uncertain(model.mask.maps(fixed, batch["image"]), model.target.kind).float().mean()
            assert (share == 0) if certain else (share > 0.9)


class Fixed(nn.Module):
    """Says the same whatever it sees."""

    def __init__(self, output):
        super().__init__()
        self.output, self.branches = output, SimpleNamespace(every=None)

    def forward(self, image):
        return self.output


def test_aleatoric_loss_by_hand():
    """Two samples of one pixel: minus the logarithm of the mean probability."""
    model = method(mask=Aleatoric(samples=2))
    logits, sigma = torch.tensor([[[[0.3]], [[-0.2]]]]), torch.full((1, 2, 1, 1), 0.5)
    generator = model.generator("aleatoric")
    drawn = [logits + nn.functional.softplus(sigma) * torch.randn(logits.shape, generator=generator) for _ in range(2)]
    expected = -sum(z.softmax(1)[0, 1, 0, 0] for z in drawn).div(2).log()
    got = model.mask.head_loss(model, {"logits": logits, "heads": [sigma]}, torch.ones(1, 1, 1, 1, dtype=torch.long))
    torch.testing.assert_close(got, expected)


# the method as a whole


def test_terms_that_are_left_out_cost_nothing():
    calls = []
    for options in ({"certain": "none", "uncertain": "none"}, {"weights": {"certain": 0, "uncertain": 0}}):
        model = method(**options)
        model.teacher.forward = lambda image: calls.append(image)
        assert set(model.losses(labeled(), unlabeled())) == {"supervised"}
    assert not calls
    assert set(method().losses(labeled(), unlabeled())) == {"supervised", "certain", "uncertain"}
    bare = {"image": unlabeled()["image"]}  # before the first labeling
    assert set(method().losses(labeled(), bare)) == {"supervised"}
    assert set(method(uncertain="all").losses(labeled(), bare)) == {"supervised", "uncertain"}


def test_without_rivals_it_is_supervised_training():
    """No further heads and no further terms: the loss of `Supervised` to the last bit."""
    model = method(mask=SoftmaxThreshold(), certain="none", uncertain="none")
    plain = Supervised(BINARY, network=UNET, loss=CrossEntropy(), inferer=SliceWise(4))
    plain.network.load_state_dict(model.network.state_dict())
    batch = labeled()
    assert torch.equal(model.total(model.losses(batch, unlabeled())), plain.compute_loss(batch))


def case(seed=5):
    return {"image": torch.randn(1, 1, 12, 8, 3, generator=torch.Generator().manual_seed(seed))}


@torch.no_grad()
@pytest.mark.parametrize(("task", "target", "channels"), [(BINARY, ClassSoftmax, 1), (THREE, RegionSigmoid, 2)])
def test_maps_of_a_case_are_the_decisions_of_its_heads(task, target, channels):
    model = method(task, target=target).eval()
    batch = case()
    maps = model.case_maps(batch)
    assert maps["pseudo_label"].shape == (1, 12, 8, 3)
    assert maps["uncertain"].shape == (channels, 12, 8, 3)
    assert maps["uncertain"].dtype == torch.bool
    assert torch.equal(maps["pseudo_label"][0], model.predict_case(batch).labels)
    model.network.branches.every = True
    out = model.network(batch["image"][..., 1])
    con, rad = (model.target.activate(z) for z in out["heads"])
    expected = con.argmax(1) != rad.argmax(1) if channels == 1 else (con > 0.5) != (rad > 0.5)
    assert torch.equal(maps["uncertain"][..., 1], expected[0] if channels > 1 else expected)


@torch.no_grad()
def test_deployed_without_the_other_heads_it_says_the_same(tmp_path):
    model = method(loss=DiceCE()).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "full.ckpt")
    plain = Supervised(BINARY, network=UNET, loss=DiceCE(), inferer=SliceWise(4)).eval()
    report = initialize_from(plain, tmp_path / "full.ckpt")
    assert "branches.heads.1" in report
    assert "not in the checkpoint" not in report
    whole, lean = model.predict_case(case()), plain.predict_case(case())
    assert torch.equal(whole.regions, lean.regions)
    assert torch.equal(whole.labels, lean.labels)
    assert sum(p.numel() for p in plain.parameters()) < sum(p.numel() for p in model.network.parameters())


@torch.no_grad()
def test_members_show_the_heads_and_where_they_disagree():
    plain = method().eval().predict_case(case())
    assert not plain.members
    assert not plain.uncertainty
    prediction = method(predict_members=True).eval().predict_case(case())
    assert set(prediction.members) == {"student", "teacher", "conservative", "radical"}
    assert torch.equal(prediction.regions, plain.regions)
    differ = prediction.members["conservative"].labels != prediction.members["radical"].labels
    assert torch.equal(prediction.uncertainty["disagreement"], differ.float())
    assert differ.any()


def test_wrong_options_are_named():
    for option, value in [
        ("certain", "maskd"),
        ("uncertain", "al"),
        ("norm", "masks"),
        ("update", "jont"),
        ("cost_norm", "voxel"),
        ("pseudo_weights", "swaped"),
    ]:
        with pytest.raises(SuiteError, match=rf"model\.{option}.*did you mean"):
            method(**{option: value})
    with pytest.raises(SuiteError, match="multi_head_unet"):
        method(network=partial(basic_unet, dimensions=2))
    with pytest.raises(SuiteError, match="model/mask=xor"):
        method(mask=SoftmaxThreshold(), certain_heads="all")
    with pytest.raises(SuiteError, match="update=joint"):
        method(update="alternating", accumulate=2)
    with pytest.raises(SuiteError, match=r"network\.dropout=0\.5"):  # before the training, not after the pretraining
        method(mask=DropoutMask())
    for make, text in [
        (lambda: ConservativeRadical(0.5), "alpha=0.5"),
        (lambda: SoftmaxThreshold(0.3), "threshold=0.3"),
        (lambda: DropoutMask(passes=0), "passes=0"),
        (lambda: AugmentationMask(scale=[1.2, 0.8]), "scale="),
        (lambda: AugmentationMask(crop=1.5), "crop=1.5"),
        (lambda: Aleatoric(samples=1), "samples=1"),
    ]:
        with pytest.raises(SuiteError, match=text):
            make()


# configurations


def built(*overrides, task=BINARY):
    cfg = composed("experiment=coranet/blobs", *overrides)
    with torch.device("meta"):
        return build_method(OmegaConf.to_container(cfg.model, resolve=True), task)


def test_presets_are_the_paper_s_and_the_code_s():
    paper = composed("experiment=coranet/pancreas").model
    code = composed("experiment=coranet/left_atrium").model
    assert (paper["update"], paper.norm, paper.certain_heads, paper.uncertain_heads) == ("alternating", "all_pixels", "main", "main")
    assert (code["update"], code.norm, code.certain_heads, code.uncertain_heads, code.pseudo_weights) == (
        "joint",
        "mask",
        "all",
        "all",
        "swapped",
    )
    assert (paper.cost_norm, code.cost_norm) == ("voxels", "weights")
    assert (code.supervised_weight, code.weights.certain, code.weights.uncertain) == (1 / 4, 0.5 / 4, 0.5 * 0.1)
    assert (code.ramp.uncertain.shape, code.ramp.uncertain.length, code.reset_teacher) == ("gaussian", 0.2, False)
    assert (code.optimizer.lr, list(code.optimizer.betas), code.relabel_every) == (1e-3, [0.5, 0.999], 5)
    with torch.device("meta"):
        model = build_method(OmegaConf.to_container(code, resolve=True), Task(("mri",), {"background": 0, "LA": 1}, {"LA": ("LA",)}))
    assert sum(p.numel() for p in model.network.parameters()) == 9_457_190


@pytest.mark.parametrize(
    ("experiment", "epochs", "pretraining"), [("pancreas", 130, 30), ("pancreas_3d", 230, 30), ("left_atrium", 260, 60)]
)
def test_the_share_of_pretraining_is_the_published_one(experiment, epochs, pretraining):
    cfg = composed(f"experiment=coranet/{experiment}")
    assert cfg.epochs == epochs
    model = built(f"model.warm_start={cfg.model.warm_start}")
    model._trainer = SimpleNamespace(num_training_batches=7, max_epochs=epochs)
    assert model.warm_iterations == 7 * pretraining


TABLE_IV = {  # Section IV-D and Table IV: which pixels each term learns from
    "seg": ("none", "none"),
    "st": ("all", "none"),
    "st_mask": ("masked", "none"),
    "mt": ("none", "all"),
    "mt_mask": ("none", "certain_only"),
    "all": ("masked", "uncertain_only"),
}


@pytest.mark.parametrize("row", TABLE_IV)
def test_rows_of_table_iv(row):
    model = built("sweep=coranet_table4", f"row={row}")
    with_maps = {"image": 0, "pseudo_label": 0, "uncertain": 0}
    terms = {
        "seg": [],
        "st": ["certain"],
        "st_mask": ["certain"],
        "mt": ["uncertain"],
        "mt_mask": ["uncertain"],
        "all": ["certain", "uncertain"],
    }
    assert model._wanted(with_maps) == terms[row]
    assert (model.certain, model.uncertain) == TABLE_IV[row]


@pytest.mark.parametrize(
    ("row", "kind", "heads"),
    [("xor", ConservativeRadical, 3), ("softmax_threshold", SoftmaxThreshold, 1), ("tta", AugmentationMask, 1), ("mc_dropout", DropoutMask, 1),
     ("aleatoric", Aleatoric, 2)],
)  # fmt: skip
def test_rows_of_table_vi(row, kind, heads):
    for experiment in ("coranet/blobs",) if row != "tta" else ("coranet/blobs", "coranet/left_atrium", "coranet/acdc"):
        cfg = composed(f"experiment={experiment}", "sweep=coranet_table6", f"row={row}")
        with torch.device("meta"):
            model = build_method(OmegaConf.to_container(cfg.model, resolve=True), BINARY)
        assert type(model.mask) is kind
        assert len(model.network.branches.heads) == heads


def test_rows_of_table_viii():
    assert [built("sweep=coranet_table8", f"model.mask.alpha={a}").mask.costs()[0][0] for a in (1, 2, 5, 10)] == [1, 2, 5, 10]
