"""HarDNet-BTS: a U-Net made of harmonic blocks, which keep few of a dense block's shortcuts (Wu & Lin, BrainLes 2021)."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from lesionbench.errors import SuiteError, unknown
from lesionbench.ranges import Count, Dimensions, Positive
from lightning_modules.networks.contract import describe
from lightning_modules.networks.conv_unit import RELU, convolution, unit, upsampled

ACTIVATIONS = {"mish": nn.Mish, "relu": RELU, "leaky_relu": partial(nn.LeakyReLU, inplace=True)}
BLOCKS = ("harmonic", "dense")


def harmonic_links(layer: int) -> list[int]:
    """The layers that layer l = 1, 2, ... reads, 0 being the input of the block: all l - 2^i where 2^i divides l (Chao et al., ICCV 2019)."""
    return [layer - 2**i for i in range(layer.bit_length()) if layer % 2**i == 0]


def harmonic_width(layer: int, growth: int, multiplier: float) -> int:
    """Channels of layer l: growth * multiplier^(how often 2 divides l), made even."""
    twos = (layer & -layer).bit_length() - 1
    return int(int(growth * multiplier**twos + 1) / 2) * 2


class ConvBlock(nn.Module):
    """Layers of 3^3 convolution, batch normalization and activation, each on the concatenation of some earlier ones.

    `harmonic`: links and widths by `harmonic_links` and `harmonic_width`; the block answers with its odd layers and the last one. `dense`:
    every layer reads all before it, has `growth` channels, and all are the answer (DenseNet; Huang et al., CVPR 2017). In neither the input
    is part of the answer.

    Args:
        dimensions: 2 or 3.
        in_channels: of the input.
        growth: channels of an odd layer.
        layers: their number.
        kind: `harmonic` or `dense`.
        multiplier: of `harmonic` widths.
        activation: see `HarDNet`.

    Attributes:
        links: layer l - 1 -> the layers that l reads, 0 = input.
        widths: channels of input and layers.
        out_channels: of the answer.

    Shapes: (B, in_channels, *spatial) -> (B, out_channels, *spatial).
    """

    def __init__(
        self,
        dimensions: int,
        in_channels: int,
        growth: int,
        layers: int,
        *,
        kind: str = "harmonic",
        multiplier: float = 1.7,
        activation: str = "mish",
    ) -> None:
        super().__init__()
        if kind not in BLOCKS:
            raise unknown("network.block", kind, BLOCKS)
        numbers = range(1, layers + 1)
        if kind == "harmonic":
            self.links = [harmonic_links(layer) for layer in numbers]
            self.widths = [in_channels, *(harmonic_width(layer, growth, multiplier) for layer in numbers)]
            self._answer = [layer for layer in numbers if layer % 2 or layer == layers]
        else:
            self.links = [list(range(layer)) for layer in numbers]
            self.widths = [in_channels, *[growth] * layers]
            self._answer = list(numbers)
        self.out_channels = sum(self.widths[layer] for layer in self._answer)
        self.layers = nn.ModuleList(
            unit(dimensions, sum(self.widths[source] for source in links), width, norm="batch", activation=ACTIVATIONS[activation])
            for links, width in zip(self.links, self.widths[1:], strict=True)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = [x]
        for layer, links in zip(self.layers, self.links, strict=True):
            maps.append(layer(torch.cat([maps[source] for source in links], dim=1) if len(links) > 1 else maps[links[0]]))
        return torch.cat([maps[layer] for layer in self._answer], dim=1)


class SoftPool(nn.Module):
    """Halves the resolution: each window of 2 voxels a side becomes the mean of its values, weighed by their softmax (Stergiou et al., ICCV 2021).

    Sides must be even. The softmax is taken in float32 under autocast and does not overflow.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.ndim - 2
        windows = x.reshape(*x.shape[:2], *(m for side in x.shape[2:] for m in (side // 2, 2)))
        windows = windows.permute(0, 1, *range(2, 2 + 2 * n, 2), *range(3, 3 + 2 * n, 2)).flatten(-n)
        return (windows.softmax(dim=-1) * windows).sum(dim=-1)


POOLS = {
    "soft": (SoftPool, SoftPool),
    "avg": (partial(nn.AvgPool2d, 2), partial(nn.AvgPool3d, 2)),
    "max": (partial(nn.MaxPool2d, 2), partial(nn.MaxPool3d, 2)),
}


class HarDNet(nn.Module):
    """U-Net of harmonic blocks at half resolution and below, with soft pooling, Mish and heads on every level (Wu & Lin, BrainLes 2021, Section 2.1).

    The paper gives the two convolutions of 32 and 64 channels before the blocks, three skips, blocks of 8 and 16 layers, pooling, activation,
    linear upsampling and heads of 1^3 convolutions. The remaining numbers are those of the network that its authors released.

    Args:
        in_channels: image channels M.
        out_channels: logit channels K.
        dimensions: 2 or 3.
        features: channels of the two first convolutions, and behind each of the four blocks of the encoder.
        growth: of these four blocks; those of the decoder have the same.
        layers: of these four blocks, likewise.
        multiplier: of harmonic widths; see `harmonic_width`.
        block: `harmonic` or `dense`; see `ConvBlock`.
        pool: `soft`, `avg` or `max`.
        activation: `mish`, `relu` or `leaky_relu`.
        stem_stride: of the first convolution: 2 halves the resolution, as in the released network; 1 does not, as in the text, in which every
            halving is a pooling. The network then takes eight times the memory.
        deep_supervision: heads on the bottom and on the three levels of the decoder.

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), sides divisible by 8 times `stem_stride`; in training with heads {"logits", "deep":
    four more of the same size, the bottom's last}.

    Raises:
        SuiteError: an unknown block, pool or activation, lists of another length, another stride.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dimensions: Dimensions = 3,
        features: Sequence[Count] = (32, 64, 128, 256, 320, 320),
        growth: Sequence[Count] = (14, 16, 20, 20),
        layers: Sequence[Count] = (8, 16, 16, 16),
        multiplier: Positive = 1.7,
        block: str = "harmonic",
        pool: str = "soft",
        activation: str = "mish",
        stem_stride: Count = 2,
        deep_supervision: bool = True,
    ) -> None:
        super().__init__()
        for option, value, known in (("pool", pool, POOLS), ("activation", activation, ACTIVATIONS)):
            if value not in known:
                raise unknown(f"network.{option}", value, known)
        if (len(features), len(growth), len(layers)) != (6, 4, 4):
            given = f"features={list(features)} growth={list(growth)} layers={list(layers)}"
            raise SuiteError(
                f"network: {given}: expected six features (two convolutions, four blocks), four growths and four numbers of layers"
            )
        if stem_stride not in (1, 2):
            raise SuiteError(f"network.stem_stride={stem_stride}: must be 1 or 2")
        parts = {
            "encoder": ("stem", "encoder", "down"),
            "bottleneck": ("bottom", "bottom_down"),
            "decoder": ("up", "decoder"),
            "heads": ("out", "deep"),
        }
        describe(self, dimensions, 8 * stem_stride, 16 * stem_stride, parts=parts)  # one voxel at the bottom is too few to normalize by
        act = ACTIVATIONS[activation]

        def blocks(level: int, n_in: int) -> ConvBlock:
            return ConvBlock(dimensions, n_in, growth[level], layers[level], kind=block, multiplier=multiplier, activation=activation)

        def pointwise(n_in: int, n_out: int) -> nn.Sequential:
            return unit(dimensions, n_in, n_out, norm="batch", kernel=1, activation=act)

        self.stem = nn.Sequential(
            unit(dimensions, in_channels, features[0], norm="batch", stride=stem_stride, activation=act),
            unit(dimensions, features[0], features[1], norm="batch", activation=act),
        )
        self.pool = POOLS[pool][dimensions - 2]()
        self.encoder = nn.ModuleList(blocks(level, features[1 + level]) for level in range(3))
        self.down = nn.ModuleList(pointwise(made.out_channels, features[2 + level]) for level, made in enumerate(self.encoder))
        self.bottom = blocks(3, features[4])
        self.bottom_down = pointwise(self.bottom.out_channels, features[5])
        self.up, self.decoder = nn.ModuleList(), nn.ModuleList()
        widths = [features[5]]
        for level in (2, 1, 0):
            joined = widths[-1] + self.encoder[level].out_channels
            self.up.append(pointwise(joined, joined // 2))
            self.decoder.append(blocks(level, joined // 2))
            widths.append(self.decoder[-1].out_channels)
        self.out = convolution(dimensions)(widths[-1], out_channels, 1)
        self.deep = nn.ModuleList(convolution(dimensions)(n, out_channels, 1) for n in (widths if deep_supervision else ()))

    def forward(self, image: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor | list[torch.Tensor]]:
        size, skips = image.shape[2:], []
        x = self.stem(image)
        for block, down in zip(self.encoder, self.down, strict=True):
            skips.append(block(x))
            x = self.pool(down(skips[-1]))
        levels = [self.bottom_down(self.bottom(x))]
        for up, block in zip(self.up, self.decoder, strict=True):
            skip = skips.pop()
            levels.append(block(up(torch.cat([upsampled(levels[-1], skip.shape[2:]), skip], dim=1))))
        logits = upsampled(self.out(levels[-1]), size)
        if not self.training or not self.deep:
            return logits
        deep = [upsampled(head(features), size) for head, features in zip(self.deep, levels, strict=True)]
        return {"logits": logits, "deep": deep[::-1]}
