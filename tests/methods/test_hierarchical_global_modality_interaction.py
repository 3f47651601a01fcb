"""Interaction between modalities: co-attention by hand, who depends on whom, tokens of the transformer, parameters, and what reaches a far marker."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from torch import nn

from datamodules.readers.brats_files import CHANNELS
from lesionbench.errors import SuiteError
from lightning_modules.networks import ModalityInteractionUNet
from lightning_modules.networks.modality_interaction import CoAttention, GlobalInteraction, HierarchicalInteraction
from tests.harness import composed, run, run_folders

NAMES = ("t1", "t1c", "t2", "flair")
WIDTHS = (32, 64, 128, 256, 320)
small = partial(ModalityInteractionUNet, image_size=16, features=(8, 16, 32), layers=1, heads=2, mlp_size=16, dropout=0.0)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


# co-attention of pairs


def test_parameters_of_the_interaction_at_the_five_levels():
    with torch.device("meta"):
        blocks = [parameters(HierarchicalInteraction(width)) for width in WIDTHS]
        network = ModalityInteractionUNet(4, 3, image_size=(160, 192, 108))
    assert blocks == [7_284, 28_900, 115_140, 459_652, 717_924]
    assert parameters(network.interactions) == sum(blocks) == 1_328_900
    assert parameters(network.transformer) == 6 * 77_600 + 268_800 + 80 * 81
    assert parameters(network) == 21_143_287


def test_co_attention_by_hand():
    """Two channels, two voxels: both gates from the partner, their sum on the enhanced, ReLU at the end."""
    module = CoAttention(2, dimensions=2)
    for p in module.parameters():
        nn.init.zeros_(p)
    nn.init.dirac_(module.out.weight)
    a, b = torch.tensor([[[[1.0, -2.0]], [[3.0, 4.0]]]]), torch.tensor([[[[1.0, 3.0]], [[0.0, -2.0]]]])
    torch.testing.assert_close(module(a, b), F.relu(a))  # gates of 1/2 and 1/2
    module.by_channel[0].weight.data = torch.tensor([[1.0, 1.0]])  # the means of b are 2 and -1
    module.by_channel[2].weight.data = torch.tensor([[1.0], [2.0]])
    module.by_voxel.weight.data = torch.tensor([1.0, 1.0]).reshape(1, 2, 1, 1)
    channels, voxels = torch.tensor([1.0, 2.0]).sigmoid(), torch.tensor([1.0, 1.0]).sigmoid()
    expected = (channels.reshape(1, 2, 1, 1) + voxels.reshape(1, 1, 1, 2)) * a
    torch.testing.assert_close(module(a, b), F.relu(expected))
    module.by_channel[0].weight.data.neg_()  # ReLU closes what lies between the two layers: gates of 1/2 for channels
    torch.testing.assert_close(module(a, b), F.relu((0.5 + voxels.reshape(1, 1, 1, 2)) * a))


def test_interaction_with_gates_of_one_half_passes_on_what_is_positive():
    block = HierarchicalInteraction(16, dimensions=2)
    for p in block.parameters():
        nn.init.zeros_(p)
    for module in (block.t1, block.t1c, block.t2, block.flair):
        nn.init.dirac_(module.out.weight)
    x = torch.randn(2, 16, 5, 4)
    torch.testing.assert_close(block(x), F.relu(x))


def dependencies(function, modalities: torch.Tensor) -> list[set[str]]:
    """Of which modalities (quarters of the channels of the input) every quarter of the output depends, by autograd."""
    x = modalities.clone().requires_grad_()
    found = []
    for quarter in function(x).chunk(4, dim=1):
        (gradient,) = torch.autograd.grad(quarter.sum(), x, retain_graph=True, allow_unused=True)
        found.append({name for name, part in zip(NAMES, gradient.chunk(4, dim=1), strict=True) if part.abs().sum() > 0})
    return found


@pytest.mark.parametrize("raw", [False, True])
def test_who_depends_on_whom(raw):
    torch.manual_seed(0)
    block = HierarchicalInteraction(32, dimensions=2, raw=raw)
    t1, t1c, t2, flair = dependencies(block, torch.randn(1, 32, 6, 6))
    assert t1 == t2 == {"t1", "t2"}
    assert flair == ({"flair", "t2"} if raw else {"flair", "t2", "t1"})
    assert t1c == ({"t1c", "t1"} if raw else {"t1c", "t1", "t2"})


def test_t2_is_weighed_by_the_raw_t1_and_t1c_by_the_enhanced_one():
    torch.manual_seed(0)
    block = HierarchicalInteraction(32, dimensions=2)
    outputs = dict(zip(NAMES, block(torch.randn(1, 32, 6, 6)).chunk(4, dim=1), strict=True))

    def reaches(output: str, module: str) -> bool:
        found = torch.autograd.grad(outputs[output].sum(), list(getattr(block, module).parameters()), retain_graph=True, allow_unused=True)
        return any(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in found)

    assert {(o, m) for o in NAMES for m in NAMES if reaches(o, m)} == {*((n, n) for n in NAMES), ("t1c", "t1"), ("flair", "t2")}


# the transformer


def bare(scope: str = "all", layers: int = 0) -> GlobalInteraction:
    """Without position, and with a projection that changes nothing."""
    torch.manual_seed(0)
    block = GlobalInteraction(16, (3, 2), layers=layers, heads=2, mlp_size=8, dropout=0.0, scope=scope)
    nn.init.zeros_(block.position)
    nn.init.eye_(block.project.weight)
    nn.init.zeros_(block.project.bias)
    return block


@pytest.mark.parametrize("scope", ["all", "modality", "position"])
def test_tokens_come_back_to_their_places(scope):
    x = torch.randn(2, 16, 3, 2)
    torch.testing.assert_close(bare(scope)(x), x)


def test_every_modality_has_its_positions_which_are_not_projected():
    block, x = bare(), torch.randn(2, 16, 3, 2)
    nn.init.normal_(block.position)
    block.project.weight.data.mul_(2)
    torch.testing.assert_close(block(x), 2 * x + block.position.reshape(1, 16, 3, 2))


def test_residuals_go_around_the_normalization():
    block, x = bare(layers=2), torch.randn(2, 16, 3, 2)
    for layer in block.layers:
        for p in (*layer.out.parameters(), *layer.mlp[3].parameters()):
            nn.init.zeros_(p)
    torch.testing.assert_close(block(x), x)


def test_permuted_tokens_give_permuted_results():
    """Without position embedding all 4 N tokens are alike: places and modalities may change."""
    block, x = bare(layers=2), torch.randn(1, 16, 3, 2)
    tokens = x.reshape(1, 4, 4, 6).transpose(2, 3).reshape(1, 24, 4)  # (B, 4 N, C / 4)
    order = torch.randperm(24)

    def as_map(t: torch.Tensor) -> torch.Tensor:
        return t.reshape(1, 4, 6, 4).transpose(2, 3).reshape(1, 16, 3, 2)

    torch.testing.assert_close(as_map(tokens), x)
    answer = block(x).reshape(1, 4, 4, 6).transpose(2, 3).reshape(1, 24, 4)
    torch.testing.assert_close(block(as_map(tokens[:, order])), as_map(answer[:, order]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("scope", "places", "names"), [("all", 6, 4), ("modality", 6, 1), ("position", 1, 4)])
def test_what_a_token_attends_to(scope, places, names):
    torch.manual_seed(0)
    block = GlobalInteraction(16, (3, 2), layers=1, heads=2, mlp_size=8, dropout=0.0, scope=scope)
    x = torch.randn(1, 16, 3, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(block(x)[0, 5, 1, 1].sum(), x)  # the second modality at one place
    seen = gradient[0].reshape(4, 4, 6).abs().sum(dim=1) > 0  # modality, place
    assert (int(seen.any(dim=0).sum()), int(seen.any(dim=1).sum())) == (places, names)
    assert seen[1, 3]


def test_scopes_have_as_many_parameters():
    counts = {scope: parameters(small(1, 3, dimensions=2, scope=scope)) for scope in ("all", "modality", "position", "none")}
    assert counts["all"] == counts["modality"] == counts["position"] > counts["none"]


# the network


def modalities_of(network: nn.Module) -> list[set[str]]:
    """Of which image channels the lowest level's quarters depend after its interaction."""

    def lowest(image: torch.Tensor) -> torch.Tensor:
        for block in network.encoder:
            image = block(image)
        return network.interactions[-1](image)

    return dependencies(lowest, torch.randn(1, 4, 16, 16))


def test_with_groups_the_interaction_is_all_that_mixes_modalities():
    torch.manual_seed(0)
    alone = [{name} for name in NAMES]
    pairs = [{"t1", "t2"}, {"t1c", "t1", "t2"}, {"t1", "t2"}, {"flair", "t2", "t1"}]
    assert modalities_of(small(4, 3, dimensions=2, encoder_groups=4, interaction="none")) == alone
    assert modalities_of(small(4, 3, dimensions=2, encoder_groups=4)) == pairs
    assert modalities_of(small(4, 3, dimensions=2, interaction="none")) == [{*NAMES}] * 4


def test_what_meets_where():
    """The encoder goes on from its own features; the decoder starts from the transformer's and joins interactions and global features."""
    torch.manual_seed(0)
    network = small(4, 3, dimensions=2).eval()
    came, went = {}, {}
    for name, module in network.named_modules():
        module.register_forward_pre_hook(lambda _, x, name=name: came.update({name: x[0]}))
        module.register_forward_hook(lambda _, x, y, name=name: went.update({name: y}))
    network(torch.randn(1, 4, 32, 16))
    assert [torch.equal(came[f"encoder.{i + 1}"], went[f"encoder.{i}"]) for i in (0, 1)] == [True, True]
    assert torch.equal(came["transformer"], went["interactions.2"])
    assert torch.equal(came["ups.0"], went["transformer"])
    assert torch.equal(came["ups.1"], went["decoder.0"])
    for level in (0, 1):
        up, skip, everywhere = came[f"decoder.{level}"].chunk(3, dim=1)
        assert torch.equal(up, went[f"ups.{level}"])
        assert torch.equal(skip, went[f"interactions.{1 - level}"])
        assert torch.equal(came[f"reduce.{level}"], went["transformer"])
        torch.testing.assert_close(everywhere, F.interpolate(went[f"reduce.{level}"], skip.shape[2:], mode="bilinear", align_corners=False))


def test_with_the_transformer_every_output_depends_on_every_voxel_of_every_modality():
    torch.manual_seed(0)
    network = small(4, 3, dimensions=2, encoder_groups=4, interaction="none", norm="batch").eval()
    image = torch.randn(1, 4, 64, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(image)[0, :, 0, 0].sum(), image)
    assert (gradient != 0).float().mean() > 0.99  # but where ReLUs are closed


@pytest.mark.parametrize(("dimensions", "size"), [(2, (20, 9)), (3, (8, 9, 16))])
@pytest.mark.parametrize("scope", ["all", "none"])
@pytest.mark.parametrize("interaction", ["hierarchical", "raw", "none"])
def test_any_size_and_gradients_everywhere(dimensions, size, scope, interaction):
    torch.manual_seed(0)
    network = small(2, 3, dimensions=dimensions, features=(32, 32, 64), scope=scope, interaction=interaction)
    out = network(torch.randn(2, 2, *size))
    assert out.shape == (2, 3, *size)
    (out * torch.randn_like(out)).sum().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.dim() < 2 or (p.grad != 0).any(), name


def test_sides_are_padded_with_zeros_at_the_far_end():
    torch.manual_seed(0)
    network = small(1, 2, dimensions=2).eval()
    image = torch.randn(1, 1, 10, 16)
    torch.testing.assert_close(network(image), network(F.pad(image, (0, 0, 0, 2)))[:, :, :10])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interaction": "hierarchic"}, r"network\.interaction 'hierarchic'; did you mean 'hierarchical'"),
        ({"scope": "global"}, r"network\.scope 'global'"),
        ({"norm": "group"}, r"network\.norm 'group'"),
        ({"features": (8, 12)}, r"network\.features=\[8, 12\]: expected two or more multiples of 8"),
        ({"features": (8,)}, r"network\.features=\[8\]"),
        ({"heads": 3}, r"network\.heads=3 does not divide 8"),
        ({"encoder_groups": 2}, r"network\.encoder_groups=2"),
        ({"encoder_groups": 4}, r"network\.encoder_groups=4: expected 1, or 4 with four channels; there are 1"),
    ],
)
def test_what_cannot_be_is_named(options, message):
    with pytest.raises(SuiteError, match=message):
        small(1, 3, **options)


# what its paper trains it with


def test_the_preset_of_the_paper(tmp_path):
    assert CHANNELS == ("t1", "t1ce", "t2", "flair")  # of the network's quarters
    cfg = composed("experiment=hierarchical_global_modality_interaction/brats2021", f"run_folder={tmp_path}")
    optimizer = instantiate(cfg.model.optimizer)([nn.Parameter(torch.zeros(1))])
    per_epoch = cfg.data.samples_per_epoch
    factor = instantiate(cfg.model.scheduler)(optimizer, total_iterations=cfg.epochs * per_epoch).lr_lambdas[0]
    rates = [cfg.model.optimizer.lr * factor(per_epoch * epoch) for epoch in (0, 500, 999)]
    assert rates == pytest.approx([1e-3, 1e-3 * 0.5**0.9, 1e-3 * 0.001**0.9])
    assert rates[1] == pytest.approx(5.359e-4, rel=1e-3)
    assert type(optimizer) is torch.optim.Adam
    with torch.device("meta"):
        network = instantiate(cfg.model.network)(4, 3)
        assert network(torch.zeros(1, 4, *cfg.patch)).shape == (1, 3, 160, 192, 108)
    assert network.transformer.position.shape == (4, 80, 10, 12, 7)


# the far marker

TOY = ["experiment=hierarchical_global_modality_interaction/context_toy", "threads=1", "callbacks.progress=null"]


@pytest.mark.parametrize(("scope", "expected"), [("all", True), ("position", False), ("none", False)])
def test_in_the_toy_only_the_transformer_reaches_the_marker(scope, expected, tmp_path):
    """A lesion ends in column 18 at most, or begins in column 45 at least, and its marker lies on the other side from column 47 on, or up to 16."""
    cfg = composed(*TOY, "model.network.interaction=none", f"model.network.scope={scope}", f"run_folder={tmp_path}")
    network = instantiate(cfg.model.network)(1, 3).eval()
    torch.manual_seed(0)
    for lesion, marker in ((18, slice(47, 64)), (45, slice(0, 17))):
        image = torch.randn(1, 1, 64, 64, requires_grad=True)
        (gradient,) = torch.autograd.grad(network(image)[0, :, 30, lesion].sum(), image)
        assert gradient[0, 0, 30, lesion] != 0
        assert bool((gradient[0, 0, :, marker] != 0).any()) == expected


@pytest.mark.slow
def test_the_transformer_tells_classes_by_a_marker_across(tmp_path):
    found = {}
    for scope in ("all", "position"):
        for seed in (3, 4, 5):
            folder = tmp_path / f"{scope}-{seed}"
            run(
                *TOY,
                "model.network.interaction=none",
                f"model.network.scope={scope}",
                f"seed={seed}",
                f"runs={folder}",
                f"data.root={tmp_path / 'data'}",
            )
            dice = json.loads((run_folders(folder)[0] / "test" / "dataset.json").read_text())[""]
            found[scope, seed] = (dice["A"]["dice"] + dice["B"]["dice"]) / 2
    assert min(found["all", seed] for seed in (3, 4, 5)) > 0.9, found
    assert max(found["position", seed] for seed in (3, 4, 5)) < 0.65, found
