"""EMSViT: the split by hand and what it reaches, windows against attention to all, the loss of its text, sizes and gradients."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from torch import nn

from lesionbench.errors import SuiteError
from lightning_modules.networks import EMSViT
from lightning_modules.networks.conv_transformer import TransformerLayer
from lightning_modules.networks.emsvit import MultiScaleSplit, Stage
from lightning_modules.networks.swin import SwinBlock
from tests.harness import composed, run, run_folders

small = partial(EMSViT, image_size=16, dimensions=2, patch_size=4, width=12, depth=2, blocks=2, heads=3, head_width=8)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


# the split


def test_parameters_of_the_split():
    assert parameters(MultiScaleSplit(12, dimensions=2)) == 4 * 4 * (1 + 9 + 25) == 560
    assert parameters(MultiScaleSplit(12, dimensions=3)) == 4 * 4 * (1 + 27 + 125)
    assert MultiScaleSplit(512).widths == [170, 170, 172]
    with torch.device("meta"):
        network = EMSViT(4, 4, image_size=128)
        splits = [m for m in network.modules() if isinstance(m, MultiScaleSplit)]
    assert len(splits) == 8
    assert sum(map(parameters, splits)) == 8 * 128 * 128 * 153
    assert sum(p.numel() for split in splits for p in split.parameters() if p.shape[-1] > 1) == 8 * 128 * 128 * 152
    assert len([m for m in network.modules() if isinstance(m, TransformerLayer)]) == 24
    assert parameters(network) == 67_719_444


@pytest.mark.parametrize("dimensions", [2, 3])
def test_kernels_that_pass_on_their_center_change_nothing(dimensions):
    split = MultiScaleSplit(7, dimensions=dimensions)
    for layer in split.convolutions:
        nn.init.dirac_(layer.weight)
    x = torch.randn(2, 7, *[6] * dimensions)
    torch.testing.assert_close(split(x), x)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize(("group", "radius"), [(0, 0), (1, 1), (2, 2)])
def test_footprints(group, radius, dimensions):
    """A change of one voxel in a group of channels is seen in that group alone, as far as its kernel reaches."""
    torch.manual_seed(0)
    split = MultiScaleSplit(6, dimensions=dimensions)
    x = torch.zeros(1, 6, *[9] * dimensions)
    x[(0, 2 * group, *[4] * dimensions)] = 1
    changed = split(x)[0].abs() > 0
    assert changed.flatten(1).any(dim=1).nonzero().flatten().tolist() == [2 * group, 2 * group + 1]
    places = changed.any(dim=0).nonzero()
    assert (places.min(), places.max(), len(places)) == (4 - radius, 4 + radius, (2 * radius + 1) ** dimensions)


@pytest.mark.parametrize("window", [None, 4])
def test_a_stage_without_layers_by_hand(window):
    torch.manual_seed(0)
    stage = Stage(12, (1, 3, 5), blocks=0, heads=3, dropout=0.0, window=window, dimensions=2)
    x = torch.randn(2, 12, 6, 5) * torch.arange(1.0, 13).reshape(1, 12, 1, 1)
    y = stage.split(x)
    torch.testing.assert_close(stage(x), x + F.gelu(F.layer_norm(y, y.shape[1:])))


def test_a_stage_splits_before_its_layers():
    network, order = small(1, 2), []
    for name, module in network.named_modules():
        if name.endswith((".split", ".blocks")):
            module.register_forward_hook(lambda *_, name=name: order.append(name))
    network(torch.randn(1, 1, 16, 16))
    assert order == [f"{side}.{n}.{part}" for side in ("encoder", "decoder") for n in (0, 1) for part in ("split", "blocks")]


# attention


def test_a_window_that_holds_all_tokens_is_attention_to_all():
    torch.manual_seed(0)
    windowed, to_all = SwinBlock(12, 3, 4, False, 0.0), TransformerLayer(12, 48, 3, 0.0)
    missing = to_all.load_state_dict(
        {n.replace("attention.qkv", "qkv").replace("attention.out", "out"): v for n, v in windowed.state_dict().items()}, strict=False
    )
    assert (missing.missing_keys, missing.unexpected_keys) == ([], ["attention.bias", "qkv.bias"])
    nn.init.zeros_(windowed.attention.bias)
    nn.init.zeros_(windowed.attention.qkv.bias)
    x = torch.randn(2, 4, 4, 12)
    torch.testing.assert_close(windowed(x).flatten(1, 2), to_all(x.flatten(1, 2)), atol=1e-5, rtol=1e-5)
    nn.init.normal_(windowed.attention.bias)
    assert not torch.allclose(windowed(x).flatten(1, 2), to_all(x.flatten(1, 2)), atol=1e-3)


@pytest.mark.parametrize(("window", "seen"), [(None, 64), (4, 16)])
def test_what_a_token_attends_to(window, seen):
    torch.manual_seed(0)
    stage = Stage(12, (1,), blocks=1, heads=3, dropout=0.0, window=window, dimensions=2)
    stage.norm = nn.Identity()  # which knows of the whole map
    x = torch.randn(1, 12, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(stage(x)[0, :, 1, 1].sum(), x)
    assert int((gradient[0].abs().sum(dim=0) > 0).sum()) == seen


def test_every_other_layer_of_a_stage_shifts_its_windows():
    stage = Stage(12, (1, 3, 5), blocks=3, heads=3, dropout=0.0, window=4, dimensions=2)
    assert [block.shift for block in stage.blocks] == [0, 2, 0]


# the network


def test_decoder_stages_read_the_inputs_of_encoder_stages_from_the_end():
    torch.manual_seed(0)
    network = small(1, 2).eval()
    inputs, joined = [], []
    for stage in network.encoder:
        stage.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    for join in network.joins:
        join.register_forward_pre_hook(lambda _, x: joined.append(x[0]))
    network(torch.randn(1, 1, 16, 16))
    assert [torch.equal(j[:, 12:], i) for j, i in zip(joined, inputs[::-1], strict=True)] == [True, True]
    alone = small(1, 2, skips=False)
    assert parameters(network) - parameters(alone) == 2 * 12 * 12


@pytest.mark.parametrize(("dimensions", "size"), [(2, (16, 16)), (2, (9, 21)), (3, (8, 12, 16)), (3, (5, 8, 9))])
@pytest.mark.parametrize("upsampling", ["transposed", "linear"])
def test_any_size_and_gradients_everywhere(dimensions, size, upsampling):
    torch.manual_seed(0)
    network = small(2, 3, dimensions=dimensions, upsampling=upsampling)
    out = network(torch.randn(2, 2, *size))
    assert out.shape == (2, 3, *size)
    (out * torch.randn_like(out)).sum().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.dim() < 2 or (p.grad != 0).any(), name


@pytest.mark.parametrize(("dimensions", "size"), [(2, (5, 1)), (3, (1, 5, 1))])
def test_the_smallest_images_are_more_than_a_patch(dimensions, size):
    network = small(1, 2, dimensions=dimensions)
    assert network.min_size == (5,) * dimensions
    assert network(torch.randn(1, 1, *size)).shape == (1, 2, *size)


def test_windows_take_any_size():
    network = small(1, 2, attention="window", attention_window=3)
    assert network(torch.randn(1, 1, 18, 30)).shape == (1, 2, 18, 30)


def test_sides_are_padded_with_zeros_at_the_far_end():
    torch.manual_seed(0)
    network = small(1, 2).eval()
    image = torch.randn(1, 1, 10, 16)
    torch.testing.assert_close(network(image), network(F.pad(image, (0, 0, 0, 2)))[:, :, :10])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "windows"}, r"network\.attention 'windows'; did you mean 'window'"),
        ({"upsampling": "bilinear"}, r"network\.upsampling 'bilinear'"),
        ({"patch_size": 6}, r"network\.patch_size=6: expected a power of 2"),
        ({"kernels": (1, 2)}, r"network\.kernels=\[1, 2\]: expected one to 12 odd numbers"),
        ({"kernels": ()}, r"network\.kernels=\[\]"),
        ({"heads": 5}, r"network\.heads=5 does not divide network\.width=12"),
        ({"head_width": 6}, r"network\.head_width=6: expected a multiple of network\.patch_size=4"),
        ({"attention": "window", "dimensions": 3}, r"network\.attention=window is for slices; with network\.dimensions=3 use all"),
    ],
)
def test_what_cannot_be_is_named(options, message):
    with pytest.raises(SuiteError, match=message):
        small(1, 3, **options)


# what its text says of training


def preset(tmp_path):
    return composed("experiment=emsvit/brats2019", f"run_folder={tmp_path}")


def test_the_loss_of_equation_12(tmp_path):
    """Less the constant 1/2: 0 for a perfect answer, and by hand on two voxels of two classes."""
    loss = instantiate(preset(tmp_path).model.loss)
    truth = torch.tensor([0, 1]).reshape(1, 1, 2, 1, 1)
    one_hot = F.one_hot(truth[:, 0], 2).movedim(-1, 1).float()
    assert loss(100 * one_hot, truth).item() == pytest.approx(0, abs=1e-6)
    p = torch.tensor([[0.7, 0.4], [0.3, 0.6]])  # classes, voxels
    dice = [2 * 0.7 / (1 + 0.49 + 0.16), 2 * 0.6 / (1 + 0.09 + 0.36)]
    cross_entropy = -(torch.tensor([0.7, 0.6]).log()).mean()
    expected = 1 - 0.5 * sum(dice) / 2 + 0.5 * cross_entropy - 0.5
    assert loss(p.log().reshape(1, 2, 2, 1, 1), truth).item() == pytest.approx(float(expected), rel=1e-3)
    better = torch.tensor([[0.7, 0.2], [0.3, 0.8]]).log().reshape(1, 2, 2, 1, 1)
    assert loss(better, truth) < loss(p.log().reshape(1, 2, 2, 1, 1), truth)


def test_the_augmentation_darkens_up_to_a_half_and_shifts(tmp_path):
    transforms = instantiate(preset(tmp_path).data.augmentation).transforms
    shift, scale = transforms[1], transforms[2]
    torch.manual_seed(0)
    factors = [float(scale.change(torch.ones(1, 1, 1))) for _ in range(400)]
    assert 0.5 <= min(factors) < 0.51 < 0.99 < max(factors) < 1
    assert sum(factors) / 400 == pytest.approx(0.75, abs=0.02)
    assert (shift.scale, shift.shift) == (0.0, 0.05)


@pytest.mark.slow
def test_kernels_of_several_sides_are_no_worse_on_two_sizes(tmp_path):
    """The mean over the seeds; single seeds go either way."""
    found = {}
    for kernels in ("[1,3,5]", "[1,1,1]"):
        for seed in (0, 1, 2):
            folder = tmp_path / f"{kernels[3]}-{seed}"
            more = [f"model.network.kernels={kernels}", f"seed={seed}", f"runs={folder}", f"data.root={tmp_path / 'data'}"]
            run("experiment=emsvit/context_toy", "threads=1", "callbacks.progress=null", *more)
            dice = json.loads((run_folders(folder)[0] / "test" / "dataset.json").read_text())[""]
            found.setdefault(kernels, []).append((dice["A"]["dice"] + dice["B"]["dice"]) / 2)
    assert min(found["[1,3,5]"]) > 0.9, found
    assert sum(found["[1,3,5]"]) >= sum(found["[1,1,1]"]), found
