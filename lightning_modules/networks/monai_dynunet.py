"""MONAI's DynUNet, and nnU-Net's network made with it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.blocks.dynunet_block import UnetOutBlock
from monai.networks.nets import (
    DynUNet,
)
from torch import nn

from lesionbench.errors import SuiteError
from lesionbench.ranges import BelowOne, Count, Dimensions
from lightning_modules.networks.contract import describe, per_axis
from lightning_modules.networks.monai_unets import normalization, smallest


class DeepDynUNet(DynUNet):
    """DynUNet whose supervision heads come at their own resolution, in training mode only.

    MONAI's forward computes the heads in evaluation too, keeps them (with their graph) on the module, which then cannot be copied, and
    upsamples them; it registers every block twice; and its dropout also strikes logits, which then say "no idea" at random voxels.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self.skip_layers
        self.heads = []

    def get_output_block(self, idx: int) -> UnetOutBlock:
        """Logits from the features of level `idx`, without dropout; also makes the supervision heads."""
        return UnetOutBlock(self.spatial_dims, self.filters[idx], self.out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor | dict[str, Any]:
        return self.decode(self.encode(x))

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Features of every level, finest first, the bottleneck's last."""
        skips = [self.input_block(x)]
        for down in self.downsamples:
            skips.append(down(skips[-1]))
        return [*skips, self.bottleneck(skips[-1])]

    def decode(self, features: list[torch.Tensor]) -> torch.Tensor | dict[str, Any]:
        """Logits from the features of `encode`."""
        *skips, bottleneck = features
        decoded = [bottleneck]
        for up, skip in zip(self.upsamples, reversed(skips), strict=True):
            decoded.append(up(decoded[-1], skip))
        logits = self.output_block(decoded[-1])
        if not (self.training and self.deep_supervision):
            return logits
        deep = [head(features) for head, features in zip(self.deep_supervision_heads, decoded[-2::-1], strict=False)]
        return {"logits": logits, "deep": deep}


class OwnDecoders(nn.Module):
    """One encoder, and for every output channel a decoder of its own ("U-Net-and-a-half", Zhang et al., arXiv:2108.04658, 2021).

    Args:
        networks: one per output channel, each with one output; the first keeps its encoder, the others lose theirs.
    """

    own_decoders = True

    def __init__(self, networks: Sequence[DeepDynUNet]) -> None:
        super().__init__()
        for network in networks[1:]:
            del network.input_block, network.downsamples, network.bottleneck
        self.networks = nn.ModuleList(networks)

    def forward(self, x: torch.Tensor) -> torch.Tensor | dict[str, Any]:
        features = self.networks[0].encode(x)
        outputs = [network.decode(features) for network in self.networks]
        if torch.is_tensor(outputs[0]):
            return torch.cat(outputs, dim=1)
        deep = [torch.cat(heads, dim=1) for heads in zip(*(o["deep"] for o in outputs), strict=True)]
        return {"logits": torch.cat([o["logits"] for o in outputs], dim=1), "deep": deep}


def dynunet(
    in_channels: int,
    out_channels: int,
    *,
    dimensions: Dimensions = 3,
    features: Sequence[Count] = (32, 64, 128, 256, 320, 320),
    kernels: Sequence[Count | Sequence[Count]] = (3, 3, 3, 3, 3, 3),
    strides: Sequence[Count | Sequence[Count]] = (1, 2, 2, 2, 2, 2),
    norm: str = "instance",
    dropout: BelowOne = 0.0,
    residual: bool = False,
    deep_supervision: bool = False,
    own_decoders: bool = False,
) -> DeepDynUNet | OwnDecoders:
    """The U-Net of nnU-Net (Isensee et al., Nature Methods 2021), with anisotropic kernels and strides where wanted.

    Args:
        features, kernels, strides: one entry per level, finest first; the first stride is 1. An entry is one number or one per axis.
        norm: `instance`, `batch` or `group` (8 groups).
        dropout: rate of dropout (of single values) in every convolution block, in [0, 1).
        residual: residual blocks in the encoder.
        deep_supervision: in training mode return `{"logits", "deep"}` with a head on every decoder level but the finest (which is
            `logits`) and the two coarsest, each at its own resolution; with fewer than four levels one head.
        own_decoders: a decoder of its own for every output channel, on one encoder (see `OwnDecoders`).

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), sides divisible by the product of the strides.

    Raises:
        SuiteError: lists of different length or of fewer than three levels, a first stride other than 1, or no normalization.
    """
    if not len(features) == len(kernels) == len(strides) >= 3:
        raise SuiteError(
            f"dynunet: features, kernels and strides need one entry per level and at least 3 levels; "
            f"got {len(features)}, {len(kernels)} and {len(strides)} entries"
        )
    strides = [per_axis(s, dimensions) for s in strides]
    if set(strides[0]) != {1}:
        raise SuiteError(f"dynunet: the first stride must be 1, else logits are smaller than the image; got {list(strides[0])}")
    if norm == "none":
        raise SuiteError("dynunet: norm=none is not available; use basic_unet or unet for a network without normalization")
    divisor = [math.prod(s) for s in zip(*strides, strict=True)]

    def built(outputs: int) -> DeepDynUNet:
        return DeepDynUNet(
            dimensions,
            in_channels,
            outputs,
            kernel_size=[per_axis(k, dimensions) for k in kernels],
            strides=strides,
            upsample_kernel_size=strides[1:],
            filters=list(features),
            dropout=dropout or None,
            norm_name=normalization(norm),
            deep_supervision=deep_supervision,
            deep_supr_num=max(1, len(strides) - 3),
            res_block=residual,
        )

    network = OwnDecoders([built(1) for _ in range(out_channels)]) if own_decoders else built(out_channels)
    first, every = ("networks.0.", [f"networks.{k}." for k in range(out_channels)]) if own_decoders else ("", [""])
    parts = {
        "encoder": [f"{first}input_block", f"{first}downsamples"],
        "bottleneck": [f"{first}bottleneck"],
        "decoder": [f"{path}upsamples" for path in every],
        "heads": [
            f"{path}{name}" for path in every for name in ("output_block", *(["deep_supervision_heads"] if deep_supervision else []))
        ],
    }
    return describe(network, dimensions, divisor, smallest(divisor, norm), parts=parts)


def nnunet(
    in_channels: int,
    out_channels: int,
    *,
    image_size: Count | Sequence[Count],
    dimensions: Dimensions = 3,
    features: Count = 32,
    norm: str = "instance",
    dropout: BelowOne = 0.0,
    deep_supervision: bool = False,
    own_decoders: bool = False,
) -> DeepDynUNet | OwnDecoders:
    """`dynunet` with the depth and widths that nnU-Net derives from the patch (Isensee et al., Nature Methods 2021, isotropic voxels).

    Every axis is halved while at least 4 voxels are left of it; widths double from `features` up to 480 in 2D and 320 in 3D.

    Args:
        image_size: size of the training patches; in 2D their two sides.
        features: width of the finest level.
        norm, dropout, deep_supervision, own_decoders: as `dynunet`.

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial).

    Raises:
        SuiteError: an `image_size` that does not have `dimensions` sides, or is too small (under 16 on every axis).
    """
    sides = per_axis(image_size, dimensions)
    halvings = [max(int(math.log2(side / 4)), 0) for side in sides]
    strides = [[2 if level <= most else 1 for most in halvings] for level in range(1, max(halvings) + 1)]
    if len(strides) < 2:
        raise SuiteError(f"nnunet: network.image_size={list(sides)} is too small; one side must be at least 16")
    widths = [min(features * 2**level, 480 if dimensions == 2 else 320) for level in range(len(strides) + 1)]
    return dynunet(
        in_channels,
        out_channels,
        dimensions=dimensions,
        features=widths,
        kernels=[3] * len(widths),
        strides=[1, *strides],
        norm=norm,
        dropout=dropout,
        deep_supervision=deep_supervision,
        own_decoders=own_decoders,
    )
