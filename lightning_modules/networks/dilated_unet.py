"""The segmentation network of the reciprocal adversarial method: a U-Net with three poolings and a dilated bottom."""

import torch
import torch.nn.functional as F
from torch import nn

from lesionbench.ranges import Count, Dimensions
from lightning_modules.networks.contract import describe
from lightning_modules.networks.conv_unit import convolution, double, start_from_kaiming, unit, upsampled


class DilatedUNet(nn.Module):
    """U-Net whose lowest level is followed by dilated convolutions at the same resolution (Peiris et al., BrainLes 2021, Section 3.3).

    The decoder upsamples linearly (corners aligned). Kaiming initialization (fan out); normalization layers start as the identity.

    Args:
        in_channels: image channels M.
        out_channels: logit channels K.
        dimensions: 2 or 3.
        width: channels at full resolution; doubled at each of the three poolings. 48 in the paper.
        norm: `group`, `instance` or `batch`; see `conv_unit.normalization`.

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), sides divisible by 8.

    Raises:
        SuiteError: an unknown norm.
    """

    def __init__(self, in_channels: int, out_channels: int, *, dimensions: Dimensions = 3, width: Count = 48, norm: str = "group") -> None:
        super().__init__()
        parts = {
            "encoder": ("encoder1", "encoder2", "encoder3", "encoder4"),
            "bottleneck": ("bottom", "bottom2"),
            "decoder": ("decoder3", "decoder2", "decoder1"),
            "heads": ("out",),
        }
        describe(self, dimensions, 8, 16, parts=parts)  # one voxel at the bottom is too few to normalize by
        self._pool = (F.max_pool2d, F.max_pool3d)[dimensions - 2]
        a, b, c, d = (width * 2**level for level in range(4))
        self.encoder1 = double(dimensions, in_channels, a // 2, a, norm=norm)
        self.encoder2 = double(dimensions, a, b // 2, b, norm=norm)
        self.encoder3 = double(dimensions, b, c // 2, c, norm=norm)
        self.encoder4 = double(dimensions, c, d // 2, d, norm=norm)
        self.bottom = double(dimensions, d, d, d, norm=norm, dilation=2)
        self.bottom2 = unit(dimensions, 2 * d, c, norm=norm)
        self.decoder3 = double(dimensions, 2 * c, c, b, norm=norm)
        self.decoder2 = double(dimensions, 2 * b, b, a, norm=norm)
        self.decoder1 = double(dimensions, 2 * a, a, a // 2, norm=norm)
        self.out = convolution(dimensions)(a // 2, out_channels, 1)
        start_from_kaiming(self)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        down1 = self.encoder1(image)
        down2 = self.encoder2(self._pool(down1, 2))
        down3 = self.encoder3(self._pool(down2, 2))
        down4 = self.encoder4(self._pool(down3, 2))
        up = self.bottom2(torch.cat([down4, self.bottom(down4)], dim=1))
        up = self.decoder3(torch.cat([upsampled(up, down3.shape[2:]), down3], dim=1))
        up = self.decoder2(torch.cat([upsampled(up, down2.shape[2:]), down2], dim=1))
        up = self.decoder1(torch.cat([upsampled(up, down1.shape[2:]), down1], dim=1))
        return self.out(up)
