"""One-sided Hausdorff losses against numbers by hand, the branch's gradients, the schedule, the middles of windows, the analytic optimum."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torchio

from datamodules.transforms.intensity import RandomNormalIntensity
from datamodules.transforms.placement import NormalPlacement
from lesionbench.errors import SuiteError
from lesionbench.target import RegionSigmoid
from lesionbench.task import Task
from lightning_modules import VAEUNetHausdorff
from lightning_modules.distances import DistanceMaps, distance_outside
from lightning_modules.inferers import Central, Whole
from lightning_modules.losses import CrossEntropy, RegionBCE, one_sided_hausdorff
from lightning_modules.networks import segresnet_vae
from lightning_modules.schedules import held
from tests.toys import small_net

TASK = Task(("t1", "flair"), {"background": 0, "a": 1, "b": 2})
BRATS = Task(("t1", "t1ce", "t2", "flair"), {"background": 0, "ncr": 1, "ed": 2, "et": 4})
EVERY = torch.ones(1, 1, 4)


def method(task=TASK, network=None, **options):
    network = network or partial(
        segresnet_vae, image_size=16, features=8, dropout=0.0, own_decoder=True, blocks_down=(1, 1, 1), blocks_up=(1, 1)
    )
    return VAEUNetHausdorff(task, network=network, loss=CrossEntropy(), inferer=Whole(), **options)


def batch(count=2, side=16):
    torch.manual_seed(0)
    label = torch.zeros(count, 1, side, side, side, dtype=torch.int8)
    label[:, :, 3:7, 3:9, 4:8], label[:, :, 4:6, 4:6, 5:7] = 1, 2
    maps = DistanceMaps(of="classes", background=True)
    distance = torch.stack([torch.from_numpy(maps(case[0].numpy(), TASK, (1.0, 1.0, 1.0))) for case in label])
    return {"image": torch.randn(count, 2, side, side, side), "label": label, "distance": distance, "case": ["x"] * count}


# losses


def test_both_losses_by_hand():
    labels = torch.tensor([0, 0, 1, 0])
    u = torch.stack([torch.from_numpy(distance_outside((labels == c).numpy()[None], (1.0, 1.0))[0]) for c in (0, 1)])[None]
    assert u[0].tolist() == [[0, 0, 1, 0], [2, 1, 0, 1]]
    q = torch.tensor([[[0.5, 1, 0, 0.5], [0.5, 0, 1, 0.5]]])
    mean, largest = one_sided_hausdorff(q, u, EVERY)
    assert (mean.item(), largest.item()) == (0.1875, 0.5)
    half = torch.tensor([[[1.0, 0, 1, 0]]])  # voxels 1 and 3 are ignored: 1 of 2 voxels costs 1, and 1 is the largest
    assert [v.item() for v in one_sided_hausdorff(q, u, half)] == [0.25, 0.5]
    squares = [v.item() for v in one_sided_hausdorff(q, u, EVERY, alpha=2, beta=2)]
    assert squares == [(0.25 * 4 + 0.25) / 8, 0.5]


def test_a_perfect_answer_costs_nothing():
    data = batch()
    q = torch.nn.functional.one_hot(data["label"][:, 0].long(), 3).movedim(-1, 1).float()
    assert [v.item() for v in one_sided_hausdorff(q, data["distance"].float(), torch.ones(2, 1, 16, 16, 16))] == [0, 0]


def test_two_labels_times_the_mean_loss_are_the_one_label_loss_of_distances_to_the_border():
    rng = np.random.default_rng(0)
    truth = np.zeros((12, 11, 10), bool)
    truth[3:8, 4:9, 2:7] = True
    u = np.stack([distance_outside(mask, (1.0, 1.0, 1.0)) for mask in (~truth, truth)])
    q = torch.from_numpy(rng.random(truth.shape)).float()
    both = torch.stack([1 - q, q])[None]
    mean, _ = one_sided_hausdorff(both, torch.from_numpy(u)[None], torch.ones(1, 1, *truth.shape), beta=2)
    p, d = torch.from_numpy(truth).float(), torch.from_numpy(u.sum(axis=0))  # outside: to the structure; inside: to the background
    torch.testing.assert_close(2 * mean, ((p - q).square() * d).mean())


def test_mean_grows_with_the_distance_of_a_false_positive_and_cross_entropy_does_not():
    found = []
    for place in (10, 20, 30):
        truth = torch.zeros(1, 1, 40, dtype=torch.long)
        truth[..., :3] = 1
        u = torch.stack([torch.from_numpy(distance_outside((truth[0, 0] == c).numpy()[None], (1.0, 1.0))[0]) for c in (0, 1)])[None]
        logits = torch.where(truth == 1, 9.0, -9.0).repeat(1, 2, 1) * torch.tensor([[[-1.0], [1.0]]])
        logits[0, :, place] *= -1
        mean, _ = one_sided_hausdorff(logits.softmax(1), u, torch.ones(1, 1, 40))
        found.append((mean.item(), CrossEntropy()(logits, truth).item()))
    assert found[1][0] - found[0][0] == pytest.approx(10 / 80, rel=1e-3) == pytest.approx(found[2][0] - found[1][0], rel=1e-3)
    assert found[0][1] == pytest.approx(found[2][1])


def test_the_largest_pulls_at_one_voxel_of_each_label_and_sample():
    torch.manual_seed(0)
    q = torch.rand(2, 3, 5, 5, requires_grad=True)
    _, largest = one_sided_hausdorff(q, torch.rand(2, 3, 5, 5) + 0.1, torch.ones(2, 1, 5, 5))
    largest.backward()
    assert (q.grad != 0).flatten(2).sum(dim=2).eq(1).all()


def test_an_absent_label_adds_nothing():
    label = np.zeros((8, 8, 8), np.int8)
    label[2:4, 2:4, 2:4] = 1
    maps = DistanceMaps(of="classes", background=True)(label, TASK, (1.0, 1.0, 1.0))
    assert not maps[2].any()
    assert maps[1].any()
    q = torch.rand(1, 3, 8, 8, 8, requires_grad=True)
    mean, largest = one_sided_hausdorff(q, torch.from_numpy(maps)[None].float(), torch.ones(1, 1, 8, 8, 8))
    (mean + largest).backward()
    assert torch.isfinite(mean)
    assert not q.grad[:, 2].any()
    assert q.grad[:, 1].any()


# the analytic optimum: a voxel of posterior pi of a label at distance u


def optimum(pi, u, weight=0.1):
    """Minimizes -pi log q - (1 - pi) log(1 - q) + weight (q u + (1 - q)) / 2 over q, by Newton's method on the logit."""
    logit = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = torch.optim.LBFGS([logit], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        loss.zero_grad()
        q = logit.sigmoid()
        mean, _ = one_sided_hausdorff(
            torch.stack([1 - q, q]).view(1, 2, 1), torch.tensor([[[1.0], [u]]], dtype=torch.float64), torch.ones(1, 1, 1)
        )
        value = -pi * q.log() - (1 - pi) * (1 - q).log() + weight * mean
        value.backward()
        return value

    loss.step(closure)
    return logit.sigmoid().item()


def closed_form(pi, u, weight=0.1):
    """The root in (0, 1) of c q^2 - (c + 1) q + pi = 0, c = weight (u - 1) / 2: where the derivative by q is 0."""
    c = weight * (u - 1) / 2
    return pi if c == 0 else ((c + 1) - ((c + 1) ** 2 - 4 * c * pi) ** 0.5) / (2 * c)


def test_the_optimal_probability_falls_with_the_distance():
    distances = [0.0, 5.0, 10.0, 25.0, 50.0]
    found = [optimum(0.6, u) for u in distances]
    assert found == pytest.approx([0.612, 0.551, 0.488, 0.333, 0.203], abs=6e-4)
    assert found == pytest.approx([closed_form(0.6, u) for u in distances], abs=1e-4)
    assert closed_form(0.6, 9.0) == pytest.approx(0.5)  # further away a doubtful voxel becomes background


# the branch


@pytest.mark.parametrize(("width", "count"), [(32, 27_884_744), (16, 13_730_376)])
def test_parameters_of_the_shared_decoder(width, count):
    with torch.device("meta"):
        network = segresnet_vae(4, 4, image_size=144, features=width)
        own = segresnet_vae(4, 4, image_size=144, features=width, own_decoder=True)
    assert sum(p.numel() for p in network.parameters()) == count
    decoder = sum(p.numel() for part in (network.up_layers, network.up_samples) for p in part.parameters())
    assert sum(p.numel() for p in own.parameters()) == count + decoder == {32: 29_089_864, 16: 14_031_880}[width]


@pytest.mark.parametrize("own", [True, False])
def test_the_branch_teaches_the_encoder_and_only_its_own_decoder(own):
    torch.manual_seed(0)
    network = segresnet_vae(2, 3, image_size=16, features=8, dropout=0.0, own_decoder=own, blocks_down=(1, 1, 1), blocks_up=(1, 1))
    output = network(torch.randn(1, 2, 16, 16, 16))
    (output["reconstruction"] + output["kl"]).backward()
    reached = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name for name, _ in network.named_parameters() if name.startswith(("convInit", "down_layers"))} <= reached
    assert {name for name, _ in network.named_parameters() if name.startswith("vae_")} <= reached
    assert any(name.startswith(("up_", "conv_final")) for name in reached) != own
    torch.testing.assert_close(output["loss"], 0.1 * (output["reconstruction"] + output["kl"] / 2))


def test_both_terms_of_the_branch_by_hand():
    torch.manual_seed(0)
    network = segresnet_vae(2, 3, image_size=16, features=8, dropout=0.0, own_decoder=True, blocks_down=(1, 1, 1), blocks_up=(1, 1))
    image = torch.randn(1, 2, 16, 16, 16)
    first, second = (network(image)["reconstruction"].item() for _ in range(2))
    assert first != second  # the latent variables are drawn
    with torch.no_grad():
        for layer, value in ((network.vae_fc1, 0.5), (network.vae_fc2, 1.0)):
            layer.weight.zero_()
            layer.bias.fill_(value)
        for p in network.vae_conv_final.parameters():
            p.zero_()
    output, variance = network(image), math.log(1 + math.e) ** 2
    assert output["kl"].item() == pytest.approx(0.25 + variance - math.log(variance) - 1, abs=1e-5)
    assert output["reconstruction"].item() == pytest.approx(image.square().mean().item(), rel=1e-5)


def test_at_inference_the_branch_is_not_there():
    model = method().eval()
    image = torch.randn(1, 2, 16, 16, 16)
    expected = model(image)
    with torch.no_grad():
        for name, p in model.network.named_parameters():
            if name.startswith("vae_"):
                p.fill_(torch.nan)
    assert torch.equal(model(image), expected)


# the method


def terms_of(model, data):
    logged = {}
    model.log_terms = lambda **terms: logged.update(terms)
    torch.manual_seed(1)
    loss = model.training_step(data, 0)
    return loss, logged


def test_the_loss_is_the_weighted_sum_of_the_five():
    loss, terms = terms_of(method(), batch())
    assert set(terms) == {"loss", "cross_entropy", "mean", "max", "reconstruction", "kl"}
    expected = terms["cross_entropy"] + 0.1 * terms["mean"] + 0.01 * terms["max"] + 0.1 * terms["reconstruction"] + 0.1 * terms["kl"]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    loss, terms = terms_of(method(reconstruction_weight=0.3, kl_weight=0.02), batch())
    expected = terms["cross_entropy"] + 0.1 * terms["mean"] + 0.01 * terms["max"] + 0.3 * terms["reconstruction"] + 0.02 * terms["kl"]
    torch.testing.assert_close(loss, expected)


def test_both_distance_losses_are_those_of_the_map():
    data, model = batch(), method(network=small_net, reconstruction_weight=0, kl_weight=0).eval()
    _, terms = terms_of(model, data)
    with torch.no_grad():
        expected = one_sided_hausdorff(model(data["image"]).softmax(1), data["distance"].float(), torch.ones_like(data["label"]).float())
    torch.testing.assert_close((terms["mean"], terms["max"]), expected)


def test_every_option_matters():
    torch.manual_seed(0)
    data, model = batch(), method()
    plain, _ = terms_of(model, data)
    changes = {
        "mean_weight": 0.0, "max_weight": 1.0, "reconstruction_weight": 0.0, "kl_weight": 0.0, "alpha": 2.0, "beta": 2.0, "include_background": False,
    }  # fmt: skip
    for name, value in changes.items():
        other = method(**{name: value})
        other.load_state_dict(model.state_dict())
        assert terms_of(other, data)[0] != plain, name


def test_ignored_voxels_change_nothing():
    data = batch(1)
    model = method(network=small_net, reconstruction_weight=0, kl_weight=0).eval()
    data["label"][..., 10:] = -1
    _, first = terms_of(model, data)
    data["distance"][..., 10:] = 77
    _, second = terms_of(model, data)
    assert first == second


def test_what_does_not_go_together_is_refused():
    with pytest.raises(SuiteError, match=r"has no auto-encoder"):
        method(network=small_net)
    with pytest.raises(SuiteError, match="softmax"):
        VAEUNetHausdorff(TASK, network=small_net, loss=RegionBCE(), inferer=Whole(), target=RegionSigmoid)
    model, data = method(), batch()
    with pytest.raises(SuiteError, match=r"has 2 channel\(s\), VAEUNetHausdorff needs 3.*distance.background"):
        model.training_step({**data, "distance": data["distance"][:, 1:]}, 0)
    with pytest.raises(SuiteError, match="no distance map"):
        model.training_step({k: v for k, v in data.items() if k != "distance"}, 0)


# schedule, windows, augmentation


def test_the_rate_is_held_for_a_hundred_iterations():
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1e-4)
    schedule = held(optimizer, 1000)
    rates = []
    for _ in range(102):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:100] == pytest.approx([1e-7] * 100)
    assert rates[100:] == pytest.approx([1e-4] * 2)
    short = held(torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1e-4), 6).lr_lambdas[0]
    assert [round(short(i) * 1e-4, 9) for i in range(6)] == [1e-7] * 3 + [1e-4] * 3


@pytest.mark.parametrize("blending", ["mean", "running"])
@pytest.mark.parametrize("shape", [(17, 12, 9), (5, 20, 8), (8, 8, 8)])
def test_middles_of_windows_make_the_whole_volume(blending, shape):
    image = torch.randn(1, 2, *shape)
    inferer = Central((12, 10, 8), rim=1, overlap=0.4, blending=blending)
    sizes = []

    def identity(view):
        sizes.append(tuple(view.shape[2:]))
        return {"image": view, "first": view[:, :1]}

    found = inferer(image, identity, outside=torch.tensor([[3.0, -1.0]]))
    torch.testing.assert_close(found["image"], image)
    torch.testing.assert_close(found["first"], image[:, :1])
    assert set(sizes) == {(12, 10, 8)}


def test_overlapping_middles_are_averaged_or_run():
    image, calls = torch.zeros(1, 1, 6, 4, 4), iter(range(1, 9))

    def counting(view):
        return {"n": torch.full_like(view, float(next(calls)))}

    mean = Central((6, 6, 6), rim=1, overlap=0.75)(image, counting)["n"][0, 0, :, 0, 0]
    assert mean.tolist() == [1, 1.5, 2, 2, 2.5, 3]
    calls = iter(range(1, 9))
    running = Central((6, 6, 6), rim=1, overlap=0.75, blending="running")(image, counting)["n"][0, 0, :, 0, 0]
    assert running.tolist() == [1, 1.5, 2.25, 2.25, 2.5, 3]
    paper = Central((144, 144, 144))
    assert (paper.keep, paper.step) == ((128,) * 3, (64,) * 3)
    with pytest.raises(SuiteError, match="rim=3"):
        Central((6, 6, 6), rim=3)


def test_placements_and_intensities_are_normal():
    torch.manual_seed(0)
    drawn = [NormalPlacement(0.0, 0.03).draw() for _ in range(800)]
    factors = np.array([1 / np.diag(p.matrix) for p in drawn])
    assert factors.mean() == pytest.approx(1, abs=0.003)
    assert factors.std() == pytest.approx(0.03, abs=0.003)
    turns = np.array([NormalPlacement(10.0, 0.0).draw(2).matrix for _ in range(800)])
    assert np.rad2deg(np.arctan2(turns[:, 1, 0], turns[:, 0, 0])).std() == pytest.approx(10, abs=0.8)
    assert (turns[:, 2, 2] == 1).all()

    def changed(**options):
        options = {"gain": 0.0, "shift": 0.0, "noise": 0.0, **options}
        image = torchio.ScalarImage(tensor=torch.linspace(0, 4, 2000).reshape(1, 20, 10, 10).repeat(2, 1, 1, 1))
        return RandomNormalIntensity(**options)(torchio.Subject(image=image))["image"].data - image.data

    assert not changed().any()
    assert changed(shift=0.1).flatten(1).std(dim=1).max() < 1e-5
    noise = changed(noise=0.1)
    assert noise.std() == pytest.approx(0.1, abs=0.01)
    signal = changed(noise=0.1, signal=1.0).flatten(1)
    assert signal[:, :500].std() < 0.6 * signal[:, -500:].std()
    assert signal[:, -100:].std() == pytest.approx(0.2, abs=0.04)
