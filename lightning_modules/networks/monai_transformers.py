"""MONAI's transformers: UNETR and Swin UNETR."""

from collections.abc import Sequence

import torch
from monai.networks.nets import (
    UNETR,
    SwinUNETR,
)
from monai.networks.nets.swin_unetr import SwinTransformerBlock
from torch import nn
from torch.overrides import TorchFunctionMode

from lesionbench.errors import SuiteError
from lesionbench.ranges import BelowOne, Count, Dimensions
from lightning_modules.networks.contract import describe, per_axis


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
    image_size: Count | Sequence[Count],
    dimensions: Dimensions = 3,
    feature_size: Count = 16,
    hidden_size: Count = 768,
    mlp_size: Count = 3072,
    heads: Count = 12,
    dropout: BelowOne = 0.0,
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
    parts = {
        "encoder": ("vit", "encoder1", "encoder2", "encoder3", "encoder4"),
        "decoder": ("decoder5", "decoder4", "decoder3", "decoder2"),
        "heads": ("out",),
    }
    return describe(network, dimensions, divisor=size, fixed_size=size, parts=parts)


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
    dimensions: Dimensions = 3,
    feature_size: Count = 48,
    depths: Sequence[Count] = (2, 2, 2, 2),
    heads: Sequence[Count] = (3, 6, 12, 24),
    attention_window: Count = 7,
    shift: bool = True,
    dropout: BelowOne = 0.0,
    gradient_checkpointing: bool = False,
) -> SwinUNETR:
    """Shifted-window transformer encoder, convolutional decoder (Hatamizadeh et al., BrainLes 2021).

    Args:
        feature_size: width after patch embedding, a multiple of 12.
        depths, heads: transformer blocks and attention heads of the four stages.
        attention_window: side of the attention windows, in tokens.
        shift: move the windows of every second block by half a side, so that attention crosses their borders; without, nothing does
            within a stage. No parameter depends on it.
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
    for block in network.modules():
        if isinstance(block, SwinTransformerBlock) and not shift:
            block.shift_size = (0,) * dimensions
    parts = {
        "encoder": ("swinViT", "encoder1", "encoder2", "encoder3", "encoder4"),
        "bottleneck": ("encoder10",),
        "decoder": ("decoder5", "decoder4", "decoder3", "decoder2", "decoder1"),
        "heads": ("out",),
    }
    return describe(network, dimensions, 32, 64, parts=parts)
