"""The residual U-Net of Pei and Liu: its blocks, the loss and the schedule of the paper, and what the shortcuts are good for."""

import math

import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from datamodules.preprocessing import Preprocessing, normalize_patch
from lesionbench.errors import SuiteError
from lightning_modules.losses import CrossEntropy
from lightning_modules.networks import ResUNet
from lightning_modules.networks.resunet import ResidualBlock
from tests.harness import composed, rows, run, run_folders

SMALL = {"features": (4, 6, 8)}


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


# blocks and network


def test_parameters_are_counted_and_shortcuts_are_the_only_difference():
    with torch.device("meta"):
        full, plain = ResUNet(4, 4), ResUNet(4, 4, residual=False)
        large = ResUNet(4, 4, features=(32, 64, 128, 256, 512))
    assert parameters(full) == 7_738_964
    assert parameters(large) > 3.9 * parameters(full)
    shortcuts = [(4, 16), *((2 * width, width) for width in (16, 32, 64, 128))]  # all others are the identity
    assert parameters(full) - parameters(plain) == sum(i * o + o for i, o in shortcuts)
    deeper = {residual: parameters(ResUNet(4, 4, **SMALL, blocks=4, residual=residual)) for residual in (True, False)}
    assert deeper[True] - deeper[False] == sum(i * o + o for i, o in [(4, 4), (8, 4), (12, 6)][1:])


@pytest.mark.parametrize("n_in", [8, 5])
def test_a_block_whose_last_norm_scales_by_zero_is_its_shortcut(n_in):
    block = ResidualBlock(n_in, 8)
    nn.init.zeros_(block.body[-1].weight)
    x = torch.randn(2, n_in, 6, 5, 4)
    torch.testing.assert_close(block(x), torch.nn.functional.leaky_relu(block.shortcut(x), 0.01))
    if n_in == 8:
        assert torch.equal(block.shortcut(x), x)
    assert ResidualBlock(n_in, 8, residual=False).shortcut is None


@pytest.mark.parametrize("norm", ["group", "instance", "batch", "none"])
@pytest.mark.parametrize(("dimensions", "size"), [(3, (32, 32, 32)), (3, (16, 8, 24)), (2, (16, 40))])
def test_shapes_gradients_and_probabilities(norm, dimensions, size):
    network = ResUNet(4, 4, dimensions=dimensions, norm=norm, **SMALL)
    logits = network(torch.randn(2, 4, *size))
    assert logits.shape == (2, 4, *size)
    torch.testing.assert_close(logits.softmax(dim=1).sum(dim=1), torch.ones(2, *size))
    (logits * torch.randn_like(logits)).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.dim() < 2 or (parameter.grad != 0).any(), name


def test_narrowing_before_interpolation_is_narrowing_after_it():
    network = ResUNet(1, 2, dimensions=2, **SMALL)
    x = torch.randn(1, 8, 4, 6)
    up = network.up[0]
    enlarged = torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(torch.nn.functional.interpolate(up(x), scale_factor=2, mode="bilinear"), up(enlarged), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_is_named(tmp_path):
    with pytest.raises(SuiteError, match=r"network\.norm 'layer'"):
        ResUNet(4, 4, norm="layer")
    with pytest.raises(SuiteError, match=r"network\.blocks=0: expected 1 or more"):
        ResUNet(4, 4, blocks=0)
    with pytest.raises(SuiteError, match=r"patch=\[26, 24, 24\] does not fit ResUNet.*divisible by \(4, 4, 4\)"):
        run("experiment=resunet3d_pei/simulated", "patch=[26,24,24]", f"data.root={tmp_path}", "data.count=14", f"runs={tmp_path}")


# what the paper trains it with


def test_the_preset_of_the_paper(tmp_path):
    cfg = composed("experiment=resunet3d_pei/brats2021", f"run_folder={tmp_path}")
    optimizer = instantiate(cfg.model.optimizer)([nn.Parameter(torch.zeros(1))])
    assert (type(optimizer), optimizer.defaults["lr"]) == (torch.optim.Adam, 1e-3)
    factor = instantiate(cfg.model.scheduler)(optimizer, total_iterations=200_000).lr_lambdas[0]
    rates = [1e-3 * factor(1000 * epoch + n) for epoch, n in ((0, 0), (0, 999), (100, 0), (199, 999))]
    assert rates == pytest.approx([1e-3, 1e-3, 5.359e-4, 1e-3 * (1 / 200) ** 0.9], rel=1e-3)
    assert rates[-1] == pytest.approx(8.49e-6, rel=1e-3)
    assert (cfg.data.batch_size, list(cfg.patch), cfg.data.split.folds) == (1, [128, 128, 128], 5)
    assert type(instantiate(cfg.model.loss)) is CrossEntropy


def test_cross_entropy_of_equal_logits_and_of_exchanged_classes():
    torch.manual_seed(0)
    loss, target = CrossEntropy(), torch.randint(0, 4, (2, 1, 5, 6, 7))
    assert loss(torch.zeros(2, 4, 5, 6, 7), target).item() == pytest.approx(math.log(4))
    logits, order = torch.randn(2, 4, 5, 6, 7), torch.tensor([2, 0, 3, 1])
    exchanged = loss(logits[:, order.argsort()], order[target])
    assert exchanged.item() == pytest.approx(loss(logits, target).item(), rel=1e-6)


def test_images_are_normalized_over_the_brain_and_the_background_stays_zero(tmp_path):
    cfg = composed("experiment=resunet3d_pei/brats2021", f"run_folder={tmp_path}")
    settings = instantiate(cfg.data.preprocessing, _convert_="all")
    assert isinstance(settings, Preprocessing)
    raw = (100 + 20 * torch.randn(1, 12, 12, 12)).clamp_min(1)
    raw[:, :3] = 0
    brain = raw[raw != 0]
    stats = {"mean": [brain.mean().item()], "std": [brain.std(correction=0).item()], "count": [brain.numel()]}
    image = torch.from_numpy(normalize_patch(raw.numpy(), stats, settings, None))
    assert (image[raw == 0] == 0).all()
    assert image[raw != 0].mean().item() == pytest.approx(0, abs=1e-5)
    assert image[raw != 0].std(correction=0).item() == pytest.approx(1, abs=1e-5)


# together with other methods, and what the shortcuts are good for


def test_it_is_the_network_of_another_method(tmp_path):
    network = ["model/network=resunet", "model.network.features=[4,8]", "~model.network.upsampling"]  # the benchmark's own network has it
    run("benchmark=blobs", "model=mean_teacher", *network, "debug=tiny", "threads=1", f"runs={tmp_path}", f"data.root={tmp_path / 'data'}")
    (folder,) = run_folders(tmp_path)
    assert rows(folder)


def first_gradient(residual: bool, seed: int, norm: str) -> float:
    """Norm of the loss gradient of the first convolution of an untrained network of four blocks a resolution."""
    torch.manual_seed(seed)
    network = ResUNet(4, 4, features=(8, 16, 32), blocks=4, norm=norm, residual=residual)
    image, target = torch.randn(1, 4, 8, 8, 8), torch.randint(0, 4, (1, 1, 8, 8, 8))
    CrossEntropy()(network(image), target).backward()
    return network.first[0].body[0].weight.grad.norm().item()


def test_shortcuts_carry_the_gradient_through_layers_that_nothing_normalizes():
    """With normalization the claim is the other way round: see docs/methods/resunet3d_pei.md."""
    for seed in range(3):
        assert first_gradient(True, seed, "none") > 100 * first_gradient(False, seed, "none")
