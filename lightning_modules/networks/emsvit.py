"""EMSViT: a transformer on patches whose maps go through convolutions of several sides, each on a part of the channels, before every few layers."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from lesionbench.errors import SuiteError, unknown
from lesionbench.ranges import BelowOne, Count, Dimensions
from lightning_modules.networks.contract import describe, per_axis
from lightning_modules.networks.conv_transformer import TransformerLayer
from lightning_modules.networks.conv_unit import convolution, unit
from lightning_modules.networks.swin import SwinBlock

ATTENTIONS = ("all", "window")
UPSAMPLINGS = ("transposed", "linear")


class MultiScaleSplit(nn.Module):
    """Parts of the channels, convolved with one side of the kernel each (EMSViT, BrainLes 2021, Abstract and Section 3.2).

    Args:
        channels: C, shared out evenly; the last part has what is left over.
        kernels: odd sides, one for each part.
        dimensions: 2 or 3.

    Shapes: (B, C, *spatial) -> (B, C, *spatial).
    """

    def __init__(self, channels: int, kernels: Sequence[int] = (1, 3, 5), dimensions: int = 3) -> None:
        super().__init__()
        share = channels // len(kernels)
        self.widths = [share] * (len(kernels) - 1) + [channels - share * (len(kernels) - 1)]
        self.convolutions = nn.ModuleList(
            convolution(dimensions)(width, width, kernel, padding=kernel // 2, bias=False)
            for width, kernel in zip(self.widths, kernels, strict=True)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.split(self.widths, dim=1)
        return torch.cat([conv(part) for conv, part in zip(self.convolutions, parts, strict=True)], dim=1)


class Stage(nn.Module):
    """A `MultiScaleSplit`, normalized, through GELU and added to its input; then transformer layers on the tokens of the map.

    Args:
        width: C of the map and of a token.
        kernels: of the split.
        blocks, heads, dropout: of the transformer, whose perceptrons are four times as wide as a token.
        window: side of the windows within which tokens attend, every other layer shifted by half of it (2D); None = to all tokens.
        dimensions: 2 or 3.

    Shapes: (B, C, *spatial) -> (B, C, *spatial).
    """

    def __init__(
        self, width: int, kernels: Sequence[int], *, blocks: int, heads: int, dropout: float, window: int | None, dimensions: int
    ) -> None:
        super().__init__()
        self.split = MultiScaleSplit(width, kernels, dimensions)
        self.norm = nn.GroupNorm(1, width)
        self.window = window
        self.blocks = nn.Sequential(
            *(
                TransformerLayer(width, 4 * width, heads, dropout)
                if window is None
                else SwinBlock(width, heads, window, bool(number % 2), dropout)
                for number in range(blocks)
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + F.gelu(self.norm(self.split(x)))
        if self.window is not None:
            return self.blocks(x.movedim(1, -1)).movedim(-1, 1)
        return self.blocks(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])


class EMSViT(nn.Module):
    """Stages of multi-scale convolutions and transformer layers in an encoder and a decoder (EMSViT, BrainLes 2021), a reconstruction.

    The text contradicts itself about sizes and order; what it says throughout is built here: patches, each a token with a learned position;
    `depth` stages (`Stage`) in the encoder and as many in the decoder, all at the resolution of the patches; the decoder's l-th stage reads
    what came before it and, over a skip connection, the input of the encoder's l-th stage from the end; a convolution to fewer channels,
    upsampling with convolutions to full resolution, and a linear projection. Sides are padded with 0 at the far end to a multiple of the
    patch, and the logits are cut again.

    Args:
        in_channels, out_channels: M and K.
        image_size: input size that the position embedding is made for; for another size it is interpolated.
        dimensions: 2 or 3.
        patch_size: side of a patch, a power of 2.
        width: d of a token, a multiple of the heads, at least one for each kernel.
        depth: L, stages of the encoder.
        kernels: odd sides of the convolutions in a stage; as many of side 1 are the same network without a look at neighbors.
        blocks: transformer layers of a stage.
        heads: of attention.
        attention: to `all` tokens, or within a `window`, in 2D alone.
        attention_window: side of such a window, in tokens.
        skips: false leaves the skip connections out.
        upsampling: `transposed` convolutions, or `linear` interpolation with a convolution of side 3.
        head_width: K' channels after the transformer, halved with every doubling of the size.
        dropout: in the transformer, in [0, 1].

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), any size above that of a patch.

    Raises:
        SuiteError: a patch size that is no power of 2, even kernels or none or more than channels, heads that do not divide the width, a
            head too narrow to be halved, an unknown attention or upsampling, windows in 3D.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        image_size: Count | Sequence[Count],
        dimensions: Dimensions = 3,
        patch_size: Count = 8,
        width: Count = 384,
        depth: Count = 4,
        kernels: Sequence[Count] = (1, 3, 5),
        blocks: Count = 3,
        heads: Count = 6,
        attention: str = "all",
        attention_window: Count = 7,
        skips: bool = True,
        upsampling: str = "transposed",
        head_width: Count = 128,
        dropout: BelowOne = 0.0,
    ) -> None:
        super().__init__()
        for name, value, known in (("attention", attention, ATTENTIONS), ("upsampling", upsampling, UPSAMPLINGS)):
            if value not in known:
                raise unknown(f"network.{name}", value, known)
        doublings = patch_size.bit_length() - 1
        if patch_size != 2**doublings:
            raise SuiteError(f"network.patch_size={patch_size}: expected a power of 2")
        if not 1 <= len(kernels) <= width or any(kernel % 2 == 0 for kernel in kernels):
            raise SuiteError(f"network.kernels={list(kernels)}: expected one to {width} odd numbers")
        if width % heads:
            raise SuiteError(f"network.heads={heads} does not divide network.width={width}")
        if head_width % patch_size:
            raise SuiteError(f"network.head_width={head_width}: expected a multiple of network.patch_size={patch_size}")
        if attention == "window" and dimensions != 2:
            raise SuiteError(f"network.attention=window is for slices; with network.dimensions={dimensions} use all")
        parts = {"encoder": ("embed", "position", "encoder"), "decoder": ("joins", "decoder", "narrow", "ups"), "heads": ("out",)}
        describe(self, dimensions, 1, patch_size + 1, parts=parts)  # normalization needs two patches
        conv = convolution(dimensions)

        def stage() -> Stage:
            window = attention_window if attention == "window" else None
            return Stage(width, kernels, blocks=blocks, heads=heads, dropout=dropout, window=window, dimensions=dimensions)

        def doubling(n_in: int, n_out: int) -> nn.Sequential:
            if upsampling == "transposed":
                up = (nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 2](n_in, n_out, 2, stride=2)
                return nn.Sequential(up, unit(dimensions, n_out, n_out, norm="group"))
            up = nn.Upsample(scale_factor=2, mode=("bilinear", "trilinear")[dimensions - 2], align_corners=False)
            return nn.Sequential(up, unit(dimensions, n_in, n_out, norm="group"))

        self.patch_size, self.skips = patch_size, skips
        grid = [-(-side // patch_size) for side in per_axis(image_size, dimensions)]
        self.embed = conv(in_channels, width, patch_size, stride=patch_size)
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, width, *grid), std=0.02))
        self.encoder = nn.ModuleList(stage() for _ in range(depth))
        self.joins = nn.ModuleList(conv((1 + skips) * width, width, 1) for _ in range(depth))
        self.decoder = nn.ModuleList(stage() for _ in range(depth))
        self.narrow = unit(dimensions, width, head_width, norm="group")
        self.ups = nn.Sequential(*(doubling(head_width >> step, head_width >> step + 1) for step in range(doublings)))
        self.out = conv(head_width >> doublings, out_channels, 1)
        self._mode = ("bilinear", "trilinear")[dimensions - 2]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        sides = image.shape[2:]
        x = self.embed(F.pad(image, [margin for side in reversed(sides) for margin in (0, -side % self.patch_size)]))
        position = self.position
        if position.shape[2:] != x.shape[2:]:
            position = F.interpolate(position, x.shape[2:], mode=self._mode, align_corners=False)
        x, inputs = x + position, []
        for stage in self.encoder:
            inputs.append(x)
            x = stage(x)
        for join, stage in zip(self.joins, self.decoder, strict=True):
            skipped = inputs.pop()
            x = stage(join(torch.cat([x, skipped], dim=1) if self.skips else x))
        return self.out(self.ups(self.narrow(x)))[(..., *(slice(0, side) for side in sides))]
