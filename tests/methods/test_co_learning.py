"""Co-learning: the six checks of its formulas, its switches, and which student learns from what."""

import signal
from functools import partial

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from lesionbench.checkpoint import build_method
from lesionbench.errors import SuiteError
from lesionbench.target import RegionSigmoid
from lesionbench.task import IGNORE, Task
from lightning_modules import CoLearning
from lightning_modules.inferers import SliceWise
from lightning_modules.losses import RegionDice, SoftDice
from lightning_modules.losses.gated_consistency import squared_error
from lightning_modules.networks import MultiHeadUNet
from lightning_modules.schedules import steps
from lightning_modules.semi_supervised.mixing import box_mask
from tests.harness import assert_same, composed, rows, run, run_folders, run_killed, weights

TASK = Task(("image",), {"background": 0, "blob": 1}, {"BLOB": ("blob",)}, unit="vox")
DICE = partial(SoftDice, squared=True)


def linear(in_channels: int = 1, out_channels: int = 2, bias: bool = True) -> nn.Module:
    return nn.Conv2d(in_channels, out_channels, 1, bias=bias)


def method(network=linear, **options) -> CoLearning:
    torch.manual_seed(0)
    defaults = {"loss": DICE(), "inferer": SliceWise(), "optimizer": partial(torch.optim.SGD, lr=0.1), "init": "different"}
    return CoLearning(TASK, network=network, **{**defaults, **options})


@pytest.fixture
def labeled():
    g = torch.Generator().manual_seed(1)
    return {"image": torch.randn(2, 1, 8, 8, generator=g), "label": torch.randint(0, 2, (2, 1, 8, 8), generator=g)}


@pytest.fixture
def unlabeled():
    return {"image": torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2))}


def gradients(module, loss) -> set[str]:
    module.zero_grad()
    loss.backward()
    return {name.split(".")[0] for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def logits(*p: float) -> torch.Tensor:
    """Two-class logits (1, 2, n) whose foreground probabilities are `p`."""
    p = torch.tensor(p)
    return torch.stack([torch.zeros_like(p), (p / (1 - p)).log()])[None]


# 1: the teacher


def test_the_teacher_averages_both_students(labeled, unlabeled):
    module = method(rates=(0.1, 0.2), ema_warmup=False)
    for network, value in ((module.teacher.network, 0.0), (module.network, 1.0), (module.second, 3.0)):
        for p in network.parameters():
            nn.init.constant_(p, value)
    module._stepped = True
    module.on_train_batch_end(None, None, 0)
    assert all(torch.allclose(p, torch.full_like(p, 0.7)) for p in module.teacher.parameters())
    assert not any(p.requires_grad for p in module.teacher.parameters())
    assert {id(p) for p in module.optimizer_groups()["main"]} == {id(p) for n in (module.network, module.second) for p in n.parameters()}


# 2: mixing


def test_images_and_targets_mix_alike(labeled, unlabeled):
    module = method()
    mask = box_mask(1, (8, 8), 0.5, torch.Generator().manual_seed(3))
    assert (mask == 0).sum() == 16
    first, second = module.mixed(labeled["image"], unlabeled["image"], mask)
    box = mask[0, 0] == 0
    assert torch.equal(first[0, 0][box], unlabeled["image"][0, 0][box])
    assert torch.equal(first[0, 0][~box], labeled["image"][0, 0][~box])
    assert torch.equal(second[0, 0][box], labeled["image"][1, 0][box])
    assert torch.equal(second[0, 0][~box], unlabeled["image"][1, 0][~box])


def test_in_three_dimensions_the_box_is_an_eighth():
    mask = box_mask(1, (8, 12, 16), 0.5, torch.Generator().manual_seed(3))
    assert float((mask == 0).float().mean()) == 0.125


def test_both_mixes_of_one_pair_add_up(labeled, unlabeled):
    module = method()
    mask = box_mask(1, (8, 8), 0.5, torch.Generator().manual_seed(3))
    first, second = module.mixed(labeled["image"][:1], unlabeled["image"][:1], mask)
    assert torch.allclose(first + second, labeled["image"][:1] + unlabeled["image"][:1])


@pytest.mark.parametrize("teacher_input", ["full", "crop"])
def test_mixed_targets_are_truth_and_teacher(labeled, unlabeled, teacher_input):
    """L_mix of students that answer 0.5 everywhere, of targets in {0, 1}, is 1/4 a student; of one student that is sure, by hand."""
    module = method(teacher_input=teacher_input)
    with torch.no_grad():
        for network in (module.network, module.second):
            network.weight.zero_()
            network.bias.zero_()
        assert module.losses(labeled, unlabeled)["mix"] == pytest.approx(0.5)
        module.network.bias[1] = 40.0  # foreground everywhere
        module.teacher.network.weight.copy_(torch.tensor([-5.0, 5.0]).view(2, 1, 1, 1))
        module.teacher.network.bias.zero_()
        loss = float(module.losses(labeled, unlabeled)["mix"])
    box = box_mask(1, (8, 8), 0.5, module.generator("box"))[0, 0] == 0
    truth, pseudo = labeled["label"][0, 0].bool(), unlabeled["image"][0, 0] > 0  # the teacher marks what is above 0
    target = torch.where(box, pseudo, truth)
    assert loss == pytest.approx(float((~target).float().mean()) + 0.25)


def test_the_teacher_sees_air_around_its_crops(labeled, unlabeled):
    """What the teacher is not shown is background, as the cases are normalized, not 0."""
    module, seen = method(teacher_input="crop"), []
    module.no_grad_logits = lambda network, image, name: seen.append(image) or image.new_zeros(len(image), 2, *image.shape[2:])
    module.losses(labeled, {**unlabeled, "outside": torch.full(unlabeled["image"].shape[:2], -3.0)})
    crops = seen[-1]
    assert (crops == -3).any()
    assert not (crops == 0).any()


def test_ignored_voxels_do_not_count(labeled, unlabeled):
    module = method()
    base = module.losses(labeled, unlabeled)["mix"]
    box = box_mask(1, (8, 8), 0.5, module.generator("box"))[0, 0] == 0
    hidden = labeled["label"].clone()
    hidden[0, 0][box] = IGNORE  # replaced by the pasted box in any case
    assert torch.equal(module.losses({**labeled, "label": hidden}, unlabeled)["mix"], base)
    hidden[0, 0][~box] = IGNORE
    assert not torch.equal(module.losses({**labeled, "label": hidden}, unlabeled)["mix"], base)


def test_squared_error_by_hand():
    p, y = torch.tensor([[[0.2, 0.9]], [[1.0, 0.5]]]), torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]])
    assert float(squared_error(p, y, torch.ones(2, 1, 2))) == pytest.approx((0.04 + 0.01 + 0 + 0.25) / 4)
    assert float(squared_error(p, y, torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))) == pytest.approx((0.04 + 0.25) / 2)
    assert float(squared_error(p, y, torch.zeros(2, 1, 2))) == 0


# 3: cross pseudo supervision


def test_students_teach_each_other_by_hand():
    module = method()
    first, second = logits(0.9, 0.2), logits(0.6, 0.7)
    assert module.hard(first).tolist() == [[[1, 0]]]
    assert module.hard(second).tolist() == [[[1, 1]]]

    def dice(p, y):
        return 1 - (2 * sum(a * b for a, b in zip(p, y, strict=True)) + 1e-5) / (sum(a * a for a in p) + sum(y) + 1e-5)

    assert float(module.loss(first, module.hard(second))) == pytest.approx(dice([0.9, 0.2], [1, 1]), abs=1e-6)
    assert float(module.loss(second, module.hard(first))) == pytest.approx(dice([0.6, 0.7], [1, 0]), abs=1e-6)


def test_the_terms_of_a_batch(labeled, unlabeled):
    """Eq. 3 to 9 against the losses written out."""
    module = method()
    nn.init.normal_(module.teacher.network.weight)
    x, y, u = labeled["image"], labeled["label"], unlabeled["image"]
    f, s, t = module.network, module.second, module.teacher.network
    hard = {name: n(u).argmax(1, keepdim=True) for name, n in (("1", f), ("2", s), ("t", t))}
    terms, loss = module.losses(labeled, unlabeled), DICE()
    assert torch.allclose(terms["supervised"], loss(f(x), y) + loss(s(x), y))
    assert torch.allclose(terms["cps"], loss(f(u), hard["2"]) + loss(s(u), hard["1"]))
    assert torch.allclose(terms["teacher"], loss(f(u), hard["t"]) + loss(s(u), hard["t"]))
    assert set(terms) == {"supervised", "cps", "teacher", "mix"}


def test_no_gradient_through_a_pseudo_label(labeled, unlabeled):
    module = method(weights={"teacher": 0, "mix": 0})
    taught = module.loss(module.network(unlabeled["image"]), module.hard(module.second(unlabeled["image"])))
    assert gradients(module, taught) == {"network"}
    assert gradients(module, module.losses(labeled, unlabeled)["cps"]) == {"network", "second"}


# 4: agreement


def test_nothing_to_learn_where_all_agree_and_are_sure(labeled, unlabeled):
    module = method(init="same")
    with torch.no_grad():
        for network in (module.network, module.second, module.teacher.network):
            network.weight.copy_(torch.tensor([-1e4, 1e4]).view(2, 1, 1, 1))
            network.bias.zero_()
    truth = (labeled["image"] > 0).long()  # what the students say
    terms = module.losses({**labeled, "label": truth}, unlabeled)
    for name in ("cps", "teacher", "mix", "supervised"):
        assert terms[name].item() == pytest.approx(0, abs=1e-5)


# 5: who learns from which mix


def test_each_student_learns_from_its_own_mix_only(labeled, unlabeled):
    module = method()
    for name, hidden in (("network", "second"), ("second", "network")):
        for p in getattr(module, hidden).parameters():
            p.requires_grad_(False)
        own = gradients(module, module.losses(labeled, unlabeled)["mix"])
        assert own == {name}
        for p in getattr(module, hidden).parameters():
            p.requires_grad_(True)
    seen = {}
    for name in ("network", "second"):
        network = getattr(module, name)
        network.register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, args[0]))
    module.losses(labeled, unlabeled)
    mask = box_mask(1, (8, 8), 0.5, module.generator("box"))
    first, second = module.mixed(labeled["image"], unlabeled["image"], mask)
    assert torch.equal(seen["network"][4:], first)
    assert torch.equal(seen["second"][4:], second)


# 6: the learning rate


def test_learning_rate_of_the_left_atrium_experiment():
    cfg = composed("benchmark=left_atrium", "model=co_learning")
    assert cfg.epochs * cfg.data.samples_per_epoch // cfg.data.batch_size == 6000
    stairs = cfg.model.scheduler.stairs
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.model.optimizer.lr)
    schedule, found = steps(optimizer, total_iterations=6000, stairs=stairs), {}
    for iteration in range(5001):
        found[iteration] = optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()
    assert [found[i] for i in (0, 2499, 2500, 5000)] == pytest.approx([0.01, 0.01, 0.001, 0.0001])


# switches


@pytest.mark.parametrize("name", ["cps", "teacher", "mix"])
def test_a_weight_of_zero_leaves_a_part_out_and_the_others_as_they_were(name, labeled, unlabeled):
    with_all = method(mix_target="teacher").losses(labeled, unlabeled)
    without = method(mix_target="teacher", weights={name: 0}).losses(labeled, unlabeled)
    assert set(without) == set(with_all) - {name}
    assert all(torch.allclose(without[k], with_all[k], atol=1e-6) for k in without)


def test_without_the_teacher_the_other_student_gives_the_mixed_target(labeled, unlabeled):
    module = method(weights={"teacher": 0})
    assert module.mix_target == "students"
    nn.init.constant_(module.teacher.network.weight, float("nan"))  # is not asked
    assert module.losses(labeled, unlabeled)["mix"].isfinite()
    with torch.no_grad():
        for network, sign in ((module.network, 1.0), (module.second, -1.0)):
            network.weight.zero_()
            network.bias.copy_(torch.tensor([-20.0, 20.0]) * sign)  # student 1: all foreground, student 2: none
        full = {**labeled, "label": torch.ones_like(labeled["label"])}
        # student 1 sees a box said to be background by student 2: 16 of 64 voxels wrong; student 2: box of truth wrong, rest right by
        # student 1's answer "foreground" being wrong as well
        assert float(module.losses(full, unlabeled)["mix"]) == pytest.approx(0.25 + 1.0)


def test_mixed_inputs_without_mixed_targets_count_labeled_voxels_only(labeled, unlabeled):
    module = method(mix="in")
    with torch.no_grad():
        for network in (module.network, module.second):
            network.weight.zero_()
            network.bias.copy_(torch.tensor([-20.0, 20.0]))
        full = {**labeled, "label": torch.ones_like(labeled["label"])}
        assert float(module.losses(full, unlabeled)["mix"]) == pytest.approx(0, abs=1e-6)
        none = {**labeled, "label": torch.zeros_like(labeled["label"])}
        assert float(module.losses(none, unlabeled)["mix"]) == pytest.approx(2)


@pytest.mark.parametrize("mix", ["off", "in", "both"])
@pytest.mark.parametrize("mix_target", ["teacher", "students"])
@pytest.mark.parametrize("soft_target", [False, True])
@pytest.mark.parametrize("teacher_input", ["full", "crop"])
def test_every_combination_trains(mix, mix_target, soft_target, teacher_input, labeled, unlabeled):
    module = method(mix=mix, mix_target=mix_target, soft_target=soft_target, teacher_input=teacher_input, weights={"teacher": 0.5})
    terms = module.losses(labeled, unlabeled)
    assert ("mix" in terms) == (mix != "off")
    assert gradients(module, sum(terms.values())) == {"network", "second"}
    assert all(p.grad is None for p in module.teacher.parameters())


def test_regions(labeled, unlabeled):
    module = method(target=RegionSigmoid, loss=RegionDice(squared=True))
    assert gradients(module, sum(module.losses(labeled, unlabeled).values())) == {"network", "second"}


@pytest.mark.parametrize("teacher_input", ["full", "crop"])
def test_batches_of_one_and_of_different_sizes(teacher_input, labeled, unlabeled):
    module = method(teacher_input=teacher_input)
    one = {k: v[:1] for k, v in labeled.items()}
    assert all(t.isfinite() for t in module.losses(one, unlabeled).values())
    more = {"image": unlabeled["image"].repeat(3, 1, 1, 1)}
    assert all(t.isfinite() for t in module.losses(labeled, more).values())


def test_students_start_alike_and_differ_in_what_has_no_parameters():
    network = partial(MultiHeadUNet, dimensions=2, features=[4, 8], norm="group")
    variants = [{"upsampling": "linear"}, {"upsampling": "nearest"}]
    same, different = (method(network, variants=variants, init=init).eval() for init in ("same", "different"))
    first, second = same.network.state_dict(), same.second.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[k], second[k]) for k in first)
    image = torch.randn(1, 1, 8, 8)
    assert not torch.allclose(same.network(image), same.second(image), atol=1e-4)
    assert torch.allclose(same.teacher(image), same.network(image), atol=1e-6)
    assert any(not torch.equal(a, b) for a, b in zip(different.network.parameters(), different.second.parameters(), strict=True))


def test_the_left_atrium_students_can_be_averaged():
    cfg = composed("benchmark=left_atrium", "model=co_learning")
    assert cfg.model.network.norm == "instance"
    assert [v.upsampling for v in cfg.model.variants] == ["linear", "nearest"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": "out"}, "model.mix"), ({"init": "random"}, "model.init"), ({"mix_target": "me"}, "model.mix_target"), ({"teacher_input": "half"}, "teacher_input"),
        ({"box": 1.0}, "model.box"), ({"variants": [{}]}, "variants"), ({"rates": (0.7, 0.7)}, "rates"),
    ],
)  # fmt: skip
def test_refusals(options, message):
    with pytest.raises(SuiteError, match=message):
        method(**options)


TINY = [
    "data.count=14", "data.split.test=2", "data.split.val=2", "data.split.labeled=3", "epochs=3", "data.samples_per_epoch=8", "data.batch_size=2",
    "model.network.features=[4,8]", "threads=1", "callbacks.calibration=null",
]  # fmt: skip


def test_a_run_predicts_with_every_network(tmp_path):
    run(
        "benchmark=blobs",
        "model=co_learning",
        *TINY,
        "epochs=1",
        "model.warm_start=1",
        f"data.root={tmp_path / 'data'}",
        f"runs={tmp_path / 'runs'}",
    )
    (folder,) = run_folders(tmp_path / "runs")
    assert {r["member"] for r in rows(folder)} == {"", "student1", "student2", "teacher"}
    state = weights(folder)
    assert int(state["teacher.updates"]) == 4
    assert any(not torch.equal(state[k], state[k.replace("second", "network", 1)]) for k in state if k.startswith("second"))


@pytest.mark.parametrize("name", ["co_learning", "temporal_ensembling"])
def test_kill_and_resume_is_bit_identical(name, tmp_path):
    """The teacher's average, its warm-up, the students, and for stored labels their number and versions: all of it is in the checkpoint."""
    common = ["benchmark=blobs", f"model={name}", *TINY, "model.warm_start=1", f"data.root={tmp_path / 'data'}"]
    run(*common, f"runs={tmp_path / 'whole'}")
    killed = [*common, f"runs={tmp_path / 'killed'}", "callbacks.checkpoint.every_n_batches=1"]
    stop = ["callbacks.progress._target_=tests.toys.KillAt", "+callbacks.progress.iteration=10"]
    assert run_killed(*killed, *stop) == -signal.SIGKILL
    run(*killed, "resume=true")
    whole, resumed = run_folders(tmp_path / "whole"), run_folders(tmp_path / "killed")
    assert_same(weights(whole[0]), weights(resumed[0]))
    assert rows(whole[0]) == rows(resumed[0])


def test_the_paper_s_preset_sees_crops_and_nothing_that_the_text_lacks():
    """Section 2.3: the teacher sees the cropped regions; lambda and mu are 1 from the first batch on; no dropout is named."""
    cfg = composed("benchmark=left_atrium", "model=co_learning_paper")
    assert (cfg.model.teacher_input, cfg.model.ramp.shape, cfg.model.network.dropout) == ("crop", "none", 0)
    assert (cfg.data.split.val, cfg.select) == (0, "last")
    with torch.device("meta"):
        model = build_method(OmegaConf.to_container(cfg.model, resolve=True), Task(("mri",), {"background": 0, "LA": 1}, {"LA": ("LA",)}))
    assert not any(isinstance(m, torch.nn.Dropout | torch.nn.Dropout3d) and m.p > 0 for m in model.modules())
