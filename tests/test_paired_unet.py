"""The paired-branch U-Net: its parameters, what each branch sees, and that branches stand for nothing but their modalities."""

import itertools

import pytest
import torch

from lesionbench.errors import SuiteError
from lightning_modules.networks import PairedUNet
from lightning_modules.networks.paired_unet import grouping

CHANNELS = ("t1", "t1ce", "t2", "flair")
OFF = {"encoder": False, "skips": False}


def plan(base: int) -> list[int]:
    """Widths of six levels in the proportions of the reference plan."""
    return [base * factor for factor in (1, 2, 4, 8, 10, 10)]


def built(channels=CHANNELS, outputs=4, **options) -> PairedUNet:
    torch.manual_seed(0)
    return PairedUNet(len(channels), outputs, channels=channels, **{"widths": [4, 6, 8], "dimensions": 2, **options})


def count(**options) -> int:
    with torch.device("meta"):
        network = PairedUNet(4, 4, channels=CHANNELS, **options)
    return sum(p.numel() for p in network.parameters())


def changed(network: PairedUNet, channel: str) -> list[bool]:
    """Which branches' last features change when one channel of the image does."""
    image = torch.randn(1, len(CHANNELS), 16, 16, generator=torch.Generator().manual_seed(1))
    other = image.clone()
    other[:, CHANNELS.index(channel)] += torch.randn(16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return [not torch.equal(a, b) for a, b in zip(network(image)["features"], network(other)["features"], strict=True)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 84_893_828),
        ({"deep_supervision": True}, 84_897_424),
        ({"fusion": "early"}, 31_195_908),
        ({"widths": plan(16)}, 21_230_148),
        ({"widths": plan(16), "fusion": "early"}, 7_802_756),
        ({"widths": plan(20)}, 33_167_924),
        ({"widths": plan(18)}, 26_867_524),
        ({"widths": [8, 16, 32, 64]}, 920_420),
        ({"widths": [8, 16, 32, 64], "fusion": "early"}, 351_780),
    ],
)
def test_parameters(options, expected):
    assert count(**options) == expected


def test_parameters_of_crossings_by_hand():
    # a crossing adds the other branch's features to the input of one 3x3 convolution: 9 * f_other * f_out weights in each branch
    widths = [4, 6, 8]
    late = sum(p.numel() for p in built(fusion="late").parameters())
    assert sum(p.numel() for p in built(cross=OFF).parameters()) == late
    encoder = 2 * 9 * (4 * 6 + 6 * 8)
    skips = 2 * 9 * (4 * 4 + 6 * 6)
    dense = 2 * 9 * sum(w * w for w in widths)
    for cross, more in [
        ({"encoder": True, "skips": False}, encoder),
        ({"encoder": False, "skips": True}, skips),
        ({}, encoder + skips),
        ({"granularity": "conv"}, encoder + skips + dense),
        ({"encoder": False, "granularity": "conv"}, skips),
    ]:
        assert sum(p.numel() for p in built(cross=cross).parameters()) == late + more, cross


@pytest.mark.parametrize("norm_order", ["conv_norm_act", "norm_act_conv"])
@pytest.mark.parametrize(
    ("cross", "meets"),
    [
        ({}, True),
        ({"encoder": False}, True),
        ({"skips": False}, True),
        ({"granularity": "conv"}, True),
        (OFF, False),
        ({**OFF, "granularity": "conv"}, False),
    ],
)
def test_branches_see_each_other_only_across(cross, meets, norm_order):
    network = built(cross=cross, norm_order=norm_order)
    assert changed(network, "t1") == [meets, True]
    assert changed(network, "flair") == [True, meets]


@pytest.mark.parametrize("fusion", ["paired", "late"])
def test_swapped_branches_give_the_same(fusion):
    network, swapped = built(fusion=fusion), built(fusion=fusion, pairs=[["t1ce", "t1"], ["flair", "t2"]])
    state = network.state_dict()

    def other(key: str) -> str:
        part, number, rest = (*key.split(".", 2), "")[:3]
        return f"{part}.{1 - int(number)}.{rest}" if part in ("encoders", "ups", "decoders") else key

    state = {other(k): v for k, v in state.items()}
    state["head.weight"] = torch.cat([state["head.weight"][:, 4:], state["head.weight"][:, :4]], dim=1)
    swapped.load_state_dict(state)
    image = torch.randn(2, 4, 16, 16)
    first, second = network(image), swapped(image)
    assert torch.allclose(first["logits"], second["logits"], atol=1e-6)
    assert torch.equal(first["features"][0], second["features"][1])


def test_own_features_come_first():
    network = built()
    with torch.no_grad():  # what the first branch reads of the other is cut off: it then is as without crossings
        for level in (1, 2):
            network.encoders[0][level][0][0].weight[:, network.encoders[0][level][0][0].weight.shape[1] // 2 :] = 0
        for level, width in enumerate([4, 6]):
            network.decoders[0][level][0][0].weight[:, 2 * width :] = 0
    assert changed(network, "t1") == [False, True]


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("fusion", ["paired", "late", "early"])
def test_shapes(fusion, dimensions):
    side = (64, 32, 32)[:dimensions]
    network = built(fusion=fusion, dimensions=dimensions, widths=[2, 2, 2, 2, 2, 2], deep_supervision=True)
    image = torch.randn(1, 4, *side)
    output = network(image)
    assert output["logits"].shape == (1, 4, *side)
    assert [f.shape for f in output["features"]] == [(1, 2, *side)] * (1 if fusion == "early" else 2)
    assert [d.shape for d in output["deep"]] == [(1, 4, *(s // 2**i for s in side)) for i in (1, 2, 3)]
    assert network.eval()(image).shape == (1, 4, *side)
    for branch in network.decoders:
        for decoder in branch:
            assert decoder[0][0].in_channels == (3 if fusion == "paired" else 2) * 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cross": {"granularity": "conv"}},
        {"norm_order": "norm_act_conv"},
        {"fusion": "late"},
        {"norm": "batch"},
        {"widths": [4, 4, 4, 4]},
    ],
)
def test_every_parameter_gets_a_gradient(options):
    network = built(deep_supervision=True, **options)
    output = network(torch.randn(2, 4, 16, 16))
    heads = [output["logits"], *output.get("deep", ())]
    sum(head.square().sum() for head in heads).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_small_patches_have_fewer_levels():
    widths = [2, 3, 4, 5, 6, 7]
    for size, levels in [(128, 6), (64, 6), (32, 5), (24, 4), ((16, 64), 4), (None, 6)]:
        network = built(widths=widths, image_size=size)
        assert [len(branch) for branch in network.encoders] == [levels, levels]
        assert network.divisor == (2 ** (levels - 1),) * 2
    assert built(widths=widths, image_size=32)(torch.randn(1, 4, 32, 32))["logits"].shape == (1, 4, 32, 32)


def test_any_grouping_by_name():
    image = torch.randn(1, 4, 16, 16)
    three = built(pairs=[["flair", "t2"], ["t1"], ["t1ce", "t1"]])
    assert [sum(p.numel() for p in e[0][0][0].parameters()) for e in three.encoders] == [9 * n * 4 + 4 for n in (2, 1, 2)]
    assert len(three(image)["features"]) == 3
    assert changed(built(pairs=[["t1"], ["t1ce", "t2"], ["flair"]], cross=OFF), "t2") == [False, True, False]
    # order of the channels in the image does not matter, names do
    network = built()
    flipped = built(channels=CHANNELS[::-1])
    flipped.load_state_dict(network.state_dict())
    assert torch.equal(network(image)["logits"], flipped(image.flip(1))["logits"])


def test_narrowed_tasks_keep_the_grouping():
    pairs = [["flair", "t2"], ["t1ce", "t1"]]
    assert grouping(CHANNELS, pairs) == pairs
    assert grouping(["t1", "flair", "t2"], pairs) == [["flair", "t2"], ["t1"]]
    assert grouping(["t1"], pairs) == [["t1"]]
    for size in (1, 2, 3):
        for channels in itertools.combinations(CHANNELS, size):
            assert built(channels=channels)(torch.randn(1, size, 16, 16))["logits"].shape == (1, 4, 16, 16)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pairs": [["flair", "t2"], ["t1ce"]]}, "no branch for channel t1"),
        ({"pairs": [["flair", "t2"], ["t1ce", "T1"]]}, "no branch for channel t1"),
        ({"fusion": "later"}, "network.fusion"),
        ({"norm": "layer"}, "network.norm"),
        ({"norm_order": "act_conv"}, "network.norm_order"),
        ({"cross": {"granularity": "layer"}}, "network.cross.granularity"),
        ({"cross": {"decoder": True}}, "decoder"),
        ({"norm": "group"}, "multiples of 8"),
        ({"widths": [4]}, "two levels"),
        ({"dimensions": 4}, "2 or 3"),
    ],
)
def test_wrong_options_are_refused(options, says):
    with pytest.raises(SuiteError, match=says):
        built(**options)
