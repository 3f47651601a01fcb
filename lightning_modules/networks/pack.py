"""2.5D with 3D convolutions: a pack of neighboring slices goes in, the middle slice is segmented."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import interpolate

from lesionbench.errors import SuiteError
from lesionbench.ranges import BelowOne, Count
from lightning_modules.networks.contract import describe, numbered, parts_of, within


class PackUNet(nn.Module):
    """U-Net of a pack of slices that shrinks and grows in the plane only (2.5D network of Zhao et al., JBHI 2023).

    The paper gives its size (1.323 M parameters) but no plan. This one has the widths of the paper's 2D and 3D U-Nets, 3x3x1 kernels on
    the finest `flat_levels` levels and 3x3x3 below, where slices meet; 1x1x1 convolutions and linear interpolation upwards: 1,320,452
    parameters with 4 channels and 4 classes. On the way up, the flat levels compute the middle slice only.

    Args:
        in_channels: image channels M.
        out_channels: logit channels K.
        features: widths of the encoder levels, finest first, then of the last decoder level.
        slab: slices k of a pack, odd.
        flat_levels: levels without exchange between slices, at least 1 and fewer than there are levels.
        dropout: rate of dropout (of single values) in every convolution block, in [0, 1).

    Shapes: (B, M, H, W, k) -> logits (B, K, H, W), H and W divisible by 2 ** (levels - 1).

    Raises:
        SuiteError: an even slab, no flat level, or no level on which slices meet; an input with another number of slices.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        features: Sequence[Count] = (16, 16, 32, 64, 128, 16),
        slab: Count = 3,
        flat_levels: Count = 2,
        dropout: BelowOne = 0.0,
    ) -> None:
        super().__init__()
        *widths, last = features
        middle_of(slab)
        if not 0 < flat_levels < len(widths):
            raise SuiteError(f"network.flat_levels={flat_levels}: expected at least 1 and fewer than the {len(widths)} levels of features")
        self.flat_levels = flat_levels
        depths = [1 if level < flat_levels else 3 for level in range(len(widths))]
        before = [in_channels, *widths]
        self.encoder = nn.ModuleList(_double(before[i], widths[i], depths[i], dropout) for i in range(len(widths)))
        narrowed = [
            widths[i + 1] // 2 if i else widths[1] for i in range(len(widths) - 1)
        ]  # nothing is halved on the way to the finest level
        leaving = [last, *widths[1:]]
        self.narrow = nn.ModuleList(nn.Conv3d(leaving[i + 1], narrowed[i], 1) for i in range(len(narrowed)))
        self.decoder = nn.ModuleList(_double(widths[i] + narrowed[i], leaving[i], depths[i], dropout) for i in range(len(narrowed)))
        self.head = nn.Conv3d(last, out_channels, 1)
        coarsest = len(widths) - 1
        parts = {
            "encoder": numbered("encoder", coarsest),
            "bottleneck": (f"encoder.{coarsest}",),
            "decoder": ("narrow", "decoder"),
            "heads": ("head",),
        }
        describe(self, 2, 2**coarsest, slab=slab, parts=parts)

    def forward(self, pack: torch.Tensor) -> torch.Tensor:
        require_pack(pack, self.slab)
        x, skips = pack, []
        for level, block in enumerate(self.encoder):
            x = block(nn.functional.max_pool3d(x, (2, 2, 1)) if level else x)
            skips.append(x)
        for level in reversed(range(len(self.decoder))):
            skip = skips[level]
            if level < self.flat_levels:
                x, skip = (t[..., t.shape[-1] // 2, None] for t in (x, skip))
            x = interpolate(self.narrow[level](x), scale_factor=(2, 2, 1), mode="trilinear", align_corners=True)
            x = self.decoder[level](torch.cat([skip, x], dim=1))
        return self.head(x)[..., 0]


class MiddleSlice(nn.Module):
    """Makes a 3D network that keeps the number of slices a 2.5D one: a pack (B, M, H, W, k) -> its logits of the middle slice.

    Args:
        network: (B, M, H, W, k) -> logits (B, K, H, W, k).
        divisor: what H and W must be multiples of.
        slab: slices k, odd.
    """

    def __init__(self, network: nn.Module, divisor: int, slab: int) -> None:
        super().__init__()
        self.network, self.middle = network, middle_of(slab)
        describe(self, 2, divisor, slab=slab, parts=within(parts_of(network), "network"))

    def forward(self, pack: torch.Tensor) -> torch.Tensor:
        require_pack(pack, self.slab)
        return self.network(pack)[..., self.middle]


def pack_attention_unet(
    in_channels: int, out_channels: int, *, channels: Sequence[Count] = (16, 32, 64, 128, 256), slab: Count = 3, dropout: BelowOne = 0.0
) -> MiddleSlice:
    """U-Net with additive attention gates (Oktay et al., MIDL 2018) on packs of slices, strided in the plane only.

    Args:
        channels: width of each level, finest first; every level halves the plane.
        slab: slices k of a pack, odd.
        dropout: rate of dropout (of single values) in the convolution blocks, in [0, 1].

    Shapes: (B, M, H, W, k) -> logits (B, K, H, W), H and W divisible by 2 ** (levels - 1).
    """
    from monai.networks.nets import AttentionUnet

    from lightning_modules.networks.monai_unets import attention_parts

    steps = len(channels) - 1
    network = AttentionUnet(3, in_channels, out_channels, tuple(channels), ((2, 2, 1),) * steps, dropout=dropout)
    network.parts = attention_parts(len(channels))
    return MiddleSlice(network, 2**steps, slab)


def middle_of(slab: int) -> int:
    """Index of the middle slice.

    Raises:
        SuiteError: an even slab, which has none.
    """
    if slab < 1 or slab % 2 == 0:
        raise SuiteError(f"network.slab={slab}: a slab needs a middle slice, use an odd number")
    return slab // 2


def require_pack(image: torch.Tensor, slab: int) -> None:
    """Refuses what is no pack (B, M, H, W, slab)."""
    if image.dim() != 5 or image.shape[-1] != slab:
        raise SuiteError(f"a network on packs takes (B, M, H, W, {slab}), got {tuple(image.shape)}: set data.view=slab data.slab={slab}")


def _double(inside: int, outside: int, depth: int, dropout: float) -> nn.Sequential:
    """Two blocks of convolution, instance normalization, dropout and leaky ReLU, in the order of MONAI's BasicUNet."""
    layers = []
    for width in (inside, outside):
        layers += [
            nn.Conv3d(width, outside, (3, 3, depth), padding=(1, 1, depth // 2)),
            nn.InstanceNorm3d(outside, affine=True),
            nn.Dropout(dropout),
            nn.LeakyReLU(0.1, inplace=True),
        ]
    return nn.Sequential(*layers)
