"""Monte-Carlo dropout and running moments, against numbers computed by hand and against all passes kept."""

import math

import pytest
import torch
from torch import nn

from lightning_modules.uncertainty import RunningMoments, active_dropout, entropy, mc_dropout


def network(rate: float = 0.5) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(rate), nn.Conv2d(4, 2, 1))


def test_only_dropout_draws_and_modes_come_back():
    net, image = network().eval(), torch.randn(2, 1, 8, 8)
    plain = net(image)
    with mc_dropout(net):
        assert [layer.training for layer in net] == [False, False, True, False]
        assert not torch.equal(net(image), net(image))
    assert not any(layer.training for layer in net)
    assert torch.equal(net(image), plain)
    with pytest.raises(RuntimeError, match="inside"), mc_dropout(net):
        raise RuntimeError("inside")
    assert not net[2].training


def test_without_dropout_passes_are_alike():
    net, image = network(rate=0.0).eval(), torch.randn(2, 1, 8, 8)
    assert active_dropout(net) == []
    with mc_dropout(net):
        assert torch.equal(net(image), net(image))


def test_running_statistics_do_not_move_but_batch_statistics_are_used():
    net, image = network(rate=0.0).train(), 5 + 3 * torch.randn(4, 1, 8, 8)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with mc_dropout(net):
        inside = net(image)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(inside, net(image))  # the train-mode answer
    assert int(net[1].num_batches_tracked) == 1
    assert net[1].track_running_stats


def test_entropy_by_hand():
    probabilities = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]]).view(3, 2, 1, 1)
    expected = [math.log(2), 0.0, -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))]
    assert entropy(probabilities).flatten().tolist() == pytest.approx(expected)
    assert entropy(torch.full((1, 4, 2), 0.25)).flatten().tolist() == pytest.approx([math.log(4)] * 2)


def test_moments_equal_those_of_all_passes_kept():
    passes = torch.randn(7, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).softmax(dim=2)
    moments = RunningMoments(mutual_information=True)
    for one in passes:
        moments.update(one)
    mean = passes.mean(dim=0)
    assert torch.allclose(moments.mean, mean, atol=1e-6)
    assert torch.allclose(moments.entropy, -(mean * mean.log()).sum(dim=1, keepdim=True), atol=1e-6)
    own = -(passes * passes.log()).sum(dim=2, keepdim=True).mean(dim=0)
    assert torch.allclose(moments.mutual_information, moments.entropy - own, atol=1e-6)
    assert (moments.mutual_information > 0).all()


def test_mutual_information_of_passes_that_agree_is_zero_and_of_opposites_is_ln_2():
    for second, expected in [([0.9, 0.1], 0.0), ([0.1, 0.9], math.log(2) - float(entropy(torch.tensor([[0.9, 0.1]])[..., None])))]:
        moments = RunningMoments(mutual_information=True)
        moments.update(torch.tensor([0.9, 0.1]).view(1, 2, 1))
        moments.update(torch.tensor(second).view(1, 2, 1))
        assert float(moments.mutual_information) == pytest.approx(expected, abs=1e-6)


def test_memory_does_not_grow_with_passes():
    moments = RunningMoments()
    first = torch.rand(1, 2, 4, 4, requires_grad=True)
    moments.update(first)
    place, kept = moments._sum.data_ptr(), first.detach().clone()
    for _ in range(3):
        moments.update(torch.rand(1, 2, 4, 4))
    assert moments._sum.data_ptr() == place  # summed in place
    assert not moments.mean.requires_grad
    assert torch.equal(first, kept)  # the first pass itself is left alone


def test_what_was_not_summed_is_an_error():
    with pytest.raises(ValueError, match="no pass"):
        _ = RunningMoments().mean
    moments = RunningMoments()
    moments.update(torch.rand(1, 2, 3))
    with pytest.raises(ValueError, match="mutual_information=True"):
        _ = moments.mutual_information
