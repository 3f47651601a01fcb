"""Attention U-Net with positive mining: CBAM and its network, the mined sample, the gradients of every head."""

import pytest
import torch
import torchio

from datamodules.transforms.axes import RandomFlipOfOneAxis
from datamodules.transforms.intensity import RandomDroppedChannel
from datamodules.transforms.positive_mining import PositiveMining, scaled
from lesionbench.errors import SuiteError
from lightning_modules.losses import DeepSupervision, RegionDice
from lightning_modules.networks import CBAMUNet
from lightning_modules.networks.cbam import CBAM, ChannelGate, SpatialGate
from tests.harness import rows, run, run_folders, weights


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def parameters(**options):
    with torch.device("meta"):
        return sum(p.numel() for p in CBAMUNet(4, 3, **options).parameters())


def features(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# attention


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("relu", [False, True])
def test_gates_of_zero_weights_are_one_half_each(dimensions, relu):
    cbam = CBAM(8, dimensions=dimensions, relu=relu)
    for parameter in cbam.parameters():
        torch.nn.init.zeros_(parameter)
    x = features(2, 8, *(6, 5, 4)[:dimensions])
    assert torch.equal(cbam(x), 0.25 * x)


def test_channel_gate_by_hand():
    """C = 1, hidden 1, both linear maps 1 x + 0: mean 1, largest 3 -> sigmoid(1 + 3), or sigmoid(1 * 3)."""
    x = torch.tensor([0.0, 0.0, 1.0, 3.0]).reshape(1, 1, 2, 2)
    for combine, expected in (("sum", 4.0), ("product", 3.0)):
        gate = ChannelGate(1, combine=combine)
        for layer in (gate.mlp[0], gate.mlp[2]):
            torch.nn.init.ones_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
        torch.testing.assert_close(gate(x).flatten(), torch.tensor([expected]).sigmoid())


def test_a_product_of_two_negative_answers_opens_the_gate():
    x = features(1, 4, 3, 3)
    gates = {combine: ChannelGate(4, combine=combine) for combine in ("sum", "product")}
    for gate in gates.values():
        torch.nn.init.zeros_(gate.mlp[2].weight)
        torch.nn.init.constant_(gate.mlp[2].bias, -2.0)
    assert gates["sum"](x).max() < 0.5 < gates["product"](x).min()


def test_channel_gate_heeds_no_place_and_spatial_gate_of_one_voxel_no_order_of_channels():
    x = features(2, 8, 4, 4, 4)
    channel, spatial = ChannelGate(8, reduction=2), SpatialGate(kernel=1)
    voxels = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(channel(x.flatten(2)[..., voxels].reshape(x.shape)), channel(x))
    torch.testing.assert_close(spatial(x[:, [7, 6, 5, 4, 3, 2, 1, 0]]), spatial(x))
    assert not torch.allclose(channel(x[:, [7, 6, 5, 4, 3, 2, 1, 0]]), channel(x))


def test_spatial_gate_weighs_mean_and_largest():
    gate = SpatialGate(kernel=1, norm=None)
    gate.layers[0].weight.data = torch.tensor([1.0, -0.5]).reshape(1, 2, 1, 1, 1)
    x = torch.tensor([1.0, 5.0]).reshape(1, 2, 1, 1, 1)  # mean 3, largest 5
    torch.testing.assert_close(gate(x).flatten(), torch.tensor([0.5]).sigmoid())


@pytest.mark.parametrize("relu", [False, True])
def test_a_relu_before_the_sigmoid_never_weighs_below_one_half(relu):
    gate = SpatialGate(dimensions=2, kernel=3, relu=relu)
    least = gate(10 * features(4, 6, 8, 8)).min()
    assert (least >= 0.5) == relu


def test_attention_of_one_kind_has_one_gate():
    assert CBAM(8, kind="channel").spatial is None
    assert CBAM(8, kind="spatial").channel is None
    x = features(1, 8, 4, 4, 4)
    only = CBAM(8, kind="spatial")
    torch.testing.assert_close(only(x), x * only.spatial(x))


# the network


def test_parameters():
    """Width 48, four channels, three regions: counted by its building blocks, 53,025 of them in six CBAM."""
    assert parameters() == 23_207_760
    assert parameters(deep_supervision=False) == 23_205_588
    assert parameters(attention="none") == 23_154_735
    assert parameters(attention="none", deep_supervision=False) == 23_152_563
    gates = sum(2 * c * (c // 16) + c // 16 + c + 2 * 7**3 + 2 for c in (48, 96, 192, 384, 384, 192))
    assert gates == 23_207_760 - 23_154_735
    heads = sum(3 * c + 3 for c in (384, 192, 96, 48))
    assert heads == 23_207_760 - 23_205_588


@pytest.mark.parametrize("pool_source", ["raw", "attended"])
@pytest.mark.parametrize("combine", ["sum", "product"])
def test_five_heads_at_full_size_and_a_gradient_for_everything(pool_source, combine):
    torch.manual_seed(0)
    network = CBAMUNet(2, 3, dimensions=2, width=8, reduction=2, pool_source=pool_source, combine=combine)
    out = network(features(2, 2, 32, 16))
    heads = [out["logits"], *out["deep"]]
    assert [tuple(head.shape) for head in heads] == [(2, 3, 32, 16)] * 5
    truth = (features(2, 3, 32, 16) > 1).float()
    DeepSupervision(RegionDice(squared=True, smooth=1.0), [1] * 5)(out, truth).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
    for name, parameter in network.named_parameters():
        if "attention" in name and name.endswith("weight") and "layers.1" not in name:
            assert (parameter.grad != 0).any(), name
    with torch.no_grad():
        assert network.eval()(features(1, 2, 16, 16)).shape == (1, 3, 16, 16)


def test_the_loss_is_the_mean_over_the_heads():
    truth = torch.tensor([1.0, 0.0]).reshape(1, 1, 2, 1)
    sure, wrong = torch.full_like(truth, 40.0) * (2 * truth - 1), torch.full_like(truth, 40.0) * (1 - 2 * truth)
    loss = DeepSupervision(RegionDice(squared=True, smooth=0.0), [1] * 5)
    heads = {"logits": sure, "deep": [wrong, wrong, sure, sure]}
    assert loss(heads, truth).item() == pytest.approx(2 / 5)
    half = RegionDice(squared=True, smooth=1.0)(torch.zeros(1, 1, 2, 1), truth)  # p = 1/2: (2 * 1/2 + 1) / (1/2 + 1 + 1) = 4/5
    assert half.item() == pytest.approx(1 / 5)


def test_what_goes_down_is_the_source_that_was_asked_for():
    """Gates that let nothing through close the skips alone (raw), or all that lies below the first level, too (attended)."""
    image = features(1, 2, 16, 16)
    for source, differs in (("raw", True), ("attended", False)):
        torch.manual_seed(0)
        network = CBAMUNet(2, 1, dimensions=2, width=4, pool_source=source, attention="channel").eval()
        network.attention[0].channel.mlp[2].bias.data.fill_(-1e4)
        with torch.no_grad():
            assert torch.allclose(network(image), network(image * 2 + 1)) != differs


def test_dilation_widens_what_the_bottom_sees():
    reach = {}
    for dilation in (1, 2):
        network = CBAMUNet(1, 1, dimensions=2, width=4, dilation=dilation)
        x = torch.zeros(1, 32, 16, 16, requires_grad=True)
        network.bottom[0][0](x)[0, 0, 8, 8].backward()
        reach[dilation] = int((x.grad.abs().sum((0, 1)) > 0).any(0).nonzero().max() - 8)
    assert reach == {1: 1, 2: 2}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attention": "cbm"}, "network.attention.*did you mean 'cbam'"),
        ({"combine": "mean"}, "network.combine"),
        ({"pool_source": "row"}, "network.pool_source.*did you mean 'raw'"),
        ({"norm": "layer"}, "network.norm"),
        ({"reduction": 0}, "network.reduction=0"),
    ],
)
def test_mistakes_are_named(options, said):
    with pytest.raises(SuiteError, match=said):
        CBAMUNet(2, 1, width=4, **options)


# positive mining


def ball(radius, center, size=64):
    axis = torch.arange(size, dtype=torch.float32)
    squares = [(axis - c).square() for c in center]
    return ((squares[0][:, None, None] + squares[1][:, None] + squares[2]) <= radius**2).to(torch.int16)[None]


def sample(label, channels=4):
    image = 1 + torch.rand(channels, *label.shape[1:], generator=torch.Generator().manual_seed(0))
    return torchio.Subject(image=torchio.ScalarImage(tensor=image), label=torchio.LabelMap(tensor=label.clone()))


def mined(label, seed=0, **options):
    torch.manual_seed(seed)
    subject = PositiveMining(p=1.0, include=["image"], **options)(sample(label))
    return subject["image"].data, subject["label"].data


def test_at_scale_one_the_tumor_stays_and_all_else_is_zero():
    label = ball(9, (20, 30, 40)) * 2
    image, kept = mined(label, scale=(1.0, 1.0))
    original = sample(label)["image"].data
    inside = (label > 0).expand_as(image)
    assert torch.equal(image[inside], original[inside])
    assert (image[~inside] == 0).all()
    assert torch.equal(kept, label)


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_the_mask_grows_with_the_cube_of_the_scale_and_the_label_stays(factor):
    label = ball(20, (31, 31, 31))
    image, kept = mined(label, scale=(factor, factor))
    assert (image[0] != 0).sum() / label.sum() == pytest.approx(factor**3, rel=0.03)
    assert torch.equal(kept, label)


def test_the_label_goes_along_on_request():
    label = ball(12, (31, 31, 31)) + ball(5, (31, 31, 31))
    image, moved = mined(label, scale=(1.1, 1.1), scale_label=True)
    assert torch.equal(moved > 0, image[:1] != 0)
    assert set(moved.unique().tolist()) == {0, 1, 2}
    assert (moved == 2).sum() > (label == 2).sum()


def test_the_center_is_the_lesion_s_or_the_sample_s():
    label = ball(8, (16, 40, 44))
    for center, expected in (("lesion", (16, 40, 44)), ("volume", tuple(31.5 + (c - 31.5) / 2 for c in (16, 40, 44)))):
        image, _ = mined(label, scale=(0.5, 0.5), center=center)
        found = (image[0] != 0).nonzero().float().mean(0)
        assert found.tolist() == pytest.approx(expected, abs=0.5)


def test_what_leaves_the_sample_is_gone_and_nothing_comes_back():
    label = torch.zeros(1, 8, 8, 8, dtype=torch.int16)
    label[0, :2] = 1
    grown = scaled(label, 3.0, [0.5, 3.5, 3.5])  # -0.5 to 1.5 becomes -2.5 to 3.5
    assert grown[0, :4].all()
    assert not grown[0, 4:].any()
    shrunk = scaled(label, 0.5, [0.5, 3.5, 3.5])
    assert shrunk.sum() < label.sum() / 4
    assert not shrunk[0, :, 0].any()


def test_nothing_labeled_or_no_label_leaves_the_sample():
    empty = torch.zeros(1, 6, 6, 6, dtype=torch.int16)
    for label in (empty, empty - 1):
        image, _ = mined(label)
        assert torch.equal(image, sample(label)["image"].data)
    bare = torchio.Subject(image=torchio.ScalarImage(tensor=torch.ones(1, 4, 4, 4)))
    assert (PositiveMining(p=1.0)(bare)["image"].data == 1).all()


def test_a_tenth_of_the_samples_is_mined_and_scales_differ():
    label = ball(4, (8, 8, 8), size=16)
    torch.manual_seed(0)
    transform = PositiveMining(include=["image"])
    seen = [bool((transform(sample(label, 1))["image"].data == 0).any()) for _ in range(400)]
    assert sum(seen) / 400 == pytest.approx(0.1, abs=0.04)
    wide = ball(20, (31, 31, 31))
    sizes = {int((mined(wide, seed)[0][0] != 0).sum()) for seed in range(6)}
    assert len(sizes) > 3
    assert 0.9**3 * 0.97 <= min(sizes) / wide.sum() <= max(sizes) / wide.sum() <= 1.1**3 * 1.03


@pytest.mark.parametrize(
    ("options", "said"),
    [({"scale": (1.1, 0.9)}, r"scale=\[1.1, 0.9\]"), ({"scale": (0.0, 1.0)}, "0 < low"), ({"center": "lesions"}, "did you mean 'lesion'")],
)
def test_mistakes_in_mining_are_named(options, said):
    with pytest.raises(SuiteError, match=said):
        PositiveMining(**options)


# the other parts of the augmentation


def test_one_channel_is_dropped():
    label = torch.zeros(1, 4, 4, 4, dtype=torch.int16)
    dropped = []
    for seed in range(30):
        torch.manual_seed(seed)
        image = RandomDroppedChannel(include=["image"])(sample(label))["image"].data
        empty = (image == 0).flatten(1).all(1)
        assert empty.sum() == 1
        dropped.append(int(empty.nonzero()))
    assert set(dropped) == {0, 1, 2, 3}


def test_one_axis_is_flipped_and_the_label_goes_along():
    label = torch.arange(60, dtype=torch.int16).reshape(1, 3, 4, 5)
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        subject = RandomFlipOfOneAxis()(sample(label))
        (axis,) = [a for a in (1, 2, 3) if torch.equal(subject["label"].data, label.flip(a))]
        assert torch.equal(subject["image"].data, sample(label)["image"].data.flip(axis))
        seen.add(axis)
    assert seen == {1, 2, 3}


def test_a_mean_teacher_of_this_network_learns_from_mined_samples(tmp_path):
    run(
        "benchmark=blobs", "model=mean_teacher", "model/network=cbam_unet", "~model.network.features", "~model.network.upsampling", "model.network.width=4", "model.network.reduction=1",
        "augmentation=positive_mining", "augmentation.mining.p=1", "debug=tiny", "threads=1", f"data.root={tmp_path / 'data'}", f"runs={tmp_path / 'runs'}",
    )  # fmt: skip
    (folder,) = run_folders(tmp_path / "runs")
    assert any("attention" in name for name in weights(folder))
    assert rows(folder)
