"""nnSegNet: parameter counts of the paper's table, unpooling, the loss on five heads, and rules that its paper tunes."""

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from datamodules.readers.brats_files import brats_task
from lesionbench.checkpoint import build_method
from lesionbench.errors import SuiteError
from lesionbench.target import RegionSigmoid
from lightning_modules.networks import SegNet
from tests.harness import composed, shared

SMALL = {"features": (4, 8, 16, 16)}


@pytest.mark.parametrize(("decoder", "count"), [("transposed", 31_198_176), ("unpool", 27_663_648), ("small", 17_431_488)])
def test_parameters_of_the_table(decoder, count):
    with torch.device("meta"):
        network = SegNet(4, 3, decoder=decoder)
    assert sum(p.numel() for p in network.parameters()) == count
    assert network.divisor == (32, 32, 32)


def test_unpooling_brings_maxima_back_to_their_place():
    network = SegNet(1, 1, dimensions=2, **SMALL)
    x = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pooled, places = network.pool(x)
    back = network.ups[0](pooled, places)
    kept = back != 0
    assert torch.equal(back[kept], x[kept])
    assert kept.sum() == pooled.numel()
    assert back.sum() == pytest.approx(float(pooled.sum()), rel=1e-6)


@pytest.mark.parametrize("decoder", ["unpool", "small", "transposed"])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_heads_and_gradients(decoder, dimensions):
    torch.manual_seed(0)
    network = SegNet(2, 3, dimensions=dimensions, decoder=decoder, **SMALL)
    image = torch.randn(1, 2, *(16,) * dimensions)
    outputs = network(image)
    assert [tuple(h.shape[2:]) for h in (outputs["logits"], *outputs["deep"])] == [(s,) * dimensions for s in (16, 8, 4)]
    (outputs["logits"].mean() + sum(h.mean() for h in outputs["deep"])).backward()
    assert all(p.grad is not None for p in network.parameters())
    assert torch.is_tensor(network.eval()(image))


def test_small_does_not_see_the_encoders_features():
    """Without them a change that no maximum feels is lost; with them it is seen."""
    torch.manual_seed(0)
    answers = {}
    for decoder in ("unpool", "small"):
        network = SegNet(1, 1, dimensions=2, decoder=decoder, deep_supervision=False, **SMALL)
        seen = []
        network.decoder[-1].register_forward_hook(lambda _, inputs, __, seen=seen: seen.append(inputs[0].shape[1]))
        network(torch.randn(1, 1, 16, 16))
        answers[decoder] = seen[0]
    assert answers == {"unpool": 8, "small": 4}


def test_the_order_of_a_block():
    for order, kinds in {"conv_act_norm": ["LeakyReLU", "InstanceNorm3d"], "conv_norm_act": ["InstanceNorm3d", "LeakyReLU"]}.items():
        block = SegNet(1, 1, order=order, **SMALL).encoder[0][0]
        assert [type(part).__name__ for part in block] == ["Conv3d", *kinds]
        assert block[0].bias is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": "unpol"}, "did you mean 'unpool'"),
        ({"order": "norm_conv"}, "order"),
        ({"features": (8,)}, "two levels at least"),
        ({"features": (8, 16, 32)}, "as many as the level above"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(SuiteError, match=message):
        SegNet(1, 1, **options)
    SegNet(1, 1, features=(8, 16, 32), decoder="transposed")


def test_the_papers_loss_on_its_five_heads():
    cfg = shared("experiment=nnsegnet/brats2021")
    loss = instantiate(OmegaConf.to_container(cfg.model.loss, resolve=True))
    assert [w / sum(loss.weights) for w in loss.weights] == pytest.approx([0.5333, 0.2667, 0.1333, 0.0667, 0], abs=1e-4)
    heads = [torch.zeros(1, 3, s, s, s, requires_grad=True) for s in (16, 8, 4, 2, 1)]
    target = torch.ones(1, 3, 16, 16, 16)
    found = loss({"logits": heads[0], "deep": heads[1:]}, target)
    # at p = 1/2 on ones: BCE ln 2, Dice 2 * 1/2 / (1/2 + 1), without smoothing
    assert float(found.detach()) == pytest.approx(0.693147 + 1 / 3, abs=1e-5)
    found.backward()
    assert [bool(h.grad.any()) for h in heads] == [True, True, True, True, False]


def test_decoding_overwrites_from_the_outside_in():
    regions = torch.tensor([[0.6, 0.6, 0.6], [0.4, 0.6, 0.6], [0.4, 0.4, 0.6], [0.6, 0.4, 0.6]]).T[None]
    assert RegionSigmoid(brats_task("2021"), decoding="paint").labels(regions).tolist() == [[3, 3, 3, 3]]
    nested = torch.tensor([[0.4, 0.3, 0.2], [0.6, 0.4, 0.3], [0.7, 0.6, 0.2], [0.9, 0.8, 0.7]]).T[None]
    assert RegionSigmoid(brats_task("2021"), decoding="paint").labels(nested).tolist() == [[0, 2, 1, 3]]


@pytest.mark.parametrize("method", ["mean_teacher", "supervised"])
def test_in_other_methods(method):
    cfg = composed(
        "benchmark=simulated", f"model={method}", "model/network=segnet", "model.network.features=[4,8,16,16]", "patch=[16,16,16]"
    )
    task = instantiate(cfg.data, _convert_="all").task
    built = build_method(OmegaConf.to_container(cfg.model, resolve=True), task)
    batch = {"image": torch.randn(1, 4, 16, 16, 16), "label": torch.randint(0, 3, (1, 1, 16, 16, 16))}
    built.compute_loss(batch).backward()
    assert any(p.grad is not None for p in built.network.parameters())
