"""MONAI's U-Nets and V-Net, brought to the suite's form: `(in_channels, out_channels, *, dimensions, ...)`, logits or a dict, input contract.

Parameter names inside the networks stay MONAI's, so weights trained elsewhere with MONAI load. Where MONAI leaves parameters without
gradient (which stops distributed training), drops the wrong axis or cannot be built on the `meta` device, it is mended here.
"""

from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.blocks import Convolution
from monai.networks.nets import (
    AttentionUnet,
    BasicUNet,
    BasicUNetPlusPlus,
    UNet,
    VNet,
)
from monai.networks.nets.vnet import InputTransition
from torch import nn

from lesionbench.errors import unknown
from lesionbench.ranges import BelowOne, Count, Dimensions, Whole
from lightning_modules.networks.contract import describe, per_axis

NORMS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "instance": ("instance", {"affine": True}),
    "batch": ("batch", {}),
    "group": ("group", {"num_groups": 8}),
    "none": None,
}


def normalization(name: str) -> tuple[str, dict[str, Any]] | None:
    """MONAI's specification of the normalization `name`.

    Raises:
        SuiteError: an unknown name.
    """
    if name not in NORMS:
        raise unknown("network.norm", name, NORMS)
    return NORMS[name]


def smallest(divisor: Sequence[int], norm: str) -> tuple[int, ...]:
    """Sides that leave two voxels per axis at the bottleneck where the statistics of `norm` need more than one, else one."""
    return tuple(d * (2 if norm in ("instance", "batch") else 1) for d in divisor)


def basic_unet(
    in_channels: int,
    out_channels: int,
    *,
    dimensions: Dimensions = 3,
    features: Sequence[Count] = (32, 32, 64, 128, 256, 32),
    norm: str = "instance",
    dropout: BelowOne = 0.0,
) -> BasicUNet:
    """Plain U-Net with five levels, two convolutions each, and transposed convolutions upwards (Falk et al., Nature Methods 2019).

    Args:
        features: widths of the five encoder levels, then of the last decoder level.
        norm: `instance`, `batch`, `group` (8 groups) or `none`.
        dropout: rate of dropout (of single values) in every convolution block, in [0, 1].

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), sides divisible by 16.
    """
    divisor = per_axis(16, dimensions)
    network = BasicUNet(dimensions, in_channels, out_channels, tuple(features), norm=normalization(norm), dropout=dropout)
    parts = {
        "encoder": ("conv_0", "down_1", "down_2", "down_3"),
        "bottleneck": ("down_4",),
        "decoder": ("upcat_4", "upcat_3", "upcat_2", "upcat_1"),
        "heads": ("final_conv",),
    }
    return describe(network, dimensions, divisor, smallest(divisor, norm), parts=parts)


def unet(
    in_channels: int,
    out_channels: int,
    *,
    dimensions: Dimensions = 3,
    channels: Sequence[Count] = (16, 32, 64, 128, 256),
    residual_units: Whole = 2,
    norm: str = "instance",
    dropout: BelowOne = 0.0,
) -> UNet:
    """Residual U-Net with strided convolutions (Kerfoot et al., STACOM 2018).

    Args:
        channels: width of each level, finest first; every level halves the resolution.
        residual_units: convolutions per residual block; 0 = plain convolutions.
        norm: `instance`, `batch`, `group` (8 groups) or `none`. The last decoder convolution is normalized with K channels, so `group`
            needs K divisible by 8.
        dropout: rate of dropout (of single values) in every convolution block, in [0, 1].

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), sides divisible by 2 ** (levels - 1).
    """
    levels = len(channels)
    divisor = per_axis(2 ** (levels - 1), dimensions)
    network = UNet(
        dimensions,
        in_channels,
        out_channels,
        tuple(channels),
        strides=(2,) * (levels - 1),
        num_res_units=residual_units,
        norm=normalization(norm),
        dropout=dropout,
    )
    # every level lies inside the one above it: down, the rest, up; the finest way up ends in the logits
    inside = ["model" + ".1.submodule" * level for level in range(levels)]
    parts = {
        "encoder": [f"{path}.0" for path in inside[:-1]],
        "bottleneck": inside[-1:],
        "decoder": [f"{path}.2" for path in inside[1:-1]],
        "heads": ["model.2"],
    }
    return describe(network, dimensions, divisor, smallest(divisor, norm), parts=parts)


def attention_unet(
    in_channels: int,
    out_channels: int,
    *,
    dimensions: Dimensions = 3,
    channels: Sequence[Count] = (16, 32, 64, 128, 256),
    dropout: BelowOne = 0.0,
) -> AttentionUnet:
    """U-Net with additive attention gates on the skip connections (Oktay et al., MIDL 2018); batch normalization.

    Args:
        channels: width of each level, finest first; every level halves the resolution.
        dropout: rate of dropout (of single values) in the convolution blocks, in [0, 1].

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), sides divisible by 2 ** (levels - 1).
    """
    levels = len(channels)
    divisor = per_axis(2 ** (levels - 1), dimensions)
    network = AttentionUnet(dimensions, in_channels, out_channels, tuple(channels), (2,) * (levels - 1), dropout=dropout)
    return describe(network, dimensions, divisor, smallest(divisor, "batch"), parts=attention_parts(levels))


def attention_parts(levels: int) -> dict[str, list[str]]:
    """The parts of MONAI's AttentionUnet, whose levels lie inside each other."""
    gates = ["model.1" + ".submodule.1" * level for level in range(levels - 1)]
    return {
        "encoder": ["model.0", *(f"{path}.submodule.0" for path in gates[:-1])],
        "bottleneck": [f"{gates[-1]}.submodule"],
        "decoder": [f"{path}.{name}" for path in gates for name in ("attention", "upconv", "merge")],
        "heads": ["model.2"],
    }


class AnyChannels(InputTransition):
    """First block of V-Net for any number of channels: the residual repeats the image channels in turn until 16 are full.

    MONAI takes only divisors of 16; for those the result is the same.
    """

    def __init__(self, dimensions: int, in_channels: int, act: tuple[str, dict[str, Any]]) -> None:
        super().__init__(dimensions, 1, 16, act)
        self.conv_block = Convolution(dimensions, in_channels, 16, kernel_size=5, act=None, norm="batch", bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turn = torch.arange(16, device=x.device) % x.shape[1]
        return self.act_function(self.conv_block(x) + x[:, turn])


def vnet(in_channels: int, out_channels: int, *, dimensions: Dimensions = 3, dropout: BelowOne = 0.5) -> VNet:
    """V-Net: residual stages of 5-voxel convolutions, 16 to 256 features (Milletari et al., 3DV 2016); batch normalization, ELU.

    Args:
        dropout: channel dropout rate, in [0, 1]; on the two coarsest encoder levels, the inputs of the two coarsest decoder levels, and all skips.

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), sides divisible by 16.
    """
    act = ("elu", {"inplace": True})
    divisor = per_axis(16, dimensions)
    network = VNet(dimensions, 1, out_channels, act=act)
    network.in_tr = AnyChannels(dimensions, in_channels, act)
    kind = nn.Dropout3d if dimensions == 3 else nn.Dropout2d  # MONAI's Dropout3d would drop whole samples of a 2D batch
    for block in list(network.children()):
        for name, child in list(block.named_children()):
            if isinstance(child, nn.Dropout3d):
                setattr(block, name, kind(dropout))
    parts = {
        "encoder": ("in_tr", "down_tr32", "down_tr64", "down_tr128"),
        "bottleneck": ("down_tr256",),
        "decoder": ("up_tr256", "up_tr128", "up_tr64", "up_tr32"),
        "heads": ("out_tr",),
    }
    return describe(network, dimensions, divisor, smallest(divisor, "batch"), parts=parts)


class NestedUNet(BasicUNetPlusPlus):
    """UNet++ that returns logits, or `{"logits", "deep"}` in training mode with deep supervision."""

    def forward(self, x: torch.Tensor) -> torch.Tensor | dict[str, Any]:
        *deep, logits = super().forward(x)
        return {"logits": logits, "deep": deep[::-1]} if deep and self.training else logits


def unet_plus_plus(
    in_channels: int,
    out_channels: int,
    *,
    dimensions: Dimensions = 3,
    features: Sequence[Count] = (32, 32, 64, 128, 256, 32),
    norm: str = "instance",
    dropout: BelowOne = 0.0,
    deep_supervision: bool = False,
) -> NestedUNet:
    """U-Net with nested, dense skip pathways (Zhou et al., DLMIA 2018).

    Args:
        features: widths of the five encoder levels, then of the last decoder node.
        norm: `instance`, `batch`, `group` (8 groups) or `none`.
        dropout: rate of dropout (of single values) in every convolution block, in [0, 1].
        deep_supervision: in training mode return `{"logits", "deep"}`; `deep` holds the logits of the three shallower nested U-Nets at
            full resolution, shallowest last (the paper weights all heads equally).

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), sides divisible by 16.
    """
    divisor = per_axis(16, dimensions)
    network = NestedUNet(
        dimensions,
        in_channels,
        out_channels,
        tuple(features),
        deep_supervision,
        norm=normalization(norm),
        dropout=dropout,
    )
    if not deep_supervision:  # MONAI computes the unused heads all the same
        network.final_conv_0_1 = network.final_conv_0_2 = network.final_conv_0_3 = nn.Identity()
    parts = {
        "encoder": [f"conv_{level}_0" for level in range(4)],
        "bottleneck": ["conv_4_0"],
        "decoder": [f"upcat_{level}_{step}" for step in range(1, 5) for level in range(5 - step)],
        "heads": [f"final_conv_0_{step}" for step in range(1, 5)],
    }
    return describe(network, dimensions, divisor, smallest(divisor, norm), parts=parts)
