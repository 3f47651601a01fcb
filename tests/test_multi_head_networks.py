"""Networks with one or several heads on a trunk: sizes, heads, dropout, upsampling."""

import copy

import pytest
import torch
from torch import nn

from lesionbench.errors import SuiteError
from lightning_modules.networks import MultiHeadResNet, MultiHeadUNet, MultiHeadVNet
from lightning_modules.networks.multi_head import every_head, keep_main_head

SMALL = {
    "unet": (MultiHeadUNet, {"features": (4, 6, 8)}, (16, 8)),
    "vnet": (MultiHeadVNet, {"features": (4, 6, 8), "convolutions": (1, 1, 2)}, (16, 8, 8)),
    "resnet": (MultiHeadResNet, {"width": 4, "head_width": 4, "norm": "group"}, (32, 32, 16)),
}


def small(name, **options):
    network, defaults, _ = SMALL[name]
    return network(2, 3, **{**defaults, **options})


def image(name):
    return torch.randn(2, 2, *SMALL[name][2], generator=torch.Generator().manual_seed(0))


def parameters(network, *args, **options):
    with torch.device("meta"):
        return sum(p.numel() for p in network(*args, **options).parameters())


@pytest.mark.parametrize(
    ("network", "heads", "count"),
    [
        (MultiHeadUNet, 1, 31_042_434),  # 29.60 x 2^20: the "29.6 M" of Shi et al.
        (MultiHeadUNet, 3, 31_264_646),  # 29.82 x 2^20
        (MultiHeadVNet, 1, 9_443_266),
        (MultiHeadVNet, 3, 9_457_190),
    ],
)
def test_published_sizes(network, heads, count):
    assert parameters(network, 1, 2, heads=heads) == count


def test_norms_change_the_size_by_their_scale_and_shift():
    normalized = 2 * (16 + 2 * 32 + 3 * 64 + 3 * 128 + 3 * 256 + 3 * 128 + 3 * 64 + 2 * 32 + 16)  # convolutions of blocks
    normalized += 2 * (32 + 64 + 128 + 256 + 128 + 64 + 32 + 16)  # and between levels
    assert parameters(MultiHeadVNet, 1, 2, norm="batch") - parameters(MultiHeadVNet, 1, 2) == normalized
    assert parameters(MultiHeadVNet, 1, 2, norm="group") == parameters(MultiHeadVNet, 1, 2, norm="batch")
    assert parameters(MultiHeadVNet, 1, 2, norm="none") == parameters(MultiHeadVNet, 1, 2)


def test_resnet_has_the_encoder_of_resnet18():
    """The two-dimensional one without its classifier has 11 176 512 parameters; only the first kernel grew, from 7x7 to 7x7x3."""
    with torch.device("meta"):
        network = MultiHeadResNet(3, 2)
    encoder = sum(p.numel() for part in (network.stem, network.stages) for p in part.parameters())
    assert encoder == 11_176_512 + 2 * 7 * 7 * 3 * 64
    kernels = {m.kernel_size for part in (network.stem, network.stages) for m in part.modules() if isinstance(m, nn.Conv3d)}
    assert kernels == {(7, 7, 3), (3, 3, 1), (1, 1, 1)}


@pytest.mark.parametrize("name", SMALL)
def test_heads_share_the_trunk_and_are_not_copies(name):
    torch.manual_seed(0)
    network = small(name, heads=3)
    out = network(image(name))
    assert set(out) == {"logits", "heads"}
    heads = [out["logits"], *out["heads"]]
    assert [h.shape for h in heads] == [(2, 3, *SMALL[name][2])] * 3
    assert not torch.equal(heads[0], heads[1])
    heads[1].square().sum().backward()
    assert all(p.grad is None for k in (0, 2) for p in network.branches.heads[k].parameters())
    trunk = [p for n, p in network.named_parameters() if not n.startswith("branches") and p.dim() > 1]
    assert all((p.grad != 0).any() for p in [*trunk, *(p for p in network.branches.heads[1].parameters() if p.dim() > 1)])


@pytest.mark.parametrize("name", SMALL)
def test_without_the_other_heads_the_main_one_says_the_same(name):
    torch.manual_seed(0)
    network = small(name, heads=3).eval()
    with torch.no_grad():
        with every_head(network):
            before = network(image(name))["logits"]
        assert torch.equal(network(image(name)), before)  # in evaluation the others do not even answer
        lean = keep_main_head(copy.deepcopy(network))
        assert torch.equal(lean(image(name)), before)
        plain = small(name).eval()
        plain.load_state_dict(lean.state_dict())
        assert torch.equal(plain(image(name)), before)
    assert sum(p.numel() for p in lean.parameters()) == sum(p.numel() for p in small(name).parameters())


@pytest.mark.parametrize("name", SMALL)
def test_dropout_has_no_weights_and_acts_in_training_only(name):
    torch.manual_seed(0)
    plain, dropping = small(name).eval(), small(name, dropout=0.5)
    dropping.load_state_dict(plain.state_dict())
    assert sum(m.p == 0.5 for m in dropping.modules() if isinstance(m, nn.Dropout2d | nn.Dropout3d)) == 2
    assert not torch.equal(dropping(image(name)), dropping(image(name)))
    dropping.load_state_dict(plain.state_dict())
    assert torch.equal(dropping.eval()(image(name)), plain(image(name)))


@pytest.mark.parametrize("name", ["unet", "vnet"])
def test_both_interpolations_have_the_same_weights(name):
    torch.manual_seed(0)
    linear, nearest = small(name, upsampling="linear"), small(name, upsampling="nearest")
    nearest.load_state_dict(linear.state_dict())
    assert not torch.allclose(linear(image(name)), nearest(image(name)))
    with torch.no_grad():
        for network in (linear, nearest):  # nothing comes up any more: they differ in nothing else
            for p in network.ups.parameters():
                p.zero_()
    torch.testing.assert_close(linear(image(name)), nearest(image(name)))


def test_vnet_adds_its_skips_and_unet_appends_them():
    """With the way up silenced, the V-Net's last block still sees the first block's features, on as many channels."""
    vnet, unet = small("vnet"), small("unet")
    assert vnet.branches.heads[0][0].in_channels == 4
    assert unet.branches.heads[0][0].in_channels == 8
    seen = []
    vnet.branches.heads[0][0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    for p in vnet.ups.parameters():
        nn.init.zeros_(p)
    vnet(image("vnet"))
    torch.testing.assert_close(seen[0], vnet.encoder[0](image("vnet")))


def test_resnet_sees_across_slices_and_fits_its_contract():
    torch.manual_seed(0)
    network = small("resnet").eval()
    assert (network.divisor, network.min_size) == ((32, 32, 16), (32, 32, 16))
    assert small("resnet", norm="batch").min_size == (64, 64, 32)
    x = image("resnet").requires_grad_()
    network(x)[0, 0, 16, 16, 3].backward()
    assert x.grad[0, :, :, :, 4].abs().sum() > 0


def test_group_norm_never_has_one_channel_per_group():
    groups = {
        m.num_channels: m.num_groups
        for m in MultiHeadUNet(1, 2, features=(8, 16, 20), norm="group").modules()
        if isinstance(m, nn.GroupNorm)
    }
    assert groups == {8: 4, 16: 8, 20: 4}


def test_wrong_options_are_named():
    with pytest.raises(SuiteError, match="did you mean 'batch'"):
        MultiHeadUNet(1, 2, norm="bach")
    with pytest.raises(SuiteError, match="did you mean 'nearest'"):
        MultiHeadVNet(1, 2, upsampling="nearst")
    with pytest.raises(SuiteError, match="heads=0"):
        MultiHeadUNet(1, 2, features=(4, 8), heads=0)
