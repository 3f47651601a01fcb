"""Mutual learning: its equations by hand, where its gradients go, its branches' views, and its fusion."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from lesionbench.errors import SuiteError
from lesionbench.target import RegionSigmoid
from lesionbench.task import Task
from lightning_modules import UMM
from lightning_modules.inferers import Window
from lightning_modules.losses import ClassBalancedCE
from lightning_modules.losses.gated_consistency import FixedShare, RelativeMax, RisingShare, gated_consistency
from lightning_modules.networks import NoisyInput, PackUNet, basic_unet, describe, pack_attention_unet
from lightning_modules.ramps import gaussian_ramp
from lightning_modules.supervised.umm import VolumeWise, fusion_weights

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")

BRATS = Task(channels=("t1", "t1ce", "t2", "flair"), classes={"background": 0, "ncr": 1, "ed": 2, "et": 4})
TASK = Task(channels=("t1", "flair"), classes={"background": 0, "a": 1, "b": 2})
PAPER = (16, 16, 32, 64, 128, 16)
AXES = {0: 2, 1: 3, 2: 4}  # slice axis -> dimension of (B, C, X, Y, Z)


class Pointwise(nn.Module):
    """A network of 1x1 convolutions: what comes out of a voxel depends on that voxel alone."""

    def __init__(self, in_channels, out_channels, *, dimensions=3, slab=None, divisor=1, dropout=0.0):
        super().__init__()
        self.layer, self.dropout = nn.Linear(in_channels, out_channels), nn.Dropout(dropout)
        describe(self, dimensions, divisor, slab=slab)

    def forward(self, view):
        if self.slab:
            view = view[..., self.slab // 2]
        return self.layer(self.dropout(view).movedim(1, -1)).movedim(-1, 1)


POINTWISE = {"s": partial(Pointwise, dimensions=2), "p": partial(Pointwise, dimensions=2, slab=3), "v": Pointwise}


def method(task=TASK, branches=POINTWISE, loss=None, **options):
    made = UMM(task, branches=branches, loss=loss or ClassBalancedCE(), inferer=Window((8, 8, 4)), **options)
    made.ramp_progress = lambda: 1.0  # the weight of the consistency term is then max_weight
    return made


def sample(shape=(2, 2, 6, 5, 4), classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, (shape[0], 1, *shape[2:]), generator=generator)
    return {"image": torch.randn(shape, generator=generator), "label": label}


# views


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("divisor", [1, 4])
def test_the_same_pointwise_network_gives_the_same_volume_in_every_dimension(axis, divisor):
    volume = torch.randn(2, 2, 6, 5, 4)
    answers = []
    for name, factory in POINTWISE.items():
        branch = VolumeWise(factory(2, 3, divisor=divisor), axis)
        torch.nn.init.constant_(branch.network.layer.bias, 0.5)
        branch.network.layer.weight.data = torch.arange(6.0).view(3, 2)
        answers.append(branch(volume))
        assert answers[-1].shape == (2, 3, 6, 5, 4), name
    assert torch.allclose(answers[0], answers[1])
    assert torch.allclose(answers[0], answers[2])


def influence(network, axis, k, n=6):
    """Slices of the output that change when slice k of the input does."""
    torch.manual_seed(0)
    branch, dim = VolumeWise(network, axis).eval(), AXES[axis]
    shape = [1, 2, 16, 16, 16]
    shape[dim] = n
    volume = torch.randn(shape)
    other = volume.clone()
    other.narrow(dim, k, 1).normal_()
    with torch.no_grad():
        change = (branch(volume) - branch(other)).abs().movedim(dim, 0).flatten(1).amax(dim=1)
    return (change > 1e-6).nonzero().flatten().tolist()


@pytest.mark.parametrize("axis", AXES)
def test_a_slice_network_sees_one_slice_and_a_pack_network_its_neighbors(axis):
    flat = {"features": (4, 4, 4, 4, 4, 4), "dropout": 0.1}
    assert influence(basic_unet(2, 3, dimensions=2, norm="group", **{**flat, "features": (8,) * 6}), axis, 3) == [3]
    assert influence(PackUNet(2, 3, **flat), axis, 3) == [2, 3, 4]
    assert influence(PackUNet(2, 3, **flat), axis, 0) == [0, 1]
    assert influence(PackUNet(2, 3, slab=5, **flat), axis, 3) == [1, 2, 3, 4, 5]
    assert influence(pack_attention_unet(2, 3, channels=(4, 4)), axis, 3) == [2, 3, 4]


def test_flat_levels_decode_the_middle_slice():
    """Without what comes from below and without normalization, which both mix slices, only the middle one is left."""
    network = PackUNet(1, 2, features=(4, 4, 4, 4)).eval()
    for layer in network.narrow:
        nn.init.zeros_(layer.weight)
    for block in [*network.encoder, *network.decoder]:
        block[1] = block[5] = nn.Identity()
    packs = torch.randn(4, 1, 8, 8, 3)
    packs[1:] = packs[0]
    for n in range(3):
        packs[n + 1, ..., n] += 1
    with torch.no_grad():
        logits = network(packs)
    assert [torch.allclose(x, logits[0]) for x in logits[1:]] == [True, False, True]


def test_end_slices_are_repeated():
    network = PackUNet(1, 2, features=(4, 4, 4), flat_levels=1).eval()
    slices = torch.randn(1, 1, 8, 8, 2)
    with torch.no_grad():
        volume = VolumeWise(network, 2)(slices)
        first = network(slices[..., [0, 0, 1]])
        last = network(slices[..., [0, 1, 1]])
    assert torch.allclose(volume[..., 0], first, atol=1e-6)
    assert torch.allclose(volume[..., 1], last, atol=1e-6)


def test_volumes_that_do_not_divide_are_padded_and_cut():
    branches = {"s": partial(basic_unet, dimensions=2, features=PAPER), "v": partial(basic_unet, features=PAPER)}
    logits = method(branches=branches).network(torch.randn(1, 2, 33, 20, 10))
    assert {name: tuple(x.shape) for name, x in logits.items()} == dict.fromkeys("sv", (1, 3, 33, 20, 10))


# networks


def test_parameter_counts_of_the_paper():
    """Table VII: 0.496 M (2D), 1.323 M (2.5D), 1.440 M (3D), 3.259 M together; four channels, four classes."""
    counts = {}
    for name, network in {"s": partial(basic_unet, dimensions=2), "p": PackUNet, "v": basic_unet}.items():
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in network(4, 4, features=PAPER).parameters())
    assert counts == {"s": 496_388, "p": 1_320_452, "v": 1_440_132}
    assert sum(counts.values()) == pytest.approx(3.259e6, rel=1e-3)


def test_pack_networks_refuse_what_is_no_pack():
    for wrong in ({"slab": 2}, {"flat_levels": 0}, {"flat_levels": 5}):
        with pytest.raises(SuiteError, match=next(iter(wrong))):
            PackUNet(1, 2, **wrong)
    with pytest.raises(SuiteError, match=r"takes \(B, M, H, W, 3\)"):
        PackUNet(1, 2)(torch.zeros(1, 1, 16, 16, 5))
    with pytest.raises(SuiteError, match="middle slice"):
        pack_attention_unet(1, 2, slab=4)


def test_a_noisy_network_sees_another_image_at_every_pass():
    network = NoisyInput(2, 3, network=partial(Pointwise, dimensions=2), sigma=2.0).eval()
    image = torch.zeros(1, 2, 64, 64)
    assert not torch.equal(network(image), network(image))
    network.network.layer.weight.data = torch.tensor([[1.0, 0], [0, 1], [0, 0]])
    network.network.layer.bias.data.zero_()
    assert float(network(image)[:, :2].detach().std()) == pytest.approx(2, abs=0.1)


def test_weights_do_not_depend_on_the_other_branches_and_are_xavier_uniform():
    three, one = method(seed=3), method(branches={"v": POINTWISE["v"]}, seed=3)
    for a, b in zip(three.network["v"].parameters(), one.network["v"].parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.network["v"].network.layer.weight, method(seed=4).network["v"].network.layer.weight)
    layer = method(branches={"v": partial(basic_unet, features=PAPER)}).network["v"].network.conv_0.conv_1.conv
    bound = math.sqrt(6 / (16 * 27 + 16 * 27))
    assert bound * 0.99 < float(layer.weight.detach().abs().max()) <= bound
    assert not layer.bias.any()


# equations


def test_class_balanced_cross_entropy_by_hand():
    """Eq. 1: of four voxels three are background: weights 1/4 and 3/4, divided by their sum 3/2; ignored voxels count nowhere."""
    logits = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, 0.0], [9.0, -9.0]]).T[None]
    target = torch.tensor([[[0, 0, 1, 0, -1]]])

    def ce(a, b):
        return math.log(math.exp(a) + math.exp(b)) - a

    expected = (0.25 * (ce(0, 0) + ce(1, 0) + ce(0, 0)) + 0.75 * ce(2, 0)) / 1.5
    assert float(ClassBalancedCE()(logits, target)) == pytest.approx(expected)
    heavier = (0.5 * (ce(0, 0) + ce(1, 0) + ce(0, 0)) + 0.75 * ce(2, 0)) / 2.25
    assert float(ClassBalancedCE(background=2.0)(logits, target)) == pytest.approx(heavier)
    assert float(ClassBalancedCE()(logits, torch.full_like(target, -1))) == 0


def test_an_absent_class_does_not_change_the_weights_of_the_others():
    logits, target = torch.randn(1, 3, 6), torch.tensor([[[0, 0, 0, 1, 1, 0]]])
    two = ClassBalancedCE()(torch.cat([logits[:, :2], torch.full((1, 1, 6), -1e9)], dim=1), target)
    assert float(two) == pytest.approx(float(ClassBalancedCE()(logits[:, :2], target)))


def test_gated_consistency_by_hand():
    """Eqs. 4-5: U = (0.1, 0.5, 0.25, 0.6), z = 0.2: only the first voxel counts, whatever the rest."""
    uncertainty = torch.tensor([0.1, 0.5, 0.25, 0.6]).view(1, 1, 4)
    certain = RelativeMax(1 / 3)(uncertainty, 2, 0.0)
    assert certain.flatten().tolist() == [True, False, False, False]
    teacher = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0], [0.3, 0.7]]).T[None]
    student = torch.tensor([[0.7, 0.3], [0.0, 1.0], [0.0, 1.0], [0.9, 0.1]]).T[None]
    assert float(gated_consistency(student, teacher, certain)) == pytest.approx(0.08)
    assert float(gated_consistency(student, teacher)) == pytest.approx((0.08 + 2 + 0 + 0.72) / 4)  # Eq. 2, summed over classes


def test_cases_count_alike_and_one_without_certain_voxels_counts_zero():
    student, teacher = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]).expand(2, 2, 2), torch.zeros(2, 2, 2)
    certain = torch.tensor([[[True, True]], [[False, False]]])
    assert float(gated_consistency(student, teacher, certain)) == pytest.approx(0.5)
    uniform = torch.full((1, 1, 5), math.log(2))
    assert not RelativeMax()(uniform, 2, 0.0).any()
    assert not RelativeMax()(torch.zeros(1, 1, 5), 2, 0.0).any()
    nothing = gated_consistency(torch.rand(1, 2, 5, requires_grad=True), torch.rand(1, 2, 5), RelativeMax()(uniform, 2, 0.0))
    nothing.backward()
    assert nothing.item() == 0


def test_gates():
    uncertainty = torch.tensor([[0.1, 0.3, 0.9], [0.01, 0.2, 0.3]])[:, None]
    assert RelativeMax(1 / 3)(uncertainty, 4, 0).squeeze(1).tolist() == [[True, False, False], [True, False, False]]
    assert RelativeMax(0.5)(uncertainty, 4, 0).squeeze(1).tolist() == [[True, True, False], [True, False, False]]
    assert RelativeMax(0.5, scope="batch")(uncertainty, 4, 0).squeeze(1).tolist() == [[True, True, False], [True, True, True]]
    assert FixedShare(0.25)(uncertainty, 4, 0).squeeze(1).tolist() == [[True, True, False], [True, True, True]]  # below 0.3466
    high = torch.tensor([0.74, 0.76, 0.99]).view(1, 1, 3) * math.log(4)
    assert RisingShare(0.75)(high, 4, 0).flatten().tolist() == [True, False, False]  # 0.7517 ln C at the start
    assert RisingShare(0.75)(high, 4, 1).flatten().tolist() == [True, True, True]
    for wrong in (partial(RelativeMax, 0), partial(FixedShare, 1.5), partial(RisingShare, -1), partial(RelativeMax, scope="case")):
        with pytest.raises(SuiteError, match=r"model\.gate"):
            wrong()


def test_ramp():
    """Eq. 6: w(0) = e^-5, w(1/2) = e^-1.25, w(1) = 1."""
    assert [gaussian_ramp(m) for m in (0, 0.5, 1, 1.5)] == pytest.approx([0.0067379, 0.2865048, 1, 1], abs=1e-6)
    values = [gaussian_ramp(m / 20) for m in range(21)]
    assert values == sorted(values)


class Fixed(nn.Module):
    """Two voxels with logits that are parameters; a 3D network whatever the image."""

    def __init__(self, in_channels, out_channels, *, probabilities):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log().T[None, :, :, None, None].contiguous())
        describe(self, 3, 1)

    def forward(self, image):
        return self.logits.expand(len(image), -1, -1, -1, -1)


def fixed(**options):
    """Branches a and b with given probabilities of two classes at two voxels; U = H, b is certain at its first voxel only."""
    first, second = [[0.6, 0.4], [0.2, 0.8]], [[0.99, 0.01], [0.5, 0.5]]
    task = Task(channels=("t1",), classes={"background": 0, "a": 1})
    branches = {"a": partial(Fixed, probabilities=first), "b": partial(Fixed, probabilities=second)}
    batch = {"image": torch.zeros(1, 1, 2, 1, 1), "label": torch.tensor([0, 1]).view(1, 1, 2, 1, 1)}
    return method(task, branches, **options), batch


def test_total_loss_by_hand():
    """Eq. 6 with two branches, two voxels, one of each class (weights 1/2 and 1/2, so that L_s is the mean of -ln p)."""
    supervised = -(math.log(0.6) + math.log(0.8)) / 2 - (math.log(0.99) + math.log(0.5)) / 2
    ab = [2 * 0.39**2, 2 * 0.3**2]  # squared differences of the two voxels
    for mutual, consistency in {
        "none": 0.0,
        "plain": 2 * (ab[0] + ab[1]) / 2,
        "gated": ab[0],  # a learns from b at the first voxel; a's own entropies, 0.673 and 0.500, are both above 0.673 / 3
    }.items():
        umm, batch = fixed(mutual=mutual, max_weight=0.25)
        assert umm.training_step(batch, 0).item() == pytest.approx(supervised + 0.25 * consistency, abs=1e-5), mutual


@pytest.mark.parametrize(("ramp_epochs", "shares"), [(None, (0, 0.25, 0.5)), (2, (0, 0.5, 1))])
def test_the_ramp_counts_batches_of_all_epochs_or_of_its_own(ramp_epochs, shares):
    umm = UMM(TASK, branches=POINTWISE, loss=ClassBalancedCE(), inferer=Window((8, 8, 4)), ramp_epochs=ramp_epochs)
    umm.__dict__["_trainer"] = type("Trainer", (), {"num_training_batches": 5, "max_epochs": 4})()
    for epoch, share in enumerate(shares):
        umm.iteration = 5 * epoch
        assert umm.ramp_progress() == pytest.approx(share)


def test_the_weight_follows_the_ramp():
    umm, batch = fixed(mutual="plain")
    logged = {}
    umm.log_terms = lambda **terms: logged.update({k: v.item() for k, v in terms.items()})
    umm.ramp_progress = lambda: 0.5
    umm.training_step(batch, 0)
    assert logged["weight"] == pytest.approx(0.2865048)
    assert logged["loss"] == pytest.approx(
        logged["supervised_a"] + logged["supervised_b"] + logged["weight"] * (logged["consistency_a"] + logged["consistency_b"])
    )


def test_what_is_logged():
    umm, batch = fixed()
    logged = {}
    umm.log_terms = lambda **terms: logged.update({k: v.item() for k, v in terms.items()})
    umm.training_step(batch, 0)
    assert logged["certain_a"] == 0
    assert logged["certain_b"] == 0.5
    assert logged["consistency_a"] == pytest.approx(2 * 0.39**2, abs=1e-6)  # a learns where b is certain
    assert logged["consistency_b"] == 0  # and b nowhere, since a is certain nowhere
    a = -(0.6 * math.log(0.6) + 0.4 * math.log(0.4) + 0.2 * math.log(0.2) + 0.8 * math.log(0.8)) / 2
    assert logged["uncertainty_a"] == pytest.approx(a, abs=1e-6)


# gradients


class NoLoss(nn.Module):
    kind = "softmax"

    def forward(self, logits, target):
        return logits.sum() * 0


@pytest.mark.parametrize("detach", [True, False])
def test_consistency_of_a_learner_reaches_that_learner_only(detach):
    umm, batch = fixed(mutual="plain", loss=NoLoss(), detach_teacher=detach)
    probabilities = {n: umm.target.activate(x) for n, x in umm.network(batch["image"]).items()}
    umm._consistency("a", probabilities, {}).backward()
    assert umm.network["a"].network.logits.grad.abs().sum() > 0
    teacher = umm.network["b"].network.logits.grad
    assert (teacher is None) == detach
    assert detach or teacher.abs().sum() > 0


def test_the_step_moves_each_branch_towards_its_peers_but_not_as_a_teacher():
    """The gradient of the whole step equals that of the learner's own loss."""
    umm, batch = fixed(mutual="plain", loss=NoLoss())
    umm.training_step(batch, 0).backward()
    own = {n: b.network.logits.grad.clone() for n, b in umm.network.items()}
    for name in own:
        alone, _ = fixed(mutual="plain", loss=NoLoss())
        probabilities = {n: alone.target.activate(x) for n, x in alone.network(batch["image"]).items()}
        alone._consistency(name, probabilities, {}).backward()
        assert torch.allclose(own[name], alone.network[name].network.logits.grad, atol=1e-7)


def test_the_mask_is_the_teachers():
    """Changing the learner's certainty changes neither the mask nor, at the voxel that is left out, anything else."""
    losses = []
    for value in (0.1, 0.9):
        umm, batch = fixed(loss=NoLoss())
        umm.network["a"].network.logits.data[0, :, 1, 0, 0] = torch.tensor([value, 1 - value]).log()
        losses.append(umm.training_step(batch, 0).item())
    assert losses[0] == pytest.approx(losses[1])
    assert losses[0] == pytest.approx(2 * 0.39**2, abs=1e-5)


def unet_branches(dropout=0.1):
    small = {"features": (4, 4, 4, 4, 4, 4), "dropout": dropout}
    return {"s": partial(basic_unet, dimensions=2, **small), "p": partial(PackUNet, **small), "v": partial(basic_unet, **small)}


def test_every_parameter_of_every_branch_gets_gradient_also_in_half_precision():
    umm, batch = method(branches=unet_branches(), mc_samples=3), sample((1, 2, 32, 32, 16))
    with torch.autocast("cpu", torch.bfloat16):  # weights cast during the passes without gradient must not be used again
        loss = umm.training_step(batch, 0)
    loss.backward()
    for name, parameter in umm.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.dim() < 2 or parameter.grad.any(), name


def test_ablation_modes_make_no_passes_that_they_do_not_need():
    for mutual, expected in {"none": 1, "plain": 1, "gated": 5}.items():
        umm = method(branches={n: partial(f, dropout=0.5) for n, f in POINTWISE.items()}, mutual=mutual, mc_samples=5)
        calls = []
        umm.network["v"].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        umm.training_step(sample(), 0)
        assert len(calls) == expected, mutual


def test_uncertainty_is_that_of_all_passes_with_the_first():
    """Eq. 3: A is the mean of O_1 to O_T, and O_1 is the pass that is taught."""
    umm = method(branches={n: partial(f, dropout=0.5) for n, f in POINTWISE.items()}, mc_samples=3)
    passes, found, gate = {n: [] for n in POINTWISE}, [], umm.gate
    for name in POINTWISE:
        umm.network[name].register_forward_hook(lambda _, inputs, output, name=name: passes[name].append(output.detach().softmax(dim=1)))
    umm.gate = lambda uncertainty, *rest: (found.append(uncertainty), gate(uncertainty, *rest))[1]
    umm.training_step(sample(), 0)
    assert [len(own) for own in passes.values()] == [3, 3, 3]
    for own, uncertainty in zip(passes.values(), found, strict=True):
        mean = torch.stack(own).mean(dim=0)
        assert torch.allclose(uncertainty, -(mean * mean.log()).sum(dim=1, keepdim=True), atol=1e-6)
        assert not torch.allclose(uncertainty, -(own[0] * own[0].log()).sum(dim=1, keepdim=True), atol=1e-3)


def test_passes_at_once_are_as_many_and_differ():
    """Of five passes of a network whose logits are its dropped input, all kept: their moments are those of five draws."""
    for at_once, forwards in {1: 4, 3: 2, 9: 1}.items():
        umm = method(branches={"v": partial(Pointwise, dropout=0.5)}, mc_samples=5, passes_at_once=at_once)
        seen = []
        umm.network["v"].register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(output))
        moments = umm._passes("v", sample()["image"], 4)
        assert len(seen) == forwards
        passes = torch.cat(seen).unflatten(0, (4, 2)).softmax(dim=2)
        assert moments.count == 4
        assert torch.allclose(moments.mean, passes.mean(dim=0), atol=1e-6)
        assert not torch.equal(passes[0], passes[1])


def test_dropout_of_a_branch_does_not_depend_on_the_other_terms():
    """The supervised loss of the 3D branch is the same to the bit with and without peers, gate and stochastic passes."""
    found = []
    for options in ({}, {"mutual": "none"}, {"mc_samples": 2}, {"branches": {"v": partial(Pointwise, dropout=0.5)}}):
        umm = method(**{"branches": {n: partial(f, dropout=0.5) for n, f in POINTWISE.items()}, **options})
        logged = {}
        umm.log_terms = lambda logged=logged, **terms: logged.update(terms)
        umm.training_step(sample(), 0)
        found.append(logged["supervised_v"].item())
        umm.iteration += 1
        umm.training_step(sample(), 1)
        assert logged["supervised_v"].item() != found[-1]
    assert len(set(found)) == 1


def test_batch_statistics_move_once_per_step():
    umm = method(branches={"p": partial(pack_attention_unet, channels=(4, 4), dropout=0.1)}, mc_samples=4)
    umm.training_step(sample((1, 2, 8, 8, 4)), 0)
    tracked = [m.num_batches_tracked for m in umm.modules() if isinstance(m, nn.BatchNorm3d)]
    assert {int(t) for t in tracked} == {1}


# fusion and inference


def test_fusion_weights():
    """Eq. 7: U = (0, ln 2, ln 2) gives (1/2, 1/4, 1/4); equal U the plain mean; one branch the identity."""
    ln2 = math.log(2)
    uncertainty = {"s": torch.tensor([0.0, 0.3]), "p": torch.tensor([ln2, 0.3]), "v": torch.tensor([ln2, 0.3])}
    weights = torch.stack(list(fusion_weights(uncertainty).values()))
    assert torch.allclose(weights, torch.tensor([[0.5, 1 / 3], [0.25, 1 / 3], [0.25, 1 / 3]]))
    drawn = {n: torch.rand(50, generator=torch.Generator().manual_seed(i)) for i, n in enumerate("spv")}
    weights = fusion_weights(drawn)
    assert torch.allclose(sum(weights.values()), torch.ones(50))
    assert ((weights["s"] > weights["v"]) == (drawn["s"] < drawn["v"])).all()  # lower uncertainty, larger weight
    assert torch.equal(fusion_weights({"v": drawn["v"]})["v"], torch.ones(50))
    assert torch.allclose(fusion_weights(drawn, "mean")["p"], torch.full((50,), 1 / 3))
    assert [float(w.sum()) for w in fusion_weights(drawn, "single:p").values()] == [0, 50, 0]


def test_prediction_is_the_fusion_of_its_members():
    umm = method(branches={n: partial(f, dropout=0.5) for n, f in POINTWISE.items()}, mc_samples=3, extra_fusions=["mean"]).eval()
    for branch in umm.network.values():
        nn.init.normal_(branch.network.layer.weight, std=2)
    image = torch.randn(1, 2, 8, 8, 4)
    with torch.no_grad():
        prediction = umm.predict_case({"image": image})
        plain = {n: umm.target.activate(x)[0] for n, x in umm.network(image).items()}
    assert list(prediction.members) == ["s", "p", "v", "mean"]
    for name, member in list(prediction.members.items())[:3]:
        assert torch.allclose(member.regions, plain[name][1:], atol=1e-6)  # the pass without dropout
        assert member.uncertainty["entropy"].shape == (8, 8, 4)
        assert member.table["mean_entropy"] == pytest.approx(float(member.uncertainty["entropy"].mean()))
    weights = fusion_weights({n: prediction.members[n].uncertainty["entropy"] for n in umm.network})
    assert torch.allclose(prediction.regions, sum(weights[n] * prediction.members[n].regions for n in weights), atol=1e-6)
    assert torch.allclose(prediction.members["mean"].regions, sum(prediction.members[n].regions for n in weights) / 3, atol=1e-6)


def test_entropy_of_the_fusion_by_hand():
    """Without dropout one pass is all: the entropy of the branches' weighted mean."""
    umm = method().eval()
    for branch in umm.network.values():
        nn.init.normal_(branch.network.layer.weight, std=2)
    image = torch.randn(1, 2, 8, 8, 4)
    with torch.no_grad():
        prediction = umm.predict_case({"image": image})
        own = {n: x.softmax(dim=1)[0] for n, x in umm.network(image).items()}
    weights = fusion_weights({n: -(p * p.log()).sum(dim=0) for n, p in own.items()})
    fused = sum(weights[n] * p for n, p in own.items())
    assert torch.allclose(prediction.uncertainty["entropy"], -(fused * fused.log()).sum(dim=0), atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_one_branch_is_its_own_fusion_and_without_dropout_uncertainty_is_its_entropy(dropout):
    umm = method(branches={"v": partial(Pointwise, dropout=dropout)}).eval()
    with torch.no_grad():
        prediction = umm.predict_case({"image": torch.randn(1, 2, 8, 8, 4)})
    member = prediction.members["v"]
    assert torch.equal(prediction.regions, member.regions)
    assert torch.equal(prediction.uncertainty["entropy"], member.uncertainty["entropy"])
    full = torch.cat([1 - member.regions.sum(dim=0, keepdim=True), member.regions])
    own = -(full * full.clamp_min(1e-12).log()).sum(dim=0)
    assert torch.allclose(member.uncertainty["entropy"], own, atol=1e-4) == (dropout == 0)


def test_the_mean_of_the_passes_can_be_the_prediction():
    options = {"branches": {"v": partial(Pointwise, dropout=0.5)}, "mc_samples": 4}
    image = torch.randn(1, 2, 8, 8, 4)
    regions = []
    for mean in (False, True):
        umm = method(**options, predict_mc_mean=mean).eval()
        nn.init.normal_(umm.network["v"].network.layer.weight, std=2, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(0)
        with torch.no_grad():
            prediction = umm.predict_case({"image": image})
        regions.append(prediction.regions)
    assert not torch.allclose(regions[0], regions[1])
    full = torch.cat([1 - regions[1].sum(dim=0, keepdim=True), regions[1]])
    assert torch.allclose(prediction.uncertainty["entropy"], -(full * full.clamp_min(1e-12).log()).sum(dim=0), atol=1e-4)


@pytest.mark.parametrize(("dropout", "passes"), [(0.5, 3 + 1), (0.0, 1)])
def test_one_pass_over_the_windows_serves_all_branches_and_the_fusion(dropout, passes):
    umm = method(branches={n: partial(f, dropout=dropout) for n, f in POINTWISE.items()}, mc_samples=3).eval()
    seen = []
    inner = umm.predict_maps
    umm.predict_maps = lambda view: seen.append(view.shape) or inner(view)
    calls = dict.fromkeys(umm.network, 0)
    for name, branch in umm.network.items():
        branch.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    with torch.no_grad():
        umm.predict_case({"image": torch.randn(1, 2, 12, 8, 4)})
    assert len(seen) == 2  # windows of 8 with half overlap over 12 voxels
    assert set(calls.values()) == {2 * passes}


# what is refused


def test_mistakes_are_named():
    with pytest.raises(SuiteError, match=r"model\.branches is empty"):
        method(branches={"s": None})
    with pytest.raises(SuiteError, match="did you mean 'gated'"):
        method(mutual="gate")
    with pytest.raises(SuiteError, match=r"model\.fusion 'single:x'"):
        method(fusion="single:x")
    with pytest.raises(SuiteError, match=r"model\.extra_fusions"):
        method(extra_fusions=["single:s"])
    with pytest.raises(SuiteError, match="mc_samples"):
        method(mc_samples=0)
    for wrong in ({"max_weight": -1.0}, {"ramp_epochs": 0}):
        with pytest.raises(SuiteError, match=rf"model\.{next(iter(wrong))}={next(iter(wrong.values()))}"):
            method(**wrong)
    with pytest.raises(SuiteError, match="cannot be the name"):
        method(branches={"mean": Pointwise})
    with pytest.raises(SuiteError, match="softmax over classes"):
        method(loss=nn.MSELoss(), target=RegionSigmoid)

    class Extra(Pointwise):
        def forward(self, view):
            return {"logits": super().forward(view), "deep": []}

    with pytest.raises(SuiteError, match="logits only"):
        method(branches={"v": Extra}).network(torch.zeros(1, 2, 4, 4, 4))


def test_patches_that_a_branch_cannot_take():
    flat, deep = (VolumeWise(basic_unet(1, 2, dimensions=d, features=PAPER), 2) for d in (2, 3))
    assert flat.takes((32, 16, 4))
    assert flat.takes((17, 8, 4))  # padded to 32 x 16
    assert not flat.takes((16, 16, 64))  # one voxel at the bottleneck, whose variance does not exist
    assert deep.takes((16, 16, 17))
    assert not deep.takes((16, 16, 16))
    data = type("Data", (), {"view": "patch", "patch": (16, 16, 64)})
    umm = method(branches={"v": partial(basic_unet, features=PAPER), "s": partial(basic_unet, dimensions=2, features=PAPER)})
    with pytest.raises(SuiteError, match=r"model\.branches\.s, which needs one side to reach its part of \(32, 32\) in the plane"):
        umm.check(data)


def test_two_branch_subsets():
    for gone in "spv":
        umm = method(branches={**POINTWISE, gone: None})
        assert set(umm.network) == set("spv") - {gone}
        umm.training_step(sample(), 0).backward()
        assert all(p.grad is not None for p in umm.parameters())
