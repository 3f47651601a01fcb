"""The baselines of semi-supervised learning: each term against numbers worked out otherwise, and which networks get gradients."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lesionbench.errors import SuiteError
from lesionbench.maps import MapStore
from lesionbench.target import RegionSigmoid
from lesionbench.task import IGNORE, Task
from lightning_modules import (
    UAMT,
    CopyPaste,
    CrossPseudoSupervision,
    EntropyMinimization,
    MeanTeacher,
    PiModel,
    PseudoLabel,
    TemporalEnsembling,
    VirtualAdversarialTraining,
)
from lightning_modules.components import largest_component
from lightning_modules.inferers import SliceWise
from lightning_modules.losses import VAT, CrossEntropy, RegionDice
from lightning_modules.losses.gated_consistency import FixedShare
from lightning_modules.semi_supervised.copy_paste import largest_components
from lightning_modules.semi_supervised.mixing import box_mask, halves, mix

TASK = Task(("image",), {"background": 0, "blob": 1}, {"BLOB": ("blob",)}, unit="vox")


def linear(in_channels: int = 1, out_channels: int = 2) -> nn.Module:
    return nn.Conv2d(in_channels, out_channels, 1)


def method(kind, **options):
    torch.manual_seed(0)
    defaults = {"network": linear, "loss": CrossEntropy(), "inferer": SliceWise(), "optimizer": partial(torch.optim.SGD, lr=0.1)}
    module = kind(TASK, **{**defaults, **options})
    module._trainer = SimpleNamespace(num_training_batches=10, max_epochs=4, global_rank=0)
    return module


@pytest.fixture
def labeled():
    g = torch.Generator().manual_seed(1)
    return {"image": torch.randn(2, 1, 6, 6, generator=g), "label": torch.randint(0, 2, (2, 1, 6, 6), generator=g)}


@pytest.fixture
def unlabeled():
    return {"image": torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(2))}


def gradients(module, loss) -> set[str]:
    """Names of the networks (attributes of the method) that the loss reaches."""
    module.zero_grad()
    loss.backward()
    return {name.split(".")[0] for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


CASES = {
    "pseudo_label": (PseudoLabel, {}, "pseudo"),
    "pi_model": (PiModel, {}, "consistency"),
    "mean_teacher": (MeanTeacher, {}, "consistency"),
    "ua_mt": (UAMT, {"gate": FixedShare(1.0)}, "consistency"),
    "vat": (VirtualAdversarialTraining, {"vat": VAT}, "vat"),
    "cps": (CrossPseudoSupervision, {}, "cps"),
    "entropy": (EntropyMinimization, {}, "entropy"),
    "copy_paste": (CopyPaste, {}, "pseudo"),
}
STUDENTS = {"cps": {"network", "second"}}


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_students_and_never_a_teacher(name, labeled, unlabeled):
    kind, options, term = CASES[name]
    module = method(kind, **options)
    if hasattr(module, "teacher"):
        nn.init.normal_(module.teacher.network.weight)
    terms = module.losses(labeled, unlabeled)
    assert set(terms) == {"supervised", term}
    students = STUDENTS.get(name, {"network"})
    assert gradients(module, terms["supervised"]) == students
    assert gradients(module, module.losses(labeled, unlabeled)[term]) == students
    assert all(p.grad is None for n, p in module.named_parameters() if n.startswith("teacher"))


@pytest.mark.parametrize("name", [n for n in CASES if n != "copy_paste"])
def test_without_its_term_a_method_is_the_supervised_one(name, labeled, unlabeled):
    kind, options, term = CASES[name]
    noise = {"noise": 0.0} if kind in (PiModel, MeanTeacher, UAMT) else {}
    module = method(kind, weights={term: 0}, **options, **noise)
    terms = module.losses(labeled, unlabeled)
    assert set(terms) == {"supervised"}
    expected = sum(module.loss(n(labeled["image"]), labeled["label"]) for n in module.students().values())
    assert torch.allclose(terms["supervised"], expected)


@pytest.mark.parametrize("name", [n for n in CASES if n != "vat"])
def test_regions_do_as_well_as_classes(name, labeled, unlabeled):
    kind, options, term = CASES[name]
    module = method(kind, target=RegionSigmoid, loss=RegionDice(), **options)
    loss = module.losses(labeled, unlabeled)[term]
    assert loss.isfinite()
    assert gradients(module, loss) == STUDENTS.get(name, {"network"})


# pseudo-label


def test_pseudo_labels_are_the_hard_answers(labeled, unlabeled):
    module = method(PseudoLabel)
    logits = module.network(unlabeled["image"])
    expected = F.cross_entropy(logits, logits.argmax(1))
    assert torch.allclose(module.losses(labeled, unlabeled)["pseudo"], expected)


def test_uncertain_voxels_are_left_out():
    module = method(PseudoLabel, threshold=0.8)
    logits = torch.tensor([[[[2.0, 0.1]], [[0.0, 0.0]]]])  # probabilities .88 and .52
    assert module._pseudo(logits, {}).tolist() == [[[[0, IGNORE]]]]
    with pytest.raises(SuiteError, match="threshold"):
        method(PseudoLabel, threshold=1.0)


def test_stored_labels_wait_until_they_are_there(labeled, unlabeled):
    module = method(PseudoLabel, labels="stored")
    assert set(module.losses(labeled, unlabeled)) == {"supervised"}
    stored = {**unlabeled, "pseudo_label": torch.ones(3, 1, 6, 6, dtype=torch.int8)}
    expected = F.cross_entropy(module.network(unlabeled["image"]), torch.ones(3, 6, 6, dtype=torch.long))
    assert torch.allclose(module.losses(labeled, stored)["pseudo"], expected)


# consistency


def test_pi_model_by_hand(labeled, unlabeled):
    module = method(PiModel)
    image = torch.cat([labeled["image"], unlabeled["image"]])
    first, second = (module.network(module.noisy(image, n)).softmax(1) for n in ("first pass", "second pass"))
    expected = (first - second).square().sum() / first.numel()
    assert torch.allclose(module.losses(labeled, unlabeled)["consistency"], expected)
    assert module.losses(labeled, unlabeled)["consistency"] > 0
    assert method(PiModel, noise=0.0).losses(labeled, unlabeled)["consistency"] == 0


def test_mean_teacher_by_hand(labeled, unlabeled):
    module = method(MeanTeacher, noise=0.0)
    assert module.losses(labeled, unlabeled)["consistency"] == 0  # teacher = student, the same input
    nn.init.constant_(module.teacher.network.weight, 0.5)
    image = torch.cat([labeled["image"], unlabeled["image"]])
    difference = module.network(image).softmax(1) - module.teacher.network(image).softmax(1)
    assert torch.allclose(module.losses(labeled, unlabeled)["consistency"], difference.square().sum(1).mean())


def test_mean_teacher_and_student_each_have_their_own_noise(labeled, unlabeled):
    module = method(MeanTeacher, noise=0.3)
    image = torch.cat([labeled["image"], unlabeled["image"]])
    f, g = (module.network(module.noisy(image, name, 0.3, 0.6)).softmax(1) for name in ("student", "teacher"))
    assert (f - g).square().sum() > 0  # the weights are still the same
    assert torch.allclose(module.losses(labeled, unlabeled)["consistency"], (f - g).square().sum(1).mean())


def test_ua_mt_counts_certain_voxels_only(labeled, unlabeled):
    """Against sum I(u < H) |f' - f|^2 / sum I(u < H) of each image, with u from the mean of the passes."""
    module = method(UAMT, noise=0.0, passes=2, gate=FixedShare(0.5))
    with torch.no_grad():
        module.teacher.network.weight[0], module.teacher.network.weight[1] = 3, -3
    image = torch.cat([labeled["image"], unlabeled["image"]])
    f, g = module.network(image).softmax(1), module.teacher.network(image).softmax(1)
    certain = -(g * g.log()).sum(1) < 0.5 * math.log(2)
    assert 0 < certain.sum() < certain.numel()
    each = [((f - g).square().sum(1)[i][certain[i]]).sum() / certain[i].sum() for i in range(5)]
    assert torch.allclose(module.losses(labeled, unlabeled)["consistency"], torch.stack(each).mean())


def test_ua_mt_threshold_rises_with_training():
    module = method(UAMT, noise=0.0, passes=1)
    nn.init.zeros_(module.teacher.network.weight)
    nn.init.zeros_(module.teacher.network.bias)
    with torch.no_grad():
        module.teacher.network.bias[0] = 0.5  # entropy 0.663 of at most 0.693
    image = torch.zeros(1, 1, 2, 2)
    assert not module.certainty_mask(image).any()  # H = 3/4 (and a little) of 0.693
    module.iteration = 40
    assert module.certainty_mask(image).all()


def test_temporal_ensemble_is_the_corrected_average(tmp_path, unlabeled, labeled):
    module = method(TemporalEnsembling, alpha=0.6, noise=0.0)
    store = MapStore(tmp_path)
    module._trainer.datamodule = SimpleNamespace(maps=store)
    case = {"image": torch.zeros(1, 1, 4, 4, 2), "case": ["a"]}
    answers, average = [], 0.0
    for t, bias in enumerate([0.0, 2.0, -1.0], start=1):
        nn.init.zeros_(module.network.bias)
        with torch.no_grad():
            module.network.bias[1] = bias
        module.labelings += 1
        with torch.no_grad():
            found = module.case_maps(case)["ensemble"]
        store.write("ensemble", "a", found.numpy())
        store.commit("ensemble")
        answers.append(1 / (1 + math.exp(-bias)))
        average = 0.6 * average + 0.4 * answers[-1]
        assert found.shape == (2, 4, 4, 2)
        assert float(found[1].mean()) == pytest.approx(average / (1 - 0.6**t), abs=2e-3)
    assert set(module.losses(labeled, unlabeled)) == {"supervised"}
    z = torch.full((3, 2, 6, 6), 0.5).half()
    loss = module.losses(labeled, {**unlabeled, "ensemble": z})["consistency"]
    error = (module.network(unlabeled["image"]).softmax(1) - 0.5).square()
    assert torch.allclose(loss, error.mean())
    z[..., 3:] = 0  # beyond the border of the volume
    outside = module.losses(labeled, {**unlabeled, "ensemble": z})["consistency"]
    assert torch.allclose(outside, error[..., :3].mean())
    assert gradients(module, loss) == {"network"}


# others


def test_vat_needs_no_label_and_covers_both_batches(labeled, unlabeled):
    asked = []

    class Recorded(VAT):
        def forward(self, network, image, reference=None, **more):
            asked.append((image, reference))
            return super().forward(network, image, reference, **more)

    module = method(VirtualAdversarialTraining, vat=Recorded)
    assert module.losses(labeled, unlabeled)["vat"] > 0
    ((image, reference),) = asked
    assert torch.equal(image, torch.cat([labeled["image"], unlabeled["image"]]))
    assert reference is None


def test_cps_by_hand(labeled, unlabeled):
    module = method(CrossPseudoSupervision)
    terms = {}
    for name, batch in (("l", labeled), ("u", unlabeled)):
        a, b = module.network(batch["image"]), module.second(batch["image"])
        terms[name] = F.cross_entropy(a, b.argmax(1)) + F.cross_entropy(b, a.argmax(1))
    assert torch.allclose(module.losses(labeled, unlabeled)["cps"], terms["l"] + terms["u"])
    assert not torch.equal(module.network.weight, module.second.weight)


def test_entropy_is_one_where_nothing_is_known_and_zero_where_all_is(labeled, unlabeled):
    module = method(EntropyMinimization)
    nn.init.zeros_(module.network.weight)
    nn.init.zeros_(module.network.bias)
    assert module.losses(labeled, unlabeled)["entropy"].item() == pytest.approx(1)
    with torch.no_grad():
        module.network.bias[0] = 50
    assert module.losses(labeled, unlabeled)["entropy"].item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        module.network.bias[0] = math.log(3)  # probabilities 3/4 and 1/4
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert module.losses(labeled, unlabeled)["entropy"].item() == pytest.approx(expected)


# copy-paste


def test_a_box_of_the_right_size_and_only_one():
    for shape, ratio, sides in [((9, 12), 2 / 3, (6, 8)), ((6, 8, 10), 0.5, (3, 4, 5))]:
        masks = box_mask(5, shape, ratio, torch.Generator().manual_seed(0))
        assert masks.shape == (5, 1, *shape)
        for mask in masks[:, 0]:
            where = (mask == 0).nonzero()
            assert tuple((where.amax(0) - where.amin(0) + 1).tolist()) == sides
            assert len(where) == math.prod(sides)
    assert len({m.numpy().tobytes() for m in masks}) > 1


def test_a_box_reaches_every_corner_and_can_be_kept_in_the_brain():
    g = torch.Generator().manual_seed(0)
    hit = (box_mask(200, (6, 6), 0.5, g) == 0).any(0)[0]
    assert hit.all()
    brain = torch.zeros(50, 1, 20, 20, dtype=torch.bool)
    brain[..., 2:5, 14:18] = True
    masks = box_mask(50, (20, 20), 0.3, g, brain)
    assert ((masks == 0) & brain).flatten(1).any(1).all()
    assert ((masks == 0).sum((1, 2, 3)) == 36).all()


def test_mixing_twice_with_one_mask_restores():
    a, b, mask = torch.randn(3, 2, 8, 8), torch.randn(3, 2, 8, 8), box_mask(3, (8, 8), 0.5, torch.Generator().manual_seed(0))
    first, second = mix(a, b, mask), mix(b, a, mask)
    assert torch.equal(first + second, a + b)
    assert torch.equal(mix(first, second, mask), a)
    assert torch.equal(mix(second, first, mask), b)


def test_halves():
    (a, b), (c, d) = halves(torch.arange(4), torch.arange(10, 16))
    assert [t.tolist() for t in (a, b, c, d)] == [[0, 1], [10, 11], [2, 3], [14, 15]]
    (a, b), (c, d) = halves(torch.arange(1), torch.arange(10, 11))
    assert [t.tolist() for t in (a, b, c, d)] == [[0], [10], [0], [10]]


def test_copy_paste_by_hand(labeled, unlabeled):
    """Each mixed image: the mean over labeled voxels against the truth, over the others against the teacher's answer."""
    module = method(CopyPaste, largest=False)
    nn.init.constant_(module.teacher.network.weight, 2.0)
    mask = box_mask(1, (6, 6), 2 / 3, module.generator("box"))
    box = mask[:, 0] == 0
    x, y, u = labeled["image"], labeled["label"][:, 0], unlabeled["image"]
    pseudo = module.teacher.network(u).argmax(1)
    into, out = x[:1].clone(), u[2:].clone()
    into[:, 0][box], out[:, 0][box] = u[:1, 0][box], x[1:, 0][box]
    ce = [
        F.cross_entropy(module.network(i), t, reduction="none")
        for i, t in [(into, y[:1]), (into, pseudo[:1]), (out, y[1:]), (out, pseudo[2:])]
    ]

    terms = module.losses(labeled, unlabeled)
    assert torch.allclose(terms["supervised"], ce[0][~box].mean() + ce[2][box].mean())
    assert torch.allclose(terms["pseudo"], ce[1][box].mean() + ce[3][~box].mean())


def test_copy_paste_warms_up_on_mixed_labeled_images(labeled):
    module = method(CopyPaste)
    mask = box_mask(2, (6, 6), 2 / 3, module.generator("box"))
    mixed = mix(labeled["image"], labeled["image"].flip(0), mask)
    target = mix(labeled["label"], labeled["label"].flip(0), mask)
    assert torch.allclose(module.warm_losses(labeled)["supervised"], F.cross_entropy(module.network(mixed), target[:, 0]))


def test_largest_components_by_hand():
    row = torch.tensor([1, 1, 0, 1, 2, 2, 2, 0, 2])
    assert largest_components(row[None, None], regions=False).flatten().tolist() == [1, 1, 0, 0, 2, 2, 2, 0, 0]
    assert largest_components((row > 0).to(torch.int8)[None, None], regions=True).flatten().tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0]
    assert not largest_component(torch.zeros(3, 3).bool().numpy()).any()
