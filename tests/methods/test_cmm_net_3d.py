"""3D CMM-Net: the table of its paper, what a voxel sees through a pyramid, the loss and the schedule, and what the pyramids are good for."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from torch import nn

from lesionbench.errors import SuiteError
from lightning_modules.losses import RegionDice
from lightning_modules.networks import CMMNet
from lightning_modules.networks.cmm_net import PyramidPooling
from tests.harness import composed, rows, run, run_folders, weights

SMALL = {"features": (4, 6, 8), "dilations": (3, 2, 1), "extra_features": (8,), "hppm": 1}


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def convolution(n_in: int, n_out: int, side: int) -> int:
    return n_in * n_out * side**3 + n_out


# Table 1


def seen_widths(network: CMMNet, size: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Name of a module -> shape of its output without the batch, of one pass on the meta device."""
    found = {}
    for name, module in network.named_modules():
        module.register_forward_hook(lambda _, __, out, name=name: found.update({name: tuple(out.shape[1:])}))
    network(torch.zeros(1, 4, *size, device="meta"))
    return found


def test_channels_and_sizes_are_those_of_table_1():
    with torch.device("meta"):
        network = CMMNet(4, 4)
        found = seen_widths(network, (128, 128, 128))
    table = {
        **{"encoder.0": (32, 128), "pyramids.0": (64, 128), "encoder.1": (96, 64), "pyramids.1": (192, 64)},
        **{"encoder.2": (256, 32), "pyramids.2": (512, 32)},
        **{"bottom.0": (1024, 16), "bottom.1": (1024, 16), "bottom.2": (1400, 16), "bottom.3": (1400, 16), "bottom.4": (2048, 16)},
        **{"decoder.0": (256, 32), "decoder.1": (96, 64), "decoder.2": (32, 128), "out": (4, 128)},
    }
    assert {name: found[name] for name in table} == {name: (width, side, side, side) for name, (width, side) in table.items()}
    inputs = [network.decoder[level][0].in_channels for level in range(3)]
    assert inputs == [2816, 544, 192]
    rates = [block[0].dilation[0] for block in (*network.encoder, network.bottom[0], network.bottom[4], *network.decoder)]
    assert rates == [6, 5, 4, 3, 3, 4, 5, 6]
    assert [type(layer).__name__ for layer in network.encoder[0]] == 2 * ["Conv3d", "ReLU", "BatchNorm3d"]


def test_parameters_of_table_1_and_of_the_smaller_models_of_table_2():
    with torch.device("meta"):
        assert parameters(CMMNet(4, 4)) == 362_326_732
        assert parameters(CMMNet(4, 4, pool="none")) == 362_326_732
        two_blocks = CMMNet(4, 4, hppm=0)
        half = convolution(1024, 1024, 1), convolution(1400, 1400, 1)
        assert [parameters(CMMNet(4, 4, hppm=n)) - parameters(two_blocks) for n in (1, 2)] == [half[0], sum(half)]
        base = CMMNet(4, 4, extra_features=(), hppm=0)
        added = convolution(1024, 1400, 3) + convolution(1400, 1400, 3) + convolution(1400, 2048, 3) + convolution(2048, 2048, 3)
        wider = (2048 - 1024) * 256 * 27  # Conv5 reads 2048 channels from below instead of 1024
        assert parameters(two_blocks) - parameters(base) == added + wider + 4 * (1400 + 2048)
        assert base.decoder[0][0].in_channels == 768 + 1024


def test_memory_of_a_training_step():
    """What autograd keeps of one 128^3 sample, and weights, gradients and the moments of Adam: the figures of the page."""
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[id(tensor.untyped_storage())] = tensor  # held, so that no other gets the same id
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        network = CMMNet(4, 3)
        network(torch.zeros(1, 4, 128, 128, 128))
    assert sum(t.numel() * t.element_size() for t in kept.values()) / 1e9 == pytest.approx(7.7, abs=0.1)
    assert 4 * 4 * parameters(network) / 1e9 == pytest.approx(5.8, abs=0.05)


def test_a_dilated_convolution_reaches_further_with_the_same_parameters():
    for rate in (1, 3, 6):
        layer = CMMNet(1, 1, features=(4, 4), dilations=(rate, 1), extra_features=(), hppm=0, grids=(2,)).encoder[0][0]
        impulse = torch.zeros(1, 1, 15, 15, 15)
        impulse[..., 7, 7, 7] = 1
        with torch.no_grad():
            answer = layer(impulse) - layer(torch.zeros_like(impulse))
        for axis in (2, 3, 4):
            places = answer.abs().sum(dim=[a for a in range(5) if a != axis]).nonzero().flatten().tolist()
            assert places == [7 - rate, 7, 7 + rate]
        assert parameters(layer) == 4 * 27 + 4
        assert answer.shape == (1, 4, 15, 15, 15)


# pyramids


@pytest.mark.parametrize("pool", ["average", "max"])
def test_pyramids_keep_a_constant_map_and_double_its_channels(pool):
    full, half = (PyramidPooling(8, (2, 4, 8, 16), pool, keep_input=keep) for keep in (True, False))
    for module in (full, half):
        assert parameters(module) == 4 * (8 * 2 + 2)
        for number, layer in enumerate(module.compress):
            nn.init.zeros_(layer.bias)
            layer.weight.data.copy_(torch.eye(8)[2 * number : 2 * number + 2].reshape(2, 8, 1, 1, 1))
    x = torch.arange(8.0).reshape(1, 8, 1, 1, 1).expand(1, 8, 12, 20, 16)
    assert full(x).shape == (1, 16, 12, 20, 16)
    torch.testing.assert_close(half(x), x)
    torch.testing.assert_close(full(x), torch.cat([x, x], dim=1))


def test_pyramids_pool_what_they_say():
    x = torch.randn(1, 2, 4, 4, 4)
    for pool, pooled in (("average", F.avg_pool3d), ("max", F.max_pool3d)):
        module = PyramidPooling(2, (2, 4), pool, keep_input=False)
        for number, layer in enumerate(module.compress):
            nn.init.zeros_(layer.bias)
            layer.weight.data.copy_(torch.eye(2)[number].reshape(1, 2, 1, 1, 1))
        coarse = F.interpolate(pooled(x, 2), size=(4, 4, 4), mode="trilinear")
        torch.testing.assert_close(module(x), torch.cat([coarse[:, :1], x[:, 1:]], dim=1))  # four cells are the voxels themselves


def test_grids_are_no_finer_than_the_map_and_share_channels_that_do_not_divide():
    module = PyramidPooling(7, (2, 4, 8))
    assert [layer.out_channels for layer in module.compress] == [3, 2, 2]
    assert module(torch.randn(1, 7, 3, 16, 5)).shape == (1, 14, 3, 16, 5)


def reached(network: nn.Module, where: tuple[int, ...], size: tuple[int, ...], channels: int = 1) -> torch.Tensor:
    """Of which voxels the output at `where` depends, bool, by the size of `size`."""
    torch.manual_seed(0)
    x = torch.randn(1, channels, *size, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(x)[(0, slice(None), *where)].sum(), x)
    return gradient[0].abs().sum(dim=0) > 0


def test_a_voxel_sees_the_volume_through_a_pyramid_but_from_a_corner_only_its_octant():
    module = PyramidPooling(4, (2, 4, 8, 16), keep_input=False)
    size = (32, 32, 32)
    assert reached(module, (16, 16, 16), size, 4).all()
    corner = reached(module, (0, 0, 0), size, 4)
    assert corner.float().mean() == 0.125  # linear interpolation from a grid of two cells ends in the middle of each
    assert corner[:16, :16, :16].all()
    assert reached(PyramidPooling(4, (1, 2)), (0, 0, 0), size, 4).all()  # a grid of one cell sees everything from everywhere
    assert reached(PyramidPooling(4, (2, 4), pool="none"), (16, 16, 16), size, 4).sum() == 1


# the network


@pytest.mark.parametrize(("dimensions", "size"), [(2, (16, 40)), (3, (16, 8, 24))])
def test_shapes_and_gradients(dimensions, size):
    network = CMMNet(2, 3, dimensions=dimensions, **SMALL)
    assert network.divisor == (4,) * dimensions
    out = network(torch.randn(2, 2, *size))
    assert out.shape == (2, 3, *size)
    out.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.dim() < 2 or (parameter.grad != 0).any(), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "avg"}, r"network\.pool 'avg'; did you mean 'average'"),
        ({"dilations": (3, 2)}, r"network\.dilations=\[3, 2\]: expected one of 1 or more for each of the 3 features"),
        ({"dilations": (3, 2, 0)}, r"network\.dilations"),
        ({"hppm": 2}, r"network\.hppm=2: expected 0 to 1"),
        ({"hppm": -1}, r"network\.hppm=-1"),
        ({"grids": ()}, r"network\.grids=\[\]"),
        ({"grids": (2, 0)}, r"network\.grids=\[2, 0\]"),
        ({"grids": (1, 2, 3, 4, 5)}, r"network\.grids=\[1, 2, 3, 4, 5\]: expected one to 4 numbers"),
    ],
)
def test_what_cannot_be_is_named(options, message):
    with pytest.raises(SuiteError, match=message):
        CMMNet(2, 3, **{**SMALL, **options})


def test_a_patch_that_does_not_fit_is_refused_before_training(tmp_path):
    with pytest.raises(SuiteError, match=r"patch=\[20, 20, 20\] does not fit CMMNet.*divisible by \(8, 8, 8\)"):
        run("experiment=cmm_net_3d/simulated", "patch=[20,20,20]", f"data.root={tmp_path}", f"runs={tmp_path / 'runs'}", "data.count=13")


# what its paper trains it with


def test_loss_of_equation_3():
    loss = RegionDice(squared=True, smooth=0)
    p = torch.tensor([[0.8, 0.5, 0.1], [0.9, 0.2, 0.4]])  # two regions, three voxels
    g = torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    first, second = 2 * (0.8 + 0.5) / (2 + 0.64 + 0.25 + 0.01), 2 * 0.9 / (1 + 0.81 + 0.04 + 0.16)
    logits = (p.log() - (1 - p).log()).reshape(1, 2, 3, 1, 1)
    assert loss(logits, g.reshape(1, 2, 3, 1, 1)).item() == pytest.approx(1 - (first + second) / 2, rel=1e-5)
    truth = torch.tensor([1.0, 1, 0, 0]).reshape(1, 1, 4, 1, 1)
    assert loss(100 * (2 * truth - 1), truth).item() == pytest.approx(0, abs=1e-6)
    assert loss(100 * (1 - 2 * truth), truth).item() == pytest.approx(1, abs=1e-6)


def test_the_preset_of_the_paper(tmp_path):
    cfg = composed("experiment=cmm_net_3d/brats2021", f"run_folder={tmp_path}")
    assert (cfg.data.preprocessing.crop, list(cfg.data.preprocessing.crop_size), list(cfg.patch)) == ("center", [128] * 3, [128] * 3)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = instantiate(cfg.model.optimizer)([weight])
    assert type(optimizer) is torch.optim.Adam
    iterations = cfg.epochs * cfg.data.samples_per_epoch // cfg.data.batch_size
    factor = instantiate(cfg.model.scheduler)(optimizer, total_iterations=iterations).lr_lambdas[0]
    rates = [1e-4 * factor(1200 * epoch + n) for epoch, n in ((0, 0), (0, 1199), (50, 0), (99, 1199))]
    assert cfg.model.optimizer.lr == 1e-4
    assert rates == pytest.approx([1e-4, 1e-4, 5.359e-5, 1e-4 * 0.01**0.9], rel=1e-3)
    loss = instantiate(cfg.model.loss)
    assert (type(loss), loss.squared, cfg.model.target._target_) == (RegionDice, True, "lesionbench.target.RegionSigmoid")
    turn = instantiate(cfg.data.augmentation).transforms[1]
    assert turn.probability * 3 / 4 == pytest.approx(0.4, abs=1e-3)


# together with other methods, and what the pyramids are good for


def test_it_is_the_network_of_another_method(tmp_path):
    network = ["model/network=cmm_net", "model.network.features=[4,4,8]", "model.network.extra_features=[8]", "model.network.hppm=1"]
    network += [
        "model.network.dilations=[2,1,1]",
        "~model.network.norm",
        "~model.network.upsampling",
    ]  # the benchmark's own network has these
    run("benchmark=blobs", "model=mean_teacher", *network, "debug=tiny", "threads=1", f"runs={tmp_path}", f"data.root={tmp_path / 'data'}")
    (folder,) = run_folders(tmp_path)
    assert {name.split(".")[1] for name in weights(folder) if name.startswith("network.")} >= {
        "encoder",
        "pyramids",
        "bottom",
        "decoder",
        "out",
    }
    assert rows(folder)


TOY = ["experiment=cmm_net_3d/context_toy", "threads=1", "callbacks.progress=null"]


def test_in_the_toy_only_pyramids_reach_the_cue(tmp_path):
    """No voxel of a lesion (rows 2 to 22) depends on a row above 44 without pooling; with it, most of them do."""
    size = (64, 64)
    for pool, expected in (("average", True), ("none", False)):
        cfg = composed(*TOY, f"model.network.pool={pool}", f"run_folder={tmp_path}")
        network = instantiate(cfg.model.network)(1, 3).eval()
        assert bool(reached(network, (22, 32), size)[45:].any()) == expected
        assert bool(reached(network, (12, 32), size)[45:].any()) == expected


def class_dice(folder: Path) -> float:
    """Mean Dice of the two classes over the pixels of all test images; guessing gives 1/2."""
    found = json.loads((folder / "test" / "dataset.json").read_text())[""]
    return (found["A"]["dice"] + found["B"]["dice"]) / 2


@pytest.mark.slow
def test_pyramids_tell_classes_by_what_is_far_away(tmp_path):
    found = {}
    for pool in ("average", "none"):
        for seed in (0, 1, 2):
            folder = tmp_path / f"{pool}-{seed}"
            run(*TOY, f"model.network.pool={pool}", f"seed={seed}", f"runs={folder}", f"data.root={tmp_path / 'data'}")
            found[pool, seed] = class_dice(run_folders(folder)[0])
    assert min(found["average", seed] for seed in (0, 1, 2)) > 0.9, found
    assert max(found["none", seed] for seed in (0, 1, 2)) < 0.6, found
