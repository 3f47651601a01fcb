"""The MAAB U-Net: what a block sees and adds up, its gates and pyramid, the weighted Dice, its augmentation and windows."""

from functools import partial

import pytest
import torch
import torchio
from hydra.utils import instantiate
from torch import nn

from benchmarks.maab_effects import DILATIONS, cue_accuracy, cue_network
from datamodules.transforms.axes import RandomAxisPermutation
from datamodules.transforms.intensity import RandomChannelNoise
from lesionbench.errors import SuiteError
from lightning_modules.inferers import Window
from lightning_modules.losses import RegionDice
from lightning_modules.networks import MAABUNet
from lightning_modules.networks.maab import MAAB, SkipGate
from tests.harness import composed, rows, run, run_folders

LEVELS = {1: (1,), 2: (1, 2), 3: (1, 2, 4), 4: (1, 2, 4, 8)}
tiny = partial(MAABUNet, features=(4, 4, 8))


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def gradients(network: nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of the mean square of the logits."""
    network.zero_grad()
    network(image).square().mean().backward()
    return {name: p.grad for name, p in network.named_parameters()}


# sizes


def test_parameters_of_the_paper_s_network_and_blocks():
    with torch.device("meta"):
        assert parameters(MAABUNet(4, 3)) == 1_427_509
        assert parameters(MAABUNet(4, 3, dilations=(1, 1, 1, 1))) == 1_427_509
        assert [parameters(MAAB(16, 16, LEVELS[level])) for level in (1, 2, 3, 4)] == [7_425, 14_385, 21_345, 28_305]
        parts = MAABUNet(4, 3), MAABUNet(4, 3, gates=False), MAABUNet(4, 3, pyramid=False)
    gates = parameters(parts[0].gate2) + parameters(parts[0].gate3)
    assert parameters(parts[0]) - parameters(parts[1]) == gates == 13_042
    laterals = parameters(parts[0].lateral3) + parameters(parts[0].lateral_bottom)
    assert parameters(parts[0]) - parameters(parts[2]) == laterals + 96 * (64 * 27 + 2)


# the block


def linear(block: MAAB) -> MAAB:
    """The block with its convolutions alone, all of them positive."""
    for unit in block.convolutions:
        unit[0], unit[1] = nn.Identity(), nn.Identity()
        nn.init.constant_(unit[2].weight, 0.1)
    block.attention = None
    return block


@pytest.mark.parametrize(("level", "width"), [(1, 3), (2, 7), (3, 15), (4, 31)])
def test_receptive_field(level, width):
    image = torch.rand(1, 1, 33, 33, 33, requires_grad=True)
    linear(MAAB(1, 2, LEVELS[level]))(image)[0, 0, 16, 16, 16].backward()
    seen = image.grad[0, 0].nonzero()
    half = width // 2
    assert seen.min() == 16 - half
    assert seen.max() == 16 + half
    assert len(seen) == width**3  # nothing is left out on the way


@pytest.mark.parametrize(("combine", "expected"), [("sum", 1 + 2 + 4 + 8), ("first_and_last", 1 + 8), ("last", 8)])
def test_what_a_block_adds_up(combine, expected):
    """Four 1-to-1 convolutions that pass on their center: the first as it is, each further one doubled."""
    block = linear(MAAB(1, 1, LEVELS[4], combine=combine))
    for number, unit in enumerate(block.convolutions):
        nn.init.zeros_(unit[2].weight)
        nn.init.zeros_(unit[2].bias)
        unit[2].weight.data[0, 0, 1, 1, 1] = 2.0 if number else 1.0
    assert block(torch.ones(1, 1, 4, 4, 4)).unique().tolist() == [expected]


def test_a_block_of_one_level_is_its_convolution_whatever_is_combined():
    blocks = [MAAB(2, 3, (1,), combine=combine) for combine in ("sum", "first_and_last", "last")]
    x = torch.randn(1, 2, 5, 5, 5)
    for block in blocks[1:]:
        block.load_state_dict(blocks[0].state_dict())
        assert torch.equal(block(x), blocks[0](x))


def test_attention_of_a_block_is_one_map_for_all_channels():
    torch.manual_seed(0)
    block = MAAB(2, 4, LEVELS[2])
    x = torch.randn(1, 2, 6, 6, 6)
    weighted, attention = block(x), block.attention
    block.attention = None
    ratio = weighted / block(x)
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), atol=1e-4)
    assert 0 < ratio.min() < ratio.max() < 1
    block.attention = attention
    nn.init.zeros_(attention[2].weight)
    nn.init.zeros_(attention[2].bias)
    half = block(x)
    block.attention = None
    assert torch.allclose(half, block(x) / 2)


# gates and pyramid


def test_gate():
    torch.manual_seed(0)
    gate = SkipGate(6, 4)
    gating, skip = torch.randn(2, 6, 3, 3, 3, requires_grad=True), torch.randn(2, 4, 6, 6, 6, requires_grad=True)
    out = gate(gating, skip)
    ratio = (out / skip).detach()
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), atol=1e-4)
    assert 0 < ratio.min() < ratio.max() < 1
    out.square().sum().backward()
    assert gating.grad.abs().min() > 0
    assert skip.grad.abs().min() > 0
    nn.init.zeros_(gate.attention[2].weight)
    nn.init.zeros_(gate.attention[2].bias)
    assert torch.allclose(gate(gating, skip), skip / 2)


@pytest.mark.parametrize("pyramid", [True, False])
def test_the_pyramid_gives_the_coarse_features_a_short_way(pyramid):
    """With nothing that goes up step by step, the loss reaches the bottom through the pyramid alone."""
    torch.manual_seed(0)
    network = tiny(2, 3, dimensions=2, pyramid=pyramid)
    for part in (network.up2, network.up3, network.gate2.gating, network.gate3.gating):
        nn.init.zeros_(part.weight)
    found = gradients(network, torch.randn(1, 2, 16, 16))
    bottom = [g.abs().max() for name, g in found.items() if name.startswith("bottom.") and g.dim() > 1]
    assert all(g > 0 for g in bottom) if pyramid else all(g == 0 for g in bottom)


@pytest.mark.parametrize(("deeper", "block"), [("encoder4", "encoder3"), ("encoder3", "encoder2")])
def test_the_loss_reaches_the_encoder_through_skip_connections(deeper, block):
    """With nothing that goes deeper."""
    torch.manual_seed(0)
    network = tiny(2, 3, dimensions=2, dropout=0.0)
    for name, parameter in getattr(network, deeper).named_parameters():
        if name.endswith("weight") and parameter.dim() > 1:
            nn.init.zeros_(parameter)
    found = gradients(network, torch.randn(1, 2, 16, 16))
    assert all((g != 0).any() for name, g in found.items() if name.startswith(f"{block}.convolutions") and g.dim() > 1)


@pytest.mark.parametrize(
    "option", [{"gates": False}, {"pyramid": False}, {"attention": False}, {"combine": "last"}, {"dilations": (1, 1, 1, 1)}]
)
def test_options_change_what_is_computed_and_every_part_learns(option):
    torch.manual_seed(0)
    image, network = torch.randn(1, 2, 16, 16), tiny(2, 3, dimensions=2, dropout=0.0)
    other = tiny(2, 3, dimensions=2, dropout=0.0, **option)
    same = {k: v for k, v in network.state_dict().items() if k in other.state_dict() and v.shape == other.state_dict()[k].shape}
    other.load_state_dict(same, strict=False)
    assert not torch.allclose(other(image), network(image))
    assert all((g != 0).any() for g in gradients(other, image).values() if g.dim() > 1)
    assert {path for paths in other.parts.values() for path in paths} == {n for n, c in other.named_children() if [*c.parameters()]}


def test_dropout_is_of_the_image_and_in_training_alone():
    torch.manual_seed(0)
    network, image = tiny(2, 3, dimensions=2), torch.randn(1, 2, 16, 16)
    seen = []
    network.encoder1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network(image)
    network.eval()(image)
    assert torch.equal(seen[1], image)
    kept = seen[0] != 0
    assert kept.float().mean() == pytest.approx(0.8, abs=0.05)
    assert torch.allclose(seen[0][kept], image[kept] / 0.8)


def test_what_cannot_be_built_is_named():
    with pytest.raises(SuiteError, match="did you mean 'last'"):
        MAABUNet(4, 3, combine="lats")
    with pytest.raises(SuiteError, match=r"features=\[16, 32\].*3 numbers"):
        MAABUNet(4, 3, features=(16, 32))
    with pytest.raises(SuiteError, match=r"dilations=\[1, 2, 4, 0\].*at least 1"):
        MAABUNet(4, 3, dilations=(1, 2, 4, 0))


# the loss


def log_odds(p: list[float]) -> torch.Tensor:
    values = torch.tensor(p)
    return values.log() - (1 - values).log()


def dice_losses() -> tuple[torch.Tensor, torch.Tensor]:
    """Three regions of four voxels whose losses are 0.2, 0 (empty and not predicted) and 0.99998 (empty, 0.5 predicted)."""
    logits = torch.stack([log_odds([0.8, 0.6, 0.1, 0.0]), log_odds([0.0] * 4), log_odds([0.5, 0.0, 0.0, 0.0])])
    truth = torch.zeros(3, 4)
    truth[0, :2] = 1
    return logits[None], truth[None]


def test_weighted_dice_by_hand():
    logits, truth = dice_losses()
    for region, loss in enumerate((0.2, 0.0, 0.99998)):
        alone = [0.0] * 3
        alone[region] = 1.0
        assert RegionDice(weights=alone)(logits, truth).item() == pytest.approx(loss, abs=1e-5)
    paper = RegionDice(weights=[0.33, 0.33, 0.34])(logits, truth)
    assert paper.item() == pytest.approx(0.33 * 0.2 + 0.34 * 0.99998, abs=1e-5)
    assert RegionDice(weights=[33, 33, 34])(logits, truth).item() == pytest.approx(paper.item())
    assert RegionDice(weights=[2, 2, 2])(logits, truth).item() == pytest.approx(RegionDice()(logits, truth).item())


def test_weights_hold_for_the_batch_and_leave_out_what_is_unknown():
    torch.manual_seed(0)
    logits, truth = torch.randn(2, 2, 20), (torch.rand(2, 2, 20) > 0.5).float()
    pooled = RegionDice(batch=True, weights=[0, 1])(logits, truth)
    assert pooled.item() == pytest.approx(RegionDice(batch=True)(logits[:, 1:], truth[:, 1:]).item())
    truth[0] = -1  # nothing of the first sample is labeled
    assert RegionDice(weights=[0.3, 0.7])(logits, truth).item() == pytest.approx(
        RegionDice(weights=[0.3, 0.7])(logits[1:], truth[1:]).item()
    )


def test_wrong_weights_are_named():
    logits, truth = dice_losses()
    with pytest.raises(SuiteError, match="2 numbers, but the task has 3 regions"):
        RegionDice(weights=[1, 1])(logits, truth)
    for weights in ([0, 0, 0], [1, -1, 1]):
        with pytest.raises(SuiteError, match="at least 0, not all 0"):
            RegionDice(weights=weights)


# augmentation


def subject(*shape: int) -> torchio.Subject:
    torch.manual_seed(0)
    image = torch.rand(2, *shape)
    return torchio.Subject(image=torchio.ScalarImage(tensor=image), label=torchio.LabelMap(tensor=(image[:1] > 0.5).short()))


@pytest.mark.parametrize(("shape", "orders"), [((4, 4, 4), 6), ((4, 4, 5), 2), ((3, 4, 5), 1)])
def test_axes_are_permuted_where_the_shape_stays(shape, orders):
    before, transform = subject(*shape), RandomAxisPermutation()
    image = before.image.data
    candidates = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    seen = []
    for _ in range(300):
        after = transform(before)
        assert tuple(after.spatial_shape) == shape
        found = [o for o in candidates if image.permute(0, *(1 + a for a in o)).shape == image.shape]
        (order,) = [o for o in found if torch.equal(after.image.data, image.permute(0, *(1 + a for a in o)))]
        assert torch.equal(after.label.data, before.label.data.permute(0, *(1 + a for a in order)))
        seen.append(order)
    counts = [seen.count(o) for o in set(seen)]
    assert len(counts) == orders
    assert min(counts) > 0.7 * 300 / orders


def test_one_channel_becomes_noise():
    before, transform = subject(12, 12, 12), RandomChannelNoise()
    drawn = set()
    for _ in range(20):
        after = transform(before)
        (changed,) = [c for c in range(2) if not torch.equal(after.image.data[c], before.image.data[c])]
        drawn.add(changed)
        assert after.image.data[changed].mean().abs() < 0.1
        assert after.image.data[changed].std() == pytest.approx(1, abs=0.1)
        assert torch.equal(after.label.data, before.label.data)
    assert drawn == {0, 1}


def test_the_chain_of_the_paper():
    chain = instantiate(composed("experiment=maab_unet/brats2021").augmentation)
    kinds = [type(t).__name__ for t in chain.transforms.transforms]
    assert kinds == ["RandomAxisPermutation", "RandomFlip", "RandomChannelNoise"]
    assert chain.transforms.transforms[2].include == ["image"]
    assert [t.probability for t in chain.transforms.transforms] == [1, 1, 0.1]


# windows


def starts(length: int, window: Window) -> list[int]:
    seen = []
    line = torch.arange(float(length)).reshape(1, 1, length, 1, 1)
    window(line, lambda view: seen.append(int(view[0, 0, 0, 0, 0])) or {"x": view})
    return seen


def test_windows_lie_where_the_paper_puts_them():
    window = Window((72, 1, 1), 8 / 72, "constant", starts="clamped")
    assert starts(240, window) == [0, 64, 128, 168]
    assert starts(155, window) == [0, 64, 83]
    assert starts(72, window) == [0]
    assert starts(240, Window((72, 1, 1), 8 / 72, "constant")) == [0, 56, 112, 168]
    with pytest.raises(SuiteError, match="starts=left"):
        Window((72, 1, 1), starts="left")


def test_48_windows_cover_a_case_and_their_mean_is_exact():
    seen = []
    window = instantiate(composed("experiment=maab_unet/brats2021").model.inferer)
    image = torch.zeros(1, 1, 240, 240, 155)
    out = window(image, lambda view: seen.append(view.shape) or {"x": view + 0.25})["x"]
    assert seen == [(1, 1, 72, 72, 72)] * 48
    assert torch.equal(out, torch.full_like(out, 0.25))


# as a part of the suite


def test_the_effect_of_dilations():
    assert parameters(cue_network((1, 2, 4, 8))) == parameters(cue_network((1, 1, 1, 1))) == 5_724
    accuracy = {name: cue_accuracy(dilations, seed=10, steps=120) for name, dilations in DILATIONS.items()}
    assert accuracy["1, 2, 4, 8"] > 0.9
    assert accuracy["1, 1, 1, 1"] < 0.55


def test_another_method_takes_the_network(tmp_path):
    network = [
        "~model.network",
        "+model.network={_target_:lightning_modules.networks.MAABUNet,_partial_:true,dimensions:2,features:[8,8,8]}",
    ]
    run("benchmark=blobs", "model=mean_teacher", *network, "debug=tiny", "trainer=cpu", f"data.root={tmp_path / 'blobs'}", f"runs={tmp_path / 'runs'}", "threads=1")  # fmt: skip
    (folder,) = run_folders(tmp_path / "runs")
    assert rows(folder)
