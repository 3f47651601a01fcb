"""The feature-enhanced auto-encoder: wiring, gradients, parameter counts; the Lightning module trains and resumes like the plain fit."""

import numpy as np
import pytest
import torch

from lesionbench.errors import SuiteError
from lesionbench.task import Task
from lightning_modules import FAE
from lightning_modules.habitats.encoder import EncoderSettings, encode, fit_encoder
from lightning_modules.networks.voxel_autoencoders import turns, voxel_encoder

TASK = Task(("rcbv", "p", "q"), {"background": 0, "tumor": 1})


@pytest.fixture
def x():
    return torch.rand(64, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_parameter_counts_of_three_modalities():
    counts = {kind: sum(p.numel() for p in voxel_encoder(kind, 3).parameters()) for kind in ("fae", "ensemble", "ae", "none")}
    assert counts == {"fae": 346, "ensemble": 273, "ae": 146, "none": 0}


def test_each_loss_leaves_the_other_decoder_alone_and_reaches_the_encoders(x):
    network = voxel_encoder("fae", 3)
    for name, idle, busy in (("pair", "dual_decoder", "pair_decoders"), ("global", "pair_decoders", "dual_decoder")):
        network.zero_grad()
        network.loss(name, x).backward()
        for part in ("pair_encoders", "bottleneck", "mirror", busy):
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in getattr(network, part).parameters()), (name, part)
        assert all(p.grad is None for p in getattr(network, idle).parameters()), (name, idle)
        owned = {id(p) for p in network.trained_by(name)}
        assert owned.isdisjoint(id(p) for p in getattr(network, idle).parameters())
        assert owned >= {id(p) for p in getattr(network, busy).parameters()}


def test_a_pair_sees_its_two_modalities_only_and_latents_are_within_one(x):
    network = voxel_encoder("fae", 3)
    changed = x.clone()
    changed[:, 2] += 0.3
    before, after = network.pair_features(x), network.pair_features(changed)
    assert network.pairs.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert torch.equal(before[:, 0], after[:, 0])
    assert (before[:, 1:] != after[:, 1:]).all()
    z = network.encode(10 * x)
    assert z.shape == (64, 3)
    assert z.abs().max() < 1


def test_ensemble_is_the_fae_without_dual_decoder(x):
    whole, part = voxel_encoder("fae", 3), voxel_encoder("ensemble", 3)
    part.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("dual_decoder")})
    assert torch.equal(part.encode(x), whole.encode(x))
    assert torch.equal(part.loss("pair", x), whole.loss("pair", x))
    assert torch.allclose(whole.loss("joint", x), whole.loss("pair", x) + whole.loss("global", x))


def test_pair_loss_by_hand(x):
    network = voxel_encoder("fae", 3)
    d = network.mirror(network.encode(x))
    first, second = network.pair_decoders[0], network.pair_decoders[2]
    total = 0
    for w, pair in enumerate([(0, 1), (0, 2), (1, 2)]):
        hidden = torch.tanh(d[:, w : w + 1] @ first.weight[w] + first.bias[w])
        decoded = torch.tanh(hidden @ second.weight[w] + second.bias[w])
        total = total + ((decoded - x[:, pair]) ** 2).mean()
    assert torch.allclose(network.loss("pair", x), total / 3, atol=1e-6)


def test_turns():
    fae, ae = voxel_encoder("fae", 4), voxel_encoder("ae", 4)
    assert turns(fae, "alternate_batch", 3) == ("pair", "global")
    assert [turns(fae, "alternate_epoch", e) for e in range(3)] == [("pair",), ("global",), ("pair",)]
    assert turns(fae, "joint", 0) == ("joint",)
    assert turns(ae, "joint", 0) == ("global",)
    with pytest.raises(SuiteError, match="alternate_batch"):
        turns(fae, "alternate_batches", 0)


def test_bad_encoders_are_named():
    with pytest.raises(SuiteError, match="did you mean 'fae'"):
        voxel_encoder("fea", 3)
    with pytest.raises(SuiteError, match="two modalities"):
        voxel_encoder("fae", 1)
    with pytest.raises(SuiteError, match="latent_dim=2"):
        voxel_encoder("none", 3, latent_dim=2)


@pytest.mark.parametrize("kind", ["ae", "ensemble", "fae"])
@pytest.mark.parametrize("update", ["alternate_batch", "alternate_epoch", "joint"])
def test_fit_learns_to_reconstruct_and_repeats_itself(kind, update, x):
    settings = EncoderSettings(kind=kind, epochs=6, batch_size=16, lr=1e-2, update=update)
    untrained = fit_encoder(x.numpy(), EncoderSettings(kind=kind, epochs=0), 3)
    one, two = (fit_encoder(x.numpy(), settings, 3) for _ in range(2))
    name = one.turns[-1]
    assert one.loss(name, x) < untrained.loss(name, x)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert not any(p.requires_grad for p in one.parameters())
    assert np.array_equal(encode(one, x.numpy(), chunk=7), encode(one, x.numpy(), chunk=7))
    assert np.allclose(encode(one, x.numpy(), chunk=7), encode(one, x.numpy()), atol=1e-6)


def test_fit_goes_on_from_given_weights(x):
    start = voxel_encoder("fae", 3).state_dict()
    found = fit_encoder(x.numpy(), EncoderSettings(epochs=0), 0, start=start)
    assert all(torch.equal(found.state_dict()[k], v) for k, v in start.items())


def test_module_keeps_outliers_out_and_scales_with_the_training_range():
    voxels = np.random.default_rng(0).normal(size=(1000, 3)).astype(np.float32)
    voxels[:10] += 100
    method = FAE(TASK, quantile=0.98)
    method.fit_scaling(voxels)
    inside = method.inliers(torch.from_numpy(voxels))
    assert 900 < len(inside) < 985
    assert torch.allclose(inside.amin(0), torch.tensor(-1.0), atol=1e-5)
    assert torch.allclose(inside.amax(0), torch.tensor(1.0), atol=1e-5)


def test_module_has_one_optimizer_per_loss():
    groups = FAE(TASK).optimizer_groups()
    assert list(groups) == ["pair", "global"]
    assert [sum(p.numel() for p in g) for g in groups.values()] == [273, 346 - 126]
    assert list(FAE(TASK, update="joint").optimizer_groups()) == ["joint"]
    assert list(FAE(TASK, encoder="ae").optimizer_groups()) == ["global"]
    with pytest.raises(SuiteError, match=r"best\.ckpt"):
        FAE(TASK).predict_case({})
