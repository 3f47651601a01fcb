import copy
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

from lesionbench.errors import SuiteError
from lightning_modules import networks
from lightning_modules.networks import SlabChannels
from lightning_modules.networks.contract import logits_of

CONF = Path(__file__).parent.parent / "conf"
FEATURES = (4, 4, 4, 8, 8, 4)

# name, options, side of a small input for 2D and 3D
TINY = {
    "basic_unet": ({"features": FEATURES}, 32),
    "unet": ({"channels": (4, 6, 8)}, 16),
    "dynunet": ({"features": (4, 4, 6, 8), "kernels": (3,) * 4, "strides": (1, 2, 2, 2), "deep_supervision": True}, 16),
    "nnunet": ({"image_size": 16, "features": 4, "own_decoders": True}, 16),
    "attention_unet": ({"channels": (4, 6, 8)}, 16),
    "segresnet": ({"features": 8}, 16),
    "segresnet_vae": ({"features": 8, "image_size": 16}, 16),
    "unetr": ({"image_size": 16, "feature_size": 4, "hidden_size": 12, "mlp_size": 16, "heads": 2}, 16),
    "swin_unetr": ({"feature_size": 12, "depths": (1, 1, 1, 1), "attention_window": 3}, 64),
    "vnet": ({}, 32),
    "unet_plus_plus": ({"features": FEATURES, "deep_supervision": True}, 32),
    "CBAMUNet": ({"width": 4, "reduction": 1}, 16),
    "DeepSeg": ({"features": 4, "levels": 3}, 16),
    "DilatedUNet": ({"width": 4}, 16),
    "HarDNet": ({"features": (4, 6, 8, 8, 8, 8), "growth": (2,) * 4, "layers": (4,) * 4}, 32),
    "CMMNet": ({"features": (4, 6, 8), "dilations": (3, 2, 1), "extra_features": (8,), "hppm": 1}, 16),
    "HorizontalUNet": ({"features": (4, 6, 8)}, 16),
    "LightUNet": ({"features": 2}, 16),
    "MAABUNet": ({"features": (4, 4, 8)}, 16),
    "ResUNet": ({"features": (4, 6, 8)}, 16),
    "MultiHeadUNet": ({"features": (4, 6, 8)}, 16),
    "MultiHeadVNet": ({"features": (4, 6, 8), "convolutions": (1, 2, 3)}, 16),
    "SegNet": ({"features": (4, 6, 8, 8)}, 16),
}

ANY_SIZE = {"modality_interaction", "multi_scale_vit", "swin_unet", "transbts", "subpixel", "small_subpixel"}  # see the tests of their own


def tiny(name, dimensions=2, in_channels=2, out_channels=3, **options):
    return getattr(networks, name)(in_channels, out_channels, dimensions=dimensions, **{**TINY[name][0], **options})


def sides(name, dimensions):
    """A small input size; Swin UNETR needs one long side only."""
    return (64, 32, 32)[:dimensions] if name == "swin_unetr" else (TINY[name][1],) * dimensions


def parameters(name, in_channels=4, out_channels=3, **options):
    """Number of parameters at default size, without memory for them."""
    with torch.device("meta"):
        network = getattr(networks, name)(in_channels, out_channels, **options)
    tensors = [*network.parameters(), *network.buffers()]
    assert all(t.device.type == "meta" for t in tensors)
    return sum(p.numel() for p in network.parameters())


def conv(i, o, kernel, dimensions, bias=True):
    return i * o * kernel**dimensions + (o if bias else 0)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("name", TINY)
def test_shapes_gradients_and_forms(name, dimensions):
    """Training returns its form, each parameter gets gradient; evaluation returns plain logits."""
    torch.manual_seed(0)
    network = tiny(name, dimensions)
    size = sides(name, dimensions)
    assert network.dimensions == dimensions
    assert network.slab is None
    assert all(s % d == 0 for s, d in zip(size, network.divisor, strict=True))
    assert any(s >= m for s, m in zip(size, network.min_size, strict=True))
    image = torch.randn(2, 2, *size)
    out = network(image)
    out = out if isinstance(out, dict) else {"logits": out}
    assert set(out) == {"logits"} | (
        {"deep"}
        if name in ("dynunet", "unet_plus_plus", "CBAMUNet", "HarDNet", "SegNet")
        else {"loss", "reconstruction", "kl"}
        if name == "segresnet_vae"
        else set()
    )
    assert out["logits"].shape == (2, 3, *size)
    heads = [out["logits"], *out.get("deep", [])]
    total = sum((head * torch.randn_like(head)).sum() for head in heads) + out.get("loss", 0)
    total.backward()
    for parameter, value in network.named_parameters():
        assert value.grad is not None, parameter
        assert value.dim() < 2 or (value.grad != 0).any(), parameter
    network.eval()
    with torch.no_grad():
        assert network(image).shape == (2, 3, *size)


# networks with tests of their own, which also answer on shapes alone
OTHERS = {
    "ContextEncodingUNet": {"features": (4, 6, 8), "codes": 4},
    "EMSViT": {"image_size": 16, "width": 12, "depth": 1, "heads": 3, "head_width": 16},
    "ModalityInteractionUNet": {"image_size": 16, "features": (8, 16), "heads": 2, "layers": 1},
}


@pytest.mark.parametrize("name", [*TINY, *OTHERS])
def test_shapes_are_enough_to_count_what_it_does_and_keeps(name):
    """Memory and multiply-adds are told from a pass on `meta`."""
    with torch.device("meta"):
        network = getattr(networks, name)(2, 3, **OTHERS[name]) if name in OTHERS else tiny(name, 3)
        size = sides(name, 3) if name in TINY else (16, 16, 16)
        assert logits_of(network(torch.empty(2, 2, *size))).shape == (2, 3, *size)


@pytest.mark.parametrize("name", [n for n in TINY if n != "swin_unetr"])
def test_the_smallest_size_works_and_less_does_not(name):
    network = tiny(name)
    assert all(m % d == 0 for m, d in zip(network.min_size, network.divisor, strict=True))
    if name == "segresnet_vae":
        network.eval()  # in training its patch size is fixed
    out = network(torch.randn(1, 2, *network.min_size))
    assert (out["logits"] if isinstance(out, dict) else out).shape[2:] == network.min_size
    if network.min_size != network.divisor:
        with pytest.raises(ValueError, match="more than 1"):
            network(torch.randn(1, 2, *network.divisor))


def test_copies_after_training_for_a_teacher():
    for name in ("dynunet", "unet_plus_plus", "basic_unet"):
        network = tiny(name)
        network(torch.randn(1, 2, 32, 32))
        copy.deepcopy(network)


# sizes


def test_basic_unet_parameter_count_by_hand():
    a, b, c, d, e, last = 32, 32, 64, 128, 256, 32

    def two(i, o):
        return conv(i, o, 3, 3) + conv(o, o, 3, 3) + 4 * o  # affine instance norm after each

    encoder = two(4, a) + two(a, b) + two(b, c) + two(c, d) + two(d, e)
    up = conv(e, e // 2, 2, 3) + conv(d, d // 2, 2, 3) + conv(c, c // 2, 2, 3) + conv(b, b, 2, 3)
    decoder = two(e // 2 + d, d) + two(d // 2 + c, c) + two(c // 2 + b, b) + two(b + a, last)
    expected = encoder + up + decoder + conv(last, 3, 1, 3)
    assert parameters("basic_unet") == expected == 5_752_035
    assert parameters("basic_unet", norm="none") == expected - 4 * (a + b + c + d + e + d + c + b + last)


def test_vnet_parameter_count_by_hand():
    def down(i, n):
        o = 2 * i
        return conv(i, o, 2, 3, bias=False) + 2 * o + n * (conv(o, o, 5, 3, bias=False) + 2 * o)

    def up(i, o, n):
        return conv(i, o // 2, 2, 3) + o + n * (conv(o, o, 5, 3, bias=False) + 2 * o)

    first = conv(4, 16, 5, 3, bias=False) + 32
    last = conv(32, 3, 5, 3, bias=False) + 6 + conv(3, 3, 1, 3)
    middle = down(16, 1) + down(32, 2) + down(64, 3) + down(128, 2) + up(256, 256, 2) + up(256, 128, 2) + up(128, 64, 1) + up(64, 32, 1)
    assert parameters("vnet") == first + middle + last


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("unet", {"in_channels": 1, "out_channels": 2, "norm": "batch"}, 4_808_917),  # MONAI's spleen tutorial
        ("dynunet", {}, 31_192_035),  # nnU-Net 3D full resolution for BraTS without auxiliary heads: 31.2 M
        ("segresnet_vae", {"out_channels": 4, "image_size": 144}, 27_884_744),
    ],
)
def test_known_parameter_counts(name, options, expected):
    assert parameters(name, **options) == expected


@pytest.mark.parametrize(
    ("name", "options", "millions"),
    [
        ("swin_unetr", {}, 61.98),  # Hatamizadeh et al. 2021, Table 1
        ("unetr", {"in_channels": 1, "out_channels": 14, "image_size": 96}, 92.58),  # Hatamizadeh et al. 2022, Table 4
    ],
)
def test_published_parameter_counts(name, options, millions):
    """To half a percent: the released code of both differs a little from the published tables."""
    assert parameters(name, **options) / 1e6 == pytest.approx(millions, rel=5e-3)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("name", TINY)
def test_default_size_builds_without_memory(name, dimensions):
    size = {"image_size": 96} if name in ("nnunet", "unetr", "segresnet_vae") else {"blocks": 5} if name == "LightUNet" else {}
    assert parameters(name, dimensions=dimensions, **size) > 3e5


# single networks


def test_norm_free_network_sees_each_sample_alone():
    """Without normalization, the gradient of a batch's mean loss is the mean of the samples' gradients."""
    torch.manual_seed(0)
    network = tiny("basic_unet", norm="none")
    assert not [m for m in network.modules() if "Norm" in type(m).__name__]
    image = torch.randn(2, 2, 16, 16)

    def gradient(batch):
        network.zero_grad()
        network(batch).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in network.parameters()])

    both, first, second = gradient(image), gradient(image[:1]), gradient(image[1:])
    torch.testing.assert_close(both, (first + second) / 2)


def test_dynunet_is_monai_s_with_heads_at_their_own_resolution():
    from monai.networks.nets import DynUNet

    options = {"kernels": (3,) * 5, "strides": (1, 2, 2, 2, 2), "features": (4, 4, 6, 6, 8)}
    torch.manual_seed(0)
    ours = tiny("dynunet", **options)
    theirs = DynUNet(2, 2, 3, [3] * 5, [1, 2, 2, 2, 2], [2] * 4, filters=[4, 4, 6, 6, 8], deep_supervision=True, deep_supr_num=2)
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(key.startswith("skip_layers") for key in missing.missing_keys)
    image = torch.randn(1, 2, 32, 48)
    out, stacked = ours(image), theirs(image)
    torch.testing.assert_close(out["logits"], stacked[:, 0])
    assert [head.shape[2:] for head in out["deep"]] == [(16, 24), (8, 12)]
    for i, head in enumerate(out["deep"], start=1):
        torch.testing.assert_close(nn.functional.interpolate(head, (32, 48)), stacked[:, i])
    torch.testing.assert_close(ours.eval()(image), theirs.eval()(image))


def test_dynunet_starts_from_he_s_normal_weights():
    """Of convolutions that a leaky ReLU of slope 0.01 follows: variance 2 / (1 + 0.01^2) / inputs of a value; biases are 0."""
    torch.manual_seed(0)
    network = tiny("dynunet", features=(16, 32, 32, 32))
    weight = network.downsamples[0].conv2.conv.weight
    assert weight.square().mean().item() == pytest.approx(2 / (1 + 0.01**2) / (32 * 9), rel=0.05)
    assert (weight.abs() > math.sqrt(6 / (32 * 9))).any()  # a uniform draw of that variance ends here
    assert not any(p.any() for name, p in network.named_parameters() if name.endswith("conv.bias"))


def test_nnunet_has_heads_on_all_but_the_two_lowest_levels():
    """Of six levels four: the logits and three more."""
    with torch.device("meta"):
        network = networks.nnunet(4, 3, image_size=128, deep_supervision=True)
        out = network(torch.empty(1, 4, 128, 128, 128))
    assert network.filters == [32, 64, 128, 256, 320, 320]
    assert [tuple(x.shape[2:]) for x in (out["logits"], *out["deep"])] == [(side,) * 3 for side in (128, 64, 32, 16)]


def test_dynunet_anisotropic_strides_set_the_divisor():
    network = tiny("dynunet", 3, kernels=[3, [3, 3, 1], 3, 3], strides=[1, [2, 2, 1], 2, [2, 1, 1]], deep_supervision=False)
    assert network.divisor == (8, 4, 2)
    assert network(torch.randn(1, 2, 16, 8, 4)).shape == (1, 3, 16, 8, 4)


def test_unet_plus_plus_heads_are_nested_networks():
    network = tiny("unet_plus_plus")
    out = network(torch.randn(1, 2, 32, 32))
    assert [head.shape for head in out["deep"]] == [(1, 3, 32, 32)] * 3
    out["deep"][-1].sum().backward()  # the shallowest: one level down only
    assert network.conv_1_0.convs.conv_0.conv.weight.grad is not None
    assert network.conv_2_0.convs.conv_0.conv.weight.grad is None
    plain = tiny("unet_plus_plus", deep_supervision=False)
    plain(torch.randn(1, 2, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in plain.parameters())


def test_segresnet_vae_loss_is_weighted_and_its_size_checked():
    torch.manual_seed(0)
    network = tiny("segresnet_vae", vae_weight=0.1, dropout=0.0)
    double = tiny("segresnet_vae", vae_weight=0.2, dropout=0.0)
    double.load_state_dict(network.state_dict())
    image = torch.randn(1, 2, 16, 16)
    losses = []
    for n in (network, double):
        torch.manual_seed(1)
        losses.append(n(image)["loss"])
    torch.testing.assert_close(2 * losses[0], losses[1])
    with pytest.raises(SuiteError, match=r"\[32, 32\].*image_size=\[16, 16\]"):
        network(torch.randn(1, 2, 32, 32))
    assert network.eval()(torch.randn(1, 2, 24, 40)).shape == (1, 3, 24, 40)


def test_unetr_takes_one_size():
    network = tiny("unetr")
    assert network.fixed_size == (16, 16) == network.divisor
    with pytest.raises(SuiteError, match=r"\[32, 32\].*image_size=\[16, 16\]"):
        network(torch.randn(1, 2, 32, 32))


def test_vnet_takes_any_channels_and_repeats_those_monai_takes():
    from monai.networks.nets.vnet import InputTransition

    theirs = InputTransition(2, 4, 16, "elu")
    ours = tiny("vnet", in_channels=4).in_tr
    theirs.load_state_dict(ours.state_dict())
    image = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(ours(image), theirs(image))
    for channels in (3, 20):
        assert tiny("vnet", in_channels=channels)(torch.randn(1, channels, 32, 32)).shape == (1, 3, 32, 32)


def test_vnet_drops_channels_not_samples():
    kinds = {2: nn.Dropout2d, 3: nn.Dropout3d}
    for dimensions, kind in kinds.items():
        dropouts = [m for m in tiny("vnet", dimensions, dropout=0.25).modules() if "Dropout" in type(m).__name__]
        assert len(dropouts) == 8
        assert {(type(m), m.p) for m in dropouts} == {(kind, 0.25)}


DROPPING = ["basic_unet", "unet", "dynunet", "nnunet", "attention_unet", "segresnet", "swin_unetr", "unet_plus_plus", "unetr", "vnet"]


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_acts_in_training_only_and_never_on_logits(name):
    torch.manual_seed(0)
    network = tiny(name, dropout=0.5)
    image = torch.randn(1, 2, *sides(name, 2))
    first, second = (out if isinstance(out, dict) else {"logits": out} for out in (network(image), network(image)))
    assert not torch.equal(first["logits"], second["logits"])
    for logits in (first["logits"], *first.get("deep", ())):
        assert (logits != 0).all()  # a dropped logit is 0
    network.eval()
    assert torch.equal(network(image), network(image))


def test_swin_unetr_checkpointing_gives_the_same_gradient():
    torch.manual_seed(0)
    network = tiny("swin_unetr")
    saving = tiny("swin_unetr", gradient_checkpointing=True)
    saving.load_state_dict(network.state_dict())
    image = torch.randn(1, 2, 64, 32)
    for n in (network, saving):
        n(image).square().mean().backward()
    for a, b in zip(network.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_norms_by_name():
    image = torch.randn(2, 2, 32, 32)
    for norm, kind in [("instance", nn.InstanceNorm2d), ("batch", nn.BatchNorm2d), ("group", nn.GroupNorm)]:
        network = networks.basic_unet(2, 3, dimensions=2, features=(8,) * 6, norm=norm)
        assert sum(isinstance(m, kind) for m in network.modules()) == 18
        network(image)
    with pytest.raises(SuiteError, match="did you mean 'instance'"):
        tiny("basic_unet", norm="instanse")


def test_wrong_settings_are_named():
    with pytest.raises(SuiteError, match=r"dimensions=4: must be 2 or 3"):
        tiny("basic_unet", 4)
    with pytest.raises(SuiteError, match="one entry per level"):
        tiny("dynunet", strides=(1, 2, 2))
    with pytest.raises(SuiteError, match="first stride"):
        tiny("dynunet", strides=(2, 2, 2, 2))
    with pytest.raises(SuiteError, match="norm=none"):
        tiny("dynunet", norm="none")
    with pytest.raises(SuiteError, match="divisible by 16"):
        tiny("unetr", image_size=40)
    with pytest.raises(SuiteError, match="divisible by 16"):
        tiny("segresnet_vae", image_size=24)
    with pytest.raises(SuiteError, match="has 3 numbers, but dimensions=2"):
        tiny("unetr", image_size=(16, 16, 16))


# 2.5D


class Sum(nn.Module):
    """A 2D "network" that reveals its input."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.channels = in_channels
        networks.describe(self, 2, 1)

    def forward(self, image):
        assert image.shape[1] == self.channels
        return image


def test_slab_folds_slices_into_channels_image_channel_first():
    image = torch.randn(2, 4, 5, 6, 3)
    out = SlabChannels(4, 1, network=Sum, slab=3)(image)
    assert out.shape == (2, 12, 5, 6)
    for m in range(4):
        for s in range(3):
            assert torch.equal(out[:, m * 3 + s], image[:, m, :, :, s])


@pytest.mark.parametrize("name", TINY)
def test_slab_of_every_network(name):
    network = SlabChannels(2, 3, network=partial(getattr(networks, name), dimensions=2, **TINY[name][0]), slab=3)
    size = sides(name, 2)
    out = network(torch.randn(1, 2, *size, 3))
    assert (out["logits"] if isinstance(out, dict) else out).shape == (1, 3, *size)
    inner = network.network
    assert (network.dimensions, network.slab, network.divisor, network.min_size) == (2, 3, inner.divisor, inner.min_size)
    assert network.fixed_size == inner.fixed_size


def test_slab_errors():
    with pytest.raises(SuiteError, match="slab=4"):
        SlabChannels(1, 1, network=Sum, slab=4)
    with pytest.raises(SuiteError, match="set it to 2"):
        SlabChannels(1, 3, network=partial(networks.basic_unet, dimensions=3, features=FEATURES), slab=3)
    with pytest.raises(SuiteError, match=r"\(B, M, H, W, 3\), got \(1, 1, 4, 4\)"):
        SlabChannels(1, 1, network=Sum, slab=3)(torch.zeros(1, 1, 4, 4))


# names and configuration


def test_importing_networks_does_not_import_monai():
    code = "import sys, lightning_modules.networks, lightning_modules.losses, lightning_modules.schedules; sys.exit('monai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_mistyped_network_is_answered_with_the_nearest():
    with pytest.raises(AttributeError, match="did you mean 'swin_unetr'"):
        networks.swin_untr  # noqa: B018
    assert all(callable(getattr(networks, name)) for name in networks.__all__)


def configured(group, name, *overrides):
    """The composed node cfg.model.<group> of conf/model/<group>/<name>.yaml."""
    with initialize_config_dir(str(CONF), version_base=None):
        return compose(overrides=[f"+model/{group}={name}", *overrides]).model[group]


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "model" / "network").glob("*.yaml")))
def test_configured_networks_build(name):
    config = configured("network", name)
    if "image_size" in config:  # otherwise that of the data's patch
        config.image_size = 64
    factory = instantiate(config)
    if name == "paired_unet":  # otherwise those of the task
        factory = partial(factory, channels=["t1", "t1ce", "t2", "flair"])
    with torch.device("meta"):
        network = factory(4, 3)
    assert network.slab == config.get("slab")
    inner = config.get("network", config)
    assert network.dimensions == (2 if network.slab or name in ("swin_unet", "xception_unet_plus_plus") else inner.get("dimensions", 3))
    assert (math.prod(network.divisor) == 1) == (name in ANY_SIZE)


def test_the_network_in_a_slab_is_a_choice():
    network = instantiate(configured("network", "slab", "model/network@model.network.network=unet", "model.network.slab=3"))(2, 3)
    assert type(network.network).__name__ == "UNet"
    assert network(torch.randn(1, 2, 32, 32, 3)).shape == (1, 3, 32, 32)


def test_every_network_is_configured():
    configured = {path.stem for path in (CONF / "model" / "network").glob("*.yaml")}
    assert {n for n in TINY if n.islower()} | {
        "cbam_unet",
        "deepseg",
        "dilated_unet",
        "hardnet",
        "cmm_net",
        "horizontal_unet",
        "light_unet",
        "multi_scale_vit",
        "maab",
        "modality_interaction",
        "resunet",
        "multi_head_unet",
        "multi_head_vnet",
        "multi_head_resnet",
        "segnet",
        "slab",
        "small_unet",
        "subpixel",
        "small_subpixel",
    } <= configured
    assert set(TINY) | {"PixelCritic", "SubpixelNet", "SlabChannels", "describe", "stateless"} <= set(networks.__all__)
