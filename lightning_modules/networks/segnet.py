"""nnSegNet: nnU-Net's encoder with a decoder that puts maxima back where they came from, and the two networks that it is compared with."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lesionbench.errors import SuiteError, unknown
from lesionbench.ranges import Count, Dimensions
from lightning_modules.networks.contract import describe

DECODERS = ("unpool", "small", "transposed")
ORDERS = ("conv_act_norm", "conv_norm_act")


class SegNet(nn.Module):
    """U-shaped network whose decoder is that of a SegNet (Jabareen & Lukassen, BrainLes 2021, Section 2.3 and Table 1).

    Every level has two blocks, a convolution of 3^n with bias, leaky ReLU (0.01) and instance normalization. A decoder level that leads to
    F channels is one of

    - `unpool`: max-unpooling to the places that the encoder's pooling remembers, joined with the encoder's features, blocks 2F -> F -> F',
      where F' are the channels of the next unpooling;
    - `small`: max-unpooling and one block F -> F', without the encoder's features;
    - `transposed`: nnU-Net's, as the base line: strided convolutions instead of pooling, a transposed convolution, blocks 2F -> F -> F.

    Kaiming initialization for the leaky ReLU. Unpooling has no deterministic backward pass on CUDA.

    Args:
        in_channels: image channels M.
        out_channels: logit channels K.
        dimensions: 2 or 3.
        features: channels of the levels, finest first, the bottleneck's last.
        decoder: one of `DECODERS`.
        order: `conv_act_norm` or `conv_norm_act`, of a block.
        deep_supervision: in training mode return `{"logits", "deep"}` with a head on every decoder level, at its own resolution.

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), sides divisible by 2 ** (levels - 1).

    Raises:
        SuiteError: an unknown decoder or order, fewer than two levels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dimensions: Dimensions = 3,
        features: Sequence[Count] = (32, 64, 128, 256, 320, 320),
        decoder: str = "unpool",
        order: str = "conv_act_norm",
        deep_supervision: bool = True,
    ) -> None:
        super().__init__()
        if decoder not in DECODERS:
            raise unknown("network.decoder", decoder, DECODERS)
        if order not in ORDERS:
            raise unknown("network.order", order, ORDERS)
        if len(features) < 2:
            raise SuiteError(f"network.features={list(features)}: two levels at least, the bottleneck's last")
        if decoder != "transposed" and features[-1] != features[-2]:
            raise SuiteError(
                f"network.features={list(features)}: unpooling keeps the number of channels, so the bottleneck has as many as the level above it"
            )
        divisor = 2 ** (len(features) - 1)
        parts = {"encoder": ("encoder",), "bottleneck": ("bottleneck",), "decoder": ("ups", "decoder"), "heads": ("heads",)}
        describe(self, dimensions, divisor, 2 * divisor, parts=parts)  # one voxel at the bottleneck is too few to normalize by
        self.pooling, self.deep_supervision, self._order = decoder != "transposed", deep_supervision, order
        self._joined = decoder != "small"
        three = dimensions == 3
        self._convolution = nn.Conv3d if three else nn.Conv2d
        self._normalization = nn.InstanceNorm3d if three else nn.InstanceNorm2d
        levels, lowest = list(features[:-1]), features[-1]
        stride = 1 if self.pooling else 2
        before = [in_channels, *levels[:-1]]
        self.encoder = nn.ModuleList(
            nn.Sequential(self._block(a, b, 1 if number == 0 else stride), self._block(b, b))
            for number, (a, b) in enumerate(zip(before, levels, strict=True))
        )
        self.bottleneck = nn.Sequential(self._block(levels[-1], lowest, stride), self._block(lowest, lowest))
        self.pool = (nn.MaxPool3d if three else nn.MaxPool2d)(2, return_indices=True)
        self.ups, self.decoder, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        unpool, transposed = (nn.MaxUnpool3d, nn.ConvTranspose3d) if three else (nn.MaxUnpool2d, nn.ConvTranspose2d)
        below = lowest
        for number, width in reversed(list(enumerate(levels))):
            after = levels[max(number - 1, 0)] if self.pooling else width
            self.ups.append(unpool(2) if self.pooling else transposed(below, width, 2, stride=2, bias=False))
            joined = [self._block(2 * width, width), self._block(width, after)]
            self.decoder.append(nn.Sequential(*(joined if self._joined else [self._block(width, after)])))
            self.heads.append(self._convolution(after, out_channels, 1, bias=False))
            below = after
        for module in self.modules():
            if isinstance(module, self._convolution | transposed):
                nn.init.kaiming_normal_(module.weight, a=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _block(self, n_in: int, n_out: int, stride: int = 1) -> nn.Sequential:
        act, norm = nn.LeakyReLU(0.01, inplace=True), self._normalization(n_out, affine=True)
        convolution = self._convolution(n_in, n_out, 3, stride=stride, padding=1)
        return nn.Sequential(convolution, *((act, norm) if self._order == "conv_act_norm" else (norm, act)))

    def forward(self, image: torch.Tensor) -> torch.Tensor | dict[str, Any]:
        skips, places, x = [], [], image
        for level in self.encoder:
            x = level(x)
            skips.append(x)
            if self.pooling:
                x, where = self.pool(x)
                places.append(where)
        x = self.bottleneck(x)
        every = []
        for up, blocks, head in zip(self.ups, self.decoder, self.heads, strict=True):
            skip = skips.pop()
            x = up(x, places.pop()) if self.pooling else up(x)
            x = blocks(torch.cat([x, skip], dim=1) if self._joined else x)
            every.append((head, x))
        if not (self.training and self.deep_supervision):
            head, x = every[-1]
            return head(x)
        logits = [head(x) for head, x in reversed(every)]
        return {"logits": logits[0], "deep": logits[1:]}
