"""Swin-Unet and TransBTS: parameter counts, shapes of any size, who attends to whom, and Swin blocks against MONAI's."""

from functools import partial

import pytest
import torch
from torch import nn

from lesionbench.errors import SuiteError
from lightning_modules.networks import SlabChannels, swin_unet, transbts
from lightning_modules.networks.swin import PatchExpanding, PatchMerging, SwinBlock, from_windows, to_windows

small_swin = partial(swin_unet, features=12, heads=(1, 2, 3, 4), attention_window=3)
small_transbts = partial(transbts, image_size=16, features=8, hidden_size=16, mlp_size=32, heads=2)


def count(factory, in_channels=4, out_channels=4, **options):
    with torch.device("meta"):
        network = factory(in_channels, out_channels, **options)
    assert all(b.device.type == "meta" for b in network.buffers())
    return sum(p.numel() for p in network.parameters())


# sizes


def test_swin_unet_parameter_count_by_hand():
    def block(c, heads):
        return 2 * 2 * c + (c * 3 * c + 3 * c) + (c * c + c) + heads * 13**2 + (c * 4 * c + 4 * c) + (4 * c * c + c)

    c = 96
    encoder = sum(2 * block(c * 2**i, h) for i, h in enumerate((3, 6, 12, 24)))
    merges = sum(2 * 4 * w + 4 * w * 2 * w for w in (c, 2 * c, 4 * c))
    decoder = sum(2 * block(c * 2**i, h) + (2 * w * 4 * w + 2 * w) + (2 * w * w + w) for i, h, w in ((2, 12, 384), (1, 6, 192), (0, 3, 96)))
    edges = (3 * 16 * c + c + 2 * c) + 2 * 8 * c + 2 * c + (c * 16 * c + 2 * c) + 9 * c
    assert count(swin_unet, 3, 9) == encoder + merges + decoder + edges == 27_168_900


def test_published_parameter_counts():
    """Wang et al. and Zhao et al. (Table VII, 96^3 patches) both count one 512 x 512 linear layer more than TransBTS is described with."""
    more = 512 * 512 + 512
    assert count(transbts, image_size=96) == 31_512_516
    assert (count(transbts, image_size=96) + more) // 1000 == 31_775
    assert round((count(transbts, image_size=128) + more) / 1e6, 2) == 32.99
    narrow = count(swin_unet, features=48, decoder_depths=(1, 2, 2))
    assert narrow == 6_380_088
    assert narrow / 6.303e6 == pytest.approx(1, abs=0.013)


@pytest.mark.parametrize(
    ("factory", "size"), [(small_swin, (50, 70)), (small_swin, (4, 4)), (small_transbts, (17, 9, 24)), (small_transbts, (8, 8, 8))]
)
def test_any_size_and_gradients_everywhere(factory, size):
    torch.manual_seed(0)
    network = factory(2, 3)
    out = network(torch.randn(2, 2, *size))
    assert out.shape == (2, 3, *size)
    (out * torch.randn_like(out)).sum().backward()
    for name, value in network.named_parameters():
        assert value.grad is not None, name
        assert value.grad.isfinite().all(), name


@pytest.mark.parametrize(("factory", "size"), [(small_swin, (64, 96)), (small_transbts, (16, 16, 16))])
def test_every_weight_matters(factory, size):
    torch.manual_seed(0)
    network = factory(2, 3)
    if hasattr(network, "position"):
        nn.init.normal_(network.position)
    out = network(torch.randn(1, 2, *size))
    (out * torch.randn_like(out)).sum().backward()
    assert [n for n, p in network.named_parameters() if p.dim() > 1 and not (p.grad != 0).any()] == []


@pytest.mark.parametrize(("factory", "size", "by"), [(small_swin, (40, 50), 32), (small_transbts, (12, 10, 9), 8)])
def test_other_sizes_are_padded_with_zeros_at_the_far_end(factory, size, by):
    torch.manual_seed(0)
    network = factory(2, 3).eval()
    image = torch.randn(1, 2, *size)
    whole = torch.zeros(1, 2, *(s + -s % by for s in size))
    inside = (..., *(slice(0, s) for s in size))
    whole[inside] = image
    torch.testing.assert_close(network(image), network(whole)[inside])


def test_input_contract():
    for network, dimensions in ((small_swin(1, 2), 2), (small_transbts(1, 2), 3)):
        assert (network.dimensions, network.divisor, network.slab, network.fixed_size) == (dimensions, (1,) * dimensions, None, None)


def test_wrong_settings_are_named():
    with pytest.raises(SuiteError, match="dimensions=3: swin_unet is a 2D network"):
        swin_unet(1, 2, dimensions=3)
    with pytest.raises(SuiteError, match="dimensions=2: transbts is a 3D network"):
        transbts(1, 2, image_size=16, dimensions=2)
    with pytest.raises(SuiteError, match="got 4, 4 and 2 entries"):
        swin_unet(1, 2, decoder_depths=(2, 2))
    with pytest.raises(SuiteError, match="6 heads do not divide"):
        swin_unet(1, 2, features=20, heads=(1, 6, 5, 5))
    with pytest.raises(SuiteError, match="features=12 must be divisible by 8"):
        transbts(1, 2, image_size=16, features=12)
    with pytest.raises(SuiteError, match="has 2 numbers, but dimensions=3"):
        transbts(1, 2, image_size=(16, 16))


@pytest.mark.parametrize(("factory", "size"), [(small_swin, (32, 32)), (small_transbts, (8, 8, 8))])
def test_dropout_is_made_of_modules_and_acts_in_training_only(factory, size):
    """Monte-Carlo dropout switches modules, so no rate may hide in a functional call."""
    torch.manual_seed(0)
    network = factory(1, 2, dropout=0.3)
    image = torch.randn(1, 1, *size)
    assert not torch.equal(network(image), network(image))
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            assert module.p == 0.3
            module.eval()
    assert torch.equal(network(image), network.eval()(image))


def test_swin_unet_in_a_slab_of_slices():
    network = SlabChannels(2, 3, network=small_swin, slab=3)
    assert network(torch.randn(1, 2, 20, 24, 3)).shape == (1, 3, 20, 24)


# parts of Swin-Unet


def test_windows_and_back():
    x = torch.arange(2 * 6 * 9).reshape(2, 6, 9, 1)
    windows = to_windows(x, 3)
    assert windows.shape == (2, 6, 9, 1)
    assert windows[1, 4, :, 0].tolist() == x[1, 3:6, 3:6, 0].flatten().tolist()  # second row, second column of windows
    assert torch.equal(from_windows(windows, 3, (6, 9)), x)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("size", [(12, 8), (4, 12), (4, 4)])
def test_block_is_monai_s_where_windows_divide_the_map(shifted, size):
    from monai.networks.nets.swin_unetr import SwinTransformerBlock, compute_mask

    torch.manual_seed(0)
    ours = SwinBlock(6, heads=2, window=4, shifted=shifted, dropout=0.0)
    shift = 2 if shifted and size != (4, 4) else 0
    theirs = SwinTransformerBlock(6, 2, (4, 4), (shift, shift))
    pairs = {
        "norm1": ours.attention_norm, "norm2": ours.mlp_norm, "attn.qkv": ours.attention.qkv, "attn.proj": ours.attention.out,
        "mlp.linear1": ours.mlp[0], "mlp.linear2": ours.mlp[3],
    }  # fmt: skip
    for name, layer in pairs.items():
        nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
        theirs.get_submodule(name).load_state_dict(layer.state_dict())
    theirs.attn.relative_position_bias_table.data.copy_(nn.init.normal_(ours.attention.bias).detach().T)
    shifts = tuple(shift if s > 4 else 0 for s in size)
    mask = compute_mask(size, (4, 4), shifts, "cpu") if any(shifts) else None
    x = torch.randn(2, *size, 6)
    torch.testing.assert_close(ours(x), theirs(x, mask), rtol=1e-4, atol=1e-4)


def reach(block, size, token):
    """Tokens that an output token depends on, by gradient."""
    x = torch.randn(1, *size, 4, requires_grad=True)
    block(x)[(0, *token)].sum().backward()
    return {tuple(p) for p in x.grad[0].abs().sum(-1).nonzero().tolist()}


def rectangle(rows, columns):
    return {(i, j) for i in rows for j in columns}


def test_tokens_see_their_window():
    torch.manual_seed(0)
    plain, shifted = (SwinBlock(4, heads=1, window=4, shifted=s, dropout=0.0) for s in (False, True))
    assert reach(plain, (8, 8), (1, 6)) == rectangle(range(4), range(4, 8))
    assert reach(shifted, (8, 8), (1, 3)) == rectangle(range(2), range(2, 6))  # the first rows meet no rows from the other end
    assert reach(shifted, (8, 8), (7, 7)) == rectangle((6, 7), (6, 7))
    assert reach(plain, (6, 5), (5, 4)) == rectangle((4, 5), (4,))
    assert reach(shifted, (6, 5), (5, 4)) == rectangle((2, 3, 4, 5), (2, 3, 4))
    assert reach(shifted, (3, 8), (0, 0)) == rectangle(range(3), range(2))  # one window of rows is not shifted


def test_attention_in_a_padded_window_is_that_among_its_real_tokens():
    torch.manual_seed(0)
    block = SwinBlock(4, heads=1, window=4, shifted=False, dropout=0.0)
    attention = block.attention
    nn.init.normal_(attention.qkv.bias)  # so that a padded token has a key and a value
    x = torch.randn(1, 4, 3, 4)
    real = [4 * i + j for i in range(4) for j in range(3)]
    q, k, v = attention.qkv(block.attention_norm(x).flatten(1, 2)).chunk(3, dim=-1)
    scores = q @ k.transpose(1, 2) / 4**0.5 + attention.bias[0, attention.relative[real][:, real]]
    y = x + attention.out(scores.softmax(-1) @ v).reshape(x.shape)
    torch.testing.assert_close(block(x), y + block.mlp(block.mlp_norm(y)))


def test_merging_and_expanding():
    merge = PatchMerging(1)
    merge.norm = nn.Identity()
    nn.init.eye_(merge.reduce.weight)
    x = torch.arange(16.0).reshape(1, 4, 4, 1)
    assert merge(x)[0, 0, 1].tolist() == [2.0, 6.0]  # the first two of the tokens (0, 2), (1, 2), (0, 3), (1, 3)
    expand = PatchExpanding(4, 1, 2)
    expand.norm = nn.Identity()
    nn.init.eye_(expand.expand.weight)
    x = torch.arange(8.0).reshape(1, 1, 2, 4)
    assert expand(x)[0, :, :, 0].tolist() == [[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]


# parts of TransBTS


def test_every_token_of_transbts_sees_every_other():
    """Two images that differ in one far corner differ at the other one, where convolutions alone do not reach."""
    torch.manual_seed(0)
    network = small_transbts(1, 2, image_size=(64, 16, 16)).eval()
    x = torch.randn(1, 1, 64, 16, 16)
    y = x.clone()
    y[..., -1, -1, -1] += 10
    for norm in (m for m in network.modules() if isinstance(m, nn.GroupNorm)):
        norm.forward = lambda z: z  # statistics over the whole map would carry the difference as well
    assert (network(x) - network(y)).abs()[0, :, 0, 0, 0].max() > 0
    network._transformed = lambda z: z
    assert (network(x) - network(y)).abs()[0, :, 0, 0, 0].max() == 0


def test_position_embedding_is_interpolated_for_other_sizes():
    network = small_transbts(1, 2, image_size=(16, 8, 8)).eval()
    assert network.position.shape == (1, 16, 2, 1, 1)
    with torch.no_grad():
        network.position[0, :, 0], network.position[0, :, 1] = 0.0, 4.0
        network.transformer = nn.Identity()
        tokens = network._transformed(torch.zeros(1, 16, 4, 1, 1))
    assert tokens[0, 0, :, 0, 0].tolist() == [0.0, 1.0, 3.0, 4.0]
