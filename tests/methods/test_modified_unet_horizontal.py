"""The modified U-Net: its blocks and their wiring, the generalized Dice loss by hand, and what normalized logits cannot say."""

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from torch import nn

from datamodules.transforms.elastic import RandomElastic
from lesionbench.errors import SuiteError
from lightning_modules.losses import GeneralizedDice
from lightning_modules.networks import HorizontalUNet
from tests.harness import composed, rows, run, run_folders

SMALL = {"features": (4, 6, 8, 8)}


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


# the network


def test_parameters_with_and_without_horizontal_blocks():
    with torch.device("meta"):
        full, plain = HorizontalUNet(4, 4), HorizontalUNet(4, 4, horizontal=False)
    assert parameters(full) == 139_259_340
    assert parameters(plain) == 116_974_220
    assert parameters(full) - parameters(plain) == sum(w * w * 4**3 + w + 2 * w for w in (64, 128, 256, 512))
    with torch.device("meta"):
        assert parameters(full) - parameters(HorizontalUNet(4, 4, final_norm=False)) == 2 * 4


def test_blocks_are_wired_as_the_paper_words_it():
    with torch.device("meta"):
        network, seen = HorizontalUNet(4, 4), {}
        for name, module in network.named_modules():
            module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0].shape[1], *out.shape[1:3])}))
        assert network(torch.zeros(1, 4, 128, 128, 128)).shape == (1, 4, 128, 128, 128)
    table = {  # channels in, channels out, side
        **{f"downward.{n}": v for n, v in enumerate([(4, 64, 64), (64, 128, 32), (128, 256, 16), (256, 512, 8)])},
        **{f"horizontal1.{n}": v for n, v in enumerate([(64, 64, 64), (128, 128, 32), (256, 256, 16), (512, 512, 8)])},
        **{f"horizontal2.{n}": v for n, v in enumerate([(512, 512, 8), (1024, 512, 8), (1024, 512, 8)])},
        **{f"upward.{n}": v for n, v in enumerate([(1024, 256, 16), (512, 128, 32), (256, 64, 64)])},
        "out": (128, 4, 128),
    }
    assert {name: seen[name] for name in table} == table
    kinds = [type(layer).__name__ for layer in network.horizontal2[0]]
    assert kinds == ["ZeroPad3d", "Conv3d", "InstanceNorm3d", "Dropout", "LeakyReLU"]
    assert [type(layer).__name__ for layer in network.out] == ["ConvTranspose3d", "InstanceNorm3d"]
    assert {m.negative_slope for m in network.modules() if isinstance(m, nn.LeakyReLU)} == {0.3}


def test_a_horizontal_block_sees_the_two_outputs_before_it():
    network = HorizontalUNet(1, 1, dimensions=2, features=(2, 3), blocks=3).eval()
    seen = []
    for block in network.horizontal2:
        block.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        network(torch.randn(1, 1, 16, 16))
        first = network.horizontal1[1](network.downward[1](network.downward[0](seen and torch.zeros(1, 1, 16, 16))))
    inputs, outputs = zip(*seen, strict=True)
    assert inputs[0].shape == first.shape
    assert torch.equal(inputs[1], torch.cat([outputs[0], inputs[0]], dim=1))
    assert torch.equal(inputs[2], torch.cat([outputs[1], outputs[0]], dim=1))


def test_a_convolution_that_keeps_the_resolution_pads_as_torch_does():
    block = HorizontalUNet(1, 1, dimensions=2, features=(3, 3)).horizontal1[0]
    x = torch.randn(1, 3, 6, 7)
    padded = F.pad(x, (1, 2, 1, 2))
    torch.testing.assert_close(block[1](block[0](x)), F.conv2d(padded, block[1].weight, block[1].bias))


@pytest.mark.parametrize("horizontal", [True, False])
@pytest.mark.parametrize(("dimensions", "size"), [(2, (32, 48)), (3, (32, 48, 16))])
def test_shapes_and_gradients(dimensions, size, horizontal):
    network = HorizontalUNet(4, 4, dimensions=dimensions, horizontal=horizontal, **SMALL)
    assert network.divisor == (16,) * dimensions
    out = network(torch.randn(1, 4, *size))
    assert out.shape == (1, 4, *size)
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.dim() < 2 or (parameter.grad != 0).any(), name


def test_normalized_logits_have_the_mean_of_their_bias_whatever_the_image_shows():
    torch.manual_seed(0)
    network = HorizontalUNet(2, 3, dimensions=2, features=(4, 6))
    nn.init.normal_(network.out[1].bias)
    for image in (torch.randn(1, 2, 16, 16), 5 * torch.rand(1, 2, 32, 16) + 3):
        with torch.no_grad():
            torch.testing.assert_close(network(image).mean(dim=(0, 2, 3)), network.out[1].bias, atol=1e-5, rtol=0)
    free = HorizontalUNet(2, 3, dimensions=2, features=(4, 6), final_norm=False).eval()
    nn.init.normal_(free.out[0].weight)
    with torch.no_grad():
        first, second = (free(image).mean(dim=(0, 2, 3)) for image in (torch.randn(1, 2, 16, 16), 5 * torch.rand(1, 2, 16, 16)))
    assert (first - second).abs().max() > 0.02


def test_what_cannot_be_is_named(tmp_path):
    with pytest.raises(SuiteError, match=r"network\.blocks=0: expected 1 or more"):
        HorizontalUNet(4, 4, blocks=0)
    with pytest.raises(SuiteError, match=r"patch=\[40, 32, 32\] does not fit HorizontalUNet.*divisible by \(16, 16, 16\)"):
        run(
            "experiment=modified_unet_horizontal/simulated",
            "patch=[40,32,32]",
            f"data.root={tmp_path}",
            "data.count=30",
            f"runs={tmp_path}",
        )


# the loss


def flat(p: list[list[float]]) -> torch.Tensor:
    """Logits (1, C, n) of probabilities by class."""
    return torch.tensor(p).log()[None]


def test_generalized_dice_by_hand():
    logits, target = flat([[0.5] * 4, [0.5] * 4]), torch.tensor([0, 0, 0, 1]).reshape(1, 1, 4)
    # weights 1/3 and 1: 1 - 2 (1/3 * 1.5 + 0.5) / (1/3 * 5 + 3) = 4/7
    assert GeneralizedDice(smooth=0)(logits, target).item() == pytest.approx(4 / 7, rel=1e-6)
    # squared weights 1/9 and 1; equal weights
    assert GeneralizedDice(2, smooth=0)(logits, target).item() == pytest.approx(1 - 2 * (1.5 / 9 + 0.5) / (5 / 9 + 3), rel=1e-6)
    assert GeneralizedDice(0, smooth=0)(logits, target).item() == pytest.approx(1 - 2 * 2 / 8, rel=1e-6)
    both = GeneralizedDice(smooth=0)(torch.cat([logits, flat([[0.9] * 4, [0.1] * 4])]), torch.cat([target, target]))
    alone = GeneralizedDice(smooth=0)(flat([[0.9] * 4, [0.1] * 4]), target)
    assert both.item() == pytest.approx((4 / 7 + alone.item()) / 2, rel=1e-6)


@pytest.mark.parametrize(("power", "w_type"), [(1, "simple"), (2, "square"), (0, "uniform")])
def test_generalized_dice_equals_monai_where_nothing_is_ignored_also_without_a_class(power, w_type):
    from monai.losses import GeneralizedDiceLoss

    torch.manual_seed(0)
    logits, target = torch.randn(3, 4, 5, 6, 7), torch.randint(0, 4, (3, 1, 5, 6, 7))
    target[1][target[1] == 3] = 0
    theirs = GeneralizedDiceLoss(softmax=True, to_onehot_y=True, w_type=w_type, smooth_nr=0, smooth_dr=0)
    assert GeneralizedDice(power, smooth=0)(logits, target).item() == pytest.approx(theirs(logits, target).item(), rel=1e-5)


def test_a_voxel_of_a_rare_class_moves_the_loss_more():
    target = torch.zeros(1, 1, 100, dtype=torch.long)
    target[..., 0] = 1
    logits = torch.zeros(1, 2, 100, requires_grad=True)
    ratios = []
    for power in (0, 1, 2):
        (gradient,) = torch.autograd.grad(GeneralizedDice(power, smooth=0)(logits, target), logits)
        ratios.append(gradient[0, 0, 0].item() / -gradient[0, 0, 1].item())
    assert ratios[0] == pytest.approx(1)
    assert min(ratios[1:]) > 20


# the recipe


def test_the_preset_of_the_paper(tmp_path):
    cfg = composed("experiment=modified_unet_horizontal/brats2021", f"run_folder={tmp_path}")
    optimizer = instantiate(cfg.model.optimizer)([nn.Parameter(torch.zeros(1))])
    assert (type(optimizer), optimizer.defaults["lr"], optimizer.defaults["betas"]) == (torch.optim.Adam, 5e-5, (0.9, 0.999))
    assert (cfg.epochs, cfg.data.batch_size, list(cfg.patch)) == (25, 8, [128, 128, 128])
    assert (cfg.data.preprocessing.crop, list(cfg.data.preprocessing.crop_size)) == ("center", [160, 192, 128])
    (elastic,) = instantiate(cfg.data.augmentation).transforms
    assert (type(elastic), elastic.probability, elastic.std) == (RandomElastic, 0.75, 2.0)
    assert type(instantiate(cfg.model.loss)) is GeneralizedDice
    assert cfg.model.inferer._target_.endswith("Whole")


def test_predictions_have_the_grid_of_the_file_and_nothing_outside_of_the_brain(tmp_path):
    """The network sees the box around the brain, padded to what it divides; what is written is the whole volume."""
    small = ["debug=tiny", "threads=1", "model.network.features=[4,4,4,4]", f"data.root={tmp_path / 'data'}"]
    run("experiment=modified_unet_horizontal/simulated", *small, "writer.on_test=true", f"runs={tmp_path / 'runs'}")
    (folder,) = run_folders(tmp_path / "runs")
    (written,) = (folder / "predictions").glob("*.nii.gz")
    case = written.name.removesuffix(".nii.gz")
    images = [nib.load(p).get_fdata() for p in (tmp_path / "data").rglob(f"{case}_*.nii.gz")]
    labels = np.asarray(nib.load(written).dataobj)
    assert labels.shape == images[0].shape
    inside = np.zeros(labels.shape, bool)
    inside[tuple(slice(a.min(), a.max() + 1) for a in np.nonzero(np.any(images, axis=0)))] = True
    assert not inside.all()
    assert labels[inside].any()
    assert not labels[~inside].any()


def test_it_is_the_network_of_another_method(tmp_path):
    network = [
        "model/network=horizontal_unet",
        "model.network.features=[4,8]",
        "~model.network.norm",
        "~model.network.upsampling",
    ]  # the benchmark's own network has these
    run("benchmark=blobs", "model=mean_teacher", *network, "debug=tiny", "threads=1", f"runs={tmp_path}", f"data.root={tmp_path / 'data'}")
    (folder,) = run_folders(tmp_path)
    assert rows(folder)
