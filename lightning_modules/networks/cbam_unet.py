"""The network of positive mining: a U-Net with a dilated bottom whose skips pass through attention."""

import torch
import torch.nn.functional as F
from torch import nn

from lesionbench.errors import unknown
from lesionbench.ranges import Count, Dimensions
from lightning_modules.networks.cbam import CBAM, KINDS
from lightning_modules.networks.contract import describe
from lightning_modules.networks.conv_unit import convolution, double, start_from_kaiming, unit, upsampled

SOURCES = ("raw", "attended")


class CBAMUNet(nn.Module):
    """3D attention U-Net: CBAM on every skip and at the bottom, dilated convolutions there, heads on every level (Singh, BrainLes 2021, Section 2).

    A relative of `DilatedUNet` with wider blocks. The paper gives 48 channels, four stages of double 3^3 convolutions with ReLU, three poolings,
    CBAM, two convolutions of dilation 2, and heads of 1^3 convolutions brought to full size. It gives no normalization and no widths of the
    decoder: groups of 16 here, and the widths of Henry et al. (BrainLes 2020, arXiv:2011.01045), whose network it builds on.

    Args:
        in_channels: image channels M.
        out_channels: logit channels K.
        dimensions: 2 or 3.
        width: channels at full resolution; doubled at each of the three poolings.
        norm: `group`, `instance` or `batch`; see `conv_unit.normalization`.
        attention: `cbam`, `channel` or `spatial` (one gate alone), or `none`.
        reduction, combine: see `cbam.ChannelGate`; the paper prints `product`, Woo et al. `sum`.
        gate_relu: see `cbam.SpatialGate`.
        pool_source: what goes down from an encoder stage: its features as they are (`raw`, as in the text) or `attended`.
        dilation: of the two convolutions at the bottom.
        deep_supervision: four more heads, on both parts of the bottom and on the two lower levels of the decoder.

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), sides divisible by 8; in training with heads {"logits", "deep": four more of the
    same size, from the decoder down to the bottom}.

    Raises:
        SuiteError: an unknown norm, attention, way to combine or source.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dimensions: Dimensions = 3,
        width: Count = 48,
        norm: str = "group",
        attention: str = "cbam",
        reduction: Count = 16,
        combine: str = "sum",
        gate_relu: bool = False,
        pool_source: str = "raw",
        dilation: Count = 2,
        deep_supervision: bool = True,
    ) -> None:
        super().__init__()
        if attention not in (*KINDS, "none"):
            raise unknown("network.attention", attention, (*KINDS, "none"))
        if pool_source not in SOURCES:
            raise unknown("network.pool_source", pool_source, SOURCES)
        parts = {
            "encoder": ("encoder", "attention"),
            "bottleneck": ("bottom", "bottom_attention", "bottom2", "bottom2_attention"),
            "decoder": ("decoder",),
            "heads": ("out", "deep"),
        }
        describe(self, dimensions, 8, 16, parts=parts)  # one voxel at the bottom is too few to normalize by

        def attending(channels: int) -> nn.Module:
            if attention == "none":
                return nn.Identity()
            return CBAM(channels, dimensions=dimensions, kind=attention, reduction=reduction, combine=combine, norm=norm, relu=gate_relu)

        self._pool = (F.max_pool2d, F.max_pool3d)[dimensions - 2]
        self.pool_source = pool_source
        a, b, c, d = widths = [width * 2**level for level in range(4)]
        self.encoder = nn.ModuleList(
            double(dimensions, n_in, n, n, norm=norm) for n_in, n in zip([in_channels, *widths], widths, strict=False)
        )
        self.attention = nn.ModuleList(attending(n) for n in widths)
        self.bottom = double(dimensions, d, d, d, norm=norm, dilation=dilation)
        self.bottom_attention = attending(d)
        self.bottom2 = unit(dimensions, 2 * d, c, norm=norm)
        self.bottom2_attention = attending(c)
        self.decoder = nn.ModuleList(double(dimensions, 2 * n, n, out, norm=norm) for n, out in ((c, b), (b, a), (a, a)))
        self.out = convolution(dimensions)(a, out_channels, 1)
        heads = (d, c, b, a) if deep_supervision else ()
        self.deep = nn.ModuleList(convolution(dimensions)(n, out_channels, 1) for n in heads)
        start_from_kaiming(self)

    def forward(self, image: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor | list[torch.Tensor]]:
        skips: list[torch.Tensor] = []
        down = image
        for level, (block, attention) in enumerate(zip(self.encoder, self.attention, strict=True)):
            down = block(self._pool(down, 2) if level else down)
            skips.append(attention(down))
            if self.pool_source == "attended":
                down = skips[-1]
        levels = [self.bottom_attention(self.bottom(down))]
        levels.append(self.bottom2_attention(self.bottom2(torch.cat([skips.pop(), levels[0]], dim=1))))
        for block in self.decoder:
            skip = skips.pop()
            levels.append(block(torch.cat([upsampled(levels[-1], skip.shape[2:]), skip], dim=1)))
        logits = self.out(levels.pop())
        if not self.training or not self.deep:
            return logits
        deep = [upsampled(head(features), image.shape[2:]) for head, features in zip(self.deep, levels, strict=True)]
        return {"logits": logits, "deep": deep[::-1]}
