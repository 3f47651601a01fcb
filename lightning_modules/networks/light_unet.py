"""The light 3D U-Net of the modality ablation: widths that double within blocks, linear upsampling, optional pre-activation."""

from collections.abc import Iterator

import torch
from torch import nn

from lesionbench.errors import SuiteError, unknown
from lesionbench.ranges import Count, Dimensions
from lightning_modules.networks.contract import describe, numbered

NORMS = {"batch": (nn.BatchNorm2d, nn.BatchNorm3d), "instance": (nn.InstanceNorm2d, nn.InstanceNorm3d)}
ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "prelu": nn.PReLU}


class LightUNet(nn.Module):
    """U-Net whose encoder doubles the channels in the second convolution of each block (Druzhinina et al., BrainLes 2021, Section 2.2).

    Two 3^d convolutions per block; max pooling, linear upsampling without a convolution, concatenated skip connections. The first
    convolution of all is neither normalized nor pre-activated. Instance normalization has no parameters; a convolution that is
    normalized afterwards has no bias.

    Args:
        in_channels: image channels M.
        out_channels: logit channels K.
        dimensions: 2 or 3.
        blocks: encoding blocks, the one at the bottom included; 3 or 5 in the paper.
        features: channels of the first convolution, the least of all; 4 or 16 in the paper.
        norm: `batch` or `instance`.
        activation: `relu`, `leaky_relu` or `prelu`.
        preactivation: normalization and activation come before each convolution instead of after it.

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), sides divisible by 2^(blocks - 1).

    Raises:
        SuiteError: an unknown norm or activation, less than two blocks.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dimensions: Dimensions = 3,
        blocks: Count = 3,
        features: Count = 4,
        norm: str = "batch",
        activation: str = "relu",
        preactivation: bool = False,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise unknown("network.norm", norm, NORMS)
        if activation not in ACTIVATIONS:
            raise unknown("network.activation", activation, ACTIVATIONS)
        if blocks < 2:
            raise SuiteError(f"network.blocks={blocks}: at least 2, one above the one at the bottom")
        divisor = 2 ** (blocks - 1)
        parts = {
            "encoder": numbered("encoder", blocks - 1),
            "bottleneck": (f"encoder.{blocks - 1}",),
            "decoder": numbered("decoder", blocks - 1),
            "heads": ("out",),
        }
        describe(self, dimensions, divisor, 2 * divisor, parts=parts)  # one voxel at the bottom is too few to normalize by
        self._place, self._norm, self._activation, self._preactivation = dimensions - 2, norm, activation, preactivation
        widths = [2 * features * 2**level for level in range(blocks)]  # what the blocks of the encoder end with
        self.encoder = nn.ModuleList(
            self._block(n_in, n_out // 2, n_out, first=not level)
            for level, (n_in, n_out) in enumerate(zip([in_channels, *widths], widths, strict=False))
        )
        self.pool = (nn.MaxPool2d, nn.MaxPool3d)[self._place](2)
        self.up = nn.Upsample(scale_factor=2, mode=("bilinear", "trilinear")[self._place])
        self.decoder = nn.ModuleList(self._block(3 * width, width, width) for width in widths[-2::-1])
        self.out = (nn.Conv2d, nn.Conv3d)[self._place](widths[0], out_channels, 1)

    def _block(self, n_in: int, n_mid: int, n_out: int, first: bool = False) -> nn.Sequential:
        return nn.Sequential(*self._unit(n_in, n_mid, plain=first), *self._unit(n_mid, n_out))

    def _unit(self, n_in: int, n_out: int, plain: bool = False) -> Iterator[nn.Module]:
        """A convolution with what comes before or after it; `plain`: not normalized, and activated afterwards."""
        before = self._preactivation and not plain
        convolution = (nn.Conv2d, nn.Conv3d)[self._place](n_in, n_out, 3, padding=1, bias=plain or before)
        norm = [] if plain else [NORMS[self._norm][self._place](n_in if before else n_out)]
        around = [*norm, ACTIVATIONS[self._activation]()]
        yield from [*around, convolution] if before else [convolution, *around]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        skips = []
        x = self.encoder[0](image)
        for block in self.encoder[1:]:
            skips.append(x)
            x = block(self.pool(x))
        for block in self.decoder:
            x = block(torch.cat([skips.pop(), self.up(x)], dim=1))
        return self.out(x)
