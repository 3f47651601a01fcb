"""Virtual adversarial training, the critic, and the method that joins them: formulas, and which term reaches which network."""

import csv
import math
import signal
from copy import deepcopy
from functools import partial

import nibabel as nib
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader

from lesionbench.errors import SuiteError
from lesionbench.target import ClassSoftmax, RegionSigmoid
from lesionbench.task import Task
from lightning_modules import ReciprocalAdversarial, Supervised
from lightning_modules.inferers import Whole
from lightning_modules.losses import VAT, DiceCE, RegionDice, critic_loss, fooling_loss, gradient_penalty
from lightning_modules.losses.vat import divergence, unit_rms
from lightning_modules.networks import DilatedUNet, PixelCritic
from lightning_modules.networks.stateless import stateless
from lightning_modules.schedules import poly
from tests.fake_data import write_fake_folder
from tests.harness import assert_same, composed, rows, run, run_folders, run_killed, weights

TASK = Task(("t1", "flair"), {"background": 0, "ncr": 1, "ed": 2, "et": 4}, {"WT": ("ncr", "ed", "et"), "TC": ("ncr", "et"), "ET": ("et",)})


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(F.cosine_similarity(a.detach().flatten(), b.detach().flatten(), dim=0))


# networks


def test_parameter_counts_are_those_of_the_published_networks():
    with torch.device("meta"):
        assert parameters(DilatedUNet(4, 3)) == 19_167_819
        assert parameters(DilatedUNet(4, 3, width=32)) == 8_520_755
        assert parameters(PixelCritic(3, norm="batch", last_norm_act=True)) == 3_030
        assert parameters(PixelCritic(3, norm="batch", last_norm_act=True, kernel=3)) == 75_830


def test_the_paper_s_critic():
    """Section 4.1: four 3 x 3 x 3 convolutions with batch normalization and leaky ReLU; nothing but the masks, as they are."""
    model = composed("experiment=reciprocal_adversarial/brats2021").model
    critic = instantiate(model.critic)(3, 4)
    convolutions = [m for m in critic.modules() if isinstance(m, nn.Conv3d)]
    assert [m.kernel_size for m in convolutions] == [(3, 3, 3)] * 4
    assert sum(isinstance(m, nn.BatchNorm3d) for m in critic.modules()) == 3
    assert sum(isinstance(m, nn.LeakyReLU) for m in critic.modules()) == 3
    assert convolutions[0].in_channels == 3
    assert model.instance_noise == 0


@pytest.mark.parametrize(("dimensions", "size"), [(2, (24, 40)), (3, (8, 24, 16))])
@pytest.mark.parametrize("norm", ["group", "instance", "batch"])
def test_dilated_unet_keeps_the_size(norm, dimensions, size):
    network = DilatedUNet(4, 3, dimensions=dimensions, width=4, norm=norm)
    logits = network(torch.randn(2, 4, *size))
    assert logits.shape == (2, 3, *size)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("norm", ["none", "batch", "instance", "spectral"])
@pytest.mark.parametrize(("kernel", "single", "input"), [(1, False, "mask"), (3, True, "mask_image")])
def test_critic_shapes_and_field_of_view(norm, kernel, single, input):
    critic = PixelCritic(3, 2, dimensions=2, kernel=kernel, norm=norm, single=single, input=input).eval()
    masks, image = torch.rand(1, 3, 20, 20, requires_grad=True), torch.rand(1, 2, 20, 20)
    answer = critic(masks, image)
    assert answer.shape == (1, 1 if single else 3, 20, 20)
    (gradient,) = torch.autograd.grad(answer[0, :, 10, 10].sum(), masks)
    seen = gradient[0].abs().sum(dim=0).nonzero()
    side = 4 * (kernel // 2)
    if norm != "instance":  # whose statistics see everything
        assert seen.min() == 10 - side
        assert seen.max() == 10 + side


def test_unknown_options_are_named():
    with pytest.raises(SuiteError, match="norm"):
        DilatedUNet(4, 3, norm="layer")
    with pytest.raises(SuiteError, match=r"critic\.norm"):
        PixelCritic(3, norm="layer")
    with pytest.raises(SuiteError, match="kernel=2"):
        PixelCritic(3, kernel=2)
    with pytest.raises(SuiteError, match="divergence"):
        VAT("gaussian")
    with pytest.raises(SuiteError, match="xi=0"):
        VAT("sigmoid", xi=0)


# divergences


def test_bernoulli_divergence_by_hand():
    logit = torch.logit(torch.full((1, 1, 1), 0.25))
    assert divergence(logit, torch.full((1, 1, 1), 0.5), "sigmoid").item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))
    assert divergence(logit, torch.ones(1, 1, 1), "sigmoid").item() == pytest.approx(1.3863, abs=1e-4)


def test_softmax_divergence_by_hand_and_against_two_classes_as_bernoulli():
    logits = torch.log(torch.tensor([0.2, 0.3, 0.5]))[None, :, None]
    reference = torch.tensor([0.1, 0.6, 0.3])[None, :, None]
    expected = 0.1 * math.log(0.1 / 0.2) + 0.6 * math.log(0.6 / 0.3) + 0.3 * math.log(0.3 / 0.5)
    assert divergence(logits, reference, "softmax").item() == pytest.approx(expected, rel=1e-5)
    z, q = torch.randn(2, 1, 5), torch.rand(2, 1, 5)
    both = divergence(torch.cat([z, torch.zeros_like(z)], 1), torch.cat([q, 1 - q], 1), "softmax")
    assert torch.allclose(both, divergence(z, q, "sigmoid"), atol=1e-6)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_divergence_is_not_negative_and_zero_for_equals(kind):
    logits = 5 * torch.randn(2, 4, 30)
    own = logits.sigmoid() if kind == "sigmoid" else logits.softmax(1)
    assert divergence(logits, own, kind).abs().max() < 1e-5
    assert divergence(logits, own.roll(1, 0), kind).min() > -1e-5
    hard = torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    assert divergence(logits, hard, kind).isfinite().all()


# the perturbation


def test_unit_rms_counts_masked_voxels_times_channels():
    x, mask = torch.randn(3, 2, 6, 5), torch.rand(3, 1, 6, 5) > 0.4
    unit = unit_rms(x, mask)
    for sample, inside in zip(unit, mask.expand_as(x), strict=True):
        assert sample[inside].square().mean().sqrt() == pytest.approx(1, rel=1e-5)
        assert (sample[~inside] == 0).all()
    assert torch.allclose(unit_rms(x * 1e-30), unit_rms(x), atol=1e-5)  # gradients may be tiny
    assert (unit_rms(torch.zeros(1, 2, 3)) == 0).all()


class Linear(nn.Module):
    """One logit per image: w . x."""

    def __init__(self, shape, classes=1):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, *shape))

    def forward(self, image):
        return torch.einsum("bcxy,kcxy->bk", image, self.weight)[..., None]


def test_direction_for_a_linear_model_is_the_weight():
    torch.manual_seed(0)
    network, image = Linear((2, 6, 6)), 0.1 * torch.randn(4, 2, 6, 6)
    reference = network(image).sigmoid().detach()
    r = VAT("sigmoid", eps=0.3).perturbation(network, image, reference)
    assert r.square().mean((1, 2, 3)).sqrt().numpy() == pytest.approx(0.3, rel=1e-5)
    for one in r:
        assert abs(cosine(one, network.weight[0])) > 0.999
    masked = VAT("sigmoid", eps=0.3).perturbation(network, image, reference, mask=torch.arange(6) < 3)
    for one in masked:
        assert abs(cosine(one[..., :3], network.weight[0][..., :3])) > 0.999
        assert (one[..., 3:] == 0).all()


def test_direction_for_a_linear_softmax_is_the_leading_eigenvector():
    torch.manual_seed(0)
    network, image = Linear((1, 3, 3), classes=3), torch.randn(1, 1, 3, 3)
    p = network(image).softmax(1).detach()
    w, q = network.weight.detach().flatten(1), p[0, :, 0]
    hessian = w.T @ (torch.diag(q) - torch.outer(q, q)) @ w  # of KL at r = 0: Fisher information
    leading = torch.linalg.eigh(hessian).eigenvectors[:, -1]
    r = VAT("softmax", iterations=30).perturbation(network, image, p)
    assert abs(cosine(r, leading)) > 0.999


def small(width: int = 4, norm: str = "group") -> DilatedUNet:
    return DilatedUNet(2, 3, dimensions=2, width=width, norm=norm)


@pytest.mark.parametrize("target", ["truth", "prediction"])
def test_adversarial_direction_beats_random_ones_of_the_same_norm(target):
    torch.manual_seed(0)
    network, image = small(), torch.randn(2, 2, 16, 16)
    reference = (torch.rand(2, 3, 16, 16) > 0.7).float() if target == "truth" else network(image).sigmoid().detach()
    vat = VAT("sigmoid", eps=0.02, iterations=2)

    def raised(r):
        return divergence(network(image + r), reference, "sigmoid").mean((1, 2, 3))

    adversarial = vat.perturbation(network, image, reference)
    control = VAT("sigmoid", eps=0.02, iterations=0)
    random = torch.stack([raised(control.perturbation(network, image, reference)) for _ in range(20)])
    assert (raised(adversarial) > random.amax(dim=0)).all()


def test_search_runs_in_single_precision_under_autocast_and_points_where_double_precision_does():
    torch.manual_seed(0)
    network, image = small(), torch.randn(1, 2, 16, 16)
    vat, seeded = VAT("sigmoid", eps=1.0), partial(torch.Generator().manual_seed, 3)
    reference = network(image).sigmoid().detach()
    single = vat.perturbation(network, image, reference, generator=seeded())
    plain = vat(network, image, generator=seeded())
    with torch.autocast("cpu", torch.bfloat16):
        assert network(image).dtype == torch.bfloat16
        assert torch.equal(vat.perturbation(network, image, reference, generator=seeded()), single)
        half = vat(network, image, generator=seeded())
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(plain.item(), rel=0.05)
    network.double()
    start = unit_rms(torch.randn(image.shape, generator=seeded())).double().requires_grad_()
    q = network(image.double()).sigmoid().detach()
    values = F.binary_cross_entropy_with_logits(network(image.double() + vat.xi * start), q, reduction="sum")
    assert cosine(single.double(), torch.autograd.grad(values, start)[0]) > 0.99


# what a pass leaves behind


class Memory(nn.Module):
    """Batch normalization and dropout, whose state a pass in training mode would change."""

    def __init__(self, momentum=0.1):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4, momentum=momentum),
            nn.InstanceNorm2d(4, track_running_stats=True),
            nn.Dropout(0.5),
            nn.Conv2d(4, 3, 1),
        )

    def forward(self, image):
        return {"logits": self.layers(image), "deep": []}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_vat_leaves_statistics_generators_modes_and_gradients_alone(kind, momentum):
    torch.manual_seed(0)
    network, image = Memory(momentum), torch.randn(2, 2, 8, 8)
    before, state = deepcopy(network.state_dict()), torch.get_rng_state()
    vat = VAT(kind, eps=0.5, iterations=2)
    generator = torch.Generator().manual_seed(1)
    loss = vat(network, image, generator=generator)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(before, network.state_dict())
    assert all(m.training for m in network.modules())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert not loss.isnan()
    loss.backward()
    assert all(p.grad is not None for p in network.parameters())
    assert image.grad is None
    assert torch.equal(loss, vat(network, image, generator=torch.Generator().manual_seed(1)))


def test_dropout_has_one_mask_for_all_passes():
    torch.manual_seed(0)
    network, image = Memory(), torch.randn(2, 2, 8, 8)
    assert VAT("sigmoid", eps=0.0)(network, image).abs() < 1e-6  # another mask for the reference would be a divergence
    dropped = []
    network.layers[3].register_forward_hook(lambda _, inputs, output: dropped.append(output == 0))
    VAT("sigmoid", eps=0.2, iterations=2)(network, image)
    assert len(dropped) == 4  # reference, two probes, loss
    assert all(torch.equal(one, dropped[0]) for one in dropped)
    assert not torch.equal(stateless(network, image, seed=1)["logits"], stateless(network, image, seed=2)["logits"])
    assert torch.equal(stateless(network, image, seed=1)["logits"], stateless(network, image, seed=1)["logits"])


def test_vat_does_not_flow_through_the_perturbation_or_the_reference():
    torch.manual_seed(0)
    network, image = small(), torch.randn(1, 2, 16, 16)
    reference = network(image).sigmoid()
    generator = torch.Generator().manual_seed(5)
    VAT("sigmoid", eps=0.2)(network, image, generator=generator).backward()
    ours = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    r = VAT("sigmoid", eps=0.2).perturbation(network, image, reference.detach(), generator=torch.Generator().manual_seed(5))
    divergence(network(image + r), reference.detach(), "sigmoid").mean().backward()
    for gradient, parameter in zip(ours, network.parameters(), strict=True):
        assert torch.allclose(gradient, parameter.grad, atol=1e-7)
    assert not r.requires_grad


def test_voxels_that_do_not_count_change_nothing():
    torch.manual_seed(0)
    network, image = nn.Conv2d(2, 3, 1), torch.randn(2, 2, 8, 8)
    truth = (torch.rand(2, 3, 8, 8) > 0.5).float()
    valid = (torch.rand(2, 3, 8, 8) > 0.3).float()
    seeded = partial(torch.Generator().manual_seed, 2)
    one, other = (
        VAT("sigmoid")(network, image, t, valid=valid, generator=seeded()) for t in (truth, torch.where(valid > 0, truth, 1 - truth))
    )
    assert torch.equal(one, other)


# the critic


def test_losses_of_critic_and_network_by_hand():
    undecided = torch.zeros(2, 3, 4, 4)
    assert critic_loss(undecided, undecided).item() == pytest.approx(math.log(2))
    assert fooling_loss(undecided).item() == pytest.approx(math.log(2))
    real, fake = torch.logit(torch.full((1, 1, 1), 0.8)), torch.logit(torch.full((1, 1, 1), 0.3))
    assert critic_loss(real, fake).item() == pytest.approx(-(math.log(0.8) + math.log(0.7)) / 2, rel=1e-5)
    assert critic_loss(real, fake, "lsgan").item() == pytest.approx(((real - 1) ** 2 + fake**2).item() / 2)
    assert critic_loss(real, fake, "wgan_gp").item() == pytest.approx((fake - real).item())
    assert fooling_loss(fake, "lsgan").item() == pytest.approx(((fake - 1) ** 2).item() / 2)
    with pytest.raises(SuiteError, match="critic loss"):
        critic_loss(real, fake, "hinge")


def test_gradient_penalty_of_a_linear_critic():
    weight = torch.tensor([3.0, 0.0, 4.0])

    def critic(masks):
        return torch.einsum("bkxy,k->bxy", masks, weight)[:, None]

    penalty = gradient_penalty(critic, torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4))
    assert penalty.item() == pytest.approx((5 - 1) ** 2, rel=1e-4)


@pytest.mark.parametrize("kind", ["bce", "lsgan", "wgan_gp"])
def test_following_the_adversarial_gradient_raises_the_answer(kind):
    torch.manual_seed(0)
    critic, masks = PixelCritic(3, dimensions=2), torch.rand(2, 3, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(fooling_loss(critic(masks), kind), masks)
    assert critic(masks - 10 * gradient).mean() > critic(masks).mean()


def nested_masks(generator: torch.Generator, violate: bool) -> torch.Tensor:
    """Masks (4, 3, 16, 16) of WT, TC, ET as nested discs; `violate` also marks 30 % of WT minus TC as ET."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(16.0),) * 2, indexing="ij"))
    center = 6 + 4 * torch.rand((4, 2, 1, 1), generator=generator)
    distance = (grid - center).square().sum(1).sqrt()
    wt, tc, et = (distance < r for r in (6, 4, 2.5))
    if violate:
        et = et | (wt & ~tc & (torch.rand(wt.shape, generator=generator) < 0.3))
    return torch.stack([wt, tc, et], 1).float()


def test_critic_learns_what_a_violation_is():
    torch.manual_seed(0)
    critic, generator = PixelCritic(3, dimensions=2), torch.Generator().manual_seed(0)
    optimizer = torch.optim.RMSprop(critic.parameters(), lr=1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        critic_loss(critic(nested_masks(generator, False)), critic(nested_masks(generator, True))).backward()
        optimizer.step()
    masks = nested_masks(generator, True)
    wrong = (masks[:, 2] > masks[:, 1]).flatten()
    answers = critic.eval()(masks).sigmoid().mean(dim=1).flatten()
    assert answers[wrong].max() < answers[~wrong].min()  # AUROC 1


# the method: which term reaches which network


def built(**options) -> ReciprocalAdversarial:
    torch.manual_seed(0)
    defaults = {
        "network": partial(DilatedUNet, dimensions=2, width=4),
        "loss": RegionDice(batch=True, smooth=1.0),
        "inferer": Whole(),
        "target": RegionSigmoid,
        "critic": PixelCritic,
        "vat": partial(VAT, eps=0.3),
        "weights": {"vat": 0.2, "critic": 0.3},
        "optimizer": {"network": partial(torch.optim.Adam, lr=1e-3), "critic": partial(torch.optim.RMSprop, lr=1e-3)},
    }
    return ReciprocalAdversarial(TASK, **{**defaults, **options})


def batches(count: int, seed: int = 0, labeled: bool = True) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        batch = {"image": torch.randn((2, 2, 16, 16), generator=generator), "brain_mask": torch.ones(2, 1, 16, 16, dtype=torch.bool)}
        batch["brain_mask"][..., :3] = False
        if labeled:
            batch["label"] = torch.randint(0, 4, (2, 1, 16, 16), generator=generator)
        made.append(batch)
    return made


class Spy:
    """Mixin that notes, before every optimizer step, who has gradients, and the weights and buffers before and after it."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.phases = []

    def optimizing(self, name, advance=True):
        self.current = name
        return super().optimizing(name, advance)

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        gradients = {n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None}
        self.phases.append((self.current, gradients, deepcopy(self.state_dict())))


class Spied(Spy, ReciprocalAdversarial):
    pass


def fitted(method, data, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", use_distributed_sampler=False, **quiet, **options)
    loader = (
        DataLoader(data, batch_size=None)
        if isinstance(data, list)
        else CombinedLoader({n: DataLoader(d, batch_size=None) for n, d in data.items()})
    )
    trainer.fit(method, loader)
    return method


def spied(**options):
    method = built(**options)
    method.__class__ = Spied
    method.phases = []
    return method


def changed(before: dict, after: dict) -> set[str]:
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    "critic", [PixelCritic, partial(PixelCritic, norm="batch"), partial(PixelCritic, norm="spectral")], ids=["none", "batch", "spectral"]
)
def test_each_phase_reaches_its_own_network_only(critic):
    method = spied(critic=critic)
    start = deepcopy(method.state_dict())
    fitted(method, batches(2))
    names = [name for name, _, _ in method.phases]
    assert names == ["network", "critic"] * 2  # one step each per batch, none twice
    states = [start, *(state for _, _, state in method.phases), method.state_dict()]
    for (name, gradients, _), parts in zip(method.phases, [{"network"}, {"critic"}] * 2, strict=True):
        own = {n for n, _ in method.named_parameters() if n.startswith(name)}
        assert set(gradients) == own
        assert all(g.abs().sum() > 0 for n, g in gradients.items() if not n.endswith("out.bias")), parts
    assert changed(states[1], states[2]) == {"network", *(["critic"] if critic is not PixelCritic else [])}
    only = [n for n in states[1] if n.startswith("critic") and n in dict(method.named_parameters())]
    assert all(torch.equal(states[1][n], states[2][n]) for n in only)  # between the first two steps the critic's weights rest
    assert changed(states[0], states[1]) == set()  # and nothing of it, statistics included, moves in the network's phase
    assert changed(states[2], states[3]) == {"critic"}
    assert all(p.requires_grad for p in method.parameters())


def gradients_of(**options) -> dict[str, torch.Tensor]:
    """The network's gradients in its first step."""
    method = spied(**options)
    fitted(method, batches(1))
    return method.phases[0][1]


def test_gradient_is_the_weighted_sum_of_its_terms():
    dice = gradients_of(weights={})
    vat, critic = gradients_of(weights={"vat": 1.0}), gradients_of(weights={"critic": 1.0})
    both = gradients_of(weights={"vat": 0.2, "critic": 0.3})
    for name in dice:
        assert not torch.equal(vat[name], dice[name])
        assert not torch.equal(critic[name], dice[name])
        expected = dice[name] + 0.2 * (vat[name] - dice[name]) + 0.3 * (critic[name] - dice[name])
        assert torch.allclose(both[name], expected, atol=1e-6)


def test_published_gradients_are_those_of_a_network_without_vat_and_a_critic_that_never_learns():
    method = spied(gradients="published")
    start = deepcopy(method.critic.state_dict())
    fitted(method, batches(2))
    assert [name for name, _, _ in method.phases] == ["network"] * 2
    assert_same(start, method.critic.state_dict())
    with_vat, without = gradients_of(gradients="published"), gradients_of(gradients="published", weights={"critic": 0.3})
    assert all(torch.equal(with_vat[n], without[n]) for n in without)
    real = gradients_of(weights={"critic": 0.3})
    assert not all(torch.equal(real[n], without[n]) for n in without)


@pytest.mark.parametrize(("gradients", "rises"), [("real", True), ("published", False)])
def test_network_fools_the_critic_unless_the_published_gradients_are_asked_for(gradients, rises):
    method = built(gradients=gradients, instance_noise=0.0)
    method.generator = lambda name: torch.Generator().manual_seed(0)
    logits, truth, valid = torch.randn(1, 3, 8, 8, requires_grad=True), torch.rand(1, 3, 8, 8).round(), torch.ones(1, 3, 8, 8)
    (gradient,) = torch.autograd.grad(method._adversarial([(logits, torch.zeros(1, 2, 8, 8), valid)], truth), logits)
    seen = (lambda z: z.sigmoid()) if rises else (lambda z: z)
    assert (method.critic(seen(logits - 10 * gradient)).mean() > method.critic(seen(logits)).mean()) == rises


def test_without_both_terms_it_is_supervised_training_to_the_last_bit():
    plain = built(weights={})
    options = {"network": partial(DilatedUNet, dimensions=2, width=4), "loss": RegionDice(batch=True, smooth=1.0), "inferer": Whole()}
    torch.manual_seed(0)
    supervised = Supervised(TASK, target=RegionSigmoid, optimizer=partial(torch.optim.Adam, lr=1e-3), **options)
    fitted(plain, batches(3))
    fitted(supervised, batches(3))
    assert_same(plain.network.state_dict(), supervised.network.state_dict())


def test_logged_terms_add_up(monkeypatch):
    logged = []
    method = built(warmup={"vat": 4, "critic": 5})
    monkeypatch.setattr(method, "log_terms", lambda **terms: logged.append({n: float(t.detach()) for n, t in terms.items()}))
    fitted(method, batches(2))
    for number, terms in enumerate(logged):
        expected = terms["supervised"] + (number + 1) * (0.2 / 4 * terms["vat"] + 0.3 / 5 * terms["adversarial"])
        assert terms["loss"] == pytest.approx(expected, rel=1e-6)
        assert terms["critic"] > 0


@pytest.mark.parametrize("brain", [True, False])
def test_change_has_its_size_in_deviations_and_stays_in_the_brain_and_the_channels_there_are(brain):
    method, (batch,) = built(vat_brain=brain), batches(1)
    method.image_sd.fill_(0.5)
    batch["channel_mask"] = torch.tensor([[True, True], [True, False]])
    seen = []
    method.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    method._vat(batch, *method.target.as_maps(method.target.encode(batch["label"])), None)
    allowed = batch["channel_mask"][:, :, None, None] & (batch["brain_mask"] if brain else torch.tensor(True))
    for view, size in zip(seen, (0.5 * 1e-3, 0.5 * 0.3), strict=True):  # the probe, then the change itself
        for r, inside in zip(view - batch["image"], allowed.expand_as(view), strict=True):
            assert r[inside].square().mean().sqrt() == pytest.approx(size, rel=1e-2)
            assert (r[~inside] == 0).all()


class Asked(nn.Module):
    """Stands in for VAT: notes what it is asked about; its loss is 1 the first time, then 2."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, network, image, reference=None, *, valid=None, **options):
        self.calls.append((reference, valid))
        return torch.tensor(float(len(self.calls)))


@pytest.mark.parametrize("target", ["truth", "prediction"])
def test_what_vat_compares_with_and_that_images_count_alike(target):
    method, (labeled,), (unlabeled,) = built(vat_target=target, unlabeled=True), batches(1), batches(1, seed=1, labeled=False)
    method.vat = Asked()
    truth, valid = method.target.as_maps(method.target.encode(labeled["label"]))
    loss = method._vat(labeled, truth, valid, {name: torch.cat([value, value[:1]]) for name, value in unlabeled.items()})
    (first, counted), (second, everywhere) = method.vat.calls
    assert first is (truth if target == "truth" else None)
    assert counted is valid
    assert second is None
    assert everywhere is None
    assert loss == pytest.approx((2 * 1 + 3 * 2) / 5)  # two labeled images, three unlabeled


class Watching(nn.Module):
    """A critic that notes the masks it is shown and answers with them."""

    def __init__(self, **_):
        super().__init__()
        self.seen = []

    def forward(self, masks, image=None):
        self.seen.append(masks)
        return masks


@pytest.mark.parametrize("kind", ["bce", "lsgan", "wgan_gp"])
@pytest.mark.parametrize("noise", [0.0, 0.15])
def test_masks_that_the_critic_sees(noise, kind):
    """True and predicted ones, 0 where the truth is unknown, each with noise of its own; and what is made of the answers."""
    method = built(instance_noise=noise, critic=Watching, adversary=kind, penalty=0.5)
    generator = torch.Generator().manual_seed(0)
    logits, image = torch.randn((2, 3, 40, 40), generator=generator), torch.zeros(2, 2, 40, 40)
    truth, valid = (torch.rand((2, 3, 40, 40), generator=generator) > share for share in (0.5, 0.3))
    truth, valid = truth.float(), valid.float()
    fooled = method._adversarial([(logits, image, valid)], truth)
    learned = method._critic_loss([(logits.sigmoid(), image, valid)], truth, 0)
    in_network, fake, real, *mixed = method.critic.seen
    # answers are the masks, so that every gradient is (1, 1, 1)
    assert learned == pytest.approx(critic_loss(real, fake, kind).item() + (0.5 * (3**0.5 - 1) ** 2 if mixed else 0), rel=1e-5)
    assert len(mixed) == (kind == "wgan_gp")
    assert fooled == pytest.approx(fooling_loss(in_network, kind).item())
    clean = [logits.sigmoid() * valid, logits.sigmoid() * valid, truth * valid]
    drawn = [masks - mask for masks, mask in zip((in_network, fake, real), clean, strict=True)]
    for one in drawn:
        assert one.std() == pytest.approx(noise, rel=0.05)
    assert not noise or torch.corrcoef(torch.stack([one.flatten() for one in drawn])).triu(1).abs().max() < 0.1


def test_unlabeled_images_reach_both_terms():
    labeled, unlabeled = batches(1), batches(1, seed=1, labeled=False)
    alone = gradients_of(unlabeled=False)
    for part in ("vat", "critic"):
        method = spied(unlabeled=True, weights={part: 0.5})
        fitted(method, {"labeled": labeled, "unlabeled": unlabeled})
        (name, with_more, _), *rest = method.phases
        assert name == "network"
        reference = gradients_of(weights={part: 0.5})
        assert not all(torch.equal(with_more[n], reference[n]) for n in reference)
        assert [n for n, _, _ in rest] == (["critic"] if part == "critic" else [])
        assert set(with_more) == set(alone)


@pytest.mark.parametrize(
    "options",
    [
        {"adversary": "wgan_gp", "critic_steps": 3},
        {"adversary": "lsgan", "vat_target": "prediction"},
        {"target": ClassSoftmax, "loss": DiceCE()},
    ],
)
def test_switches_train_both_networks(options):
    method = spied(**options)
    start = deepcopy(method.state_dict())
    fitted(method, batches(1))
    assert [n for n, _, _ in method.phases] == ["network"] + ["critic"] * options.get("critic_steps", 1)
    assert changed(start, method.state_dict()) == {"network", "critic"}
    assert all(p.isfinite().all() for p in method.parameters())


def test_several_critic_steps_advance_its_schedule_once():
    method = built(critic_steps=3, scheduler={"network": poly, "critic": poly})
    fitted(method, batches(4))
    assert [s.last_epoch for s in method.lr_schedulers()] == [4, 4]
    with pytest.raises(SuiteError, match="critic_steps=3"):
        built(critic_steps=3, accumulate=2)


def test_mistakes_in_options_are_named():
    for wrong in ({"weights": {"dice": 1.0}}, {"vat_target": "gt"}, {"adversary": "hinge"}, {"gradients": "none"}):
        with pytest.raises(SuiteError, match=next(iter(wrong))):
            built(**wrong)
    low = {"weights": {"vat": -0.2}, "warmup": {"critic": -1}, "penalty": -1.0, "instance_noise": -0.1, "critic_steps": 0}
    for name, value in low.items():
        with pytest.raises(SuiteError, match=rf"model\.{name}.*: at least"):
            built(**{name: value})
    with pytest.raises(SuiteError, match=r"model\.scheduler has \['network'\], the method trains \['critic', 'network'\]"):
        fitted(built(scheduler={"network": partial}), batches(1))


# half precision: a scaler on the CPU


def with_scaler(scale: float = 1024.0):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6))
    plugin.precision = "bf16-mixed"  # autocast in a type that this CPU has; the scaler stays
    return plugin


@pytest.mark.parametrize(("bad", "kept"), [("network", "critic"), ("critic", "network")])
def test_overflow_in_one_optimizer_skips_only_its_step(bad, kept):
    method = spied(clip=1.0)
    start = deepcopy(method.state_dict())
    hook = next(p for n, p in method.named_parameters() if n.startswith(bad)).register_hook(lambda g: g * torch.inf)
    plugin = with_scaler()
    fitted(method, batches(1), plugins=[plugin])
    hook.remove()
    assert changed(start, method.state_dict()) == {kept}
    assert plugin.scaler.get_scale() == 512


def test_a_scale_that_drops_within_a_window_does_not_distort_the_other_optimizer():
    def critic_after(overflow: bool) -> dict:
        method = built(accumulate=2, instance_noise=0.0)
        if overflow:  # in the network's second backward, when the critic has summed up half of its window
            calls = []
            parameter = next(method.network.parameters())
            parameter.register_hook(lambda g: calls.append(0) or (g * torch.inf if len(calls) == 2 else g))
        fitted(method, batches(2), plugins=[with_scaler()])
        return method.critic.state_dict()

    calm, overflowed = critic_after(False), critic_after(True)
    for name in calm:
        assert torch.allclose(calm[name], overflowed[name], atol=1e-6), name


def test_clipping_counts_unscaled_gradients_under_a_scaler():
    method = spied(clip=0.5)
    fitted(method, batches(1), plugins=[with_scaler()])
    for name, gradients, _ in method.phases:
        norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
        assert norm <= 0.5 + 1e-4, name


# whole runs


class InSync(pl.Callback):
    """Compares the weights of all processes after training."""

    def on_train_end(self, trainer, pl_module):
        gathered = pl_module.all_gather(torch.cat([p.detach().flatten() for p in pl_module.parameters()]))
        assert len(gathered) == 2
        assert torch.equal(gathered[0], gathered[1])
        assert pl_module.image_sd == pytest.approx(1.0, abs=0.05)  # z-scored images


RUN = [
    "experiment=supervised/folder", "model=reciprocal_adversarial", "augmentation=light", "epochs=3", "patch=[16,16,16]", "data.samples_per_epoch=8", "data.batch_size=2", "data.num_workers=0",
    "data.split.test=2", "data.split.val=1", "data.channels=[t1,flair]", "metrics.names=[dice,error_auroc]", "data.check=false",
    "model.network.width=4", "model.critic.norm=spectral", "callbacks.figures=null", "threads=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_fake_folder(tmp_path_factory.mktemp("data"), 8, shape=(18, 16, 16), classes={"background": 0, "core": 1, "rim": 2})


def configured(folder, runs, *more: str) -> list[str]:
    named = ["data.classes={background:0,core:1,rim:2}", "data.regions={ALL:[core,rim],CORE:[core]}"]
    return [*RUN, *named, f"data.root={folder}", f"runs={runs}", *more]


def test_kill_and_resume_is_bit_identical(folder, tmp_path):
    more = ["accumulate=2", "clip=1.0", "epochs=2"]
    run(*configured(folder, tmp_path / "whole", *more))
    killed = configured(folder, tmp_path / "killed", *more, "callbacks.checkpoint.every_n_batches=1")
    assert run_killed(*killed, "callbacks.progress._target_=tests.toys.KillAt", "+callbacks.progress.iteration=5") == -signal.SIGKILL
    run(*killed, "resume=true")
    whole, resumed = (run_folders(tmp_path / name)[0] for name in ("whole", "killed"))
    assert_same(weights(whole), weights(resumed))
    states = [torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"] for f in (whole, resumed)]
    for a, b in zip(*states, strict=True):
        assert all(torch.equal(a["state"][i][k], b["state"][i][k]) for i in a["state"] for k in a["state"][i])
    assert rows(whole) == rows(resumed)


def test_two_processes_and_accumulation_equal_a_larger_batch(folder, tmp_path):
    options = [
        "augmentation=none",
        "epochs=1",
        "model.weights.vat=0",
        "model.instance_noise=0",
        "model.critic.norm=none",
        "stages=[{name:fit,run:fit}]",
    ]
    options += [
        "data.samples_per_epoch=4",
        "model/optimizer@model.optimizer.network=sgd",
        "model/optimizer@model.optimizer.critic=sgd",
        "model.optimizer.network.lr=1e-2",
        "model.loss.batch=false",
    ]
    run(*configured(folder, tmp_path / "large", *options))
    run(*configured(folder, tmp_path / "accumulated", *options, "data.batch_size=1", "accumulate=2"))
    run(*configured(folder, tmp_path / "two", *options, "data.batch_size=1", "trainer=ddp_sim"))
    large, accumulated, two = (weights(run_folders(tmp_path / name)[0]) for name in ("large", "accumulated", "two"))
    for name in large:
        assert torch.allclose(large[name], accumulated[name], atol=1e-6), name
        assert torch.allclose(large[name], two[name], atol=1e-6), name


def test_whole_method_runs_on_two_processes_and_they_agree(folder, tmp_path):
    run(
        *configured(
            folder,
            tmp_path,
            "trainer=ddp_sim",
            "epochs=1",
            "model.critic.norm=none",
            "callbacks.progress._target_=tests.methods.test_reciprocal_adversarial.InSync",
        )
    )
    assert rows(run_folders(tmp_path)[0])


def test_confidence_map_is_written_and_measured(folder, tmp_path):
    run(*configured(folder, tmp_path, "epochs=1", "data.preprocessing.normalize=minmax", "trainer.log_every_n_steps=1"))
    (found,) = run_folders(tmp_path)
    regional = [r for r in rows(found) if r["region"]]
    assert all({"auroc_critic", "auroc_entropy"} <= set(r) for r in regional)
    assert all(math.isfinite(float(r["nesting_violations"])) for r in rows(found) if not r["region"])
    with (found / "metrics.csv").open() as file:
        curves = {r["name"]: float(r["value"]) for r in csv.DictReader(file)}
    assert 0.05 < curves["train/image_sd"] < 0.5  # brain voxels of images in [0, 1]
    assert curves["train/vat_eps"] == pytest.approx(0.2 * curves["train/image_sd"], rel=1e-5)
    assert "val/nesting_violations" in curves
    out = tmp_path / "out"
    run("job=predict", f"ckpt={found / 'checkpoints' / 'last.ckpt'}", f"input={folder / 'images'}", f"out={out}", "writer.uncertainty=true")
    mask, confidence = (nib.load(out / "predictions" / f"case_00{s}.nii.gz") for s in ("", "_uncertainty_critic"))
    assert mask.shape == confidence.shape
    values = confidence.get_fdata()
    assert values.std() > 0  # one less than the answer, which is not the same everywhere
    assert values.max() < 1


def test_nesting_violations_by_hand():
    method, maps = built(), torch.zeros(1, 3, 2, 5)
    maps[0, 0, 0], maps[0, 1, 0, :3], maps[0, 2, 1, :2] = 0.9, 0.9, 0.9  # two voxels of ET outside of TC
    assert dict(method._violations(maps)) == {"nesting_violations": 200.0}


def test_image_deviation_counts_brain_voxels_of_present_channels():
    class Data:
        parts = {"train": [0, 1]}  # noqa: RUF012

        def case_loader(self, cases):
            generator = torch.Generator().manual_seed(0)
            for number in cases:
                image = torch.zeros(1, 2, 20, 20, 20)
                brain = torch.zeros(1, 1, 20, 20, 20, dtype=torch.bool)
                brain[..., 5:15, :, :] = True
                image[:, 0] = 100 + (1 + number) * torch.randn((20, 20, 20), generator=generator)
                yield {"image": image * brain, "brain_mask": brain, "channel_mask": torch.tensor([[True, False]]), "again": [False]}

    class Strategy:
        def reduce(self, value, reduce_op):
            return value

    method = built()
    method.__dict__["_trainer"] = type("T", (), {"datamodule": Data(), "strategy": Strategy()})()
    assert method._measured_sd() == pytest.approx(math.sqrt((1 + 4) / 2), rel=0.02)
