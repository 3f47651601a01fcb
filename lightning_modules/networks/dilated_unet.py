"""The segmentation network of the reciprocal adversarial method: a U-Net with three poolings and a dilated bottom."""

import torch
import torch.nn.functional as F
from torch import nn

from lesionbench.errors import unknown
from lightning_modules.networks.contract import describe

NORMS = ("group", "instance", "batch")


class DilatedUNet(nn.Module):
    """U-Net whose lowest level is followed by dilated convolutions at the same resolution (Peiris et al., BrainLes 2021, Section 3.3).

    The decoder upsamples linearly (corners aligned). Kaiming initialization (fan out); normalization layers start as the identity.

    Args:
        in_channels: image channels M.
        out_channels: logit channels K.
        dimensions: 2 or 3.
        width: channels at full resolution; doubled at each of the three poolings. 48 in the paper.
        norm: `group` (16 groups, or the largest number up to 16 that divides the channels), `instance` or `batch`.

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), sides divisible by 8.

    Raises:
        SuiteError: an unknown norm.
    """

    def __init__(self, in_channels: int, out_channels: int, *, dimensions: int = 3, width: int = 48, norm: str = "group") -> None:
        super().__init__()
        if norm not in NORMS:
            raise unknown("network.norm", norm, NORMS)
        parts = {
            "encoder": ("encoder1", "encoder2", "encoder3", "encoder4"),
            "bottleneck": ("bottom", "bottom2"),
            "decoder": ("decoder3", "decoder2", "decoder1"),
            "heads": ("out",),
        }
        describe(self, dimensions, 8, 16, parts=parts)  # one voxel at the bottom is too few to normalize by
        self._convolution = (nn.Conv2d, nn.Conv3d)[dimensions - 2]
        self._pool = (F.max_pool2d, F.max_pool3d)[dimensions - 2]
        self._mode = ("bilinear", "trilinear")[dimensions - 2]
        self._norm = norm
        a, b, c, d = (width * 2**level for level in range(4))
        self.encoder1 = self._block(in_channels, a // 2, a)
        self.encoder2 = self._block(a, b // 2, b)
        self.encoder3 = self._block(b, c // 2, c)
        self.encoder4 = self._block(c, d // 2, d)
        self.bottom = self._block(d, d, d, dilation=2)
        self.bottom2 = self._unit(2 * d, c)
        self.decoder3 = self._block(2 * c, c, b)
        self.decoder2 = self._block(2 * b, b, a)
        self.decoder1 = self._block(2 * a, a, a // 2)
        self.out = self._convolution(a // 2, out_channels, 1)
        for module in self.modules():
            if isinstance(module, self._convolution):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _block(self, n_in: int, n_mid: int, n_out: int, dilation: int = 1) -> nn.Sequential:
        return nn.Sequential(self._unit(n_in, n_mid, dilation), self._unit(n_mid, n_out, dilation))

    def _unit(self, n_in: int, n_out: int, dilation: int = 1) -> nn.Sequential:
        convolution = self._convolution(n_in, n_out, 3, padding=dilation, dilation=dilation, bias=False)
        return nn.Sequential(convolution, self._normalization(n_out), nn.ReLU(inplace=True))

    def _normalization(self, channels: int) -> nn.Module:
        three = self.dimensions == 3
        if self._norm == "group":
            return nn.GroupNorm(next(g for g in range(16, 0, -1) if channels % g == 0), channels)
        if self._norm == "instance":
            return (nn.InstanceNorm3d if three else nn.InstanceNorm2d)(channels, affine=True)
        return (nn.BatchNorm3d if three else nn.BatchNorm2d)(channels)

    def _upsampled(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, scale_factor=2, mode=self._mode, align_corners=True)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        down1 = self.encoder1(image)
        down2 = self.encoder2(self._pool(down1, 2))
        down3 = self.encoder3(self._pool(down2, 2))
        down4 = self.encoder4(self._pool(down3, 2))
        up = self.bottom2(torch.cat([down4, self.bottom(down4)], dim=1))
        up = self.decoder3(torch.cat([self._upsampled(up), down3], dim=1))
        up = self.decoder2(torch.cat([self._upsampled(up), down2], dim=1))
        up = self.decoder1(torch.cat([self._upsampled(up), down1], dim=1))
        return self.out(up)
