"""MONAI's networks, brought to the suite's form: `(in_channels, out_channels, *, dimensions, ...)`, logits or a dict, input contract.

Parameter names inside the networks stay MONAI's, so weights trained elsewhere with MONAI load. Where MONAI leaves parameters without
gradient (which stops distributed training), drops the wrong axis or cannot be built on the `meta` device, it is mended here.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.blocks import Convolution
from monai.networks.blocks.dynunet_block import UnetOutBlock
from monai.networks.nets import (
    UNETR,
    AttentionUnet,
    BasicUNet,
    BasicUNetPlusPlus,
    DynUNet,
    SegResNet,
    SegResNetVAE,
    SwinUNETR,
    UNet,
    VNet,
)
from monai.networks.nets.vnet import InputTransition
from torch import nn
from torch.overrides import TorchFunctionMode

from lesionbench.errors import SuiteError, unknown
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
    dimensions: int = 3,
    features: Sequence[int] = (32, 32, 64, 128, 256, 32),
    norm: str = "instance",
    dropout: float = 0.0,
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
    return describe(network, dimensions, divisor, smallest(divisor, norm))


def unet(
    in_channels: int,
    out_channels: int,
    *,
    dimensions: int = 3,
    channels: Sequence[int] = (16, 32, 64, 128, 256),
    residual_units: int = 2,
    norm: str = "instance",
    dropout: float = 0.0,
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
    return describe(network, dimensions, divisor, smallest(divisor, norm))


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
    dimensions: int = 3,
    features: Sequence[int] = (32, 64, 128, 256, 320, 320),
    kernels: Sequence[int | Sequence[int]] = (3, 3, 3, 3, 3, 3),
    strides: Sequence[int | Sequence[int]] = (1, 2, 2, 2, 2, 2),
    norm: str = "instance",
    dropout: float = 0.0,
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
    return describe(network, dimensions, divisor, smallest(divisor, norm))


def nnunet(
    in_channels: int,
    out_channels: int,
    *,
    image_size: int | Sequence[int],
    dimensions: int = 3,
    features: int = 32,
    norm: str = "instance",
    dropout: float = 0.0,
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


def attention_unet(
    in_channels: int,
    out_channels: int,
    *,
    dimensions: int = 3,
    channels: Sequence[int] = (16, 32, 64, 128, 256),
    dropout: float = 0.0,
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
    return describe(network, dimensions, divisor, smallest(divisor, "batch"))


def segresnet(
    in_channels: int,
    out_channels: int,
    *,
    dimensions: int = 3,
    features: int = 32,
    blocks_down: Sequence[int] = (1, 2, 2, 4),
    blocks_up: Sequence[int] = (1, 1, 1),
    dropout: float = 0.2,
) -> SegResNet:
    """Asymmetric residual encoder-decoder of the BraTS 2018 winner, without its auto-encoder (Myronenko, BrainLes 2018); group norm.

    Args:
        features: width of the finest level, doubled at each further one; a multiple of 8 (the number of groups).
        blocks_down, blocks_up: residual blocks per encoder level, and per decoder level (one level fewer).
        dropout: channel dropout rate after the first convolution, in [0, 1].

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), sides divisible by 2 ** (levels - 1).
    """
    network = SegResNet(
        dimensions,
        features,
        in_channels,
        out_channels,
        dropout_prob=dropout,
        blocks_down=tuple(blocks_down),
        blocks_up=tuple(blocks_up),
    )
    return describe(network, dimensions, per_axis(2 ** (len(blocks_down) - 1), dimensions))


class WeightedSegResNetVAE(SegResNetVAE):
    """SegResNetVAE that returns `{"logits", "loss"}` in training mode and logits otherwise."""

    vae_weight: float

    def forward(self, x: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        if self.training and tuple(x.shape[2:]) != tuple(self.input_image_size):
            raise SuiteError(
                f"segresnet_vae: trained on patches of {list(x.shape[2:])}, but network.image_size={list(self.input_image_size)}; "
                "its auto-encoder has a fixed size, set both to the same"
            )
        logits, vae_loss = super().forward(x)
        return logits if vae_loss is None else {"logits": logits, "loss": self.vae_weight * vae_loss}


def segresnet_vae(
    in_channels: int,
    out_channels: int,
    *,
    image_size: int | Sequence[int],
    dimensions: int = 3,
    features: int = 32,
    blocks_down: Sequence[int] = (1, 2, 2, 4),
    blocks_up: Sequence[int] = (1, 1, 1),
    dropout: float = 0.2,
    vae_weight: float = 0.1,
) -> WeightedSegResNetVAE:
    """SegResNet with a variational auto-encoder branch as regularizer (Myronenko, BrainLes 2018, Eq. 1-3).

    In training mode it returns `{"logits", "loss"}`, loss = vae_weight * (mean squared reconstruction error of the input + KL term,
    averaged over the 256 latent variables); in evaluation logits, and the branch is not computed. Unlike in the paper, the branch shares
    the blocks of the segmentation decoder (without its skips).

    Args:
        image_size: size of the training patches, divisible by 2 ** levels. Evaluation takes any size that fits `divisor`.
        features, blocks_down, blocks_up, dropout: as `segresnet`.
        vae_weight: weight of the branch's loss (0.1 in the paper).

    Raises:
        SuiteError: an `image_size` that is not divisible, or (in training) an input of another size.
    """
    size = per_axis(image_size, dimensions)
    half = 2 ** (len(blocks_down) - 1)
    if any(s % (2 * half) for s in size):
        raise SuiteError(f"segresnet_vae: network.image_size={list(size)} must be divisible by {2 * half}")
    network = WeightedSegResNetVAE(
        size,
        vae_estimate_std=True,  # else MONAI leaves a layer without gradient, and has no KL term
        spatial_dims=dimensions,
        init_filters=features,
        in_channels=in_channels,
        out_channels=out_channels,
        dropout_prob=dropout,
        blocks_down=tuple(blocks_down),
        blocks_up=tuple(blocks_up),
    )
    network.vae_weight = vae_weight
    return describe(network, dimensions, half)


class FixedUNETR(UNETR):
    """UNETR that names the mismatch when an image of another size arrives (its position embedding has a fixed size)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if tuple(x.shape[2:]) != self.fixed_size:
            raise SuiteError(
                f"unetr: got an image of {list(x.shape[2:])}, but network.image_size={list(self.fixed_size)}; "
                "set it, the patch and the inferer's window to the same size"
            )
        return super().forward(x)


def unetr(
    in_channels: int,
    out_channels: int,
    *,
    image_size: int | Sequence[int],
    dimensions: int = 3,
    feature_size: int = 16,
    hidden_size: int = 768,
    mlp_size: int = 3072,
    heads: int = 12,
    dropout: float = 0.0,
) -> FixedUNETR:
    """Vision-transformer encoder of 12 layers on patches of 16 voxels a side, convolutional decoder (Hatamizadeh et al., WACV 2022).

    Args:
        image_size: the one input size it takes, divisible by 16.
        feature_size: width of the finest decoder level.
        hidden_size, mlp_size, heads: width of the transformer, of its feed-forward layers, and attention heads.
        dropout: dropout rate in the transformer, in [0, 1].

    Shapes: (B, M, *image_size) -> logits (B, K, *image_size).

    Raises:
        SuiteError: an `image_size` that is not divisible by 16, or an input of another size.
    """
    size = per_axis(image_size, dimensions)
    if any(s % 16 for s in size):
        raise SuiteError(f"unetr: network.image_size={list(size)} must be divisible by 16")
    network = FixedUNETR(
        in_channels,
        out_channels,
        size,
        feature_size=feature_size,
        hidden_size=hidden_size,
        mlp_dim=mlp_size,
        num_heads=heads,
        dropout_rate=dropout,
        spatial_dims=dimensions,
    )
    for block in network.vit.blocks:
        block.norm_cross_attn = nn.Identity()  # of a cross-attention that is not there
    return describe(network, dimensions, divisor=size, fixed_size=size)


class LinspaceOnCPU(TorchFunctionMode):
    """Keeps `torch.linspace` off the `meta` device: MONAI's Swin transformer reads the numbers of one while it is being built."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def swin_unetr(
    in_channels: int,
    out_channels: int,
    *,
    dimensions: int = 3,
    feature_size: int = 48,
    depths: Sequence[int] = (2, 2, 2, 2),
    heads: Sequence[int] = (3, 6, 12, 24),
    attention_window: int = 7,
    dropout: float = 0.0,
    gradient_checkpointing: bool = False,
) -> SwinUNETR:
    """Shifted-window transformer encoder, convolutional decoder (Hatamizadeh et al., BrainLes 2021).

    Args:
        feature_size: width after patch embedding, a multiple of 12.
        depths, heads: transformer blocks and attention heads of the four stages.
        attention_window: side of the attention windows, in tokens.
        dropout: dropout rate in the transformer, in [0, 1].
        gradient_checkpointing: recompute the encoder in the backward pass; less memory, more time, same result.

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), sides divisible by 32 and one of them at least 64.
    """
    with LinspaceOnCPU():
        network = SwinUNETR(
            in_channels,
            out_channels,
            depths=tuple(depths),
            num_heads=tuple(heads),
            window_size=attention_window,
            feature_size=feature_size,
            drop_rate=dropout,
            use_checkpoint=gradient_checkpointing,
            spatial_dims=dimensions,
        )
    return describe(network, dimensions, 32, 64)


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


def vnet(in_channels: int, out_channels: int, *, dimensions: int = 3, dropout: float = 0.5) -> VNet:
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
    return describe(network, dimensions, divisor, smallest(divisor, "batch"))


class NestedUNet(BasicUNetPlusPlus):
    """UNet++ that returns logits, or `{"logits", "deep"}` in training mode with deep supervision."""

    def forward(self, x: torch.Tensor) -> torch.Tensor | dict[str, Any]:
        *deep, logits = super().forward(x)
        return {"logits": logits, "deep": deep[::-1]} if deep and self.training else logits


def unet_plus_plus(
    in_channels: int,
    out_channels: int,
    *,
    dimensions: int = 3,
    features: Sequence[int] = (32, 32, 64, 128, 256, 32),
    norm: str = "instance",
    dropout: float = 0.0,
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
    return describe(network, dimensions, divisor, smallest(divisor, norm))
