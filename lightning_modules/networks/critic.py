"""The voxel-wise critic of adversarial segmentation."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from lesionbench.errors import SuiteError, unknown
from lesionbench.ranges import Count, Dimensions, Whole

NORMS = ("none", "batch", "instance", "spectral")
INPUTS = ("mask", "mask_image")


class PixelCritic(nn.Module):
    """Four convolutions at full resolution that tell true masks from predicted ones, voxel by voxel (Peiris et al., BrainLes 2021).

    Args:
        channels: mask channels K.
        image_channels: image channels M, seen only with `input` = `mask_image`.
        dimensions: 2 or 3.
        widths: channels of the hidden layers.
        kernel: 1 judges every voxel's own K values; 3 sees a neighborhood of 9 voxels a side. Odd.
        norm: `none`, `batch` (that of the paper; in evaluation mode it mixes the statistics of true and predicted masks, which may turn
            its answers around), `instance` or `spectral` (Miyato et al., ICLR 2018).
        single: one answer per voxel instead of one per voxel and mask channel.
        last_norm_act: normalization and LeakyReLU also after the last convolution.
        input: `mask` or `mask_image`.

    Shapes: masks (B, K, *spatial) in [0, 1], image (B, M, *spatial) -> logits (B, K or 1, *spatial); their sigmoid is the confidence
    that the voxel comes from a true mask.

    Raises:
        SuiteError: an unknown option or an even kernel.
    """

    def __init__(
        self,
        channels: Count,
        image_channels: Whole = 0,
        *,
        dimensions: Dimensions = 3,
        widths: Sequence[Count] = (16, 32, 64),
        kernel: Count = 1,
        norm: str = "none",
        single: bool = False,
        last_norm_act: bool = False,
        input: str = "mask",
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise unknown("critic.norm", norm, NORMS)
        if input not in INPUTS:
            raise unknown("critic.input", input, INPUTS)
        if kernel % 2 == 0 or dimensions not in (2, 3):
            raise SuiteError(f"critic: kernel={kernel} must be odd, dimensions={dimensions} must be 2 or 3")
        self.input = input
        sizes = [channels + (image_channels if input == "mask_image" else 0), *widths, 1 if single else channels]
        layers: list[nn.Module] = []
        for number, (n_in, n_out) in enumerate(pairwise(sizes)):
            plain = number == len(widths) and not last_norm_act
            convolution = (nn.Conv2d, nn.Conv3d)[dimensions - 2]
            layer = convolution(n_in, n_out, kernel, padding=kernel // 2, bias=plain or norm in ("none", "spectral"))
            layers.append(spectral_norm(layer) if norm == "spectral" else layer)
            if not plain and norm == "batch":
                layers.append((nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 2](n_out))
            if not plain and norm == "instance":
                layers.append((nn.InstanceNorm2d, nn.InstanceNorm3d)[dimensions - 2](n_out, affine=True))
            if not plain:
                layers.append(nn.LeakyReLU(0.2, inplace=True))
        self.layers = nn.Sequential(*layers)

    def forward(self, masks: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
        return self.layers(torch.cat([masks, image], dim=1) if self.input == "mask_image" else masks)
